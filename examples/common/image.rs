//! Images to copy.

use std::path::Path;
use std::sync::Arc;

use qcow2_file::bitmaps::{Bits, PersistentBitmap};
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::{GuestOffset, HostFile};

use crate::Result;

const MIB: u64 = 1 << 20;

/// What an image is filled with: no cluster of it is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Noise {
    /// It does not compress.
    Pure,
    /// Every other 512 bytes are one byte over and over.
    Half,
}

impl Noise {
    fn fill(self, state: &mut u64, buffer: &mut [u8]) {
        for word in buffer.chunks_exact_mut(8) {
            // xorshift64*
            *state ^= *state >> 12;
            *state ^= *state << 25;
            *state ^= *state >> 27;
            word.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
        }
        if self == Self::Half {
            buffer.chunks_exact_mut(512).step_by(2).for_each(|half| half.fill(7));
        }
    }
}

/// A qcow2 image of `size` bytes with `mib` MiB of `noise`, spread evenly, and three bitmaps.
pub(crate) fn make(path: &Path, size: u64, mib: u64, noise: Noise) -> Result<()> {
    let image = NewImage::create(Arc::new(HostFile::create_new(path)?), &CreateOptions::new(size))?;
    let mut state = 0x9e37_79b9_7f4a_7c15;
    let mut buffer = vec![0; 1 << 20];
    let step = size / mib.max(1) / MIB * MIB;
    for n in 0..mib {
        noise.fill(&mut state, &mut buffer);
        image.write_at(&buffer, GuestOffset(n * step))?;
    }
    let bitmaps = [("hourly", 16), ("daily", 18), ("weekly", 20)].map(|(name, bits)| {
        let mut content = Bits::for_disk(size, bits);
        for n in 0..mib {
            let at = (n * step) >> bits;
            content.set_range(at..at + 1);
        }
        let name = name.to_owned();
        PersistentBitmap { name, granularity_bits: bits, is_enabled: true, bits: content }
    });
    Ok(image.finish(&bitmaps)?)
}
