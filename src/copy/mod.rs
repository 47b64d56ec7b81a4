//! Copy an image with its bitmaps on one host.

mod bitmaps;
mod in_place;
mod metered;
mod new;
mod options;
mod plan;
mod preserve;
mod prove;
mod resolve;
mod shape;
mod space;
mod target;

use std::time::Instant;

use block_mig::Transferred;

pub(crate) use bitmaps::difference;
pub(crate) use in_place::{invalidated, open_editor};
pub use options::{
    BackingChoice, BitmapSelection, CopyOptions, Existing, Format, Rename, TargetOptions,
};
pub use plan::{Plan, PlannedBitmap, plan};

use self::plan::Job;
use self::prove::Proof;
use self::target::Target;
use crate::report::{BitmapReport, DiskReport, Report, Status, Verified};
use crate::{Observer, Result};

/// What was done, before it is put into words.
struct Done {
    moved: Transferred,
    proof: Proof,
    /// Bitmaps of the destination that are no longer valid.
    invalidated: Vec<BitmapReport>,
}

/// Copies an image with its bitmaps and proves the copy. On an error nothing was published; a proof
/// that fails publishes nothing either, and is reported.
pub fn run(options: &CopyOptions, observer: &dyn Observer) -> Result<Report> {
    let started = Instant::now();
    let mut job = Job::decide(options, observer)?;
    job.go_or_refuse()?;
    let done = match job.target {
        Target::Raw | Target::Qcow2 { .. } => new::copy(&job, observer)?,
        Target::RawInPlace | Target::Qcow2InPlace => in_place::copy(&job, observer)?,
    };
    Ok(report(&job, done, started))
}

fn report(job: &Job<'_>, done: Done, started: Instant) -> Report {
    let Done { moved, proof, mut invalidated } = done;
    let mut bitmaps = bitmaps::reports(&job.bitmaps);
    bitmaps.append(&mut invalidated);
    let disk = DiskReport {
        id: job.options.destination.display().to_string(),
        bytes_data: moved.bytes_data,
        bytes_zero: moved.bytes_zero,
        content_hash: proof.content_hash,
        verified: proof.verified,
        not_carried: not_carried(job, &moved),
        bitmaps,
    };
    let is_bad = proof.verified == Verified::Mismatch;
    Report {
        status: if is_bad { Status::Failed } else { Status::Completed },
        error: proof.mismatch.map(|m| format!("the copy does not read back as what was sent: {m}")),
        total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        downtime_ms: None,
        wire_bytes: 0,
        repeated_bytes: 0,
        resumed: false,
        disks: vec![disk],
        ram: None,
    }
}

/// What was planned not to be carried, and what turned out so.
fn not_carried(job: &Job<'_>, moved: &Transferred) -> Vec<String> {
    let mut phrases = job.not_carried.clone();
    if moved.decompressed > 0 && job.passes_compressed() {
        phrases.push(format!("compression of {} bytes: stored plain", moved.decompressed));
    }
    phrases
}

#[cfg(test)]
mod tests;
