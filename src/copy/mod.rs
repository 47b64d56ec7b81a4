//! Copy an image with its bitmaps on one host.

mod bitmaps;
mod in_place;
mod metered;
mod new;
mod options;
mod plan;
mod prove;
mod receipt;
mod resolve;
mod shape;
pub(crate) mod space;
mod target;

use std::time::Instant;

use block_mig::Transferred;
use format_spec::content_hash::ContentHash;

pub(crate) use bitmaps::difference;
pub(crate) use in_place::{backing, invalidated, open_editor, open_editor_in, suspend};
pub use options::{
    BackingChoice, BitmapSelection, CopyOptions, Existing, Format, Rename, TargetOptions,
};
pub use plan::{Plan, PlannedBitmap, plan};
pub(crate) use resolve::recorded_name;
pub(crate) use shape::Shape;
pub(crate) use target::DataFileTarget;

use self::in_place::Found;
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
    /// Whether an earlier try was gone on with.
    is_resumed: bool,
    /// Bytes that an earlier try had copied and that had to be copied again.
    repeated: u64,
}

/// Copies an image with its bitmaps and proves the copy. On an error nothing was published; a proof
/// that fails publishes nothing either, and is reported.
pub fn run(options: &CopyOptions, observer: &dyn Observer) -> Result<Report> {
    let started = Instant::now();
    let mut job = Job::decide(options, observer)?;
    if new::recover_publication(&mut job)? {
        job = Job::decide(options, observer)?;
    }
    if let Some(content) = receipt::finished(&job)? {
        return Ok(already_complete(job, content, started));
    }
    job.go_or_refuse()?;
    let done = match job.target {
        Target::Raw | Target::Qcow2 { .. } => new::copy(&job, observer)?,
        Target::RawInPlace | Target::Qcow2InPlace => in_place::copy(&job, observer)?,
    };
    Ok(report(&job, done, started))
}

fn report(job: &Job<'_>, done: Done, started: Instant) -> Report {
    let Done { moved, proof, mut invalidated, is_resumed, repeated } = done;
    let mut bitmaps = bitmaps::reports(&job.bitmaps);
    bitmaps.append(&mut invalidated);
    let disk = DiskReport {
        id: job.options.destination.display().to_string(),
        bytes_data: moved.bytes_data,
        bytes_zero: moved.bytes_zero,
        content_hash: proof.content.map(|root| root.to_string()),
        verified: proof.verified,
        not_carried: not_carried(job, &moved),
        bitmaps,
    }
    .only_seen();
    let is_bad = proof.verified == Verified::Mismatch;
    Report {
        status: if is_bad { Status::Failed } else { Status::Completed },
        error: proof.mismatch.map(|m| format!("the copy does not read back as what was sent: {m}")),
        total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        downtime_ms: None,
        wire_bytes: 0,
        repeated_bytes: repeated,
        resumed: is_resumed,
        disks: vec![disk],
        ram: None,
    }
}

/// This very copy was made before, and is as it was left.
fn already_complete(mut job: Job<'_>, content: Option<ContentHash>, started: Instant) -> Report {
    // What stands there now is what came, and replaces nothing.
    job.bitmaps = bitmaps::plan(job.options, &job.source, &job.target, Found::default());
    let moved = Transferred { content_hash: content, ..Transferred::default() };
    let is_proved = content.is_some() && !job.options.no_verify;
    let verified = if is_proved { Verified::Yes } else { Verified::No };
    let proof = Proof { verified, content, mismatch: None };
    let done = Done { moved, proof, invalidated: Vec::new(), is_resumed: true, repeated: 0 };
    Report { status: Status::AlreadyComplete, ..report(&job, done, started) }
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
