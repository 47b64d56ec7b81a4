//! `receive` as its user meets it: the files it makes, what it says meanwhile. That what arrives is
//! right is held elsewhere.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use bitferry_tests::bitferry::binary;
use bitferry_tests::image::make;
use bitferry_tests::migration::{both, command, done, listening};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, qemu, require_all};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A raw disk with content all over.
fn disk(scratch: &Scratch, name: &str, size: usize) {
    let bytes: Vec<u8> = (0..size).map(|at| (at / 4096 % 251 + at % 7 + 1) as u8).collect();
    std::fs::write(scratch.path(name), bytes).expect("disk");
}

/// The command, under this umask.
fn with_umask(scratch: &Scratch, umask: &str, line: &str) -> Run {
    let script = format!("umask {umask}; exec \"$0\" \"$@\"");
    let shell = Run::new("sh").dir(scratch.dir()).args(["-c", &script]);
    shell.arg(binary()).words(line)
}

/// Runs the destination and then a source with these words; what both said.
fn migrate(scratch: &Scratch, destination: Run, source: &str) -> (Output, Output) {
    let running = destination.spawn();
    let uri = listening(&running);
    let send = bitferry().dir(scratch.dir()).words("send --json").words(source).arg(uri);
    let sent = send.output().expect_no_crash();
    (sent, running.wait().expect_no_crash())
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("there").permissions().mode() & 0o7777
}

#[test]
fn a_new_file_has_the_mode_of_any_new_file() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let source = "--disk vda=a.raw,format=raw";
    for (umask, expected) in [("022", 0o644), ("027", 0o640), ("077", 0o600), ("000", 0o666)] {
        let name = format!("{umask}.qcow2");
        let line =
            format!("receive --json -o data_file={umask}.data --disk vda={name} tcp:127.0.0.1:0");
        let (sent, received) = migrate(&scratch, with_umask(&scratch, umask, &line), source);
        sent.expect_exit(Exit::Done);
        received.expect_exit(Exit::Done);
        assert_eq!(mode(&scratch.path(&name)), expected, "umask {umask}");
        assert_eq!(mode(&scratch.path(&format!("{umask}.data"))), expected, "umask {umask}");
        // What is ours alone stays so.
        let receipt = scratch.path(&format!(".{name}.bitferry-receipt"));
        assert_eq!(mode(&receipt), 0o600, "umask {umask}");
    }
}

#[test]
fn a_replaced_file_hands_its_mode_and_owner_on() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let old = scratch.path("old.raw");
    std::fs::write(&old, b"old").expect("file");
    std::fs::set_permissions(&old, PermissionsExt::from_mode(0o4464)).expect("mode");
    let group = rustix::process::getgid().as_raw();
    // Only root may give files away.
    let owner = if rustix::process::getuid().is_root() { 12345 } else { 0 };
    if owner != 0 {
        std::os::unix::fs::chown(&old, Some(owner), None).expect("owner");
        std::fs::set_permissions(&old, PermissionsExt::from_mode(0o4464)).expect("mode");
    }
    let line = "receive --json --force --disk vda=old.raw,format=raw tcp:127.0.0.1:0";
    let destination = with_umask(&scratch, "022", line);
    let (sent, received) = migrate(&scratch, destination, "--disk vda=a.raw,format=raw");
    sent.expect_exit(Exit::Done);
    received.expect_exit(Exit::Done);
    let found = std::fs::metadata(&old).expect("there");
    assert_eq!((found.len(), mode(&old)), (MIB as u64, 0o464));
    assert_eq!(found.gid(), group);
    if owner != 0 {
        assert_eq!(found.uid(), owner);
    }
}

