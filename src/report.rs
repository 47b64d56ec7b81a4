//! What a copy did, as a value that serialises to the summary of CLI.md, and its exit status.
//!
//! Outcomes are made where the thing happened and are never guessed here.

use format_spec::native::answer::Published;
use serde::Serialize;

use crate::error::Error;

/// How a whole operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Status {
    /// Everything was done that could be; the disks say how well.
    Completed,
    /// A receipt says that an earlier run had finished. `verified` is `yes` where that run had
    /// proved it and nobody has written to the disk since.
    AlreadyComplete,
    /// It failed and nothing was published.
    Failed,
    /// The user stopped it.
    Interrupted,
    /// The last answer was lost; ask again.
    Unknown,
}

/// Whether the destination was read back and found equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verified {
    /// Read back afresh and equal.
    Yes,
    /// Not checked.
    No,
    /// Read back and different; not published.
    Mismatch,
    /// Only the peer could check, and it was not asked.
    Unconfirmed,
}

/// What became of a bitmap.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum BitmapOutcome {
    /// It is valid at the destination, bit for bit.
    Preserved,
    /// It was sent, or stored without being read back; only the peer could confirm it, if anybody.
    Sent,
    /// It is not at the destination.
    Dropped,
    /// It is at the destination and marked as not to be trusted.
    Invalidated,
}

/// One bitmap of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapReport {
    /// Its name at the source; at the destination too unless `changed` says otherwise.
    pub name: String,
    /// What became of it.
    pub outcome: BitmapOutcome,
    /// What is different at the destination, as `what: old -> new`.
    pub changed: Vec<String>,
    /// Why, where the outcome is not `preserved`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Whether the user wanted it. Not part of the JSON.
    #[serde(skip)]
    pub is_wanted: bool,
}

/// Said of a disk whose bitmaps alone were sent.
pub(crate) const ONLY_BITMAPS: &str = "content: bitmaps go alone";

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskReport {
    /// Its name in the operation: for `copy` the destination's path.
    pub id: String,
    /// Bytes of content that were moved.
    pub bytes_data: u64,
    /// Bytes that read as zero and were not moved.
    pub bytes_zero: u64,
    /// `bf1:…`, where it was computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_hash: Option<String>,
    /// Whether the destination was read back.
    pub verified: Verified,
    /// What the source has and the destination has not, one phrase each.
    pub not_carried: Vec<String>,
    /// Every bitmap of the source, and those of the destination that lost their validity.
    pub bitmaps: Vec<BitmapReport>,
}

impl BitmapReport {
    /// Whether the user wanted it and it cannot be used at the destination.
    pub fn is_lost(&self) -> bool {
        self.is_wanted
            && matches!(self.outcome, BitmapOutcome::Dropped | BitmapOutcome::Invalidated)
    }
}

impl DiskReport {
    /// A disk that was asked for, before anything is known of it but its name.
    pub fn untouched(id: String) -> Self {
        Self {
            id,
            bytes_data: 0,
            bytes_zero: 0,
            content_hash: None,
            verified: Verified::No,
            not_carried: Vec::new(),
            bitmaps: Vec::new(),
        }
    }

    /// The same disk, where an earlier run had published it, as the destination says.
    pub(crate) fn of_before(self, found: Option<&Published>) -> Self {
        let content = found.and_then(|found| found.content);
        let is_unchanged = found.is_some_and(|found| found.is_unchanged);
        let mut bitmaps = self.bitmaps;
        let preserved = |bitmap: &&mut BitmapReport| bitmap.outcome == BitmapOutcome::Preserved;
        for bitmap in bitmaps.iter_mut().filter(preserved).filter(|_| !is_unchanged) {
            let reason = "the disk may have been written to since it was published".to_owned();
            (bitmap.outcome, bitmap.reason) = (BitmapOutcome::Sent, Some(reason));
        }
        let verified = match content {
            _ if !is_unchanged => Verified::Unconfirmed,
            Some(_) => Verified::Yes,
            None => Verified::No,
        };
        let content_hash = content.map(|root| root.to_string());
        Self { bytes_data: 0, bytes_zero: 0, content_hash, verified, bitmaps, ..self }
    }

    /// Says of an unproved disk why nobody read it back here: its source sent no proof, and this
    /// side's user did not do without one.
    pub(crate) fn unproved_by_source(mut self) -> Self {
        let reason = "the source sent no proof (send --no-verify)";
        let claimed =
            |b: &&mut BitmapReport| b.outcome == BitmapOutcome::Preserved && b.reason.is_none();
        let is_unproved = self.is_unproved();
        for bitmap in self.bitmaps.iter_mut().filter(claimed).filter(|_| is_unproved) {
            (bitmap.outcome, bitmap.reason) = (BitmapOutcome::Sent, Some(reason.to_owned()));
        }
        self
    }

    /// Whether nobody held its content against anything, though content was moved.
    pub(crate) fn is_unproved(&self) -> bool {
        self.verified == Verified::No && !self.not_carried.iter().any(|what| what == ONLY_BITMAPS)
    }

