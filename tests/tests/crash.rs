//! What a kill, a full disk or a failing disk leaves behind: a destination that is absent or whole,
//! never a bitmap that is present and stale, never a corrupt image.
//!
//! Moments are chosen by the clock (seeded). Kills at each system call are in `crash_calls`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use bitferry_tests::faults::{is_killed, with_fault};
use bitferry_tests::image::make;
use bitferry_tests::qemu::{check, dirty_ranges, qemu_io, same_content};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, require_all};

const MIB: u64 = 1 << 20;

const SYNCS: &str = "fsync,fdatasync";

/// The dynamic loader reads before the program does, and says so with this status.
const NOT_LOADED: i32 = 127;

const PEERS: &[Peer] = &[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd];

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
