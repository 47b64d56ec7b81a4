//! What a kill, a full disk or a failing disk leaves behind: a destination that is absent or whole,
//! never a bitmap that is present and stale, never a corrupt image.
//!
//! Moments are chosen in two ways: by the clock (seeded), and by counting system calls: `strace`
//! makes the n-th write, sync or rename the last one, for every n.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry_tests::image::make;
use bitferry_tests::qemu::{check, dirty_ranges, qemu_img, qemu_io, same_content};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, require_all};

const MIB: u64 = 1 << 20;

/// What changes a file or makes it last.
const CHANGES: &str = "pwrite64,pwritev,pwritev2,write,writev,fallocate,ftruncate,copy_file_range,\
    fsync,fdatasync,\
     sync_file_range,rename,renameat,renameat2,linkat,unlink,unlinkat";

const SYNCS: &str = "fsync,fdatasync";

/// The dynamic loader reads before the program does, and says so with this status.
const NOT_LOADED: i32 = 127;

const PEERS: &[Peer] = &[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd];

/// `bitferry` with a fault in its system calls, in strace's words.
fn with_fault(arguments: &[&str], calls: &str, fault: &str) -> Run {
    let strace = Peer::Strace.find().expect("asked for");
    let run = Run::new(strace).args(["-f", "-qqq", "-o", "/dev/null", "-e"]);
    // Only what touches image files counts: standard output is none of them.
    let run = run.arg(format!("trace={calls}")).arg("-e").arg(format!("inject={calls}:{fault}"));
    let run = run.arg(bitferry_tests::bitferry::binary()).args(arguments);
    run.patience(Duration::from_secs(120))
}

fn is_killed(output: &Output) -> bool {
    // strace dies of the signal that killed its child.
    use std::os::unix::process::ExitStatusExt;
    output.status.signal() == Some(9) || output.code() == Some(137)
}

/// A source with two bitmaps, large enough that a copy of it takes several writes.
fn source(scratch: &Scratch, size: u64) -> PathBuf {
    let image = make(scratch, "source", size).write(1, 0, size / 4).bitmap("b0", 65536);
    let image = image.write(2, size / 2, size / 8).bitmap("b1", 4096);
    image.write(3, size - 65536, 65536).io(format!("write -z {} {}", MIB, MIB)).done()
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// What lies beside a copy that was made.
const DONE: [&str; 3] = [".copy.bitferry-receipt", "copy", "source"];

/// What lies beside the source of a copy: of a copy that did not end well, perhaps what the next
/// try goes on with.
#[track_caller]
fn nothing_else(scratch: &Scratch, output: &Output) {
    let known = ["source", ".copy.bitferry-part", ".copy.bitferry-journal", DONE[0]];
    let strange: Vec<_> =
        scratch.names().into_iter().filter(|name| !known.contains(&name.as_str())).collect();
    assert!(strange.is_empty(), "{strange:?}\n{output}");
}

/// The same command again gets there, and leaves nothing but the copy.
#[track_caller]
fn same_command_again(scratch: &Scratch, source: &Path, output: &Output) {
    let copy = scratch.path("copy");
    bitferry().arg("copy").arg(source).arg(&copy).output().expect_exit(Exit::Done);
    assert!(is_absent_or_whole(source, &copy, output));
    assert_eq!(scratch.names(), DONE);
    std::fs::remove_file(&copy).expect("remove");
}

/// A destination is absent or whole.
#[track_caller]
fn is_absent_or_whole(source: &Path, copy: &Path, output: &Output) -> bool {
    if !copy.exists() {
        return false;
    }
    let found = check(copy);
    assert_eq!((found.leaks, found.corruptions), (0, 0), "{output}");
    same_content((source, "qcow2"), (copy, "qcow2"));
    for name in ["b0", "b1"] {
        let expected = dirty_ranges(source, name).unwrap_or_else(|o| panic!("{o}"));
        let found = dirty_ranges(copy, name).unwrap_or_else(|o| panic!("{o}\n{output}"));
        assert_eq!(found, expected, "{output}");
    }
    true
}

#[test]
fn a_copy_killed_at_any_system_call_is_absent_or_whole() {
    if !require_all(PEERS) || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, 4 * MIB);
    let mut was_whole = false;
    for call in 1.. {
        let copy = scratch.path("copy");
        let arguments = ["copy", &text(&source), &text(&copy)];
        let output =
            with_fault(&arguments, CHANGES, &format!("signal=SIGKILL:when={call}")).output();
        let is_whole = is_absent_or_whole(&source, &copy, &output);
        assert!(is_whole || !was_whole, "gone again\n{output}");
        if !is_killed(&output) {
            assert!(is_whole && output.status.success(), "{output}");
            assert!(call > 3, "no system call was counted\n{output}");
            break;
        }
        was_whole |= is_whole;
        if is_whole {
            std::fs::remove_file(&copy).expect("remove");
            continue;
        }
        // The same command again gets there, whatever lies about.
        bitferry().args(arguments).output().expect_exit(Exit::Done);
        assert!(is_absent_or_whole(&source, &copy, &output));
        assert_eq!(scratch.names(), DONE);
        std::fs::remove_file(&copy).expect("remove");
    }
}

