//! One bitmap while it arrives. Pure.

use bitmap_mig::Bitmap;
use format_spec::qemu::dirty_bitmap::{bits_range, trim_buffer};
use qcow2_file::bitmaps::{Bits, granules};

/// Bytes of a bitmap that ranges begin and end on, except at its end.
const WORD_BYTES: u64 = 8;

/// A bitmap while it arrives.
#[derive(Debug)]
pub(super) struct Loading {
    /// The name it is stored under.
    pub(super) name: String,
    /// Whether it records writes.
    pub(super) is_enabled: bool,
    /// Whether the source keeps it with its disk. Here it is kept in any case.
    pub(super) is_persistent: bool,
    /// Whether it takes the place of a broken bitmap of the image.
    pub(super) replaces: bool,
    /// Whether all of it is here.
    pub(super) is_complete: bool,
    granularity: u32,
    disk_size: u64,
    bits: Bits,
    /// Which words of the bitmap have come.
    arrived: Bits,
}

impl Loading {
    /// A bitmap of which nothing is here. Takes no memory yet: [`allocate`](Self::allocate).
    pub(super) fn new(name: &str, granularity: u32, disk_size: u64) -> Self {
        Self {
            name: name.to_owned(),
            is_enabled: false,
            is_persistent: false,
            replaces: false,
            is_complete: false,
            granularity,
            disk_size,
            bits: Bits::default(),
            arrived: Bits::default(),
        }
    }

    /// Bytes that its bits take: whole words.
    pub(super) fn byte_len(&self) -> u64 {
        self.granules().div_ceil(64).saturating_mul(WORD_BYTES)
    }

    /// Makes room for its bits, once [`byte_len`](Self::byte_len) was found small enough.
    pub(super) fn allocate(&mut self) {
        self.bits = Bits::new(self.granules());
        self.arrived = Bits::new(self.byte_len() / WORD_BYTES);
    }

    fn granules(&self) -> u64 {
        granules(self.disk_size, self.granularity_bits())
    }

    fn granularity_bits(&self) -> u8 {
        u8::try_from(self.granularity.trailing_zeros()).unwrap_or(u8::MAX)
    }

    /// Takes bits of a range of sectors; `None`: all clear. What is wrong with them comes as words.
    pub(super) fn put(
        &mut self,
        first_sector: u64,
        sectors: u32,
        buffer: Option<&[u8]>,
    ) -> Result<(), String> {
        let range = bits_range(first_sector, sectors, self.granularity, self.disk_size);
        let range = range.map_err(|problem| {
            format!(
                "the range of {sectors} sectors from sector {first_sector} on {problem} (this \
                 side's disk has {} bytes, a granule {})",
                self.disk_size, self.granularity
            )
        })?;
        match buffer {
            Some(buffer) => {
                let bytes = trim_buffer(buffer, &range)
                    .map_err(|problem| format!("the length of the buffer {problem}"))?;
                self.bits.write_bytes(range.start, bytes);
            }
            None => {
                self.bits.clear_range(range.start.saturating_mul(8)..range.end.saturating_mul(8))
            }
        }
        self.arrived.set_range(range.start / WORD_BYTES..range.end / WORD_BYTES);
        Ok(())
    }

    /// All of it is said to be here. A source sends clear ranges too: what has not come is not
    /// known to be clear.
    pub(super) fn complete(&mut self) -> Result<(), String> {
        if let Some(word) = self.arrived.next_clear(0) {
            let end = word.saturating_mul(64).saturating_mul(self.granularity.into());
            return Err(format!(
                "COMPLETE, and the bits from byte {end} of the disk's {} on have not come",
                self.disk_size
            ));
        }
        self.is_complete = true;
        Ok(())
    }

    /// The bitmap, under the name it is stored under.
    pub(super) fn into_bitmap(self) -> Bitmap {
        let granularity_bits = self.granularity_bits();
        let Self { name, is_enabled, bits, .. } = self;
        Bitmap { name, granularity_bits, is_enabled, bits }
    }

    /// What is different from the source's bitmap `name`.
    pub(super) fn changes(&self, name: &str) -> Vec<String> {
        let renamed = (name != self.name).then(|| format!("name: {name} -> {}", self.name));
        let kept = (!self.is_persistent).then(|| "persistent: no -> yes".to_owned());
        let replaces =
            self.replaces.then(|| "replaces the image's broken bitmap of that name".to_owned());
        renamed.into_iter().chain(kept).chain(replaces).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loading(granularity: u32, size: u64) -> Loading {
        let mut loading = Loading::new("b", granularity, size);
        loading.allocate();
        loading
    }

    #[test]
    fn a_bitmap_is_complete_when_every_word_has_come() {
        // 3 words of 64 granules, and a half.
        let mut bitmap = loading(512, 3 * 32768 + 512);
        assert!(bitmap.complete().unwrap_err().contains("from byte 0 of"));
        bitmap.put(0, 64, Some(&[1; 8])).unwrap();
        bitmap.put(128, 65, None).unwrap();
        assert!(bitmap.complete().unwrap_err().contains("from byte 32768 of"));
        bitmap.put(64, 64, Some(&[0xff; 32])).unwrap();
        bitmap.put(0, 64, Some(&[2; 8])).unwrap();
        bitmap.complete().unwrap();
        let mut bytes = [0; 32];
        bitmap.into_bitmap().bits.read_bytes(0, &mut bytes);
        assert_eq!(bytes[..16], [[2; 8], [0xff; 8]].concat());
        assert_eq!(bytes[16..], [0; 16]);
    }

    #[test]
    fn a_disk_of_no_size_has_a_bitmap_of_no_bits() {
        loading(65536, 0).complete().unwrap();
    }

    #[test]
    fn ranges_that_do_not_fit_are_told_with_both_values() {
        let mut bitmap = loading(65536, 4 << 20);
        let beyond = bitmap.put(0, 8193, None).unwrap_err();
        assert!(beyond.contains("4194816") && beyond.contains("4194304"), "{beyond}");
        for (first, sectors, buffer) in [
            (0, 0, None),
            (1, 8191, None),
            (0, 8191, None),
            (u64::MAX, 1, None),
            (0, 8192, Some(&[0; 7][..])),
            (0, 8192, Some(&[0; 33][..])),
        ] {
            assert!(bitmap.put(first, sectors, buffer).is_err(), "{first} {sectors}");
        }
        bitmap.put(0, 8192, Some(&[0; 32])).unwrap();
        bitmap.complete().unwrap();
    }
}
