//! The move itself: the disk goes to the second process while a guest writes to it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bitferry::live::{LiveImage, Outgoing};
use bitferry::outgoing::{Outcome, SentDisk, SentImage};
use bitferry::{DiskProof, Error, Observer, Result};
use mig_core::transport::Dial;

use super::disk::Guest;

/// What the move was like.
pub(super) struct Moved {
    /// What was sent, and how it reads at the other end.
    pub(super) sent: SentImage,
    /// How long the guest could not write.
    pub(super) downtime: Duration,
    /// Its writes while it was moved.
    pub(super) writes: u64,
    /// Rounds while it ran, the one over everything included.
    pub(super) rounds: u32,
    /// Bytes that were sent again because it had changed them.
    pub(super) repeated: u64,
}

/// Moves the image at `source`, whose guest goes on writing until the other side has it.
pub(super) fn run(dial: &dyn Dial, source: &Path, observer: &dyn Observer) -> Result<Moved> {
    let image = LiveImage::open(source)?;
    let (writes, is_over) = (AtomicU64::new(0), AtomicBool::new(false));
    let (report, guest) = std::thread::scope(|scope| {
        let guest = Guest { disk: image.disk(), writes: &writes, is_over: &is_over };
        let guest = scope.spawn(move || guest.live());
        let report = Outgoing::builder()
            .disk("disk0", image.disk().clone(), Arc::clone(image.bitmaps()))
            .observer(observer)
            .build()
            .and_then(|outgoing| outgoing.run(dial, &mut ()));
        is_over.store(true, Ordering::Release);
        if let Ok(report) = &report
            && matches!(report.sent.outcome, Outcome::Unknown(_))
        {
            // Nobody knows who has it: a write that waits for the answer would wait for good.
            image.disk().retire();
        }
        (report, guest.join())
    });
    let report = report?;
    if let Outcome::Unknown(error) = report.sent.outcome {
        return Err(error.into());
    }
    guest.map_err(|_| Error::Usage { reason: "the demo's guest panicked".to_owned() })??;
    let bitmaps = image.bitmaps().all().into_iter().map(|bitmap| bitmap.name).collect();
    image.close()?;
    let ready = report.sent.confirmed;
    let proof = ready.and_then(|ready| {
        let content = ready.disks.first()?.1;
        let bitmaps = ready.bitmaps.iter().map(|(_, digest)| *digest).collect();
        Some(DiskProof { content: Some(content), bitmaps })
    });
    let (Some(proof), Some(disk)) = (proof, report.disks.into_iter().next()) else {
        return Err(Error::Usage { reason: "nobody answers here".to_owned() });
    };
    let sent = SentImage {
        peer: report.sent.peer,
        wire_bytes: report.sent.wire_bytes,
        // READY was held against what was sent, hash by hash.
        sent: SentDisk {
            bytes_data: disk.bytes_data,
            bytes_zero: disk.bytes_zero,
            proof: proof.clone(),
        },
        confirmed: proof,
        bitmaps,
    };
    let (downtime, rounds) = (report.downtime, report.passes);
    let (writes, repeated) = (writes.into_inner(), disk.bytes_repeated);
    Ok(Moved { sent, downtime, writes, rounds, repeated })
}
