//! `inspect`: captures of real QEMUs as people and programs see them, and damaged ones.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use bitferry_tests::bitferry::workspace;
use bitferry_tests::image::make;
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, require_all};

/// Captures, and the lines of text each takes.
const CAPTURES: &[&str] = &[
    "q72-block-full.bin.gz",
    "q72-block-zeroblocks.bin.gz",
    "q72-block-inc.bin.gz",
    "q100-dirty-bitmap-two.bin.gz",
    "q100-ram-precopy.bin.gz",
    "q100-xbzrle.bin.gz",
    "q100-mapped-ram.bin.gz",
    "q100-multifd-nocomp.main.bin",
    "q72-multifd-nocomp.main.bin.gz",
    "q72-multifd-nocomp.ch0.bin.gz",
    "q72-multifd-nocomp.ch1.bin.gz",
    "q100-multifd-nocomp.ch1.bin.gz",
    "q100-multifd-zlib.ch0.bin.gz",
    "q100-multifd-zstd.ch0.bin.gz",
    "q100-postcopy-preempt.main.cut.bin.gz",
    "q100-postcopy-preempt.preempt.bin.gz",
    "q100-postcopy-preempt.returnpath.bin",
];

fn data(name: &str) -> PathBuf {
    workspace().join("format-spec/tests/data").join(name)
}

fn load(name: &str) -> Vec<u8> {
    if name.ends_with(".gz") {
        let output = Run::new("gzip").arg("-dc").arg(data(name)).output();
        assert!(output.status.success(), "{output}");
        return output.stdout;
    }
    std::fs::read(data(name)).unwrap()
}

fn inspect(bytes: &[u8], options: &[&str]) -> Output {
    let scratch = Scratch::new();
    let path = scratch.path("stream");
    std::fs::write(&path, bytes).unwrap();
    bitferry().arg("inspect").args(options).arg(path).output().expect_no_crash()
}

#[test]
fn captures_are_shown_as_text() {
    let golden = workspace().join("tests/tests/data/inspect");
    let mut wrong = Vec::new();
    for name in CAPTURES {
        let text = inspect(&load(name), &[]).expect_exit(Exit::Done).text();
        assert!(text.lines().count() < 400, "{name}: {} lines", text.lines().count());
        let path = golden.join(name.trim_end_matches(".gz").replace(".bin", ".txt"));
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(&golden).unwrap();
            std::fs::write(&path, &text).unwrap();
        }
        if std::fs::read_to_string(&path).unwrap_or_default() != text {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "UPDATE_GOLDEN=1 rewrites these, which differ: {wrong:?}");
}

#[test]
fn captures_are_one_document() {
    for name in CAPTURES {
        let bytes = load(name);
        let output = inspect(&bytes, &["--json"]);
        assert_eq!(output.code(), Some(0), "{name}: {}", output.complaint());
        let document = json::document(&output.text());
        assert_eq!(document["bytes"], bytes.len(), "{name}");
        assert!(document["error"].is_null(), "{name}");
        let records = document["records"].as_array().unwrap();
        let offsets: Vec<_> = records.iter().map(|r| r["offset"].as_u64().unwrap()).collect();
        assert!(offsets.is_sorted() && offsets[0] == 0, "{name}");
        let kind = match *name {
            name if name.contains(".ch") => "channel",
            name if name.contains(".preempt.") => "preempt",
            name if name.contains("returnpath") => "return-path",
            _ => "main",
        };
        assert_eq!(document["kind"], kind, "{name}");
    }
}

#[test]
fn records_say_what_they_hold() {
    let records = |name: &str| {
        let output = inspect(&load(name), &["--json"]).expect_exit(Exit::Done);
        json::document(&output.text())["records"].as_array().unwrap().clone()
    };
    let bitmaps = records("q100-dirty-bitmap-two.bin.gz");
    let start = bitmaps.iter().find(|r| r["bitmap"] == "bm-set").unwrap();
    assert_eq!(start["type"], "bitmap-start");
    assert_eq!(
        (start["granularity"].as_u64(), start["enabled"].as_bool()),
        (Some(65536), Some(true))
    );
    assert_eq!(bitmaps.iter().filter(|r| r["type"] == "bitmap-complete").count(), 2);
    let parts = bitmaps.iter().filter(|r| r["section"] == "part").count();
    assert!(parts > 1000, "every record is there: {parts}");
    let blocks = records("q72-block-zeroblocks.bin.gz");
    let zeroes = blocks.iter().find(|r| r["content"] == "zeroes").unwrap();
    assert_eq!(
        (zeroes["device"].as_str(), zeroes["disk-offset"].as_u64()),
        (Some("disk0"), Some(1 << 20))
    );
    // 7.2 leaves the size of the packet before in one that has no pages.
    let channel = records("q72-multifd-nocomp.ch0.bin.gz");
    let stale = |r: &&serde_json::Value| r["length"] == 0 && r["next-packet-size"] == 208_896;
    assert!(channel.iter().any(|r| stale(&r)), "{channel:?}");
}

