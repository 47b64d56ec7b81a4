//! What became of disks and bitmaps, for people.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry::copy::PlannedBitmap;
use bitferry::options::DiskOption;
use bitferry::report::{BitmapOutcome, BitmapReport, DiskReport, Status, Verified, error_chain};
use bitferry::{Blame, Error, Report, connect};
use mig_core::stream;

use super::size::{human, human_time};
use super::so_far::SoFar;
use super::{NOT_PRESERVED, Outcome, Output, UNKNOWN, table};

/// Of a whole migration. `done` says what was done, in two or three words.
pub(crate) fn report_text(report: &Report, done: &str, output: &Output) -> String {
    let verdict = match report.status {
        Status::AlreadyComplete => output.strong("already complete"),
        Status::Unknown => output.bad("outcome unknown"),
        Status::Failed => output.bad(&format!("NOT {done}")),
        _ => output.strong(done),
    };
    let took = human_time(Duration::from_millis(report.total_time_ms));
    let wire = human(report.wire_bytes);
    let mut text = format!("{verdict} in {took}, {wire} on the wire\n");
    if let Some(error) = &report.error {
        text.push_str(&format!("  {error}\n"));
    }
    for disk in &report.disks {
        text.push_str(&format!("{}\n", output.strong(&table::name(&disk.id))));
        text.push_str(&disk_text(disk, output));
    }
    text
}

/// Tells the report, and the exit status that it stands for; `ask` is what to do where the outcome
/// is unknown.
fn finish(report: &Report, (done, ask): (&str, &str), output: &Output) -> Outcome {
    if output.is_json {
        output.summary(report)?;
    } else {
        output.text(report_text(report, done, output))?;
    }
    let status = bitferry::exit_status(report);
    complain(report, status, ask);
    Ok(status)
}

/// What is not as it was asked for is said like an error, whoever reads the report.
fn complain(report: &Report, status: u8, ask: &str) {
    let (what, hint) = match status {
        NOT_PRESERVED => {
            let bitmaps = report.disks.iter().flat_map(|disk| &disk.bitmaps);
            let lost = bitmaps.filter(|bitmap| bitmap.is_lost()).map(|bitmap| &*bitmap.name);
            let lost = lost.collect::<Vec<_>>();
            let what = format!("not preserved: {}", lost.join(", "));
            (what, "the next backup of these is a full one; `--bitmaps` leaves them out")
        }
        UNKNOWN => {
            let why = report.error.as_deref().unwrap_or("the last answer was lost");
            (format!("the outcome is unknown: {why}"), ask)
        }
        _ => return,
    };
    super::failure::print_lines(&what, hint);
}

/// Which side of a migration a command at the other end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Peer {
    /// It sends.
    Source,
    /// It receives.
    Destination,
    /// It receives, and is a QEMU.
    Qemu,
}

/// What to do where the outcome is unknown and the other end is ours.
const ASK_AGAIN: &str = "give the same command again: it asks";
/// What to do where it is a QEMU, which cannot be asked twice.
const ASK_QEMU: &str = "its monitor knows (`query-migrate`): `completed`, and it has everything; \
                        `failed` or gone, and it has to be started anew for the same command";

/// [`finish`], where a command at the other end had a word to say after the report was made. What
/// is published stays so, whatever becomes of the command; where nobody answered, all there is may
/// depend on it.
pub(crate) fn finish_with(
    mut report: Report,
    (peer, end): (Peer, connect::Result<()>),
    done: &str,
    output: &Output,
) -> Outcome {
    let words = (done, if peer == Peer::Qemu { ASK_QEMU } else { ASK_AGAIN });
    let Err(error) = end else { return finish(&report, words, output) };
    if report.disks.iter().any(|disk| disk.verified == Verified::Unconfirmed)
        && report.status == Status::Completed
    {
        return Err(error.into());
    }
    let status = told(&mut report, peer, error.exit_code());
    report.error.get_or_insert_with(|| error_chain(&error));
    let own = finish(&report, words, output)?;
    if status == NOT_PRESERVED && own != status {
        let what = format!("not preserved at the other end: {}", error_chain(&error));
        super::failure::print_lines(&what, "what it said itself, above, names it");
    }
    Ok(status)
}

/// The exit status, where a `bitferry` at the other end ended with `theirs`. Pure.
fn told(report: &mut Report, peer: Peer, theirs: Option<u8>) -> u8 {
    let own = bitferry::exit_status(report);
    match (theirs, peer) {
        // It knows of losses that we cannot know of.
        (Some(NOT_PRESERVED), _) if own == 0 => NOT_PRESERVED,
        // A destination that does not know what it has is to be asked again; what we have
        // published ourselves is there, whether the source heard of it or not.
        (Some(UNKNOWN), Peer::Destination | Peer::Qemu) if matches!(own, 0 | NOT_PRESERVED) => {
            report.status = Status::Unknown;
            UNKNOWN
        }
        _ => own,
    }
}

/// A disk that was asked for: its name in a report, and where it is or was to be.
#[derive(Debug)]
pub(crate) struct Asked {
    id: String,
    path: PathBuf,
}

impl Asked {
    /// The one disk of a copy, which is called by its destination.
    pub(crate) fn copy(destination: &Path) -> Vec<Self> {
        vec![Self { id: destination.display().to_string(), path: destination.to_owned() }]
    }

    /// Those of `--disk`.
    pub(crate) fn disks(disks: &[DiskOption]) -> Vec<Self> {
        disks.iter().map(|d| Self { id: d.id.clone(), path: d.path.clone() }).collect()
    }

