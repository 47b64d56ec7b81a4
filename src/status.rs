//! How a migration stands, in the words of QEMU's `query-migrate`, and what may be changed while it
//! runs. Numbers of bytes are bytes, times are milliseconds.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

/// QEMU's `MigrationStatus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// Nothing has begun.
    #[default]
    None,
    /// Connecting, agreeing, introducing what will be sent.
    Setup,
    /// The guest runs, its state is being sent.
    Active,
    /// The guest is paused, its disks are still the source's.
    PreSwitchover,
    /// The rest is being sent and proved.
    Device,
    /// The guest runs at the destination, which still asks for pages.
    PostcopyActive,
    /// The same, and the connection is lost.
    PostcopyPaused,
    /// The same, and it is being made again.
    PostcopyRecover,
    /// The destination has taken over.
    Completed,
    /// It did not work; the guest runs at the source.
    Failed,
    /// Being called off.
    Cancelling,
    /// Called off; the guest runs at the source.
    Cancelled,
    /// The destination was told to take over, and nobody knows whether it did: the guest is paused
    /// until it is asked again. Not one of QEMU's words, which has no such end.
    Unknown,
}

impl Status {
    /// Whether nothing will change any more, unless somebody asks again what is unknown.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled | Self::Unknown)
    }
}

/// What there is of one kind of state, and how much of it was sent.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Amounts {
    /// Bytes sent, resent ones included.
    pub transferred: u64,
    /// Bytes that are still to be sent, as far as is known.
    pub remaining: u64,
    /// Bytes that there are.
    pub total: u64,
    /// Bytes of content sent.
    pub normal_bytes: u64,
    /// Units or pages that went as zeroes.
    pub duplicate: u64,
    /// Passes over what got dirty.
    pub dirty_sync_count: u64,
    /// Bytes per second that get dirty.
    pub dirty_bytes_rate: u64,
    /// Megabits per second that are sent, or copied.
    pub mbps: f64,
}

/// The answer to `query-migrate`. What is not known yet is left out.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Info {
    /// How it stands.
    pub status: Status,
    /// Since it began, until it ended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_time: Option<u64>,
    /// What connecting and introducing took.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub setup_time: Option<u64>,
    /// How long the guest would be paused if it were paused now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_downtime: Option<u64>,
    /// How long it was paused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<u64>,
    /// How much the guest is slowed down, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_throttle_percentage: Option<u8>,
    /// Disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disk: Option<Amounts>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram: Option<Amounts>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_desc: Option<String>,
}

/// What may be changed while a migration runs; QEMU's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Parameters {
    /// Bytes per second; 0 for no limit.
    pub max_bandwidth: u64,
    /// Longest pause aimed at, in milliseconds.
    pub downtime_limit: u64,
}

/// One migration, as its driver writes it down and others look at it. All methods may be called
/// from any thread.
#[derive(Debug)]
pub struct Migration {
    info: Mutex<Timed>,
    max_bandwidth: AtomicU64,
    downtime_ms: AtomicU64,
    throttle: AtomicU8,
    is_cancelled: AtomicBool,
}

#[derive(Debug, Default)]
struct Timed {
    info: Info,
    begun: Option<Instant>,
    ended: Option<Instant>,
}

impl Default for Migration {
    fn default() -> Self {
        Self::new(0, Duration::from_millis(300))
    }
}

impl Migration {
    /// One that has not begun. A bandwidth of 0 has no limit.
    pub fn new(max_bandwidth: u64, downtime: Duration) -> Self {
        Self {
            info: Mutex::default(),
            max_bandwidth: AtomicU64::new(max_bandwidth),
            downtime_ms: AtomicU64::new(millis(downtime)),
            throttle: AtomicU8::new(0),
            is_cancelled: AtomicBool::new(false),
        }
    }

    /// How it stands now.
    pub fn info(&self) -> Info {
        let timed = self.lock();
        let mut info = timed.info.clone();
        let end = timed.ended.unwrap_or_else(Instant::now);
        info.total_time = timed.begun.map(|begun| millis(end.saturating_duration_since(begun)));
        info.cpu_throttle_percentage = Some(self.throttle()).filter(|level| *level > 0);
        info
    }

