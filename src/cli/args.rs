//! The raw command line. What only makes sense together is checked by the verb's plan.

use std::path::PathBuf;

use clap::{Args as Group, Parser, Subcommand, ValueEnum};

use bitferry::Preserve;
use bitferry::copy::{BitmapSelection, Format};

/// Move VM disk images with their backup bitmaps: copy them, prove the copy, go on with
/// incremental backups.
#[derive(Debug, Parser)]
#[command(name = "bitferry", version, max_term_width = 100, arg_required_else_help = true)]
#[command(after_help = EXIT_STATUS)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Shown below the help, and a section of every manual page.
pub(crate) const EXIT_STATUS: &str = "\
Exit status:
  0    all that was asked for is done
  1    compared and different, or the proof did not hold
  2    wrong usage
  3    local device or file
  4    transport or peer
  5    malformed input
  6    finished and published, but something asked for was not preserved
  7    refused before anything was written: something asked for would be lost
  8    outcome unknown: give the same command again
  130  interrupted; the same command goes on";

const COPY_EXAMPLES: &str = "\
Examples:
  bitferry copy vm.qcow2 /backup/vm.qcow2
      the image with all its bitmaps, proved
  bitferry copy --dry-run vm.qcow2 /backup/vm.qcow2
      what would be done, the space it needs, what would be lost
  bitferry copy -O raw --bitmaps none vm.qcow2 vm.raw
      the contents alone
  bitferry copy -o data_file=vm.raw,data_file_raw=on vm.qcow2 vm-bitmaps.qcow2
      a raw disk, and beside it an overlay that holds its bitmaps
  bitferry copy --flatten --allow-backing overlay.qcow2 whole.qcow2
      a chain as one image
  bitferry copy --compress zstd vm.qcow2 backup@host.example:/backup/vm.qcow2
      to another host over ssh, compressed";

/// What every verb takes.
#[derive(Debug, Group)]
pub(crate) struct Common {
    /// Print JSON on stdout: one document, or for long operations one event per line of which the
    /// last is the summary
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Show a bar with rate and remaining time; auto: where stderr is a terminal
    #[arg(short, long, value_name = "auto|always|never", global = true, help_heading = "Output")]
    #[arg(value_enum, default_value_t = When::Auto, hide_possible_values = true)]
    #[arg(hide_default_value = true)]
    pub(crate) progress: When,
    /// Print nothing but errors
    #[arg(short, long, global = true, help_heading = "Output")]
    pub(crate) quiet: bool,
    /// Log to stderr what is done; repeat for more
    #[arg(short, long, action = clap::ArgAction::Count, global = true, help_heading = "Output")]
    pub(crate) verbose: u8,
}

/// When to show something.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    Demo(super::demo::DemoArgs),
    Copy(CopyArgs),
    Send(super::send::SendArgs),
    Receive(super::receive::ReceiveArgs),
    Info(InfoArgs),
    Compare(CompareArgs),
    Hash(HashArgs),
    Bitmap(super::bitmap::BitmapArgs),
    Inspect(super::inspect::InspectArgs),
    Control(super::control::ControlArgs),
    Completions(CompletionsArgs),
    #[command(hide = true)]
    Meet(MeetArgs),
    Man(ManArgs),
}

impl Verb {
    /// Whether standard output carries a migration stream, so that nothing else may.
    pub(crate) fn streams_to_stdout(&self) -> bool {
        match self {
            Self::Send(args) => args.transport.uses_stdout(),
            Self::Receive(args) => args.transport.uses_stdout(),
            Self::Meet(_) => true,
            _ => false,
        }
    }
}

