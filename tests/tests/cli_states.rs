//! Files in a condition in which something is not done to them: the exit status says whose fault it
//! is, and the hint what to do, in words that can be typed.

use std::path::Path;
use std::time::{Duration, Instant};

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::process::{PATIENCE, Run};
use bitferry_tests::{Exit, Output, Peer, Scratch, bitferry, qemu, require_all};
use qcow2_file::layout::header::incompatible;

const MIB: u64 = 1 << 20;
/// Where the incompatible features stand in the header.
const INCOMPATIBLE_AT: u64 = 72;

fn has_qemu() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo])
}

fn run(scratch: &Scratch, line: &str) -> Output {
    bitferry().dir(scratch.dir()).words(line).output().expect_no_crash()
}

/// Refused with that status, that word in the error and that one in the hint.
#[track_caller]
fn is_refused(output: &Output, exit: Exit, error: &str, hint: &str) {
    let complaint = output.clone().expect_exit(exit).complaint();
    let (said, todo) = complaint.split_once("\nhint: ").unwrap_or_default();
    assert!(said.contains(error), "{error}\n{output}");
    assert!(todo.contains(hint) && !todo.contains("bitferry help"), "{hint}\n{output}");
}

#[test]
fn marks_of_the_header_are_told_with_their_remedy() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "good.qcow2", 8 * MIB).write(1, 0, MIB).done();
    let check = "`qemu-img check -r all a.qcow2`";
    let clear = "--clear-unfinished a.qcow2`";
    for (mark, exit, error, hint) in [
        (incompatible::DIRTY, Exit::Device, "not closed", check),
        (incompatible::CORRUPT, Exit::Malformed, "marked corrupt", check),
        (incompatible::UNFINISHED_COPY, Exit::Device, "not finished", clear),
    ] {
        let image = make(&scratch, "a.qcow2", 8 * MIB).bitmap("b", 65536).done();
        Bytes::of(&image).put64(INCOMPATIBLE_AT, mark);
        let is_unfinished = mark == incompatible::UNFINISHED_COPY;
        let lines = match is_unfinished {
            true => ["copy a.qcow2 b.qcow2", "hash a.qcow2"],
            false => ["bitmap add a.qcow2 n", "copy --in-place good.qcow2 a.qcow2"],
        };
        for line in lines {
            is_refused(&run(&scratch, line), exit, error, hint);
        }
        std::fs::remove_file(&image).expect("remove");
    }
}

#[test]
fn what_an_image_stands_on_is_told_with_its_remedy() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "base.qcow2", MIB).done();
    let unsafely = |name: &str, backing: &str| {
        let create = qemu::qemu_img("create").words("-q -u -f qcow2 -F qcow2 -b").arg(backing);
        create.arg(scratch.path(name)).arg("1M").ok();
    };
    unsafely("one.qcow2", "two.qcow2");
    unsafely("two.qcow2", "one.qcow2");
    let output = run(&scratch, "copy --flatten one.qcow2 new.qcow2");
    is_refused(&output, Exit::Malformed, "occurs twice", "qemu-img rebase -u -b");
    let json = r#"json:{"driver":"file","filename":"base.qcow2"}"#;
    for (name, backing) in [("json.qcow2", json), ("file.qcow2", "file:base.qcow2")] {
        unsafely(name, backing);
        let output = run(&scratch, &format!("copy --flatten {name} new.qcow2"));
        is_refused(&output, Exit::Device, "not a plain path", "qemu-img rebase -u -b");
    }
    std::fs::write(scratch.path("bare.luks"), [b"LUKS\xba\xbe".as_slice(), &[0; 9000]].concat())
        .expect("write");
    for line in ["info bare.luks", "copy bare.luks new.raw"] {
        is_refused(&run(&scratch, line), Exit::Device, "looks like luks", "-f raw");
    }
    assert!(!scratch.path("new.qcow2").exists() && !scratch.path("new.raw").exists());
}

/// Opens the image by `qemu-io` and kills that, so that the bitmaps were never saved.
fn leave_open(image: &Path) {
    let before = std::fs::read(image).expect("read");
    let user = Run::new("qemu-io").args(["-c", "sleep 30000"]).arg(image).spawn();
    let started = Instant::now();
    // It takes several writes until each bitmap is marked.
    let mut last = before.clone();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = std::fs::read(image).expect("read");
        if now != before && now == last {
            break;
        }
        last = now;
        assert!(started.elapsed() < PATIENCE, "qemu-io did not open the image");
    }
    user.kill();
}

#[test]
fn every_verb_on_an_inconsistent_bitmap_says_how_it_is_removed() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 8 * MIB).bitmap("b", 65536).bitmap("c", 65536).done();
    leave_open(&image);
    run(&scratch, "bitmap add a.qcow2 ok").expect_exit(Exit::Done);
    for line in [
        "bitmap clear a.qcow2 b",
        "bitmap enable a.qcow2 b",
        "bitmap disable a.qcow2 b",
        "bitmap merge a.qcow2 b ok",
        "bitmap merge a.qcow2 ok b",
        "bitmap dump a.qcow2 b",
    ] {
        let hint = "`bitferry bitmap repair --remove-inconsistent a.qcow2`";
        is_refused(&run(&scratch, line), Exit::Device, "\"b\" was not saved", hint);
    }
    let output = run(&scratch, "copy a.qcow2 b.qcow2").expect_exit(Exit::Refused);
    assert!(output.complaint().contains("--skip-broken-bitmaps"), "{output}");
    run(&scratch, "bitmap repair --remove-inconsistent a.qcow2").expect_exit(Exit::Done);
    qemu::check_is_clean(&image);
}

#[test]
fn a_format_is_asked_for_by_the_option_that_says_it() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", MIB).done();
    std::fs::copy(scratch.path("a.qcow2"), scratch.path("b.raw")).expect("copy");
    for (line, words) in [
        ("copy -f qcow2 --in-place a.qcow2 b.raw", "-O raw or -O qcow2"),
        ("compare -f qcow2 a.qcow2 b.raw", "-F raw or -F qcow2"),
        ("compare b.raw a.qcow2", "-f raw or -f qcow2"),
        ("hash b.raw", "-f raw or -f qcow2"),
    ] {
        let output = run(&scratch, line).expect_exit(Exit::Usage);
        assert!(output.complaint().contains(words), "{words}\n{output}");
    }
}

#[test]
fn an_image_that_would_be_its_own_data_file_is_told_so() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", MIB).done();
    std::fs::write(scratch.path("vm.raw"), [7; 4096]).expect("write");
    for (line, option) in [
        ("copy --force", "data_file=vm.raw"),
        ("copy --force", "data_file=./vm.raw"),
        ("copy", "data_file=new.raw"),
    ] {
        let image = if line == "copy" { "./new.raw" } else { "vm.raw" };
        let line = format!("{line} -O qcow2 -o {option},data_file_raw=on a.qcow2 {image}");
        let output = run(&scratch, &line).expect_exit(Exit::Usage);
        assert!(output.complaint().contains("are the same place"), "{output}");
    }
    assert_eq!(std::fs::read(scratch.path("vm.raw")).expect("read"), [7; 4096]);
}
