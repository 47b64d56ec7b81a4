//! What became of disks and bitmaps, for people.

use std::time::{Duration, Instant};

use bitferry::Report;
use bitferry::copy::PlannedBitmap;
use bitferry::report::{BitmapOutcome, BitmapReport, DiskReport, Status, Verified};

use super::size::{human, human_time};
use super::watch::Summary;
use super::{Outcome, Output, table};

/// Of a whole migration. `done` says what was done, in two or three words.
pub(crate) fn report_text(report: &Report, done: &str, output: &Output) -> String {
    let verdict = match report.status {
        Status::AlreadyComplete => output.strong("already complete"),
        Status::Unknown => output.bad("outcome unknown"),
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

/// Tells the report, and the exit status that it stands for.
pub(crate) fn finish(report: &Report, done: &str, output: &Output) -> Outcome {
    if output.is_json {
        output.event(&Summary::new("summary", report))?;
    } else {
        output.text(report_text(report, done, output))?;
    }
    Ok(bitferry::exit_status(report))
}

/// The summary of an operation that failed before there was one.
pub(crate) fn failed(result: &Outcome, started: Instant, output: &Output) -> bitferry::Result<()> {
    if let (Err(error), true) = (result, output.is_json) {
        let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        output.event(&Summary::new("summary", &Report::failure(error, elapsed_ms)))?;
    }
    Ok(())
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
