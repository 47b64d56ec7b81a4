//! How a migration to a QEMU ends, and what is claimed where nobody says so: a destination that may
//! run by now is no failure, and one that may not is no success.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::num::NonZeroUsize;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry::qemu::outgoing::{self, Options};
use bitferry::report::{BitmapOutcome, Status};
use bitferry::{Observer, Silent, exit_status};
use bitferry_tests::destination::{Destination, connection_with};
use bitferry_tests::image::make;
use bitferry_tests::outgoing::{bitmaps_of, contents_of, pong, send};
use bitferry_tests::{Peer, Scratch, require_all};
use mig_core::transport::Connection;
use serde_json::{Value, json};

const MIB: u64 = 1 << 20;

fn peers() -> bool {
    require_all(&[Peer::Qemu72, Peer::Qemu10, Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

/// A peer of our own that takes everything and then answers `answer`, or says nothing and stays.
fn answering(answer: Option<&'static [u8]>, patience: Duration) -> Connection {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        let mut seen = Vec::new();
        // The description ends the stream.
        while !seen.ends_with(b"\x06\0\0\0\x02{}") {
            match theirs.read(&mut bytes) {
                Ok(len @ 1..) => seen.extend_from_slice(&bytes[..len]),
                _ => return,
            }
            pong(&seen, &mut theirs);
        }
        match answer {
            Some(answer) => theirs.write_all(answer).unwrap(),
            None => std::thread::sleep(Duration::from_secs(30)),
        }
    });
    connection_with(ours, patience)
}

#[test]
fn every_answer_has_its_meaning() {
    if !require_all(&[Peer::QemuImg]) {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let options = bitmaps_of(&[("d", &source)]);
    let patience = Duration::from_secs(20);
    let run = |answer, patience| outgoing::run(answering(answer, patience), &options, &Silent);
    let shut = b"\0\x01\0\x04\0\0\0\0";
    for answer in [&shut[..], b"\0\x02\0\x04\0\0\0\x07\0\x07\0\0\0\x01\0\x04\0\0\0\0"] {
        let report = run(Some(answer), patience).unwrap();
        assert_eq!(report.status, Status::Completed);
    }
    let error = run(Some(b"\0\x01\0\x04\0\0\0\x01"), patience).expect_err("it fails");
    assert_eq!(error.exit_status(), 4, "{error}");
    // It has everything, and may run: what says no less than that it failed proves nothing.
    for answer in [
        &b""[..],
        b"\0\x01\0",
        b"\0\x09\0\0",
        b"\0\x01\xff\xff",
        b"\0\x04\0\x0c\0\0\0\0\0\0\0\0\0\0\x10\0",
        b"\0\x03\0\x11\0\0\0\0\0\0\0\0\0\0\x10\0\x04pc.r",
    ] {
        let report = run(Some(answer), patience).unwrap();
        assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8), "{answer:?}");
    }
    let report = run(None, Duration::from_millis(200)).unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8));
}

/// Kills the destination once it has said how the migration ended, which is what it says after
/// that it has got so far.
struct LastWord<F> {
    reader: Box<dyn Read + Send>,
    has_pong: bool,
    then: Option<F>,
}

impl<F: FnOnce()> Read for LastWord<F> {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let len = self.reader.read(bytes)?;
        if std::mem::replace(&mut self.has_pong, true)
            && let Some(then) = self.then.take()
        {
            then();
        }
        Ok(len)
    }
}

#[test]
fn a_monitor_that_is_gone_leaves_the_outcome_unknown() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let target = make(&scratch, "t.qcow2", 2 * MIB).done();
    let mut destination = Destination::of_bitmaps(Peer::Qemu10, &[("d", &target)]);
    let mut options = bitmaps_of(&[("d", &source)]);
    options.peer_qmp = Some(destination.monitor());
    let connection = destination.connect();
    let prepared = outgoing::prepare(&options, &Silent).unwrap();
    let then = Some(move || drop(destination.qemu.kill()));
    let reader = Box::new(LastWord { reader: connection.reader, has_pong: false, then });
    let report = prepared.send(Connection { reader, ..connection }, &Silent).unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8));
    assert_eq!(report.disks[0].bitmaps[0].outcome, BitmapOutcome::Sent);
    assert!(report.error.unwrap().contains("monitor"));
}

