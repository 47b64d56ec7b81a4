//! A guest in threads, its disk in memory, a destination in a directory, connections that may be
//! cut.

mod line;
mod machine;
mod reconnect;
mod shared_base;
mod throttled;
mod without_blocks;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use block_mig::Unwatched;
use mig_core::section::Registry;
use mig_core::transport::Listen as _;

use self::line::Line;
use self::machine::Machine;
use super::{Outgoing, Report};
use crate::incoming::{IncomingOptions, receive};
use crate::outgoing::Outcome;
use crate::policy::{Limits, Reason};
use crate::status::{Migration, Parameters, Status};
use crate::{Error, Timing};

const NAME: &str = "vda";

fn patience() -> Timing {
    Timing { linger: Duration::from_millis(200), ..Timing::default() }
}

/// Receives until one migration is complete or `is_over`.
fn destination(line: &Line, target: &std::path::Path, is_over: &AtomicBool) -> bool {
    while !is_over.load(Ordering::Acquire) {
        let Ok(main) = line.accept(Some(Duration::from_millis(50))) else { continue };
        let images = crate::receive::new_image(NAME, target.to_owned());
        let options = IncomingOptions { timing: patience(), ..IncomingOptions::new(&Unwatched) };
        if receive(main, line, Arc::new(images), Registry::new(), &options).is_ok() {
            return true;
        }
    }
    false
}

struct Case<'a> {
    seed: u64,
    line: Line,
    migration: Arc<Migration>,
    limits: Limits,
    reconnect: Duration,
    channels: u16,
    /// What somebody else does meanwhile.
    meanwhile: &'a (dyn Fn(&Migration) + Sync),
}

impl Case<'_> {
    fn new(seed: u64) -> Self {
        Self {
            seed,
            line: Line::new(),
            migration: Arc::new(Migration::new(0, Duration::from_secs(5))),
            limits: Limits::default(),
            reconnect: Duration::ZERO,
            channels: 1,
            meanwhile: &|_| {},
        }
    }

    /// Lives, migrates, and holds the side that has the guest against the shadow.
    fn run(&self) -> Result<Report, Error> {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target.qcow2");
        let machine = Machine::new(self.seed);
        let over = AtomicBool::new(false);
        let (result, arrived) = std::thread::scope(|scope| {
            machine.start(scope);
            let there = scope.spawn(|| destination(&self.line, &target, &over));
            scope.spawn(|| (self.meanwhile)(&self.migration));
            let outgoing = Outgoing::builder()
                .disk(NAME, machine.disk.clone(), machine.bitmaps.clone())
                .migration(self.migration.clone())
                .limits(self.limits)
                .channels(self.channels)
                .reconnect(self.reconnect)
                .timing(patience())
                .build()
                .unwrap();
            let result = outgoing.run(&self.line, &mut ());
            over.store(true, Ordering::Release);
            let arrived = there.join().unwrap();
            if result.is_err() {
                // The guest goes on here for a while.
                let before = machine.writes();
                while machine.writes() < before + 20 {
                    std::thread::yield_now();
                }
            } else if machine.disk.is_paused() {
                machine.disk.retire();
                machine.bitmaps.retire();
            }
            machine.stop();
            (result, arrived)
        });
        match &result {
            Ok(report) => match &report.sent.outcome {
                Outcome::Unknown(_) => {}
                _ => {
                    assert!(arrived, "seed {}", self.seed);
                    machine.compare_image(&target);
                }
            },
            Err(_) => {
                assert!(!target.exists(), "seed {}: published after a failure", self.seed);
                machine.compare_source();
            }
        }
        result
    }
}

#[test]
fn content_and_bitmaps_arrive_as_they_were_when_the_guest_was_paused() {
    for seed in 1..=4 {
        let mut case = Case::new(seed);
        case.channels = if seed % 2 == 0 { 3 } else { 1 };
        // Every second one has to come down to little before it may switch over.
        let downtime = if seed % 3 == 0 { 50 } else { 5000 };
        case.migration = Arc::new(Migration::new(0, Duration::from_millis(downtime)));
        let report = case.run().unwrap();
        assert!(matches!(report.sent.outcome, Outcome::Completed), "{report:?}");
        assert!(report.sent.confirmed.is_some() && report.downtime > Duration::ZERO);
        let info = case.migration.info();
        assert_eq!(info.status, Status::Completed);
        assert!(info.downtime.is_some() && info.disk.unwrap().dirty_sync_count >= 1);
    }
}

#[test]
fn a_product_of_bandwidth_and_downtime_completes_nothing_early() {
    let mut case = Case::new(77);
    case.migration = Arc::new(Migration::new(1 << 40, Duration::from_secs(2000)));
    let report = case.run().unwrap();
    assert!(report.disks[0].bytes_data > machine::SIZE / 2, "{report:?}");
}

