//! Names that images record: QEMU finds by them what we made, and we what it made.

use std::path::Path;
use std::time::Duration;

use bitferry_tests::image::make;
use bitferry_tests::migration::command;
use bitferry_tests::qemu::{info, qemu_img};
use bitferry_tests::{Exit, Peer, Run, Scratch, json, require, require_all};

const MIB: u64 = 1 << 20;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo])
}

#[track_caller]
fn copy(scratch: &Scratch, words: &str) {
    command(scratch, &format!("copy {words}")).output().expect_no_crash().expect_exit(Exit::Done);
}

/// Reads through an image as a program that was started in `dir` does.
#[track_caller]
fn reads(dir: &Path, image: &str, pattern: u8) {
    let read = format!("read -P {pattern} 0 64k");
    let run = Run::new("qemu-io").args(["-r", "-f", "qcow2", "-c", &read]).arg(image).dir(dir);
    let output = run.output();
    assert!(output.status.success() && !output.text().contains("verification"), "{output}");
}

/// A QEMU of either version that was started in `dir` opens the image with all that it names.
#[track_caller]
fn opens(dir: &Path, image: &str) {
    for peer in [Peer::Qemu10, Peer::Qemu72] {
        let Some(program) = require(peer) else { return };
        let drive = format!("file={image},format=qcow2,if=none,id=x,read-only=on");
        let run = Run::new(program).dir(dir).patience(Duration::from_secs(30));
        let run = run.words("-M none -display none -nodefaults -monitor none -qmp stdio -drive");
        let run = run.arg(drive).stdin("{\"execute\":\"qmp_capabilities\"}{\"execute\":\"quit\"}");
        let output = run.output();
        assert!(output.status.success() && output.complaint().is_empty(), "{output}");
    }
}

/// What we read through both is the same.
#[track_caller]
fn same(scratch: &Scratch, a: &str, b: &str) {
    let line = format!("compare --allow-backing --bitmaps=none {a} {b}");
    command(scratch, &line).output().expect_exit(Exit::Done);
}

#[test]
fn a_colon_makes_no_protocol_of_a_name() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let dir = scratch.dir();
    make(&scratch, "a.qcow2", 4 * MIB).write(7, 0, MIB).done();
    for (given, recorded) in
        [("a:b.raw", "./a:b.raw"), ("./c:d.raw", "./c:d.raw"), ("file:e.raw", "e.raw")]
    {
        copy(&scratch, &format!("-o data_file={given},data_file_raw=on a.qcow2 out.qcow2"));
        let found = info(&scratch.path("out.qcow2"), "qcow2");
        let data = &found["format-specific"]["data"];
        assert_eq!(data["data-file"], recorded, "{found}");
        assert!(dir.join(recorded).exists(), "{:?}", scratch.names());
        reads(dir, "out.qcow2", 7);
        opens(dir, "out.qcow2");
        same(&scratch, "a.qcow2", "out.qcow2");
        std::fs::remove_file(scratch.path("out.qcow2")).expect("remove");
    }
    for given in ["json:{}", "nbd://host/export"] {
        let line = format!("-o data_file={given} a.qcow2 out.qcow2");
        for command_line in
            [format!("copy {line}"), format!("receive -o data_file={given} --disk a=out unix:s")]
        {
            let output = command(&scratch, &command_line).output().expect_exit(Exit::Usage);
            assert!(output.complaint().contains("is no plain path"), "{output}");
        }
    }
    // A backing file that is kept.
    make(&scratch, "b:c.qcow2", 4 * MIB).write(1, 0, MIB).done();
    make(&scratch, "top.qcow2", 4 * MIB).backing("./b:c.qcow2", "qcow2").write(2, MIB, MIB).done();
    copy(&scratch, "--backing ./b:c.qcow2 top.qcow2 kept.qcow2");
    assert_eq!(info(&scratch.path("kept.qcow2"), "qcow2")["backing-filename"], "./b:c.qcow2");
    for (place, name) in
        [(dir, "kept.qcow2".to_owned()), (Path::new("/"), path(&scratch, "kept.qcow2"))]
    {
        reads(place, &name, 1);
        opens(place, &name);
    }
    same(&scratch, "top.qcow2", "kept.qcow2");
}

fn path(scratch: &Scratch, name: &str) -> String {
    scratch.path(name).display().to_string()
}

#[test]
fn names_as_others_write_them_are_read_where_they_have_one_meaning() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    make(&scratch, "base.raw", 4 * MIB).format("raw").write(5, 0, MIB).done();
    let made = |named: &str| {
        let run = qemu_img("create").words("-q -u -f qcow2 -F raw -b").arg(named);
        run.arg(scratch.path("top.qcow2")).arg((4 * MIB).to_string()).ok();
    };
    for named in ["./base.raw".to_owned(), format!("file:{}", path(&scratch, "base.raw"))] {
        made(&named);
        reads(Path::new("/"), &path(&scratch, "top.qcow2"), 5);
        same(&scratch, "base.raw", "top.qcow2");
    }
    // QEMU finds it only from there, and other things elsewhere.
    for named in ["file:base.raw", "nbd://localhost/x", "json:{\"driver\":\"null-co\"}"] {
        made(named);
        let output = command(&scratch, "hash --allow-backing top.qcow2").output();
        let output = output.expect_exit(Exit::Device);
        assert!(output.complaint().contains("not a plain path"), "{output}");
    }
}

#[test]
fn a_link_into_another_directory_names_nothing_relative() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    make(&scratch, "a.qcow2", 4 * MIB).write(7, 0, MIB).done();
    std::fs::create_dir(scratch.path("far")).expect("a directory");
    make(&scratch, "far/old.qcow2", 4 * MIB).done();
    std::os::unix::fs::symlink("far/old.qcow2", scratch.path("link.qcow2")).expect("a link");
    for line in [
        "copy --force -o data_file=x.raw,data_file_raw=on a.qcow2 link.qcow2",
        "receive --force -o data_file=x.raw --disk a=link.qcow2 unix:s",
    ] {
        let output = command(&scratch, line).output().expect_exit(Exit::Usage);
        assert!(output.complaint().contains("symbolic link into another directory"), "{output}");
    }
    let data = path(&scratch, "x.raw");
    copy(&scratch, &format!("--force -o data_file={data},data_file_raw=on a.qcow2 link.qcow2"));
    for name in ["link.qcow2", "far/old.qcow2"] {
        reads(Path::new("/"), &path(&scratch, name), 7);
        same(&scratch, "a.qcow2", name);
    }
    // A backing file is recorded so that it is found by either name.
    make(&scratch, "top.qcow2", 4 * MIB).backing("a.qcow2", "qcow2").write(2, MIB, MIB).done();
    copy(&scratch, "--force --backing a.qcow2 top.qcow2 link.qcow2");
    for name in ["link.qcow2", "far/old.qcow2"] {
        reads(Path::new("/"), &path(&scratch, name), 7);
        same(&scratch, "top.qcow2", name);
    }
    // A link within one directory has one meaning.
    std::fs::remove_file(scratch.path("link.qcow2")).expect("remove");
    make(&scratch, "near.qcow2", 4 * MIB).done();
    std::os::unix::fs::symlink("near.qcow2", scratch.path("link.qcow2")).expect("a link");
    copy(&scratch, "--force -o data_file=y.raw,data_file_raw=on a.qcow2 link.qcow2");
    let info = command(&scratch, "info --json near.qcow2").ok();
    assert_eq!(json::document(&info)["data-file"], "y.raw");
    reads(scratch.dir(), "near.qcow2", 7);
}
