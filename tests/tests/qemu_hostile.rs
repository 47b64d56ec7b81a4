//! Sources that break the rules: each is refused with what and where, and nothing of theirs is left
//! in the images.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry::qemu::Version;
use bitferry::qemu::incoming::IncomingOptions;
use bitferry::report::{BitmapOutcome, Status};
use bitferry_tests::bitferry::bitferry as command;
use bitferry_tests::image::make;
use bitferry_tests::incoming::{Receiver, drain, places, replay};
use bitferry_tests::{Exit, Peer, Scratch, qemu, require_all};
use format_spec::Writer;
use format_spec::qemu::block::{self, CHUNK_BYTES};
use format_spec::qemu::command::Command;
use format_spec::qemu::container::{self, Element, Section, SectionKind, SectionName};
use format_spec::qemu::dirty_bitmap::{self, Body, Record};
use rustix::net::{RecvFlags, recv};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 4 * MIB;

/// A stream in the making.
struct Stream(Writer);

impl Stream {
    fn new() -> Self {
        let mut out = Writer::new();
        container::encode_start(&mut out);
        out.u8(container::CONFIGURATION).be32(0);
        Self(out)
    }

    fn section(mut self, kind: SectionKind, name: &str, body: &[u8]) -> Self {
        let id = 5 + u32::try_from(name.len()).unwrap();
        let name = matches!(kind, SectionKind::Start | SectionKind::Full).then_some(SectionName {
            name,
            instance: 0,
            version: 1,
        });
        Section { id, kind, name }.encode(&mut self.0);
        self.0.bytes(body);
        container::encode_footer(id, &mut self.0);
        self
    }

    fn command(mut self, command: Command<'_>) -> Self {
        Element::Command(command).encode(&mut self.0);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.bytes(bytes);
        self
    }

    fn end(mut self) -> Vec<u8> {
        self.0.u8(container::EOF).u8(container::VMDESCRIPTION).be32(2).bytes(b"{}");
        self.0.into_bytes()
    }
}

fn records(records: &[Record<'_>]) -> Vec<u8> {
    let mut out = Writer::new();
    records.iter().for_each(|record| record.encode(&mut out));
    Record::end().encode(&mut out);
    out.into_bytes()
}

fn start(name: &str) -> Record<'_> {
    let flags = dirty_bitmap::ENABLED | dirty_bitmap::PERSISTENT;
    Record::new(Some("disk0"), Some(name), Body::Start { granularity: 65536, flags })
}

fn bits(first_sector: u64, sectors: u32, buffer: Option<&[u8]>) -> Record<'_> {
    Record::new(None, None, Body::Bits { first_sector, sectors, buffer })
}

fn complete() -> Record<'static> {
    Record::new(None, None, Body::Complete)
}

/// A good stream with one bitmap.
fn good() -> Vec<u8> {
    let body = [start("b"), bits(0, 8192, Some(&[7; 8])), complete()];
    Stream::new().section(SectionKind::Start, "dirty-bitmap", &records(&body)).end()
}

fn raw_start(granularity: u32, flags: u8) -> Vec<u8> {
    let mut out = Writer::new();
    out.u8(0x1c).text8("disk0").text8("b").be32(granularity).u8(flags).u8(1);
    out.into_bytes()
}

fn bitmap_stream(body: &[u8]) -> Vec<u8> {
    Stream::new().section(SectionKind::Start, "dirty-bitmap", body).end()
}

fn tools() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo])
}

fn image(scratch: &Scratch) -> PathBuf {
    make(scratch, "to", SIZE).write(9, 0, SIZE).bitmap("own", 65536).done()
}

/// Refused, with these words; the image is as it was.
#[track_caller]
fn is_refused(name: &str, stream: &[u8], to: &Path, exits: &[u8], words: &[&str]) {
    let before = std::fs::read(to).unwrap();
    let (status, text) = replay(stream, &places(&[("disk0", to)])).error();
    assert!(exits.contains(&status), "{name}: exit {status}: {text}");
    assert!(text.contains("offset"), "{name}: {text}");
    assert!(words.iter().all(|word| text.contains(word)), "{name}: {text}");
    assert!(std::fs::read(to).unwrap() == before, "{name}: the image was changed");
}