#[test]
fn a_copy_killed_between_its_renames_is_finished_by_the_same_command_alone() {
    if !require_all(PEERS) || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let (source, copy) = (source(&scratch, 4 * MIB), scratch.path("copy"));
    let (from, to) = (text(&source), text(&copy));
    let command = ["copy", "--json", "-o", "data_file=copy.raw,data_file_raw=on", &from, &to];
    let others: [&[&str]; 4] = [
        &["--bitmaps=b0"],
        &["--bitmaps=none"],
        &["--rename-bitmap=b0=b9"],
        &["--skip-broken-bitmaps"],
    ];
    let kill = || {
        let renames = "rename,renameat,renameat2";
        let killed = with_fault(&command, renames, "signal=SIGKILL:when=2").output();
        assert!(is_killed(&killed), "{killed}");
    };
    kill();
    let left = scratch.names();
    // Another command publishes nothing of it, nor does one that begins anew but for itself.
    let plain = ["copy", "--json", &from, &to];
    let commands = others.iter().map(|wish| [&command[..], wish].concat());
    for other in commands.chain([plain.to_vec()]) {
        let output = bitferry().args(other).output().expect_exit(Exit::Usage);
        assert!(output.complaint().contains("--fresh"), "{output}");
        assert_eq!(scratch.names(), left);
    }
    let summary = || {
        let output = bitferry().args(command).output().expect_no_crash();
        json::summary(&output.expect_exit(Exit::Done))
    };
    assert_eq!(summary()["status"], "already-complete");
    let is_whole = || {
        let compare = bitferry().words("compare --allow-backing").args([&from, &to]);
        compare.output().expect_exit(Exit::Done);
    };
    is_whole();
    // What somebody has put in the place of what was killed is not what was proved.
    for name in ["copy", "copy.raw"] {
        std::fs::remove_file(scratch.path(name)).expect("published");
    }
    kill();
    std::fs::remove_file(scratch.path(".copy.bitferry-part")).expect("the other half");
    std::fs::write(&copy, [7; 4096]).expect("write");
    let output = bitferry().args(command).output().expect_no_crash();
    assert_ne!(output.code(), Some(0), "{output}");
    let fresh = [&command[..], &["--fresh", "--force"]].concat();
    bitferry().args(fresh).output().expect_exit(Exit::Done);
    is_whole();
}

#[test]
fn a_copy_killed_at_any_moment_is_absent_or_whole() {
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, 256 * MIB);
    let copy = scratch.path("copy");
    let run = bitferry().arg("copy").arg(&source).arg(&copy);
    let begun = Instant::now();
    run.output().expect_exit(Exit::Done);
    let whole = begun.elapsed();
    let mut random = Random::new(seed(), "kill a copy");
    for _ in 0..12 {
        std::fs::remove_file(&copy).expect("remove");
        let child = run.spawn();
        child.ends_within(whole.mul_f64(random.below(1000) as f64 / 900.0));
        let output = child.kill();
        if !is_absent_or_whole(&source, &copy, &output) {
            run.output().expect_exit(Exit::Done);
            assert!(is_absent_or_whole(&source, &copy, &output));
            assert_eq!(scratch.names(), DONE);
        }
    }
}

#[test]
fn a_replaced_file_is_the_old_or_the_new_one() {
    if !require_all(PEERS) || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, 4 * MIB);
    let copy = scratch.path("copy");
    for call in 1.. {
        std::fs::write(&copy, "old").expect("write");
        let arguments = ["copy", "--force", &text(&source), &text(&copy)];
        let output =
            with_fault(&arguments, CHANGES, &format!("signal=SIGKILL:when={call}")).output();
        if std::fs::read(&copy).expect("present") != b"old" {
            assert!(is_absent_or_whole(&source, &copy, &output));
        } else {
            assert!(is_killed(&output), "{output}");
        }
        if !is_killed(&output) {
            break;
        }
    }
}

/// An existing image with content and bitmaps of its own.
fn existing(scratch: &Scratch, size: u64) -> PathBuf {
    let image = make(scratch, "existing", size).write(9, MIB / 2, MIB).bitmap("old", 65536);
    image.write(8, 2 * MIB, 65536).bitmap("older", 4096).done()
}