    /// Writes down how it stands; times and the throttle are kept here. A migration that has ended
    /// stays as it ended.
    pub fn update(&self, change: impl FnOnce(&mut Info)) {
        let mut timed = self.lock();
        if timed.info.status.is_final() {
            return;
        }
        let before = timed.info.status;
        change(&mut timed.info);
        if before == Status::Cancelling && !timed.info.status.is_final() {
            timed.info.status = before;
        }
        let after = timed.info.status;
        let now = Instant::now();
        if after != Status::None && timed.begun.is_none() {
            timed.begun = Some(now);
        }
        if before == Status::Setup && after != before {
            let begun = timed.begun.unwrap_or(now);
            timed.info.setup_time = Some(millis(now.saturating_duration_since(begun)));
        }
        if after.is_final() {
            timed.ended = Some(now);
        }
    }

    /// What is unknown is asked for again: it goes on. Nothing else does.
    pub fn ask_again(&self) {
        let mut timed = self.lock();
        if timed.info.status == Status::Unknown {
            timed.info.status = Status::Setup;
            timed.info.error_desc = None;
            timed.ended = None;
        }
    }

    /// Enters a status.
    pub fn enter(&self, status: Status) {
        self.update(|info| info.status = status);
    }

    /// Asks whoever drives it to call it off. `false` once it has ended.
    pub fn cancel(&self) -> bool {
        let mut timed = self.lock();
        if timed.info.status.is_final() {
            return false;
        }
        self.is_cancelled.store(true, Ordering::Release);
        if timed.info.status != Status::None {
            timed.info.status = Status::Cancelling;
        }
        true
    }

    /// Whether somebody asked to call it off.
    pub fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Acquire)
    }

    /// What may be changed, as it is now.
    pub fn parameters(&self) -> Parameters {
        Parameters {
            max_bandwidth: self.max_bandwidth.load(Ordering::Acquire),
            downtime_limit: self.downtime_ms.load(Ordering::Acquire),
        }
    }

    /// Changes it.
    pub fn set_parameters(&self, parameters: Parameters) {
        self.max_bandwidth.store(parameters.max_bandwidth, Ordering::Release);
        self.downtime_ms.store(parameters.downtime_limit, Ordering::Release);
    }

    /// How much the guest is to be slowed down, in percent, for whoever runs it.
    pub fn throttle(&self) -> u8 {
        self.throttle.load(Ordering::Acquire)
    }

    /// Asks whoever runs the guest to slow it down.
    pub fn set_throttle(&self, percent: u8) {
        self.throttle.store(percent, Ordering::Release);
    }

    fn lock(&self) -> MutexGuard<'_, Timed> {
        self.info.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_speaks_in_qemus_words() {
        let migration = Migration::default();
        assert_eq!(serde_json::to_value(migration.info()).unwrap()["status"], "none");
        migration.enter(Status::Setup);
        migration.update(|info| {
            info.status = Status::PreSwitchover;
            info.disk = Some(Amounts { total: 5, ..Amounts::default() });
        });
        let value = serde_json::to_value(migration.info()).unwrap();
        assert_eq!(value["status"], "pre-switchover");
        assert_eq!(value["disk"]["dirty-sync-count"], 0);
        assert!(value["total-time"].is_u64() && value["setup-time"].is_u64());
        assert!(value.get("ram").is_none() && value.get("downtime").is_none());
    }

    #[test]
    fn what_is_unknown_has_ended_until_somebody_asks_again() {
        let migration = Migration::default();
        migration.enter(Status::Device);
        migration.enter(Status::Unknown);
        assert_eq!(serde_json::to_value(migration.info()).unwrap()["status"], "unknown");
        migration.enter(Status::Active);
        assert!(migration.info().status.is_final() && !migration.cancel());
        migration.ask_again();
        migration.enter(Status::Completed);
        migration.ask_again();
        assert_eq!(migration.info().status, Status::Completed);
    }

    #[test]
    fn what_has_ended_stays_as_it_ended() {
        let migration = Migration::default();
        assert!(migration.cancel());
        assert_eq!(migration.info().status, Status::None);
        migration.enter(Status::Active);
        assert!(migration.cancel() && migration.is_cancelled());
        assert_eq!(migration.info().status, Status::Cancelling);
        migration.enter(Status::Device);
        assert_eq!(migration.info().status, Status::Cancelling);
        migration.enter(Status::Cancelled);
        let ended = migration.info().total_time;
        migration.enter(Status::Active);
        assert!(!migration.cancel());
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!(
            (migration.info().status, migration.info().total_time),
            (Status::Cancelled, ended)
        );
    }
}