#[test]
fn bitmaps_that_break_the_rules_are_refused() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let zeroes = [0; 41];
    let long = vec![0x40; 9];
    let over = Record::new(None, None, Body::Bits { first_sector: 0, sectors: 8192, buffer: None });
    let nameless = [0x20, 0x01];
    let cases: Vec<(&str, Vec<u8>, &[u8], &[&str])> = vec![
        ("granularity 0", raw_start(0, 1), &[5], &["granularity", "is 0"]),
        ("granularity 1000", raw_start(1000, 1), &[5], &["1000", "power of two"]),
        ("granularity 256", raw_start(256, 1), &[5], &["256"]),
        ("reserved flags", raw_start(65536, 0x81), &[5], &["reserved", "0x80"]),
        ("no name", nameless.to_vec(), &[5], &["left out"]),
        ("started twice", records(&[start("b"), start("b")]), &[5], &["twice", "\"b\""]),
        (
            "bits before START",
            records(&[Record { bitmap: Some("x"), device: Some("disk0"), flags: 0x4e, ..over }]),
            &[5],
            &["bits before START", "\"x\""],
        ),
        (
            "COMPLETE before START",
            records(&[Record::new(Some("disk0"), Some("x"), Body::Complete)]),
            &[5],
            &["COMPLETE before START"],
        ),
        (
            "COMPLETE without bits",
            records(&[start("b"), complete()]),
            &[5],
            &["byte 0", "4194304", "not come"],
        ),
        (
            "bits after COMPLETE",
            records(&[start("b"), bits(0, 8192, None), complete(), bits(0, 8192, None)]),
            &[5],
            &["after COMPLETE"],
        ),
        ("no sectors", records(&[start("b"), bits(0, 0, None)]), &[5], &["0 sectors"]),
        (
            "beyond the end",
            records(&[start("b"), bits(8192, 8192, None)]),
            &[5],
            &["8388608", "4194304"],
        ),
        (
            "overflow",
            records(&[start("b"), bits(u64::MAX, u32::MAX, None)]),
            &[5],
            &["outside", "4194304"],
        ),
        ("misaligned", records(&[start("b"), bits(1, 8191, None)]), &[5], &["multiple"]),
        (
            "buffer too short",
            records(&[start("b"), bits(0, 8192, Some(&zeroes[..7]))]),
            &[5],
            &["buffer", "is 7", "8"],
        ),
        (
            "buffer too long",
            records(&[start("b"), bits(0, 8192, Some(&zeroes))]),
            &[5],
            &["buffer", "is 41"],
        ),
        (
            "buffer of exbibytes",
            [&records(&[start("b")])[..14], &long, &[0xff; 16]].concat(),
            &[5],
            &["buffer length"],
        ),
        (
            "existing name",
            records(&[Record { bitmap: Some("own"), ..start("b") }]),
            &[7],
            &["\"own\"", "already"],
        ),
        (
            "unknown disk",
            records(&[Record { device: Some("other"), ..start("b") }]),
            &[7],
            &["\"b\" of \"other\"", "\"disk0\""],
        ),
    ];
    for (name, body, exits, words) in cases {
        is_refused(name, &bitmap_stream(&body), &to, exits, words);
    }
}

