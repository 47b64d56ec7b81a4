//! `receive` where something is already: what an earlier run left or published, what others use,
//! and what was asked for that makes no sense here.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bitferry_tests::device::Loop;
use bitferry_tests::image::make;
use bitferry_tests::middle::{Cut, Middle};
use bitferry_tests::migration::{both as migrate, command as run, listening};
use bitferry_tests::qemu::{Nbd, check_is_clean, dirty_ranges, same_content};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, json, require_all};
use rustix::process::Signal;
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

fn source(scratch: &Scratch, name: &str) -> PathBuf {
    make(scratch, name, 24 * MIB).write(3, 0, 5 * MIB).bitmap("b0", 65536).write(4, MIB, 7).done()
}

fn status(output: Output) -> String {
    let summary = json::summary(&output.expect_exit(Exit::Done));
    summary["status"].as_str().expect("a status").to_owned()
}

#[test]
fn a_one_way_stream_that_comes_again_is_read_to_its_end() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = source(&scratch, "a.qcow2");
    run(&scratch, "send --disk vda=a.qcow2 file:stream").ok();
    let receive = || run(&scratch, "receive --json --disk vda=out file:stream").output();
    assert_eq!(status(receive()), "completed");
    assert_eq!(status(receive()), "already-complete");
    // Through a pipe too: whoever writes into it ends well.
    let binary = bitferry_tests::bitferry::binary().display();
    let line = format!("cat stream | {binary} receive --json --disk vda=out fd:8 8<&0");
    let output = Run::new("bash").args(["-o", "pipefail", "-c", &line]).dir(scratch.dir()).output();
    assert_eq!(status(output), "already-complete");
    same_content((&image, "qcow2"), (&scratch.path("out"), "qcow2"));
}

#[test]
fn a_one_way_stream_begins_anew_where_one_was_cut() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = source(&scratch, "a.qcow2");
    run(&scratch, "send --disk vda=a.qcow2 file:stream").ok();
    // The pipe stays open in the middle, and the destination is killed there.
    let half = std::fs::metadata(scratch.path("stream")).expect("a stream").len() / 2;
    let binary = bitferry_tests::bitferry::binary().display();
    let line = format!(
        "mkfifo pipe; {binary} receive --disk vda=out - < pipe & exec 9> pipe; \
         head -c {half} stream >&9; while [ ! -s .out.bitferry-journal ]; do sleep 0.02; done; \
         sleep 0.3; kill -9 $!"
    );
    Run::new("bash").args(["-c", &line]).dir(scratch.dir()).ok();
    assert!(scratch.path(".out.bitferry-part").exists() && !scratch.path("out").exists());
    let received = run(&scratch, "receive --json --disk vda=out file:stream").output();
    assert_eq!(status(received), "completed");
    check_is_clean(&scratch.path("out"));
    same_content((&image, "qcow2"), (&scratch.path("out"), "qcow2"));
}

#[test]
fn what_is_gone_on_with_is_read_again_before_the_users_eyes() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).write(5, 0, 48 * MIB).done();
    let both = ("--disk vda=a.qcow2", "--disk vda=out unix:socket");
    cut(&scratch, both, ".out.bitferry-part", 8 * MIB);
    let send = "--disk vda=a.qcow2 unix:socket";
    let receiver = run(&scratch, "receive --json --disk vda=out unix:socket").spawn();
    listening(&receiver);
    run(&scratch, &format!("send --json {send}")).output().expect_exit(Exit::Done);
    let events = json::lines(&receiver.wait().expect_exit(Exit::Done).text());
    let phases: Vec<_> = events.iter().filter_map(|event| event["phase"].as_str()).collect();
    let told = events.iter().filter(|event| event["event"] == "progress");
    let mut told = told.filter(|event| event["phase"] == "recheck");
    assert!(told.any(|event| event["total"].as_u64() >= Some(4 * MIB)), "{phases:?}");
    let order = ["recheck", "transfer", "seal", "prove"];
    let positions = order.map(|name| phases.iter().rposition(|phase| *phase == name));
    assert!(positions.iter().all(Option::is_some) && positions.is_sorted(), "{phases:?}");
    assert_eq!(events.last().expect("a summary")["resumed"], true);
    same_content((&image, "qcow2"), (&scratch.path("out"), "qcow2"));
}

