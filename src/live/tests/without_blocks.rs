//! Bitmaps alone, of a guest that writes: its disk is mirrored by other means.

use std::path::Path;

use qcow2_file::create::{CreateOptions, NewImage};

use super::machine::SIZE;
use super::*;
use crate::Silent;
use crate::copy::Existing;
use crate::receive::{Arrivals, ReceiveOptions};
use crate::report::Verified;

/// The disk that a mirror has made, with a bitmap of its own and one that is in the way.
fn mirror(path: &Path) {
    let file = Arc::new(qcow2_file::HostFile::create_new(path).unwrap());
    let image = NewImage::create(file, &CreateOptions::new(SIZE)).unwrap();
    image.write_at(&[7; 4096], qcow2_file::GuestOffset(65536)).unwrap();
    image.finish(&[]).unwrap();
    for name in ["nightly", "own"] {
        let name = name.to_owned();
        let add = crate::bitmap::Edit::Add { name, granularity: 4096, is_enabled: true };
        crate::bitmap::edit(path, &[add]).unwrap();
    }
}

/// Receives into it, once.
fn receive_bitmaps(line: &Line, path: &Path) -> crate::Result<crate::Report> {
    let options = ReceiveOptions {
        disks: vec![format!("{NAME}={},format=qcow2", path.display()).parse().unwrap()],
        existing: Existing::InPlace,
        reconnect: Duration::from_secs(20),
        ..ReceiveOptions::default()
    };
    let (_told, refused) = std::sync::mpsc::channel();
    crate::receive::run(&options, &Arrivals::new(line, &Silent, refused), &Silent)
}

fn content_of(path: &Path) -> String {
    let options =
        crate::hash::HashOptions { image: path.to_owned(), format: None, allow_backing: false };
    crate::hash::run(&options, &Silent).unwrap().content_hash
}

#[test]
fn bitmaps_without_blocks_are_gone_on_with_after_a_cut() {
    for (seed, cut_at) in [(510, 300), (511, 3_000), (512, 6_000), (513, 9_000)] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mirror.qcow2");
        mirror(&path);
        let machine = Machine::new(seed);
        let line = Line::cut_at(vec![cut_at, u64::MAX]);
        let report = std::thread::scope(|scope| {
            machine.start(scope);
            let there = scope.spawn(|| receive_bitmaps(&line, &path));
            let builder = Outgoing::builder().timing(patience()).reconnect(Duration::from_secs(20));
            let builder = builder.disk(NAME, machine.disk.clone(), machine.bitmaps.clone());
            let report = builder.no_blocks().build().unwrap().run(&line, &mut ());
            machine.stop();
            line.close();
            there.join().unwrap().unwrap();
            report.unwrap()
        });
        assert!(matches!(report.sent.outcome, Outcome::Completed), "{report:?}");
        crate::bitmap::edit(&path, &[crate::bitmap::Edit::Remove("own".to_owned())]).unwrap();
        machine.compare_bitmaps(&path);
    }
}

#[test]
fn bitmaps_of_a_guest_that_writes_arrive_without_its_blocks() {
    for seed in 500..504 {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mirror.qcow2");
        mirror(&path);
        let content = content_of(&path);
        let machine = Machine::new(seed);
        let line = Line::new();
        let (report, received) = std::thread::scope(|scope| {
            machine.start(scope);
            let there = scope.spawn(|| receive_bitmaps(&line, &path));
            while machine.writes() < 50 {
                std::thread::yield_now();
            }
            let builder = Outgoing::builder().timing(patience()).channels(1 + (seed % 2) as u16);
            let builder = builder.disk(NAME, machine.disk.clone(), machine.bitmaps.clone());
            let report = builder.no_blocks().build().unwrap().run(&line, &mut ());
            machine.stop();
            (report.unwrap(), there.join().unwrap().unwrap())
        });
        assert!(matches!(report.sent.outcome, Outcome::Completed), "{report:?}");
        let ready = report.sent.confirmed.unwrap();
        assert!(ready.disks.is_empty() && !ready.bitmaps.is_empty(), "{ready:?}");
        assert_eq!((report.disks[0].bytes_data, report.disks[0].bytes_zero), (0, 0));
        assert_eq!(received.disks[0].verified, Verified::No);
        crate::bitmap::edit(&path, &[crate::bitmap::Edit::Remove("own".to_owned())]).unwrap();
        machine.compare_source();
        machine.compare_bitmaps(&path);
        // Not a byte of the guest's was written.
        let after = content_of(&path);
        assert_eq!(after, content);
    }
}
