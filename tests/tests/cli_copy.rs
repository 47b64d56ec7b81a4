//! `copy`, `info`, `compare` and `hash` as a user meets them: words, JSON, exit statuses, Ctrl-C.
//! What is copied right is held elsewhere.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, Instant, SystemTime};

use bitferry_tests::device::Small;
use bitferry_tests::image::make;
use bitferry_tests::process::{PATIENCE, Run};
use bitferry_tests::{Exit, Output, Peer, Scratch, bitferry, json, qemu, require_all};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

fn run(line: &str, scratch: &Scratch) -> Output {
    bitferry().dir(scratch.dir()).words(line).output().expect_no_crash()
}

/// An image with two bitmaps, of which one records and holds bits.
fn image(scratch: &Scratch) -> bool {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return false;
    }
    let image = make(scratch, "a.qcow2", 64 * MIB).disabled_bitmap("off", 4096);
    image.bitmap("on", 65536).write(7, 3 * MIB, 65536).done();
    true
}

#[test]
fn the_summary_says_what_became_of_everything() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    let text = run("copy a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done).text();
    for part in ["copied a.qcow2 -> b.qcow2 in ", "64 KiB, and ", "read back and equal", "bf1:"] {
        assert!(text.contains(part), "{part}:\n{text}");
    }
    assert!(
        text.contains("  on      preserved\n") || text.contains("  on      preserved"),
        "{text}"
    );
    let quiet = run("copy -q --force a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    assert!(quiet.stdout.is_empty() && quiet.stderr.is_empty(), "{quiet}");

    let output =
        run("copy --json --fresh --force a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    let events = json::lines(&output.text());
    let phases: Vec<_> = events.iter().filter(|e| e["event"] == "phase").collect();
    assert_eq!(phases.first().unwrap()["phase"], "plan");
    assert_eq!(phases.last().unwrap()["phase"], "publish");
    let summary = json::summary(&output);
    assert_eq!(summary["status"], "completed");
    assert_eq!(summary["disks"][0]["bytes-data"], 65536);
    assert_eq!(summary["disks"][0]["verified"], "yes");
    let bitmaps = summary["disks"][0]["bitmaps"].as_array().unwrap();
    assert_eq!(bitmaps.len(), 2);
    assert!(bitmaps.iter().all(|b| b["outcome"] == "preserved"), "{summary}");
}

#[test]
fn statuses_are_those_of_the_contract() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    run("copy a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    for (line, exit, word) in [
        ("copy -o cluster_size=4K a.qcow2 b.qcow2", Exit::Device, "--force"),
        ("copy nowhere.qcow2 c.qcow2", Exit::Device, "nowhere.qcow2"),
        ("copy -O raw a.qcow2 c.raw", Exit::Refused, "--bitmaps none"),
        ("copy --bitmaps nope a.qcow2 c.qcow2", Exit::Usage, "nope"),
        ("copy -o cluster_size=3K a.qcow2 c.qcow2", Exit::Usage, "cluster"),
        ("hash nowhere.qcow2", Exit::Device, "nowhere.qcow2"),
    ] {
        let output = run(line, &scratch).expect_exit(exit);
        let complaint = output.complaint();
        assert!(complaint.starts_with("error: ") && complaint.contains("\nhint: "), "{output}");
        assert!(complaint.contains(word), "{word}: {output}");
        let failed = run(&format!("{line} --json"), &scratch).expect_exit(exit);
        if line.starts_with("copy") {
            assert_eq!(json::summary(&failed)["status"], "failed");
            assert!(json::summary(&failed)["error"].is_string(), "{failed}");
        }
    }
    assert_eq!(scratch.names(), [".b.qcow2.bitferry-receipt", "a.qcow2", "b.qcow2"]);

    run("compare a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    qemu::qemu_io(&scratch.path("b.qcow2"), "qcow2", ["write -P 9 5M 512"]);
    let output = run("compare --json a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Different);
    let document = json::document(&output.text());
    assert_eq!(document["equal"], false);
    assert_eq!(document["content"]["first-difference"], 5 * MIB);
}

#[test]
fn the_same_copy_again_is_complete_until_somebody_touches_it() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    make(&scratch, "base.qcow2", 64 * MIB).write(3, 9 * MIB, MIB).done();
    make(&scratch, "over.qcow2", 64 * MIB)
        .backing("base.qcow2", "qcow2")
        .bitmap("on", 65536)
        .write(4, 9 * MIB, 65536)
        .done();
    let shapes = [
        ("copy --json a.qcow2 b.qcow2", "yes"),
        ("copy --json --no-verify a.qcow2 b.qcow2", "no"),
        ("copy --json -o data_file=b.data,data_file_raw=on a.qcow2 b.qcow2", "yes"),
        ("copy --json --backing base.qcow2 --allow-backing over.qcow2 b.qcow2", "yes"),
        ("copy --json --in-place a.qcow2 old.qcow2", "yes"),
        ("copy --json --in-place --no-verify a.qcow2 old.qcow2", "no"),
        ("copy --json --in-place --bitmaps none a.qcow2 old.raw", "yes"),
    ];
    for (line, verified) in shapes {
        make(&scratch, "old.qcow2", 64 * MIB).done();
        std::fs::File::create(scratch.path("old.raw")).unwrap().set_len(64 * MIB).unwrap();
        let summary = || {
            let summary = json::summary(&run(line, &scratch).expect_exit(Exit::Done));
            let disk = summary["disks"][0].clone();
            assert_eq!(disk["verified"], verified, "{summary}");
            (summary["status"].as_str().expect("a status").to_owned(), disk)
        };
        let (status, first) = summary();
        assert_eq!(status, "completed", "{line}");
        let (status, again) = summary();
        assert_eq!(status, "already-complete", "{line}");
        assert_eq!((&again["bytes-data"], &again["bytes-zero"]), (&0.into(), &0.into()), "{line}");
        assert_eq!(again["content-hash"], first["content-hash"], "{line}");
        assert_eq!(again["bitmaps"], first["bitmaps"], "{line}");
        // A copy that somebody has written to, or whose bitmaps were changed, is no copy.
        let image = line.rsplit(' ').next().expect("a destination");
        if image.ends_with(".raw") {
            std::fs::write(scratch.path(image), vec![1; 64 * MIB as usize]).unwrap();
        } else {
            run(&format!("bitmap add {image} new"), &scratch).expect_exit(Exit::Done);
        }
        let output = run(line, &scratch);
        if line.contains("in-place") {
            let summary = json::summary(&output.expect_exit(Exit::Done));
            assert_eq!(summary["status"], "completed", "{line}: {summary}");
        } else {
            assert!(output.expect_exit(Exit::Device).complaint().contains("exists"), "{line}");
        }
        // Nor is one whose source was written to.
        let over = if line.contains("in-place") { "" } else { " --force" };
        let completes = |words: &str| {
            let output = run(&format!("{line}{over}{words}"), &scratch).expect_exit(Exit::Done);
            assert_eq!(json::summary(&output)["status"], "completed", "{line}");
        };
        completes(" --fresh");
        let source = if line.contains("over.qcow2") { "over.qcow2" } else { "a.qcow2" };
        qemu::qemu_io(&scratch.path(source), "qcow2", ["write -P 9 5M 512"]);
        completes("");
        for name in ["b.qcow2", "b.data"] {
            let _ = std::fs::remove_file(scratch.path(name));
        }
    }
}

#[test]
fn a_receipt_speaks_for_nothing_that_nobody_read() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    let status = |line: &str| {
        let output = run(line, &scratch).expect_exit(Exit::Done);
        json::summary(&output)["status"].as_str().expect("a status").to_owned()
    };
    // Read as something else it is another disk.
    std::fs::write(scratch.path("r"), vec![5; MIB as usize]).unwrap();
    assert_eq!(status("copy --json -f raw -O raw r r.copy"), "completed");
    assert_eq!(status("copy --json -f raw -O raw r r.copy"), "already-complete");
    let other = run("copy --json -f qcow2 -O raw r r.copy", &scratch);
    assert_ne!(other.code(), Some(0), "{other}");
    // A source that somebody writes to without a lock while it is read: what was read is copied,
    // and what it is now is another copy.
    make(&scratch, "w.qcow2", 64 * MIB).write(1, 0, 8 * MIB).done();
    let slow = "copy --json --bandwidth 4M w.qcow2 w.copy";
    let copying = bitferry().dir(scratch.dir()).words(slow).spawn();
    copying.wait_for(false, |line| line.contains("\"done\":").then_some(()));
    let path = scratch.path("w.qcow2");
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[9; 512], 5 * MIB).unwrap();
    let output = copying.wait().expect_exit(Exit::Done);
    assert!(output.text().contains("was written to while"), "{output}");
    let again = run("copy --json w.qcow2 w.copy", &scratch).expect_exit(Exit::Device);
    assert!(again.complaint().contains("exists"), "{again}");
    // Nor can a data file have the name of a receipt.
    run("copy -o data_file=.d.bitferry-receipt a.qcow2 d", &scratch).expect_exit(Exit::Usage);
    // Nor an image that of what is kept beside another.
    run("copy a.qcow2 .e.bitferry-journal.new", &scratch).expect_exit(Exit::Usage);
    std::fs::copy(scratch.path("a.qcow2"), scratch.path(".e.bitferry-receipt")).expect("copy");
    let output = run("copy a.qcow2 e", &scratch).expect_exit(Exit::Usage);
    assert!(output.complaint().contains("is an image"), "{output}");
}