#[test]
fn sections_that_break_the_rules_are_refused() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let start_header = |name: &[u8], instance: u8, version: u8| {
        let len = u8::try_from(name.len()).unwrap();
        [&[1, 0, 0, 0, 5, len][..], name, &[0, 0, 0, instance, 0, 0, 0, version]].concat()
    };
    let body = records(&[start("b"), bits(0, 8192, None), complete()]);
    let with_footer = |footer: &[u8]| {
        let header = start_header(b"dirty-bitmap", 0, 1);
        Stream::new().bytes(&header).bytes(&body).bytes(footer).end()
    };
    let packaged =
        |size: u32, inner: &[u8]| Stream::new().command(Command::Packaged(size)).bytes(inner).end();
    let nested = [&[8, 0, 7, 0, 4, 0, 0, 0, 0][..]; 2].concat();
    let good = good();
    let cases: Vec<(&str, Vec<u8>, &[u8], &[&str])> = vec![
        ("nothing", Vec::new(), &[4], &["closed"]),
        ("no stream", b"GET / HTTP/1.1\r\n\r\n".to_vec(), &[5], &["stream magic"]),
        ("version 2", b"QEVM\0\0\0\x02".to_vec(), &[5], &["stream version"]),
        ("our dialect", b"BFRY\0\0\0\x01".to_vec(), &[4, 5], &[]),
        ("footer of another", with_footer(&[0x7e, 0, 0, 0, 6]), &[5], &["section id"]),
        ("no footer", with_footer(&[]), &[5], &["section footer"]),
        ("nameless section", Stream::new().bytes(&start_header(b"", 0, 1)).end(), &[5], &["name"]),
        (
            "instance 1",
            Stream::new().bytes(&start_header(b"dirty-bitmap", 1, 1)).end(),
            &[5],
            &["instance"],
        ),
        (
            "version 2 of a section",
            Stream::new().bytes(&start_header(b"dirty-bitmap", 0, 2)).end(),
            &[5],
            &["version"],
        ),
        (
            "PART before START",
            Stream::new().section(SectionKind::Part, "dirty-bitmap", &body).end(),
            &[5],
            &["section id"],
        ),
        ("element 9", Stream::new().bytes(&[9]).end(), &[5], &["element type"]),
        ("package of 4 GiB", packaged(u32::MAX, &[]), &[4, 5], &[]),
        ("package in a package", packaged(18, &nested), &[5], &["package"]),
        ("package cut through", packaged(3, &[1, 0, 0, 0, 5]), &[5], &["package"]),
        (
            "PING without return path",
            Stream::new().command(Command::Ping(1)).end(),
            &[4],
            &["PING"],
        ),
        (
            "postcopy of RAM",
            Stream::new().command(Command::PostcopyAdvise(Some((4096, 4096)))).end(),
            &[4],
            &["postcopy-ram"],
        ),
        (
            "recovery of nothing",
            Stream::new().command(Command::RecvBitmap("m0")).end(),
            &[4],
            &["resumed"],
        ),
        (
            "a description of 4 GiB",
            Stream::new().bytes(&[0, 6, 0xff, 0xff, 0xff, 0xff]).0.into_bytes(),
            &[5],
            &["VM description"],
        ),
        ("cut in the middle", good[..good.len() / 2].to_vec(), &[4], &["closed"]),
    ];
    for (name, stream, exits, words) in cases {
        is_refused(name, &stream, &to, exits, words);
    }
    for cut in (1..good.len() - 8).step_by(3) {
        is_refused(&format!("cut at {cut}"), &good[..cut], &to, &[4], &["closed"]);
    }
}

