//! Real QEMUs that migrate whole machines to our destination: the sections of devices, which are
//! not understood here, are kept as they came. What they are is told by QEMU's own description of
//! them, which comes behind them: it says how long each is, where our decoder looks for their ends.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex};

use bitferry::qemu::incoming::{DeviceStates, IncomingOptions};
use bitferry_tests::image::make;
use bitferry_tests::incoming::{Received, Receiver, places, replay};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::{Peer, Scratch, qemu, require_all};
use format_spec::qemu::Step;
use format_spec::qemu::container::Element;
use format_spec::qemu::stream::{Decoder, Item};
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;
/// Mark of a section that is sent whole, and of a footer.
const FULL: u8 = 0x04;
const FOOTER: u8 = 0x7e;

/// A section of a device, by QEMU's description.
#[derive(Debug)]
struct Device {
    name: String,
    /// Where it stands in the stream.
    place: Range<usize>,
    /// Where its state stands.
    state: Range<usize>,
}

/// Bytes of a described state: its fields, and subsections with their heads.
fn state_len(described: &Value) -> usize {
    let number = |value: &Value| value.as_u64().map(|n| n as usize);
    let fields = described["fields"].as_array().into_iter().flatten();
    let fields = fields.map(|f| number(&f["size"]).unwrap() * number(&f["array_len"]).unwrap_or(1));
    let subsections = described["subsections"].as_array().into_iter().flatten();
    let heads = subsections.map(|s| 6 + s["vmsd_name"].as_str().unwrap().len() + state_len(s));
    fields.sum::<usize>() + heads.sum::<usize>()
}

/// The sections of devices in a stream, from its end: description, end mark, sections.
fn described(stream: &[u8]) -> Vec<Device> {
    let starts = (0..stream.len() - 7).rev().find(|at| {
        let head = &stream[*at..*at + 7];
        let len = u32::from_be_bytes(head[2..6].try_into().unwrap()) as usize;
        head[..2] == [0, 6] && head[6] == b'{' && at + 6 + len == stream.len()
    });
    let end = starts.expect("a description at the end");
    let description: Value = serde_json::from_slice(&stream[end + 6..]).unwrap();
    let devices = description["devices"].as_array().unwrap();
    let name = |device: &Value| device["name"].as_str().unwrap().to_owned();
    let section_len = |device: &Value| 14 + name(device).len() + state_len(device) + 5;
    let mut at = end - devices.iter().map(section_len).sum::<usize>();
    let mut found = Vec::new();
    for device in devices {
        let (name, len) = (name(device), section_len(device));
        let section = &stream[at..at + len];
        let (head, rest) = section.split_at(6);
        assert_eq!((head[0], usize::from(head[5])), (FULL, name.len()), "{name} at {at}");
        assert_eq!(&rest[..name.len()], name.as_bytes());
        let instance = u32::from_be_bytes(rest[name.len()..][..4].try_into().unwrap());
        assert_eq!(u64::from(instance), device["instance_id"].as_u64().unwrap(), "{name}");
        let footer = [&[FOOTER], &head[1..5]].concat();
        assert_eq!(section[len - 5..], footer, "{name} at {at}");
        let state = at + 14 + name.len()..at + len - 5;
        found.push(Device { name, place: at..at + len, state });
        at += len;
    }
    assert_eq!(at, end);
    found
}

/// A machine that runs, with devices of many kinds and a disk with a bitmap.
fn machine(peer: Peer, kind: &str, image: &Path) -> Qemu {
    let drive = format!("if=none,id=disk0,node-name=n0,format=qcow2,file={}", image.display());
    let words = "-accel tcg -m 16 -device virtio-blk-pci,drive=disk0 -device virtio-rng-pci \
                 -device virtio-serial-pci -device qemu-xhci -device usb-tablet -device VGA";
    let words = words.split_whitespace().map(str::to_owned);
    let own = ["-machine", kind, "-drive", &drive].map(str::to_owned);
    let mut qemu = Qemu::start(peer, own.into_iter().chain(words));
    qemu.ok(
        "block-dirty-bitmap-add",
        json!({ "node": "n0", "name": "daily", "granularity": 65536, "persistent": true }),
    );
    qemu.io("disk0", "write -P 3 1m 300k");
    qemu.ok("cont", json!({}));
    qemu
}

