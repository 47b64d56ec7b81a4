//! `demo`: it works where nothing is prepared, and leaves nothing behind however it ends.

use std::time::{Duration, Instant};

use bitferry_tests::process::{PATIENCE, Running};
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, require};
use rustix::process::{Pid, Signal, kill_process};

fn demo(scratch: &Scratch) -> Run {
    bitferry().env("TMPDIR", scratch.dir()).arg("demo")
}

/// The number that stands between these words, whatever its unit and wherever lines are broken.
#[track_caller]
fn number_between(text: &str, before: &str, after: &str) -> f64 {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let tails = text.split(before).skip(1).filter_map(|tail| tail.split_once(after));
    let mut numbers = tails.filter_map(|(head, _)| head.trim_end_matches(['m', ' ']).parse().ok());
    numbers.next().unwrap_or_else(|| panic!("no number between {before:?} and {after:?}:\n{text}"))
}

#[test]
fn it_proves_and_cleans_up() {
    let scratch = Scratch::new();
    let output = demo(&scratch).output().expect_no_crash().expect_exit(Exit::Done);
    let text = output.text();
    assert!(!text.contains("different") && !text.contains('\x1b'), "{output}");
    for word in ["weekly", "nightly", "hourly", "bf1:", "equal"] {
        assert!(text.contains(word), "{word}: {output}");
    }
    // How fast is the machine's affair; that there was a pause, and a guest that wrote, is ours.
    assert!(number_between(&text, "): ", " writes in ") > 0.0, "{output}");
    let pause = number_between(&text, "The guest was paused for ", "s.");
    assert!(pause.is_finite() && pause >= 0.0, "{output}");
    assert_eq!(scratch.names(), [""; 0]);
    assert!(output.elapsed < Duration::from_secs(30), "{output}");
    if require(Peer::QemuImg).is_some() {
        assert!(
            text.contains("qemu-img check: no errors, qemu-img compare: identical"),
            "{output}"
        );
    }
}

#[test]
fn without_qemu_it_says_so() {
    let scratch = Scratch::new();
    // Not through the shell that limits memory: without a PATH that would not be found either.
    let demo = Run::new(bitferry_tests::bitferry::binary()).arg("demo");
    let demo = demo.env("TMPDIR", scratch.dir()).env("PATH", scratch.dir());
    let output = demo.output().expect_exit(Exit::Done);
    assert!(output.text().contains("qemu-img is not installed"), "{output}");
}

#[test]
fn its_json_ends_with_the_summary() {
    let scratch = Scratch::new();
    let output = demo(&scratch).arg("--json").output().expect_exit(Exit::Done);
    let summary = json::summary(&output);
    assert_eq!(summary["status"], "completed");
    let disk = &summary["disks"][0];
    assert_eq!(disk["verified"], "yes");
    assert_eq!(disk["bitmaps"].as_array().unwrap().len(), 3);
    assert!(summary["downtime-ms"].is_u64(), "{summary}");
    // The guest wrote behind the first pass: something had to go twice.
    assert!(summary["repeated-bytes"].as_u64().unwrap() > 0, "{summary}");
    assert!(summary["wire-bytes"].as_u64().unwrap() >= disk["bytes-data"].as_u64().unwrap());
}

/// Waits until the second process runs and answers its id.
fn second_process(first: &Running) -> i32 {
    let id = first.id();
    let children = format!("/proc/{id}/task/{id}/children");
    let started = Instant::now();
    loop {
        let text = std::fs::read_to_string(&children).unwrap_or_default();
        if let Some(child) = text.split_whitespace().next() {
            return child.parse().unwrap();
        }
        assert!(started.elapsed() < PATIENCE, "there is no second process");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn ctrl_c_ends_it_clean() {
    let scratch = Scratch::new();
    let running = demo(&scratch).spawn();
    second_process(&running);
    running.signal(Signal::INT);
    let output = running.wait();
    assert_eq!(output.code(), Some(130), "{output}");
    assert_eq!(scratch.names(), [""; 0]);
}

#[test]
fn a_dead_destination_is_told() {
    let scratch = Scratch::new();
    let running = demo(&scratch).spawn();
    let child = Pid::from_raw(second_process(&running)).unwrap();
    kill_process(child, Signal::KILL).unwrap();
    let output = running.wait().expect_exit(Exit::Transport);
    assert!(output.complaint().starts_with("error: cannot "), "{output}");
    assert_eq!(scratch.names(), [""; 0]);
}
