//! Real QEMUs as sources, our destination: what arrives in the image is what the source had.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry::copy::Rename;
use bitferry::qemu::Version;
use bitferry::qemu::incoming::IncomingOptions;
use bitferry::report::{BitmapOutcome, BitmapReport, Status};
use bitferry_tests::bitferry::bitferry as command;
use bitferry_tests::image::make;
use bitferry_tests::incoming::{Received, Receiver, places, replay};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::{Exit, Peer, Scratch, qemu, require_all};
use serde_json::{Value, json};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const TOOLS: [Peer; 2] = [Peer::QemuImg, Peer::QemuIo];

fn have(peer: Peer) -> bool {
    require_all(&[peer]) && require_all(&TOOLS)
}

/// A QEMU without a guest that has these disks: name of the backend, of the node, image, format.
fn source(peer: Peer, disks: &[(&str, &str, &Path, &str)]) -> Qemu {
    let mut args: Vec<String> = ["-machine", "none"].map(str::to_owned).to_vec();
    for (id, node, path, format) in disks {
        let (path, name) = (path.display(), format!("if=none,id={id},node-name={node}"));
        args.extend(["-drive".to_owned(), format!("{name},file={path},format={format}")]);
    }
    Qemu::start(peer, args)
}

fn add_bitmap(qemu: &mut Qemu, node: &str, name: &str, granularity: u64, flags: (bool, bool)) {
    let (persistent, disabled) = flags;
    qemu.ok(
        "block-dirty-bitmap-add",
        json!({
            "node": node, "name": name, "granularity": granularity, "persistent": persistent,
            "disabled": disabled,
        }),
    );
}

fn migrate(qemu: &mut Qemu, receiver: Receiver, arguments: Value) -> Received {
    let mut arguments = arguments;
    arguments["uri"] = receiver.uri().into();
    qemu.ok("migrate", arguments);
    receiver.wait()
}

/// What QEMU says of a node's bitmaps: granularity, recording, count, hash.
fn described(qemu: &mut Qemu, node: &str) -> Vec<(String, Value, Value, String)> {
    let mut found = Vec::new();
    for bitmap in qemu.bitmaps(node) {
        let name = bitmap["name"].as_str().unwrap().to_owned();
        let hash = qemu.bitmap_hash(node, &name);
        found.push((name, bitmap["granularity"].clone(), bitmap["count"].clone(), hash));
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// The same, of an image at rest, by a QEMU of its own.
fn stored(image: &Path) -> Vec<(String, Value, Value, String)> {
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("n", image, false).unwrap();
    let found = described(&mut qemu, "n");
    assert!(qemu.bitmaps("n").iter().all(|b| b["inconsistent"] != true), "{}", image.display());
    qemu.quit();
    found
}

/// Whether a stored bitmap is enabled, by name.
fn is_enabled(image: &Path, name: &str) -> bool {
    let info = qemu::info(image, "qcow2");
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array().unwrap().clone();
    let found = bitmaps.iter().find(|b| b["name"] == name).unwrap();
    found["flags"].as_array().unwrap().iter().any(|flag| flag == "auto")
}

#[track_caller]
fn outcome<'r>(received: &'r Received, disk: &str, bitmap: &str) -> &'r BitmapReport {
    let disk = received.report().disks.iter().find(|d| d.id == disk).unwrap();
    disk.bitmaps.iter().find(|b| b.name == bitmap).unwrap()
}

#[track_caller]
fn is_complete(received: &Received) {
    let report = received.report();
    assert_eq!(report.status, Status::Completed, "{report:?}");
    assert_eq!(bitferry::exit_status(report), 0, "{report:?}");
}

fn long_name(first: char) -> String {
    std::iter::once(first).chain("ö".repeat(127).chars()).collect()
}

