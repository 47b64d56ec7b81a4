//! `send` and `receive` as two processes: over every transport, with several disks and bitmaps, and
//! what each side says where the other one is not as it should be.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bitferry_tests::image::make;
use bitferry_tests::migration::{both as migrate, done as migrated, listening};
use bitferry_tests::pki::{Authority, Certificate};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, qemu, require_all};
use format_spec::native::hello::{Hello, Join};
use rustix::process::Signal;

const MIB: u64 = 1 << 20;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

/// A disk with content all over, and two bitmaps that hold different bits.
fn disk(scratch: &Scratch, name: &str, pattern: u8) -> PathBuf {
    make(scratch, name, 64 * MIB)
        .write(pattern, 0, 5 * MIB)
        .bitmap("weekly", 65536)
        .write(pattern + 1, 30 * MIB, MIB + 512)
        .bitmap("hourly", 4096)
        .write(pattern + 2, 63 * MIB, 8192)
        .write(0, MIB, 65536)
        .done()
}

fn receive(scratch: &Scratch, words: &str) -> Run {
    bitferry().dir(scratch.dir()).words("receive --json").words(words)
}

fn send(scratch: &Scratch, words: &str) -> Run {
    bitferry().dir(scratch.dir()).words("send --json").words(words)
}

#[test]
fn one_disk_arrives_with_its_bitmaps_over_each_socket() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let source = disk(&scratch, "a.qcow2", 3);
    for (index, uri) in ["tcp:127.0.0.1:0", "tcp:localhost:0", "unix:socket"].iter().enumerate() {
        let name = format!("out{index}.qcow2");
        let (sent, received) =
            migrated(&scratch, "--disk vda=a.qcow2", &format!("--disk vda={name} {uri}"));
        qemu::same_disk(&source, &scratch.path(&name), &["weekly", "hourly"]);
        for summary in [&sent, &received] {
            assert_eq!(summary["status"], "completed", "{summary}");
            assert_eq!(summary["disks"][0]["id"], "vda");
            assert_eq!(summary["disks"][0]["verified"], "yes");
            let bitmaps = summary["disks"][0]["bitmaps"].as_array().expect("bitmaps");
            assert!(bitmaps.len() == 2, "{summary}");
            assert!(bitmaps.iter().all(|b| b["outcome"] == "preserved"), "{summary}");
        }
        assert_eq!(sent["disks"][0]["content-hash"], received["disks"][0]["content-hash"]);
        assert!(sent["wire-bytes"].as_u64() >= sent["disks"][0]["bytes-data"].as_u64());
    }
    assert!(!scratch.path("socket").exists());
}

#[test]
fn several_disks_channels_and_compression() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let sources = [disk(&scratch, "a.qcow2", 3), disk(&scratch, "b.qcow2", 7)];
    let mut wire = Vec::new();
    for (channels, compress) in [(1, "none"), (2, "zlib"), (4, "zstd:3"), (4, "none")] {
        let (sent, _) = migrated(
            &scratch,
            &format!(
                "--disk vda=a.qcow2 --disk vdb=b.qcow2 --channels {channels} --compress {compress}"
            ),
            "--disk vdb=b.out --disk vda=a.out tcp:127.0.0.1:0",
        );
        for (source, out) in sources.iter().zip(["a.out", "b.out"]) {
            qemu::same_disk(source, &scratch.path(out), &["weekly", "hourly"]);
            std::fs::remove_file(scratch.path(out)).expect("remove");
        }
        wire.push(sent["wire-bytes"].as_u64().expect("a number"));
    }
    assert!(wire[1] < wire[0] / 4 && wire[2] < wire[0] / 4, "nothing was compressed: {wire:?}");
}

