//! What a migration to QEMU did, in the words of the report.

use bitmap_mig::{Choice, Fate};

use super::blocks::Sent;
use super::confirm::Verdict;
use super::plan::{PlannedDisk, Prepared};
use crate::report::{BitmapOutcome, BitmapReport, DiskReport, ONLY_BITMAPS, Verified};

/// Stands for bitmaps whose names cannot be known.
const NAMELESS: &str = "*";
/// What is said of a bitmap of which only the peer could tell.
const UNASKED: &str = "only the destination could confirm it, and its monitor was not asked \
                       (--peer-qmp): QEMU reports success even where it drops a bitmap";

/// What is said of a bitmap that was not to be carried.
pub(super) const UNWANTED: &str = "it was not asked for";

/// What is known of one disk in the end.
#[derive(Debug, Clone, Default)]
pub(super) struct DiskDone {
    /// What was sent of its content.
    pub(super) sent: Option<Sent>,
    /// What its content hashes to.
    pub(super) content_hash: Option<String>,
}

/// The verdicts of `count` bitmaps in their order, where there may be a reason for having none.
pub(crate) fn each(
    verdicts: &Result<Vec<Verdict>, String>,
    count: usize,
) -> impl Iterator<Item = Verdict> + use<> {
    match verdicts {
        Ok(verdicts) => verdicts.clone().into_iter(),
        Err(why) => vec![Verdict::Unsure(why.clone()); count].into_iter(),
    }
}

/// The reports of all disks. `verdicts` are those of the carried bitmaps, in their order; or why
/// there are none.
pub(super) fn disks(
    prepared: &Prepared<'_>,
    done: &[DiskDone],
    verdicts: &Result<Vec<Verdict>, String>,
) -> Vec<DiskReport> {
    let mut verdicts = each(verdicts, prepared.bitmaps().len());
    let disks = prepared.disks.iter().zip(done);
    disks.map(|(disk, done)| report(prepared, disk, done, &mut verdicts)).collect()
}

/// Why there is no verdict where no monitor was asked.
pub(super) fn unasked() -> String {
    UNASKED.to_owned()
}

fn report(
    prepared: &Prepared<'_>,
    disk: &PlannedDisk,
    done: &DiskDone,
    verdicts: &mut impl Iterator<Item = Verdict>,
) -> DiskReport {
    let choices = disk.decision.choices.iter();
    let mut bitmaps: Vec<_> = choices.map(|choice| bitmap(choice, verdicts)).collect();
    bitmaps.extend(disk.unlistable.as_ref().map(|why| BitmapReport {
        is_wanted: prepared.options.bitmaps != crate::copy::BitmapSelection::None,
        ..dropped(NAMELESS, why.clone())
    }));
    let sent = done.sent.unwrap_or_default();
    DiskReport {
        id: disk.id.clone(),
        bytes_data: sent.data,
        bytes_zero: sent.zero,
        content_hash: done.content_hash.clone(),
        verified: verified(prepared.options.no_verify, done, &bitmaps),
        not_carried: not_carried(disk, done.sent.is_some()),
        bitmaps,
    }
}

/// A monitor can confirm bitmaps, not contents.
fn verified(no_verify: bool, done: &DiskDone, bitmaps: &[BitmapReport]) -> Verified {
    let is_confirmed = |bitmap: &BitmapReport| bitmap.outcome == BitmapOutcome::Preserved;
    let mut wanted = bitmaps.iter().filter(|bitmap| bitmap.is_wanted).peekable();
    // The bitmaps may be, and nobody looked at the content.
    let only_bitmaps = done.sent.is_none() && wanted.peek().is_some();
    if no_verify || (only_bitmaps && wanted.all(is_confirmed)) {
        Verified::No
    } else {
        Verified::Unconfirmed
    }
}

fn bitmap(choice: &Choice, verdicts: &mut impl Iterator<Item = Verdict>) -> BitmapReport {
    let name = &choice.bitmap.name;
    let new = match &choice.fate {
        Fate::Unwanted => {
            return BitmapReport { is_wanted: false, ..dropped(name, UNWANTED.to_owned()) };
        }
        Fate::Left(reason) => return dropped(name, reason.clone()),
        Fate::Carried(new) => new,
    };
    carried(name, new, verdicts.next())
}

/// What is said of a bitmap that was sent as `new`.
pub(crate) fn carried(name: &str, new: &str, verdict: Option<Verdict>) -> BitmapReport {
    let mut changed: Vec<_> =
        (name != new).then(|| format!("name: {name} -> {new}")).into_iter().collect();
    let (outcome, reason) = match verdict {
        Some(Verdict::Preserved(more)) => {
            changed.extend(more);
            (BitmapOutcome::Preserved, None)
        }
        Some(Verdict::Dropped(reason)) => return dropped(name, reason),
        Some(Verdict::Unsure(reason)) => (BitmapOutcome::Sent, Some(reason)),
        None => (BitmapOutcome::Sent, Some(unasked())),
    };
    BitmapReport { name: name.to_owned(), outcome, changed, reason, is_wanted: true }
}

pub(crate) fn dropped(name: &str, reason: String) -> BitmapReport {
    BitmapReport {
        name: name.to_owned(),
        outcome: BitmapOutcome::Dropped,
        changed: Vec::new(),
        reason: Some(reason),
        is_wanted: true,
    }
}

/// What the disk has and QEMU's stream does not carry.
pub(super) fn not_carried(disk: &PlannedDisk, has_blocks: bool) -> Vec<String> {
    let snapshots = disk.disk.image().map_or(0, qcow2_file::Image::snapshot_count);
    if !has_blocks {
        return vec![ONLY_BITMAPS.to_owned()];
    }
    let snapshots = (snapshots > 0).then(|| format!("{snapshots} internal snapshots"));
    snapshots.into_iter().chain(disk.disk.bitmaps_below(usize::MAX)).collect()
}