/// Two disks of odd sizes, bitmaps of all kinds.
fn bitmaps_arrive(peer: Peer, capabilities: &[&str]) {
    if !have(peer) || !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let sizes = [5 * MIB + 3 * 512, 64 * MIB];
    let image = |name: &str, size: u64| make(&scratch, name, size).done();
    let [a, b] = [image("a", sizes[0]), image("b", sizes[1])];
    let [to_a, to_b] = [image("to-a", sizes[0]), image("to-b", sizes[1])];
    let mut qemu = source(peer, &[("disk0", "n0", &a, "qcow2"), ("disk1", "n1", &b, "qcow2")]);
    let long = long_name('l');
    assert_eq!(long.len(), 255);
    add_bitmap(&mut qemu, "n0", "kept", 64 * KIB, (true, false));
    add_bitmap(&mut qemu, "n0", "transient", 512, (false, false));
    add_bitmap(&mut qemu, "n0", &long, MIB, (true, false));
    add_bitmap(&mut qemu, "n1", "kept", 4 * KIB, (true, false));
    add_bitmap(&mut qemu, "n1", "empty", 1 << 31, (true, true));
    for command in ["write -P 1 128k 64k", "write -P 2 5m 1k", "write -P 3 0 512"] {
        qemu.io("disk0", command);
    }
    add_bitmap(&mut qemu, "n0", "late", 64 * KIB, (true, false));
    qemu.ok("block-dirty-bitmap-disable", json!({ "node": "n0", "name": "kept" }));
    for at in (0..64).step_by(3) {
        qemu.io("disk1", &format!("write -P 4 {at}m 20k"));
    }
    qemu.io("disk0", "write -P 5 3m 512");
    let before = [described(&mut qemu, "n0"), described(&mut qemu, "n1")];
    qemu.capabilities(capabilities);
    qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 30 }));
    let receiver = Receiver::listen(places(&[("disk0", &to_a), ("disk1", &to_b)]));
    let received = migrate(&mut qemu, receiver, json!({}));
    is_complete(&received);
    qemu.migration_reaches(&["completed"]);
    assert!(outcome(&received, "disk0", "kept").changed.is_empty());
    assert_eq!(outcome(&received, "disk0", "transient").changed, ["persistent: no -> yes"]);
    assert!(received.report().disks.iter().all(|d| d.bytes_data == 0));
    qemu.quit();
    assert_eq!([stored(&to_a), stored(&to_b)], before);
    for (image, name, enabled) in [
        (&to_a, "kept", false),
        (&to_a, "transient", true),
        (&to_a, &long, true),
        (&to_b, "kept", true),
        (&to_b, "empty", false),
    ] {
        assert_eq!(is_enabled(image, name), enabled, "{name}");
        qemu::check_is_clean(image);
    }
}

#[test]
fn bitmaps_of_qemu_10_arrive() {
    bitmaps_arrive(Peer::Qemu10, &["dirty-bitmaps"]);
}

#[test]
fn bitmaps_of_qemu_10_arrive_with_a_return_path() {
    bitmaps_arrive(Peer::Qemu10, &["dirty-bitmaps", "return-path"]);
}

#[test]
fn bitmaps_of_qemu_7_arrive() {
    bitmaps_arrive(Peer::Qemu72, &["dirty-bitmaps"]);
}

#[test]
fn bitmaps_of_qemu_7_arrive_with_a_return_path() {
    bitmaps_arrive(Peer::Qemu72, &["dirty-bitmaps", "return-path"]);
}

/// Aliases come and go, some bitmaps are unlisted, one is renamed here.
fn aliases_are_followed(peer: Peer) {
    if !have(peer) || !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, to] = ["a", "to"].map(|name| make(&scratch, name, 8 * MIB).done());
    let mut qemu = source(peer, &[("disk0", "n0", &a, "qcow2")]);
    for name in ["one", "two", "unlisted"] {
        add_bitmap(&mut qemu, "n0", name, 64 * KIB, (true, false));
    }
    qemu.io("disk0", "write 1m 300k");
    let before = described(&mut qemu, "n0");
    qemu.capabilities(&["dirty-bitmaps"]);
    let alias = long_name('x');
    let bitmaps = json!([
        { "name": "one", "alias": alias },
        { "name": "two", "alias": "zwei", "transform": { "persistent": false } },
    ]);
    let mapping = json!([{ "node-name": "n0", "alias": "the-disk", "bitmaps": bitmaps }]);
    qemu.ok("migrate-set-parameters", json!({ "block-bitmap-mapping": mapping }));
    let rename = Rename { node: Some("the-disk".into()), old: "zwei".into(), new: "2".into() };
    let options = IncomingOptions { renames: vec![rename], ..places(&[("the-disk", &to)]) };
    let received = migrate(&mut qemu, Receiver::listen(options), json!({}));
    is_complete(&received);
    let changed = &outcome(&received, "the-disk", "zwei").changed;
    assert_eq!(*changed, ["name: zwei -> 2", "persistent: no -> yes"]);
    qemu.quit();
    let found = stored(&to);
    let names: Vec<_> = found.iter().map(|f| f.0.as_str()).collect();
    assert_eq!(names, ["2", &alias]);
    assert_eq!([&found[1].3, &found[0].3], [&before[0].3, &before[1].3]);
}

#[test]
fn aliases_of_qemu_10_are_followed() {
    aliases_are_followed(Peer::Qemu10);
}

