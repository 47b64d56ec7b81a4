//! `copy`: one image with its bitmaps, on one host.

use std::path::Path;
use std::time::{Duration, Instant};

use bitferry::copy::{self, BackingChoice, CopyOptions, Existing, Plan};
use bitferry::report::{BitmapOutcome, BitmapReport, DiskReport, Status, Verified};
use bitferry::{Error, Report, exit_status};

use super::args::CopyArgs;
use super::size::{human, human_time};
use super::watch::{Summary, Watch};
use super::{Outcome, Output, table, target_options};

/// Nothing was written because something would have been lost.
const WOULD_LOSE: u8 = 7;

pub(crate) fn run(args: CopyArgs, output: &Output) -> Outcome {
    let start = Instant::now();
    let is_dry_run = args.dry_run;
    let result = options(args).and_then(|options| {
        let watch = Watch::with_events(output, !options.no_verify)?;
        if is_dry_run { dry_run(&options, &watch, output) } else { go(&options, &watch, output) }
    });
    if let (Err(error), true) = (&result, output.is_json) {
        let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
        output.event(&Summary::new("summary", &Report::failure(error, elapsed_ms)))?;
    }
    result
}

/// The validated plan of what was typed.
fn options(args: CopyArgs) -> bitferry::Result<CopyOptions> {
    for path in [&args.source, &args.destination] {
        refuse_remote(path)?;
    }
    let existing = match (args.force, args.in_place) {
        (true, _) => Existing::Replace,
        (_, true) => Existing::InPlace,
        _ => Existing::Refuse,
    };
    let backing = match args.backing {
        Some(path) => BackingChoice::Keep(path),
        None if args.flatten => BackingChoice::Flatten,
        None => BackingChoice::Unsaid,
    };
    Ok(CopyOptions {
        source: args.source,
        destination: args.destination,
        source_format: args.source_format,
        target_format: args.target_format,
        target: target_options::parse(&args.target_options)?,
        existing,
        allow_backing: args.allow_backing,
        backing,
        bitmaps: args.bitmaps,
        renames: args.rename_bitmap,
        skip_broken_bitmaps: args.skip_broken_bitmaps,
        no_verify: args.no_verify,
        fresh: args.fresh,
        ..CopyOptions::default()
    })
}

/// `HOST:PATH` is read as scp does: a colon before the first slash.
fn refuse_remote(path: &Path) -> bitferry::Result<()> {
    let text = path.to_string_lossy();
    let first = text.split('/').next().unwrap_or_default();
    match first.split_once(':') {
        None => Ok(()),
        Some((host, _)) => Err(Error::Usage {
            reason: format!(
                "{text:?} names the host {host:?}, and this version copies on one host only: run \
                 it where both paths can be reached, or write ./{text} for a file of that name"
            ),
        }),
    }
}

fn go(options: &CopyOptions, watch: &Watch<'_>, output: &Output) -> Outcome {
    let report = copy::run(options, watch)?;
    watch.finish();
    if output.is_json {
        output.event(&Summary::new("summary", &report))?;
    } else {
        output.text(report_text(options, &report, output))?;
    }
    Ok(exit_status(&report))
}

fn dry_run(options: &CopyOptions, watch: &Watch<'_>, output: &Output) -> Outcome {
    let plan = copy::plan(options, watch)?;
    watch.finish();
    if output.is_json {
        output.event(&Summary::new("plan", &plan))?;
    } else {
        output.text(plan_text(&plan, output))?;
    }
    Ok(if plan.refusals.is_empty() { 0 } else { WOULD_LOSE })
}

fn report_text(options: &CopyOptions, report: &Report, output: &Output) -> String {
    let verb = if report.status == Status::AlreadyComplete { "already complete" } else { "copied" };
    let mut text = format!(
        "{} {} -> {} in {}\n",
        output.strong(verb),
        options.source.display(),
        options.destination.display(),
        human_time(Duration::from_millis(report.total_time_ms)),
    );
    for disk in &report.disks {
        text.push_str(&disk_text(disk, output));
    }
    text
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

fn plan_text(plan: &Plan, output: &Output) -> String {
    let mut fields = vec![
        ("source", format!("{} ({})", plan.source, plan.source_format)),
        ("destination", format!("{} ({})", plan.destination, plan.target_format)),
        ("virtual size", human(plan.virtual_size)),
        (
            "to copy",
            format!("{}, and {} of zeroes", human(plan.bytes_data), human(plan.bytes_zero)),
        ),
        (
            "space",
            format!("at most {} of {} free", human(plan.space_needed), human(plan.space_free)),
        ),
    ];
    fields.extend(plan.not_carried.iter().map(|what| ("not carried", what.clone())));
    for why in &plan.refusals {
        let why = why.strip_prefix("refused, nothing was written: ").unwrap_or(why);
        fields.push(("refused", output.bad(why)));
    }
    let mut text = table::fields(&fields);
    let rows: Vec<[String; 3]> = plan
        .bitmaps
        .iter()
        .map(|bitmap| {
            let outcome = if bitmap.becomes.is_some() { "carried" } else { "not carried" };
            let renamed = bitmap.becomes.iter().filter(|to| **to != bitmap.name);
            let mut details: Vec<String> =
                renamed.map(|to| format!("as {}", table::name(to))).collect();
            details.extend(bitmap.reason.clone());
            [table::name(&bitmap.name), outcome.to_owned(), details.join("; ")]
        })
        .collect();
    if !rows.is_empty() {
        text.push_str(&table::columns(["BITMAP", "OUTCOME", ""], &rows));
    }
    text.push_str(&output.strong("nothing was written\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_the_first_slash_is_a_host() {
        for local in ["a", "./a:b", "/a:b", "a/b:c", "../x:y"] {
            assert!(refuse_remote(Path::new(local)).is_ok(), "{local}");
        }
        for remote in ["h:a", "u@h:/a", "h:", "[::1]:/a"] {
            let error = refuse_remote(Path::new(remote)).unwrap_err();
            assert_eq!(error.exit_status(), 2, "{remote}");
        }
    }
}
