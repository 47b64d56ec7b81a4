//! A migration between two processes is cut off at any moment, on either side, and the same
//! commands go on: the destination is absent or whole, and what was durable is not sent again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry_tests::image::make;
use bitferry_tests::migration::{command, listening};
use bitferry_tests::process::Running;
use bitferry_tests::qemu::{allocated_bytes, check, dirty_ranges, same_content};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Exit, Output, Peer, Scratch, bitferry, json, require_all};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 320 * MIB;
/// Content of the source.
const DATA: u64 = 200 * MIB;
/// What a cut may cost beside what was on its way: one checkpoint's worth, and what waits.
const REPEATED: u64 = 130 * MIB;

fn source(scratch: &Scratch) -> PathBuf {
    let image = make(scratch, "source", SIZE).write(1, 0, DATA / 2).bitmap("b0", 65536);
    image.write(2, SIZE / 2, DATA / 2).bitmap("b1", 4096).write(3, SIZE - 65536, 65536).done()
}

fn uri(scratch: &Scratch) -> String {
    format!("unix:{}", scratch.path("socket").display())
}

fn disk(path: &Path) -> String {
    format!("--disk=vda={}", path.display())
}

/// Both commands of the migration.
fn start(scratch: &Scratch) -> (Running, Running) {
    let (uri, socket) = (uri(scratch), scratch.path("socket"));
    let _ = std::fs::remove_file(&socket);
    let receive = bitferry().args(["receive", "--json", &disk(&scratch.path("copy")), &uri]);
    let receive = receive.spawn();
    let begun = Instant::now();
    while !socket.exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "nobody listens");
        std::thread::sleep(Duration::from_millis(2));
    }
    let send = bitferry().args(["send", "--json", &disk(&scratch.path("source")), &uri]);
    (receive, send.spawn())
}

#[track_caller]
fn is_absent_or_whole(scratch: &Scratch, said: &[Output]) -> bool {
    let (source, copy) = (scratch.path("source"), scratch.path("copy"));
    if !copy.exists() {
        return false;
    }
    let found = check(&copy);
    assert_eq!((found.leaks, found.corruptions), (0, 0), "{said:?}");
    same_content((&source, "qcow2"), (&copy, "qcow2"));
    for name in ["b0", "b1"] {
        let expected = dirty_ranges(&source, name).unwrap_or_else(|o| panic!("{o}"));
        assert_eq!(dirty_ranges(&copy, name).unwrap_or_else(|o| panic!("{o}")), expected);
    }
    true
}

#[test]
fn a_kill_on_a_slow_link_costs_seconds() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    for format in ["qcow2", "raw"] {
        let scratch = Scratch::new();
        let image = make(&scratch, "a", 64 * MIB).format("raw").write(1, 0, 48 * MIB).done();
        let receive = || {
            let words = format!("receive --json --disk vda=b,format={format} tcp:127.0.0.1:0");
            let running = command(&scratch, &words).spawn();
            let uri = listening(&running);
            (running, uri)
        };
        // A command is the same where it connects to the same place.
        let (receiver, uri) = receive();
        let send = format!("send --json --disk vda=a,format=raw {uri}");
        let slow = command(&scratch, &format!("{send} --bandwidth 4M")).spawn();
        let begun = Instant::now();
        let part = scratch.path(".b.bitferry-part");
        while !part.exists() || allocated_bytes(&part) < 24 * MIB {
            assert!(begun.elapsed() < Duration::from_secs(60), "it does not arrive");
            std::thread::sleep(Duration::from_millis(50));
        }
        receiver.kill();
        slow.wait().expect_no_crash();
        let again = format!("receive --json --disk vda=b,format={format} {uri}");
        let receiver = command(&scratch, &again).spawn();
        listening(&receiver);
        let summary = json::summary(&command(&scratch, &send).output().expect_exit(Exit::Done));
        receiver.wait().expect_exit(Exit::Done);
        // Of 6 seconds the last 3 may be lost, and what is under way.
        let wire = summary["wire-bytes"].as_u64().expect("a number");
        assert!(wire < 42 * MIB, "{summary}");
        same_content((&image, "raw"), (&scratch.path("b"), format));
    }
}

#[test]
fn a_migration_that_is_cut_off_is_gone_on_with() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let scratch = Scratch::new();
    source(&scratch);
    let begun = Instant::now();
    let (receive, send) = start(&scratch);
    send.wait().expect_exit(Exit::Done);
    receive.wait().expect_exit(Exit::Done);
    let whole = begun.elapsed();
    let mut random = Random::new(seed(), "cut a migration");
    let mut resumed = 0;
    for round in 0..8 {
        for name in ["copy", ".copy.bitferry-receipt"] {
            let _ = std::fs::remove_file(scratch.path(name));
        }
        let (receive, send) = start(&scratch);
        let moment = whole.mul_f64(random.below(1000) as f64 / 1000.0);
        let said = if round % 2 == 0 {
            receive.ends_within(moment);
            [receive.kill(), send.wait()]
        } else {
            send.ends_within(moment);
            let sent = send.kill();
            // Where nobody had come yet it waits on.
            let ended = receive.ends_within(Duration::from_secs(30));
            [sent, if ended { receive.wait() } else { receive.kill() }]
        };
        is_absent_or_whole(&scratch, &said);
        // The same commands, as often as it takes: an answer may have been lost.
        let (receive, send) = start(&scratch);
        let sent = send.wait().expect_exit(Exit::Done);
        receive.wait().expect_exit(Exit::Done);
        assert!(is_absent_or_whole(&scratch, &said), "{sent}");
        let summary = json::summary(&sent);
        if summary["resumed"] == true {
            resumed += 1;
            let wire = summary["wire-bytes"].as_u64().expect("a number");
            assert!(wire < DATA + REPEATED, "{sent}");
        }
    }
    assert!(resumed > 0, "no cut hit the middle");
}
