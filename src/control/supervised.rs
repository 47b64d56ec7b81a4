//! A long operation that is looked at and called off through the socket.

use std::sync::Arc;

use mig_core::meter::Meter;

use super::{Controlled, Refused};
use crate::status::{Migration, Status};
use crate::{Error, Observer, Phase};

/// An observer that writes down what it sees for `query-migrate`, and wants to stop once
/// `migrate-cancel` has come. What it sees it passes on.
pub struct Supervised<'a> {
    inner: &'a dyn Observer,
    migration: Arc<Migration>,
}

impl<'a> Supervised<'a> {
    /// Stands between an operation and its observer.
    pub fn new(inner: &'a dyn Observer, migration: Arc<Migration>) -> Self {
        migration.enter(Status::Setup);
        Self { inner, migration }
    }

    /// Writes down how it ended.
    pub fn end(&self, error: Option<&Error>) {
        self.migration.update(|info| {
            info.error_desc = error.map(|error| crate::report::error_chain(error));
            info.status = match error {
                None => Status::Completed,
                Some(Error::Interrupted) => Status::Cancelled,
                Some(_) => Status::Failed,
            };
        });
    }
}

impl Observer for Supervised<'_> {
    fn phase(&self, phase: Phase) {
        self.migration.enter(match phase {
            Phase::Plan | Phase::Wait | Phase::Recheck => Status::Setup,
            Phase::Transfer | Phase::Read => Status::Active,
            Phase::Bitmaps | Phase::Seal | Phase::Prove | Phase::Publish => Status::Device,
        });
        self.inner.phase(phase);
    }

    fn progress(&self, done: u64, total: u64) {
        self.migration.update(|info| {
            if info.status == Status::Active {
                let disk = info.disk.get_or_insert_default();
                disk.total = total;
                disk.remaining = total.saturating_sub(done);
                (disk.transferred, disk.normal_bytes) = (done, done);
            }
        });
        self.inner.progress(done, total);
    }

    fn warning(&self, message: &str) {
        self.inner.warning(message);
    }

    fn is_cancelled(&self) -> bool {
        self.inner.is_cancelled() || self.migration.is_cancelled()
    }
}

/// A migration as one side has it in its hands.
#[derive(Debug)]
pub struct Metered {
    /// What is written down and asked for.
    pub migration: Arc<Migration>,
    /// What keeps to `max-bandwidth`; `None` where the other side does.
    pub meter: Option<Arc<Meter>>,
}

impl Metered {
    fn set(&self, rate: Option<u64>) {
        self.meter.iter().for_each(|meter| meter.set_bandwidth(rate));
    }
}

impl Controlled for Metered {
    fn migration(&self) -> &Migration {
        &self.migration
    }

    fn may_change(&self) -> Result<(), Refused> {
        let is_here = self.meter.is_some();
        is_here.then_some(()).ok_or_else(|| {
            Refused("the source keeps to these parameters: they are changed there".to_owned())
        })
    }

    fn parameters_changed(&self) {
        let rate = self.migration.parameters().max_bandwidth;
        self.set(Some(rate).filter(|rate| *rate > 0));
    }

    /// Frees whoever waits for bandwidth, so that it learns of it.
    fn cancelled(&self) {
        self.set(None);
    }
}