/// Both commands, the source killed when so many bytes of content lie at `place`.
fn cut(scratch: &Scratch, (send, receive): (&str, &str), place: &str, bytes: u64) {
    let receiver = run(scratch, &format!("receive {receive}")).spawn();
    receiver.wait_for(false, |line| line.contains("listening").then_some(()));
    let sender = run(scratch, &format!("send --bandwidth 16M {send} unix:socket")).spawn();
    let begun = Instant::now();
    let arrived = || std::fs::metadata(scratch.path(place)).map_or(0, |m| m.blocks() * 512);
    while arrived() < bytes {
        assert!(begun.elapsed() < Duration::from_secs(60), "nothing arrives");
        std::thread::sleep(Duration::from_millis(5));
    }
    sender.kill();
    receiver.wait().expect_exit(Exit::Transport);
}

#[test]
fn what_was_written_in_place_is_gone_on_with() {
    if !has_peers() {
        return;
    }
    for format in ["qcow2", "raw"] {
        let scratch = Scratch::new();
        let image = make(&scratch, "a.qcow2", 64 * MIB).write(5, 0, 48 * MIB);
        let image = image.bitmap("b0", 65536).write(6, 50 * MIB, MIB).done();
        let out = make(&scratch, "out", 64 * MIB).format(format).done();
        let bitmaps = if format == "raw" { "--bitmaps none" } else { "" };
        let send = format!("--disk vda=a.qcow2 {bitmaps}");
        let receive = format!("--in-place --disk vda=out,format={format} unix:socket");
        // Whatever the image was, and was told of it, before.
        for other in [false, true] {
            if other {
                make(&scratch, "b.qcow2", 64 * MIB).write(9, 0, 32 * MIB).done();
                run(&scratch, &format!("copy --in-place -O {format} b.qcow2 out")).ok();
            }
            if !other {
                cut(&scratch, (&send, &receive), "out", 16 * MIB);
                assert!(scratch.path(".out.bitferry-journal").exists());
            }
            let (sent, received) = migrate(&scratch, &send, &receive);
            let sent = json::summary(&sent.expect_exit(Exit::Done));
            let received = json::summary(&received.expect_exit(Exit::Done));
            assert!([&sent, &received].iter().all(|one| one["status"] == "completed"), "{sent}");
            if !other {
                assert_eq!(received["resumed"], true);
                assert!(sent["wire-bytes"].as_u64() < Some(40 * MIB), "{sent}");
            }
            same_content((&image, "qcow2"), (&out, format));
            if format == "qcow2" {
                check_is_clean(&out);
                let ranges = |image| dirty_ranges(image, "b0").expect("b0");
                assert_eq!(ranges(&image), ranges(&out));
            }
            let (sent, received) = migrate(&scratch, &send, &receive);
            assert_eq!((status(sent), status(received)).1, "already-complete");
            assert!(!scratch.path(".out.bitferry-journal").exists());
        }
    }
}

