//! `send`: disks at rest to a destination.

use std::time::{Duration, Instant};

use clap::Args as Group;
use clap::builder::{OsStringValueParser, TypedValueParser as _};

use bitferry::connect::{self, Dial as _, Options, Uri};
use bitferry::copy::BitmapSelection;
use bitferry::options::DiskOption;
use bitferry::qemu::{Version, outgoing};
use bitferry::send::{self, Plan, PlannedDisk, SendOptions};
use mig_core::stream;

use super::dialect::{DialectArg, QemuArgs};
use super::outcome::{Asked, Peer};
use super::size::{self, human};
use super::transport::{Compress, TransportArgs, pause};
use super::watch::{Summary, Watch};
use super::{Outcome, Output, outcome, table};

const EXAMPLES: &str = "\
Examples:
  bitferry send --disk vda=vm.qcow2 tcp:host.example:4444
      to `bitferry receive --disk vda=vm.qcow2 tcp::4444` at the other host
  bitferry send --disk vda=a.qcow2 --disk vdb=b.raw --channels 4 --compress zstd tcp:host:4444
      two disks over four connections, compressed
  bitferry send --disk vda=vm.qcow2 --tls-dir /etc/pki/bitferry tcp:host.example:4444
      encrypted, both sides with a certificate
  bitferry send --disk drive0=vm.qcow2 --dialect qemu:7.2 --peer-qmp /run/qmp unix:/run/migrate
      to a QEMU that waits with -incoming
  bitferry send --disk vda=vm.qcow2 file:vm.stream
      into a file, for `bitferry receive --disk vda=vm.qcow2 file:vm.stream`";

/// Send disks with their bitmaps to a destination
///
/// The destination publishes nothing before both sides agree that everything reads back as it was
/// sent. Over a file, a pipe or a command nobody answers: the destination proves what it received,
/// and this side reports it as unconfirmed.
#[derive(Debug, Group)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct SendArgs {
    #[command(flatten)]
    pub(crate) transport: TransportArgs,
    /// A disk: ID is its name at the destination, a doubled comma stands for one in PATH; may be
    /// repeated
    #[arg(long, value_name = "ID=PATH[,format=F][,readonly]", required = true)]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| DiskOption::parse(&text)))]
    pub(crate) disk: Vec<DiskOption>,
    /// Open the backing and data files that the images name, and read through them
    #[arg(long)]
    pub(crate) allow_backing: bool,
    /// Read through the backing chains into whole images; implies --allow-backing
    #[arg(long)]
    pub(crate) flatten: bool,
    /// Not here: the destination says what its image stands on
    #[arg(long, hide = true, value_name = "PATH")]
    pub(crate) backing: Option<std::path::PathBuf>,
    /// Bitmaps to carry: all, none or names
    #[arg(long, value_name = "all|none|NAME,…", default_value = "all", hide_default_value = true)]
    pub(crate) bitmaps: BitmapSelection,
    /// Give a bitmap another name at the destination, on the disk NODE or on all; may be repeated
    #[arg(long, value_name = "[NODE/]OLD=NEW")]
    pub(crate) rename_bitmap: Vec<bitferry::copy::Rename>,
    /// Go on without inconsistent bitmaps, and say so
    #[arg(long)]
    pub(crate) skip_broken_bitmaps: bool,
    /// Data connections
    #[arg(long, value_name = "N", default_value_t = 1, hide_default_value = true)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=255), help_heading = "Transport")]
    #[arg(allow_negative_numbers = true)]
    pub(crate) channels: u16,
    /// Compress on the wire: none, zlib[:LEVEL] or zstd[:LEVEL]
    #[arg(long, value_name = "METHOD", default_value = "none", hide_default_value = true)]
    #[arg(help_heading = "Transport")]
    pub(crate) compress: Compress,
    /// Bytes per second at most, on all connections together; K, M, G and T are powers of
    /// 1024, 0 is no limit
    #[arg(long, value_name = "RATE", value_parser = size::parse, help_heading = "Transport")]
    #[arg(allow_negative_numbers = true)]
    pub(crate) bandwidth: Option<u64>,
    /// How long a guest may be paused, in milliseconds: what `query-migrate-parameters` shows.
    /// Disks at rest need no pause
    #[arg(long, value_name = "MS", help_heading = "Transport")]
    #[arg(value_parser = pause, allow_negative_numbers = true)]
    pub(crate) downtime: Option<u64>,
    /// The other end of - or exec: answers, on standard input or the command's output
    #[arg(long, help_heading = "Transport")]
    pub(crate) two_way: bool,
    #[command(flatten)]
    pub(crate) qemu: QemuArgs,
    /// Leave out the proof that the destination reads back what was sent
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Begin anew instead of going on with what an interrupted run left at the destination
    #[arg(long)]
    pub(crate) fresh: bool,
    /// Say what would be sent, the space it needs there and what would be lost; connect nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

