//! Random work on a new image from several threads, and the disk it must give.

use std::ops::Range;

use flate2::{Compress, Compression, FlushCompress};
use qcow2_file::create::NewImage;
use qcow2_file::layout::header::CompressionType;
use qcow2_file::{Error, GuestOffset};

/// Seeded numbers (xorshift64*).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 8) % bound
    }

    /// Bytes in which some 512-byte blocks are zero and some compress well.
    pub fn bytes(&mut self, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        for block in bytes.chunks_mut(512) {
            match self.below(4) {
                0 => {}
                1 => block.fill(self.next() as u8),
                _ => block.iter_mut().for_each(|b| *b = self.next() as u8),
            }
        }
        bytes
    }
}

/// What to do, and how much of it.
#[derive(Debug, Clone, Copy)]
pub struct Load {
    pub seed: u64,
    pub threads: u64,
    pub rounds: u64,
    pub compression: Option<CompressionType>,
    /// Ranges are multiples of this: 512, or the allocation unit where a backing file has no
    /// reader.
    pub align: u64,
    /// Whether all of the disk can be read back.
    pub reads: bool,
}

/// Works on `image` and does the same to `shadow`. In each round the disk is cut into pieces at
/// random places, and each piece belongs to one thread, so that several threads work in one cluster
/// and the outcome is certain all the same.
pub fn work(image: &NewImage, shadow: &mut [u8], load: Load) {
    let mut random = Random::new(load.seed);
    for round in 0..load.rounds {
        let mut pieces: Vec<(u64, &mut [u8])> = Vec::new();
        let mut rest = &mut *shadow;
        let mut at = 0;
        while !rest.is_empty() {
            let longest = if random.below(3) == 0 { 400 << 10 } else { 20 << 10 };
            let len = (random.below(longest) / load.align + 1) * load.align;
            let (piece, tail) = rest.split_at_mut(len.min(rest.len() as u64) as usize);
            let next = at + piece.len() as u64;
            pieces.push((at, piece));
            (at, rest) = (next, tail);
        }
        let mut hands: Vec<Vec<(u64, &mut [u8])>> = (0..load.threads).map(|_| Vec::new()).collect();
        for piece in pieces {
            hands[random.below(load.threads) as usize].push(piece);
        }
        std::thread::scope(|scope| {
            for (i, hand) in hands.into_iter().enumerate() {
                let seed = load.seed ^ (round << 32 | (i as u64) << 16 | 0xb1);
                scope.spawn(move || work_on(image, hand, Load { seed, ..load }));
            }
        });
    }
}

fn work_on(image: &NewImage, mut pieces: Vec<(u64, &mut [u8])>, load: Load) {
    let mut random = Random::new(load.seed);
    for _ in 0..pieces.len() * 2 {
        let index = random.below(pieces.len() as u64) as usize;
        let (start, bytes) = &mut pieces[index];
        let range = sub_range(&mut random, *start, bytes.len() as u64, load.align);
        let len = range.end - range.start;
        let at = GuestOffset(*start + range.start);
        let part = &mut bytes[range.start as usize..range.end as usize];
        match random.below(8) {
            0 | 1 => {
                image.write_zeroes(at, len).unwrap();
                part.fill(0);
            }
            2 => {
                image.discard(at, len).unwrap();
                part.copy_from_slice(&random.bytes(len));
                image.write_at(part, at).unwrap();
            }
            3 | 4 => compress(image, &mut random, (*start, bytes), load.compression),
            5 if load.reads => {
                let mut found = vec![1; len as usize];
                image.read_at(&mut found, at).unwrap();
                assert!(found == part, "seed {}: {len} bytes at {at}", load.seed);
                let is_zero = part.iter().all(|b| *b == 0);
                assert!(is_zero || !image.reads_as_zero(at, len), "seed {}", load.seed);
            }
            _ => {
                part.copy_from_slice(&random.bytes(len));
                image.write_at(part, at).unwrap();
            }
        }
    }
}

/// A part of a piece, aligned, or to its end.
fn sub_range(random: &mut Random, start: u64, len: u64, align: u64) -> Range<u64> {
    let from = random.below(len) / align * align;
    let longest = if random.below(2) == 0 { len } else { 8192 };
    let to = (from + (random.below(longest) / align + 1) * align).min(len);
    debug_assert!(start.is_multiple_of(align));
    from..to
}

/// Stores one whole cluster inside the piece compressed, if there is one.
fn compress(
    image: &NewImage,
    random: &mut Random,
    (start, bytes): (u64, &mut [u8]),
    compression: Option<CompressionType>,
) {
    let size = image.geometry().cluster_size();
    let at = start.next_multiple_of(size);
    let from = (at - start) as usize;
    let Some(part) = bytes.get_mut(from..from + size as usize) else { return };
    let Some(compression) = compression else { return };
    part.copy_from_slice(&random.bytes(size));
    part[size as usize / 2..].fill(7);
    let packed = packed(part, compression);
    let at = GuestOffset(at);
    if !image.write_compressed(at, compression, size, &packed).unwrap() {
        image.write_at(part, at).unwrap();
    }
}

/// One cluster as qcow2 compresses it.
pub fn packed(content: &[u8], compression: CompressionType) -> Vec<u8> {
    match compression {
        CompressionType::Zlib => {
            let mut out = Vec::with_capacity(content.len() * 2 + 64);
            let mut deflate = Compress::new_with_window_bits(Compression::new(6), false, 12);
            deflate.compress_vec(content, &mut out, FlushCompress::Finish).unwrap();
            out
        }
        CompressionType::Zstd => zstd::bulk::compress(content, 1).unwrap(),
    }
}

/// Whether an error is a refusal of what was asked.
pub fn is_refused<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Refused { .. }))
}