#[test]
fn what_is_between_an_image_and_its_kept_backing_file_is_not_lost() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    make(&scratch, "base", 64 * MIB).write(1, 0, MIB).done();
    make(&scratch, "wrong", 64 * MIB).write(2, 0, MIB).done();
    make(&scratch, "middle", 64 * MIB).backing("base", "qcow2").write(3, MIB, MIB).done();
    make(&scratch, "top", 64 * MIB).backing("middle", "qcow2").write(4, 2 * MIB, MIB).done();
    for base in ["base", "wrong"] {
        let line = format!("copy --backing {base} top d");
        let output = run(&line, &scratch).expect_exit(Exit::Refused);
        assert!(output.complaint().contains("--allow-backing"), "{output}");
    }
    run("copy --backing base middle d", &scratch).expect_exit(Exit::Done);
    run("copy --allow-backing --backing base top e", &scratch).expect_exit(Exit::Done);
    for (image, copy) in [("middle", "d"), ("top", "e")] {
        qemu::same_content((&scratch.path(image), "qcow2"), (&scratch.path(copy), "qcow2"));
    }
    // Another file that reads the same is taken by its own format, and for its content alone.
    run("copy -O raw --bitmaps none base base.raw", &scratch).expect_exit(Exit::Done);
    let over = "copy --allow-backing -f qcow2 --backing base.raw middle f";
    run(&format!("{over} --no-verify"), &scratch).expect_exit(Exit::Refused);
    let output = run(over, &scratch);
    let info = qemu::qemu_img("info").arg("--output=json").arg(scratch.path("f")).ok();
    assert!(output.code() == Some(0) && info.contains("\"raw\""), "{output}{info}");
    qemu::same_content((&scratch.path("middle"), "qcow2"), (&scratch.path("f"), "qcow2"));
    run("copy --allow-backing --backing wrong middle g", &scratch).expect_exit(Exit::Different);
}

