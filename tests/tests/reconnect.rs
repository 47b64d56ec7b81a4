//! `--reconnect`: a link that is cut, again and again, while the same two processes go on.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry_tests::image::make;
use bitferry_tests::middle::{Cut, Middle};
use bitferry_tests::process::Running;
use bitferry_tests::qemu::{check_is_clean, dirty_ranges, same_content};
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// Content of the source.
const DATA: u64 = 200 * MIB;
/// What a cut may cost: what arrived since the last checkpoint, and what waits.
const PER_CUT: u64 = 70 * MIB;

fn source(scratch: &Scratch) -> Option<PathBuf> {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return None;
    }
    let image = make(scratch, "source", 320 * MIB).write(1, 0, DATA / 2).bitmap("b0", 65536);
    Some(image.write(2, 160 * MIB, DATA / 2).bitmap("b1", 4096).write(3, 300 * MIB, 65536).done())
}

/// A destination that listens, and where.
fn receive(scratch: &Scratch, words: &str) -> (Running, SocketAddr) {
    let run = bitferry().dir(scratch.dir()).words("receive --json --disk vda=copy");
    let running = run.words(words).arg("tcp:127.0.0.1:0").spawn();
    let address = running.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        event["uri"].as_str()?.strip_prefix("tcp:")?.parse().ok()
    });
    (running, address)
}

fn send(scratch: &Scratch, words: &str, middle: &Middle) -> Run {
    let run = bitferry().dir(scratch.dir()).words("send --json --disk vda=source");
    run.words(words).arg(middle.uri())
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    same_content((a, "qcow2"), (b, "qcow2"));
    check_is_clean(b);
    for name in ["b0", "b1"] {
        let read = |image| dirty_ranges(image, name).unwrap_or_else(|o| panic!("{o}"));
        assert_eq!(read(a), read(b));
    }
}

#[test]
fn a_link_that_is_cut_is_made_again_and_little_is_sent_twice() {
    let scratch = Scratch::new();
    let Some(source) = source(&scratch) else { return };
    for (channels, cuts) in [
        (1, vec![Cut::Forth(90 * MIB), Cut::Forth(100), Cut::Forth(80 * MIB), Cut::Never]),
        (2, vec![Cut::Never, Cut::Forth(50 * MIB), Cut::Back(80), Cut::Never]),
    ] {
        let cut = cuts.len() as u64 - 1;
        let (receiving, address) = receive(&scratch, "--reconnect 30");
        let middle = Middle::start(address, cuts);
        let words = format!("--reconnect 30 --channels {channels}");
        let sent = send(&scratch, &words, &middle).output().expect_no_crash();
        let received = receiving.wait().expect_no_crash().expect_exit(Exit::Done);
        let (sent, received) = (json::summary(&sent.expect_exit(Exit::Done)), received);
        same(&source, &scratch.path("copy"));
        assert!(middle.connections() > 3, "{sent}");
        for summary in [&sent, &json::summary(&received)] {
            assert_eq!(summary["status"], "completed", "{summary}");
            assert_eq!(summary["resumed"], true, "{summary}");
            assert_eq!(summary["disks"][0]["verified"], "yes", "{summary}");
        }
        assert!(middle.bytes() < DATA + cut * PER_CUT, "{} {sent}", middle.bytes());
        let number = |key: &str| sent[key].as_u64().expect("a number");
        // What a cut write had handed over is not counted.
        let counted = number("wire-bytes") + cut * 4 * MIB;
        assert!(counted >= middle.bytes(), "{} {sent}", middle.bytes());
        assert!(number("repeated-bytes") < cut * PER_CUT, "{sent}");
        let data = sent["disks"][0]["bytes-data"].as_u64().expect("a number");
        assert!(data.abs_diff(DATA) <= 2 * MIB, "{sent}");
        std::fs::remove_file(scratch.path("copy")).expect("published");
        let _ = std::fs::remove_file(scratch.path(".copy.bitferry-receipt"));
    }
}

#[test]
fn what_arrived_in_place_is_gone_on_with_too() {
    let scratch = Scratch::new();
    let Some(source) = source(&scratch) else { return };
    for words in ["--in-place", "--in-place --fresh"] {
        make(&scratch, "copy", 320 * MIB).write(9, 0, 8 * MIB).done();
        let (receiving, address) = receive(&scratch, &format!("--reconnect 30 {words}"));
        let middle = Middle::start(address, vec![Cut::Forth(150 * MIB), Cut::Never]);
        let sent = send(&scratch, "--reconnect 30", &middle).output().expect_exit(Exit::Done);
        receiving.wait().expect_exit(Exit::Done);
        assert!(middle.bytes() < DATA + PER_CUT, "{} {sent}", middle.bytes());
        same(&source, &scratch.path("copy"));
        std::fs::remove_file(scratch.path("copy")).expect("there");
        let _ = std::fs::remove_file(scratch.path(".copy.bitferry-receipt"));
    }
}

