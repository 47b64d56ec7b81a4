//! `demo`: the main job with nothing to prepare.
//!
//! Makes a disk with bitmaps, sends it to a second process over a local connection, lets both ends
//! prove that they are equal, and says what happened. The second process is this program again,
//! with the connection as its standard input.

mod destination;
mod disk;
mod moving;
mod qemu;
mod workshop;

use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args as Group;

use bitferry::outgoing::SentImage;
use bitferry::report::{BitmapOutcome, BitmapReport, DiskReport, Status, Verified};
use bitferry::{DiskProof, Error, Observer as _, Report, exit_status};

use self::destination::Destination;
use self::moving::Moved;
use self::workshop::Workshop;
use super::size::{human, human_time};
use super::watch::Watch;
use super::{Outcome, Output, table};

/// What the report calls the disk.
const DISK: &str = "disk0";
/// Width of the explanations: that of the longest hash line.
const COLUMNS: usize = 84;

/// Make a disk with backup bitmaps, move it to a second process, prove both ends equal
///
/// Needs no arguments, no QEMU and no privileges; takes a few seconds and some 500 MiB in the
/// directory for temporary files (TMPDIR), which are deleted afterwards.
#[derive(Debug, Group)]
pub(crate) struct DemoArgs {}

pub(crate) fn run(_args: &DemoArgs, output: &Output) -> Outcome {
    if let Some(target) = destination::asked_for() {
        return destination::be(&target);
    }
    let started = Instant::now();
    let watch = Watch::with_events(output, false, Vec::new())?;
    let result = show(&watch, output, started).map_err(|error| {
        // Ctrl-C on a terminal ends the second process too, and that is not the news.
        if watch.is_cancelled() { Error::Interrupted } else { error }
    });
    watch.finish();
    let report = match &result {
        Ok(report) => report.clone(),
        Err(error) => Report {
            disks: vec![DiskReport::untouched(DISK.to_owned())],
            ..Report::failure(error, elapsed_ms(started))
        },
    };
    if output.is_json {
        output.summary(&report)?;
    }
    result.map(|report| exit_status(&report))
}