#[test]
fn aliases_of_qemu_7_are_followed() {
    aliases_are_followed(Peer::Qemu72);
}

/// Bits that come after the guest has moved: PACKAGED, two ENDs of ram. Two disks have a bitmap of
/// the same name each, and bitmaps of several granularities, some of which do not record.
fn bitmaps_arrive_in_postcopy(peer: Peer, capabilities: &[&str]) {
    if !have(peer) || !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, to_a] = ["a", "to-a"].map(|name| make(&scratch, name, 1 << 30).done());
    let [b, to_b] = ["b", "to-b"].map(|name| make(&scratch, name, 96 * MIB + 512).done());
    let mut qemu = source(peer, &[("disk0", "n0", &a, "qcow2"), ("disk1", "n1", &b, "qcow2")]);
    for (node, name, granularity, flags) in [
        ("n0", "x", 512, (true, false)),
        ("n0", "y", 512, (false, true)),
        ("n0", "z", 64 * KIB, (true, false)),
        ("n1", "x", 4 * KIB, (true, false)),
        ("n1", "y", MIB, (true, true)),
    ] {
        add_bitmap(&mut qemu, node, name, granularity, flags);
    }
    for at in [0, 13, 500, 1023] {
        qemu.io("disk0", &format!("write {at}m 100k"));
    }
    for at in [1, 50, 95] {
        qemu.io("disk1", &format!("write {at}m 5k"));
    }
    qemu.ok("block-dirty-bitmap-disable", json!({ "node": "n1", "name": "x" }));
    qemu.io("disk1", "write 70m 512");
    qemu.capabilities(&["dirty-bitmaps"]);
    qemu.capabilities(capabilities);
    qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 200_000, "downtime-limit": 1 }));
    qemu.ok("cont", json!({}));
    let before = [described(&mut qemu, "n0"), described(&mut qemu, "n1")];
    let receiver = Receiver::listen(places(&[("disk0", &to_a), ("disk1", &to_b)]));
    qemu.ok("migrate", json!({ "uri": receiver.uri() }));
    qemu.migration_reaches(&["active"]);
    qemu.ok("migrate-start-postcopy", json!({}));
    let received = receiver.wait();
    is_complete(&received);
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
    assert_eq!([stored(&to_a), stored(&to_b)], before);
    for (image, name, enabled) in
        [(&to_a, "x", true), (&to_a, "y", false), (&to_b, "x", false), (&to_b, "y", false)]
    {
        assert_eq!(is_enabled(image, name), enabled, "{name}");
        qemu::check_is_clean(image);
    }
}

#[test]
fn bitmaps_of_qemu_10_arrive_in_postcopy() {
    bitmaps_arrive_in_postcopy(Peer::Qemu10, &[]);
}

#[test]
fn bitmaps_of_qemu_10_arrive_in_postcopy_with_a_return_path() {
    bitmaps_arrive_in_postcopy(Peer::Qemu10, &["return-path"]);
}

#[test]
fn bitmaps_of_qemu_7_arrive_in_postcopy() {
    bitmaps_arrive_in_postcopy(Peer::Qemu72, &[]);
}

