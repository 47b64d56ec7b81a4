//! What a finished migration leaves, and what the same commands say because of it: that it is
//! complete, whether it was proved, and whether somebody has written to it since.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitferry_tests::image::make;
use bitferry_tests::migration::{both, command as run, done};
use bitferry_tests::qemu::{qemu_io, same_content};
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 32 * MIB;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo])
}

fn source(scratch: &Scratch, name: &str, pattern: u8) -> PathBuf {
    let image = make(scratch, name, SIZE).write(pattern, MIB, 3 * MIB).bitmap("b0", 65536);
    image.write(pattern + 1, 9 * MIB, 65536).disabled_bitmap("b1", 4096).done()
}

/// Both summaries of commands that succeed, over a socket.
#[track_caller]
fn migrated(scratch: &Scratch, send: &str, receive: &str) -> [Value; 2] {
    done(scratch, send, &format!("{receive} unix:socket")).into()
}

/// What a summary says of each disk that does not depend on how often it was asked.
fn lasting(summary: &Value) -> Vec<[Value; 3]> {
    let disks = summary["disks"].as_array().expect("disks");
    let mut said: Vec<_> =
        disks.iter().map(|d| ["id", "content-hash", "bitmaps"].map(|key| d[key].clone())).collect();
    said.sort_by_key(|[id, ..]| id.as_str().map(str::to_owned));
    said
}

#[test]
fn the_same_commands_again_say_what_was_proved_and_what_is_not_as_it_was() {
    if !has_peers() {
        return;
    }
    let sends = "--disk vda=a.qcow2 --disk vdb=b.qcow2";
    let receives = "--disk vdb=b.out --disk vda=a.out";
    for (how, verified) in [
        (("", ""), "yes"),
        (("--rename-bitmap vda/b0=x", "--rename-bitmap b1=y"), "yes"),
        (("", "--in-place"), "yes"),
        (("--no-verify", "--no-verify"), "no"),
        (("--no-verify", ""), "no"),
        (("--no-verify", "--no-verify --in-place"), "no"),
    ] {
        let scratch = Scratch::new();
        let images = [source(&scratch, "a.qcow2", 3), source(&scratch, "b.qcow2", 5)];
        if how.1.contains("in-place") {
            for name in ["a.out", "b.out"] {
                make(&scratch, name, SIZE).done();
            }
        }
        let (send, receive) = (format!("{sends} {}", how.0), format!("{receives} {}", how.1));
        let ask = |status: &str, verified: &str| {
            let said = migrated(&scratch, &send, &receive);
            for summary in &said {
                assert_eq!(summary["status"], status, "{how:?}: {summary}");
                let disks = summary["disks"].as_array().expect("disks");
                assert_eq!(disks.len(), 2, "{how:?}: {summary}");
                assert!(disks.iter().all(|d| d["verified"] == verified), "{how:?}: {summary}");
            }
            said
        };
        let first = ask("completed", verified);
        if verified == "no" {
            let (own, theirs) = ("nobody read it back (--no-verify)", "the source sent no proof");
            let here = if how.1.contains("--no-verify") { own } else { theirs };
            for (summary, why) in first.iter().zip([own, here]) {
                let bitmap = &summary["disks"][0]["bitmaps"][0];
                assert_eq!(bitmap["outcome"], "sent", "{how:?}: {summary}");
                let reason = bitmap["reason"].as_str().expect("a reason");
                assert!(reason.starts_with(why), "{how:?}: {summary}");
            }
        }
        for (image, out) in images.iter().zip(["a.out", "b.out"]) {
            same_content((image, "qcow2"), (&scratch.path(out), "qcow2"));
        }
        let again = ask("already-complete", verified);
        let nothing = |disk: &Value| [&disk["bytes-data"], &disk["bytes-zero"]] == [0, 0];
        for (again, first) in again.iter().zip(&first) {
            assert!(again["disks"].as_array().expect("disks").iter().all(nothing), "{again}");
            if verified == "yes" {
                assert_eq!(lasting(again), lasting(first), "{how:?}");
            }
        }
        // Its guest may run there by now: it stays complete, but what it holds nobody knows.
        for change in ["bitmap clear a.out b1", "bitmap add b.out new"] {
            let change = change.replace(" b1", if how.1.contains("=y") { " y" } else { " b1" });
            run(&scratch, &change).ok();
        }
        let changed = ask("already-complete", "unconfirmed");
        let outcomes = changed.iter().flat_map(|s| s["disks"].as_array().expect("disks"));
        let mut outcomes = outcomes.flat_map(|d| d["bitmaps"].as_array().expect("bitmaps"));
        assert!(outcomes.all(|bitmap| bitmap["outcome"] == "sent"), "{changed:?}");
        qemu_io(&images[0], "qcow2", ["write -P 9 20M 512"]);
        // Another content is another session, and what was published is not in its way.
        let fresh = if how.1.contains("in-place") { "" } else { " --force" };
        let said = migrated(&scratch, &send, &format!("{receive}{fresh}"));
        assert!(said.iter().all(|s| s["status"] == "completed"), "{how:?}: {said:?}");
        same_content((&images[0], "qcow2"), (&scratch.path("a.out"), "qcow2"));
    }
}