#[test]
fn one_way_streams_prove_themselves_at_the_destination() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let source = disk(&scratch, "a.qcow2", 3);
    let unconfirmed = |output: Output, is_on_stdout: bool| {
        let output = output.expect_exit(Exit::Done);
        let text = if is_on_stdout { output.text() } else { output.complaint() };
        let summary = json::lines(&text).pop().expect("a summary");
        assert_eq!(summary["status"], "completed", "{summary}");
        assert_eq!(summary["disks"][0]["verified"], "unconfirmed", "{summary}");
        assert_eq!(summary["disks"][0]["bitmaps"][0]["outcome"], "sent", "{summary}");
    };
    // A file, behind what somebody else keeps in it.
    std::fs::write(scratch.path("stream"), [9; 4096]).expect("write");
    let uri = "file:stream,offset=4096";
    unconfirmed(send(&scratch, "--disk vda=a.qcow2").arg(uri).output(), true);
    receive(&scratch, "--disk vda=f.qcow2").arg(uri).output().expect_exit(Exit::Done);
    qemu::same_disk(&source, &scratch.path("f.qcow2"), &["weekly", "hourly"]);
    // A command.
    let uri = "exec:gzip -1 > stream.gz";
    let sent = send(&scratch, "--disk vda=a.qcow2 --allow-exec").arg(uri).output();
    unconfirmed(sent, true);
    let received = receive(&scratch, "--disk vda=x.qcow2 --allow-exec").arg("exec:zcat stream.gz");
    received.output().expect_exit(Exit::Done);
    qemu::same_disk(&source, &scratch.path("x.qcow2"), &["weekly", "hourly"]);
    // Standard output and input, joined by a shell; what is said goes elsewhere.
    let binary = bitferry_tests::bitferry::binary().display();
    let line = format!(
        "{binary} send --json --disk vda=a.qcow2 - 2>said | {binary} receive --json --disk \
         vda=p.qcow2 - 2>heard"
    );
    let output = Run::new("bash").args(["-o", "pipefail", "-c", &line]).dir(scratch.dir()).output();
    assert!(output.status.success() && output.stdout.is_empty(), "{output}");
    qemu::same_disk(&source, &scratch.path("p.qcow2"), &["weekly", "hourly"]);
    for said in ["said", "heard"] {
        let text = std::fs::read_to_string(scratch.path(said)).expect("text");
        assert_eq!(json::lines(&text).pop().expect("a summary")["status"], "completed");
    }
    // A pipe by its number.
    let line = format!(
        "{binary} send --disk vda=a.qcow2 fd:7 7>&1 >/dev/null | {binary} receive --disk \
         vda=d.qcow2 fd:8 8<&0 </dev/null"
    );
    let output = Run::new("bash").args(["-o", "pipefail", "-c", &line]).dir(scratch.dir()).output();
    assert!(output.status.success(), "{output}");
    qemu::same_disk(&source, &scratch.path("d.qcow2"), &["weekly", "hourly"]);
}

#[test]
fn a_damaged_stream_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    disk(&scratch, "a.qcow2", 3);
    send(&scratch, "--disk vda=a.qcow2 file:stream").output().expect_exit(Exit::Done);
    let stream = std::fs::read(scratch.path("stream")).expect("read");
    let before = scratch.names();
    let mut flipped = stream.clone();
    flipped[stream.len() / 2] ^= 1;
    for (bytes, exit) in [
        (&flipped[..], Exit::Malformed),
        (&stream[..stream.len() / 2], Exit::Transport),
        (&b"not a stream at all"[..], Exit::Transport),
        (&b""[..], Exit::Transport),
    ] {
        std::fs::write(scratch.path("stream"), bytes).expect("write");
        let output = receive(&scratch, "--disk vda=out.qcow2 file:stream").output();
        let output = output.expect_no_crash().expect_exit(exit);
        assert!(output.complaint().contains("\nhint: "), "{output}");
        assert_eq!(json::summary(&output)["status"], "failed");
        assert_eq!(scratch.names(), before);
    }
}