#[test]
fn what_is_odd_and_allowed_is_taken() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    // Wide flags; EOS with COMPLETE; a section that comes as FULL; a flood; the end twice.
    let mut body = Writer::new();
    body.u8(0x80).u8(0x1c).text8("disk0").text8("wide").be32(65536).u8(2);
    body.bytes(&[0x80, 0x80, 0, 0x42]).be64(0).be32(8192).u8(0x21);
    let part = Stream::new().section(SectionKind::Part, "dirty-bitmap", &[1]).0.into_bytes();
    let header = Stream::new().0.into_bytes().len();
    let unfinished = records(&[start("unfinished"), bits(0, 8192, None)]);
    let stream = Stream::new()
        .section(SectionKind::Full, "dirty-bitmap", &body.into_bytes())
        .bytes(&part[header..].repeat(200_000))
        .section(SectionKind::Part, "dirty-bitmap", &unfinished)
        .section(SectionKind::End, "dirty-bitmap", &[1])
        .section(SectionKind::End, "dirty-bitmap", &[1])
        .end();
    let received = replay(&stream, &places(&[("disk0", &to)]));
    let report = received.report();
    assert_eq!(report.status, Status::Completed);
    // What was not completed is dropped, and told.
    assert_eq!(bitferry::exit_status(report), 6);
    let outcome = |name: &str| report.disks[0].bitmaps.iter().find(|b| b.name == name).unwrap();
    assert_eq!(outcome("unfinished").outcome, BitmapOutcome::Dropped);
    assert_eq!(outcome("wide").outcome, BitmapOutcome::Preserved);
    let info = qemu::info(&to, "qcow2");
    let names = info["format-specific"]["data"]["bitmaps"].as_array().unwrap();
    assert_eq!(
        names.iter().map(|b| b["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["own", "wide"]
    );
    qemu::check_is_clean(&to);
}

fn chunk(offset: u64, device: &str, fill: u8) -> Vec<u8> {
    let content = Box::new([fill; CHUNK_BYTES]);
    let mut out = Writer::new();
    block::Record::data(offset, device, &content).encode(&mut out);
    out.into_bytes()
}

#[test]
fn disks_that_break_the_rules_are_refused() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let word = |word: u64| word.to_be_bytes().to_vec();
    let ends = |body: Vec<u8>| [body, word(2)].concat();
    let zero_at = |offset: u64| {
        let mut out = Writer::new();
        block::Record::zeroes(offset, "disk0").encode(&mut out);
        ends(out.into_bytes())
    };
    let cases: Vec<(&str, Vec<u8>, &[u8], &[&str])> = vec![
        ("no flags", word(0), &[5], &["block flags"]),
        ("flag 0x10 alone", word(0x10), &[5], &["block flags"]),
        ("unknown disk", ends(chunk(0, "other", 1)), &[7], &["\"other\"", "\"disk0\""]),
        ("nameless disk", ends(chunk(0, "", 1)), &[7], &["no name"]),
        ("beyond the end", ends(chunk(SIZE, "disk0", 1)), &[5], &["4194304", "\"disk0\""]),
        ("zeroes far beyond", zero_at(!511), &[5], &["\"disk0\""]),
        ("missing chunks", word(2), &[4], &["4 of 4 MiB did not come"]),
    ];
    for (name, body, exits, words) in cases {
        let stream = Stream::new().section(SectionKind::Start, "block", &body).end();
        is_refused(name, &stream, &to, exits, words);
    }
    // A chunk has come: the image says that it is unfinished.
    let stream = Stream::new().section(SectionKind::Start, "block", &ends(chunk(0, "disk0", 1)));
    let (status, text) = replay(&stream.end(), &places(&[("disk0", &to)])).error();
    assert!(status == 4 && text.contains("3 of 4 MiB did not come"), "{text}");
    let output = qemu::qemu_img("info").arg(&to).output();
    assert!(output.complaint().contains("unfinished"), "{output}");
    // Chunks that lie across others are none of them.
    let across = [chunk(0, "disk0", 1), chunk(512, "disk0", 1), chunk(2 * MIB + 512, "disk0", 1)];
    let stream = Stream::new().section(SectionKind::Start, "block", &ends(across.concat()));
    let other = make(&scratch, "other", SIZE).done();
    let (status, text) = replay(&stream.end(), &places(&[("disk0", &other)])).error();
    assert!(status == 4 && text.contains("3 of 4 MiB did not come"), "{text}");
    // Bitmaps alone do not finish it.
    let (status, text) = replay(&good(), &places(&[("disk0", &to)])).error();
    assert!(status == 7 && text.contains("not finished"), "{text}");
    // All of it does, in any order, the last content counts, padding and odd flags do not.
    let mut body: Vec<u8> = [3, 1, 2].map(|n| chunk(n * MIB, "disk0", 4)).concat();
    body.extend(chunk(0, "disk0", 3));
    body.extend(word(150 << 9 | 4));
    body.extend(chunk(0, "disk0", 5));
    let bitmap = records(&[start("b"), bits(0, 8192, Some(&[7; 8])), complete()]);
    let stream = Stream::new().section(SectionKind::Start, "block", &ends(body)).section(
        SectionKind::Start,
        "dirty-bitmap",
        &bitmap,
    );
    let received = replay(&stream.end(), &places(&[("disk0", &to)]));
    assert_eq!(received.report().repeated_bytes, MIB);
    let pattern = ["read -P 5 0 1M", "read -P 4 1M 3M"];
    qemu::qemu_io(&to, "qcow2", pattern);
    qemu::check_is_clean(&to);
    // The image's own bitmap has recorded what both of them wrote.
    assert!(received.report().disks[0].bitmaps.iter().all(|b| b.name != "own"));
    assert_eq!(qemu::dirty_ranges(&to, "own").unwrap(), [0..SIZE]);
}

