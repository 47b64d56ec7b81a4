//! Guest memory on the wire.
