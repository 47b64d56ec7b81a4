//! A kill at any system call that changes a file: a destination is absent, the old one or whole, and
//! the same command gets there.

use std::path::{Path, PathBuf};

use bitferry_tests::faults::kill_at_each_change;
use bitferry_tests::image::make;
use bitferry_tests::{Exit, Output, Peer, Scratch, bitferry, require_all};

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