/// Where QEMU's buffer ends and a larger disk begins cannot be seen, and is said.
#[test]
fn what_lies_beyond_the_end_of_the_image_is_told() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = make(&scratch, "odd", MIB + 512).done();
    for (fill, is_told) in [(5, true), (0, false)] {
        let body = [chunk(0, "disk0", 1), chunk(MIB, "disk0", fill), vec![0, 0, 0, 0, 0, 0, 0, 2]];
        let stream = Stream::new().section(SectionKind::Start, "block", &body.concat()).end();
        let received = replay(&stream, &places(&[("disk0", &to)]));
        let phrases = &received.report().disks[0].not_carried;
        let is_it = |phrase: &String| phrase.contains("1048064 bytes beyond the end");
        assert_eq!(phrases.iter().any(is_it), is_told, "{phrases:?}");
    }
}

/// A source with a return path that has one good bitmap, and waits for a PONG.
fn waiting(body: &[u8]) -> Vec<u8> {
    let opened = Stream::new().command(Command::OpenReturnPath).command(Command::Ping(7));
    opened.section(SectionKind::Start, "dirty-bitmap", body).end()
}

const PONG: [u8; 8] = [0, 2, 0, 4, 0, 0, 0, 7];

fn shut(status: u8) -> [u8; 8] {
    [0, 1, 0, 4, 0, 0, 0, status]
}

fn good_body() -> Vec<u8> {
    records(&[start("b"), bits(0, 8192, None), complete()])
}

fn names(image: &Path) -> Vec<String> {
    let info = qemu::info(image, "qcow2");
    let list = info["format-specific"]["data"]["bitmaps"].as_array().cloned().unwrap_or_default();
    list.iter().map(|bitmap| bitmap["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_source_with_a_return_path_is_answered() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    for (body, status) in [(records(&[start("bad"), complete()]), 1), (good_body(), 0)] {
        let receiver = Receiver::listen(places(&[("disk0", &to)]));
        let mut peer = receiver.connect();
        peer.write_all(&waiting(&body)).unwrap();
        // The source stays; the destination must know by itself that this is the end.
        let mut answers = [0; 16];
        peer.read_exact(&mut answers).unwrap();
        assert_eq!(answers[..], [PONG, shut(status)].concat());
        drop(peer);
        let received = receiver.wait();
        assert_eq!(received.result.is_ok(), status == 0);
    }
    assert_eq!(names(&to), ["own", "b"]);
}

/// Leave to stop the guest is given to those QEMUs that know it: an older one fails of it.
#[test]
fn leave_to_switch_over_goes_to_who_knows_it() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let ack = [0, 7, 0, 0].to_vec();
    for (machine, version, answer) in [
        ("pc-q35-8.1", None, &ack[..]),
        ("pc-q35-8.0", None, &[]),
        ("none", None, &[]),
        ("none", Some(Version::new(9, 0)), &ack),
        ("none", Some(Version::new(7, 2)), &[]),
    ] {
        let mut out = Writer::new();
        container::encode_start(&mut out);
        out.u8(container::CONFIGURATION).be32(u32::try_from(machine.len()).unwrap());
        out.bytes(machine.as_bytes());
        let stream = Stream(out).command(Command::OpenReturnPath).command(Command::Ping(7));
        let body = records(&[start("bad"), complete()]);
        let stream = stream.section(SectionKind::Start, "dirty-bitmap", &body).end();
        let options = IncomingOptions { version, ..places(&[("disk0", &to)]) };
        let receiver = Receiver::listen(options);
        let mut peer = receiver.connect();
        peer.write_all(&stream).unwrap();
        receiver.wait().error();
        assert_eq!(drain(&mut peer), [answer, &PONG, &shut(1)].concat(), "{machine} {version:?}");
    }
}

