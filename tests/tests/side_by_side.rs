//! Several migrations at a time: into one directory, and at one socket. None disturbs another.

use std::io::Write as _;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use bitferry_tests::image::make;
use bitferry_tests::migration::{command, listening};
use bitferry_tests::process::Running;
use bitferry_tests::qemu::{check_is_clean, dirty_ranges, same_content};
use bitferry_tests::scratch::names_in;
use bitferry_tests::{Exit, Peer, Scratch, json, require_all};
use format_spec::native::hello::{Hello, Join};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 40 * MIB;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

/// A disk and its bitmap, unlike those of another pattern.
fn source(scratch: &Scratch, name: &str, pattern: u8) {
    make(scratch, name, SIZE)
        .write(pattern, 0, 20 * MIB)
        .bitmap("b0", 65536)
        .write(pattern, u64::from(pattern) * MIB, 70_144)
        .done();
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    same_content((a, "qcow2"), (b, "qcow2"));
    check_is_clean(b);
    let read = |image: &Path| dirty_ranges(image, "b0").unwrap_or_else(|o| panic!("{o}"));
    assert_eq!(read(a), read(b));
}

/// A destination and a source that takes its time.
fn start(scratch: &Scratch, (source, target, socket): (&str, &str, &str)) -> (Running, Running) {
    let receive = format!("receive --json --disk vda={target} unix:{socket}");
    let receiver = command(scratch, &receive).spawn();
    let uri = listening(&receiver);
    let send = format!("send --json --bandwidth 12M --disk vda={source}");
    (command(scratch, &send).arg(uri).spawn(), receiver)
}

/// Waits until so many bytes of content lie at a place.
fn has_arrived(place: &Path, bytes: u64) {
    use std::os::unix::fs::MetadataExt;
    let begun = Instant::now();
    while std::fs::metadata(place).map_or(0, |m| m.blocks() * 512) < bytes {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing arrives");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn names_that_begin_alike_do_not_meet() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    // Names of which one begins another, and one is what another's temporary file could be called.
    let targets = ["a.qcow2", "a.qcow2.bak", "a.qcow2.bitferry-part", ".a.qcow2"];
    let names = ["s0", "s1", "s2", "s3"];
    for (name, pattern) in names.iter().zip(1..) {
        source(&scratch, name, pattern);
    }
    std::fs::create_dir(scratch.path("out")).expect("a directory");
    let pair = |index: usize| {
        let target = format!("out/{}", targets[index]);
        start(&scratch, (names[index], &target, &format!("u{index}")))
    };
    for killed in 0..targets.len() {
        let mut pairs: Vec<_> = (0..targets.len()).map(|index| Some(pair(index))).collect();
        let part = format!("out/.{}.bitferry-part", targets[killed]);
        has_arrived(&scratch.path(&part), 4 * MIB);
        // One is cut off and goes on beside the others, whichever end it was.
        let (sender, receiver) = pairs[killed].take().expect("it runs");
        if killed % 2 == 0 {
            receiver.kill();
            assert_ne!(sender.wait().expect_no_crash().code(), Some(0));
        } else {
            sender.kill();
            receiver.wait().expect_exit(Exit::Transport);
        }
        assert!(!scratch.path("out").join(targets[killed]).exists());
        pairs[killed] = Some(pair(killed));
        for (index, pair) in pairs.into_iter().enumerate() {
            let (sender, receiver) = pair.expect("it runs");
            let sent = json::summary(&sender.wait().expect_exit(Exit::Done));
            assert_eq!(sent["status"], "completed");
            assert_eq!(sent["resumed"], index == killed, "{index}: {sent}");
            receiver.wait().expect_exit(Exit::Done);
            same(&scratch.path(names[index]), &scratch.path("out").join(targets[index]));
        }
        let mut expected: Vec<String> = targets.map(str::to_owned).into();
        expected.extend(targets.map(|name| format!(".{name}.bitferry-receipt")));
        expected.sort();
        assert_eq!(names_in(&scratch.path("out")), expected);
        for name in expected {
            std::fs::remove_file(scratch.path("out").join(name)).expect("remove");
        }
    }
}

#[test]
fn one_place_has_one_transfer() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    source(&scratch, "s0", 1);
    source(&scratch, "s1", 2);
    let (sender, receiver) = start(&scratch, ("s0", "out", "u0"));
    has_arrived(&scratch.path(".out.bitferry-part"), 4 * MIB);
    // A second one, of another source, and of the same.
    for other in ["s1", "s0"] {
        let (late, second) = start(&scratch, (other, "out", "u1"));
        let second = second.wait().expect_exit(Exit::Device);
        assert!(second.complaint().contains("in use"), "{second}");
        let late = late.wait().expect_no_crash();
        assert!(late.complaint().contains("in use"), "{late}");
    }
    sender.wait().expect_exit(Exit::Done);
    receiver.wait().expect_exit(Exit::Done);
    same(&scratch.path("s0"), &scratch.path("out"));
}