    /// Claims of bitmaps no more than was seen, by what was seen of the disk.
    pub(crate) fn only_seen(mut self) -> Self {
        use BitmapOutcome::{Dropped, Preserved, Sent};
        let (claimed, outcome, reason) = match self.verified {
            // The content is not verified, the bitmaps are.
            Verified::No if self.not_carried.iter().any(|what| what == ONLY_BITMAPS) => {
                return self;
            }
            Verified::No => (Preserved, Sent, "nobody read it back (--no-verify)"),
            Verified::Mismatch => {
                (Preserved, Dropped, "the copy does not read back as what was sent")
            }
            Verified::Unconfirmed => (Sent, Sent, "only the destination could confirm it"),
            Verified::Yes => return self,
        };
        let told =
            |bitmap: &&mut BitmapReport| bitmap.outcome == claimed && bitmap.reason.is_none();
        for bitmap in self.bitmaps.iter_mut().filter(told) {
            (bitmap.outcome, bitmap.reason) = (outcome, Some(reason.to_owned()));
        }
        self
    }
}

/// Guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct RamReport {
    /// Pages sent with their content.
    pub normal: u64,
    /// Pages sent as a fill byte.
    pub duplicate: u64,
    /// Bytes on the wire.
    pub wire_bytes: u64,
}

/// What an operation did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// How it ended.
    pub status: Status,
    /// The error, where it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// From start to publication.
    pub total_time_ms: u64,
    /// How long the guest stood still.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime_ms: Option<u64>,
    /// Bytes on the wire; 0 on one host.
    pub wire_bytes: u64,
    /// Bytes that had to be sent again.
    pub repeated_bytes: u64,
    /// Whether an earlier try was continued.
    pub resumed: bool,
    /// Every disk.
    pub disks: Vec<DiskReport>,
    /// Guest memory, where there was any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<RamReport>,
}

impl Report {
    /// The summary of an operation that failed before it had anything to report. Its disks are to
    /// be added where they are known.
    pub fn failure(error: &Error, total_time_ms: u64) -> Self {
        let status = match error {
            Error::Interrupted => Status::Interrupted,
            _ => Status::Failed,
        };
        Self {
            status,
            error: Some(error_chain(error)),
            total_time_ms,
            downtime_ms: None,
            wire_bytes: 0,
            repeated_bytes: 0,
            resumed: false,
            disks: Vec::new(),
            ram: None,
        }
    }
}

/// An error with its causes, joined by colons.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        // Some errors quote their cause; nobody wants to read it twice.
        let said = error.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        cause = error.source();
    }
    text
}

/// The exit status that a report stands for. Pure; see CLI.md "Exit status".
pub fn exit_status(report: &Report) -> u8 {
    match report.status {
        Status::Interrupted => 130,
        Status::Unknown => 8,
        _ if report.disks.iter().any(|d| d.verified == Verified::Mismatch) => 1,
        Status::Failed => 3,
        _ if report.disks.iter().any(has_lost_something) => 6,
        Status::Completed | Status::AlreadyComplete => 0,
    }
}

/// Whether something the user wanted is missing at the destination.
fn has_lost_something(disk: &DiskReport) -> bool {
    disk.bitmaps.iter().any(BitmapReport::is_lost)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(status: Status, verified: Verified, bitmaps: Vec<BitmapReport>) -> Report {
        let disk = DiskReport {
            id: "d".into(),
            bytes_data: 1,
            bytes_zero: 2,
            content_hash: None,
            verified,
            not_carried: Vec::new(),
            bitmaps,
        };
        let mut report = Report::failure(&Error::Interrupted, 7);
        (report.status, report.error, report.disks) = (status, None, vec![disk]);
        report
    }

    fn bitmap(outcome: BitmapOutcome, is_wanted: bool) -> BitmapReport {
        BitmapReport { name: "b".into(), outcome, changed: Vec::new(), reason: None, is_wanted }
    }

    #[test]
    fn the_exit_status_follows_the_report() {
        let done = |bitmaps| report(Status::Completed, Verified::Yes, bitmaps);
        assert_eq!(exit_status(&done(vec![])), 0);
        assert_eq!(exit_status(&done(vec![bitmap(BitmapOutcome::Preserved, true)])), 0);
        assert_eq!(exit_status(&done(vec![bitmap(BitmapOutcome::Dropped, false)])), 0);
        assert_eq!(exit_status(&done(vec![bitmap(BitmapOutcome::Dropped, true)])), 6);
        assert_eq!(exit_status(&done(vec![bitmap(BitmapOutcome::Invalidated, true)])), 6);
        for (status, verified, expected) in [
            (Status::Failed, Verified::Mismatch, 1),
            (Status::Failed, Verified::No, 3),
            (Status::Interrupted, Verified::No, 130),
            (Status::Unknown, Verified::No, 8),
            (Status::AlreadyComplete, Verified::Yes, 0),
        ] {
            assert_eq!(exit_status(&report(status, verified, vec![])), expected, "{status:?}");
        }
    }

    #[test]
    fn keys_and_values_are_those_of_the_contract() {
        let report = report(
            Status::Completed,
            Verified::Unconfirmed,
            vec![bitmap(BitmapOutcome::Sent, true)],
        );
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(
            json,
            "{\"status\":\"completed\",\"total-time-ms\":7,\"wire-bytes\":0,\"repeated-bytes\":0,\
             \"resumed\":false,\"disks\":[{\"id\":\"d\",\"bytes-data\":1,\"bytes-zero\":2,\
             \"verified\":\"unconfirmed\",\"not-carried\":[],\"bitmaps\":[{\"name\":\"b\",\
             \"outcome\":\"sent\",\"changed\":[]}]}]}"
        );
    }
}