/// What the user knows of the source is held against what it says.
#[test]
fn another_machine_than_was_asked_for_is_refused() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let said = |uuid: bool| {
        let mut out = Writer::new();
        container::encode_start(&mut out);
        out.u8(container::CONFIGURATION).be32(4).bytes(b"none");
        if uuid {
            out.u8(5).text8("configuration/uuid").be32(1).bytes(&[7; 16]);
        }
        let body = records(&[start("b"), bits(0, 8192, None), complete()]);
        Stream(out).section(SectionKind::Start, "dirty-bitmap", &body).end()
    };
    let options = |machine: &str, uuid: Option<[u8; 16]>| IncomingOptions {
        machine: Some(machine.to_owned()),
        uuid,
        ..places(&[("disk0", &to)])
    };
    for (stream, options, word) in [
        (said(true), options("pc-q35-8.0", None), "\"none\""),
        (said(false), options("none", Some([7; 16])), "validate-uuid"),
        (said(true), options("none", Some([8; 16])), "UUID"),
    ] {
        let (status, text) = replay(&stream, &options).error();
        assert!(status == 4 && text.contains(word), "{status} {text}");
    }
    assert_eq!(names(&to), ["own"]);
    replay(&said(true), &options("none", Some([7; 16]))).report();
    assert_eq!(names(&to), ["own", "b"]);
}

/// New names for bitmaps that do not come are a wish that is not fulfilled.
#[test]
fn bitmaps_that_do_not_come_are_told() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let renames = vec!["typo=c".parse().unwrap(), "b=new".parse().unwrap()];
    let received = replay(&good(), &IncomingOptions { renames, ..places(&[("disk0", &to)]) });
    assert_eq!(bitferry::exit_status(received.report()), 6);
    let bitmaps = &received.report().disks[0].bitmaps;
    let outcomes: Vec<_> = bitmaps.iter().map(|b| (b.name.as_str(), b.outcome)).collect();
    let (kept, lost) = (BitmapOutcome::Preserved, BitmapOutcome::Dropped);
    assert_eq!(outcomes, [("b", kept), ("typo", lost)]);
    assert_eq!(names(&to), ["own", "new"]);
}

/// Both tell what to change at the source.
#[test]
fn a_source_with_multifd_is_told_what_is_wrong() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let flush = [0, 0, 0, 0, 0, 0, 2, 0];
    let stream = Stream::new().bytes(&[1, 0, 0, 0, 8, 3]).bytes(b"ram");
    let stream = stream.bytes(&[0, 0, 0, 0, 0, 0, 0, 4]).bytes(&flush).0.into_bytes();
    is_refused("flush", &stream, &to, &[4], &["multifd off"]);
    let disk = format!("disk0={}", to.display());
    let hello = [&[0x11, 0x22, 0x33, 0x44, 0, 0, 0, 1][..], &[0; 56]].concat();
    let path = scratch.path("hello");
    std::fs::write(&path, hello).unwrap();
    let uri = format!("file:{}", path.display());
    let output = command().args(["receive", "--in-place", "--disk", &disk, &uri]).output();
    let output = output.expect_exit(Exit::Transport);
    assert!(output.complaint().contains("multifd"), "{output}");
}

