//! What takes part in a migration: handlers, one or more for each section.
//!
//! Handlers are blocking and dynamic per section; what a page or a block costs is their own affair.
//! They write and read *records* (SPEC 5) and know nothing of connections, containers or barriers:
//!
//! * **flush** hands bytes to the system; a handler may do it;
//! * **barrier** orders all connections; only whoever drives the migration places one;
//! * **reaping** what was sent without a copy belongs to whoever sent it so, before it is reused.
//!
//! A unit (a leaf of a disk, a piece of a bitmap, a page) is sent at most once between two
//! barriers. What was sent counts as sent only when [`SaveHandler::acknowledged`] was called: the
//! destination has applied everything before a barrier. Until then a roll-back gives it back to
//! whatever said that it was dirty.

use std::sync::Arc;

use format_spec::content_hash::Node;
use format_spec::native::answer::{Answer, Ready};
use format_spec::native::block::{BitmapVersion, DiskId};

use crate::channels::Outlet;
use crate::jobs::Jobs;
use crate::stream::{Arrival, Result};

/// Whose records a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SectionKey {
    /// "block", "ram", a device.
    pub name: &'static str,
    /// Which of several of that name.
    pub instance: u32,
    /// Version of the records.
    pub version: u32,
}

/// What remains to be sent, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pending {
    /// What must arrive before the guest runs at the destination.
    pub must_precopy: u64,
    /// What may arrive after that, when postcopy is on.
    pub can_postcopy: u64,
    /// Whether some of it was never sent yet. Nothing is complete before that is done, however
    /// little it seems to be.
    pub has_bulk: bool,
}

impl std::ops::Add for Pending {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            must_precopy: self.must_precopy.saturating_add(other.must_precopy),
            can_postcopy: self.can_postcopy.saturating_add(other.can_postcopy),
            has_bulk: self.has_bulk || other.has_bulk,
        }
    }
}

/// How a pass stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// The budget is used up; call again.
    Open,
    /// Everything that was pending when the pass began was sent. Before the next pass there must be
    /// a barrier.
    Done,
}

/// The steps of the final pass, with the guest paused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Send what is still pending. A barrier follows.
    Content,
    /// Say that it was all, and what it hashes to, on main. A barrier follows.
    Seal,
}

/// What the destination has already, from an earlier attempt of the same session.
pub enum Start<'a> {
    /// Nothing.
    Fresh,
    /// What it tells now, for each disk that was introduced.
    Resumable(&'a mut dyn HaveReader),
    /// Everything: nothing is sent, only hashed, so that the seals can be made.
    Ready,
}

/// Units that the destination has, told in rising order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Have {
    /// The nodes of neighbouring units, from the first on.
    Units(u64, Vec<Node>),
    /// So many units of zeroes, from the first on.
    Zeroes(u64, u64),
}

/// Hears what the destination has.
pub trait HaveReader {
    /// The next run of units of this disk; `None` when all were told.
    fn next(&mut self, disk: DiskId) -> Result<Option<Have>>;

    /// The leaves of a bitmap's bits, those that are not zero, in rising order. Once for each
    /// bitmap that was created in [`SaveHandler::setup`], in that order.
    fn next_bitmap(&mut self, version: BitmapVersion) -> Result<Vec<(u64, Node)>>;
}

/// Sends one part of the guest.
pub trait SaveHandler: Send {
    /// The section that its records go to. Several handlers may share one.
    fn section(&self) -> SectionKey;