#[test]
fn compare_takes_bitmaps_with_a_value_and_without() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    run("copy --bitmaps on a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    run("copy -O raw --bitmaps none a.qcow2 c.raw", &scratch).expect_exit(Exit::Done);
    let compared = |line: &str, exit| {
        let output = run(&format!("compare --json -F {line}"), &scratch).expect_exit(exit);
        let document = json::document(&output.text());
        let bitmaps = document["bitmaps"].as_array().expect("a list").iter();
        let names = bitmaps.map(|b| b["name"].as_str().expect("text").to_owned());
        names.collect::<Vec<_>>()
    };
    let none = [""; 0];
    assert_eq!(compared("raw a.qcow2 c.raw", Exit::Done), none);
    assert_eq!(compared("raw --bitmaps a.qcow2 c.raw", Exit::Different), ["off", "on"]);
    assert_eq!(compared("raw a.qcow2 --bitmaps c.raw", Exit::Different), ["off", "on"]);
    assert_eq!(compared("raw --bitmaps=none a.qcow2 c.raw", Exit::Done), none);
    assert_eq!(compared("qcow2 a.qcow2 b.qcow2", Exit::Different), ["off", "on"]);
    assert_eq!(compared("qcow2 --bitmaps=on a.qcow2 b.qcow2", Exit::Done), ["on"]);
    assert_eq!(compared("qcow2 a.qcow2 b.qcow2 --bitmaps=all", Exit::Different), ["off", "on"]);
    let output = run("compare --bitmaps=on,nope a.qcow2 b.qcow2", &scratch);
    assert!(output.expect_exit(Exit::Usage).complaint().contains("\"nope\""));
}