/// What `send` writes is shown as what it says, not as bytes.
#[test]
fn streams_of_our_own_say_what_they_hold() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    make(&scratch, "a.qcow2", 8 << 20).bitmap("nightly", 65536).write(3, 1 << 20, 128 << 10).done();
    let send = bitferry().words("send --disk vda=a.qcow2 file:stream").dir(scratch.dir());
    send.output().expect_exit(Exit::Done);
    let bytes = std::fs::read(scratch.path("stream")).unwrap();
    let text = inspect(&bytes, &[]).expect_exit(Exit::Done).text();
    for said in [
        "OFFER of \"bitferry",
        "nobody answers",
        "disk 0 \"vda\" of 0x800000 bytes",
        "bitmap 0 \"nightly\" of disk 0, generation 1, granularity 65536, 128 bits, enabled",
        "run of disk 0",
        "BARRIER 1",
        "disk 0 sealed: bf1:",
        "bitmap 0 sealed: bf1b:",
        "PREPARE",
        "COMMIT",
    ] {
        assert!(text.contains(said), "{said:?} is missing in {text}");
    }
    let document = json::document(&inspect(&bytes, &["--json"]).expect_exit(Exit::Done).text());
    let records = document["records"].as_array().unwrap();
    let of = |kind: &str| records.iter().filter(|r| r["type"] == kind).collect::<Vec<_>>();
    assert_eq!((of("offer").len(), of("disk").len(), of("commit").len()), (1, 1, 1));
    let data: u64 = of("run").iter().filter(|r| r["content"] == "data").map(length).sum();
    let zeroes: u64 = of("run").iter().filter(|r| r["content"] == "zeroes").map(length).sum();
    assert_eq!((data, data + zeroes), (128 << 10, 8 << 20));
    let damaged = [&bytes[..bytes.len() - 700], &[0; 700][..]].concat();
    inspect(&damaged, &[]).expect_exit(Exit::Malformed);
}

fn length(record: &&serde_json::Value) -> u64 {
    record["length"].as_u64().unwrap()
}

#[test]
fn what_stands_before_the_damage_is_shown() {
    let mut bytes = load("q100-dirty-bitmap-two.bin.gz");
    // The name of the second section begins to be too long for the stream.
    bytes[138] = 9;
    let output = inspect(&bytes, &[]).expect_exit(Exit::Malformed);
    let (text, said) = (output.text(), output.complaint());
    assert!(text.contains("bitmap \"bm-set\" START granularity 65536"), "{output}");
    assert!(text.contains("       138  stopped: element type"), "{output}");
    assert!(said.contains("element type at offset 138 is 0x9"), "{output}");
    let output = inspect(&bytes, &["--json"]).expect_exit(Exit::Malformed);
    let document = json::document(&output.text());
    assert_eq!(document["error"]["offset"], 138);
    assert_eq!(document["error"]["field"], "element type");
    for cut in [9, 60, 137, 20_100] {
        let whole = load("q100-dirty-bitmap-two.bin.gz");
        let output = inspect(&whole[..cut], &["--json"]).expect_exit(Exit::Malformed);
        let document = json::document(&output.text());
        assert!(document["bytes"].as_u64().unwrap() < cut as u64 + 1, "{output}");
        assert!(document["error"]["problem"].as_str().unwrap().contains("needs"), "{output}");
    }
}

#[test]
fn what_it_is_can_be_told_and_input_can_be_piped() {
    let preempt = load("q100-postcopy-preempt.preempt.bin.gz");
    inspect(&preempt, &["--as", "preempt"]).expect_exit(Exit::Done);
    inspect(&preempt, &["--as", "channel"]).expect_exit(Exit::Malformed);
    inspect(&preempt, &["--as", "nothing"]).expect_exit(Exit::Usage);
    inspect(b"hello, world", &[]).expect_exit(Exit::Malformed);
    inspect(b"", &[]).expect_exit(Exit::Malformed);
    let piped = bitferry().words("inspect -").stdin(preempt.clone()).output();
    let text = piped.expect_exit(Exit::Done).text();
    assert_eq!(text, inspect(&preempt, &[]).text());
    bitferry().words("inspect /nowhere/at-all").output().expect_exit(Exit::Device);
}

/// Gigabytes of sections that say nothing, and a name that drives a terminal.
#[test]
fn floods_take_no_memory_and_names_no_terminal() {
    let mut bytes = load("q100-dirty-bitmap-two.bin.gz");
    let part: Vec<u8> = bytes[2464..2464 + 11].to_vec();
    assert_eq!(part[0], 2);
    let flood = part.repeat(400_000);
    bytes.splice(2464..2464, flood);
    let scratch = Scratch::new();
    let path = scratch.path("stream");
    std::fs::write(&path, &bytes).unwrap();
    let run = bitferry().arg("inspect").arg(&path).memory(512 << 20);
    let text = run.output().expect_exit(Exit::Done).text();
    assert!(text.contains("401210 empty PART sections"), "{text}");
    let mut named = b"QEVM\0\0\0\x03\x07\0\0\0\x04a\x1b[m".to_vec();
    named.extend(b"\0");
    let text = inspect(&named, &[]).expect_exit(Exit::Done).text();
    assert!(!text.contains('\x1b') && text.contains("u{1b}"), "{text:?}");
}