#[test]
fn what_a_failure_costs_the_bitmaps_that_were_there_is_told_with_it() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", 64 * MIB).write(5, 0, 48 * MIB).done();
    let out = make(&scratch, "out", 64 * MIB).bitmap("own", 65536).done();
    let fails_after = |bytes| {
        let receive = "receive --json --in-place --disk vda=out tcp:127.0.0.1:0";
        let receiver = run(&scratch, receive).spawn();
        let uri = listening(&receiver);
        let address = uri.strip_prefix("tcp:").and_then(|a| a.parse().ok()).expect("an address");
        let middle = Middle::start(address, vec![Cut::Forth(bytes)]);
        let sent = run(&scratch, "send --json --disk vda=a.qcow2").arg(middle.uri()).output();
        let both = [sent, receiver.wait()].map(|o| json::summary(&o.expect_exit(Exit::Transport)));
        for summary in &both {
            let wire = summary["wire-bytes"].as_u64().expect("bytes");
            assert!(wire > bytes / 2, "{summary}");
        }
        both[1]["disks"][0]["bitmaps"].as_array().expect("bitmaps").clone()
    };
    // Nothing is written, and QEMU may use it as before.
    assert_eq!(fails_after(300), [] as [Value; 0]);
    dirty_ranges(&out, "own").expect("consistent");
    // A part is written: it has followed that.
    assert_eq!(fails_after(20 * MIB), [] as [Value; 0]);
    // A kill leaves it in use.
    let receiver = run(&scratch, "receive --json --in-place --disk vda=out unix:socket").spawn();
    let send = format!("send --bandwidth 4M --disk vda=a.qcow2 {}", listening(&receiver));
    let sender = run(&scratch, &send).spawn();
    receiver.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        (event["event"] == "progress" && event["done"].as_u64() > Some(0)).then_some(())
    });
    receiver.kill();
    sender.wait().expect_exit(Exit::Transport);
    let [lost] = &fails_after(300)[..] else { panic!("one bitmap") };
    assert_eq!((&lost["name"], &lost["outcome"]), (&"own".into(), &"invalidated".into()));
}

#[test]
fn what_was_written_to_a_device_is_gone_on_with() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).write(5, 0, 48 * MIB).done();
    let file = make(&scratch, "file", 64 * MIB).format("raw").done();
    let Some(device) = Loop::over(&file) else { return };
    let path = device.0.display().to_string();
    let send = "--disk vda=a.qcow2";
    let receive = format!("--in-place --state-dir state/of --disk vda={path} unix:socket");
    let entries = || std::fs::read_dir(scratch.path("state/of")).expect("a directory").count();
    cut(&scratch, (send, &receive), "file", 16 * MIB);
    assert_eq!(entries(), 1);
    let (sent, received) = migrate(&scratch, send, &receive);
    let sent = json::summary(&sent.expect_exit(Exit::Done));
    let received = json::summary(&received.expect_exit(Exit::Done));
    assert_eq!((&received["status"], &received["resumed"]), (&"completed".into(), &true.into()));
    assert!(sent["wire-bytes"].as_u64() < Some(40 * MIB), "{sent}");
    same_content((&image, "qcow2"), (&file, "raw"));
    // Asked for again, it is read and nothing is sent: what it holds now nobody can tell otherwise.
    let again = || {
        let sent = json::summary(&migrate(&scratch, send, &receive).0.expect_exit(Exit::Done));
        assert_eq!(sent["status"], "completed");
        sent["wire-bytes"].as_u64().expect("a number")
    };
    assert!(again() < MIB);
    let other = make(&scratch, "other", 64 * MIB).format("raw").done();
    let device = device.again_over(&other);
    assert!(again() > 48 * MIB);
    same_content((&image, "qcow2"), (&other, "raw"));
    // A copy keeps a journal as well.
    make(&scratch, "b.qcow2", 64 * MIB).write(9, 0, 32 * MIB).done();
    let copy = format!("copy --json --in-place -O raw --state-dir state/of b.qcow2 {path}");
    let slow = run(&scratch, &copy).words("--bandwidth 8M").spawn();
    let has_journal = || {
        let mut found = std::fs::read_dir(scratch.path("state/of")).expect("a directory");
        found.any(|entry| entry.expect("an entry").path().to_string_lossy().contains("journal"))
    };
    slow.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        (event["phase"] == "transfer" && event["done"].as_u64()? > 0).then_some(())
    });
    slow.signal(Signal::INT);
    slow.wait().expect_exit(Exit::Interrupted);
    assert!(has_journal());
    assert_eq!(
        json::summary(&run(&scratch, &copy).output().expect_exit(Exit::Done))["resumed"],
        true
    );
    assert_eq!(entries(), 0);
    let compare = run(&scratch, &format!("compare -F raw b.qcow2 {path}"));
    compare.output().expect_exit(Exit::Done);
    drop(device);
}