#[test]
fn a_dry_run_writes_nothing() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    let text = run("copy --dry-run a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done).text();
    assert!(text.contains("carried") && text.contains("nothing was written"), "{text}");
    run("copy --dry-run -O raw a.qcow2 b.raw", &scratch).expect_exit(Exit::Refused);
    let output = run("copy --dry-run --json a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    assert_eq!(json::summary(&output)["event"], "plan");
    assert!(json::summary(&output)["space-needed"].is_u64(), "{output}");
    assert_eq!(scratch.names(), ["a.qcow2"]);
}

/// The dry run ends as the command does, and says why.
#[track_caller]
fn foretells(words: &str, exit: Exit, scratch: &Scratch) {
    let planned = run(&format!("copy --dry-run {words}"), scratch).expect_exit(exit);
    let done = run(&format!("copy {words}"), scratch).expect_exit(exit);
    let complaint = done.complaint();
    let why = complaint.lines().next().expect("an error").trim_start_matches("error: ");
    let why = why.trim_start_matches("refused, nothing was written: ");
    let said = planned.text() + &planned.complaint();
    assert!(said.contains(why), "{why}\n{planned}");
}

#[test]
fn a_dry_run_foretells_what_the_command_says() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    for (name, size) in [("long.raw", 65), ("short.raw", 63)] {
        std::fs::File::create(scratch.path(name)).unwrap().set_len(size * MIB).unwrap();
    }
    make(&scratch, "small.qcow2", 32 * MIB).done();
    make(&scratch, "used.qcow2", 64 * MIB).done();
    let user = bitferry_tests::Run::new("qemu-io").args(["-c", "sleep 60000", "-c", "quit"]);
    let user = user.arg(scratch.path("used.qcow2")).spawn();
    let used = || run("copy --in-place --dry-run a.qcow2 used.qcow2", &scratch).code();
    let begun = Instant::now();
    while used() == Some(0) {
        assert!(begun.elapsed() < PATIENCE, "nobody uses it");
    }
    foretells("--in-place a.qcow2 used.qcow2", Exit::Device, &scratch);
    foretells("--in-place --bitmaps none a.qcow2 used.qcow2", Exit::Device, &scratch);
    user.kill();
    for (words, exit) in [
        ("--in-place -O raw --bitmaps none a.qcow2 long.raw", Exit::Usage),
        ("--in-place a.qcow2 small.qcow2", Exit::Usage),
        ("--in-place a.qcow2 nowhere.qcow2", Exit::Device),
        ("--in-place a.qcow2 a.qcow2", Exit::Usage),
        ("a.qcow2 small.qcow2", Exit::Device),
        ("a.qcow2 nowhere/b.qcow2", Exit::Device),
        ("-O raw a.qcow2 b.raw", Exit::Refused),
        ("--bitmaps nope a.qcow2 b.qcow2", Exit::Usage),
        ("-o data_file=b.qcow2 a.qcow2 b.qcow2", Exit::Usage),
    ] {
        foretells(words, exit, &scratch);
    }
    if let Some(small) = Small::at(&scratch.path("small"), "size=1m") {
        std::fs::write(scratch.path("small/old"), [0; 512]).unwrap();
        small.resize("ro");
        foretells("a.qcow2 small/new", Exit::Device, &scratch);
        foretells("--force a.qcow2 small/old", Exit::Device, &scratch);
        foretells("-o data_file=small/data a.qcow2 new", Exit::Device, &scratch);
    }
    // What would be done is: shorter files grow.
    run("copy --dry-run --in-place -O raw --bitmaps none a.qcow2 short.raw", &scratch)
        .expect_exit(Exit::Done);
    assert_eq!(scratch.path("short.raw").metadata().unwrap().len(), 63 * MIB);
    for words in ["a.qcow2 b.qcow2", "--in-place -O raw --bitmaps none a.qcow2 short.raw"] {
        run(&format!("copy {words}"), &scratch).expect_exit(Exit::Done);
        let plan = run(&format!("copy --dry-run --json {words}"), &scratch);
        let plan = json::summary(&plan.expect_exit(Exit::Done));
        let said = (&plan["already-complete"], &plan["refusals"]);
        assert_eq!(said, (&true.into(), &serde_json::json!([])), "{plan}");
        let plan = run(&format!("copy --dry-run {words}"), &scratch).expect_exit(Exit::Done);
        assert!(plan.text().contains("already complete"), "{plan}");
        let done = run(&format!("copy --json {words}"), &scratch).expect_exit(Exit::Done);
        assert_eq!(json::summary(&done)["status"], "already-complete");
    }
}

