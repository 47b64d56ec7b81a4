//! The `bitmap` verbs, held against what QEMU sees.

use std::time::{Duration, Instant};

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::process::PATIENCE;
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, qemu, require_all};

const MIB: u64 = 1 << 20;

fn run(line: &str, scratch: &Scratch) -> Output {
    bitferry().dir(scratch.dir()).words(line).output().expect_no_crash()
}

fn has_qemu() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

#[test]
fn qemu_records_into_bitmaps_that_were_added_here() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).done();
    for line in ["bitmap add a.qcow2 on", "bitmap add -g 4K --disabled a.qcow2 off"] {
        let output = run(line, &scratch).expect_exit(Exit::Done);
        assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{output}");
    }
    qemu::qemu_io(&image, "qcow2", ["write -P 1 3M 68k"]);
    qemu::check_is_clean(&image);
    let dirty = run("bitmap dump a.qcow2 on", &scratch).expect_exit(Exit::Done).text();
    assert_eq!(dirty, format!("{} 131072\n", 3 * MIB));
    assert_eq!(run("bitmap dump a.qcow2 off", &scratch).expect_exit(Exit::Done).text(), "");

    run("bitmap merge a.qcow2 on off", &scratch).expect_exit(Exit::Done);
    run("bitmap clear a.qcow2 on", &scratch).expect_exit(Exit::Done);
    run("bitmap enable a.qcow2 off", &scratch).expect_exit(Exit::Done);
    qemu::qemu_io(&image, "qcow2", ["write -P 2 10M 4k"]);
    let here = |name| qemu::dirty_ranges(&image, name).unwrap();
    assert_eq!(here("on"), [10 * MIB..10 * MIB + 65536]);
    assert_eq!(here("off"), [3 * MIB..3 * MIB + 131072, 10 * MIB..10 * MIB + 4096]);

    let listed = run("bitmap list --json a.qcow2", &scratch).expect_exit(Exit::Done).text();
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed["bitmaps"][1]["dirty-bytes"], 131072 + 4096);
    run("bitmap remove a.qcow2 on off", &scratch).expect_exit(Exit::Done);
    assert!(qemu::dirty_ranges(&image, "on").is_err());
    qemu::check_is_clean(&image);
}

#[test]
fn bitmaps_of_another_image_are_merged() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", 64 * MIB).bitmap("b", 65536).write(1, MIB, 512).done();
    let into = make(&scratch, "b.qcow2", 64 * MIB).bitmap("all", 1 << 20).done();
    make(&scratch, "small.qcow2", 32 * MIB).bitmap("b", 65536).done();
    run("bitmap merge -b a.qcow2 b.qcow2 b all", &scratch).expect_exit(Exit::Done);
    assert_eq!(qemu::dirty_ranges(&into, "all").unwrap(), [MIB..2 * MIB]);
    run("bitmap merge -b small.qcow2 b.qcow2 b all", &scratch).expect_exit(Exit::Usage);
    run("bitmap merge b.qcow2 all", &scratch).expect_exit(Exit::Usage);
}

#[test]
fn the_last_bitmap_named_takes_the_others_in_and_help_says_so() {
    let usage = "bitmap merge [OPTIONS] <IMAGE> <SRC>... <DST>";
    let help = bitferry().words("bitmap merge --help").output().expect_exit(Exit::Done).text();
    assert!(help.contains(usage), "{help}");
    let short = bitferry().words("bitmap merge a.qcow2 b").output().expect_exit(Exit::Usage);
    assert!(short.complaint().contains("<DST>"), "{short}");
    let scratch = Scratch::new();
    bitferry().arg("man").arg(scratch.dir()).output().expect_exit(Exit::Done);
    let page = std::fs::read_to_string(scratch.path("bitferry-bitmap-merge.1")).expect("page");
    assert!(page.contains("<\\fISRC\\fR> <\\fIDST\\fR>"), "{page}");
    assert!(page.contains("takes them in: the last one named"), "{page}");
    if !has_qemu() {
        return;
    }
    let image = make(&scratch, "a.qcow2", 64 * MIB).bitmap("b1", 65536).write(1, MIB, 512);
    let image = image.bitmap("b2", 65536).write(1, 2 * MIB, 512).bitmap("b3", 65536).done();
    run("bitmap merge a.qcow2 b1 b2 b3", &scratch).expect_exit(Exit::Done);
    let ranges = |name| qemu::dirty_ranges(&image, name).unwrap();
    assert_eq!(ranges("b3"), [MIB..MIB + 65536, 2 * MIB..2 * MIB + 65536]);
    assert_eq!(ranges("b2"), [2 * MIB..2 * MIB + 65536]);
}

#[test]
fn wrong_wishes_change_nothing() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).bitmap("b", 65536).done();
    std::fs::write(scratch.path("raw.img"), vec![0; 65536]).unwrap();
    let before = std::fs::read(&image).unwrap();
    for (line, exit) in [
        ("bitmap add -g 1000 a.qcow2 x", Exit::Usage),
        ("bitmap add -g 256 a.qcow2 x", Exit::Usage),
        ("bitmap add -g 4G a.qcow2 x", Exit::Usage),
        ("bitmap add a.qcow2 b", Exit::Usage),
        ("bitmap remove a.qcow2 b nope", Exit::Usage),
        ("bitmap remove a.qcow2", Exit::Usage),
        ("bitmap dump a.qcow2 nope", Exit::Usage),
        ("bitmap repair --strip --clear-unfinished a.qcow2", Exit::Usage),
        ("bitmap check raw.img", Exit::Usage),
        ("bitmap add raw.img b", Exit::Usage),
        ("bitmap check nowhere.qcow2", Exit::Device),
    ] {
        let output = run(line, &scratch).expect_exit(exit);
        assert!(output.complaint().starts_with("error: "), "{output}");
        assert_eq!(std::fs::read(&image).unwrap(), before, "{line}");
    }
}

