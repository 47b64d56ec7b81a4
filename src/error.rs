//! Why an operation failed, whose fault it is, and what to do.

use std::io;
use std::path::PathBuf;

use format_spec::Blame;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an operation failed. Nothing has been published when one of these is returned, but by
/// [`HalfPublished`](Error::HalfPublished), which says what.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What was asked makes no sense, or its parts contradict one another.
    #[error("{reason}")]
    Usage {
        /// What and why, in one sentence.
        reason: String,
    },
    /// What the other side sends does not fit what is here, by its own doing or by what was asked
    /// of it. What was arranged here may be right.
    #[error("{reason}")]
    Unfit {
        /// What it sends, and what is here.
        reason: String,
    },
    /// The file system of the destination has no files as large as a disk.
    #[error(
        "disk {disk:?} has {size} bytes, more than a file in {} may have",
        .directory.display()
    )]
    TooLarge {
        /// The disk's name on the wire.
        disk: String,
        /// Its size in bytes.
        size: u64,
        /// Where it was to be made.
        directory: PathBuf,
    },
    /// Going on would lose something that was asked for. Nothing was written.
    #[error("refused, nothing was written: {reason}")]
    WouldLose {
        /// What would be lost and why.
        reason: String,
        /// What to do about it.
        hint: String,
    },
    /// The destination exists, and neither replacing it nor writing into it was asked for.
    #[error("{} exists", .path.display())]
    Exists {
        /// The destination.
        path: PathBuf,
    },
    /// A device stands where a new file is to be made.
    #[error("{} is a device, in the place of which no file can be made", .path.display())]
    IsDevice {
        /// The device.
        path: PathBuf,
        /// What to do.
        hint: String,
    },
    /// What was asked is about named bitmaps, and the image is not qcow2.
    #[error("{} is no qcow2 image and has no place for bitmaps", .path.display())]
    NotQcow2 {
        /// The image.
        path: PathBuf,
    },
    /// There is not enough room for the destination.
    #[error("{} has {free} bytes free, the copy needs about {needed}", .path.display())]
    NoSpace {
        /// Directory of the destination.
        path: PathBuf,
        /// Upper estimate of what the copy allocates, in bytes.
        needed: u64,
        /// What the file system gives, in bytes.
        free: u64,
    },
    /// The copy does not read back as what was sent. Nothing was published.
    #[error("{} does not read back as what was written to it: {reason}", .path.display())]
    ProofMismatch {
        /// The destination's final name.
        path: PathBuf,
        /// Both hashes.
        reason: String,
    },
    /// The same command had finished without the proof that is asked for now. Nothing was done.
    #[error("disk {name:?} was sent before, and its proof was left out then (--no-verify)")]
    NeverProved {
        /// The disk's name on the wire.
        name: String,
    },
    /// A migration of another session was proved there, and its source has not said yet whether it
    /// is to be published. Nothing was done.
    #[error(
        "{} was proved for another migration, which has not said yet whether to publish it \
         (--fresh at the destination gives that up)",
        .path.display()
    )]
    Awaited {
        /// The destination's final name.
        path: PathBuf,
    },
    /// Somebody else has written to what was proved, or to what it stands on, before it had its
    /// final name. It did not get it.
    #[error("{} was changed by somebody else after it was proved", .path.display())]
    Changed {
        /// The file that was written to.
        path: PathBuf,
    },
    /// Somebody has written to the source while it was read, without asking for a lock: what was
    /// read need not be what it was at any moment. Nothing was published.
    #[error("{} was written to while it was read, by a program without locks", .path.display())]
    SourceChanged {
        /// The file that was written to.
        path: PathBuf,
    },
    /// Of several files that belong together some were published, and could not be taken back.
    #[error("{} published already, and stays", names(.published))]
    HalfPublished {
        /// The final names of those.
        published: Vec<PathBuf>,
        /// Why the next one was not.
        source: Box<Error>,
    },
    /// A file operation beside the image itself failed.
    #[error("cannot {action} {}", .path.display())]
    File {
        /// "rename", "create", …
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The user asked to stop.
    #[error("interrupted")]
    Interrupted,
    /// A live migration did not come to its end. The guest goes on at the source.
    #[error(transparent)]
    NotConverged(crate::policy::Reason),
    /// An image could not be opened, read or written.
    #[error(transparent)]
    Image(#[from] qcow2_file::Error),
    /// A device failed under the engine.
    #[error(transparent)]
    Device(#[from] mig_core::Error),
    /// The engine stopped.
    #[error(transparent)]
    Block(block_mig::Error),
    /// A hash could not be computed.
    #[error(transparent)]
    Hash(#[from] format_spec::content_hash::HashError),
    /// A migration over a connection stopped.
    #[error(transparent)]
    Stream(mig_core::stream::Error),
    /// A captured stream is not well formed.
    #[error("{} is no well-formed stream", .path.display())]
    Capture {
        /// The capture.
        path: PathBuf,
        /// Where and what.
        #[source]
        error: format_spec::Malformed,
    },
    /// A migration from or to QEMU stopped.
    #[error(transparent)]
    Qemu(crate::qemu::Error),
    /// A command to a running migration was refused, by whoever drives that.
    #[error("{text}")]
    Control {
        /// The command.
        command: String,
        /// Whether there is no such command.
        is_unknown: bool,
        /// Its own words.
        text: String,
    },
    /// There is no connection, or none that could be used.
    #[cfg(feature = "net")]
    #[error(transparent)]
    Connect(#[from] crate::connect::Error),
}

impl From<crate::qemu::Error> for Error {
    fn from(error: crate::qemu::Error) -> Self {
        use crate::qemu::Error as Qemu;
        match error {
            Qemu::Interrupted => Self::Interrupted,
            Qemu::Local(error) => *error,
            other => Self::Qemu(other),
        }
    }
}

impl From<mig_core::stream::Error> for Error {
    fn from(error: mig_core::stream::Error) -> Self {
        use mig_core::stream::Error as Stream;
        match error {
            Stream::Interrupted => Self::Interrupted,
            Stream::Handler(handler) => Self::from_handler(handler),
            other => Self::Stream(other),
        }
    }
}

impl From<Error> for mig_core::stream::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Stream(error) => error,
            Error::Interrupted => Self::Interrupted,
            other => Self::handler(other.blame_there(), other),
        }
    }
}

impl From<block_mig::Error> for Error {
    fn from(error: block_mig::Error) -> Self {
        match error {
            block_mig::Error::Cancelled => Self::Interrupted,
            other => Self::Block(other),
        }
    }
}

fn names(paths: &[PathBuf]) -> String {
    let names: Vec<_> = paths.iter().map(|path| path.display().to_string()).collect();
    let verb = if names.len() == 1 { "is" } else { "are" };
    format!("{} {verb}", names.join(", "))
}

impl Error {
    /// What a handler of ours failed with, as it was before it travelled through the engine.
    fn from_handler(error: mig_core::stream::HandlerError) -> Self {
        let mig_core::stream::HandlerError { blame, cause } = error;
        let cause = match cause.downcast::<Self>() {
            Ok(ours) => return *ours,
            Err(cause) => cause,
        };
        match cause.downcast::<block_mig::Error>() {
            Ok(error) => (*error).into(),
            Err(cause) => Self::Stream(mig_core::stream::Error::handler(blame, cause)),
        }
    }

    /// Whose fault it is.
    pub fn blame(&self) -> Blame {
        match self {
            Self::Usage { .. }
            | Self::NeverProved { .. }
            | Self::NotQcow2 { .. }
            | Self::IsDevice { .. } => Blame::Caller,
            Self::Unfit { .. } => Blame::PeerBehaviour,
            Self::WouldLose { .. } => Blame::WouldLose,
            Self::Exists { .. }
            | Self::Awaited { .. }
            | Self::NoSpace { .. }
            | Self::TooLarge { .. }
            | Self::File { .. } => Blame::Device,
            Self::ProofMismatch { .. } | Self::Changed { .. } | Self::SourceChanged { .. } => {
                Blame::Mismatch
            }
            Self::HalfPublished { source, .. } => source.blame(),
            Self::Interrupted => Blame::Caller,
            Self::NotConverged(_) => Blame::Transport,
            Self::Image(e) => e.blame(),
            Self::Device(e) => e.blame(),
            Self::Block(e) => e.blame(),
            Self::Hash(_) => Blame::Caller,
            Self::Stream(e) => self.transport().map_or(e.blame(), |found| found.1),
            Self::Qemu(e) => e.blame(),
            Self::Capture { .. } => Blame::Bytes,
            Self::Control { .. } => Blame::PeerFeatures,
            #[cfg(feature = "net")]
            Self::Connect(e) => e.blame(),
        }
    }

    /// Whose fault it is as the other side is told: what does not fit here was asked for there.
    pub(crate) fn blame_there(&self) -> Blame {
        match self {
            Self::Unfit { .. } => Blame::Caller,
            other => other.blame(),
        }
    }

    /// The exit status of a process that ends with this error. Pure; see CLI.md "Exit status".
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Interrupted => 130,
            // An image that needs what we lack is a local file we cannot use, not a peer.
            Self::Image(_) | Self::Device(_) | Self::Block(_)
                if self.blame() == Blame::PeerFeatures =>
            {
                3
            }
            _ => match self.blame() {
                Blame::Caller => 2,
                Blame::Device => 3,
                Blame::Bytes => 5,
                Blame::PeerBehaviour | Blame::PeerFeatures | Blame::Transport => 4,
                Blame::WouldLose => 7,
                Blame::Mismatch => 1,
            },
        }
    }

    /// What the user can do about it, as one sentence, where we know.
    pub fn hint(&self) -> Option<String> {
        use mig_core::stream::Error as Stream;
        let text = match self {
            Self::WouldLose { hint, .. } | Self::IsDevice { hint, .. } => hint.clone(),
            Self::Exists { .. } => {
                "use --force to replace it at the end, or --in-place to write into it".into()
            }
            Self::Awaited { .. } => AWAITED.into(),
            Self::NotQcow2 { .. } => "a raw disk has bitmaps in an overlay: copy it with -O qcow2 \
                 -o data_file=FILE,data_file_raw=on"
                .into(),
            Self::NoSpace { .. } => "free some room or choose another place".into(),
            Self::TooLarge { .. } => "a qcow2 image of it may have room there".into(),
            Self::ProofMismatch { .. } => {
                "storage or memory returned other bytes than were written; check the device".into()
            }
            Self::NeverProved { .. } => NEVER_PROVED.into(),
            Self::Changed { .. } => {
                "find out who writes there; the same commands send again what it changed".into()
            }
            Self::SourceChanged { .. } => SOURCE_CHANGED.into(),
            Self::HalfPublished { source, .. } if matches!(**source, Self::Changed { .. }) => {
                "begin all of them anew, with --fresh at both sides and --force".into()
            }
            Self::Image(error) if image_hint(error).is_some() => return image_hint(error),
            Self::Capture { .. } => {
                "what stands before that offset was shown; --as says what the stream is where its \
                 first bytes mislead"
                    .into()
            }
            Self::Unfit { .. } => UNFIT.into(),
            Self::Stream(Stream::Peer { text, .. }) if *text == Stream::Interrupted.to_string() => {
                "somebody stopped it there; the same commands go on where this stopped".into()
            }
            Self::Stream(Stream::Peer { blame, .. }) => peer_hint(*blame).into(),
            Self::Qemu(error) if error.hint().is_some() => error.hint()?.into(),
            Self::Control { command, is_unknown, .. } => control_hint(command, *is_unknown).into(),
            _ if is_full(self) => "free some room or choose another place".into(),
            _ if has_cause(self, &[io::ErrorKind::FileTooLarge]) => FILE_LIMIT.into(),
            _ => return self.transport()?.0,
        };
        Some(text)
    }

    /// What a transport says of its failure: what to do, and whose fault it is.
    #[cfg(feature = "net")]
    fn transport(&self) -> Option<(Option<String>, Blame)> {
        use mig_core::stream::Error as Stream;
        let found = match self {
            Self::Connect(error) => error,
            Self::Stream(Stream::Connect(e) | Stream::Connection { source: e, .. }) => {
                crate::connect::Error::find(e)?
            }
            _ => return None,
        };
        Some((found.hint(), found.blame()))
    }

    #[cfg(not(feature = "net"))]
    fn transport(&self) -> Option<(Option<String>, Blame)> {
        None
    }
}

