//! A kill at any system call that changes a file: a destination is absent, the old one or whole,
//! and the same command gets there; never is there a bitmap that is present and stale.

use std::path::{Path, PathBuf};

use bitferry_tests::faults::{is_killed, kill_at_each_change};
use bitferry_tests::image::make;
use bitferry_tests::qemu::{check, dirty_ranges, qemu_img, same_content, same_disk};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, require_all};

const MIB: u64 = 1 << 20;

const PEERS: &[Peer] = &[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd, Peer::Strace];

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// An image with two bitmaps.
fn source(scratch: &Scratch, name: &str, pattern: u8) -> PathBuf {
    let image = make(scratch, name, 4 * MIB).write(pattern, 0, MIB).bitmap("b0", 65536);
    let image = image.write(pattern + 1, 2 * MIB, MIB / 2).bitmap("b1", 4096);
    image.write(pattern + 2, 4 * MIB - 65536, 65536).done()
}

/// Whether two images read the same, with their bitmaps.
fn is_copy(source: &Path, copy: &Path) -> bool {
    let run = bitferry().words("compare --allow-backing").arg(source).arg(copy);
    run.output().expect_no_crash().code() == Some(Exit::Done as i32)
}

fn remove(scratch: &Scratch, names: impl IntoIterator<Item = String>) {
    names.into_iter().for_each(|name| std::fs::remove_file(scratch.path(&name)).expect("a file"));
}

/// What is to replace a destination of its own kind.
struct Kind {
    wishes: &'static [&'static str],
    /// What a copy of it leaves.
    files: &'static [&'static str],
    /// How often a kill comes at each kind of call at most.
    kills: usize,
}

const RAW: Kind = Kind {
    wishes: &["-O", "raw", "--bitmaps=none"],
    files: &[".copy.bitferry-receipt", "copy"],
    kills: 3,
};

const QCOW2: Kind = Kind { wishes: &[], files: RAW.files, kills: 6 };

const OVERLAY: Kind = Kind {
    wishes: &["-o", "data_file=copy.raw,data_file_raw=on"],
    files: &[".copy.bitferry-receipt", "copy", "copy.raw"],
    kills: 6,
};

/// Kills `copy --force` over a destination of this kind.
fn replace(kind: &Kind) {
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    let (old, new) = (source(&scratch, "old", 1), source(&scratch, "new", 11));
    let copy = scratch.path("copy");
    let sources = scratch.names();
    let (from, to) = (text(&new), text(&copy));
    let command = [&["copy", "--force"], kind.wishes, &[&from, &to]].concat();
    let prepare = || {
        remove(&scratch, scratch.names().into_iter().filter(|name| !sources.contains(name)));
        let run = bitferry().arg("copy").args(kind.wishes).arg(&old).arg(&copy);
        run.output().expect_exit(Exit::Done);
    };
    let judge = |output: &Output| {
        // Of two files one may be the new one already. They are not read together then: the data
        // file comes first, and the bitmaps of the old overlay are not valid any more.
        if kind.files.len() == RAW.files.len() {
            assert!(is_copy(&old, &copy) || is_copy(&new, &copy), "{output}");
        }
        let again = bitferry().args(&command).output().expect_no_crash();
        assert_eq!(again.code(), Some(Exit::Done as i32), "{output}{again}");
        assert!(is_copy(&new, &copy), "{output}");
        let left = scratch.names().into_iter().filter(|name| !sources.contains(name));
        assert_eq!(left.collect::<Vec<_>>(), kind.files, "{output}");
    };
    kill_at_each_change(&command, kind.kills, prepare, judge);
}

#[test]
fn a_raw_file_is_replaced_by_the_same_command_after_a_kill() {
    replace(&RAW);
}

#[test]
fn an_image_is_replaced_by_the_same_command_after_a_kill() {
    replace(&QCOW2);
}

#[test]
fn an_overlay_is_replaced_by_the_same_command_after_a_kill() {
    replace(&OVERLAY);
}