#[test]
fn a_receipt_does_not_speak_for_another_wish() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    source(&scratch, "a.qcow2");
    let (send, uri) = ("--disk vda=a.qcow2", "unix:socket");
    let receive = |wish: &str| migrate(&scratch, send, &format!("--disk vda=out{wish} {uri}"));
    for expected in ["completed", "already-complete"] {
        let (sent, received) = receive("");
        assert_eq!((status(sent), status(received)), (expected.to_owned(), expected.to_owned()));
    }
    for wish in [",format=raw", " -o cluster_size=2M", " --rename-bitmap b0=b1"] {
        let (sent, received) = receive(wish);
        sent.expect_exit(Exit::Transport);
        let received = received.expect_exit(Exit::Device);
        assert!(received.complaint().contains("--force"), "{received}");
    }
    let (sent, received) = receive(" --rename-bitmap b0=b1 --force");
    assert_eq!((status(sent), status(received)), ("completed".to_owned(), "completed".to_owned()));
    let info = json::document(&run(&scratch, "info --json out").ok());
    assert_eq!(info["bitmaps"][0]["name"], "b1");
}

#[test]
fn what_others_use_is_not_replaced() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = source(&scratch, "a.qcow2");
    let used = make(&scratch, "used", MIB).write(9, 0, 65536).done();
    let nbd = Nbd::serve(&used, "qcow2", [""; 0]);
    let words = ("--disk vda=a.qcow2", "--force --disk vda=used unix:socket");
    let (sent, received) = migrate(&scratch, words.0, words.1);
    sent.expect_exit(Exit::Transport);
    let received = received.expect_exit(Exit::Device);
    assert!(received.complaint().contains("qemu-nbd"), "{received}");
    nbd.quit();
    let (sent, received) = migrate(&scratch, words.0, words.1);
    assert_eq!((status(sent), status(received)), ("completed".to_owned(), "completed".to_owned()));
    same_content((&image, "qcow2"), (&used, "qcow2"));
    // What was published and is in use is complete all the same.
    let nbd = Nbd::serve(&used, "qcow2", [""; 0]);
    assert_eq!(status(migrate(&scratch, words.0, words.1).1), "already-complete");
    nbd.quit();
}

#[test]
fn what_only_a_qemu_is_asked_for_is_refused() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    source(&scratch, "a.qcow2");
    for wish in ["--bitmaps none", "--bitmaps b0", "--shared-base"] {
        let receive = format!("{wish} --disk vda=out unix:socket");
        let (sent, received) = migrate(&scratch, "--disk vda=a.qcow2", &receive);
        let option = wish.split(' ').next().unwrap_or_default();
        for output in [sent.expect_exit(Exit::Transport), received.expect_exit(Exit::Usage)] {
            assert!(output.complaint().contains(option), "{output}");
        }
        // Before anybody connects, where it is known who will.
        let early = run(&scratch, &format!("receive --dialect native {receive}")).output();
        early.expect_exit(Exit::Usage);
        assert!(!scratch.path("out").exists());
    }
}

#[test]
fn the_longest_names_will_do() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = source(&scratch, "a.qcow2");
    for len in [233, 234, 237, 238, 240, 241, 255] {
        let name = "n".repeat(len);
        run(&scratch, &format!("copy a.qcow2 {name}")).ok();
        std::fs::remove_file(scratch.path(&name)).expect("it is there");
        let receive = format!("--disk vda={name} unix:socket");
        let (sent, received) = migrate(&scratch, "--disk vda=a.qcow2", &receive);
        assert_eq!((status(sent), status(received)).0, "completed");
        same_content((&image, "qcow2"), (&scratch.path(&name), "qcow2"));
    }
}
