//! A migration destination for a stock QEMU.
