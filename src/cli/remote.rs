//! `copy` to or from another host: `bitferry` runs at both ends of an ssh connection.

use std::ffi::OsString;
use std::path::Path;
use std::time::{Duration, Instant};

use bitferry::connect::{self, Location, Options, Remote};
use bitferry::copy::{BitmapSelection, Format, Rename};
use bitferry::options::{BackingOption, DiskOption, doubled};
use bitferry::receive::{self, Arrivals, ReceiveOptions};
use bitferry::report::{Report, Status, Verified};
use bitferry::send::{self, SendOptions};
use bitferry::{Error, Observer as _, Renames, Result};

use super::args::CopyArgs;
use super::outcome::{Asked, Peer};
use super::watch::Watch;
use super::{Outcome, Output, WOULD_LOSE, outcome, target_options};

/// The disk's name on the wire: there is only one.
const DISK: &str = "disk0";

/// Which of the operands is at another host.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Route {
    /// Neither.
    Here,
    /// The destination.
    To(Remote),
    /// The source.
    From(Remote),
}

/// Reads both operands.
pub(super) fn route(source: &Path, destination: &Path) -> Result<Route> {
    let parse = |path: &Path| Location::parse(path.as_os_str()).map_err(connect::Error::from);
    match (parse(source)?, parse(destination)?) {
        (Location::Local(_), Location::Local(_)) => Ok(Route::Here),
        (Location::Local(_), Location::Remote(remote)) => Ok(Route::To(remote)),
        (Location::Remote(remote), Location::Local(_)) => Ok(Route::From(remote)),
        (Location::Remote(_), Location::Remote(_)) => Err(Error::Usage {
            reason: "both SRC and DST are at other hosts: run it on one of them".to_owned(),
        }),
    }
}

/// Sends to a `bitferry receive` at the other host.
pub(super) fn to(args: CopyArgs, remote: &Remote, output: &Output) -> Outcome {
    check(&args)?;
    let mut options = send_options(&args);
    let watch = Watch::with_events(output, !args.no_verify, Asked::copy(&args.destination))?;
    let watch = watch.limited(&options.meter);
    let plan = send::plan(&options, &watch)?;
    let has_shape = !args.target_options.is_empty();
    // As with a local copy: the source's format, unless something else is asked for.
    let format = match (args.target_format, plan.disks.first()) {
        (Some(format), _) => format,
        (None, Some(disk)) if !has_shape => disk.source_format,
        (None, _) => Format::Qcow2,
    };
    if format == Format::Raw && !args.in_place {
        options.cannot_hold = Some("a raw image has no place for bitmaps".to_owned());
    }
    // The same command finds what it left; another shape is another command.
    options.destination = format!("{remote} {format} {}", args.target_options.join(","));
    if let Some(base) = &args.backing {
        options.destination.push_str(&format!(" on {}", base.display()));
    }
    if args.dry_run {
        return super::send::dry_run(&options, &watch, output);
    }
    let words = receive_args(&args, remote, format);
    let how = (words, args.channels.unwrap_or(1));
    let dialer = connect::dial_ssh(&remote.destination, how, &Options::default());
    let limits = (Some(&options.meter), Duration::ZERO);
    let sent = args.control.supervise(limits, &watch, |o| send::run(&options, &dialer, o));
    let mut report = sent.map_err(|error| refused_there(error, remote))?;
    watch.finish();
    name(&mut report, &remote.to_string());
    let done = format!("copied {} -> {remote}", args.source.display());
    outcome::finish_with(report, (Peer::Destination, dialer.end()), &done, output)
}

/// Receives from a `bitferry send` at the other host.
pub(super) fn from(args: CopyArgs, remote: &Remote, output: &Output) -> Outcome {
    let started = Instant::now();
    check(&args)?;
    let watch = Watch::with_events(output, !args.no_verify, Asked::copy(&args.destination))?;
    let watch = watch.limited(&super::copy::meter(args.bandwidth));
    if args.dry_run {
        return plan_there((&args, remote), &watch, output);
    }
    let target = target_options::parse(&args.target_options)?;
    let mut disk = disk(args.destination.clone(), args.target_format);
    if args.target_format.is_none() && args.target_options.is_empty() && !args.in_place {
        disk.format = Some(remote_format((&args, remote), &watch)?);
    }
    let options = ReceiveOptions {
        disks: vec![disk],
        target,
        existing: super::copy::existing(args.force, args.in_place),
        backing: args.backing.iter().map(|path| base(path)).collect(),
        allow_backing: args.allow_backing,
        no_verify: args.no_verify,
        fresh: args.fresh,
        device_journals: args.state_dir.directory(),
        reconnect: args.reconnect.unwrap_or_default(),
        ..ReceiveOptions::default()
    };
    options.check()?;
    let transport = Options::default();
    let words = send_args(&args, remote, &["--quiet", "--two-way", "-"]);
    let how = (words, args.channels.unwrap_or(1));
    let listener = connect::listen_ssh(&remote.destination, how, &transport);
    let limits = (None, Duration::ZERO);
    let received = args.control.supervise(limits, &watch, |observer| {
        let (_tell, refused) = std::sync::mpsc::channel();
        let arrivals = Arrivals::new(&listener, observer, refused);
        receive::run(&options, &arrivals, observer)
    });
    let mut report = received.map_err(|error| refused_there(error, remote))?;
    watch.finish();
    proved_if_wanted(&report, args.no_verify, remote)?;
    // Here the one that is waited for was started.
    report.total_time_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    name(&mut report, &args.destination.display().to_string());
    let done = format!("copied {remote} -> {}", args.destination.display());
    outcome::finish_with(report, (Peer::Source, listener.end()), &done, output)
}