/// Copy an image with its bitmaps and prove the copy
///
/// The destination gets its name only when it is complete, durable and, unless --no-verify is
/// given, read back and found equal. Bitmaps keep their names, granularity and flags. What the
/// destination could not hold is refused before anything is written (exit status 7). An operand
/// [USER@]HOST:PATH is at another host, where `bitferry` is run over ssh; ./A:B is a file here.
#[derive(Debug, Group)]
#[command(after_long_help = COPY_EXAMPLES)]
pub(crate) struct CopyArgs {
    /// Image to copy: a path or [USER@]HOST:PATH
    #[arg(value_name = "SRC")]
    pub(crate) source: PathBuf,
    /// Where to copy it: a path or [USER@]HOST:PATH
    #[arg(value_name = "DST")]
    pub(crate) destination: PathBuf,
    /// Format of SRC, raw or qcow2; probed unless given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) source_format: Option<Format>,
    /// Format of DST, raw or qcow2; that of SRC unless given
    #[arg(short = 'O', long, value_name = "FMT")]
    pub(crate) target_format: Option<Format>,
    /// Shape of DST in qemu-img's words: cluster_size, extended_l2, compression_type,
    /// refcount_bits, compat, data_file, data_file_raw; may be repeated
    #[arg(short = 'o', long, value_name = "K=V,…")]
    pub(crate) target_options: Vec<String>,
    /// Replace DST where it exists; the old one stays until the new one is complete
    #[arg(long, conflicts_with = "in_place")]
    pub(crate) force: bool,
    /// Write into the existing DST; the only way for block devices
    #[arg(long)]
    pub(crate) in_place: bool,
    /// Open the backing and data files that SRC names
    #[arg(long)]
    pub(crate) allow_backing: bool,
    /// Read through the backing chain of SRC into one image
    #[arg(long, conflicts_with = "backing")]
    pub(crate) flatten: bool,
    /// Copy what differs from this file and make it the backing file of DST. Where SRC or DST is
    /// at another host, it is on the host of DST and has to read as what SRC stands on
    #[arg(long, value_name = "PATH")]
    pub(crate) backing: Option<PathBuf>,
    /// Bitmaps to carry: all, none or names
    #[arg(long, value_name = "all|none|NAME,…", default_value = "all", hide_default_value = true)]
    pub(crate) bitmaps: BitmapSelection,
    /// Give a bitmap another name at the destination; may be repeated
    #[arg(long, value_name = "OLD=NEW")]
    pub(crate) rename_bitmap: Vec<bitferry::copy::Rename>,
    /// Go on without inconsistent bitmaps, and say so
    #[arg(long)]
    pub(crate) skip_broken_bitmaps: bool,
    /// Also give DST these attributes of SRC, as cp does: mode, ownership, timestamps, context or
    /// all; without a list mode, ownership and timestamps. Mode, ownership and context unasked,
    /// where both are on this host
    #[arg(long, value_name = "LIST", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "mode,ownership,timestamps")]
    pub(crate) preserve: Option<Preserve>,
    /// Do not give DST these attributes of SRC
    #[arg(long, value_name = "LIST", require_equals = true)]
    pub(crate) no_preserve: Option<Preserve>,
    /// To or from another host: connections, each an ssh of its own
    #[arg(long, value_name = "N", help_heading = "Transport")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=255), allow_negative_numbers = true)]
    pub(crate) channels: Option<u16>,
    /// Compress on the way to or from another host: none, zlib[:LEVEL] or zstd[:LEVEL]
    #[arg(long, value_name = "METHOD", default_value = "none", hide_default_value = true)]
    #[arg(help_heading = "Transport")]
    pub(crate) compress: super::transport::Compress,
    /// To or from another host: how long a cut is waited for before giving up; 0, the default: not
    /// at all. A connection on which no byte moves for 180 seconds counts as cut
    #[arg(long, value_name = "SECONDS", value_parser = super::transport::seconds)]
    #[arg(help_heading = "Transport", allow_negative_numbers = true)]
    pub(crate) reconnect: Option<std::time::Duration>,
    /// Not here: ssh encrypts
    #[arg(long, hide = true, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,
    /// Not here: ssh knows who is there
    #[arg(long, hide = true, value_name = "NAME")]
    pub(crate) tls_peer: Option<String>,
    #[command(flatten)]
    pub(crate) control: super::supervise::ControlArgs,
    /// Leave out the proof that DST reads back as SRC
    #[arg(long)]
    pub(crate) no_verify: bool,
    /// Start anew instead of going on with what an interrupted copy left
    #[arg(long)]
    pub(crate) fresh: bool,
    #[command(flatten)]
    pub(crate) state_dir: super::state_dir::StateDirArgs,
    /// Bytes per second at most that are read from SRC, or go over the wire; K, M, G and T are
    /// powers of 1024, 0 is no limit
    #[arg(long, value_name = "RATE", value_parser = super::size::parse)]
    #[arg(help_heading = "Transport", allow_negative_numbers = true)]
    pub(crate) bandwidth: Option<u64>,
    /// Say what would be done, the space it needs and what would be lost; write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// Show format, sizes, the files an image names, and its bitmaps
///
/// Nothing but IMAGE is opened, unless --allow-backing is given. An image in use may be shown; its
/// numbers may change meanwhile.
#[derive(Debug, Group)]
pub(crate) struct InfoArgs {
    /// Image to look at
    pub(crate) image: PathBuf,
    /// Format of IMAGE, raw or qcow2; probed unless given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) source_format: Option<Format>,
    /// Open the backing and data files that IMAGE names, and show the chain
    #[arg(long)]
    pub(crate) allow_backing: bool,
}

/// Compare what a guest reads from two images, and their bitmaps
///
/// Formats may differ. Exit status 0: equal, 1: different.
#[derive(Debug, Group)]
pub(crate) struct CompareArgs {
    /// One image
    pub(crate) a: PathBuf,
    /// The other
    pub(crate) b: PathBuf,
    /// Format of A, raw or qcow2; probed unless given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) source_format: Option<Format>,
    /// Format of B, raw or qcow2; probed unless given
    #[arg(short = 'F', long, value_name = "FMT")]
    pub(crate) other_format: Option<Format>,
    /// Open the backing and data files that the images name
    #[arg(long)]
    pub(crate) allow_backing: bool,
    /// Let a longer image equal a shorter one where the rest is zero
    #[arg(long)]
    pub(crate) allow_size: bool,
    /// Bitmaps that count: all, none or names, written behind an equals sign; all without a value.
    /// Without this option they count where both images can hold some
    #[arg(long, value_name = "all|none|NAME,…", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "all")]
    pub(crate) bitmaps: Option<BitmapSelection>,
}

/// Print the content hash of an image and the digests of its bitmaps
///
/// The hash names what a guest reads, in whatever format it is stored.
#[derive(Debug, Group)]
pub(crate) struct HashArgs {
    /// Image to hash
    pub(crate) image: PathBuf,
    /// Format of IMAGE, raw or qcow2; probed unless given
    #[arg(short = 'f', long, value_name = "FMT")]
    pub(crate) source_format: Option<Format>,
    /// Open the backing and data files that IMAGE names
    #[arg(long)]
    pub(crate) allow_backing: bool,
}

/// Print a completion script for a shell
#[derive(Debug, Group)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

/// Hand standard input and output over to the process that waits at NAME
///
/// What a copy over ssh runs at the other host for each further connection.
#[derive(Debug, Group)]
pub(crate) struct MeetArgs {
    /// A name in the abstract namespace
    pub(crate) name: String,
}

/// Print the manual page, or write one page per verb
#[derive(Debug, Group)]
pub(crate) struct ManArgs {
    /// Directory for the pages; without it bitferry(1) goes to stdout
    #[arg(value_name = "DIR")]
    pub(crate) directory: Option<PathBuf>,
}
