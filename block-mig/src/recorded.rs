//! A source whose extents were looked up before, so that nobody walks its metadata twice.

use mig_core::Result;
use mig_core::block::{BlockSource, CompressedUnit, Extent, ExtentKind};

use crate::limits::MAX_RECORDED_RUNS;

/// What a walk over a source's extents found, from its start on, as far as there was room.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Runs {
    /// Ends and kinds; neighbours differ in kind.
    runs: Vec<(u64, ExtentKind)>,
}

impl Runs {
    /// Notes the extent that follows what was noted so far. Once there is no room, nothing is.
    pub(crate) fn push(&mut self, start: u64, len: u64, kind: ExtentKind) {
        let end = start.saturating_add(len);
        let has_room = self.runs.len() < MAX_RECORDED_RUNS;
        match self.runs.last_mut() {
            Some((known, _)) if *known != start => {}
            Some((known, last)) if *last == kind => *known = end,
            _ if has_room => self.runs.push((end, kind)),
            _ => {}
        }
    }

    fn find(&self, offset: u64, max_len: u64) -> Option<Extent> {
        let at = self.runs.partition_point(|(end, _)| *end <= offset);
        let (end, kind) = *self.runs.get(at)?;
        Some(Extent { len: end.saturating_sub(offset).min(max_len), kind, host: None })
    }
}

/// A source that nobody writes to, with what is known of its extents.
#[derive(Clone, Copy)]
pub struct Recorded<'a> {
    /// What is read.
    pub source: &'a dyn BlockSource,
    /// What a walk over it found.
    pub runs: &'a Runs,
}

impl BlockSource for Recorded<'_> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn extent(&self, offset: u64, max_len: u64) -> Result<Extent> {
        match self.runs.find(offset, max_len) {
            Some(extent) => Ok(extent),
            None => self.source.extent(offset, max_len),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.source.read_at(buf, offset)
    }

    fn read_compressed(&self, offset: u64, out: &mut Vec<u8>) -> Result<Option<CompressedUnit>> {
        self.source.read_compressed(offset, out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryDisk;
    use crate::plan::{Scope, Units, survey_noting};
    use mig_core::block::SECTOR_BYTES;

    #[test]
    fn units_are_those_of_the_source() {
        let mut disk = MemoryDisk::new(8 << 20);
        for (at, len, kind) in [
            (0, 70_144, ExtentKind::Data),
            (1 << 20, 65536, ExtentKind::Compressed),
            (3 << 20, 2 << 20, ExtentKind::Data),
            (7 << 20, 512, ExtentKind::Zero),
        ] {
            disk.fill(at, len, 1, kind);
        }
        for scope in [Scope::Whole, Scope::Above] {
            let mut runs = Runs::default();
            survey_noting(&disk, scope, 1 << 20, &mut runs).unwrap();
            let units = |source: &dyn BlockSource| -> Vec<_> {
                Units::new(source, scope, 1 << 20).map(|u| u.unwrap()).collect()
            };
            assert_eq!(units(&Recorded { source: &disk, runs: &runs }), units(&disk));
        }
    }

    #[test]
    fn what_was_not_noted_is_looked_up() {
        let sectors = 3 * MAX_RECORDED_RUNS as u64;
        let mut disk = MemoryDisk::new(sectors * SECTOR_BYTES);
        for n in (0..sectors).step_by(2) {
            disk.fill(n * SECTOR_BYTES, SECTOR_BYTES, 1, ExtentKind::Data);
        }
        let mut runs = Runs::default();
        survey_noting(&disk, Scope::Above, 1 << 20, &mut runs).unwrap();
        assert_eq!(runs.runs.len(), MAX_RECORDED_RUNS);
        let recorded = Recorded { source: &disk, runs: &runs };
        for n in [0, 1, 2 * MAX_RECORDED_RUNS as u64, sectors - 1] {
            let at = n * SECTOR_BYTES;
            let [a, b] = [recorded.extent(at, 512), disk.extent(at, 512)].map(|e| e.unwrap());
            assert_eq!((a.len, a.kind), (b.len, b.kind), "sector {n}");
        }
    }
}
