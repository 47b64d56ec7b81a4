//! Reads a disk back while it arrives.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use block_mig::device::{ChainSource, StartOf};
use block_mig::journal::Keeper;
use block_mig::ledger::UNIT_BYTES;
use block_mig::limits::workers;
use block_mig::proven::{Finished, Proof, Proven};
use block_mig::recheck::ReadBack;
use mig_core::section::Have;
use qcow2_file::Chain;
use qcow2_file::storage::Writes;

use crate::observe::Stops;
use crate::{Error, Observer, Result};

/// A thread that reads a disk back. It ends with this.
#[derive(Debug)]
pub(crate) struct Prover {
    proven: Arc<Proven>,
    size: u64,
    thread: Option<JoinHandle<()>>,
}

/// Where in its owner a [`Prover`] finds what.
pub(crate) struct Finds<T> {
    /// What is read back.
    pub(crate) disk: fn(&T) -> &dyn ReadBack,
    /// What notes which parts have arrived, if it is told when they were read, with what they hash
    /// to then: so nothing need be hashed before it is written.
    pub(crate) keeper: fn(&T) -> Option<&Keeper>,
}

impl Prover {
    /// Begins to read back what will be written to a disk of `size` bytes, which is found in its
    /// owner. `writes` counts what is written to the file that holds its content.
    pub(crate) fn start<T: Send + Sync + 'static>(
        owner: &Arc<T>,
        Finds { disk, keeper }: Finds<T>,
        (size, writes): (u64, Arc<Writes>),
    ) -> Result<Self> {
        let proven = Arc::new(Proven::new(size, writes)?);
        let (reader, owner) = (Arc::clone(&proven), Arc::clone(owner));
        let thread = std::thread::Builder::new().name("read back".to_owned());
        let claim = move |owner: &T, unit, node| {
            let claimed = keeper(owner).map_or(Ok(()), |keeper| keeper.unit_read(unit, node));
            if let Err(error) = claimed {
                tracing::warn!(%error, unit, "a unit will be sent again after a cut");
            }
        };
        let thread = thread.spawn(move || {
            reader.run(disk(&owner), &|unit, node| claim(&owner, unit, node));
        });
        let failed = |source| Error::File { action: "start", path: "a thread".into(), source };
        Ok(Self { proven, size, thread: Some(thread.map_err(failed)?) })
    }

    /// See [`Proven::begin`].
    pub(crate) fn begin(&self, range: Range<u64>) {
        self.proven.begin(range);
    }

    /// See [`Proven::arrived`].
    pub(crate) fn arrived(&self, range: Range<u64>) {
        self.proven.arrived(range);
    }

    /// A range became zero. Where that is more than a part of a unit nothing is left to be read.
    pub(crate) fn arrived_zeroes(&self, range: Range<u64>) {
        let last = range.end.saturating_sub(1);
        self.proven.arrived(range.start..range.start.saturating_add(1).min(range.end));
        self.proven.arrived(last.max(range.start)..range.end);
    }

    /// These units are there from an earlier attempt, and are read back like what arrives.
    pub(crate) fn told(&self, have: &Have) {
        if let Have::Units(first, nodes) = have {
            let start = first.saturating_mul(UNIT_BYTES);
            let end = start.saturating_add(UNIT_BYTES.saturating_mul(nodes.len() as u64));
            self.proven.arrived(start..end.min(self.size));
        }
    }

    /// See [`Proven::settled`].
    pub(crate) fn settled(&self) {
        self.proven.settled();
    }

    /// All that has arrived has come to rest and was read.
    pub(crate) fn catch_up(&self) {
        self.proven.settled();
        self.proven.wait();
    }

    /// See [`Proven::wait`].
    pub(crate) fn wait(&self) {
        self.proven.wait();
    }

    /// Nothing more is written: nothing more is read back before [`finish`](Self::finish).
    pub(crate) fn stop(&self) {
        self.proven.stop();
    }

    /// How the finished disk reads, now that it is opened afresh.
    pub(crate) fn finish(
        &self,
        chain: &Chain,
        wish: Option<NonZeroUsize>,
        observer: &dyn Observer,
    ) -> Result<Proof> {
        let whole = ChainSource(chain);
        let disk = StartOf { disk: &whole, size: self.size };
        let places = |offset, max_len| whole.placed(offset, max_len);
        let (workers, monitor) = (workers(wish), &Stops(observer));
        let finished = Finished { disk: &disk, places: &places, workers, monitor };
        let proof = self.proven.finish(finished)?;
        tracing::debug!(bytes_read = proof.bytes_read, "the rest was read back");
        Ok(proof)
    }
}

impl Drop for Prover {
    fn drop(&mut self) {
        self.proven.stop();
        if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            tracing::error!("reading back ended in a panic");
        }
    }
}
