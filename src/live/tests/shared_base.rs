//! What a disk holds above a base, of a guest that writes, to a destination with a copy of that.

use std::path::Path;

use super::*;
use crate::Silent;
use crate::receive::{Arrivals, ReceiveOptions};
use crate::report::Verified;

/// Receives a new image above the base, in as many attempts as it takes.
fn receive_above(line: &Line, dir: &Path) -> crate::Result<crate::Report> {
    let options = ReceiveOptions {
        disks: vec![format!("{NAME}={}", dir.join("target").display()).parse().unwrap()],
        backing: vec![format!("{},format=raw", dir.join("base").display()).parse().unwrap()],
        reconnect: Duration::from_secs(20),
        ..ReceiveOptions::default()
    };
    let (_told, refused) = std::sync::mpsc::channel();
    crate::receive::run(&options, &Arrivals::new(line, &Silent, refused), &Silent)
}

/// Migrates while the guest writes, and compares. Also what the disk holds in the end.
fn migrated(seed: u64, line: &Line) -> (Report, u64) {
    let dir = tempfile::tempdir().unwrap();
    let machine = Machine::above(seed, &dir.path().join("base"));
    let (report, received) = std::thread::scope(|scope| {
        machine.start(scope);
        let there = scope.spawn(|| receive_above(line, dir.path()));
        while machine.writes() < 50 {
            std::thread::yield_now();
        }
        let builder = Outgoing::builder().timing(patience()).channels(1 + (seed % 2) as u16);
        let builder = builder.disk(NAME, machine.disk.clone(), machine.bitmaps.clone());
        let outgoing = builder.reconnect(Duration::from_secs(20)).shared_base().build().unwrap();
        let report = outgoing.run(line, &mut ());
        machine.stop();
        line.close();
        (report.unwrap(), there.join().unwrap().unwrap())
    });
    assert!(matches!(report.sent.outcome, Outcome::Completed), "{report:?}");
    assert_eq!(received.disks[0].verified, Verified::Yes);
    machine.compare_image(&dir.path().join("target"));
    (report, machine.disk.inner().held_leaves())
}

#[test]
fn what_is_held_or_written_above_a_base_arrives_above_a_copy_of_it() {
    for seed in 700..704 {
        let (report, held) = migrated(seed, &Line::new());
        let disk = &report.disks[0];
        let first = disk.bytes_data - disk.bytes_repeated;
        assert!(first + disk.bytes_zero > 0 && first <= held, "{held} of {disk:?}");
        assert!(held < machine::SIZE / 2, "{held}");
    }
}

#[test]
fn what_stands_above_a_base_is_gone_on_with_after_a_cut() {
    let mut lost = 0;
    for (seed, cut_at) in (710..).zip([300, 3_000, 100_000, 600_000, 1_200_000]) {
        let (report, _) = migrated(seed, &Line::cut_at(vec![cut_at, u64::MAX]));
        lost += report.reconnects;
    }
    assert!(lost >= 3);
}

#[test]
fn a_base_is_shared_where_there_is_one_and_contents_go_along() {
    let dir = tempfile::tempdir().unwrap();
    let (above, alone) = (Machine::above(1, &dir.path().join("base")), Machine::new(1));
    let of = |machine: &Machine| {
        Outgoing::builder().disk(NAME, machine.disk.clone(), machine.bitmaps.clone()).shared_base()
    };
    assert!(of(&above).build().is_ok());
    assert_eq!(of(&above).no_blocks().build().err().unwrap().exit_status(), 2);
    assert_eq!(of(&alone).build().err().unwrap().exit_status(), 2);
}
