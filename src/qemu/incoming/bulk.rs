//! Whether a QEMU has looked through all of its disks once: its bulk phase. Pure.
//!
//! With `migrate -i` it sends what is allocated and says nothing of the rest, so that what is
//! missing does not tell a stream that was cut short from a whole one. QEMU never says that the
//! phase is over; it does things that it does only then.

use format_spec::qemu::block::CHUNK_BYTES;
use format_spec::qemu::container::SectionKind;

/// What a stream has shown so far.
#[derive(Debug, Clone, Default)]
pub(super) struct Bulk {
    /// Whether this is a section that QEMU writes before it stops its guest. In an END section
    /// comes what the guest has changed, and a progress of 100, whether the phase was over or not.
    is_part: bool,
    /// Disks whose last chunk came in such a section.
    ended: usize,
    is_over: bool,
    /// Whether the section of guest memory came, which every QEMU sends.
    is_of_qemu: bool,
    /// Percentages that came in such sections, as bits.
    percents: u128,
}

/// Chunks from which on each percentage is one that a disk of any size shows.
const MANY: u64 = 128;

impl Bulk {
    /// A section begins.
    pub(super) fn section(&mut self, kind: SectionKind) {
        self.is_part = kind == SectionKind::Part;
    }

    /// The section of guest memory begins.
    pub(super) fn memory(&mut self) {
        self.is_of_qemu = true;
    }

    /// The source says how far it is. It counts a chunk only when it has come to what follows, so
    /// that 100 comes early only where the end of the last disk is not allocated.
    pub(super) fn progress(&mut self, percent: u8) {
        self.is_over |= self.is_part && percent == 100;
        if self.is_part && percent < 100 {
            self.percents |= 1 << percent;
        }
    }

    /// A page of guest memory came, of which a QEMU sends none before the phase is over.
    pub(super) fn page(&mut self) {
        self.is_over |= self.is_part;
    }

    /// A chunk came. In the phase each comes once, in their order but for those that are read at
    /// the same time.
    pub(super) fn chunk(&mut self, is_again: bool, is_last_of_disk: bool) {
        self.is_over |= self.is_part && is_again;
        if self.is_part && is_last_of_disk && !is_again {
            self.ended = self.ended.saturating_add(1);
        }
    }

    /// Whether the source has but one disk, of `size` bytes, as far as its percentages show that:
    /// it tells how much of all is behind it when it begins a chunk. Its stream has no sizes, and
    /// the last chunk of a disk that is larger by less than a chunk looks like any.
    pub(super) fn fits(&self, size: u64) -> bool {
        let chunk = CHUNK_BYTES as u64;
        let chunks = size.div_ceil(chunk);
        // QEMU begins with 0; who does not counts in another way.
        if self.percents & 1 == 0 || chunks >= MANY || size == 0 {
            return true;
        }
        let at = |index: u64| u128::from(index) * u128::from(chunk) * 100 / u128::from(size);
        let expected = (0..chunks).fold(0u128, |bits, index| bits | 1 << at(index).min(100));
        self.percents & !expected == 0
    }

    /// Whether the phase was over before the guest was stopped, for so many disks. Who is no QEMU
    /// ends only then.
    pub(super) fn is_over(&self, disks: usize) -> bool {
        !self.is_of_qemu || self.is_over || self.ended >= disks
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_section(kind: SectionKind, act: impl Fn(&mut Bulk)) -> bool {
        let mut bulk = Bulk::default();
        bulk.section(SectionKind::Start);
        bulk.memory();
        bulk.section(kind);
        act(&mut bulk);
        bulk.section(SectionKind::End);
        bulk.progress(100);
        bulk.is_over(2)
    }

    #[test]
    fn only_what_comes_before_the_end_counts() {
        let acts: [fn(&mut Bulk); 4] = [
            |bulk| bulk.progress(100),
            Bulk::page,
            |bulk| bulk.chunk(true, false),
            |bulk| (0..2).for_each(|_| bulk.chunk(false, true)),
        ];
        for act in acts {
            assert!(in_section(SectionKind::Part, act));
            assert!(!in_section(SectionKind::End, act));
        }
        assert!(!in_section(SectionKind::Part, |bulk| bulk.progress(99)));
        assert!(Bulk::default().is_over(2), "no QEMU");
        // One of two disks, and its last chunk again.
        assert!(!in_section(SectionKind::Part, |bulk| bulk.chunk(false, true)));
        assert!(!in_section(SectionKind::Part, |bulk| bulk.chunk(false, false)));
    }

    #[test]
    fn percentages_show_the_size_of_a_small_disk() {
        let mut bulk = Bulk::default();
        bulk.section(SectionKind::Part);
        [0, 33, 66].into_iter().for_each(|percent| bulk.progress(percent));
        bulk.section(SectionKind::End);
        bulk.progress(100);
        let chunk = CHUNK_BYTES as u64;
        assert!(bulk.fits(3 * chunk) && bulk.fits(3 * chunk - 512));
        assert!(!bulk.fits(2 * chunk + chunk / 2) && !bulk.fits(4 * chunk));
        let mut other = Bulk { is_part: true, ..Bulk::default() };
        other.progress(40);
        assert!(other.fits(3 * chunk));
        assert!(bulk.fits(0) && bulk.fits(MANY * chunk) && Bulk::default().fits(chunk));
    }
}
