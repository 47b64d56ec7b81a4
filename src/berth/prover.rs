//! Reads a new disk back while it arrives.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use block_mig::device::ChainSource;
use block_mig::limits::workers;
use block_mig::proven::{Finished, Proof, Proven};

use super::files::FileOptions;
use super::unfinished::Unfinished;
use crate::disk::Disk;
use crate::{Error, Result};

/// A thread that reads a disk back. It ends with this.
#[derive(Debug)]
pub(super) struct Prover {
    proven: Arc<Proven>,
    thread: Option<JoinHandle<()>>,
}

impl Prover {
    /// Begins to read back what will be written to `disk`.
    pub(super) fn start(disk: &Arc<Unfinished>) -> Result<Self> {
        let proven = Arc::new(Proven::new(disk.size(), Arc::clone(disk.writes()))?);
        let (reader, disk) = (Arc::clone(&proven), Arc::clone(disk));
        let thread = std::thread::Builder::new().name("read back".to_owned());
        let thread = thread.spawn(move || reader.run(disk.sink()));
        let path = std::path::PathBuf::from("a thread");
        let thread = thread.map_err(|source| Error::File { action: "start", path, source })?;
        Ok(Self { proven, thread: Some(thread) })
    }

    /// See [`Proven::begin`].
    pub(super) fn begin(&self, range: Range<u64>) {
        self.proven.begin(range);
    }

    /// See [`Proven::arrived`].
    pub(super) fn arrived(&self, range: Range<u64>) {
        self.proven.arrived(range);
    }

    /// A range became zero. Where that is more than a part of a unit nothing is left to be read.
    pub(super) fn arrived_zeroes(&self, range: Range<u64>) {
        let last = range.end.saturating_sub(1);
        self.proven.arrived(range.start..range.start.saturating_add(1).min(range.end));
        self.proven.arrived(last.max(range.start)..range.end);
    }

    /// See [`Proven::settled`].
    pub(super) fn settled(&self) {
        self.proven.settled();
    }

    /// See [`Proven::wait`].
    pub(super) fn wait(&self) {
        self.proven.wait();
    }

    /// Nothing more is written: nothing more is read back before [`finish`](Self::finish).
    pub(super) fn stop(&self) {
        self.proven.stop();
    }

    /// How the finished disk reads, now that it is opened afresh.
    pub(super) fn finish(&self, disk: &Disk, options: FileOptions) -> Result<Proof> {
        let source = ChainSource(&disk.chain);
        let places = |offset, max_len| source.placed(offset, max_len);
        let (workers, monitor) = (workers(options.workers), &block_mig::Unwatched);
        let finished = Finished { disk: &source, places: &places, workers, monitor };
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