#[test]
fn a_proof_that_was_left_out_is_not_claimed_by_asking_again() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    let image = source(&scratch, "a.qcow2", 3);
    let (unproved, proved) = ("--disk vda=a.qcow2 --no-verify", "--disk vda=a.qcow2");
    let receive = "--disk vda=a.out unix:socket";
    done(&scratch, unproved, receive);
    // A destination that answers what it has, and a source that is not content with it.
    let (sent, received) = both(&scratch, proved, receive);
    let sent = sent.expect_exit(Exit::Usage);
    assert_eq!(json::summary(&sent)["status"], "failed", "{sent}");
    let said = sent.complaint();
    assert!(said.contains("\"vda\"") && said.contains("\nhint: with --no-verify"), "{said}");
    received.expect_exit(Exit::Done);
    assert_eq!(done(&scratch, unproved, receive).0["status"], "already-complete");
    let anew = done(&scratch, &format!("{proved} --fresh"), &format!("--force {receive}"));
    for summary in [anew.0, anew.1] {
        assert_eq!(
            (&summary["status"], &summary["disks"][0]["verified"]),
            (&"completed".into(), &"yes".into())
        );
    }
    same_content((&image, "qcow2"), (&scratch.path("a.out"), "qcow2"));
}

#[test]
fn bitmaps_that_went_alone_are_told_as_such_again() {
    if !has_peers() {
        return;
    }
    let scratch = Scratch::new();
    source(&scratch, "a.qcow2", 3);
    run(&scratch, "copy --bitmaps none a.qcow2 b.qcow2").ok();
    let ask = || {
        migrated(&scratch, "--no-blocks --disk vda=a.qcow2", "--in-place --disk vda=b.qcow2")
            .map(|summary| (summary["status"].clone(), summary["disks"][0].clone()))
    };
    let (first, again) = (ask(), ask());
    for ((was, first), (is, again)) in first.iter().zip(&again) {
        assert_eq!([was, is], ["completed", "already-complete"]);
        assert_eq!(first["not-carried"][0], "content: bitmaps go alone", "{first}");
        for key in ["content-hash", "verified", "not-carried", "bitmaps"] {
            assert_eq!(first[key], again[key], "{key}");
        }
    }
}

#[test]
fn what_belongs_together_is_published_together_without_proof_too() {
    if !has_peers() || !require_all(&[Peer::Strace]) {
        return;
    }
    let (send, receive) = (
        "--disk vda=a.qcow2 --disk vdb=b.qcow2 --no-verify",
        "--disk vda=a.out --disk vdb=b.out --no-verify",
    );
    for verify in [false, true] {
        let words =
            |words: &str| if verify { words.replace(" --no-verify", "") } else { words.into() };
        let (send, receive): (String, String) = (words(send), words(receive));
        let scratch = Scratch::new();
        let images = [source(&scratch, "a.qcow2", 3), source(&scratch, "b.qcow2", 5)];
        let receiver = killed_at_its_second_rename(&scratch, &receive).spawn();
        receiver.wait_for(false, |line| line.contains("listening").then_some(()));
        let sent = run(&scratch, &format!("send --json {send} unix:socket")).output();
        let sent = json::summary(&sent.expect_exit(Exit::Unknown));
        assert_eq!(sent["status"], "unknown", "{sent}");
        receiver.wait();
        let published = |name: &&str| scratch.path(name).exists();
        assert_eq!(["a.out", "b.out"].iter().filter(|name| published(name)).count(), 1);
        let said = migrated(&scratch, &send, &receive);
        assert!(said.iter().all(|s| s["status"] == "already-complete"), "{said:?}");
        for (image, out) in images.iter().zip(["a.out", "b.out"]) {
            same_content((image, "qcow2"), (&scratch.path(out), "qcow2"));
            same_bitmaps(&scratch, image, out);
        }
        let left = scratch.names().into_iter().filter(|name| name.contains("bitferry-"));
        assert_eq!(
            left.collect::<Vec<_>>(),
            [".a.out.bitferry-receipt", ".b.out.bitferry-receipt"]
        );
    }
}