pub(crate) fn run(args: SendArgs, output: &Output) -> Outcome {
    let started = Instant::now();
    let asked = Asked::disks(&args.disk);
    let result = go(args, output);
    outcome::failed(&result, started, &asked, output)?;
    result
}

fn go(args: SendArgs, output: &Output) -> Outcome {
    if args.two_way && !matches!(args.transport.uri, Uri::Stdio | Uri::Exec(_)) {
        let reason = format!("--two-way is for - and exec:, and {} is neither", args.transport.uri);
        return Err(bitferry::Error::Usage { reason });
    }
    if args.backing.is_some() {
        let reason = "--backing is for the destination: send --shared-base sends what stands above \
                      the backing file, and receive --backing says what stands below it there";
        return Err(bitferry::Error::Usage { reason: reason.to_owned() });
    }
    let watch = Watch::with_events(output, !args.no_verify, Asked::disks(&args.disk))?;
    let watch = watch.limited(&super::copy::meter(args.bandwidth));
    match args.qemu.dialect {
        DialectArg::Native => native(args, &watch, output),
        DialectArg::Qemu(version) => to_qemu(args, version, &watch, output),
    }
}

fn native(args: SendArgs, watch: &Watch<'_>, output: &Output) -> Outcome {
    args.qemu.refuse_in_native()?;
    let transport = args.connect_options();
    let (transport_args, is_dry_run) = (args.transport.clone(), args.dry_run);
    let uri = &transport_args.uri;
    let downtime = downtime(args.downtime);
    let options = options(args)?;
    if is_dry_run {
        return dry_run(&options, watch, output);
    }
    let dialer = connect::dial(uri, &transport)?;
    let limits = (Some(&options.meter), downtime);
    let control = &transport_args.control;
    let report = control.supervise(limits, watch, |o| send::run(&options, &dialer, o))?;
    watch.finish();
    let end = (Peer::Destination, dialer.end());
    outcome::finish_with(report, end, &format!("sent to {uri}"), output)
}

/// To a stock QEMU: see [`bitferry::qemu::outgoing`].
fn to_qemu(
    args: SendArgs,
    version: Option<Version>,
    watch: &Watch<'_>,
    output: &Output,
) -> Outcome {
    args.refuse_to_qemu()?;
    let transport = args.connect_options();
    let uri = args.transport.uri.clone();
    let dialer = connect::dial(&uri, &transport)?;
    let machine = args.qemu.machine.clone().unwrap_or_default();
    let options = outgoing::Options {
        disks: args.disk.into_iter().map(source_disk).collect(),
        allow_backing: args.allow_backing || args.flatten,
        version: Version::decide(version, &machine)?,
        machine,
        uuid: args.qemu.uuid.map(|uuid| uuid.0),
        blocks: !args.qemu.no_blocks,
        shared_base: args.qemu.shared_base,
        bitmaps: args.bitmaps,
        renames: args.rename_bitmap,
        skip_broken_bitmaps: args.skip_broken_bitmaps,
        peer_qmp: args.qemu.peer_qmp,
        is_one_way: dialer.nature().is_one_way,
        no_verify: args.no_verify,
        meter: super::copy::meter(args.bandwidth),
        ..outgoing::Options::default()
    };
    // A QEMU that waits dies of a connection on which nothing comes.
    let prepared = outgoing::prepare(&options, watch)?;
    if args.dry_run {
        return show_plan(&prepared.describe()?, watch, output);
    }
    let limits = (Some(&options.meter), downtime(args.downtime));
    let report = args.transport.control.supervise(limits, watch, |observer| {
        let connection = dialer.dial().map_err(stream::Error::Connect)?;
        prepared.send(connection, observer)
    })?;
    watch.finish();
    let end = (Peer::Qemu, dialer.end());
    outcome::finish_with(report, end, &format!("sent to QEMU at {uri}"), output)
}