/// What an earlier run did without proof is not what one that asks for a proof asks for: the other
/// end says so too, and here it is what the exit status is about.
fn proved_if_wanted(report: &Report, no_verify: bool, remote: &Remote) -> Result<()> {
    let is_unproved = report.disks.iter().any(|disk| disk.verified == Verified::No);
    if no_verify || report.status != Status::AlreadyComplete || !is_unproved {
        return Ok(());
    }
    Err(Error::NeverProved { name: remote.to_string() })
}

/// What would be sent is known at the other end, which is asked there.
fn plan_there((args, remote): (&CopyArgs, &Remote), watch: &Watch<'_>, output: &Output) -> Outcome {
    let form = if output.is_json { "--json" } else { "--progress=never" };
    let words = send_args(args, remote, &[form, "--dry-run", "file:/dev/null"]);
    let (said, status) = ask(remote, (&words, &[2, 3, 5, WOULD_LOSE]), watch)?;
    output.stream(|out| out.write_all(&said))?;
    Ok(status)
}

/// What `bitferry` with these words prints at the other end, and its status.
fn ask(
    remote: &Remote,
    (words, accepted): (&[OsString], &[u8]),
    watch: &Watch<'_>,
) -> Result<(Vec<u8>, u8)> {
    let is_cancelled = || watch.is_cancelled();
    let answer = connect::run_ssh(&remote.destination, words, accepted, &is_cancelled);
    if watch.is_cancelled() {
        return Err(Error::Interrupted);
    }
    Ok(answer?)
}

/// What is sent from here. There is one disk, whatever name is written before those of bitmaps.
fn send_options(args: &CopyArgs) -> SendOptions {
    let any_node = |rename: &Rename| Rename { node: None, ..rename.clone() };
    SendOptions {
        disks: vec![disk(args.source.clone(), args.source_format)],
        allow_backing: args.allow_backing || args.flatten,
        shared_base: args.backing.is_some(),
        bitmaps: args.bitmaps.clone(),
        renames: args.rename_bitmap.iter().map(any_node).collect(),
        skip_broken_bitmaps: args.skip_broken_bitmaps,
        no_verify: args.no_verify,
        fresh: args.fresh,
        channels: args.channels.unwrap_or(1),
        compression: args.compress.0,
        meter: super::copy::meter(args.bandwidth),
        reconnect: args.reconnect.unwrap_or_default(),
        ..SendOptions::default()
    }
}

/// What the other end refused, having said why, was refused as a whole.
fn refused_there(error: Error, remote: &Remote) -> Error {
    use mig_core::stream::Error as Stream;
    let is_foreign = match &error {
        Error::Stream(Stream::Malformed { source, .. }) => source.field == "hello magic",
        Error::Stream(Stream::Protocol { offset: 0, reason, .. }) => {
            reason.ends_with(receive::NO_MIGRATION)
        }
        _ => false,
    };
    if is_foreign {
        return banner(remote);
    }
    let ended = match &error {
        Error::Stream(Stream::Connect(e) | Stream::Connection { source: e, .. }) => {
            connect::Error::find(e).and_then(connect::Error::exit_code)
        }
        _ => None,
    };
    if ended != Some(WOULD_LOSE) {
        return error;
    }
    Error::WouldLose {
        reason: format!("{} says above why", remote.destination),
        hint: "what it suggests can be asked of this command".to_owned(),
    }
}

/// Something else speaks at the other end.
fn banner(remote: &Remote) -> Error {
    connect::Error::Banner { command: format!("ssh {}", remote.destination) }.into()
}

/// What a copy calls its disk.
fn name(report: &mut Report, destination: &str) {
    report.disks.iter_mut().for_each(|disk| disk.id = destination.to_owned());
}

fn disk(path: std::path::PathBuf, format: Option<Format>) -> DiskOption {
    DiskOption { id: DISK.to_owned(), path, format, is_readonly: false }
}

/// The backing file of a destination here.
fn base(path: &Path) -> BackingOption {
    BackingOption { id: None, path: path.to_owned(), format: None }
}

/// What makes no sense is refused before the other end is asked.
fn check(args: &CopyArgs) -> Result<()> {
    Renames::check_of_one_disk(&args.rename_bitmap)?;
    check_backing(args)
}

