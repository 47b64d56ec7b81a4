//! Compressed bodies: one context for each connection and direction, flushed after each record, so
//! that a record can be inflated when it has arrived (SPEC 5).

use std::io;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use format_spec::Problem;
use format_spec::native::hello::{ZLIB, ZSTD};
use zstd::stream::raw::{CParameter, DParameter, InBuffer, Operation, OutBuffer};

use crate::limits::{ZSTD_LARGE_LEVEL, ZSTD_TABLE_LOG, ZSTD_WINDOW_LOG};

/// What compresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// zstd, a window of at most 1 MiB.
    Zstd,
    /// zlib.
    Zlib,
}

impl Method {
    /// The feature bit of the hello.
    pub fn feature(self) -> u64 {
        match self {
            Self::Zstd => ZSTD,
            Self::Zlib => ZLIB,
        }
    }

    /// What was chosen, by the feature bits of the hello.
    pub fn chosen(features: u64) -> Option<Self> {
        [Self::Zstd, Self::Zlib].into_iter().find(|method| features & method.feature() != 0)
    }
}

/// A method and how hard it tries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compression {
    /// The method.
    pub method: Method,
    /// Its level, in its own scale. `None` for its cheapest useful one.
    pub level: Option<i32>,
}

/// Compresses the bodies of one connection.
pub enum Packer {
    /// See [`Method::Zstd`].
    Zstd(zstd::stream::raw::Encoder<'static>),
    /// See [`Method::Zlib`].
    Zlib(Compress),
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Zstd(_) => "Packer::Zstd",
            Self::Zlib(_) => "Packer::Zlib",
        })
    }
}

/// Output grows by as much at a time.
const STEP_BYTES: usize = 128 << 10;

impl Packer {
    /// A fresh context.
    pub fn new(compression: Compression) -> io::Result<Self> {
        match compression.method {
            Method::Zstd => {
                let level = compression.level.unwrap_or(1);
                let mut encoder = zstd::stream::raw::Encoder::new(level)?;
                encoder.set_parameter(CParameter::WindowLog(ZSTD_WINDOW_LOG))?;
                if level >= ZSTD_LARGE_LEVEL {
                    encoder.set_parameter(CParameter::HashLog(ZSTD_TABLE_LOG))?;
                    encoder.set_parameter(CParameter::ChainLog(ZSTD_TABLE_LOG))?;
                }
                Ok(Self::Zstd(encoder))
            }
            Method::Zlib => {
                let level = u32::try_from(compression.level.unwrap_or(1)).unwrap_or(1).min(9);
                Ok(Self::Zlib(Compress::new(flate2::Compression::new(level), true)))
            }
        }
    }

    /// Appends `parts`, one after another, compressed and flushed.
    pub fn pack(&mut self, parts: &[&[u8]], out: &mut Vec<u8>) -> io::Result<()> {
        for part in parts {
            self.feed(part, out)?;
        }
        self.finish_record(out)
    }

    fn feed(&mut self, mut input: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !input.is_empty() {
            let consumed = self.step(input, out, false)?.0;
            input = input.get(consumed..).unwrap_or_default();
        }
        Ok(())
    }

    fn finish_record(&mut self, out: &mut Vec<u8>) -> io::Result<()> {
        while !self.step(&[], out, true)?.1 {}
        Ok(())
    }

    /// One call into the library: bytes consumed, and whether a flush is complete.
    fn step(
        &mut self,
        input: &[u8],
        out: &mut Vec<u8>,
        flushes: bool,
    ) -> io::Result<(usize, bool)> {
        let start = out.len();
        out.resize(start.saturating_add(STEP_BYTES), 0);
        let room = out.get_mut(start..).unwrap_or_default();
        let (consumed, produced, is_flushed) = match self {
            Self::Zstd(encoder) => {
                let mut output = OutBuffer::around(room);
                if flushes {
                    let left = encoder.flush(&mut output)?;
                    (0, output.pos(), left == 0)
                } else {
                    let mut input = InBuffer::around(input);
                    encoder.run(&mut input, &mut output)?;
                    (input.pos(), output.pos(), false)
                }
            }
            Self::Zlib(deflate) => {
                let (before_in, before_out) = (deflate.total_in(), deflate.total_out());
                let flush = if flushes { FlushCompress::Sync } else { FlushCompress::None };
                deflate.compress(input, room, flush).map_err(io::Error::other)?;
                let consumed = index(deflate.total_in().saturating_sub(before_in));
                let produced = index(deflate.total_out().saturating_sub(before_out));
                (consumed, produced, produced < STEP_BYTES)
            }
        };
        out.truncate(start.saturating_add(produced));
        Ok((consumed, is_flushed))
    }
}

/// Inflates the bodies of one connection.
pub enum Unpacker {
    /// See [`Method::Zstd`].
    Zstd(zstd::stream::raw::Decoder<'static>),
    /// See [`Method::Zlib`].
    Zlib(Decompress),
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Zstd(_) => "Unpacker::Zstd",
            Self::Zlib(_) => "Unpacker::Zlib",
        })
    }
}

const NOT_A_PART: Problem = Problem::Other("is not a part of the connection's compression stream");

impl Unpacker {
    /// A fresh context. A stream that asks for a larger window is refused.
    pub fn new(method: Method) -> io::Result<Self> {
        match method {
            Method::Zstd => {
                let mut decoder = zstd::stream::raw::Decoder::new()?;
                decoder.set_parameter(DParameter::WindowLogMax(ZSTD_WINDOW_LOG))?;
                Ok(Self::Zstd(decoder))
            }
            Method::Zlib => Ok(Self::Zlib(Decompress::new(true))),
        }
    }