/// What may be found after an in-place copy was killed.
#[derive(Debug, PartialEq)]
enum Found {
    /// Nothing had been written.
    Before,
    /// Everything had.
    Done,
    /// It says of itself that it is not finished.
    Unfinished,
}

/// Sectors in which two images differ.
fn differences(scratch: &Scratch, a: &Path, b: &Path) -> Vec<std::ops::Range<u64>> {
    let content = |image: &Path| {
        let raw = scratch.path("content.raw");
        qemu_img("convert").words("-f qcow2 -O raw").arg(image).arg(&raw).ok();
        std::fs::read(raw).expect("read")
    };
    let (a, b) = (content(a), content(b));
    let sectors = (0u64..).step_by(512).zip(a.chunks(512).zip(b.chunks(512)));
    sectors.filter(|(_, (a, b))| a != b).map(|(at, _)| at..at + 512).collect()
}

#[track_caller]
fn after_in_place(scratch: &Scratch, output: &Output) -> Found {
    let (copy, source) = (scratch.path("existing"), scratch.path("source"));
    let opened = qemu_img("info").args(["-f", "qcow2"]).arg(&copy).output();
    if !opened.status.success() {
        let said = opened.complaint();
        assert!(said.contains("bitferry: unfinished in-place copy"), "{output}\n{opened}");
        return Found::Unfinished;
    }
    // What an earlier try had leaked is given back.
    let checked = check(&copy);
    assert_eq!((checked.leaks, checked.corruptions), (0, 0), "{output}");
    let is = |other: &Path| {
        let run = qemu_img("compare").words("-f qcow2 -F qcow2").arg(&copy).arg(other);
        run.works()
    };
    let found = if is(&scratch.path("before")) {
        Found::Before
    } else {
        assert!(is(&source), "neither the old content nor the new\n{output}");
        Found::Done
    };
    // A bitmap that loads must be right for what the disk holds now.
    for name in ["b0", "b1"] {
        let Ok(ranges) = dirty_ranges(&copy, name) else { continue };
        assert_eq!(found, Found::Done, "{name} is there too early\n{output}");
        let expected = dirty_ranges(&source, name).unwrap_or_else(|o| panic!("{o}"));
        assert_eq!(ranges, expected, "{name}\n{output}");
    }
    // The destination's own go on recording: what was dirty still is, and so is what was written.
    for name in ["old", "older"] {
        let Ok(ranges) = dirty_ranges(&copy, name) else { continue };
        let before = scratch.path("before");
        let expected = dirty_ranges(&before, name).unwrap_or_else(|o| panic!("{o}"));
        if found == Found::Before {
            assert_eq!(ranges, expected, "{name}\n{output}");
            continue;
        }
        let must = expected.into_iter().chain(differences(scratch, &before, &source));
        for part in must {
            let is_dirty = ranges.iter().any(|r| r.start <= part.start && part.end <= r.end);
            assert!(is_dirty, "{name} is stale: {part:?} is not in {ranges:?}\n{output}");
        }
    }
    found
}

#[test]
fn an_in_place_copy_that_is_killed_says_so_or_never_began() {
    if !require_all(PEERS) || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, 4 * MIB);
    let copy = existing(&scratch, 4 * MIB);
    let before = scratch.path("before");
    std::fs::copy(&copy, &before).expect("copy");
    let mut was_unfinished = false;
    for call in 1.. {
        std::fs::copy(&before, &copy).expect("copy");
        let arguments = ["copy", "--in-place", &text(&source), &text(&copy)];
        let output =
            with_fault(&arguments, CHANGES, &format!("signal=SIGKILL:when={call}")).output();
        let found = after_in_place(&scratch, &output);
        if !is_killed(&output) {
            assert!(output.status.success() && found == Found::Done, "{found:?}\n{output}");
            assert!(was_unfinished, "no kill hit the middle\n{output}");
            break;
        }
        was_unfinished |= found == Found::Unfinished;
        bitferry().args(arguments).output().expect_exit(Exit::Done);
        assert_eq!(after_in_place(&scratch, &output), Found::Done);
    }
}