    /// Sends what introduces everything else, on main.
    fn setup(&mut self, out: &Outlet<'_>) -> Result<()>;

    /// Learns what need not be sent. Called once, after the barrier behind setup.
    fn begin(&mut self, _start: &mut Start<'_>, _out: &Outlet<'_>) -> Result<()> {
        Ok(())
    }

    /// Sends of what is pending about `budget` bytes, while the guest runs. When a pass is done it
    /// sends nothing until a barrier was placed.
    fn iterate(&mut self, out: &Outlet<'_>, budget: u64) -> Result<Pass>;

    /// What remains.
    fn pending(&self) -> Pending;

    /// One step of the final pass.
    fn complete(&mut self, stage: Stage, out: &Outlet<'_>) -> Result<()>;

    /// Adds what READY must say, after [`Stage::Seal`].
    fn expect(&self, ready: &mut Ready);

    /// What a disk of its is called, for messages.
    fn disk_name(&self, _disk: DiskId) -> Option<String> {
        None
    }

    /// The disk of one of its bitmaps and what that is called, for messages.
    fn bitmap_name(&self, _bitmap: u32) -> Option<(DiskId, String)> {
        None
    }

    /// A barrier was placed: what was sent before may be sent again.
    fn barrier(&mut self) {}

    /// The destination has applied everything that was sent before the last barrier.
    fn acknowledged(&mut self) {}

    /// The migration failed: gives back what was not acknowledged. The guest goes on.
    fn abort(&mut self) {}
}

/// What a load handler may use.
#[derive(Clone, Copy)]
pub struct LoadContext<'a> {
    /// Where work is put that need not be done before the next record is read.
    pub jobs: &'a Jobs,
    /// The way back to the source.
    pub answers: &'a dyn AnswerWriter,
}

/// Tells the source something.
pub trait AnswerWriter: Send + Sync {
    /// Writes an answer, at once. Does nothing on a one-way stream.
    fn answer(&self, answer: &Answer<'_>) -> Result<()>;
}

/// How a failed migration leaves the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// What arrived is kept for the next attempt, where there is a way to keep it.
    Kept,
    /// The same, and the source has said that it gives up: what was READY is not any more.
    Revoked,
    /// Nothing is kept.
    Dropped,
}

/// Receives one part of the guest. Methods are called from several threads.
pub trait LoadHandler: Send + Sync {
    /// Takes a record. Records of one connection come in their order, from one thread; connections
    /// run side by side and are ordered by barriers alone.
    fn load(&self, record: Arrival, context: LoadContext<'_>) -> Result<()>;

    /// Everything before a barrier was loaded and its jobs are done; nothing is loaded meanwhile.
    /// With `is_durable` it must be durable on return.
    fn barrier(&self, is_durable: bool) -> Result<()>;

    /// All was sent. Makes it durable under temporary names, proves it against the seals, and adds
    /// to READY what was read back. `proves_all`: a seal without hash is an error.
    fn prepare(&self, proves_all: bool, ready: &mut Ready) -> Result<()>;

    /// The source has let go.
    fn commit(&self) -> Result<()>;

    /// The migration failed before [`commit`](LoadHandler::commit).
    fn abort(&self, fate: Fate);
}

/// The load handlers of a destination, by section.
#[derive(Default)]
pub struct Registry(Vec<(SectionKey, Arc<dyn LoadHandler>)>);

impl Registry {
    /// No handler.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the handler of a section. Handlers prepare and commit in the order in which they were
    /// added.
    pub fn add(&mut self, key: SectionKey, handler: Arc<dyn LoadHandler>) {
        self.0.push((key, handler));
    }

    /// The handler of a section that the source starts; `Err` with the reason where there is none.
    pub fn find(
        &self,
        name: &str,
        instance: u32,
        version: u32,
    ) -> Result<Arc<dyn LoadHandler>, String> {
        let of_name = |key: &SectionKey| key.name == name && key.instance == instance;
        let mut found = self.0.iter().filter(|(key, _)| of_name(key)).peekable();
        if found.peek().is_none() {
            return Err(format!("section {name:?}, instance {instance}, is not known here"));
        }
        let exact = found.find(|(key, _)| key.version == version);
        exact.map(|(_, handler)| handler.clone()).ok_or_else(|| {
            format!("section {name:?} comes in version {version}, which is not known here")
        })
    }

    /// All handlers.
    pub fn handlers(&self) -> impl Iterator<Item = &dyn LoadHandler> {
        self.0.iter().map(|(_, handler)| &**handler)
    }
}