#[test]
fn a_last_answer_that_is_lost_is_asked_for_again() {
    let scratch = Scratch::new();
    let Some(source) = source(&scratch) else { return };
    // How much comes back when nothing is cut; COMMITTED is the last of it.
    let whole = {
        let (receiving, address) = receive(&scratch, "");
        let middle = Middle::start(address, vec![Cut::Never]);
        send(&scratch, "", &middle).output().expect_exit(Exit::Done);
        receiving.wait().expect_exit(Exit::Done);
        middle.bytes_back()
    };
    for missing in [1, 24] {
        for name in ["copy", ".copy.bitferry-receipt"] {
            std::fs::remove_file(scratch.path(name)).expect("published");
        }
        let (receiving, address) = receive(&scratch, "--reconnect 20");
        let middle = Middle::start(address, vec![Cut::Back(whole - missing), Cut::Never]);
        let sent = send(&scratch, "--reconnect 20", &middle).output().expect_exit(Exit::Done);
        let received = receiving.wait().expect_exit(Exit::Done);
        assert!(middle.connections() == 2, "{sent}");
        for output in [&sent, &received] {
            let summary = json::summary(output);
            assert_eq!(summary["status"], "completed", "{summary}");
            assert_eq!(summary["disks"][0]["verified"], "yes", "{summary}");
            assert_eq!(summary["disks"].as_array().map(Vec::len), Some(1), "{summary}");
        }
        same(&source, &scratch.path("copy"));
    }
}

#[test]
fn a_cut_that_lasts_is_given_up_and_the_same_command_goes_on() {
    let scratch = Scratch::new();
    let Some(source) = source(&scratch) else { return };
    let (receiving, address) = receive(&scratch, "--reconnect 1");
    let middle = Middle::start(address, vec![Cut::Forth(150 * MIB)]);
    let begun = Instant::now();
    let sent = send(&scratch, "--reconnect 1", &middle).output();
    sent.expect_no_crash().expect_exit(Exit::Transport);
    receiving.wait().expect_no_crash().expect_exit(Exit::Transport);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(middle.connections() > 1, "it did not try again");
    assert!(!scratch.path("copy").exists());
    drop(middle);
    // The place that a source goes to is part of what makes it the same command.
    let (receiving, address) = receive(&scratch, "");
    let middle = Middle::start(address, vec![Cut::Never]);
    send(&scratch, "", &middle).output().expect_exit(Exit::Done);
    receiving.wait().expect_exit(Exit::Done);
    same(&source, &scratch.path("copy"));
}

#[test]
fn while_one_is_waited_for_no_other_is_let_in() {
    let scratch = Scratch::new();
    let Some(source) = source(&scratch) else { return };
    let (receiving, address) = receive(&scratch, "--reconnect 60");
    let cuts = vec![Cut::Forth(70 * MIB), Cut::Back(0), Cut::Back(0), Cut::Back(0), Cut::Never];
    let middle = Middle::start(address, cuts);
    let sending = send(&scratch, "--reconnect 60", &middle).spawn();
    let begun = Instant::now();
    while middle.connections() < 2 {
        assert!(begun.elapsed() < Duration::from_secs(30), "no cut");
        std::thread::sleep(Duration::from_millis(5));
    }
    let other = bitferry().dir(scratch.dir()).words("send --fresh --disk vda=source");
    let other = other.arg(format!("tcp:{address}")).output().expect_no_crash();
    assert_eq!(other.code(), Some(Exit::Transport as i32), "{other}");
    sending.wait().expect_exit(Exit::Done);
    receiving.wait().expect_exit(Exit::Done);
    same(&source, &scratch.path("copy"));
}

#[test]
fn a_link_that_is_there_and_silent_is_given_up() {
    let scratch = Scratch::new();
    let Some(_) = source(&scratch) else { return };
    // From the start, and after a cut.
    for cuts in [vec![Cut::Silence], vec![Cut::Forth(90 * MIB), Cut::Silence]] {
        let is_cut = cuts.len() > 1;
        let (receiving, address) = receive(&scratch, "--reconnect 2");
        let middle = Middle::start(address, cuts);
        let sent = send(&scratch, "--reconnect 2", &middle).output().expect_no_crash();
        let sent = sent.expect_exit(Exit::Transport);
        assert!(sent.elapsed < Duration::from_secs(30), "{sent}");
        assert!(sent.complaint().contains("did not answer within 10 seconds"), "{sent}");
        assert!(sent.complaint().contains("\nhint: "), "{sent}");
        assert_eq!(json::summary(&sent)["status"], "failed");
        // The destination has had nobody yet, or has given up by itself.
        if is_cut {
            receiving.wait().expect_exit(Exit::Transport);
        } else {
            receiving.kill();
        }
        assert!(!scratch.path("copy").exists());
    }
}

#[test]
fn what_was_never_there_is_not_waited_for() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("d.raw"), [7; 4096]).expect("write");
    let send = |words: &str| {
        let run = bitferry().dir(scratch.dir()).words("send --disk a=d.raw,format=raw");
        run.words(words).output().expect_no_crash()
    };
    let begun = Instant::now();
    send("--reconnect 600 unix:nobody").expect_exit(Exit::Transport);
    assert!(begun.elapsed() < Duration::from_secs(30));
    for words in [
        "--reconnect 5 file:stream",
        "--reconnect 5 -",
        "--reconnect x unix:socket",
        "--reconnect 5 --dialect qemu unix:socket",
    ] {
        send(words).expect_exit(Exit::Usage);
    }
    let receive = bitferry().dir(scratch.dir()).words("receive --disk a=x --reconnect 5 file:s");
    receive.output().expect_exit(Exit::Usage);
    let copy = bitferry().dir(scratch.dir()).words("copy --reconnect 5 d.raw e.raw");
    copy.output().expect_exit(Exit::Usage);
    assert_eq!(scratch.names(), ["d.raw"]);
}