    /// Inflates one record. It must fill `plain` exactly and give no byte more.
    pub fn unpack(&mut self, mut packed: &[u8], plain: &mut [u8]) -> Result<(), Problem> {
        let mut filled = 0;
        loop {
            // Behind the last byte there is room for one more, which must stay empty.
            let mut extra = [0; 1];
            let is_full = filled >= plain.len();
            let rest = plain.get_mut(filled..).filter(|rest| !rest.is_empty());
            let room = rest.unwrap_or(&mut extra[..]);
            let (consumed, produced) = self.step(packed, room)?;
            packed = packed.get(consumed..).unwrap_or_default();
            if is_full && produced > 0 {
                return Err(Problem::Other("inflates to more than it says"));
            }
            filled = filled.saturating_add(produced);
            match (consumed, produced) {
                (0, 0) if packed.is_empty() && filled == plain.len() => return Ok(()),
                (0, 0) if packed.is_empty() => {
                    return Err(Problem::Other("inflates to less than it says"));
                }
                (0, 0) => return Err(NOT_A_PART),
                _ => {}
            }
        }
    }

    /// One call into the library: bytes consumed and produced.
    fn step(&mut self, packed: &[u8], room: &mut [u8]) -> Result<(usize, usize), Problem> {
        match self {
            Self::Zstd(decoder) => {
                let (mut input, mut output) = (InBuffer::around(packed), OutBuffer::around(room));
                decoder.run(&mut input, &mut output).map_err(|_| NOT_A_PART)?;
                Ok((input.pos(), output.pos()))
            }
            Self::Zlib(inflate) => {
                let (before_in, before_out) = (inflate.total_in(), inflate.total_out());
                let status = inflate.decompress(packed, room, FlushDecompress::None);
                if status.map_err(|_| NOT_A_PART)? == Status::StreamEnd {
                    return Err(Problem::Other("ends the connection's compression stream"));
                }
                let consumed = index(inflate.total_in().saturating_sub(before_in));
                Ok((consumed, index(inflate.total_out().saturating_sub(before_out))))
            }
        }
    }
}

fn index(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(len: usize) -> Vec<u8> {
        let mut x = 1u64;
        let mut next = || {
            x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            u8::try_from(x >> 56).unwrap()
        };
        (0..len).map(|i| if i % 3000 < 2000 { next() } else { 7 }).collect()
    }

    fn both() -> [Method; 2] {
        [Method::Zstd, Method::Zlib]
    }

    #[test]
    fn records_inflate_one_by_one_in_their_order() {
        for method in both() {
            let mut packer = Packer::new(Compression { method, level: None }).unwrap();
            let mut unpacker = Unpacker::new(method).unwrap();
            for len in [1, 0, 5, 70_000, 2 << 20, 1, 300_000] {
                let plain = noise(len);
                let (head, tail) = plain.split_at(len / 3);
                let mut packed = Vec::new();
                packer.pack(&[head, tail], &mut packed).unwrap();
                let mut again = vec![0; len];
                unpacker.unpack(&packed, &mut again).unwrap();
                assert!(again == plain, "{method:?} {len}");
            }
        }
    }

    #[test]
    fn more_or_less_than_was_said_is_refused() {
        for method in both() {
            for wrong in [999, 1001, 0] {
                let mut packer = Packer::new(Compression { method, level: None }).unwrap();
                let mut packed = Vec::new();
                packer.pack(&[&[0; 1000]], &mut packed).unwrap();
                let mut unpacker = Unpacker::new(method).unwrap();
                let problem = unpacker.unpack(&packed, &mut vec![0; wrong]).unwrap_err();
                assert!(problem.to_string().contains("than it says"), "{problem}");
                // A bomb: much from little.
                let mut packed = Vec::new();
                packer.pack(&[&vec![0; 2 << 20]], &mut packed).unwrap();
                assert!(packed.len() < 40_000, "{method:?} {}", packed.len());
                let mut unpacker = Unpacker::new(method).unwrap();
                assert!(unpacker.unpack(&packed, &mut [0; 1000]).is_err());
            }
            let mut unpacker = Unpacker::new(method).unwrap();
            assert!(unpacker.unpack(b"no such stream at all", &mut [0; 4]).is_err());
        }
    }

    /// Resident bytes of this process.
    fn resident() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * 4096
    }

    #[test]
    fn no_level_takes_more_memory_than_its_window_needs() {
        let data = noise(4 << 20);
        for level in [1, 11, 12, 19, 22] {
            let before = resident();
            let compression = Compression { method: Method::Zstd, level: Some(level) };
            let mut packer = Packer::new(compression).unwrap();
            let mut packed = Vec::new();
            for part in data.chunks(64 << 10) {
                packed.clear();
                packer.pack(&[part], &mut packed).unwrap();
            }
            let taken = resident().saturating_sub(before);
            drop(packer);
            // Other tests run beside this one.
            assert!(taken < 96 << 20, "level {level}: {taken}");
        }
    }

    #[test]
    fn a_large_window_is_refused() {
        let mut encoder = zstd::stream::raw::Encoder::new(1).unwrap();
        encoder.set_parameter(CParameter::WindowLog(25)).unwrap();
        let mut packer = Packer::Zstd(encoder);
        let mut packed = Vec::new();
        packer.pack(&[&noise(70_000)], &mut packed).unwrap();
        let mut unpacker = Unpacker::new(Method::Zstd).unwrap();
        assert!(unpacker.unpack(&packed, &mut vec![0; 70_000]).is_err());
    }
}