#[test]
fn a_second_source_is_told_that_there_is_a_first() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    source(&scratch, "s0", 1);
    source(&scratch, "s1", 2);
    for (channels, words) in [(1, ""), (3, ""), (2, "--reconnect 20")] {
        let receive = format!("receive --json {words} --disk vda=out unix:socket");
        let receiver = command(&scratch, &receive).spawn();
        let uri = listening(&receiver);
        let send = format!("send --json --bandwidth 6M --channels {channels} --disk vda=s0");
        let sender = command(&scratch, &send).words(words).arg(&uri).spawn();
        has_arrived(&scratch.path(".out.bitferry-part"), MIB);
        for channels in [1, 4] {
            let send = format!("send --channels {channels} --reconnect 20 --disk vda=s1");
            let other = command(&scratch, &send).arg(&uri).output();
            let other = other.expect_no_crash().expect_exit(Exit::Transport);
            assert!(other.complaint().contains("a migration is being received here"), "{other}");
            assert!(other.elapsed < Duration::from_secs(5), "{other}");
        }
        // The same command once more could be one that lost its connections: it waits its turn.
        let again = command(&scratch, "send --disk vda=s0").arg(&uri).output();
        again.expect_no_crash().expect_exit(Exit::Transport);
        sender.wait().expect_exit(Exit::Done);
        receiver.wait().expect_exit(Exit::Done);
        same(&scratch.path("s0"), &scratch.path("out"));
        for name in ["out", ".out.bitferry-receipt"] {
            std::fs::remove_file(scratch.path(name)).expect("remove");
        }
    }
}

#[test]
fn strangers_at_one_socket_do_no_harm_at_it_or_at_another() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    source(&scratch, "s0", 1);
    source(&scratch, "s1", 2);
    let receive = "receive --json --disk vda=out0 tcp:127.0.0.1:0";
    let receiver = command(&scratch, receive).spawn();
    let uri = listening(&receiver);
    let address = uri.strip_prefix("tcp:").expect("tcp");
    let send = "send --json --bandwidth 6M --channels 2 --disk vda=s0";
    let sender = command(&scratch, send).arg(&uri).spawn();
    let beside = start(&scratch, ("s1", "out1", "u1"));
    has_arrived(&scratch.path(".out0.bitferry-part"), MIB);
    let stray = Hello::Join(Join { session: [7; 16], ticket: [8; 16], channel: 1 }).encode();
    let mut silent: Vec<TcpStream> = Vec::new();
    let begun = Instant::now();
    // Until both are through: garbage, hellos that fit nothing, and many that say nothing.
    while !sender.ends_within(Duration::ZERO) {
        assert!(begun.elapsed() < Duration::from_secs(60), "it is kept from its end");
        for said in [&b"GET / HTTP/1.0\r\n\r\n"[..], &stray, &stray[..9], b"BFRY", b""] {
            // Once it is over nobody listens.
            let Ok(mut stranger) = TcpStream::connect(address) else { continue };
            let _ = stranger.write_all(said);
            silent.push(stranger);
        }
        if silent.len() > 200 {
            silent.drain(..100);
        }
        let _ = UnixStream::connect(scratch.path("u1"));
        std::thread::sleep(Duration::from_millis(5));
    }
    for (pair, (source, target)) in
        [(sender, receiver), beside].into_iter().zip([("s0", "out0"), ("s1", "out1")])
    {
        pair.0.wait().expect_exit(Exit::Done);
        pair.1.wait().expect_exit(Exit::Done);
        same(&scratch.path(source), &scratch.path(target));
    }
}
