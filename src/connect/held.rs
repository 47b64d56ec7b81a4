//! One direction of a connection, with what lives as long as it does.

use std::io::{self, IoSlice, Read, Write};

/// One direction of a connection, and what is let go of with it.
pub(super) struct Held<E, T> {
    pub(super) end: E,
    pub(super) _with: T,
}

impl<T> Read for Held<Box<dyn Read + Send>, T> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.end.read(buf)
    }
}

impl<T> Write for Held<Box<dyn Write + Send>, T> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.end.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.end.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.end.flush()
    }
}