#[test]
fn its_progress_and_its_time_are_those_of_the_migration() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", 6 * MIB);
    let zeroes = std::fs::File::options().write(true).open(scratch.path("a.raw")).expect("disk");
    zeroes.set_len(8 * MIB as u64).expect("length");
    disk(&scratch, "b.raw", MIB);
    let places = "--disk vda=a.qcow2 --disk vdb=b.qcow2";
    let line = format!("receive --json -p always {places} tcp:127.0.0.1:0");
    let running = bitferry().dir(scratch.dir()).words(&line).spawn();
    let uri = listening(&running);
    let waited = Duration::from_millis(1200);
    std::thread::sleep(waited);
    // Slow enough to be seen on the way.
    let disks = "--disk vda=a.raw,format=raw --disk vdb=b.raw,format=raw";
    let send = bitferry().dir(scratch.dir()).words("send --json --bandwidth 4M").words(disks);
    send.arg(uri).output().expect_no_crash().expect_exit(Exit::Done);
    let received = running.wait().expect_no_crash().expect_exit(Exit::Done);

    let events = json::lines(&received.text());
    let is_transfer = |event: &&Value| event["phase"] == "transfer";
    let of_transfer: Vec<_> = events.iter().filter(is_transfer).collect();
    let (phases, progress): (Vec<&Value>, Vec<&Value>) =
        of_transfer.into_iter().partition(|event| event["event"] == "phase");
    assert_eq!(phases.len(), 1, "{received}");
    let number = |event: &Value, key: &str| event[key].as_u64().expect("a number");
    let done: Vec<_> = progress.iter().map(|event| number(event, "done")).collect();
    assert!(done.is_sorted() && done.len() > 2, "{received}");
    let last = progress.last().expect("some progress");
    assert_eq!((number(last, "done"), number(last, "total")), (9 * MIB as u64, 9 * MIB as u64));
    assert!(done.iter().any(|done| (1..9 * MIB as u64).contains(done)), "{received}");
    // Lines, where stderr is no terminal.
    assert!(received.complaint().contains("copying "), "{received}");

    let total = Duration::from_millis(number(&json::summary(&received), "total-time-ms"));
    assert!(total + waited <= received.elapsed, "{total:?}: {received}");
}

/// What a summary says of its only disk, and of the only bitmap of that.
fn only(output: Output) -> (String, Value, Value) {
    let summary = json::summary(&output.expect_no_crash().expect_exit(Exit::Done));
    assert!(!summary.to_string().contains("null"), "{summary}");
    let disk = &summary["disks"][0];
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    (text(&disk["verified"]), disk["content-hash"].clone(), disk["bitmaps"][0].clone())
}

#[test]
fn nothing_is_claimed_that_nobody_has_seen() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let run = |line: &str| bitferry().dir(scratch.dir()).words(line).output();
    run("copy -f raw -O qcow2 a.raw a.qcow2").expect_exit(Exit::Done);
    run("bitmap add a.qcow2 daily").expect_exit(Exit::Done);
    let hash = json::document(&run("hash --json -f qcow2 a.qcow2").text())["content-hash"].clone();
    let check = |output: Output, verified: &str, has_hash: bool, outcome: &str| {
        let (found, content, bitmap) = only(output);
        assert_eq!((found.as_str(), &bitmap["outcome"]), (verified, &outcome.into()));
        assert_eq!(content, if has_hash { hash.clone() } else { Value::Null });
        assert_eq!(bitmap["reason"].is_string(), outcome != "preserved", "{bitmap}");
    };
    check(run("copy --json -f qcow2 a.qcow2 b.qcow2"), "yes", true, "preserved");
    for how in ["--force", "--in-place"] {
        let line = format!("copy --json --fresh --no-verify {how} -f qcow2 a.qcow2 b.qcow2");
        check(run(&line), "no", false, "sent");
    }
    for (index, (there, here)) in
        [("", true), ("--no-verify", true), ("--no-verify", false)].into_iter().enumerate()
    {
        let line = format!("receive --json {there} --disk a=c{index}.qcow2 tcp:127.0.0.1:0");
        let destination = bitferry().dir(scratch.dir()).words(&line);
        let proof = if here { "" } else { "--no-verify " };
        let source = format!("{proof}--disk a=a.qcow2,format=qcow2");
        let (sent, received) = migrate(&scratch, destination, &source);
        for output in [sent, received] {
            match here {
                true => check(output, "yes", true, "preserved"),
                false => check(output, "no", false, "sent"),
            }
        }
    }
    let one_way = "--json --disk a=a.qcow2,format=qcow2 file:stream";
    check(run(&format!("send {one_way}")), "unconfirmed", true, "sent");
    check(run("receive --json --disk a=d.qcow2 file:stream"), "yes", true, "preserved");
}

