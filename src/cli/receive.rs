//! `receive`: one migration into image files.

use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use clap::Args as Group;
use clap::builder::{OsStringValueParser, TypedValueParser as _};
use serde::Serialize;

use format_spec::native::hello::MAX_CHANNELS;

use bitferry::connect::{self, Listener, Options, Refused, Uri};
use bitferry::copy::{BitmapSelection, Rename};
use bitferry::options::{BackingOption, DiskOption};
use bitferry::receive::{self, Arrivals, ReceiveOptions};

use super::dialect::DialectArg;
use super::outcome::{Asked, Peer};
use super::state_dir::StateDirArgs;
use super::transport::TransportArgs;
use super::watch::Watch;
use super::{Outcome, Output, outcome, target_options};

const EXAMPLES: &str = "\
Examples:
  bitferry receive --disk vda=/images/vm.qcow2 tcp::4444
      listens on every address; tcp:HOST:0 chooses a free port and says which
  bitferry receive --disk vda=vm.qcow2 --tls-dir /etc/pki/bitferry tcp::4444
      only from a source that shows a certificate
  bitferry receive --in-place --disk drive0=vm.qcow2 tcp::4444
      from a QEMU, with the capability dirty-bitmaps, or up to 9.0 with migrate -b
  bitferry receive --disk vda=vm.qcow2 - < vm.stream
      what `bitferry send … -` wrote";

/// Receive one migration, publish its disks, exit
///
/// Disks get their names only when everything is durable and, unless the source leaves the proof
/// out, read back and found equal on both sides. Connections that are no migration are turned away.
#[derive(Debug, Group)]
#[command(after_long_help = EXAMPLES)]
pub(crate) struct ReceiveArgs {
    #[command(flatten)]
    pub(crate) transport: TransportArgs,
    /// The place of a disk: ID is its name at the source, a doubled comma stands for one in PATH;
    /// made as qcow2 unless format= says otherwise; may be repeated
    #[arg(long, value_name = "ID=PATH[,format=F]", required = true)]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| DiskOption::parse(&text)))]
    pub(crate) disk: Vec<DiskOption>,
    /// Shape of new qcow2 images in qemu-img's words: cluster_size, extended_l2, compression_type,
    /// refcount_bits, compat, data_file, data_file_raw; may be repeated
    #[arg(short = 'o', long, value_name = "K=V,…")]
    pub(crate) target_options: Vec<String>,
    /// Replace what exists; the old ones stay until the new ones are complete
    #[arg(long, conflicts_with = "in_place")]
    pub(crate) force: bool,
    /// Write into what exists; the only way for block devices, and from a QEMU
    #[arg(long)]
    pub(crate) in_place: bool,
    /// Begin anew instead of going on with what an interrupted run left
    #[arg(long)]
    pub(crate) fresh: bool,
    #[command(flatten)]
    pub(crate) state_dir: StateDirArgs,
    /// Grant at most so many data connections
    #[arg(long, value_name = "N", help_heading = "Transport")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=255), allow_negative_numbers = true)]
    pub(crate) channels: Option<u16>,
    /// Open the backing and data files that existing images name, and those that --backing names
    #[arg(long)]
    pub(crate) allow_backing: bool,
    /// Make the image on this backing file, which reads as the source's: for `send --shared-base`.
    /// Of several disks each has its own; may be repeated
    #[arg(long, value_name = "[ID=]PATH[,format=F]", conflicts_with_all = ["in_place", "flatten"])]
    #[arg(value_parser = OsStringValueParser::new().try_map(|text| BackingOption::parse(&text)))]
    pub(crate) backing: Vec<BackingOption>,
    /// Not here: what is sent is decided at the source
    #[arg(long, hide = true)]
    pub(crate) flatten: bool,
    /// From a QEMU: bitmaps to store: all, none or names
    #[arg(long, value_name = "all|none|NAME,…", default_value = "all", hide_default_value = true)]
    pub(crate) bitmaps: BitmapSelection,
    /// Give a bitmap another name here, on the disk NODE or on all; may be repeated
    #[arg(long, value_name = "[NODE/]OLD=NEW")]
    pub(crate) rename_bitmap: Vec<Rename>,
    /// Do not insist on the proof: the source decides
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// What the source must speak: native, or qemu:VERSION with the older of its QEMU's version and
    /// its machine type's; recognised unless given
    #[arg(long, value_name = "native|qemu[:VERSION]", help_heading = "From a QEMU")]
    pub(crate) dialect: Option<DialectArg>,
    /// The source migrates with -i: what it does not send is in the images already
    #[arg(long, help_heading = "From a QEMU")]
    pub(crate) shared_base: bool,
}

/// Where a source may connect, told as soon as it may.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename = "listening", rename_all = "kebab-case")]
struct Listening {
    uri: String,
}

pub(crate) fn run(args: ReceiveArgs, output: &Output) -> Outcome {
    let started = Instant::now();
    let asked = Asked::disks(&args.disk);
    let watch = Watch::with_events(output, !args.no_verify, Asked::disks(&args.disk))?;
    let result = go(args, &watch, output);
    outcome::failed(&result, watch.met().unwrap_or(started), &asked, output)?;
    result
}

fn go(args: ReceiveArgs, watch: &Watch<'_>, output: &Output) -> Outcome {
    if args.flatten {
        let reason = "--flatten is for the source: send --flatten reads through its backing chain";
        return Err(bitferry::Error::Usage { reason: reason.to_owned() });
    }
    if let Some(dialect) = args.dialect {
        dialect.check_source(args.shared_base)?;
    }
    let options = ReceiveOptions {
        disks: args.disk,
        target: target_options::parse(&args.target_options)?,
        existing: super::copy::existing(args.force, args.in_place),
        fresh: args.fresh,
        device_journals: args.state_dir.directory(),
        backing: args.backing,
        allow_backing: args.allow_backing,
        bitmaps: args.bitmaps,
        renames: args.rename_bitmap,
        no_verify: args.no_verify,
        dialect: args.dialect.map(DialectArg::dialect),
        shared_base: args.shared_base,
        max_channels: args.channels.unwrap_or(MAX_CHANNELS),
        reconnect: args.transport.reconnect()?,
    };
    options.check()?;
    let (listener, refused) = listen(&args.transport)?;
    announce(&listener, &args.transport.uri, output)?;
    let limits = (None, Duration::ZERO);
    let report = args.transport.control.supervise(limits, watch, |observer| {
        let arrivals = Arrivals::new(&listener, observer, refused);
        receive::run(&options, &arrivals, observer)
    })?;
    watch.finish();
    let done = format!("received from {}", args.transport.uri);
    outcome::finish_with(report, (Peer::Source, listener.end()), &done, output)
}

fn listen(transport: &TransportArgs) -> bitferry::Result<(Listener, Receiver<String>)> {
    let (tell, told) = mpsc::channel();
    let refused = Refused::new(move |error| {
        let why = bitferry::report::error_chain(error);
        // Nobody listens when the migration is over.
        let _ = tell.send(format!("a connection was turned away: {why}"));
    });
    let introduced = receive::is_introduced;
    let options = Options { refused, introduced, ..transport.options() };
    Ok((connect::listen(&transport.uri, &options)?, told))
}

/// Says where it listens, where somebody could not know it.
fn announce(listener: &Listener, asked: &Uri, output: &Output) -> bitferry::Result<()> {
    if !matches!(asked, Uri::Tcp { .. } | Uri::Unix(_)) {
        return Ok(());
    }
    let uri = listener.uri().to_string();
    if output.is_json {
        return output.event(&Listening { uri });
    }
    output.text(format!("listening on {uri}\n"))
}
