//! `copy`: one image with its bitmaps, here or, see [`remote`], to or from another host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitferry::copy::{self, BackingChoice, CopyOptions, Existing, Plan};
use bitferry::report::Status;
use bitferry::{Error, Preserve, Report, exit_status};
use mig_core::meter::Meter;

use super::args::CopyArgs;
use super::outcome::Asked;
use super::remote::{self, Route};
use super::size::{human, human_time};
use super::watch::{Summary, Watch};
use super::{Outcome, Output, outcome, table, target_options};

pub(crate) fn run(args: CopyArgs, output: &Output) -> Outcome {
    let start = Instant::now();
    let asked = Asked::copy(&args.destination);
    let route = refuse_tls(&args).and_then(|()| remote::route(&args.source, &args.destination));
    let result = match route {
        Ok(Route::To(_) | Route::From(_))
            if args.preserve.is_some() || args.no_preserve.is_some() =>
        {
            let reason = "--preserve and --no-preserve are for copies on one host".to_owned();
            Err(Error::Usage { reason })
        }
        Ok(Route::To(remote)) => remote::to(args, &remote, output),
        Ok(Route::From(remote)) => remote::from(args, &remote, output),
        Ok(Route::Here) => here(args, output),
        Err(error) => Err(error),
    };
    outcome::failed(&result, start, &asked, output)?;
    result
}

/// Certificates are for sockets: there are none.
fn refuse_tls(args: &CopyArgs) -> bitferry::Result<()> {
    if args.tls_dir.is_none() && args.tls_peer.is_none() {
        return Ok(());
    }
    let reason = "--tls-dir is for `send` and `receive`: what is copied to or from another host \
                  goes through ssh, which encrypts it and knows who is there, and what is copied \
                  on one host goes over no connection";
    Err(Error::Usage { reason: reason.to_owned() })
}

fn here(args: CopyArgs, output: &Output) -> Outcome {
    let (is_dry_run, control) = (args.dry_run, args.control.clone());
    let options = options(args)?;
    let watch = Watch::with_events(output, !options.no_verify, Asked::copy(&options.destination))?;
    let watch = watch.limited(&options.meter);
    if is_dry_run {
        return dry_run(&options, &watch, output);
    }
    let limits = (Some(&options.meter), Duration::ZERO);
    let report = control.supervise(limits, &watch, |observer| copy::run(&options, observer))?;
    watch.finish();
    if output.is_json {
        output.summary(&report)?;
    } else {
        output.text(report_text(&options, &report, output))?;
    }
    Ok(exit_status(&report))
}

/// What limits this side's sending, or reading. None as well as 0 mean no limit, as in QEMU.
pub(super) fn meter(bandwidth: Option<u64>) -> Arc<Meter> {
    Arc::new(Meter::new(bandwidth.filter(|rate| *rate > 0)))
}

/// The validated plan of what was typed.
fn options(args: CopyArgs) -> bitferry::Result<CopyOptions> {
    let for_the_wire = [
        (args.compress.0.is_some(), "--compress"),
        (args.channels.is_some(), "--channels"),
        (args.reconnect.is_some(), "--reconnect"),
    ];
    if let Some((_, option)) = for_the_wire.iter().find(|(is_given, _)| *is_given) {
        let reason = format!("{option} is for the wire, and both paths are on this host");
        return Err(Error::Usage { reason });
    }
    let existing = existing(args.force, args.in_place);
    let preserve = preserve(&args);
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
        preserve,
        no_verify: args.no_verify,
        fresh: args.fresh,
        device_journals: args.state_dir.directory(),
        meter: meter(args.bandwidth),
        ..CopyOptions::default()
    })
}

/// What is asked for beside what is preserved unasked, less what is not wanted.
fn preserve(args: &CopyArgs) -> Preserve {
    let none = Preserve::NONE;
    let (more, less) = (args.preserve.unwrap_or(none), args.no_preserve.unwrap_or(none));
    Preserve::default().with(more).without(less)
}

/// What to do where the destination exists.
pub(super) fn existing(force: bool, in_place: bool) -> Existing {
    match (force, in_place) {
        (true, _) => Existing::Replace,
        (_, true) => Existing::InPlace,
        _ => Existing::Refuse,
    }
}

fn dry_run(options: &CopyOptions, watch: &Watch<'_>, output: &Output) -> Outcome {
    let plan = copy::plan(options, watch)?;
    watch.finish();
    if output.is_json {
        output.event(&Summary::new("plan", &plan))?;
    } else {
        output.text(plan_text(&plan, output))?;
    }
    Ok(plan.exit_status)
}

fn report_text(options: &CopyOptions, report: &Report, output: &Output) -> String {
    let verb = match report.status {
        Status::AlreadyComplete => output.strong("already complete"),
        Status::Failed => output.bad("NOT COPIED"),
        _ => output.strong("copied"),
    };
    let mut text = format!(
        "{verb} {} -> {} in {}\n",
        options.source.display(),
        options.destination.display(),
        human_time(Duration::from_millis(report.total_time_ms)),
    );
    if let Some(error) = &report.error {
        let left = match options.existing {
            Existing::InPlace => "the destination, written in place, holds what cannot be used",
            _ => "nothing was published",
        };
        text.push_str(&format!("  {error}; {left}\n"));
    }
    for disk in &report.disks {
        text.push_str(&outcome::disk_text(disk, output));
    }
    text
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
    if plan.already_complete {
        fields.push(("already complete", "nothing would be done".to_owned()));
    }
    for why in &plan.refusals {
        fields.push(("refused", output.bad(outcome::without_prefix(why))));
    }
    let mut text = table::fields(&fields);
    text.push_str(&outcome::planned_bitmaps(&plan.bitmaps));
    text.push_str(&output.strong("nothing was written\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_that_is_not_what_was_sent_is_not_said_to_be_made() {
        let mut report = Report::failure(&Error::Interrupted, 7);
        report.status = Status::Failed;
        report.error = Some("the copy does not read back as what was sent: …".to_owned());
        let output = Output::json(false);
        let text = |existing| {
            let (source, destination) = ("a".into(), "b".into());
            let options = CopyOptions { source, destination, existing, ..CopyOptions::default() };
            report_text(&options, &report, &output)
        };
        let new = text(Existing::Refuse);
        assert!(new.starts_with("NOT COPIED a -> b in 7 ms\n  the copy does not"), "{new}");
        assert!(new.contains("nothing was published"), "{new}");
        assert!(text(Existing::InPlace).contains("cannot be used"));
    }
}