#[test]
fn a_cut_anywhere_leaves_the_guest_running_or_the_outcome_unknown() {
    let mut completed = 0;
    let cuts = [0, 60, 300, 5_000, 700_000, 5_000_000, 11_000_000, 12_600_000, u64::MAX];
    for (seed, cut_at) in (100..).zip(cuts) {
        let mut case = Case::new(seed);
        case.line = Line::cut_at(vec![cut_at]);
        match case.run() {
            Ok(report) => {
                completed += usize::from(matches!(report.sent.outcome, Outcome::Completed));
            }
            Err(error) => assert_eq!(error.exit_status(), 4, "{cut_at}: {error:?}"),
        }
    }
    assert!(completed >= 1);
}

#[test]
fn a_short_cut_is_made_good_while_the_guest_runs() {
    let mut case = Case::new(300);
    case.line = Line::cut_at(vec![6_000_000, 100, u64::MAX]);
    case.reconnect = Duration::from_secs(20);
    let report = case.run().unwrap();
    assert!(matches!(report.sent.outcome, Outcome::Completed));
    assert_eq!(report.reconnects, 2);
}

#[test]
fn bandwidth_and_downtime_can_be_changed_on_the_way() {
    let mut case = Case::new(800);
    // It would take half a minute, and then never fit into no pause at all.
    case.migration = Arc::new(Migration::new(400_000, Duration::ZERO));
    let was_needed = AtomicBool::new(false);
    let until = |migration: &Migration, is_so: &dyn Fn() -> bool| {
        let begun = Instant::now();
        while !is_so() && begun.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        migration.info().status == Status::Active && is_so()
    };
    let hurry = |migration: &Migration| {
        let disk = || migration.info().disk.unwrap_or_default();
        let is_slow = until(migration, &|| disk().normal_bytes > 0);
        migration.set_parameters(Parameters { max_bandwidth: 0, ..migration.parameters() });
        let goes_on = until(migration, &|| disk().dirty_sync_count > 3);
        migration.set_parameters(Parameters { downtime_limit: 5000, ..migration.parameters() });
        was_needed.store(is_slow && goes_on, Ordering::Release);
    };
    case.meanwhile = &hurry;
    let begun = Instant::now();
    let report = case.run().unwrap();
    assert!(matches!(report.sent.outcome, Outcome::Completed), "{report:?}");
    assert!(was_needed.load(Ordering::Acquire), "it was over before it was hurried");
    assert!(begun.elapsed() < Duration::from_secs(18), "{:?}", begun.elapsed());
}

#[test]
fn cancelling_at_any_time_leaves_the_guest_running() {
    for seed in 0..5 {
        let mut case = Case::new(500 + seed);
        let cancel = |migration: &Migration| {
            std::thread::sleep(Duration::from_millis(seed * 15));
            migration.cancel();
        };
        case.meanwhile = &cancel;
        // So slow that it would take half a minute.
        case.migration = Arc::new(Migration::new(400_000, Duration::from_millis(10)));
        let error = case.run().unwrap_err();
        assert_eq!(error.exit_status(), 130, "{error:?}");
        assert_eq!(case.migration.info().status, Status::Cancelled);
    }
}

#[test]
fn what_does_not_come_to_its_end_is_given_up() {
    let mut case = Case::new(600);
    case.migration = Arc::new(Migration::new(400_000, Duration::from_millis(1)));
    case.limits.timeout = Some(Duration::from_millis(300));
    let error = case.run().unwrap_err();
    assert!(matches!(error, Error::NotConverged(Reason::Timeout)), "{error:?}");
    let info = case.migration.info();
    assert_eq!(info.status, Status::Failed);
    assert!(info.error_desc.unwrap().contains("time"));
    // A guest that writes all the time never fits into no pause at all.
    let mut case = Case::new(601);
    case.migration = Arc::new(Migration::new(0, Duration::ZERO));
    case.limits.max_passes = Some(3);
    let error = case.run().unwrap_err();
    assert!(matches!(error, Error::NotConverged(Reason::NoConvergence)), "{error:?}");
}

#[test]
fn nonsense_is_refused_before_anything_happens() {
    let machine = Machine::new(1);
    let other = Arc::new(bitmap_mig::LiveBitmaps::new(512));
    let disk = || machine.disk.clone();
    let twice = Outgoing::builder().disk(NAME, disk(), machine.bitmaps.clone()).disk(
        NAME,
        disk(),
        machine.bitmaps.clone(),
    );
    let strange = Outgoing::builder().disk(NAME, disk(), other);
    let mute = Outgoing::builder().disk(NAME, disk(), machine.bitmaps.clone()).channels(0);
    for builder in [Outgoing::builder(), twice, strange, mute] {
        assert_eq!(builder.build().err().unwrap().exit_status(), 2);
    }
}