/// A monitor of our own: a QEMU 10 with one node of 2 MiB, whose migration stands as it is told to.
fn monitor(scratch: &Scratch, status: &'static str) -> PathBuf {
    let path = scratch.path(status);
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let version = json!({ "major": 10, "minor": 0, "micro": 0 });
        let greeting = json!({ "QMP": { "version": { "qemu": version }, "capabilities": [] } });
        writeln!(stream, "{greeting}").unwrap();
        for line in BufReader::new(stream.try_clone().unwrap()).lines() {
            let Ok(line) = line else { return };
            let request: Value = serde_json::from_str(&line).unwrap();
            let answer = match request["execute"].as_str().unwrap() {
                "query-status" => json!({ "status": "inmigrate" }),
                "query-migrate" => json!({ "status": status, "error-desc": "said so" }),
                "query-named-block-nodes" => {
                    let image = json!({ "virtual-size": 2 * MIB });
                    json!([{ "node-name": "d", "image": image, "ro": false }])
                }
                "query-block" | "query-migrate-capabilities" => json!([]),
                _ => json!({}),
            };
            writeln!(stream, "{}", json!({ "return": answer, "id": request["id"] })).unwrap();
        }
    });
    path
}

/// A user who has no time to wait.
struct Impatient;

impl Observer for Impatient {
    fn is_cancelled(&self) -> bool {
        true
    }
}

#[test]
fn where_the_line_says_nothing_the_monitor_decides() {
    if !require_all(&[Peer::QemuImg]) {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let shut = b"\0\x01\0\x04\0\0\0\0";
    for answer in [&b""[..], shut] {
        let run = |status, observer: &dyn Observer| {
            let mut options = bitmaps_of(&[("d", &source)]);
            let dir = Scratch::new();
            options.peer_qmp = Some(monitor(&dir, status));
            let prepared = outgoing::prepare(&options, &Silent).unwrap();
            prepared.send(answering(Some(answer), Duration::from_secs(20)), observer)
        };
        let report = run("completed", &Impatient).unwrap();
        // The node of this monitor never has a bitmap.
        assert_eq!((report.status, exit_status(&report)), (Status::Completed, 6));
        assert_eq!(report.disks[0].bitmaps[0].outcome, BitmapOutcome::Dropped);
        let error = run("failed", &Silent).expect_err("it failed");
        assert!(error.to_string().contains("said so") && error.exit_status() == 4, "{error}");
        let report = run("active", &Impatient).unwrap();
        assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8));
        assert!(report.error.unwrap().contains("\"active\""));
    }
}

/// A QEMU without a machine, with a UUID, that has the image as `d`.
fn with_uuid(peer: Peer, image: &Path) -> Destination {
    let drive = format!("if=none,id=d,format=qcow2,file={}", image.display());
    let uuid = "01020304-0506-0708-090a-0b0c0d0e0f10";
    let args = ["-machine", "none", "-uuid", uuid, "-drive", &drive];
    Destination::start(peer, args.map(str::to_owned))
}

/// What it is called.
const UUID: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

#[test]
fn what_a_qemu_fails_of_is_a_failure_however_short_the_stream() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let target = make(&scratch, "t.qcow2", 2 * MIB).done();
    let small = make(&scratch, "small.qcow2", MIB).done();
    let plain = bitmaps_of(&[("d", &source)]);
    let machine = Options { machine: "pc".to_owned(), ..plain.clone() };
    let uuid = Options { uuid: Some([7; 16]), ..plain.clone() };
    for peer in [Peer::Qemu72, Peer::Qemu10] {
        for (options, image, capability) in [
            (&machine, &target, None),
            (&uuid, &target, None),
            (&plain, &target, Some("x-ignore-shared")),
            (&plain, &small, None),
        ] {
            let mut destination = with_uuid(peer, image);
            destination.qemu.capabilities(capability.as_slice());
            let monitor = destination.monitor();
            let asked = Options { peer_qmp: Some(monitor), ..options.clone() };
            let error = outgoing::prepare(&asked, &Silent).expect_err("refused");
            assert!(error.exit_status() == 4, "{error}");
            assert!(error.to_string().contains("nothing was sent"), "{error}");
            // Without a monitor the QEMU dies of it, which is not taken for the end of a success.
            let connection = destination.connect();
            let error = outgoing::run(connection, options, &Silent).expect_err("it fails");
            assert_eq!(error.exit_status(), 4, "{peer:?} {options:?}: {error}");
        }
        for uuid in [None, Some(UUID)] {
            let mut destination = with_uuid(peer, &target);
            let peer_qmp = Some(destination.monitor());
            let options = Options { uuid, machine: "none".to_owned(), peer_qmp, ..plain.clone() };
            assert_eq!(exit_status(&send(&mut destination, &options)), 0);
            destination.completes();
        }
    }
}

/// Runs `body`, which may wait for a silent peer that long, but not twice.
#[track_caller]
fn once<T>(patience: Duration, body: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let done = body();
    let took = begun.elapsed();
    assert!(took >= patience && took < patience.mul_f32(1.8), "{took:?}");
    done
}