#[test]
fn what_has_no_place_fails_and_the_source_goes_on() {
    if !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, b, to] = ["a", "b", "to"].map(|name| make(&scratch, name, 8 * MIB).done());
    let small = make(&scratch, "small", 4 * MIB).done();
    let same = make(&scratch, "same", 8 * MIB).bitmap("b0", 64 * KIB).done();
    let raw = make(&scratch, "raw", 8 * MIB).format("raw").done();
    let mut qemu =
        source(Peer::Qemu10, &[("disk0", "n0", &a, "qcow2"), ("disk1", "n1", &b, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "b0", 64 * KIB, (true, false));
    add_bitmap(&mut qemu, "n1", "b1", 64 * KIB, (true, false));
    qemu.capabilities(&["dirty-bitmaps", "return-path"]);
    for (disks, exit, words) in [
        (&[("disk0", to.as_path())][..], 7, &["1 bitmaps", "\"b1\" of \"disk1\"", "\"disk0\""][..]),
        (&[("disk0", &small), ("disk1", &to)], 5, &["\"b0\" of disk \"disk0\"", "4194304"]),
        (&[("disk0", &same), ("disk1", &to)], 7, &["\"b0\"", "already", "--rename-bitmap"]),
        (&[("disk0", &raw), ("disk1", &to)], 7, &["\"b0\"", "raw image has no place"]),
    ] {
        let received = migrate(&mut qemu, Receiver::listen(places(disks)), json!({}));
        let (status, text) = received.error();
        assert_eq!(status, exit, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        qemu.migration_reaches(&["failed"]);
        assert!(qemu::info(&to, "qcow2")["format-specific"]["data"]["bitmaps"].is_null());
    }
    let options = IncomingOptions {
        bitmaps: bitferry::copy::BitmapSelection::Named(vec!["b0".into()]),
        ..places(&[("disk0", &to)])
    };
    let received = migrate(&mut qemu, Receiver::listen(options), json!({}));
    is_complete(&received);
    assert_eq!(outcome(&received, "disk1", "b1").outcome, BitmapOutcome::Dropped);
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
    assert_eq!(stored(&to).len(), 1);
}

/// How a disk leaves a QEMU 7.2.
struct BlockCell {
    arguments: Value,
    capabilities: &'static [&'static str],
    /// Format of the image at the destination.
    format: &'static str,
    is_written_meanwhile: bool,
}

fn disk_arrives(cell: &BlockCell) {
    if !have(Peer::Qemu72) || !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let is_incremental = cell.arguments["inc"] == true;
    let size = 21 * MIB + 5 * 512;
    let base = make(&scratch, "base", size).write(0x55, 0, 9 * MIB).write(0x56, 20 * MIB, MIB);
    let base = base.done();
    let backed = |name: &str| {
        let image = make(&scratch, name, size);
        if is_incremental { image.backing(base.display().to_string(), "qcow2") } else { image }
    };
    let from = backed("from").write(7, MIB, 300 * KIB).write(8, 21 * MIB, 2560);
    // Zeroes that hide what a base has: whole chunks of content that is zero, and none.
    let from = from.write(0, 4 * MIB, MIB).io(format!("write -z {} {}", 6 * MIB, 2 * MIB));
    let from = from.write(9, 12 * MIB + 512, 70 * KIB).done();
    let to = destination(&scratch, cell.format, size, &backed);
    let mut qemu = source(Peer::Qemu72, &[("disk0", "n0", &from, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "daily", 64 * KIB, (true, false));
    let has_bitmaps = cell.format == "qcow2";
    if has_bitmaps {
        qemu.capabilities(&["dirty-bitmaps"]);
    }
    qemu.capabilities(cell.capabilities);
    let options = IncomingOptions {
        allow_backing: true,
        shared_base: is_incremental,
        ..places(&[("disk0", &to)])
    };
    // Else QEMU ends before it has sent everything: see the test below.
    qemu.ok("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    let receiver = Receiver::listen(options);
    let mut arguments = cell.arguments.clone();
    arguments["uri"] = receiver.uri().into();
    if cell.is_written_meanwhile {
        qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 4 * MIB }));
        qemu.ok("migrate", arguments);
        write_for(&mut qemu, Duration::from_secs(3));
        qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 30 }));
    } else {
        qemu.ok("migrate", arguments);
    }
    end_when_sent(&mut qemu);
    let received = receiver.wait();
    is_complete(&received);
    qemu.migration_reaches(&["completed"]);
    let before = described(&mut qemu, "n0");
    qemu.quit();
    qemu::same_content((&from, "qcow2"), (&to, cell.format));
    let disk = &received.report().disks[0];
    assert!(disk.bytes_data >= 2 * MIB, "{disk:?}");
    assert_eq!(received.report().repeated_bytes > 0, cell.is_written_meanwhile, "{disk:?}");
    if cell.capabilities.contains(&"zero-blocks") && !cell.is_written_meanwhile {
        assert!(disk.bytes_zero >= 3 * MIB, "{disk:?}");
    }
    if has_bitmaps {
        qemu::check_is_clean(&to);
        let found = stored(&to);
        let daily = found.iter().find(|f| f.0 == "daily").unwrap();
        assert_eq!(*daily, before[0]);
        // The destination's own bitmap has followed what was written.
        let own = qemu::dirty_ranges(&to, "own").unwrap();
        assert!(own.iter().any(|range| range.contains(&(12 * MIB + 512))), "{own:?}");
    }
}

/// Lets a migration end, once all of the disks has been read. QEMU does not count the chunk of each
/// disk that it has read last.
fn end_when_sent(qemu: &mut Qemu) {
    let end = Instant::now() + Duration::from_secs(60);
    let mut before = None;
    loop {
        let answer = qemu.ok("query-migrate", json!({}));
        let remaining = answer["disk"]["remaining"].as_u64();
        let is_last = remaining.is_some_and(|bytes| bytes <= 3 * MIB) && remaining == before;
        let is_over = ["completed", "failed"].iter().any(|status| answer["status"] == *status);
        if is_last || is_over {
            break;
        }
        assert!(Instant::now() < end, "{answer}");
        before = remaining;
        std::thread::sleep(Duration::from_millis(200));
    }
    qemu.ok("migrate-set-parameters", json!({ "downtime-limit": 300 }));
}

