//! What is to be migrated, and how.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitmap_mig::LiveBitmaps;
use block_mig::plan::Scope;
use block_mig::tracked::LiveSource;
use mig_core::bitmap::BitmapInfo;
use mig_core::section::SaveHandler;
use mig_core::stream::Compression;

use super::unsettled::Unsettled;
use crate::incoming::SessionId;
use crate::policy::Limits;
use crate::status::Migration;
use crate::{Error, Observer, Result, Silent, Timing};

/// Most disks of one guest.
const MAX_DISKS: usize = block_mig::arrive::MAX_DISKS;

/// Longest pause of the guest unless another one is given: a guest that was away for longer has
/// been given up by whoever talks to it.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Decides under which name a bitmap goes along, if it does.
pub(super) type Choose = Arc<dyn Fn(&BitmapInfo) -> Option<String> + Send + Sync>;
/// Makes the handler of something beside the disks, anew for each attempt.
pub(super) type MakeState<'a> = Box<dyn Fn() -> Box<dyn SaveHandler + 'a> + Sync + 'a>;

/// A disk that is migrated.
#[derive(Clone)]
pub(super) struct LiveDisk {
    pub(super) name: String,
    pub(super) disk: Arc<dyn LiveSource>,
    pub(super) bitmaps: Arc<LiveBitmaps>,
}

impl LiveDisk {
    /// What is sent of it: what it holds itself, if the destination `shares` what is below.
    pub(super) fn scope(&self, shares: bool) -> Scope {
        if shares && self.disk.has_base() { Scope::Above } else { Scope::Whole }
    }
}

/// A migration that is about to begin.
pub struct Outgoing<'a> {
    pub(super) disks: Vec<LiveDisk>,
    pub(super) states: Vec<MakeState<'a>>,
    pub(super) choose: Choose,
    pub(super) migration: Arc<Migration>,
    pub(super) limits: Limits,
    pub(super) channels: u16,
    pub(super) compression: Option<Compression>,
    pub(super) session: SessionId,
    pub(super) reconnect: Duration,
    pub(super) max_pause: Duration,
    pub(super) blocks: bool,
    /// Whether the destination has what disks stand on.
    pub(super) shared_base: bool,
    pub(super) hashes: bool,
    pub(super) workers: usize,
    pub(super) timing: Timing,
    pub(super) observer: &'a dyn Observer,
    /// What an earlier run left in the dark. Held while one runs.
    pub(super) unsettled: Mutex<Option<Unsettled>>,
}

/// Puts an [`Outgoing`] together.
pub struct Builder<'a>(Outgoing<'a>);

impl<'a> Outgoing<'a> {
    /// Nothing to migrate yet; one connection, no compression, a pause of 300 ms.
    pub fn builder() -> Builder<'a> {
        Builder(Self {
            disks: Vec::new(),
            states: Vec::new(),
            choose: Arc::new(|info| (!info.is_inconsistent).then(|| info.name.clone())),
            migration: Arc::default(),
            limits: Limits::default(),
            channels: 1,
            compression: None,
            session: [0; 16],
            reconnect: Duration::ZERO,
            max_pause: MAX_PAUSE,
            blocks: true,
            shared_base: false,
            hashes: true,
            workers: block_mig::limits::workers(None),
            timing: Timing::default(),
            observer: &Silent,
            unsettled: Mutex::default(),
        })
    }
}

impl<'a> Builder<'a> {
    /// A disk under its name on the wire, with its bitmaps, which are the recorder of the disk's
    /// writes.
    pub fn disk(
        mut self,
        name: &str,
        disk: Arc<dyn LiveSource>,
        bitmaps: Arc<LiveBitmaps>,
    ) -> Self {
        self.0.disks.push(LiveDisk { name: name.to_owned(), disk, bitmaps });
        self
    }

    /// Something beside the disks: a device, memory. The handler is made anew for each attempt.
    pub fn state(mut self, make: impl Fn() -> Box<dyn SaveHandler + 'a> + Sync + 'a) -> Self {
        self.0.states.push(Box::new(make));
        self
    }

    /// Which bitmaps go along, and under which name; asked of each bitmap that exists or appears
    /// while the migration runs. Without this, all that are consistent.
    pub fn bitmaps(
        mut self,
        choose: impl Fn(&BitmapInfo) -> Option<String> + Send + Sync + 'static,
    ) -> Self {
        self.0.choose = Arc::new(choose);
        self
    }