#[test]
fn bitmap_verbs_that_are_killed_leave_right_or_invalid_bitmaps() {
    if !require_all(PEERS) || !require_all(&[Peer::Strace]) {
        return;
    }
    let verbs: &[&[&str]] = &[
        &["add", "IMAGE", "new"],
        &["remove", "IMAGE", "b0"],
        &["clear", "IMAGE", "b0"],
        &["disable", "IMAGE", "b0"],
        &["merge", "IMAGE", "b0", "b1"],
    ];
    let scratch = Scratch::new();
    let image = make(&scratch, "image", 8 * MIB).write(1, 0, MIB).bitmap("b0", 65536);
    let image = image.write(2, 4 * MIB, MIB).bitmap("b1", 65536).write(3, MIB, MIB).done();
    let before = scratch.path("before");
    std::fs::copy(&image, &before).expect("copy");
    for verb in verbs {
        let words: Vec<String> = verb.iter().map(|w| w.replace("IMAGE", &text(&image))).collect();
        let arguments: Vec<&str> =
            std::iter::once("bitmap").chain(words.iter().map(String::as_str)).collect();
        std::fs::copy(&before, &image).expect("copy");
        bitferry().args(&arguments).output().expect_exit(Exit::Done);
        let after = scratch.path("after");
        std::fs::copy(&image, &after).expect("copy");
        for call in 1.. {
            std::fs::copy(&before, &image).expect("copy");
            let fault = format!("signal=SIGKILL:when={call}");
            let output = with_fault(&arguments, CHANGES, &fault).output();
            assert_eq!(check(&image).corruptions, 0, "{output}");
            same_content((&image, "qcow2"), (&before, "qcow2"));
            for name in ["b0", "b1", "new"] {
                let Ok(found) = dirty_ranges(&image, name) else { continue };
                let may_be: Vec<_> =
                    [&before, &after].iter().filter_map(|i| dirty_ranges(i, name).ok()).collect();
                assert!(may_be.contains(&found), "{name}: {found:?}\n{output}");
            }
            if !is_killed(&output) {
                assert!(output.status.success() && call > 2, "{output}");
                break;
            }
        }
    }
}

/// Every call from the n-th on fails.
fn failing_disk(calls: &str, error: &str) {
    if !require_all(PEERS) || !require_all(&[Peer::Strace]) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, 4 * MIB);
    let copy = scratch.path("copy");
    for call in 1.. {
        let arguments = ["copy", &text(&source), &text(&copy)];
        // Writing the message is a write too: faults stop after some calls.
        let last = call + 40;
        let fault = format!("error={error}:when={call}..{last}");
        let output = with_fault(&arguments, calls, &fault).output();
        if output.code() == Some(NOT_LOADED) {
            continue;
        }
        let output = output.expect_no_crash();
        if output.status.success() {
            assert!(is_absent_or_whole(&source, &copy, &output));
            assert!(call > 1, "no system call was counted\n{output}");
            break;
        }
        assert_eq!(output.code(), Some(Exit::Device as i32), "{output}");
        // Only the last sync of all, that of the directory, fails behind the publication.
        if calls == SYNCS && is_absent_or_whole(&source, &copy, &output) {
            std::fs::remove_file(&copy).expect("remove");
        }
        nothing_else(&scratch, &output);
        if call % 5 == 0 {
            same_command_again(&scratch, &source, &output);
        }
    }
}

#[test]
fn a_full_disk_publishes_nothing() {
    failing_disk("pwrite64,pwritev,pwritev2,fallocate,copy_file_range", "ENOSPC");
}

#[test]
fn a_disk_that_cannot_write_publishes_nothing() {
    failing_disk("pwrite64,pwritev,pwritev2", "EIO");
}

#[test]
fn a_disk_that_cannot_sync_publishes_nothing() {
    failing_disk(SYNCS, "EIO");
}

#[test]
fn a_disk_that_cannot_read_publishes_nothing() {
    failing_disk("pread64,preadv,preadv2", "EIO");
}

#[test]
fn a_file_size_limit_is_a_clear_error() {
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, 16 * MIB);
    let copy = scratch.path("copy");
    for limit in [512, 65536, MIB, 4 * MIB] {
        let run = bitferry().arg("copy").arg(&source).arg(&copy).file_size(limit);
        let output = run.output().expect_no_crash().expect_exit(Exit::Device);
        let said = output.complaint();
        assert!(said.contains("copy") && said.contains("ulimit -f"), "{output}");
        nothing_else(&scratch, &output);
    }
    let output = bitferry().arg("info").arg(&source).output();
    same_command_again(&scratch, &source, &output);
}

#[test]
fn a_disk_without_room_is_refused_before_anything_is_written() {
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    // Mounting needs root.
    let small = scratch.path("small");
    std::fs::create_dir(&small).expect("mkdir");
    if !Run::new("mount").words("-t tmpfs -o size=1M none").arg(&small).works() {
        bitferry_tests::peer::cannot("mounting is not possible here");
        return;
    }
    let source = source(&scratch, 16 * MIB);
    let output = bitferry().arg("copy").arg(&source).arg(small.join("copy")).output();
    let names = bitferry_tests::scratch::names_in(&small);
    let unmounted = Run::new("umount").arg(&small).works();
    output.clone().expect_no_crash().expect_exit(Exit::Device);
    assert!(names.is_empty() && unmounted, "{names:?}\n{output}");
    qemu_io(&source, "qcow2", ["read 0 4k"]);
}
