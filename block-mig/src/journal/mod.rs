//! The journal of an unfinished destination: which units are durable, and what they hash to.
//! SPEC 10.
//!
//! It is a hint. Whoever goes on with it re-reads what it claims and believes only what hashes as
//! it says, so a journal that is torn, stale or forged costs time and nothing else. Where it stands
//! and what it is called is the caller's business: it is handed an open file.

mod arriving;
mod keeper;
mod replay;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use format_spec::content_hash::{ContentHash, Node};
use format_spec::native::journal::{JOURNAL_MAGIC, JournalRecord, encode_start};
use format_spec::native::units::{UnitNodes, ZeroUnits};
use qcow2_file::Storage;

use crate::error::{Error, Result};
use crate::ledger::{Ledger, Stretch};
use crate::limits::{JOURNAL_RECORD_NODES, JOURNAL_RESERVE_BYTES, JOURNAL_SLACK_BYTES};

pub use keeper::Keeper;
pub use replay::{Found, Replayed, peek, replay};

/// No content has this node; in a journal it takes a unit back. SPEC 10.
const TAKEN_BACK: Node = [0; 32];
/// No content has this root; in a journal it takes PREPARED back. SPEC 10.
const NOT_PREPARED: ContentHash = ContentHash([0; 32]);
/// Bytes that a record takes besides what it says.
const RECORD_BYTES: u64 = 32;

/// What a journal is of. One that is of anything else is not gone on with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The session: equal in every attempt of the same command.
    pub session: [u8; 16],
    /// Size of the disk in bytes.
    pub size: u64,
    /// Format and options of the destination, at most
    /// [`MAX_TARGET`](format_spec::native::journal::MAX_TARGET) bytes.
    pub target: String,
}

/// What was proved of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prepared {
    /// Its root, or [`UNPROVED`](format_spec::native::journal::UNPROVED).
    pub root: ContentHash,
    /// What its files, and those that it stands on, were like then: in the caller's own way, equal
    /// as long as nobody writes to them.
    pub stamps: Vec<[u8; 16]>,
}

/// A journal that is written.
///
/// What a call appends reaches the file before it returns, but only
/// [`sync`](Self::sync) makes it durable.
#[derive(Debug)]
pub struct Journal {
    file: Arc<dyn Storage>,
    identity: Identity,
    end: u64,
    /// What the file claims.
    claims: Ledger,
    prepared: Option<Prepared>,
    is_committing: bool,
    records: Vec<u8>,
    /// End of what room was taken for.
    reserved: u64,
}

impl Journal {
    /// Starts a journal in `file`, whatever that holds.
    pub fn start(file: Arc<dyn Storage>, identity: Identity) -> Result<Self> {
        let claims = Ledger::new(identity.size)?;
        file.set_len(0).map_err(failed("truncate"))?;
        let mut journal = Self {
            file,
            identity,
            end: 0,
            claims,
            prepared: None,
            is_committing: false,
            records: Vec::new(),
            reserved: 0,
        };
        journal.begin()?;
        Ok(journal)
    }

    /// Goes on with a journal that was [`replay`]ed from `file`; what follows its last good record
    /// is cut off.
    pub fn resume(file: Arc<dyn Storage>, replayed: Replayed) -> Result<Self> {
        let Replayed { identity, claims, prepared, is_committing, end } = replayed;
        // Where nothing follows, what room was taken behind it stays.
        if file.len().map_err(failed("find the length of"))? != end {
            file.set_len(end).map_err(failed("truncate"))?;
        }
        let (records, reserved) = (Vec::new(), end);
        let mut journal =
            Self { file, identity, end, claims, prepared, is_committing, records, reserved };
        journal.reserve();
        Ok(journal)
    }

    /// What it is of.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What it claims.
    pub fn claims(&mut self) -> &mut Ledger {
        &mut self.claims
    }

    /// What was prepared, unless it was taken back.
    pub fn prepared(&self) -> Option<&Prepared> {
        self.prepared.as_ref()
    }

    /// Whether the source has said COMMIT, so that publication must be finished.
    pub fn is_committing(&self) -> bool {
        self.is_committing
    }

    /// Claims units. What it says of them must be durable.
    pub fn units(&mut self, first: u64, nodes: &[Node]) -> Result<()> {
        let mut first = first;
        for nodes in nodes.chunks(JOURNAL_RECORD_NODES) {
            JournalRecord::Units(UnitNodes { first, nodes }).encode(&mut self.records);
            for (unit, node) in (first..).zip(nodes) {
                self.claims.set(unit, *node)?;
            }
            first = first.saturating_add(nodes.len() as u64);
            self.write()?;
        }
        Ok(())
    }

    /// Claims units that are zero. That must be durable.
    pub fn zeroes(&mut self, units: Range<u64>) -> Result<()> {
        let count = units.end.saturating_sub(units.start);
        if count == 0 {
            return Ok(());
        }
        JournalRecord::Zeroes(ZeroUnits { first: units.start, count }).encode(&mut self.records);
        self.claims.set_zeroes(units)?;
        self.write()
    }