    /// Where it is written down how the migration stands, and where its parameters come from. Its
    /// allowed pause replaces that of [`limits`](Self::limits).
    pub fn migration(mut self, migration: Arc<Migration>) -> Self {
        self.0.migration = migration;
        self
    }

    /// When to give up or slow the guest down.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.0.limits = limits;
        self
    }

    /// Connections wanted.
    pub fn channels(mut self, channels: u16) -> Self {
        self.0.channels = channels;
        self
    }

    /// What compresses, if the destination knows it.
    pub fn compression(mut self, compression: Compression) -> Self {
        self.0.compression = Some(compression);
        self
    }

    /// The session, for whoever wants to ask for it again. Random unless given.
    pub fn session(mut self, session: SessionId) -> Self {
        self.0.session = session;
        self
    }

    /// How long a lost connection is made again before the migration is called off. The guest goes
    /// on meanwhile. Not at all unless given.
    pub fn reconnect(mut self, limit: Duration) -> Self {
        self.0.reconnect = limit;
        self
    }

    /// Longest pause of the guest, however long the destination says that it is at work: then the
    /// guest goes on here, or, where the destination may have it, the outcome is unknown. A minute
    /// unless given. How long a pause may be expected to be is for [`limits`](Self::limits) to say.
    pub fn max_pause(mut self, limit: Duration) -> Self {
        self.0.max_pause = limit;
        self
    }

    /// Leaves out the disks' contents, which the destination's own image has by another way: a
    /// mirror. (One that both sides share is locked, and brings its bitmaps along.) Bitmaps go along
    /// as ever, and the handover is the same; a mirror has to be complete when
    /// [`Guest::pause`](mig_core::guest::Guest::pause) returns. Nobody holds contents against each
    /// other then.
    pub fn no_blocks(mut self) -> Self {
        self.0.blocks = false;
        self
    }

    /// Sends of disks [with a base](mig_core::block::BlockSource::has_base) what they hold
    /// themselves, and what the guest changes: the destination makes new images above a copy of
    /// the base, which is its own (`receive --backing`; a QEMU's images are there). Other disks go
    /// as a whole. What both sides hold against each other is all that a guest reads, the base
    /// included.
    pub fn shared_base(mut self) -> Self {
        self.0.shared_base = true;
        self
    }

    /// Leaves out the proof that the destination reads as the source does.
    pub fn no_verify(mut self) -> Self {
        self.0.hashes = false;
        self
    }

    /// How patient to be.
    pub fn timing(mut self, timing: Timing) -> Self {
        self.0.timing = timing;
        self
    }

    /// Who watches; its wish to stop is a cancellation.
    pub fn observer(mut self, observer: &'a dyn Observer) -> Self {
        self.0.observer = observer;
        self
    }

    /// Checks that it makes sense.
    pub fn build(self) -> Result<Outgoing<'a>> {
        let mut outgoing = self.0;
        let wrong = |reason: String| Err(Error::Usage { reason });
        if outgoing.disks.is_empty() && outgoing.states.is_empty() {
            return wrong("there is nothing to migrate".to_owned());
        }
        if outgoing.disks.len() > MAX_DISKS {
            return wrong(format!("{} disks are more than {MAX_DISKS}", outgoing.disks.len()));
        }
        for (at, disk) in outgoing.disks.iter().enumerate() {
            let is_twice = outgoing.disks.iter().skip(at + 1).any(|other| other.name == disk.name);
            if is_twice || !(1..=255).contains(&disk.name.len()) {
                let name = &disk.name;
                return wrong(format!("the disk name {name:?} is used twice or is no name"));
            }
            if disk.bitmaps.size() != disk.disk.size() {
                return wrong(format!("the bitmaps of {:?} are those of another disk", disk.name));
            }
        }
        if outgoing.shared_base && !outgoing.blocks {
            return wrong("without contents nothing is sent above a base".to_owned());
        }
        if outgoing.shared_base && !outgoing.disks.iter().any(|disk| disk.disk.has_base()) {
            return wrong("no disk stands on a base that could be shared".to_owned());
        }
        if outgoing.channels == 0 {
            return wrong("a migration needs a connection".to_owned());
        }
        if outgoing.session == [0; 16] {
            let random =
                |source| Error::File { action: "read", path: "/dev/urandom".into(), source };
            outgoing.session = crate::random_id().map_err(random)?;
        }
        Ok(outgoing)
    }
}