fn show(watch: &Watch<'_>, output: &Output, started: Instant) -> bitferry::Result<Report> {
    let workshop = Workshop::new()?;
    let (source, copy) = (workshop.path("source.qcow2"), workshop.path("destination.qcow2"));
    say(watch, output, &format!("{}\n", output.strong("1. A disk in use")))?;
    let made = Instant::now();
    disk::make(&source, watch)?;
    say(watch, output, &disk_text(&source, made.elapsed())?)?;

    say(watch, output, &format!("\n{}\n", output.strong("2. The move")))?;
    let moved = Instant::now();
    let destination = Destination::start(&copy)?;
    let result = moving::run(&destination.connection()?, &source, watch);
    let pid = destination.id();
    let result = destination.end(result)?;
    watch.finish();
    say(watch, output, &move_text(&result, pid, moved.elapsed()))?;
    let sent = &result.sent;

    say(watch, output, &format!("\n{}\n", output.strong("3. The proof")))?;
    say(watch, output, &proof_text(sent, output))?;
    say(watch, output, &qemu::verdict(&source, &copy, output)?)?;
    let report = report(&result, elapsed_ms(started));
    say(watch, output, &closing_text(started.elapsed(), output))?;
    Ok(report)
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Text goes where the bar is.
fn say(watch: &Watch<'_>, output: &Output, text: &str) -> bitferry::Result<()> {
    watch.finish();
    output.text(text)
}

fn disk_text(source: &Path, took: Duration) -> bitferry::Result<String> {
    let options = bitferry::info::InfoOptions { image: source.to_owned(), ..Default::default() };
    let info = bitferry::info::run(&options)?;
    let text = paragraph(&format!(
        "A {} disk was made as a qcow2 image ({} on disk) in {}. A guest installed itself and then \
         went on writing, while three backup bitmaps recorded where, each started later than the \
         one before. An incremental backup reads only what its bitmap marks:",
        human(info.virtual_size),
        human(info.disk_size),
        human_time(took),
    ));
    Ok(text + &super::info::bitmap_table(&info))
}

fn move_text(moved: &Moved, pid: u32, took: Duration) -> String {
    let sent = &moved.sent;
    paragraph(&format!(
        "The guest went on writing while this process (pid {}) sent the disk to a second one (pid \
         {pid}): {} writes in {}. First everything went over, then, round after round ({} in all), \
         what the guest had changed meanwhile, {} of it; the bitmaps went along. {} on the wire \
         for {} of data; {} of zeroes went as a few words. Then the guest was paused, the rest was \
         sent, the second process stored the bitmaps in a qcow2 image of its own under a temporary \
         name, made it durable, opened it afresh, read it back, and told this one what it read. \
         Only when both agreed was it given its final name. The guest was paused for {}.",
        std::process::id(),
        moved.writes,
        human_time(took),
        moved.rounds,
        human(moved.repeated),
        human(sent.wire_bytes),
        human(sent.sent.bytes_data),
        human(sent.sent.bytes_zero),
        human_time(moved.downtime),
    ))
}

fn proof_text(sent: &SentImage, output: &Output) -> String {
    let verdict = |equal| if equal { output.good("equal") } else { output.bad("different") };
    let (here, there) = (&sent.sent.proof, &sent.confirmed);
    let hash = |proof: &DiskProof| proof.content.map(|content| content.to_string());
    let mut text = format!(
        "Content, hashed from what was sent and from what the other process reads back:\n  sent  \
         {}\n  read  {}  {}\n",
        hash(here).unwrap_or_default(),
        hash(there).unwrap_or_default(),
        verdict(here.content == there.content),
    );
    text.push_str("Bitmaps, the same way:\n");
    for ((name, here), there) in sent.bitmaps.iter().zip(&here.bitmaps).zip(&there.bitmaps) {
        let name = table::name(name);
        let verdict = verdict(here == there);
        text.push_str(&format!("  {name:8} sent  {here}\n  {:8} read  {there}  {verdict}\n", ""));
    }
    text
}

fn closing_text(took: Duration, output: &Output) -> String {
    let summary = paragraph(&format!(
        "Done in {}: the disk and all its bitmaps arrived, so the next backup at the destination \
         is still an incremental one. Now with an image of yours:",
        human_time(took),
    ));
    let summary = summary.replacen("Done", &output.good("Done"), 1);
    format!(
        "\n{summary}  bitferry info vm.qcow2\n  bitferry copy vm.qcow2 /somewhere/else/vm.qcow2\n"
    )
}

/// Words in lines of at most [`COLUMNS`].
fn paragraph(text: &str) -> String {
    let mut lines = String::new();
    let mut column = 0;
    for word in text.split_whitespace() {
        let len = word.chars().count();
        if column > 0 && column + 1 + len > COLUMNS {
            lines.push('\n');
            column = 0;
        } else if column > 0 {
            lines.push(' ');
            column += 1;
        }
        lines.push_str(word);
        column += len;
    }
    lines.push('\n');
    lines
}

fn report(moved: &Moved, total_time_ms: u64) -> Report {
    let sent = &moved.sent;
    let bitmap = |name: &String| BitmapReport {
        name: name.clone(),
        outcome: BitmapOutcome::Preserved,
        changed: Vec::new(),
        reason: None,
        is_wanted: true,
    };
    Report {
        status: Status::Completed,
        error: None,
        total_time_ms,
        downtime_ms: Some(u64::try_from(moved.downtime.as_millis()).unwrap_or(u64::MAX)),
        wire_bytes: sent.wire_bytes,
        repeated_bytes: moved.repeated,
        resumed: false,
        disks: vec![DiskReport {
            id: DISK.to_owned(),
            bytes_data: sent.sent.bytes_data,
            bytes_zero: sent.sent.bytes_zero,
            content_hash: sent.confirmed.content.map(|content| content.to_string()),
            verified: Verified::Yes,
            not_carried: Vec::new(),
            bitmaps: sent.bitmaps.iter().map(bitmap).collect(),
        }],
        ram: None,
    }
}