#[test]
fn bitmaps_are_chosen_and_renamed_on_either_side() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let a = disk(&scratch, "a.qcow2", 3);
    make(&scratch, "b.qcow2", 16 * MIB).bitmap("own", 65536).write(1, 0, MIB).done();
    let (sent, received) = migrated(
        &scratch,
        "--disk vda=a.qcow2 --disk vdb=b.qcow2 --bitmaps hourly,own --rename-bitmap vda/hourly=h",
        "--disk vda=a.out --disk vdb=b.out --rename-bitmap own=mine unix:socket",
    );
    let listed = |name: &str| {
        let info = bitferry().dir(scratch.dir()).words("info --json").arg(name).ok();
        let bitmaps = json::document(&info)["bitmaps"].as_array().expect("bitmaps").clone();
        bitmaps.iter().map(|b| b["name"].as_str().expect("name").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!((listed("a.out"), listed("b.out")), (vec!["h".into()], vec!["mine".into()]));
    let read = |image: &Path, name| qemu::dirty_ranges(image, name).expect("ranges");
    assert_eq!(read(&a, "hourly"), read(&scratch.path("a.out"), "h"));
    assert_eq!(sent["disks"][0]["bitmaps"][1]["changed"][0], "name: hourly -> h", "{sent}");
    assert_eq!(received["disks"][1]["bitmaps"][0]["changed"][0], "name: own -> mine");
    // Names that mean nothing are no guess.
    for wrong in ["--bitmaps nightly", "--rename-bitmap vdb/own=x", "--rename-bitmap nope=x"] {
        let words = format!("--disk vda=a.qcow2 --dry-run {wrong} unix:none");
        let plan = json::summary(&send(&scratch, &words).output().expect_exit(Exit::Usage));
        assert_eq!(plan["refusals"].as_array().expect("refusals").len(), 1, "{plan}");
    }
}

#[test]
fn a_dry_run_connects_nothing() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    disk(&scratch, "a.qcow2", 3);
    let output = send(&scratch, "--disk vda=a.qcow2 --dry-run unix:nobody").output();
    let plan = json::summary(&output.expect_exit(Exit::Done));
    assert_eq!(plan["event"], "plan");
    assert_eq!(plan["disks"][0]["virtual-size"], 64 * MIB);
    assert_eq!(plan["disks"][0]["bitmaps"].as_array().expect("bitmaps").len(), 2);
    let copy = bitferry().dir(scratch.dir()).words("copy --json --dry-run a.qcow2 b").output();
    let copy = json::summary(&copy.expect_exit(Exit::Done));
    assert_eq!(plan["space-needed"], copy["space-needed"], "{plan}");
    assert_eq!(plan["disks"][0]["space-needed"], plan["space-needed"]);
    let text = bitferry().dir(scratch.dir()).words("send --disk vda=a.qcow2 --dry-run unix:nobody");
    let text = text.output().expect_exit(Exit::Done).text();
    assert!(["hourly", "nothing was sent", "at most "].iter().all(|w| text.contains(w)), "{text}");
}

#[test]
fn what_exists_is_kept_replaced_or_written_into() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let source = disk(&scratch, "a.qcow2", 3);
    let old = make(&scratch, "old.qcow2", 64 * MIB).bitmap("mine", 65536).write(9, 0, MIB).done();
    let output = receive(&scratch, "--disk vda=old.qcow2 unix:s").output();
    let output = output.expect_exit(Exit::Device);
    assert!(output.complaint().contains("--in-place"), "{output}");
    // Into it: its own bitmap records what was written.
    let (_, received) =
        migrated(&scratch, "--disk vda=a.qcow2", "--in-place --disk vda=old.qcow2 unix:s");
    qemu::same_disk(&source, &old, &["weekly", "hourly"]);
    assert_eq!(received["disks"][0]["verified"], "yes");
    let mine = qemu::dirty_ranges(&old, "mine").expect("it is valid");
    assert!(mine.iter().any(|range| range.contains(&(30 * MIB))), "{mine:?}");
    // A raw file cannot hold bitmaps, and says so before anything is written.
    std::fs::write(scratch.path("raw"), vec![8; 64 * MIB as usize]).expect("write");
    let place = "--in-place --disk vda=raw,format=raw unix:s";
    let (sent, received) = migrate(&scratch, "--disk vda=a.qcow2", place);
    let received = received.expect_exit(Exit::Refused);
    assert!(
        received.complaint().contains("\nhint: at the source use --bitmaps none"),
        "{received}"
    );
    assert!(sent.expect_exit(Exit::Refused).complaint().contains("raw image"), "told");
    // Nor can a new one, and nothing of it stays.
    let before = scratch.names();
    let new = "--disk vda=new.raw,format=raw unix:s";
    let (sent, received) = migrate(&scratch, "--disk vda=a.qcow2", new);
    _ = [sent, received].map(|side| side.expect_exit(Exit::Refused));
    assert_eq!(scratch.names(), before);
    migrated(&scratch, "--disk vda=a.qcow2 --bitmaps none", place);
    qemu::same_content((&source, "qcow2"), (&scratch.path("raw"), "raw"));
    // Another size is another disk.
    make(&scratch, "small.qcow2", 32 * MIB).done();
    let place = "--in-place --disk vda=small.qcow2 unix:s";
    let (sent, received) = migrate(&scratch, "--disk vda=a.qcow2", place);
    sent.expect_exit(Exit::Transport);
    let received = received.expect_exit(Exit::Transport);
    assert!(received.complaint().contains("options of both sides"), "{received}");
}