fn destination(
    scratch: &Scratch,
    format: &str,
    size: u64,
    backed: &dyn Fn(&str) -> bitferry_tests::image::Maker,
) -> PathBuf {
    match format {
        "raw" => make(scratch, "to", size).format("raw").write(0xaa, 0, 3 * MIB).done(),
        // Content that must vanish; where the base shows through there is none.
        _ => {
            let image = backed("to").bitmap("own", 64 * KIB);
            image.write(0xaa, 12 * MIB, MIB).done()
        }
    }
}

/// Writes here and there, as a guest would.
fn write_for(qemu: &mut Qemu, time: Duration) {
    let end = Instant::now() + time;
    let mut n = 0u64;
    while Instant::now() < end {
        let at = (n * 7919) % (20 * KIB);
        qemu.io("disk0", &format!("write -P {} {at}k 20k", n % 251 + 1));
        n += 1;
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_disk_arrives_with_blk() {
    let arguments = json!({ "blk": true });
    disk_arrives(&BlockCell {
        arguments,
        capabilities: &[],
        format: "qcow2",
        is_written_meanwhile: false,
    });
}

#[test]
fn a_disk_arrives_in_a_raw_file_with_zero_blocks() {
    let arguments = json!({ "blk": true });
    disk_arrives(&BlockCell {
        arguments,
        capabilities: &["zero-blocks"],
        format: "raw",
        is_written_meanwhile: false,
    });
}

#[test]
fn a_disk_that_is_written_arrives_with_blk() {
    let arguments = json!({ "blk": true });
    disk_arrives(&BlockCell {
        arguments,
        capabilities: &["zero-blocks", "return-path"],
        format: "qcow2",
        is_written_meanwhile: true,
    });
}

#[test]
fn a_disk_arrives_with_inc() {
    let arguments = json!({ "inc": true });
    disk_arrives(&BlockCell {
        arguments,
        capabilities: &[],
        format: "qcow2",
        is_written_meanwhile: false,
    });
}

#[test]
fn a_disk_arrives_with_inc_and_zero_blocks() {
    let arguments = json!({ "inc": true });
    disk_arrives(&BlockCell {
        arguments,
        capabilities: &["zero-blocks", "return-path"],
        format: "qcow2",
        is_written_meanwhile: false,
    });
}

#[test]
fn a_disk_that_is_written_arrives_with_inc() {
    let arguments = json!({ "inc": true });
    disk_arrives(&BlockCell {
        arguments,
        capabilities: &["zero-blocks"],
        format: "qcow2",
        is_written_meanwhile: true,
    });
}

#[test]
fn several_disks_arrive_and_a_source_that_dies_leaves_a_mark() {
    if !have(Peer::Qemu72) {
        return;
    }
    let scratch = Scratch::new();
    let sizes = [30 * MIB + 512, 3 * MIB, 512];
    let names = ["disk0", "disk1", "disk2"];
    let images = |prefix: &str| {
        let image =
            |(name, size): (&&str, &u64)| make(&scratch, &format!("{prefix}-{name}"), *size);
        names.iter().zip(&sizes).map(image).collect::<Vec<_>>()
    };
    let from: Vec<_> = images("from").into_iter().map(|m| m.write(3, 0, 512).done()).collect();
    let to: Vec<_> = images("to").into_iter().map(|m| m.bitmap("own", 512).done()).collect();
    let nodes = ["n0", "n1", "n2"];
    let disks: Vec<_> = (0..3).map(|i| (names[i], nodes[i], from[i].as_path(), "qcow2")).collect();
    let options = || places(&[("disk0", &to[0]), ("disk1", &to[1]), ("disk2", &to[2])]);
    let mut dying = source(Peer::Qemu72, &disks);
    let slow = json!({ "max-bandwidth": 4 * MIB, "downtime-limit": 0 });
    dying.ok("migrate-set-parameters", slow);
    let receiver = Receiver::listen(options());
    dying.ok("migrate", json!({ "uri": receiver.uri(), "blk": true }));
    std::thread::sleep(Duration::from_secs(2));
    dying.kill();
    let (status, text) = receiver.wait().error();
    assert_eq!(status, 4, "{text}");
    // It refuses to open elsewhere.
    let output = qemu::qemu_img("info").arg(&to[0]).output();
    assert!(output.complaint().contains("unfinished"), "{output}");
    let mut qemu = source(Peer::Qemu72, &disks);
    qemu.ok("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    let receiver = Receiver::listen(options());
    qemu.ok("migrate", json!({ "uri": receiver.uri(), "blk": true }));
    end_when_sent(&mut qemu);
    let received = receiver.wait();
    assert_eq!(received.report().status, Status::Completed);
    qemu.quit();
    for (from, to) in from.iter().zip(&to) {
        qemu::same_content((from, "qcow2"), (to, "qcow2"));
        qemu::check_is_clean(to);
    }
    // Their own bitmaps have recorded what both of them wrote.
    let own = &received.report().disks[0].bitmaps;
    assert!(own.is_empty(), "{own:?}");
    for to in &to {
        let dirty = qemu::dirty_ranges(to, "own").unwrap_or_else(|o| panic!("{o}"));
        assert!(dirty.first().is_some_and(|first| first.start == 0), "{dirty:?}");
    }
}

/// QEMU 7.2 counts at most 1 MiB of what it has not read yet, and so calls a disk sent that is not:
/// with as much bandwidth and downtime as it has by default, at the first look, after 100 ms.
#[test]
fn a_disk_that_qemu_cuts_short_is_refused_and_the_source_goes_on() {
    if !have(Peer::Qemu72) {
        return;
    }
    let scratch = Scratch::new();
    let [from, to] = ["from", "to"].map(|name| make(&scratch, name, 64 * MIB).done());
    let mut qemu = source(Peer::Qemu72, &[("disk0", "n0", &from, "qcow2")]);
    qemu.capabilities(&["return-path"]);
    qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 8 * MIB }));
    let receiver = Receiver::listen(places(&[("disk0", &to)]));
    let (status, text) = migrate(&mut qemu, receiver, json!({ "blk": true })).error();
    assert_eq!(status, 4, "{text}");
    assert!(text.contains("of 64 MiB did not come"), "{text}");
    qemu.migration_reaches(&["failed"]);
}