#[test]
fn looking_verbs_print_one_document() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    let info = json::document(&run("info --json a.qcow2", &scratch).text());
    for key in ["filename", "format", "virtual-size", "disk-size", "cluster-size", "bitmaps"] {
        assert!(!info[key].is_null(), "{key}: {info}");
    }
    assert_eq!(info["bitmaps"][1]["dirty-bytes"], 65536);
    assert_eq!(info["bitmaps"][0]["enabled"], false);
    let hashes = json::document(&run("hash --json a.qcow2", &scratch).text());
    let text = run("hash a.qcow2", &scratch).expect_exit(Exit::Done).text();
    let first = text.split_whitespace().next().unwrap();
    assert!(first.starts_with("bf1:") && first.len() == 68, "{text}");
    assert_eq!(hashes["content-hash"], first);
    let text = run("info a.qcow2", &scratch).expect_exit(Exit::Done).text();
    assert!(text.contains("virtual size: 64 MiB (67108864 bytes)\n"), "{text}");
}

#[test]
fn after_ctrl_c_the_same_command_goes_on() {
    let scratch = Scratch::new();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    make(&scratch, "a.qcow2", 1024 * MIB).write(1, 0, 512 * MIB).done();
    let copy = bitferry().dir(scratch.dir()).words("copy --json a.qcow2 b.qcow2").spawn();
    let started = Instant::now();
    while scratch.names().len() == 1 {
        assert!(started.elapsed() < PATIENCE, "the copy did not begin");
        std::thread::sleep(Duration::from_millis(1));
    }
    copy.signal(Signal::INT);
    let output = copy.wait();
    assert_eq!(output.code(), Some(130), "{output}");
    assert_eq!(json::summary(&output)["status"], "interrupted");
    assert_eq!(scratch.names(), [".b.qcow2.bitferry-journal", ".b.qcow2.bitferry-part", "a.qcow2"]);
    let again = run("copy --json a.qcow2 b.qcow2", &scratch).expect_exit(Exit::Done);
    let summary = json::summary(&again);
    assert_eq!((&summary["resumed"], &summary["status"]), (&true.into(), &"completed".into()));
    assert_eq!(scratch.names(), [".b.qcow2.bitferry-receipt", "a.qcow2", "b.qcow2"]);
}

#[test]
fn info_shows_the_chain_when_it_may() {
    let scratch = Scratch::new();
    if !image(&scratch) {
        return;
    }
    make(&scratch, "over.qcow2", 64 * MIB).backing("a.qcow2", "qcow2").done();
    let text = run("info over.qcow2", &scratch).expect_exit(Exit::Done).text();
    assert!(text.contains("backing file: a.qcow2 (not opened)\n"), "{text}");
    let text = run("info --allow-backing over.qcow2", &scratch).expect_exit(Exit::Done).text();
    assert!(text.contains("below:      a.qcow2, qcow2, 64 MiB, "), "{text}");
    let output = run("info --json --allow-backing over.qcow2", &scratch).expect_exit(Exit::Done);
    let document = json::document(&output.text());
    assert_eq!(document["backing-chain"][0]["format"], "qcow2");
    std::fs::remove_file(scratch.path("a.qcow2")).unwrap();
    run("info --allow-backing over.qcow2", &scratch).expect_exit(Exit::Device);
    run("info over.qcow2", &scratch).expect_exit(Exit::Done);
}

#[test]
fn a_limit_is_kept_and_can_be_interrupted() {
    let scratch = Scratch::new();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    make(&scratch, "big.qcow2", 64 * MIB).write(7, 0, 12 * MIB).done();
    let output = run("copy --json --bandwidth 8M big.qcow2 copy.qcow2", &scratch);
    let output = output.expect_exit(Exit::Done);
    // The last MiB of twelve is read when the others are paid for, but for a burst.
    let took = json::summary(&output)["total-time-ms"].as_u64().expect("a time");
    assert!(took >= 1_000, "{output}");
    let begun = Instant::now();
    let slow = bitferry().dir(scratch.dir()).words("copy --bandwidth 1K big.qcow2 never.qcow2");
    let child = slow.spawn();
    let until = begun + PATIENCE;
    while !scratch.path(".never.qcow2.bitferry-part").exists() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    child.signal(Signal::INT);
    let output = child.wait();
    assert_eq!(output.code(), Some(130), "{output}");
    let kept = [".never.qcow2.bitferry-journal", ".never.qcow2.bitferry-part"];
    let done = [".copy.qcow2.bitferry-receipt", "copy.qcow2"];
    assert_eq!(scratch.names(), [done[0], kept[0], kept[1], "big.qcow2", done[1]]);
}