#[test]
fn half_of_a_publication_is_not_finished_with_what_was_written_to() {
    if !has_peers() || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    ["a.qcow2", "b.qcow2"].iter().for_each(|name| drop(source(&scratch, name, 3)));
    let (send, receive) =
        ("--disk vda=a.qcow2 --disk vdb=b.qcow2", "--disk vda=a.out --disk vdb=b.out");
    let receiver = killed_at_its_second_rename(&scratch, receive).spawn();
    receiver.wait_for(false, |line| line.contains("listening").then_some(()));
    run(&scratch, &format!("send --json {send} unix:socket")).output().expect_exit(Exit::Unknown);
    receiver.wait();
    let left = scratch.names().into_iter().find(|name| name.ends_with("-part")).expect("one");
    let left_path = scratch.path(&left);
    let file = std::fs::File::options().append(true).open(&left_path).expect("open");
    std::io::Write::write_all(&mut &file, b"!").expect("write");
    let (sent, received) = both(&scratch, send, &format!("{receive} unix:socket"));
    let received = received.expect_exit(Exit::Different);
    assert!(received.complaint().contains(&left), "{received}");
    assert_eq!(json::summary(&received)["status"], "failed");
    assert!(sent.expect_exit(Exit::Different).complaint().contains(&left));
    assert!(left_path.exists());
}

#[test]
fn a_publication_that_began_is_not_finished_where_all_is_to_begin_anew() {
    if !has_peers() || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let images = [source(&scratch, "a.qcow2", 3), source(&scratch, "b.qcow2", 5)];
    let (send, receive) =
        ("--disk vda=a.qcow2 --disk vdb=b.qcow2", "--disk vda=a.out --disk vdb=b.out");
    let receiver = killed_at_its_second_rename(&scratch, receive).spawn();
    receiver.wait_for(false, |line| line.contains("listening").then_some(()));
    run(&scratch, &format!("send --json {send} unix:socket")).output().expect_exit(Exit::Unknown);
    receiver.wait();
    let said = migrated(&scratch, send, &format!("{receive} --fresh --force"));
    assert!(said.iter().all(|s| s["status"] == "completed"), "{said:?}");
    for (image, out) in images.iter().zip(["a.out", "b.out"]) {
        same_content((image, "qcow2"), (&scratch.path(out), "qcow2"));
    }
}

/// A destination that dies where one of its two disks has its final name.
fn killed_at_its_second_rename(scratch: &Scratch, words: &str) -> Run {
    let strace = Peer::Strace.find().expect("asked for");
    let renames = "rename,renameat,renameat2";
    let run = Run::new(strace).args(["-f", "-qqq", "-o", "/dev/null", "-e"]).dir(scratch.dir());
    let run = run.arg(format!("trace={renames}")).arg("-e");
    let run = run.arg(format!("inject={renames}:signal=SIGKILL:when=2"));
    let run = run.arg(bitferry_tests::bitferry::binary());
    let run = run.words(&format!("receive --json {words} unix:socket"));
    run.patience(Duration::from_secs(60))
}

fn same_bitmaps(scratch: &Scratch, image: &Path, out: &str) {
    let hash = |image: &Path| {
        json::document(&bitferry().words("hash --json").arg(image).ok())["bitmaps"].clone()
    };
    assert_eq!(hash(image), hash(&scratch.path(out)));
}