#[test]
fn a_disk_without_a_place_is_told_to_both() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    disk(&scratch, "a.qcow2", 3);
    let (sent, received) = migrate(&scratch, "--disk vda=a.qcow2", "--disk vdb=out unix:s");
    // Either side may be the one that is wrong.
    for output in [sent, received].map(|side| side.expect_exit(Exit::Transport)) {
        let said = output.complaint();
        assert!(said.contains("\"vda\"") && said.contains("options of both sides"), "{output}");
    }
    assert!(!scratch.path("out").exists());
}

#[test]
fn a_stream_does_not_overwrite_what_it_is_made_of() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let image = disk(&scratch, "a.qcow2", 3);
    make(&scratch, "over.qcow2", 64 * MIB).backing("a.qcow2", "qcow2").done();
    std::fs::hard_link(&image, scratch.path("link")).expect("link");
    let before = std::fs::read(&image).expect("read");
    for words in [
        "--disk vda=a.qcow2 file:a.qcow2",
        "--disk vda=a.qcow2 file:link",
        "--disk vda=over.qcow2 --flatten file:a.qcow2",
        "--dialect qemu:10.0 --no-blocks --disk vda=a.qcow2 file:a.qcow2",
    ] {
        let output = send(&scratch, words).output().expect_no_crash();
        assert!(output.code() != Some(0) && output.complaint().contains("in use"), "{output}");
        assert!(std::fs::read(&image).expect("read") == before, "{words}");
    }
    // Nor anything else that is not a stream itself.
    std::fs::write(scratch.path("notes"), "irreplaceable").expect("write");
    let output = send(&scratch, "--disk vda=a.qcow2 file:notes").output().expect_exit(Exit::Device);
    assert!(output.complaint().contains("\nhint: remove it"), "{output}");
    assert_eq!(std::fs::read(scratch.path("notes")).expect("read"), b"irreplaceable");
    for _ in 0..2 {
        send(&scratch, "--disk vda=a.qcow2 file:stream").output().expect_exit(Exit::Done);
    }
}

#[test]
fn strangers_are_turned_away_and_the_source_is_waited_for() {
    use std::io::Write as _;
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let source = disk(&scratch, "a.qcow2", 3);
    let running = receive(&scratch, "--disk vda=out.qcow2 tcp:127.0.0.1:0").spawn();
    let uri = listening(&running);
    let address = uri.strip_prefix("tcp:").expect("tcp");
    let stranger = || std::net::TcpStream::connect(address).expect("connect");
    drop(stranger());
    stranger().write_all(b"GET / HTTP/1.0\r\n\r\n").expect("write");
    let late = Hello::Join(Join { session: [7; 16], ticket: [8; 16], channel: 1 });
    stranger().write_all(&late.encode()).expect("write");
    let _silent = stranger();
    send(&scratch, "--disk vda=a.qcow2").arg(&uri).output().expect_exit(Exit::Done);
    let received = running.wait().expect_exit(Exit::Done);
    qemu::same_disk(&source, &scratch.path("out.qcow2"), &["weekly"]);
    let warnings = json::lines(&received.text());
    let warnings = warnings.iter().filter(|event| event["event"] == "warning");
    assert!(warnings.count() >= 3, "{received}");
}