/// The same where the user has said that what is not sent is there already: nothing else tells a
/// stream that was cut short from one of a disk with little in it.
#[test]
fn a_disk_above_a_base_that_qemu_cuts_short_is_refused() {
    if !have(Peer::Qemu72) {
        return;
    }
    for how in ["inc", "blk"] {
        let scratch = Scratch::new();
        let base = make(&scratch, "base", 64 * MIB).done();
        let backed = |name: &str| {
            make(&scratch, name, 64 * MIB).backing(base.display().to_string(), "qcow2")
        };
        let from = backed("from").write(0x41, 0, 60 * MIB).done();
        let to = backed("to").bitmap("own", 64 * KIB).done();
        let mut qemu = source(Peer::Qemu72, &[("disk0", "n0", &from, "qcow2")]);
        qemu.capabilities(&["return-path"]);
        qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 8 * MIB }));
        let options = || IncomingOptions {
            allow_backing: true,
            shared_base: true,
            ..places(&[("disk0", &to)])
        };
        let received = migrate(&mut qemu, Receiver::listen(options()), json!({ how: true }));
        let (status, text) = received.error();
        assert_eq!(status, 4, "{how}: {text}");
        assert!(text.contains("of 64 MiB did not come"), "{how}: {text}");
        assert!(text.contains("downtime-limit") && text.contains("looked through"), "{text}");
        qemu.migration_reaches(&["failed"]);
        qemu.quit();
        // What the message asks for helps.
        let mut qemu = source(Peer::Qemu72, &[("disk0", "n0", &from, "qcow2")]);
        qemu.ok("migrate-set-parameters", json!({ "downtime-limit": 0 }));
        let receiver = Receiver::listen(options());
        qemu.ok("migrate", json!({ "uri": receiver.uri(), how: true }));
        end_when_sent(&mut qemu);
        is_complete(&receiver.wait());
        qemu.quit();
        qemu::same_content((&from, "qcow2"), (&to, "qcow2"));
    }
}

/// A base of which nothing is allocated above, and a guest whose memory comes: nothing of the disk
/// is sent, and that is all of it.
#[test]
fn a_disk_with_nothing_above_its_base_is_complete() {
    if !have(Peer::Qemu72) {
        return;
    }
    let scratch = Scratch::new();
    let base = make(&scratch, "base", 8 * MIB).write(5, 0, MIB).done();
    let backed =
        |name: &str| make(&scratch, name, 8 * MIB).backing(base.display().to_string(), "qcow2");
    let [from, to] = ["from", "to"].map(|name| backed(name).done());
    let mut qemu = source(Peer::Qemu72, &[("disk0", "n0", &from, "qcow2")]);
    let options =
        IncomingOptions { allow_backing: true, shared_base: true, ..places(&[("disk0", &to)]) };
    let received = migrate(&mut qemu, Receiver::listen(options), json!({ "inc": true }));
    is_complete(&received);
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
}

