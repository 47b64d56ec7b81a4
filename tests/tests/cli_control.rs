//! `--control` and `control`: a running migration is looked at, hurried and called off.

use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use bitferry_tests::outgoing::pong;
use bitferry_tests::process::{PATIENCE, Running};
use bitferry_tests::{Exit, Scratch, bitferry, json};
use serde_json::Value;

const SIZE: u64 = 16 << 20;

/// Something to send that takes a while at a low bandwidth.
fn disk(scratch: &Scratch) -> String {
    let path = scratch.path("source.raw");
    let mut state = 1u64;
    let bytes: Vec<u8> = (0..SIZE / 8)
        .flat_map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()
        })
        .collect();
    std::fs::write(&path, bytes).unwrap();
    format!("vda={},format=raw", path.display())
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn ask(socket: &Path, command: &str, arguments: &[&str]) -> Value {
    let asked = bitferry().args(["control", "--json"]).arg(socket).arg(command).args(arguments);
    json::document(&asked.output().expect_exit(Exit::Done).text())
}

/// Waits until `query-migrate` says this.
fn wait_for(socket: &Path, status: &str) -> Value {
    let begun = Instant::now();
    loop {
        if socket.exists() {
            let info = ask(socket, "query-migrate", &[]);
            if info["status"] == status {
                return info;
            }
        }
        assert!(begun.elapsed() < PATIENCE, "it never became {status}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits until `query-migrate` says that it goes about so fast.
fn wait_for_rate(socket: &Path, expected: Range<f64>) {
    let begun = Instant::now();
    loop {
        let info = ask(socket, "query-migrate", &[]);
        match info["disk"]["mbps"].as_f64() {
            Some(rate) if expected.contains(&rate) => return,
            _ => assert!(begun.elapsed() < PATIENCE, "it says another rate: {info}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn receive(scratch: &Scratch) -> Running {
    let place = format!("vda={}", scratch.path("target.qcow2").display());
    let running = bitferry().args(["receive", "--disk", &place, "--control"]);
    let running = running.arg(unix(&scratch.path("receive.control")));
    let running = running.arg(unix(&scratch.path("socket"))).spawn();
    wait_for(&scratch.path("receive.control"), "setup");
    running
}

fn send(scratch: &Scratch, disk: &str) -> Running {
    let running = bitferry().args(["send", "--disk", disk, "--bandwidth", "256K", "--json"]);
    let running = running.arg("--control").arg(unix(&scratch.path("send.control")));
    running.arg(unix(&scratch.path("socket"))).spawn()
}

#[test]
fn a_slow_migration_is_looked_at_and_hurried() {
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    let receiving = receive(&scratch);
    let sending = send(&scratch, &disk);
    let control = scratch.path("send.control");
    let info = wait_for(&control, "active");
    assert_eq!(info["disk"]["total"], SIZE);
    assert!(info["disk"]["remaining"].as_u64().unwrap() > 0, "{info}");
    // 256 KiB in a second are two megabits, but for what went at once.
    wait_for_rate(&control, 0.5..20.0);
    wait_for_rate(&scratch.path("receive.control"), 0.1..20.0);
    let parameters = ask(&control, "query-migrate-parameters", &[]);
    assert_eq!(parameters["max-bandwidth"], 256 << 10);
    let dance = bitferry().arg("control").arg(unix(&control)).arg("dance").output();
    assert!(dance.expect_exit(Exit::Transport).complaint().contains("query-commands"));
    ask(&control, "migrate-set-parameters", &["max-bandwidth=0"]);
    let summary = json::summary(&sending.wait().expect_exit(Exit::Done));
    assert_eq!(summary["status"], "completed");
    receiving.wait().expect_exit(Exit::Done);
    assert!(!control.exists() && !scratch.path("receive.control").exists());
}

#[test]
fn a_copy_is_looked_at_hurried_and_called_off() {
    let scratch = Scratch::new();
    disk(&scratch);
    let control = scratch.path("copy.control");
    let start = || {
        let words = "copy --json -f raw --bandwidth 256K source.raw copy.raw --control";
        bitferry().dir(scratch.dir()).words(words).arg(unix(&control)).spawn()
    };
    let copying = start();
    let info = wait_for(&control, "active");
    assert_eq!(info["disk"]["total"], SIZE, "{info}");
    wait_for_rate(&control, 0.5..20.0);
    ask(&control, "migrate-cancel", &[]);
    assert_eq!(copying.wait().code(), Some(130));
    assert!(!scratch.path("copy.raw").exists() && !control.exists());
    let copying = start();
    wait_for(&control, "active");
    ask(&control, "migrate-set-parameters", &["max-bandwidth=0"]);
    let summary = json::summary(&copying.wait().expect_exit(Exit::Done));
    assert_eq!(summary["status"], "completed");
}

/// A destination of QEMU's that takes everything and says that it has it.
fn taker(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut bytes, mut tail) = (vec![0; 1 << 20], Vec::new());
        while !tail.ends_with(b"\x06\0\0\0\x02{}") {
            let Ok(len @ 1..) = stream.read(&mut bytes) else { return };
            tail.extend_from_slice(&bytes[..len]);
            pong(&tail, &mut stream);
            tail.drain(..tail.len().saturating_sub(16));
        }
        stream.write_all(b"\0\x01\0\x04\0\0\0\0").unwrap();
    });
}

#[test]
fn a_migration_to_a_qemu_keeps_to_what_is_asked() {
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    let control = scratch.path("send.control");
    let send = |words: &str| {
        let words = format!("send --json --dialect qemu:7.2 --downtime 70 {words} --disk");
        let run = bitferry().dir(scratch.dir()).words(&words).arg(&disk).arg("--control");
        run.arg(unix(&control)).arg("unix:qemu")
    };
    taker(&scratch.path("qemu"));
    let planned = json::summary(&send("--dry-run").output().expect_exit(Exit::Done));
    assert_eq!(
        (&planned["event"], &planned["disks"][0]["bytes-data"]),
        (&"plan".into(), &SIZE.into())
    );
    let sending = send("--bandwidth 2M").spawn();
    wait_for(&control, "active");
    assert_eq!(ask(&control, "query-migrate-parameters", &[])["downtime-limit"], 70);
    ask(&control, "migrate-set-parameters", &["max-bandwidth=0"]);
    let output = sending.wait();
    let summary = json::summary(&output.expect_exit(Exit::Done));
    assert_eq!(summary["disks"][0]["verified"], "unconfirmed", "{summary}");
    for words in ["--fresh", "--reconnect 3", "--two-way", "--compress zstd", "--downtime 2000001"]
    {
        send(words).output().expect_exit(Exit::Usage);
    }
}

#[test]
fn a_migration_is_called_off() {
    let scratch = Scratch::new();
    let disk = disk(&scratch);
    let receiving = receive(&scratch);
    let sending = send(&scratch, &disk);
    wait_for(&scratch.path("send.control"), "active");
    ask(&scratch.path("send.control"), "migrate-cancel", &[]);
    let sent = sending.wait();
    assert_eq!(sent.code(), Some(130), "{sent}");
    assert_ne!(receiving.wait().code(), Some(0));
    assert!(!scratch.path("target.qcow2").exists());
}

#[test]
fn a_destination_that_waits_is_called_off() {
    let scratch = Scratch::new();
    let receiving = receive(&scratch);
    let control = scratch.path("receive.control");
    // What only the source keeps to is not taken as if it were kept to here.
    let set = bitferry().arg("control").arg(&control).words("migrate-set-parameters");
    let refused = set.arg("max-bandwidth=1000").output().expect_exit(Exit::Transport);
    assert!(refused.complaint().contains("the source"), "{refused}");
    ask(&control, "migrate-cancel", &[]);
    let received = receiving.wait();
    assert_eq!(received.code(), Some(130), "{received}");
}

#[test]
fn a_command_that_is_refused_comes_with_what_to_do() {
    let scratch = Scratch::new();
    let receiving = receive(&scratch);
    let control = scratch.path("receive.control");
    for (words, error, hint) in [
        ("dance", "there is no command \"dance\"", "query-commands lists"),
        ("dance a=1", "there is no command \"dance\"", "query-commands lists"),
        ("query-migrate a=1", "no argument \"a\"", "`bitferry help control`"),
        ("migrate-set-parameters speed=1", "no argument \"speed\"", "query-migrate-parameters"),
        ("migrate-set-parameters downtime-limit=-1", "whole number", "milliseconds"),
        ("migrate-set-parameters max-bandwidth=1", "the source keeps", "the source is who"),
        ("migrate-start-postcopy", "postcopy is not enabled", "query-migrate shows"),
        ("migrate-recover uri=tcp:a:1", "postcopy-paused", "query-migrate shows"),
    ] {
        let asked = bitferry().arg("control").arg(&control).words(words);
        let complaint = asked.output().expect_exit(Exit::Transport).complaint();
        let lines: Vec<_> = complaint.lines().collect();
        assert!(lines[0].starts_with("error: ") && lines[0].contains(error), "{complaint}");
        assert!(lines[1].starts_with("hint: ") && lines[1].contains(hint), "{complaint}");
        assert_eq!(lines.len(), 2, "{complaint}");
    }
    ask(&control, "migrate-cancel", &[]);
    assert_eq!(receiving.wait().code(), Some(130));
}

#[test]
fn wrong_usage_is_named() {
    let scratch = Scratch::new();
    for line in ["control", "control x", "control x query-migrate a", "control x query =1"] {
        bitferry().words(line).output().expect_exit(Exit::Usage);
    }
    let nobody = bitferry().arg("control").arg(scratch.path("none")).arg("query-migrate").output();
    assert!(nobody.expect_exit(Exit::Device).complaint().contains("connect to"));
    let place = scratch.path("x.qcow2");
    let nonsense = ["receive", "--control", "tcp:1", "--disk"];
    let nonsense = bitferry().args(nonsense).arg(format!("vda={}", place.display())).arg("unix:y");
    nonsense.dir(scratch.dir()).output().expect_exit(Exit::Usage);
}