/// The two ends do not see each other's backing file: what stands above the one is sent, and
/// whether that fits the other only the proof can tell.
fn check_backing(args: &CopyArgs) -> Result<()> {
    let usage = |reason: &str| Err(Error::Usage { reason: reason.to_owned() });
    match &args.backing {
        None => Ok(()),
        Some(_) if args.in_place => {
            usage("--backing is for new images; --in-place writes into what exists")
        }
        Some(_) if args.target_format == Some(Format::Raw) => {
            usage("a raw image has no backing file: leave -O or --backing out")
        }
        Some(path) if args.no_verify => Err(Error::WouldLose {
            reason: format!(
                "{} is on the destination's host, and only the proof can tell whether it reads as \
                 what the source stands on",
                path.display()
            ),
            hint: "leave --no-verify out".to_owned(),
        }),
        Some(_) => Ok(()),
    }
}

/// Arguments of the receiving side. What it may have kept of an earlier try it goes on with if that
/// is of the same session, which --fresh changes.
fn receive_args(args: &CopyArgs, remote: &Remote, format: Format) -> Vec<OsString> {
    let format = (!args.in_place || args.target_format.is_some()).then_some(format);
    let mut words: Vec<OsString> = vec!["receive".into(), "--quiet".into()];
    words.extend(["--disk".into(), disk_word(&remote.path, format)]);
    words.extend(args.target_options.iter().flat_map(|o| ["-o".into(), OsString::from(o)]));
    let switches = [
        (args.force, "--force"),
        (args.in_place, "--in-place"),
        ((args.in_place || args.backing.is_some()) && args.allow_backing, "--allow-backing"),
        (args.no_verify, "--no-verify"),
    ];
    words.extend(set(&switches));
    if let Some(base) = &args.backing {
        words.extend(["--backing".into(), place_word(base)]);
    }
    if let Some(directory) = args.state_dir.named() {
        words.extend(["--state-dir".into(), directory.into()]);
    }
    words.push("-".into());
    words
}

/// Arguments of the sending side, the last of which say `how`. --fresh is about what is here.
fn send_args(args: &CopyArgs, remote: &Remote, how: &[&str]) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["send".into()];
    words.extend(["--disk".into(), disk_word(&remote.path, args.source_format)]);
    words.push(match &args.bitmaps {
        BitmapSelection::All => "--bitmaps=all".into(),
        BitmapSelection::None => "--bitmaps=none".into(),
        BitmapSelection::Named(names) => format!("--bitmaps={}", names.join(",")).into(),
    });
    // Whatever disk was named here, there is only one there.
    let renames = args.rename_bitmap.iter();
    let renames = renames.map(|r| format!("--rename-bitmap={DISK}/{}={}", r.old, r.new));
    words.extend(renames.map(OsString::from));
    words.push(format!("--compress={}", args.compress).into());
    words.extend(args.channels.map(|n| OsString::from(format!("--channels={n}"))));
    words.extend(args.bandwidth.map(|rate| OsString::from(format!("--bandwidth={rate}"))));
    let switches = [
        (args.allow_backing || args.flatten, "--allow-backing"),
        (args.backing.is_some(), "--shared-base"),
        (args.skip_broken_bitmaps, "--skip-broken-bitmaps"),
        (args.no_verify, "--no-verify"),
    ];
    words.extend(set(&switches));
    words.extend(how.iter().map(OsString::from));
    words
}

fn set(switches: &[(bool, &str)]) -> impl Iterator<Item = OsString> {
    switches.iter().filter(|(is_set, _)| *is_set).map(|(_, word)| OsString::from(word))
}

fn disk_word(path: &Path, format: Option<Format>) -> OsString {
    let mut word = place_word(path);
    word.push(format.map(|format| format!(",format={format}")).unwrap_or_default());
    word
}

/// The disk and a path.
fn place_word(path: &Path) -> OsString {
    let mut word = OsString::from(format!("{DISK}="));
    word.push(doubled(path.as_os_str()));
    word
}

/// The format of the image at the other host, as `bitferry info` there says.
fn remote_format((args, remote): (&CopyArgs, &Remote), watch: &Watch<'_>) -> Result<Format> {
    if let Some(format) = args.source_format {
        return Ok(format);
    }
    let words = ["info".into(), "--json".into(), "--".into(), remote.path.clone().into_os_string()];
    let (answer, _) = ask(remote, (&words, &[]), watch)?;
    let info: Option<serde_json::Value> = serde_json::from_slice(&answer).ok();
    let format = info.as_ref().and_then(|info| info.get("format")?.as_str()?.parse().ok());
    format.ok_or_else(|| banner(remote))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_the_first_slash_is_a_host() {
        let route = |a: &str, b: &str| route(Path::new(a), Path::new(b));
        assert_eq!(route("a", "./b:c").unwrap(), Route::Here);
        let remote = Remote { destination: "u@h".into(), path: "/x".into() };
        assert_eq!(route("a", "u@h:/x").unwrap(), Route::To(remote.clone()));
        assert_eq!(route("u@h:/x", "a").unwrap(), Route::From(remote));
        for (a, b) in [("h:a", "h:b"), ("-oX=y:a", "b"), ("h:", "b")] {
            assert_eq!(route(a, b).unwrap_err().exit_status(), 2, "{a} {b}");
        }
    }
}
