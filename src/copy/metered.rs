//! A source that is read no faster than the user allows (`--bandwidth`).

use mig_core::block::{BlockSource, CompressedUnit, Extent};
use mig_core::meter::Meter;

use crate::Observer;

/// A source whose content is paid for before it is read, or, where its size is not known before,
/// afterwards. Who waits here can be interrupted.
#[derive(Clone, Copy)]
pub(super) struct Metered<'a> {
    pub(super) source: &'a dyn BlockSource,
    pub(super) meter: &'a Meter,
    pub(super) observer: &'a dyn Observer,
}

impl BlockSource for Metered<'_> {
    fn size(&self) -> u64 {
        self.source.size()
    }

    fn extent(&self, offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        self.source.extent(offset, max_len)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        self.meter.spend(buf.len() as u64, &|| self.observer.is_cancelled());
        self.source.read_at(buf, offset)
    }

    fn read_compressed(
        &self,
        offset: u64,
        out: &mut Vec<u8>,
    ) -> mig_core::Result<Option<CompressedUnit>> {
        let unit = self.source.read_compressed(offset, out)?;
        if unit.is_some() {
            self.meter.spend(out.len() as u64, &|| self.observer.is_cancelled());
        }
        Ok(unit)
    }
}