/// A source with a return path that is not to describe its machine waits for the outcome, and this
/// side for the description: neither for ever.
#[test]
fn a_source_without_a_description_is_not_waited_for_for_ever() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let mut stream = waiting(&good_body());
    // The end, and no more.
    stream.truncate(stream.len() - 7);
    let receiver = Receiver::listen(places(&[("disk0", &to)]));
    let mut peer = receiver.connect();
    peer.write_all(&stream).unwrap();
    let begun = Instant::now();
    let (status, text) = receiver.wait().error();
    assert!(status == 4 && text.contains("suppress-vmdesc"), "{text}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(names(&to), ["own"]);
}

/// A QEMU that was cancelled goes on with its guest, and its bitmap with it.
#[test]
fn bitmaps_of_a_source_that_leaves_before_it_was_told_are_not_kept() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let in_time = |peer: &UnixStream, len: usize| {
        let mut peeked = vec![0; len];
        let end = Instant::now() + Duration::from_secs(30);
        while recv(peer, peeked.as_mut_slice(), RecvFlags::PEEK).unwrap().0 < len {
            assert!(Instant::now() < end, "it does not answer");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let ways: [(&str, &dyn Fn(UnixStream)); 4] = [
        ("closes at once", &drop),
        ("shuts both directions down", &|peer| peer.shutdown(Shutdown::Both).unwrap()),
        ("closes and leaves SHUT unread", &|peer| in_time(&peer, 16)),
        ("shuts down and leaves SHUT unread", &|peer| {
            in_time(&peer, 16);
            peer.shutdown(Shutdown::Both).unwrap();
            std::thread::sleep(Duration::from_millis(20));
        }),
    ];
    for (name, leave) in ways {
        let receiver = Receiver::listen(places(&[("disk0", &to)]));
        let mut peer = receiver.connect();
        peer.write_all(&waiting(&good_body())).unwrap();
        leave(peer);
        let (status, text) = receiver.wait().error();
        assert_eq!(status, 4, "{name}: {text}");
        assert_eq!(names(&to), ["own"], "{name}");
        qemu::check_is_clean(&to);
    }
    // Nobody knows about one that was told and does not end the connection.
    let receiver = Receiver::listen(places(&[("disk0", &to)]));
    let mut peer = receiver.connect();
    peer.write_all(&waiting(&good_body())).unwrap();
    let received = receiver.wait();
    assert_eq!(received.report().status, Status::Unknown);
    assert_eq!(bitferry::exit_status(received.report()), 8);
    assert_eq!(received.report().disks[0].bitmaps[0].outcome, BitmapOutcome::Dropped);
    assert_eq!(drain(&mut peer), [PONG, shut(0)].concat());
    assert_eq!(names(&to), ["own"]);
}

/// Ctrl-C ends the waiting for a source that says nothing: of its first bytes, and of more.
#[test]
fn a_silent_source_can_be_given_up() {
    if !tools() {
        return;
    }
    let scratch = Scratch::new();
    let to = image(&scratch);
    let header = Stream::new().command(Command::OpenReturnPath).0.into_bytes();
    for said in [&header[..2], &header] {
        let socket = scratch.path("silent");
        let _ = std::fs::remove_file(&socket);
        let (disk, uri) = (format!("disk0={}", to.display()), format!("unix:{}", socket.display()));
        let receive = command().args(["receive", "--in-place", "--disk", &disk, &uri]).spawn();
        let end = Instant::now() + Duration::from_secs(30);
        let mut peer = loop {
            match UnixStream::connect(&socket) {
                Ok(peer) => break peer,
                Err(error) => assert!(Instant::now() < end, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        peer.write_all(said).unwrap();
        std::thread::sleep(Duration::from_millis(300));
        receive.signal(Signal::TERM);
        assert!(receive.ends_within(Duration::from_secs(3)), "after {} bytes", said.len());
        receive.wait().expect_exit(Exit::Interrupted);
    }
    assert_eq!(names(&to), ["own"]);
}