#[test]
fn bitmaps_of_a_destination_end_as_without_an_interruption() {
    let scratch = Scratch::new();
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let source = make(&scratch, "a.qcow2", 64 * MIB).write(7, MIB, 12 * MIB);
    let source = source.bitmap("nightly", 65536).write(8, 40 * MIB, 65536).done();
    let whole = make(&scratch, "whole.qcow2", 64 * MIB).write(1, 30 * MIB, MIB);
    let whole = whole.bitmap("nightly", 65536).bitmap("own", 65536).disabled_bitmap("old", 512);
    let whole = whole.write(2, 50 * MIB, MIB).done();
    let cut = scratch.path("cut.qcow2");
    std::fs::copy(&whole, &cut).expect("copy");
    let copy = |to: &str| format!("copy --json --in-place a.qcow2 {to}");
    let expected = run(&copy("whole.qcow2"), &scratch).expect_exit(Exit::Done);
    for _ in 0..2 {
        let slow =
            bitferry().dir(scratch.dir()).words(&format!("{} --bandwidth 4M", copy("cut.qcow2")));
        let child = slow.spawn();
        child.wait_for(false, |line| {
            let event: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_there = event["phase"] == "transfer" && event["done"].as_u64()? >= 2 * MIB;
            is_there.then_some(())
        });
        child.signal(Signal::INT);
        child.wait().expect_exit(Exit::Interrupted);
    }
    let resumed = run(&copy("cut.qcow2"), &scratch).expect_exit(Exit::Done);
    let (resumed, expected) = (json::summary(&resumed), json::summary(&expected));
    assert_eq!(resumed["resumed"], true, "{resumed}");
    assert_eq!(resumed["disks"][0]["bitmaps"], expected["disks"][0]["bitmaps"]);
    qemu::same_disk(&source, &cut, &["nightly"]);
    qemu::same_disk(&whole, &cut, &["nightly", "own", "old"]);
}

/// The attributes are cp's: what it has in the same place, the copy has too.
#[test]
fn attributes_follow_the_words_of_cp() {
    let scratch = Scratch::new();
    let source = scratch.path("a.raw");
    std::fs::write(&source, vec![7; 1 << 16]).expect("file");
    let is_root = rustix::process::getuid().is_root();
    if is_root {
        std::os::unix::fs::chown(&source, Some(12345), Some(54321)).expect("owner");
    }
    std::fs::set_permissions(&source, PermissionsExt::from_mode(0o604)).expect("mode");
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_123);
    let file = std::fs::File::options().write(true).open(&source).expect("file");
    file.set_modified(long_ago).expect("times");
    let cases = [
        ("", "--preserve=mode,ownership"),
        ("--preserve", "--preserve"),
        ("--preserve=timestamps --no-preserve=ownership", "--preserve=mode,timestamps"),
        ("--no-preserve=mode", "--preserve=ownership --no-preserve=mode"),
        ("--no-preserve=all", "--no-preserve=all"),
    ];
    for (ours, theirs) in cases {
        let line = format!("copy -f raw {ours} --force --fresh a.raw ours");
        run(&line, &scratch).expect_exit(Exit::Done);
        let _ = std::fs::remove_file(scratch.path("theirs"));
        let cp = Run::new("cp").dir(scratch.dir()).words(theirs).words("a.raw theirs").output();
        assert!(cp.status.success(), "{cp}");
        let [ours, theirs] = ["ours", "theirs"].map(|name| scratch.path(name).metadata().unwrap());
        let of = |found: &std::fs::Metadata| (found.mode(), found.uid(), found.gid());
        assert_eq!(of(&ours), of(&theirs), "{line}");
        let is_old = |found: &std::fs::Metadata| found.modified().unwrap() == long_ago;
        assert_eq!(is_old(&ours), is_old(&theirs), "{line}");
        // What it replaces is not the model of the next one.
        std::fs::remove_file(scratch.path("ours")).expect("there");
    }
    run("copy -f raw --preserve=colour a.raw b.raw", &scratch).expect_exit(Exit::Usage);
    run("copy -f raw --preserve a.raw host:b.raw", &scratch).expect_exit(Exit::Usage);
}