    /// Claims all that `ledger` knows. It must be durable.
    pub fn claim(&mut self, ledger: &mut Ledger) -> Result<()> {
        let mut at = 0;
        while let Some(stretch) = ledger.stretch(at)? {
            at = stretch.units().end;
            match stretch {
                Stretch::Unknown(_) => {}
                Stretch::Zeroes(units) => self.zeroes(units)?,
                Stretch::Nodes(first, nodes) => self.units(first, nodes)?,
            }
        }
        Ok(())
    }

    /// Takes back what is claimed of `units`, which are about to be written. Not synced: after a
    /// power failure re-reading them tells.
    pub fn take_back(&mut self, units: Range<u64>) -> Result<()> {
        let mut at = units.start;
        while at < units.end {
            let Some(stretch) = self.claims.stretch(at)? else { break };
            let here = at..stretch.units().end.min(units.end);
            let is_claimed = !matches!(stretch, Stretch::Unknown(_));
            at = here.end;
            if is_claimed {
                self.take_back_claimed(here)?;
            }
        }
        Ok(())
    }

    fn take_back_claimed(&mut self, units: Range<u64>) -> Result<()> {
        let mut first = units.start;
        while first < units.end {
            let left = usize::try_from(units.end - first).unwrap_or(usize::MAX);
            let nodes = vec![TAKEN_BACK; left.min(JOURNAL_RECORD_NODES)];
            self.units(first, &nodes)?;
            first = first.saturating_add(nodes.len() as u64);
        }
        Ok(())
    }

    /// Notes durably that the disk was proved, and READY will be said.
    pub fn prepare(&mut self, prepared: Prepared) -> Result<()> {
        let Prepared { root, stamps } = prepared.clone();
        self.prepared = Some(prepared);
        JournalRecord::Prepared { root, stamps }.encode(&mut self.records);
        self.write()?;
        self.sync()
    }

    /// Takes PREPARED back, durably, before anything of the disk is changed.
    pub fn unprepare(&mut self) -> Result<()> {
        if self.prepared.take().is_none() {
            return Ok(());
        }
        self.is_committing = false;
        let (root, stamps) = (NOT_PREPARED, Vec::new());
        JournalRecord::Prepared { root, stamps }.encode(&mut self.records);
        self.write()?;
        self.sync()
    }

    /// Notes durably that publication begins and must be finished after a crash.
    pub fn commit(&mut self) -> Result<()> {
        self.is_committing = true;
        JournalRecord::Commit(self.identity.session).encode(&mut self.records);
        self.write()?;
        self.sync()
    }

    /// Makes all that was appended durable.
    pub fn sync(&self) -> Result<()> {
        self.file.sync().map_err(failed("sync"))
    }

    /// Whether it has grown so far beyond what it claims that it should be
    /// [written anew](Self::rewrite).
    pub fn is_bloated(&mut self) -> Result<bool> {
        if self.end < JOURNAL_SLACK_BYTES {
            return Ok(false);
        }
        let (mut at, mut needed) = (0, JOURNAL_SLACK_BYTES);
        while let Some(stretch) = self.claims.stretch(at)? {
            let units = stretch.units();
            at = units.end;
            needed = needed.saturating_add(match stretch {
                Stretch::Unknown(_) => 0,
                Stretch::Zeroes(_) => RECORD_BYTES,
                Stretch::Nodes(_, nodes) => RECORD_BYTES.saturating_add(32 * nodes.len() as u64),
            });
        }
        Ok(self.end > needed.saturating_mul(2))
    }

    /// Writes all that counts to another file, durably, and goes on there. The caller then gives
    /// that file this one's name.
    pub fn rewrite(&mut self, file: Arc<dyn Storage>) -> Result<()> {
        let mut anew = Self::start(file, self.identity.clone())?;
        anew.claim(&mut self.claims)?;
        if let Some(prepared) = &self.prepared {
            anew.prepare(prepared.clone())?;
        }
        if self.is_committing {
            anew.commit()?;
        }
        anew.sync()?;
        (self.file, self.end, self.reserved) = (anew.file, anew.end, anew.reserved);
        Ok(())
    }

    fn begin(&mut self) -> Result<()> {
        encode_start(JOURNAL_MAGIC, &mut self.records);
        let Identity { session, size, target } = &self.identity;
        let record =
            JournalRecord::Session { session: *session, size: *size, target: target.clone() };
        record.encode(&mut self.records);
        self.write()
    }

    /// Hands the encoded records to the file.
    fn write(&mut self) -> Result<()> {
        let mut records = std::mem::take(&mut self.records);
        let written = self.file.write_at(&records, self.end).map_err(failed("write"));
        self.end = self.end.saturating_add(records.len() as u64);
        records.clear();
        self.records = records;
        if written.is_ok() {
            self.reserve();
        }
        written
    }

    /// Sees to it that what is said next can be said where the file system is full by then.
    fn reserve(&mut self) {
        let wanted = self.end.saturating_add(JOURNAL_RESERVE_BYTES);
        if self.reserved >= wanted {
            return;
        }
        // Some more, so that it is seldom asked for.
        let len = JOURNAL_RESERVE_BYTES.saturating_mul(2);
        match self.file.reserve(self.end, len) {
            Ok(()) => self.reserved = self.end.saturating_add(len),
            Err(error) => tracing::debug!(%error, "no room is taken ahead for a journal"),
        }
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Journal { action, source }
}