fn keeping(image: &Path) -> (IncomingOptions, Arc<Mutex<Vec<u8>>>) {
    let kept = Arc::new(Mutex::new(Vec::new()));
    let devices = Some(DeviceStates::new(kept.clone()));
    (IncomingOptions { devices, ..places(&[("disk0", image)]) }, kept)
}

/// What was kept, and the stream as it came.
fn receive(qemu: &mut Qemu, image: &Path) -> (Received, Vec<u8>, Vec<u8>) {
    let (options, kept) = keeping(image);
    let stream = Arc::new(Mutex::new(Vec::new()));
    let receiver = Receiver::recording(options, stream.clone());
    qemu.ok("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 30 }));
    qemu.ok("migrate", json!({ "uri": receiver.uri() }));
    let received = receiver.wait();
    let take = |bytes: &Mutex<Vec<u8>>| std::mem::take(&mut *bytes.lock().unwrap());
    (received, take(&kept), take(&stream))
}

/// Names of the sections in what was kept, read as the documentation says: behind the start of the
/// stream, up to its description.
fn names_of(kept: &[u8], stream: &[u8]) -> Vec<String> {
    let mut decoder = Decoder::new();
    let mut begun = 0;
    while begun == 0 {
        match decoder.next(stream, false).unwrap() {
            Step::Item(Item::Start, len) => {
                // Magic and version; the configuration is what comes next.
                let Step::Item(_, more) = decoder.next(&stream[len..], false).unwrap() else {
                    panic!("a configuration")
                };
                begun = len + more;
            }
            step => panic!("{step:?}"),
        }
    }
    let bytes = [kept, &[0]].concat();
    let (mut at, mut names) = (0, Vec::new());
    while !decoder.may_end() {
        let Step::Item(item, len) = decoder.next(&bytes[at..], true).unwrap() else {
            panic!("it ends at {at}")
        };
        if let Item::Element(Element::Section(section)) = item {
            names.push(section.name.unwrap().name.to_owned());
        }
        at += len;
    }
    assert_eq!(at, bytes.len());
    names
}

fn devices_are_kept(peer: Peer, kind: &str, capabilities: &[&str]) {
    if !require_all(&[peer, Peer::Qemu10, Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let [from, to] = ["from", "to"].map(|name| make(&scratch, name, 8 * MIB).done());
    let mut source = machine(peer, kind, &from);
    source.capabilities(&["dirty-bitmaps"]);
    source.capabilities(capabilities);
    let (received, kept, stream) = receive(&mut source, &to);
    let report = received.report();
    assert_eq!(bitferry::exit_status(report), 0, "{report:?}");
    source.migration_reaches(&["completed"]);
    assert_eq!(source.bitmaps("n0").len(), 1);
    source.quit();
    qemu::check_is_clean(&to);
    assert_eq!(report.disks[0].bitmaps[0].name, "daily");
    assert!(!received.warnings.iter().any(|w| w.contains("devices")), "{:?}", received.warnings);
    assert!(received.warnings.iter().any(|w| w.contains("memory")), "{:?}", received.warnings);

    let devices = described(&stream);
    assert!(devices.len() > 20, "{devices:?}");
    let expected: Vec<_> = devices.iter().flat_map(|d| &stream[d.place.clone()]).copied().collect();
    assert!(kept == expected, "{} bytes kept, {} described", kept.len(), expected.len());
    let names: Vec<_> = devices.iter().map(|device| device.name.clone()).collect();
    assert_eq!(names_of(&kept, &stream), names);
    assert!(names.iter().any(|name| name.ends_with("virtio-blk")), "{names:?}");
    what_cannot_be_told_apart_is_an_error(&stream, &devices, &scratch);
}

/// State that holds what looks like its end, and like a command behind it that none is.
fn what_cannot_be_told_apart_is_an_error(stream: &[u8], devices: &[Device], scratch: &Scratch) {
    let device = devices.iter().find(|device| device.state.len() >= 64).unwrap();
    let mut bytes = stream.to_vec();
    let id = stream[device.place.start + 1..device.place.start + 5].to_vec();
    let at = device.state.start + 16;
    let end = [&[FOOTER], &id[..], &[0x08, 0, 5, 0xff, 0xff]].concat();
    bytes[at..at + end.len()].copy_from_slice(&end);
    let image = make(scratch, "unread", 8 * MIB).done();
    let (options, kept) = keeping(&image);
    let (status, text) = replay(&bytes, &options).error();
    assert_eq!(status, 4, "{text}");
    let begun = format!("{:?}, which began at offset {}", device.name, device.place.start);
    assert!(text.contains(&begun) && text.contains("cannot be told"), "{text}");
    assert!(qemu::info(&image, "qcow2")["format-specific"]["data"]["bitmaps"].is_null());
    // What came before is as it was.
    let kept = kept.lock().unwrap();
    assert!(kept.starts_with(&stream[devices[0].place.start..device.place.start]));
}

/// The package of a stream that went into postcopy: where it begins and what is in it.
fn package(stream: &[u8]) -> &[u8] {
    let head = [0x08, 0, 7, 0, 4];
    let at = stream.windows(head.len()).position(|bytes| bytes == head).expect("a package");
    let rest = &stream[at + head.len()..];
    let len = u32::from_be_bytes(rest[..4].try_into().unwrap()) as usize;
    &rest[4..4 + len]
}

/// Bits that come when the guest has moved already: the devices come before them, in a package,
/// between the commands that it begins and ends with. There is no description then.
fn devices_are_kept_in_postcopy(peer: Peer, kind: &str) {
    if !require_all(&[peer, Peer::Qemu10, Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let [from, to] = ["from", "to"].map(|name| make(&scratch, name, 1 << 30).done());
    let mut source = machine(peer, kind, &from);
    source.ok(
        "block-dirty-bitmap-add",
        json!({ "node": "n0", "name": "fine", "granularity": 512, "persistent": true }),
    );
    source.io("disk0", "write -P 4 700m 300k");
    source.capabilities(&["dirty-bitmaps"]);
    // Slow until it is told to go over, so that nothing is complete by then.
    let slow = json!({ "max-bandwidth": 2 << 20, "downtime-limit": 1 });
    source.ok("migrate-set-parameters", slow);
    let (options, kept) = keeping(&to);
    let stream = Arc::new(Mutex::new(Vec::new()));
    let receiver = Receiver::recording(options, stream.clone());
    source.ok("migrate", json!({ "uri": receiver.uri() }));
    source.migration_reaches(&["active"]);
    source.ok("migrate-start-postcopy", json!({}));
    let received = receiver.wait();
    let report = received.report();
    assert_eq!(bitferry::exit_status(report), 0, "{report:?}");
    source.migration_reaches(&["completed"]);
    source.quit();
    qemu::check_is_clean(&to);
    let names: Vec<_> = report.disks[0].bitmaps.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(names, ["daily", "fine"]);
    assert_eq!(qemu::dirty_ranges(&to, "fine").unwrap(), [700 * MIB..700 * MIB + 300 * 1024]);

    let (kept, stream) = (kept.lock().unwrap(), stream.lock().unwrap());
    let package = package(&stream);
    let devices = package.strip_prefix(&[0x08, 0, 4, 0, 0]).expect("POSTCOPY_LISTEN");
    let devices = devices.strip_suffix(&[0x08, 0, 5, 0, 0]).expect("POSTCOPY_RUN");
    assert!(*kept == devices, "{} bytes kept of {}", kept.len(), devices.len());
    let names = names_of(&kept, &stream);
    assert!(names.len() > 20 && names.iter().any(|n| n.ends_with("virtio-blk")), "{names:?}");
}

#[test]
fn devices_of_qemu_10_are_kept_in_postcopy() {
    devices_are_kept_in_postcopy(Peer::Qemu10, "pc");
}

#[test]
fn devices_of_qemu_7_are_kept_in_postcopy() {
    devices_are_kept_in_postcopy(Peer::Qemu72, "q35");
}

#[test]
fn devices_of_a_pc_of_qemu_10_are_kept() {
    devices_are_kept(Peer::Qemu10, "pc", &[]);
}

#[test]
fn devices_of_a_q35_of_qemu_10_are_kept_with_a_return_path() {
    devices_are_kept(Peer::Qemu10, "q35", &["return-path"]);
}

#[test]
fn devices_of_a_pc_of_qemu_7_are_kept() {
    devices_are_kept(Peer::Qemu72, "pc", &[]);
}

#[test]
fn devices_of_a_q35_of_qemu_7_are_kept_with_a_return_path() {
    devices_are_kept(Peer::Qemu72, "q35", &["return-path"]);
}