#[test]
fn a_silent_peer_is_waited_for_once() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 32 * MIB).bitmap("b", 65536).write(1, 0, 32 * MIB);
    let source = source.done();
    let patience = Duration::from_secs(6);
    // It never reads.
    let mut options = contents_of(&[("d", &source)]);
    options.workers = NonZeroUsize::new(3);
    let (ours, _theirs) = UnixStream::pair().unwrap();
    let connection = connection_with(ours, patience);
    let error = once(patience, || outgoing::run(connection, &options, &Silent)).unwrap_err();
    assert_eq!(error.exit_status(), 4, "{error}");
    // It waits for more connections.
    let options = bitmaps_of(&[("d", &source)]);
    let target = make(&scratch, "t.qcow2", 32 * MIB).done();
    let mut destination = Destination::of_bitmaps(Peer::Qemu10, &[("d", &target)]);
    destination.qemu.capabilities(&["multifd"]);
    let asked = Options { peer_qmp: Some(destination.monitor()), ..options.clone() };
    let error = outgoing::prepare(&asked, &Silent).unwrap_err();
    assert!(error.exit_status() == 4 && error.to_string().contains("multifd"), "{error}");
    let socket = scratch.path("mig");
    let uri = format!("unix:{}", socket.display());
    destination.qemu.ok("migrate-incoming", json!({ "uri": uri }));
    let connection = connection_with(UnixStream::connect(&socket).unwrap(), patience);
    let error = once(patience, || outgoing::run(connection, &options, &Silent)).unwrap_err();
    assert_eq!(error.exit_status(), 4, "{error}");
    // It has everything, and neither says how it ended nor does its monitor.
    let small = make(&scratch, "small.qcow2", 2 * MIB).bitmap("b", 65536).done();
    let mut options = bitmaps_of(&[("d", &small)]);
    options.peer_qmp = Some(monitor(&scratch, "active"));
    let prepared = outgoing::prepare(&options, &Silent).unwrap();
    let report = once(patience, || prepared.send(answering(None, patience), &Silent)).unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8));
}

/// A user who wants to stop a moment later.
struct Leaving(Instant);

impl Observer for Leaving {
    fn is_cancelled(&self) -> bool {
        self.0.elapsed() > Duration::from_millis(500)
    }
}

#[test]
fn whoever_wants_to_stop_is_let_go_at_once() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 32 * MIB).bitmap("b", 65536).write(1, 0, 32 * MIB);
    let source = source.done();
    let (contents, bitmaps) = (contents_of(&[("d", &source)]), bitmaps_of(&[("d", &source)]));
    let patience = Duration::from_secs(60);
    let begun = Instant::now();
    // It is written to, and does not read; it is waited for before the end, and after it.
    for options in [&contents, &bitmaps] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let prepared = outgoing::prepare(options, &Silent).unwrap();
        let result = prepared.send(connection_with(ours, patience), &Leaving(Instant::now()));
        assert_eq!(result.unwrap_err().exit_status(), 130);
    }
    let prepared = outgoing::prepare(&bitmaps, &Silent).unwrap();
    let report = prepared.send(answering(None, patience), &Leaving(Instant::now())).unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Unknown, 8));
    // Its monitor says nothing.
    let silent = scratch.path("silent");
    let _listener = UnixListener::bind(&silent).unwrap();
    let options = Options { peer_qmp: Some(silent), ..bitmaps };
    let error = outgoing::prepare(&options, &Leaving(Instant::now())).unwrap_err();
    assert_eq!(error.exit_status(), 130, "{error}");
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
}

/// A connection whose other direction breaks once the destination has said that it got to the end.
struct Broken(Box<dyn Read + Send>, bool);

impl Read for Broken {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let len = self.0.read(bytes)?;
        if !std::mem::replace(&mut self.1, true) {
            return Ok(len);
        }
        Err(std::io::ErrorKind::ConnectionReset.into())
    }
}

#[test]
fn a_qemu_that_took_over_is_no_failure_because_its_answer_was_lost() {
    if !peers() {
        return;
    }
    let scratch = Scratch::new();
    let source = make(&scratch, "s.qcow2", 2 * MIB).bitmap("b", 65536).write(1, 0, 512).done();
    for peer in [Peer::Qemu72, Peer::Qemu10] {
        for is_asked in [true, false] {
            let target = make(&scratch, "t.qcow2", 2 * MIB).done();
            let mut destination = Destination::of_bitmaps(peer, &[("d", &target)]);
            let mut options = bitmaps_of(&[("d", &source)]);
            options.peer_qmp = is_asked.then(|| destination.monitor());
            let prepared = outgoing::prepare(&options, &Silent).unwrap();
            let connection = destination.connect();
            let reader = Box::new(Broken(connection.reader, false));
            let report = prepared.send(Connection { reader, ..connection }, &Silent).unwrap();
            let expected = if is_asked {
                (Status::Completed, 0, BitmapOutcome::Preserved)
            } else {
                (Status::Unknown, 8, BitmapOutcome::Sent)
            };
            let outcome = report.disks[0].bitmaps[0].outcome;
            assert_eq!((report.status, exit_status(&report), outcome), expected, "{peer:?}");
            destination.completes();
        }
    }
}