#[test]
fn nobody_there_and_nobody_coming() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    disk(&scratch, "a.qcow2", 3);
    let output = send(&scratch, "--disk vda=a.qcow2 unix:nobody").output();
    let output = output.expect_exit(Exit::Transport);
    assert!(output.complaint().contains("\nhint: check that somebody listens there"), "{output}");
    let running = receive(&scratch, "--disk vda=out unix:socket").spawn();
    listening(&running);
    running.signal(Signal::INT);
    let output = running.wait();
    assert_eq!(output.code(), Some(130), "{output}");
    assert_eq!(json::summary(&output)["status"], "interrupted");
    assert!(!scratch.path("socket").exists());
}

#[test]
fn ctrl_c_on_either_side_ends_both() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    disk(&scratch, "a.qcow2", 3);
    for interrupts_source in [true, false] {
        let destination = receive(&scratch, "--disk vda=out.qcow2 unix:s").spawn();
        let uri = listening(&destination);
        let slow = send(&scratch, "--disk vda=a.qcow2 --bandwidth 256K").arg(uri).spawn();
        // Before they know one another, a source that goes away is only one that did not come.
        slow.wait_for(false, |line| line.contains("progress").then_some(()));
        destination.wait_for(false, |line| line.contains("transfer").then_some(()));
        let begun = Instant::now();
        let interrupted = if interrupts_source { &slow } else { &destination };
        interrupted.signal(Signal::INT);
        let (sent, received) = (slow.wait(), destination.wait());
        assert!(begun.elapsed() < Duration::from_secs(30));
        let (stopped, left) =
            if interrupts_source { (&sent, &received) } else { (&received, &sent) };
        assert_eq!(stopped.code(), Some(130), "{stopped}");
        assert_eq!(left.code(), Some(Exit::Transport as i32), "{left}");
        assert!(left.complaint().contains("\nhint: somebody stopped it there"), "{left}");
        assert!(!scratch.path("out.qcow2").exists());
    }
}

#[test]
fn bandwidth_is_kept_to() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    disk(&scratch, "a.qcow2", 3);
    let (sent, _) = migrated(
        &scratch,
        "--disk vda=a.qcow2 --bandwidth 4M --channels 2",
        "--disk vda=out.qcow2 unix:s",
    );
    // 6 MiB, of which the first go at once.
    assert!(sent["total-time-ms"].as_u64().expect("a number") > 700, "{sent}");
}

#[test]
fn encrypted_both_ways_or_not_at_all() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let source = disk(&scratch, "a.qcow2", 3);
    let name = Certificate { name: "vault.example", is_expired: false };
    Authority::new("ours").directory(&scratch, "pki", name);
    migrated(
        &scratch,
        "--disk vda=a.qcow2 --channels 3 --tls-dir pki --tls-peer vault.example",
        "--disk vda=out.qcow2 --tls-dir pki tcp:127.0.0.1:0",
    );
    qemu::same_disk(&source, &scratch.path("out.qcow2"), &["weekly", "hourly"]);
    // Another name, no TLS here, no TLS there: each side says what is wrong, the destination waits.
    let running = receive(&scratch, "--disk vda=b --tls-dir pki tcp:127.0.0.1:0").spawn();
    let uri = listening(&running);
    for (words, said) in [
        ("--tls-dir pki", "not for \"127.0.0.1\""),
        ("", "speaks TLS, and this side was not told to"),
    ] {
        let sent = send(&scratch, "--disk vda=a.qcow2").words(words).arg(&uri).output();
        let sent = sent.expect_exit(Exit::Transport);
        assert!(sent.complaint().contains(said) && sent.complaint().contains("hint: "), "{sent}");
    }
    running.signal(Signal::INT);
    let received = running.wait();
    assert!(received.text().contains("what it sends is not TLS"), "{received}");
    let running = receive(&scratch, "--disk vda=b tcp:127.0.0.1:0").spawn();
    let words = "--disk vda=a.qcow2 --tls-dir pki --tls-peer vault.example";
    let sent = send(&scratch, words).arg(listening(&running)).output().expect_exit(Exit::Transport);
    assert!(sent.complaint().contains("give --tls-dir on both sides"), "{sent}");
    running.signal(Signal::INT);
    let received = running.wait();
    assert!(received.text().contains("speaks TLS"), "{received}");
}

