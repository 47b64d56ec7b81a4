//! A guest that writes faster than can be sent.

use super::machine::{SIZE, Slowed};
use super::*;

/// Migrates a guest that makes all of its disk dirty in every pass. The levels that it was slowed
/// down to.
fn migrate(seed: u64, may_throttle: bool) -> (Result<Report, Error>, Vec<u8>, Arc<Migration>) {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target.qcow2");
    let (machine, line, over) = (Machine::wild(seed), Line::new(), AtomicBool::new(false));
    // A pass over the disk takes more than twice the pause that is allowed, or far more.
    let downtime = Duration::from_millis(if may_throttle { 50 } else { 5 });
    let migration = Arc::new(Migration::new(8 * SIZE, downtime));
    let limits = Limits {
        may_throttle,
        timeout: Some(Duration::from_secs(60)),
        max_passes: (!may_throttle).then_some(12),
        ..Limits::default()
    };
    let (result, levels) = std::thread::scope(|scope| {
        machine.start(scope);
        let there = scope.spawn(|| destination(&line, &target, &over));
        let outgoing = Outgoing::builder()
            .disk(NAME, machine.disk.clone(), machine.bitmaps.clone())
            .migration(migration.clone())
            .limits(limits)
            .timing(patience());
        let mut guest = Slowed(&machine, Vec::new());
        let result = outgoing.build().unwrap().run(&line, &mut guest);
        over.store(true, Ordering::Release);
        assert_eq!(there.join().unwrap(), result.is_ok());
        machine.stop();
        (result, guest.1)
    });
    if result.is_ok() {
        machine.compare_image(&target);
    } else {
        machine.compare_source();
    }
    (result, levels, migration)
}

#[test]
fn a_guest_that_writes_too_fast_is_slowed_down_until_it_can_be_moved() {
    for seed in 700..702 {
        let (result, levels, migration) = migrate(seed, true);
        let report = result.unwrap();
        assert!(matches!(report.sent.outcome, Outcome::Completed), "{report:?}");
        // In steps, and freely again in the end: whoever has a guest of his own relies on it.
        let (last, steps) = levels.split_last().unwrap();
        assert!(!steps.is_empty() && steps.is_sorted() && *last == 0, "{levels:?}");
        assert!(steps.iter().all(|percent| (20..=99).contains(percent)), "{levels:?}");
        assert_eq!(migration.throttle(), 0);
        assert!(report.passes > 3, "{report:?}");
    }
}

#[test]
fn a_guest_that_may_not_be_slowed_down_is_not() {
    let (result, levels, _) = migrate(710, false);
    let error = result.unwrap_err();
    assert!(matches!(error, Error::NotConverged(Reason::NoConvergence)), "{error:?}");
    assert!(levels.is_empty(), "{levels:?}");
}