#[test]
fn a_copy_that_is_killed_is_absent_or_whole_and_made_by_the_same_command() {
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    let (source, copy) = (source(&scratch, "source", 1), scratch.path("copy"));
    let (from, to) = (text(&source), text(&copy));
    let command = ["copy", &from, &to];
    let prepare = || {
        remove(&scratch, scratch.names().into_iter().filter(|name| name != "source"));
    };
    let judge = |output: &Output| {
        if copy.exists() {
            same_disk(&source, &copy, &["b0", "b1"]);
        }
        let again = bitferry().args(command).output().expect_no_crash();
        assert_eq!(again.code(), Some(Exit::Done as i32), "{output}{again}");
        same_disk(&source, &copy, &["b0", "b1"]);
        assert_eq!(scratch.names(), [".copy.bitferry-receipt", "copy", "source"], "{output}");
    };
    kill_at_each_change(&command, 5, prepare, judge);
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
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    let source = source(&scratch, "source", 1);
    let copy = existing(&scratch, 4 * MIB);
    let before = scratch.path("before");
    std::fs::copy(&copy, &before).expect("copy");
    let sources = ["before", "content.raw", "existing", "source"].map(str::to_owned);
    let (from, to) = (text(&source), text(&copy));
    let command = ["copy", "--in-place", &from, &to];
    let mut was_unfinished = false;
    let prepare = || {
        remove(&scratch, scratch.names().into_iter().filter(|name| !sources.contains(name)));
        std::fs::copy(&before, &copy).expect("copy");
    };
    let judge = |output: &Output| {
        let found = after_in_place(&scratch, output);
        was_unfinished |= found == Found::Unfinished;
        assert!(is_killed(output) || found == Found::Done, "{found:?}\n{output}");
        bitferry().args(command).output().expect_exit(Exit::Done);
        assert_eq!(after_in_place(&scratch, output), Found::Done);
    };
    kill_at_each_change(&command, 4, prepare, judge);
    assert!(was_unfinished, "no kill hit the middle");
}

#[test]
fn bitmap_verbs_that_are_killed_leave_right_or_invalid_bitmaps() {
    if !require_all(PEERS) {
        return;
    }
    let verbs = [
        "add IMAGE new",
        "remove IMAGE b0",
        "clear IMAGE b0",
        "enable IMAGE off",
        "disable IMAGE b0",
        "merge IMAGE b0 b1",
        "repair --remove-inconsistent IMAGE",
        "repair --strip IMAGE",
    ];
    let scratch = Scratch::new();
    let image = make(&scratch, "image", 8 * MIB).write(1, 0, MIB).bitmap("lost", 65536).done();
    // Who dies with an image open leaves no bitmap of it to be trusted.
    Run::new("qemu-io").args(["-c", "abort"]).arg(&image).output();
    for (name, more) in [("b0", "-g 64k"), ("b1", "-g 64k"), ("off", "--disabled")] {
        let add = bitferry().words("bitmap add").words(more).arg(&image).arg(name);
        add.output().expect_exit(Exit::Done);
    }
    bitferry_tests::qemu::qemu_io(&image, "qcow2", ["write -P 2 4M 1M", "write -P 3 1M 1M"]);
    let [before, after] = ["before", "after"].map(|name| scratch.path(name));
    std::fs::copy(&image, &before).expect("copy");
    let names = ["b0", "b1", "off", "new", "lost"];
    let bitmaps = |image: &Path| names.map(|name| dirty_ranges(image, name).ok());
    let were = bitmaps(&before);
    assert!(were[0].is_some() && were[4].is_none(), "{were:?}");
    for verb in verbs {
        let to = text(&image);
        let words: Vec<&str> =
            verb.split(' ').map(|w| if w == "IMAGE" { &to } else { w }).collect();
        let command = [&["bitmap"], words.as_slice()].concat();
        let prepare = || {
            std::fs::copy(&before, &image).expect("copy");
        };
        prepare();
        bitferry().args(&command).output().expect_exit(Exit::Done);
        std::fs::copy(&image, &after).expect("copy");
        let now = bitmaps(&after);
        // Many kills leave the same, and who reads it starts many processes.
        let mut seen = vec![std::fs::read(&before).expect("read")];
        let judge = |output: &Output| {
            let left = std::fs::read(&image).expect("read");
            if seen.contains(&left) {
                return;
            }
            seen.push(left);
            assert_eq!(check(&image).corruptions, 0, "{output}");
            same_content((&image, "qcow2"), (&before, "qcow2"));
            let found = bitmaps(&image);
            for (index, found) in found.into_iter().enumerate().filter(|(_, f)| f.is_some()) {
                let may_be = [&were[index], &now[index]];
                assert!(may_be.contains(&&found), "{}: {found:?}\n{output}", names[index]);
            }
        };
        kill_at_each_change(&command, 3, prepare, judge);
    }
}