#[test]
fn what_cannot_be_done_is_wrong_usage() {
    let scratch = Scratch::new();
    let usage = |verb: &str, words: &str| {
        let run = bitferry().dir(scratch.dir()).arg(verb).words(words);
        run.output().expect_no_crash().expect_exit(Exit::Usage);
    };
    std::fs::write(scratch.path("x.raw"), [0; 4096]).expect("write");
    for words in [
        "unix:s",
        "--disk vda=x.raw",
        "--disk vda=x.raw nonsense",
        "--disk vda=x.raw tcp:h",
        "--disk vda=x.raw exec:true",
        "--disk vda=x.raw fd:1",
        "--disk x.raw unix:s",
        "--disk vda=x.raw --disk vda=x.raw unix:s",
        "--disk vda=x.raw --channels 0 unix:s",
        "--disk vda=x.raw --channels 2 file:s",
        "--disk vda=x.raw --compress zstd file:s",
        "--disk vda=x.raw --no-verify file:s",
        "--disk vda=x.raw --compress lz4 unix:s",
        "--disk vda=x.raw --tls-peer h unix:s",
        "--disk vda=x.raw --tls-dir . file:s",
        "--disk vda=x.raw --machine pc unix:s",
        "--disk vda=x.raw --postcopy unix:s",
        "--disk vda=x.raw --dialect qemu:6.0 unix:s",
    ] {
        usage("send", words);
    }
    assert!(!scratch.path("s").exists(), "nothing is made");
    for words in [
        "unix:s",
        "--disk vda=y --force --in-place unix:s",
        "--disk vda=y,readonly unix:s",
        "--disk vda=y --in-place -o cluster_size=4K unix:s",
        "--disk vda=y --rename-bitmap vdb/a=b unix:s",
        "--disk vda=y --disk vdb=./y unix:s",
        "--disk vda=y --disk vdb=.y.bitferry-receipt unix:s",
        "--disk vda=.y.bitferry-part unix:s",
        "--disk vda=y -o data_file=y unix:s",
        "--disk vda=y -o data_file=.z.bitferry-journal unix:s",
    ] {
        usage("receive", words);
    }
}

#[test]
fn a_source_that_changes_while_it_is_sent_is_not_published() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    let source = disk(&scratch, "a.qcow2", 3);
    for is_one_way in [false, true] {
        // What goes into a file is taken from there afterwards.
        let receiver = (!is_one_way)
            .then(|| receive(&scratch, "--disk vda=out.qcow2 tcp:127.0.0.1:0").spawn());
        let uri = receiver.as_ref().map_or_else(|| "file:stream".to_owned(), listening);
        let words = format!("--disk vda=a.qcow2 --bandwidth 2M {uri}");
        let sending = send(&scratch, &words).spawn();
        sending.wait_for(false, |line| line.contains("\"done\":").then_some(()));
        // Without a lock.
        let file = std::fs::OpenOptions::new().write(true).open(&source).expect("open");
        let pattern = if is_one_way { 8 } else { 9 };
        std::os::unix::fs::FileExt::write_all_at(&file, &[pattern; 512], 3 * MIB).expect("write");
        let sent = sending.wait().expect_exit(Exit::Different);
        assert!(sent.complaint().contains("nothing was published"), "{sent}");
        let received = match receiver {
            Some(receiver) => receiver.wait(),
            None => receive(&scratch, "--disk vda=out.qcow2 file:stream").output(),
        };
        let received = received.expect_no_crash();
        assert_eq!(received.code(), Some(Exit::Different as i32), "{received}");
        for said in [sent, received] {
            assert!(said.complaint().contains("was written to while"), "{said}");
        }
        assert!(!scratch.path("out.qcow2").exists());
    }
    let (sent, _) = migrated(&scratch, "--disk vda=a.qcow2", "--disk vda=out.qcow2 unix:socket");
    assert_eq!(sent["disks"][0]["verified"], "yes", "{sent}");
    qemu::same_content((&source, "qcow2"), (&scratch.path("out.qcow2"), "qcow2"));
}