    /// What is known of it after a failure.
    fn report(&self, error: &Error, is_only: bool) -> DiskReport {
        let verified = match error {
            Error::ProofMismatch { path, .. } if *path == self.path => Verified::Mismatch,
            Error::Stream(stream::Error::Mismatch { .. }) if is_only => Verified::Mismatch,
            Error::Stream(stream::Error::Peer { blame: Blame::Mismatch, .. }) if is_only => {
                Verified::Mismatch
            }
            _ => Verified::No,
        };
        DiskReport { verified, ..DiskReport::untouched(self.id.clone()) }
    }
}

/// The summary of an operation that failed before there was one.
pub(crate) fn failed(
    result: &Outcome,
    started: Instant,
    asked: &[Asked],
    output: &Output,
) -> bitferry::Result<()> {
    match result {
        Err(error) if output.is_json => {
            output.summary(&failure(error, started, asked, &output.so_far))
        }
        _ => Ok(()),
    }
}

/// The summary of an operation that is not waited for any more.
pub(crate) fn interrupted(started: Instant, asked: &[Asked], so_far: &SoFar) -> Report {
    failure(&Error::Interrupted, started, asked, so_far)
}

fn failure(error: &Error, started: Instant, asked: &[Asked], so_far: &SoFar) -> Report {
    let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let is_only = asked.len() == 1;
    let disk = |disk: &Asked| {
        let bitmaps = so_far.bitmaps(&disk.id, is_only);
        DiskReport { bitmaps, ..disk.report(error, is_only) }
    };
    let (disks, wire_bytes) = (asked.iter().map(disk).collect(), so_far.wire_bytes());
    Report { disks, wire_bytes, ..Report::failure(error, elapsed_ms) }
}

/// What became of one disk.
pub(crate) fn disk_text(disk: &DiskReport, output: &Output) -> String {
    let proof = match disk.verified {
        Verified::Yes => output.good("read back and equal"),
        Verified::No => "not verified".to_owned(),
        Verified::Mismatch => output.bad("READS BACK DIFFERENT"),
        Verified::Unconfirmed => "not confirmed by the peer".to_owned(),
        _ => "unknown".to_owned(),
    };
    let hash = disk.content_hash.as_deref().unwrap_or("not computed");
    let mut fields = vec![
        ("  data", format!("{}, and {} of zeroes", human(disk.bytes_data), human(disk.bytes_zero))),
        ("  content", hash.to_owned()),
        ("  proof", proof),
    ];
    fields.extend(disk.not_carried.iter().map(|what| ("  not carried", what.clone())));
    let mut text = table::fields(&fields);
    if disk.bitmaps.is_empty() {
        text.push_str("  bitmaps: none\n");
    } else {
        let rows: Vec<_> = disk.bitmaps.iter().map(bitmap_row).collect();
        text.push_str(&table::columns(["BITMAP", "OUTCOME", ""], &rows));
    }
    text
}

fn bitmap_row(bitmap: &BitmapReport) -> [String; 3] {
    let outcome = match bitmap.outcome {
        BitmapOutcome::Preserved => "preserved",
        BitmapOutcome::Sent => "sent, not confirmed",
        BitmapOutcome::Dropped => "dropped",
        BitmapOutcome::Invalidated => "invalidated",
        _ => "unknown",
    };
    let mut details = bitmap.changed.clone();
    details.extend(bitmap.reason.clone());
    [table::name(&bitmap.name), outcome.to_owned(), details.join("; ")]
}

/// What would become of bitmaps.
pub(crate) fn planned_bitmaps(bitmaps: &[PlannedBitmap]) -> String {
    let row = |bitmap: &PlannedBitmap| {
        let outcome = if bitmap.becomes.is_some() { "carried" } else { "not carried" };
        let renamed = bitmap.becomes.iter().filter(|to| **to != bitmap.name);
        let mut details: Vec<String> =
            renamed.map(|to| format!("as {}", table::name(to))).collect();
        details.extend(bitmap.reason.clone());
        [table::name(&bitmap.name), outcome.to_owned(), details.join("; ")]
    };
    let rows: Vec<[String; 3]> = bitmaps.iter().map(row).collect();
    if rows.is_empty() { String::new() } else { table::columns(["BITMAP", "OUTCOME", ""], &rows) }
}

/// Why something is refused, where it is said beside it that it is.
pub(crate) fn without_prefix(why: &str) -> &str {
    why.strip_prefix("refused, nothing was written: ").unwrap_or(why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_failed_is_not_said_to_be_done() {
        let report = Report { status: Status::Failed, ..Report::failure(&Error::Interrupted, 7) };
        let output = Output::json(false);
        let text = report_text(&report, "copied a -> h:b", &output);
        assert!(text.starts_with("NOT copied a -> h:b in 7 ms"), "{text}");
        let done = Report { status: Status::Completed, ..report };
        assert!(report_text(&done, "copied a -> h:b", &output).starts_with("copied a -> h:b"));
    }

    #[test]
    fn what_the_other_end_says_comes_on_top() {
        use Peer::{Destination, Source};
        let told = |status, peer, theirs| {
            let mut report = Report::failure(&bitferry::Error::Interrupted, 0);
            report.status = status;
            (told(&mut report, peer, theirs), report.status)
        };
        let (done, unknown) = (Status::Completed, Status::Unknown);
        assert_eq!(told(done, Destination, Some(6)), (6, done));
        assert_eq!(told(done, Source, Some(6)), (6, done));
        assert_eq!(told(done, Destination, Some(8)), (8, unknown));
        assert_eq!(told(done, Source, Some(8)), (0, done));
        assert_eq!(told(done, Destination, Some(255)), (0, done));
        assert_eq!(told(done, Source, None), (0, done));
        assert_eq!(told(unknown, Destination, Some(6)), (8, unknown));
        assert_eq!(told(Status::Failed, Source, Some(6)), (3, Status::Failed));
    }
}