/// The stream says no sizes, and its chunks are as many as those of a smaller image.
#[test]
fn a_disk_that_is_larger_than_the_image_is_refused() {
    if !have(Peer::Qemu72) {
        return;
    }
    let scratch = Scratch::new();
    let from = make(&scratch, "from", 3 * MIB).write(7, 0, 3 * MIB).done();
    let to = make(&scratch, "to", 2 * MIB + MIB / 2).done();
    let mut qemu = source(Peer::Qemu72, &[("disk0", "n0", &from, "qcow2")]);
    qemu.capabilities(&["return-path"]);
    qemu.ok("migrate-set-parameters", json!({ "downtime-limit": 0 }));
    let receiver = Receiver::listen(places(&[("disk0", &to)]));
    qemu.ok("migrate", json!({ "uri": receiver.uri(), "blk": true }));
    end_when_sent(&mut qemu);
    let (status, text) = receiver.wait().error();
    assert!(status == 5 && text.contains("2621440"), "{status} {text}");
    qemu.migration_reaches(&["failed"]);
    qemu.quit();
}

/// A capture of `exec:cat`, replayed.
#[test]
fn a_stream_in_a_file_is_received() {
    if !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, to] = ["a", "to"].map(|name| make(&scratch, name, 8 * MIB).done());
    let mut qemu = source(Peer::Qemu10, &[("disk0", "n0", &a, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "b", 64 * KIB, (true, false));
    qemu.io("disk0", "write 1m 300k");
    let before = described(&mut qemu, "n0");
    qemu.capabilities(&["dirty-bitmaps"]);
    let capture = scratch.path("stream");
    qemu.ok("migrate", json!({ "uri": format!("exec:cat > {}", capture.display()) }));
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
    let bytes = std::fs::read(&capture).unwrap();
    let received = replay(&bytes, &places(&[("disk0", &to)]));
    is_complete(&received);
    assert_eq!(received.report().wire_bytes, bytes.len() as u64);
    assert_eq!(stored(&to), before);
    assert!(received.warnings.iter().any(|w| w.contains("devices")), "{:?}", received.warnings);
}

/// Somebody forgot to switch the capability on: the source keeps its guest.
#[test]
fn a_disk_for_which_nothing_comes_fails_and_the_source_goes_on() {
    if !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, b, to_a, to_b] =
        ["a", "b", "to-a", "to-b"].map(|name| make(&scratch, name, 8 * MIB).done());
    let mut qemu =
        source(Peer::Qemu10, &[("disk0", "n0", &a, "qcow2"), ("disk1", "n1", &b, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "b", 64 * KIB, (true, false));
    qemu.capabilities(&["return-path"]);
    let both = || places(&[("disk0", &to_a), ("disk1", &to_b)]);
    for (capabilities, words) in [
        (&[][..], ["\"disk0\"", "switch on the capability dirty-bitmaps"]),
        (&["dirty-bitmaps"], ["\"disk1\"", "no bitmap of a disk of this name"]),
    ] {
        qemu.capabilities(capabilities);
        let (status, text) = migrate(&mut qemu, Receiver::listen(both()), json!({})).error();
        assert_eq!(status, 4, "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        qemu.migration_reaches(&["failed"]);
        assert!(stored(&to_a).is_empty());
    }
    let one = places(&[("disk0", &to_a)]);
    is_complete(&migrate(&mut qemu, Receiver::listen(one), json!({})));
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
}

/// A guest that runs is stopped only when the destination has said that it may be.
#[test]
fn a_source_that_waits_for_leave_to_stop_its_guest_gets_it() {
    if !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, to] = ["a", "to"].map(|name| make(&scratch, name, 8 * MIB).done());
    let mut qemu = source(Peer::Qemu10, &[("disk0", "n0", &a, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "b", 64 * KIB, (true, false));
    qemu.capabilities(&["dirty-bitmaps", "return-path", "switchover-ack"]);
    qemu.ok("cont", json!({}));
    let options =
        IncomingOptions { version: Some(Version::new(8, 1)), ..places(&[("disk0", &to)]) };
    is_complete(&migrate(&mut qemu, Receiver::listen(options), json!({})));
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
}

fn job(qemu: &mut Qemu, arguments: Value) {
    qemu.ok("blockdev-backup", arguments);
    let event = qemu.event("BLOCK_JOB_COMPLETED");
    assert!(event["data"]["error"].is_null(), "{event}");
}

/// A full backup before the migration, an incremental one behind it: both together are the disk.
fn the_next_incremental_backup_is_whole(peer: Peer, is_sent: bool) {
    if !have(peer) || !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let size = 24 * MIB + 512;
    let from = make(&scratch, "from", size).write(1, 0, 9 * MIB).write(2, 12 * MIB, MIB).done();
    let full = scratch.path("full");
    qemu::qemu_img("convert").words("-O qcow2").arg(&from).arg(&full).ok();
    let to = make(&scratch, "to", size).done();
    let mut qemu = source(peer, &[("disk0", "n0", &from, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "b", 64 * KIB, (true, false));
    for command in ["write -P 3 3m 100k", "write -P 4 24m 512", "write -z 12m 64k"] {
        qemu.io("disk0", command);
    }
    if !is_sent {
        qemu.open("copy", &to, true).unwrap();
        let arguments = json!({ "job-id": "j", "device": "n0", "target": "copy", "sync": "full" });
        job(&mut qemu, arguments);
        qemu.close("copy");
    }
    qemu.capabilities(&["dirty-bitmaps", "return-path"]);
    let receiver = Receiver::listen(places(&[("disk0", &to)]));
    let mut arguments = json!({ "uri": receiver.uri() });
    if is_sent {
        qemu.ok("migrate-set-parameters", json!({ "downtime-limit": 0 }));
        arguments["blk"] = true.into();
    }
    qemu.ok("migrate", arguments);
    if is_sent {
        end_when_sent(&mut qemu);
    }
    is_complete(&receiver.wait());
    qemu.quit();
    let mut qemu = Qemu::block_only(Peer::Qemu10);
    qemu.open("n", &to, true).unwrap();
    qemu.io("n", "write -P 5 20m 64k");
    let increment = make(&scratch, "inc", size).backing(full.display().to_string(), "qcow2").done();
    qemu.open("inc", &increment, true).unwrap();
    job(
        &mut qemu,
        json!({
            "job-id": "j", "device": "n", "target": "inc", "sync": "incremental", "bitmap": "b",
        }),
    );
    qemu.close("inc");
    qemu.close("n");
    qemu.quit();
    qemu::same_content((&increment, "qcow2"), (&to, "qcow2"));
    // It is an increment: what was there before is not in it.
    let own = qemu::map(&increment, "qcow2");
    let first = own.iter().find(|part| part["start"] == 0).unwrap();
    assert_eq!(first["depth"], 1, "{first}");
}

#[test]
fn the_next_incremental_backup_of_a_copied_disk_is_whole() {
    the_next_incremental_backup_is_whole(Peer::Qemu10, false);
}

#[test]
fn the_next_incremental_backup_of_a_disk_that_was_sent_is_whole() {
    the_next_incremental_backup_is_whole(Peer::Qemu72, true);
}

/// The whole command: a QEMU connects, the bitmap is there, and the report says so.
#[test]
fn the_verb_receives_from_qemu() {
    if !have(Peer::Qemu10) {
        return;
    }
    let scratch = Scratch::new();
    let [a, to] = ["a", "to"].map(|name| make(&scratch, name, 8 * MIB).done());
    let socket = scratch.path("mig");
    let uri = format!("unix:{}", socket.display());
    let disk = format!("disk0={}", to.display());
    let refused = command().args(["receive", "--disk", &disk, &uri]).output();
    refused.expect_exit(Exit::Device);
    let receive = command().args(["receive", "--json", "--in-place", "--disk", &disk, &uri]);
    let receive = receive.spawn();
    let end = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        assert!(Instant::now() < end, "it does not listen");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut qemu = source(Peer::Qemu10, &[("disk0", "n0", &a, "qcow2")]);
    add_bitmap(&mut qemu, "n0", "b", 64 * KIB, (true, false));
    qemu.io("disk0", "write 1m 300k");
    let before = described(&mut qemu, "n0");
    qemu.capabilities(&["dirty-bitmaps", "return-path"]);
    qemu.ok("migrate", json!({ "uri": uri }));
    let output = receive.wait().expect_exit(Exit::Done);
    qemu.migration_reaches(&["completed"]);
    qemu.quit();
    let bitmap = &bitferry_tests::json::summary(&output)["disks"][0]["bitmaps"][0];
    assert_eq!((&bitmap["name"], &bitmap["outcome"]), (&json!("b"), &json!("preserved")));
    assert_eq!(stored(&to), before);
}
