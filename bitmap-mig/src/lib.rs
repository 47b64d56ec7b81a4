//! Named dirty bitmaps: in memory, digest, selection, stores.