#[test]
fn a_place_that_cannot_be_opened_is_told_to_both() {
    let scratch = Scratch::new();
    ["a.raw", "noise"].iter().for_each(|name| disk(&scratch, name, MIB));
    let (shared, in_place) = ("--disk vda=out --backing nowhere", "--in-place --disk vda=noise");
    for (place, exit, says) in [
        (shared.to_owned(), Exit::Device, "nowhere"),
        (format!("{in_place},format=qcow2"), Exit::Malformed, "noise"),
        (format!("{in_place} --dialect qemu:10.0"), Exit::Usage, "native dialect"),
    ] {
        let receive = format!("receive --json {place} tcp:127.0.0.1:0");
        let receive = bitferry().dir(scratch.dir()).words(&receive);
        let (sent, received) = migrate(&scratch, receive, "--disk vda=a.raw,format=raw");
        for output in [sent.expect_exit(Exit::Transport), received.expect_exit(exit)] {
            assert!(output.complaint().contains(says), "{place}: {output}");
        }
    }
}

#[test]
fn a_failure_names_the_disks_that_were_asked_for() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let check = |run: Run, exit: Exit, ids: &[&str]| {
        let output = run.dir(scratch.dir()).output().expect_no_crash().expect_exit(exit);
        let summary = json::summary(&output);
        assert_eq!(summary["status"], "failed", "{output}");
        let disks = summary["disks"].as_array().expect("a list");
        let found: Vec<_> = disks.iter().map(|d| d["id"].as_str().expect("text")).collect();
        assert_eq!(found, ids, "{output}");
        let keys = ["bytes-data", "bytes-zero", "verified", "not-carried", "bitmaps"];
        let has_all =
            |disk: &Value| disk["verified"] == "no" && keys.iter().all(|key| !disk[key].is_null());
        assert!(disks.iter().all(has_all) && !output.text().contains("null"), "{output}");
    };
    let bitferry = |line: &str| bitferry().words(line);
    check(bitferry("copy --json nowhere b.raw"), Exit::Device, &["b.raw"]);
    check(bitferry("copy --json a.raw a.raw"), Exit::Usage, &["a.raw"]);
    let disks = "--disk vda=a.raw --disk vdb=nowhere";
    check(bitferry(&format!("send --json {disks} tcp:127.0.0.1:1")), Exit::Device, &["vda", "vdb"]);
    check(bitferry(&format!("receive --json {disks} tcp::0")), Exit::Device, &["vda", "vdb"]);
    let nobody = "send --json --disk vda=a.raw,format=raw unix:nobody";
    check(bitferry(nobody), Exit::Transport, &["vda"]);
}

