//! What a run leaves to the next one where nobody knows who has the guest.

use std::time::Instant;

use bitmap_mig::Bitmap;
use format_spec::content_hash::BitmapDigest;
use format_spec::native::answer::Ready;
use format_spec::native::block::DiskId;
use mig_core::bitmap::BitmapInfo;

use super::builder::{LiveDisk, Outgoing};
use crate::incoming::SessionId;
use crate::outgoing::ExpectedDisk;

/// A session that may have been handed over.
#[derive(Debug, Clone)]
pub(super) struct Unsettled {
    pub(super) session: SessionId,
    /// Since when the guest is paused.
    pub(super) since: Instant,
    /// What the destination had proved to have.
    pub(super) confirmed: Option<Ready>,
}

impl Outgoing<'_> {
    /// What a destination must have published that says it had finished. Content and bitmaps are
    /// known as long as the guest is paused since then: what a guest may have changed is not.
    pub(super) fn expected(&self, before: Option<&Unsettled>) -> Vec<ExpectedDisk> {
        let proved = before.and_then(|before| before.confirmed.as_ref());
        let of = |(id, disk): (DiskId, &LiveDisk)| ExpectedDisk {
            name: disk.name.clone(),
            size: disk.disk.size(),
            content: proved.and_then(|ready| {
                ready.disks.iter().find(|(of, _)| *of == id).map(|(_, content)| *content)
            }),
            bitmaps: before.and_then(|_| self.digests(disk)),
        };
        (0..).map(DiskId).zip(&self.disks).map(of).collect()
    }

    /// The bitmaps that go along with a disk, as they are.
    fn digests(&self, disk: &LiveDisk) -> Option<Vec<(String, BitmapDigest)>> {
        let digest = |(info, name): (BitmapInfo, String)| {
            let bits = disk.bitmaps.snapshot(&info.name).ok()?;
            let granularity_bits = u8::try_from(info.granularity.trailing_zeros()).ok()?;
            let is_enabled = info.is_enabled;
            let digest = Bitmap { name: info.name, granularity_bits, is_enabled, bits }.digest();
            Some((name, digest.ok()?))
        };
        let all = disk.bitmaps.all().into_iter();
        let chosen = all.filter_map(|info| (self.choose)(&info).map(|name| (info, name)));
        chosen.map(digest).collect()
    }
}
