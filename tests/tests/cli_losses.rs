//! What a copy does not carry, or would destroy, is named or refused.

use bitferry_tests::image::make;
use bitferry_tests::{Exit, Output, Peer, Scratch, bitferry, json, qemu, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;

fn has_qemu() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo])
}

fn run(scratch: &Scratch, line: &str) -> Output {
    bitferry().dir(scratch.dir()).words(line).output().expect_no_crash()
}

/// Whether a loss of that bitmap of that file is named.
fn names(not_carried: &Value, bitmap: &str, file: &str) -> bool {
    let phrases = not_carried.as_array().expect("phrases").iter().filter_map(Value::as_str);
    let bitmap = format!("{bitmap:?}");
    phrases.filter(|p| p.contains(&bitmap) && p.contains(file)).count() == 1
}

#[test]
fn bitmaps_of_lower_layers_are_named_where_they_are_left() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "base.qcow2", 8 * MIB).bitmap("nightly", 65536).write(1, 0, MIB).done();
    let middle = make(&scratch, "middle.qcow2", 8 * MIB).backing("base.qcow2", "qcow2");
    middle.bitmap("weekly", 65536).done();
    let top = make(&scratch, "top.qcow2", 8 * MIB).backing("middle.qcow2", "qcow2");
    top.bitmap("own", 65536).write(2, 2 * MIB, MIB).done();
    let shown = |line: &str| {
        let output = run(&scratch, line).expect_exit(Exit::Done);
        json::lines(&output.text()).pop().expect("a document")
    };
    for (line, field) in [
        ("copy --json --dry-run --flatten top.qcow2 f.qcow2", ""),
        ("copy --json --flatten top.qcow2 f.qcow2", "/disks/0"),
        ("copy --json --flatten -O raw --bitmaps none top.qcow2 f.raw", "/disks/0"),
        ("send --json --dry-run --allow-backing --disk a=top.qcow2 tcp:127.0.0.1:1", "/disks/0"),
    ] {
        let document = shown(line);
        let lost = document.pointer(&format!("{field}/not-carried")).expect("not-carried");
        assert!(names(lost, "nightly", "base.qcow2"), "{line}\n{document}");
        assert!(names(lost, "weekly", "middle.qcow2"), "{line}\n{document}");
        assert!(!names(lost, "own", "top.qcow2"), "{line}\n{document}");
    }
    // What the copy stands on keeps its own.
    let kept = shown("copy --json --allow-backing --backing base.qcow2 top.qcow2 k.qcow2");
    let lost = &kept["disks"][0]["not-carried"];
    assert!(names(lost, "weekly", "middle.qcow2") && !names(lost, "nightly", "base"), "{kept}");

    let info = shown("info --json --allow-backing top.qcow2");
    assert_eq!(info["backing-chain"][0]["bitmaps"], serde_json::json!(["weekly"]), "{info}");
    let text = run(&scratch, "info --allow-backing top.qcow2").expect_exit(Exit::Done).text();
    assert!(text.contains("on disk, bitmaps nightly\n"), "{text}");
}

#[test]
fn a_raw_disk_is_not_written_over_an_image() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", 2 * MIB).write(7, 0, MIB).done();
    let to = make(&scratch, "to.qcow2", 2 * MIB).bitmap("b", 65536).snapshot("s").done();
    let length = std::fs::metadata(&to).expect("metadata").len();
    make(&scratch, "fits.qcow2", length).write(7, 0, 65536).done();
    let before = std::fs::read(&to).expect("read");
    for line in ["", "--dry-run "] {
        let line = format!("copy {line}--in-place -O raw fits.qcow2 to.qcow2");
        let output = run(&scratch, &line).expect_exit(Exit::Refused);
        let complaint = output.complaint();
        assert!(
            complaint.contains("is a qcow2 image") && complaint.contains("--force"),
            "{output}"
        );
    }
    assert!(std::fs::read(&to).expect("read") == before, "it was written to");
    run(&scratch, "copy --in-place -O qcow2 a.qcow2 to.qcow2").expect_exit(Exit::Done);
    run(&scratch, "copy --force -O raw a.qcow2 to.qcow2").expect_exit(Exit::Done);
    qemu::same_content((&scratch.path("a.qcow2"), "qcow2"), (&to, "raw"));

    // A raw disk whose guest keeps an image there: what came before is what comes again.
    let outer = scratch.path("outer.img");
    std::fs::write(&outer, &before).expect("write");
    std::fs::write(scratch.path("copy.img"), vec![0; before.len()]).expect("write");
    for _ in 0..2 {
        let line = "copy --fresh --in-place -f raw -O raw outer.img copy.img";
        run(&scratch, line).expect_exit(Exit::Done);
    }
    assert!(std::fs::read(scratch.path("copy.img")).expect("read") == before);
}

#[test]
fn a_raw_file_of_another_size_is_refused_whichever_is_longer() {
    if !has_qemu() {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", 2 * MIB).write(7, 0, MIB).done();
    for size in [MIB, 2 * MIB - 512, 2 * MIB + 512, 0] {
        let old = vec![9; usize::try_from(size).expect("small")];
        std::fs::write(scratch.path("to.raw"), &old).expect("write");
        let output =
            run(&scratch, "copy --in-place -O raw a.qcow2 to.raw").expect_exit(Exit::Usage);
        assert!(output.complaint().contains("a disk of another size"), "{output}");
        assert!(std::fs::read(scratch.path("to.raw")).expect("read") == old, "{size}");
    }
    // The last sector of a file that is no multiple of sectors is read as a whole one.
    std::fs::write(scratch.path("to.raw"), vec![9; 2 * (1 << 20) - 100]).expect("write");
    run(&scratch, "copy --in-place -O raw a.qcow2 to.raw").expect_exit(Exit::Done);
    qemu::same_content((&scratch.path("a.qcow2"), "qcow2"), (&scratch.path("to.raw"), "raw"));
}
