//! Locks held against QEMU, in both directions.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::fs::{self, File};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitferry_tests::image::make;
use bitferry_tests::qemu::{Nbd, qemu_img};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, require, require_all};
use qcow2_file::lock::{Lock, Mode, acquire, acquire_temporary};
use qcow2_file::{Error, Result};

const MIB: u64 = 1 << 20;

/// One test at a time: a process that another one is about to start holds the locks of this one for
/// a moment.
fn alone() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn take(path: &Path, mode: Mode) -> Result<Lock> {
    let file = File::options().read(true).write(true).open(path).unwrap();
    acquire(&file, &Arc::from("image"), mode)
}

#[track_caller]
fn holders(result: Result<Lock>) -> Vec<String> {
    match result {
        Err(Error::InUse { holders, .. }) => holders,
        other => panic!("{other:?}"),
    }
}

fn qemu_writes(path: &Path, format: &str) -> bool {
    let qemu_io = Peer::QemuIo.find().expect("asked before");
    Run::new(qemu_io).args(["-f", format, "-c", "write 0 512"]).arg(path).works()
}

fn qemu_reads(path: &Path, format: &str) -> bool {
    qemu_img("info").args(["-f", format]).arg(path).works()
}

#[test]
fn we_respect_qemu() {
    let _alone = alone();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let scratch = Scratch::new();
    for format in ["qcow2", "raw"] {
        let image = make(&scratch, format, MIB).format(format).done();
        let nbd = Nbd::serve(&image, format, [""; 0]);
        let named = format!("qemu-nbd (pid {})", nbd.id());
        assert_eq!(holders(take(&image, Mode::Write)), [named.as_str()]);
        assert_eq!(holders(take(&image, Mode::Read)), [named.as_str()]);
        nbd.quit();
        let nbd = Nbd::serve(&image, format, ["-r"]);
        let named = format!("qemu-nbd (pid {})", nbd.id());
        drop(take(&image, Mode::Read).unwrap());
        assert_eq!(holders(take(&image, Mode::Write)), [named.as_str()]);
        drop(nbd);
        drop(take(&image, Mode::Write).unwrap());
    }
}

#[test]
fn we_respect_a_running_machine() {
    let _alone = alone();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) || require(Peer::Qemu10).is_none() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a", MIB).done();
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("n", &image, true).unwrap();
    qemu.io("n", "write 0 512");
    let names = holders(take(&image, Mode::Read));
    assert!(names[0].starts_with("qemu-system-x86"), "{names:?}");
    assert!(matches!(take(&image, Mode::Write), Err(Error::InUse { .. })));
    qemu.close("n");
    let lock = take(&image, Mode::Write).unwrap();
    assert!(qemu.open("n", &image, true).is_err());
    drop(lock);
    qemu.open("n", &image, true).unwrap();
    qemu.kill();
    drop(take(&image, Mode::Write).unwrap());
}

#[test]
fn qemu_respects_us() {
    let _alone = alone();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    for format in ["qcow2", "raw"] {
        let image = make(&scratch, format, MIB).format(format).done();
        let lock = take(&image, Mode::Write).unwrap();
        assert!(!qemu_writes(&image, format));
        // QEMU lets anybody read a raw file that is being written, by QEMU or by us.
        assert_eq!(qemu_reads(&image, format), format == "raw");
        assert!(qemu_img("info").args(["-U", "-f", format]).arg(&image).works());
        drop(lock);
        let lock = take(&image, Mode::Read).unwrap();
        assert!(!qemu_writes(&image, format));
        assert!(qemu_reads(&image, format));
        drop(lock);
        assert!(qemu_writes(&image, format));
    }
}

#[test]
fn we_respect_ourselves() {
    let _alone = alone();
    let scratch = Scratch::new();
    let path = scratch.path("a");
    fs::write(&path, "x").unwrap();
    let read = take(&path, Mode::Read).unwrap();
    let also = take(&path, Mode::Read).unwrap();
    let me = format!("this process (pid {})", std::process::id());
    assert_eq!(holders(take(&path, Mode::Write)), [me.as_str()]);
    drop(read);
    assert_eq!(holders(take(&path, Mode::Write)).len(), 1);
    drop(also);
    let write = take(&path, Mode::Write).unwrap();
    assert_eq!(holders(take(&path, Mode::Write)), [me.as_str()]);
    assert_eq!(holders(take(&path, Mode::Read)), [me.as_str()]);
    drop(write);
    // A refused attempt leaves nothing behind.
    drop(take(&path, Mode::Write).unwrap());
    // A file opened for reading only can be taken for writing.
    let file = File::open(&path).unwrap();
    let lock = acquire(&file, &Arc::from("image"), Mode::Write).unwrap();
    drop(file);
    assert!(take(&path, Mode::Read).is_err());
    drop(lock);
    drop(take(&path, Mode::Read).unwrap());
}

/// `info` and `bitmap list` look at what is in use, too, and say that it is, and by whom.
#[test]
fn what_is_looked_at_while_it_is_in_use_is_said_to_be() {
    let _alone = alone();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", MIB).bitmap("b", 65536).done();
    let look = |words: &str| bitferry().words(words).arg(&image).output().expect_exit(Exit::Done);
    let nbd = Nbd::serve(&image, "qcow2", [""; 0]);
    let named = format!("is in use by qemu-nbd (pid {})", nbd.id());
    for words in ["info", "bitmap list"] {
        let output = look(words);
        assert!(output.complaint().contains(&named), "{output}");
        assert!(output.complaint().contains("not stored before it is closed"), "{output}");
        let text = output.text();
        assert!(text.contains("64 KiB       in use") && !text.contains("inconsistent"), "{output}");
        let document = json::document(&look(&format!("{words} --json")).text());
        assert_eq!(document["in-use"], true, "{document}");
        assert!(look(&format!("{words} -q")).stderr.is_empty());
    }
    // Nobody was kept off by that.
    assert_eq!(holders(take(&image, Mode::Read)).len(), 1);
    nbd.quit();
    for nbd in [Some(Nbd::serve(&image, "qcow2", ["-r"])), None] {
        for words in ["info --json", "bitmap list --json"] {
            let output = look(words);
            let document = json::document(&output.text());
            assert_eq!(document.get("in-use"), None, "{document}");
            assert_eq!(document["bitmaps"][0]["inconsistent"], false, "{document}");
            assert!(output.stderr.is_empty(), "{output}");
        }
        drop(nbd);
    }
}

#[test]
fn a_temporary_file_has_one_writer_and_the_right_name() {
    let _alone = alone();
    let scratch = Scratch::new();
    let path = scratch.path(".a.bitferry-part");
    let open = || File::options().read(true).write(true).create(true).truncate(false).open(&path);
    let first = open().unwrap();
    let lock = acquire_temporary(&first, &path).unwrap().expect("the name is ours");
    assert!(matches!(acquire_temporary(&open().unwrap(), &path), Err(Error::InUse { .. })));
    // The image in it can be taken as an image besides.
    drop(acquire(&first, &Arc::from("image"), Mode::Write).unwrap());
    assert!(acquire_temporary(&open().unwrap(), &path).is_err());
    let second = open().unwrap();
    fs::rename(&path, scratch.path("a")).unwrap();
    drop(lock);
    assert!(acquire_temporary(&second, &path).unwrap().is_none());
    fs::write(&path, "another").unwrap();
    assert!(acquire_temporary(&second, &path).unwrap().is_none());
    drop(acquire_temporary(&open().unwrap(), &path).unwrap().expect("the name is ours"));
}