#[test]
fn what_the_places_do_not_fit_is_refused_before_anything_comes() {
    let scratch = Scratch::new();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let source = make(&scratch, "a.qcow2", 16 << 20).write(1, 0, 4 << 20).bitmap("a", 65536);
    let source = source.bitmap("b", 4096).write(2, 5 << 20, 512).done();
    make(&scratch, "old.qcow2", 16 << 20).bitmap("mine", 65536).write(9, 0, 1 << 20).done();
    make(&scratch, "old2.qcow2", 16 << 20).done();
    let old = scratch.path("old.qcow2");
    std::fs::copy(&old, scratch.path("before")).expect("copy");
    let names = scratch.names();
    for (words, said) in [
        ("--disk vdb=other", "a place for a disk \"vdb\""),
        ("--rename-bitmap a=x --rename-bitmap b=x", "are both to be called \"x\""),
        ("--rename-bitmap a=b", "are both to be called \"b\""),
        ("--rename-bitmap vda/a=b", "are both to be called \"b\""),
        ("--rename-bitmap nope=x", "no bitmap \"nope\" comes"),
    ] {
        for place in ["--disk vda=out", "--in-place --disk vda=old.qcow2"] {
            let words = match place.starts_with("--in-place") {
                true => words.replace("=other", "=old2.qcow2"),
                false => words.to_owned(),
            };
            let receive = format!("{place} {words} unix:s");
            let (sent, received) = both(&scratch, "--disk vda=a.qcow2", &receive);
            for output in [sent.expect_exit(Exit::Transport), received.expect_exit(Exit::Usage)] {
                assert!(output.complaint().contains(said), "{output}");
            }
            assert_eq!(scratch.names(), names, "{receive}");
            qemu::same_disk(&scratch.path("before"), &old, &["mine"]);
        }
    }
    // Two names for one bitmap are a slip on either side.
    let twice = "--rename-bitmap a=x --rename-bitmap a=y";
    for line in [
        format!("receive --disk vda=out {twice} unix:s"),
        format!("receive --in-place --disk vda=old.qcow2 --dialect qemu:10.0 {twice} unix:s"),
        format!("send --disk vda=a.qcow2 {twice} unix:s"),
        format!("send --dialect qemu:10.0 --disk vda=a.qcow2 {twice} unix:s"),
        format!("copy {twice} a.qcow2 out"),
        "copy --rename-bitmap q/a=x --rename-bitmap a=y a.qcow2 out".to_owned(),
        format!("copy {twice} a.qcow2 nobody:out"),
        format!("copy {twice} nobody:a.qcow2 out"),
    ] {
        let output = command(&scratch, &line).output().expect_exit(Exit::Usage);
        assert!(output.complaint().contains("both \"x\" and \"y\""), "{line}: {output}");
    }
    // What is said of one disk goes before what is said of all.
    let renamed = "--disk vda=out --rename-bitmap a=x --rename-bitmap vda/a=y unix:s";
    let (_, received) = done(&scratch, "--disk vda=a.qcow2", renamed);
    assert_eq!(received["disks"][0]["bitmaps"][0]["changed"][0], "name: a -> y", "{received}");
    let read = |image: &Path, name| qemu::dirty_ranges(image, name).expect("ranges");
    assert_eq!(read(&source, "a"), read(&scratch.path("out"), "y"));
}

#[test]
fn a_path_may_consist_of_any_bytes() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let word = |before: &str, name: &[u8], behind: &str| {
        OsString::from_vec([before.as_bytes(), name, behind.as_bytes()].concat())
    };
    let (there, back) = (b"\xff\xfe, or so".as_slice(), b"\x80".as_slice());
    let copy = |from: OsString, to: &[u8]| {
        let run = bitferry().dir(scratch.dir()).words("copy -O qcow2").arg(from);
        run.arg(OsStr::from_bytes(to)).output().expect_no_crash().expect_exit(Exit::Done);
    };
    copy("a.raw".into(), there);
    let disk = word("vda=", back, "");
    let running = bitferry().dir(scratch.dir()).words("receive --json --disk").arg(disk);
    let running = running.arg("tcp:127.0.0.1:0").spawn();
    let uri = listening(&running);
    let disk = word("vda=", b"\xff\xfe,, or so", ",format=qcow2");
    let send = bitferry().dir(scratch.dir()).words("send --json --disk").arg(disk).arg(uri);
    send.output().expect_no_crash().expect_exit(Exit::Done);
    running.wait().expect_no_crash().expect_exit(Exit::Done);
    let compare = bitferry().dir(scratch.dir()).words("compare a.raw").arg(OsStr::from_bytes(back));
    compare.output().expect_no_crash().expect_exit(Exit::Done);
    let wrong = word("", b"\xff", "=x");
    let send = bitferry().dir(scratch.dir()).words("send --disk").arg(wrong).arg("unix:s");
    assert!(send.output().expect_exit(Exit::Usage).complaint().contains("ID is not UTF-8"));
}