/// What to do about what waits for its own source.
const AWAITED: &str = "the commands of that migration, given again, settle it; receive --fresh \
                       gives it up and begins anew";
/// What to do about a disk whose proof was left out.
const NEVER_PROVED: &str = "with --no-verify it is complete; to have it proved send it anew with \
                            --fresh, to a destination that replaces it (--force) or writes into \
                            it (--in-place)";
/// What to do where somebody writes to the source.
const SOURCE_CHANGED: &str = "nothing was published: once nobody writes there, give the same \
     command again; it goes on with what is kept, and reads again what has changed";

/// What to do where a file may not grow.
const FILE_LIMIT: &str = "no file may grow so large: raise the limit (`ulimit -f`), or choose a \
     file system that can hold it";

/// What to do where each side by itself may be right.
const UNFIT: &str = "the options of both sides must fit together";

/// What to do about an image.
fn image_hint(error: &qcow2_file::Error) -> Option<String> {
    use qcow2_file::Error as Image;
    Some(match error {
        Image::NotAllowed { .. } => "if you trust this image, use --allow-backing".into(),
        Image::Condition { file, condition } => condition.remedy(file),
        Image::Foreign { .. } => {
            "`qemu-img convert` may be able to read it; if it is a raw disk all the same, say \
             so: -f raw, for a second image -F raw, behind --disk format=raw"
                .into()
        }
        Image::NotAPath { file, role: "backing file", .. } => {
            format!("`qemu-img rebase -u -b PATH -F FORMAT {file}` names it by its path")
        }
        Image::NotAPath { file, .. } => {
            format!("`qemu-img amend -o data_file=PATH {file}` names it by its path")
        }
        Image::InUse { .. } => {
            "stop whoever uses the image, or copy it through that program".into()
        }
        Image::Malformed { file, what } if is_of_bitmaps(what.field) => format!(
            "`bitferry bitmap check {file}` may say more; `bitferry bitmap repair --drop-broken \
             {file}` drops bitmaps that break the format, and `--strip` all of them"
        ),
        Image::Malformed { .. } => "the image is damaged: `qemu-img check` may say more".into(),
        Image::NoBitmap { file, .. } => {
            format!("`bitferry bitmap list {file}` shows those there are")
        }
        _ => return None,
    })
}