fn downtime(milliseconds: Option<u64>) -> Duration {
    milliseconds.map_or(Duration::ZERO, Duration::from_millis)
}

fn source_disk(disk: DiskOption) -> outgoing::SourceDisk {
    outgoing::SourceDisk { id: disk.id, path: disk.path, format: disk.format }
}

impl SendArgs {
    fn connect_options(&self) -> Options {
        Options { is_two_way: self.two_way, ..self.transport.options() }
    }

    /// Refuses what QEMU's dialect does not have.
    fn refuse_to_qemu(&self) -> bitferry::Result<()> {
        let given = [
            (self.channels > 1, "--channels: disks and bitmaps have one connection to a QEMU"),
            (self.compress.0.is_some(), "--compress: a QEMU takes disks and bitmaps plain"),
            (self.fresh, "--fresh: a QEMU keeps nothing of an earlier try"),
            (self.transport.reconnect.is_some(), "--reconnect: a QEMU dies of a cut"),
        ];
        match given.iter().find(|(is_given, _)| *is_given) {
            Some((_, reason)) => Err(bitferry::Error::Usage { reason: (*reason).to_owned() }),
            None => Ok(()),
        }
    }
}

fn options(args: SendArgs) -> bitferry::Result<SendOptions> {
    Ok(SendOptions {
        disks: args.disk,
        blocks: !args.qemu.no_blocks,
        shared_base: args.qemu.shared_base,
        allow_backing: args.allow_backing || args.flatten,
        bitmaps: args.bitmaps,
        renames: args.rename_bitmap,
        skip_broken_bitmaps: args.skip_broken_bitmaps,
        no_verify: args.no_verify,
        destination: args.transport.uri.to_string(),
        fresh: args.fresh,
        channels: args.channels,
        compression: args.compress.0,
        meter: super::copy::meter(args.bandwidth),
        cannot_hold: None,
        reconnect: args.transport.reconnect()?,
    })
}

pub(super) fn dry_run(options: &SendOptions, watch: &Watch<'_>, output: &Output) -> Outcome {
    show_plan(&send::plan(options, watch)?, watch, output)
}

fn show_plan(plan: &Plan, watch: &Watch<'_>, output: &Output) -> Outcome {
    watch.finish();
    if output.is_json {
        output.event(&Summary::new("plan", plan))?;
    } else {
        output.text(plan_text(plan, output))?;
    }
    Ok(plan.exit_status)
}

fn plan_text(plan: &Plan, output: &Output) -> String {
    let mut text: String = plan.disks.iter().map(|disk| disk_text(disk, output)).collect();
    if plan.disks.len() > 1 {
        let space = human(plan.space_needed);
        text.push_str(&format!("space for all: at most {space} at the destination\n"));
    }
    for why in &plan.refusals {
        text.push_str(&format!("refused: {}\n", output.bad(outcome::without_prefix(why))));
    }
    text.push_str(&output.strong("nothing was sent\n"));
    text
}

fn disk_text(disk: &PlannedDisk, output: &Output) -> String {
    let (data, zero) = (human(disk.bytes_data), human(disk.bytes_zero));
    let mut fields = vec![
        ("  source", format!("{} ({})", disk.source, disk.source_format)),
        ("  virtual size", human(disk.virtual_size)),
        ("  to send", format!("{data}, and {zero} of zeroes")),
        ("  space", format!("at most {} at the destination", human(disk.space_needed))),
    ];
    fields.extend(disk.not_carried.iter().map(|what| ("  not carried", what.clone())));
    let mut text = format!("{}\n{}", output.strong(&table::name(&disk.id)), table::fields(&fields));
    text.push_str(&outcome::planned_bitmaps(&disk.bitmaps));
    text
}