#[test]
fn a_raw_disk_is_told_where_its_bitmaps_would_be() {
    let scratch = Scratch::new();
    for (name, bytes) in [("raw.img", 65536), ("short.img", 7), ("empty.img", 0)] {
        std::fs::write(scratch.path(name), vec![0; bytes]).unwrap();
        for verb in ["add", "remove", "clear", "check", "repair --strip", "repair"] {
            let bitmap = if matches!(verb, "add" | "remove" | "clear") { "b" } else { "" };
            let line = format!("bitmap {verb} {name} {bitmap}");
            let complaint = run(&line, &scratch).expect_exit(Exit::Usage).complaint();
            assert!(complaint.contains("is no qcow2 image"), "{line}: {complaint}");
            assert!(complaint.contains("\nhint: a raw disk has bitmaps in an overlay"), "{line}");
        }
        assert_eq!(std::fs::read(scratch.path(name)).unwrap(), vec![0; bytes]);
    }
}

#[test]
fn an_image_in_use_is_refused_saying_by_whom() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).bitmap("b", 65536).done();
    let before = std::fs::read(&image).unwrap();
    // Built first: that may take longer than the image stays in use.
    bitferry_tests::bitferry::binary();
    let user = Run::new("qemu-io").args(["-c", "sleep 30000"]).arg(&image).spawn();
    // QEMU marks the bitmap as being in use when it has opened the image.
    let started = Instant::now();
    while std::fs::read(&image).unwrap() == before {
        assert!(started.elapsed() < PATIENCE, "qemu-io did not open the image");
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = run("bitmap clear a.qcow2 b", &scratch).expect_exit(Exit::Device);
    let complaint = output.complaint();
    assert!(complaint.contains(&format!("in use by qemu-io (pid {})", user.id())), "{output}");
    assert!(!complaint.contains("this process"), "{output}");
    user.kill();

    // What the dead process had open is not to be trusted; check says so, repair removes it on
    // demand.
    run("bitmap check a.qcow2", &scratch).expect_exit(Exit::Different);
    run("bitmap dump a.qcow2 b", &scratch).expect_exit(Exit::Device);
    run("bitmap repair a.qcow2", &scratch).expect_exit(Exit::Different);
    run("bitmap repair --remove-inconsistent a.qcow2", &scratch).expect_exit(Exit::Done);
    run("bitmap check a.qcow2", &scratch).expect_exit(Exit::Done);
    qemu::check_is_clean(&image);
}

#[test]
fn an_image_by_its_content_alone_is_changed_with_a_warning() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", MIB).done();
    std::fs::copy(scratch.path("a.qcow2"), scratch.path("disk.img")).unwrap();
    for line in ["bitmap add disk.img b", "bitmap repair disk.img"] {
        let output = run(line, &scratch).expect_exit(Exit::Done);
        assert!(output.complaint().contains("the guest of a raw disk"), "{output}");
    }
    assert!(run("bitmap -q add disk.img d", &scratch).expect_exit(Exit::Done).stderr.is_empty());
    assert!(run("bitmap add a.qcow2 b", &scratch).expect_exit(Exit::Done).stderr.is_empty());
}

#[test]
fn a_stale_bitmap_that_is_asked_for_by_name_would_be_lost() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).bitmap("b", 65536).done();
    // Somebody who does not know bitmaps has written to it.
    Bytes::of(&image).put64(88, 0);
    for line in [
        "copy --bitmaps b a.qcow2 c.qcow2",
        "copy --bitmaps b --rename-bitmap b=x a.qcow2 c.qcow2",
        "send --bitmaps b --disk vda=a.qcow2 unix:nobody",
        "send --bitmaps b --rename-bitmap vda/b=x --disk vda=a.qcow2 unix:nobody",
        "send --dialect qemu:7.2 --bitmaps b --disk vda=a.qcow2 unix:nobody",
    ] {
        let output = run(line, &scratch).expect_exit(Exit::Refused);
        assert!(output.complaint().contains("made invalid"), "{output}");
    }
    run("copy --bitmaps b --skip-broken-bitmaps a.qcow2 c.qcow2", &scratch)
        .expect_exit(Exit::NotPreserved);
    // Where all are listed, a name that is not there is a slip.
    make(&scratch, "d.qcow2", 64 * MIB).bitmap("b", 65536).done();
    run("copy --bitmaps x d.qcow2 e.qcow2", &scratch).expect_exit(Exit::Usage);
}

#[test]
fn strip_removes_all() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).bitmap("b", 65536).bitmap("c", 4096).done();
    run("bitmap repair --strip a.qcow2", &scratch).expect_exit(Exit::Done);
    assert!(qemu::dirty_ranges(&image, "b").is_err());
    qemu::check_is_clean(&image);
}