/// Whether a field of a damaged image is one of its persistent bitmaps'.
fn is_of_bitmaps(field: &str) -> bool {
    field.contains("bitmap") && !field.contains("subcluster")
}

/// What to do when the other side says whose fault it is.
fn peer_hint(blame: Blame) -> &'static str {
    match blame {
        Blame::Caller => UNFIT,
        Blame::Bytes | Blame::PeerBehaviour => {
            "it could not make sense of what came from here; are both of the same version?"
        }
        Blame::PeerFeatures => "leave out the option that it does not know",
        Blame::Device => {
            "look at the other side's file or device, then give the same commands again"
        }
        Blame::Transport => "check the network; the same commands go on where this stopped",
        Blame::WouldLose => {
            "leave out what it cannot keep, or choose a destination that can keep it"
        }
        Blame::Mismatch => {
            "either somebody writes to the source, or storage or memory returned other bytes than \
             were written: check the destination's"
        }
    }
}

/// What to do when a command to a running migration was refused.
fn control_hint(command: &str, is_unknown: bool) -> &'static str {
    match command {
        _ if is_unknown => "the command query-commands lists those that there are",
        "migrate-set-parameters" => {
            "query-migrate-parameters shows what can be set, as whole numbers: bytes per second, \
             milliseconds; the source is who keeps to it"
        }
        "migrate-start-postcopy" | "migrate-pause" | "migrate-recover" | "migrate-continue" => {
            "query-migrate shows how the migration stands"
        }
        _ => "`bitferry help control` shows how a command and its arguments are given",
    }
}

/// Whether a file system that is full is at the root of it.
pub(crate) fn is_full(error: &(dyn std::error::Error + 'static)) -> bool {
    has_cause(error, &[io::ErrorKind::StorageFull, io::ErrorKind::QuotaExceeded])
}

/// Whether the system's answer at the root of it is one of these.
fn has_cause(error: &(dyn std::error::Error + 'static), kinds: &[io::ErrorKind]) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let found = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if found.is_some_and(|found| kinds.contains(&found)) {
            return true;
        }
        cause = error.source();
    }
    false
}
