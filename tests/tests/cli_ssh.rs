//! `copy` to and from another host. A stand-in for ssh runs the remote command on this one, in a
//! directory of its own, through a shell as sshd does.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use bitferry_tests::bitferry::binary;
use bitferry_tests::image::{Bytes, make};
use bitferry_tests::process::{PATIENCE, Running};
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, qemu, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;

/// What ssh does as far as `bitferry` can tell: the last argument goes to a shell at the other end,
/// which begins in a directory of its own.
const STAND_IN: &str = r#"#!/bin/sh
for last; do :; done
case "$last" in *" meet "*) [ -z "$ALONE" ] || exit 255;; esac
[ -z "$SAID" ] || printf '%s\n' "$last" >>"$SAID"
cd "$ELSEWHERE" && exec setsid sh -c "$last"
"#;

struct Hosts {
    here: Scratch,
    there: Scratch,
}

impl Hosts {
    /// `None` without the peers that images are made and held against with.
    fn new() -> Option<Self> {
        if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
            return None;
        }
        let hosts = Self { here: Scratch::new(), there: Scratch::new() };
        let ssh = hosts.here.path("ssh");
        std::fs::write(&ssh, STAND_IN).expect("script");
        std::fs::set_permissions(&ssh, PermissionsExt::from_mode(0o755)).expect("mode");
        Some(hosts)
    }

    fn copy(&self, words: &[&str]) -> Run {
        let run = bitferry().dir(self.here.dir()).env("BITFERRY_SSH", self.here.path("ssh"));
        let run = run.env("BITFERRY_REMOTE", binary()).env("ELSEWHERE", self.there.dir());
        run.args(["copy", "--json"]).args(words)
    }
}

fn disk(scratch: &Scratch, name: &str) {
    let image = make(scratch, name, 64 * MIB).write(3, 0, 4 * MIB).bitmap("nightly", 65536);
    image.write(5, 20 * MIB, MIB).done();
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    qemu::same_disk(a, b, &["nightly"]);
    assert!(!qemu::dirty_ranges(a, "nightly").unwrap_or_else(|o| panic!("{o}")).is_empty());
}

#[test]
fn an_image_goes_there_and_back_with_its_bitmaps() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    let name = "it's a $(copy) & more.qcow2";
    let output = hosts.copy(&["a.qcow2", &format!("user@host:{name}")]).output();
    let output = output.expect_no_crash().expect_exit(Exit::Done);
    let summary = json::summary(&output);
    assert_eq!(
        (&summary["status"], &summary["disks"][0]["verified"]),
        (&"completed".into(), &"yes".into())
    );
    // Beside the image a receipt stays, by which the same command finds out that it had finished.
    let seen = hosts.there.names().into_iter().filter(|n| !n.starts_with('.'));
    assert_eq!(seen.collect::<Vec<_>>(), [name]);
    same(&hosts.here.path("a.qcow2"), &hosts.there.path(name));

    let output = hosts.copy(&[&format!("host:{name}"), "back.qcow2"]).output();
    output.expect_no_crash().expect_exit(Exit::Done);
    same(&hosts.here.path("a.qcow2"), &hosts.here.path("back.qcow2"));
}

#[test]
fn each_channel_has_an_ssh_of_its_own() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    let copy = |n: &str, words: &[&str]| {
        let said = hosts.here.path(n);
        let words = [&["--channels", n], words].concat();
        let run = hosts.copy(&words).env("SAID", &said);
        run.output().expect_no_crash().expect_exit(Exit::Done);
        let said = std::fs::read_to_string(said).expect("commands");
        said.lines().filter(|line| line.contains(" meet bitferry-")).count()
    };
    assert_eq!(copy("3", &["a.qcow2", "host:b.qcow2"]), 2);
    same(&hosts.here.path("a.qcow2"), &hosts.there.path("b.qcow2"));
    assert_eq!(copy("4", &["host:b.qcow2", "c.qcow2"]), 3);
    same(&hosts.here.path("a.qcow2"), &hosts.here.path("c.qcow2"));
    assert_eq!(copy("1", &["a.qcow2", "host:d.qcow2"]), 0);
}

#[test]
fn a_proof_that_was_left_out_is_not_claimed_by_asking_again() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    disk(&hosts.there, "b.qcow2");
    for words in [["a.qcow2", "host:up.qcow2"], ["host:b.qcow2", "down.qcow2"]] {
        let copy = |how: &[&str]| hosts.copy(how).args(words).output().expect_no_crash();
        copy(&["--no-verify"]).expect_exit(Exit::Done);
        let output = copy(&[]).expect_exit(Exit::Usage);
        assert!(output.complaint().contains("\nhint: with --no-verify"), "{output}");
        let output = copy(&["--no-verify"]).expect_exit(Exit::Done);
        assert_eq!(json::summary(&output)["status"], "already-complete", "{output}");
        let output = copy(&["--fresh", "--force"]).expect_exit(Exit::Done);
        assert_eq!(json::summary(&output)["disks"][0]["verified"], "yes", "{output}");
    }
}

#[test]
fn a_further_ssh_that_fails_ends_it() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    disk(&hosts.there, "b.qcow2");
    for words in [["a.qcow2", "host:up.qcow2"], ["host:b.qcow2", "down.qcow2"]] {
        let copying = hosts.copy(&["--channels", "3"]).args(words).env("ALONE", "1").spawn();
        // Mostly at once, and with the limit of who waits for it at the latest.
        let is_prompt = copying.ends_within(Duration::from_secs(15));
        assert!(is_prompt || copying.ends_within(Duration::from_secs(35)), "{words:?} waits");
        // Its pipes end when the other end does.
        let output = copying.wait().expect_no_crash();
        assert_ne!(output.code(), Some(0), "{output}");
        if is_prompt {
            assert!(output.complaint().contains("255"), "{output}");
        }
        let made = [hosts.there.path("up.qcow2"), hosts.here.path("down.qcow2")];
        assert!(made.iter().all(|path| !path.exists()), "{output}");
    }
}

#[test]
fn what_stands_at_the_other_end_is_not_replaced_unasked() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    std::fs::write(hosts.there.path("b.qcow2"), "precious").expect("file");
    let output = hosts.copy(&["a.qcow2", "host:b.qcow2"]).output().expect_no_crash();
    assert_ne!(output.code(), Some(0), "{output}");
    assert_eq!(std::fs::read(hosts.there.path("b.qcow2")).expect("file"), b"precious");
    let output = hosts.copy(&["--force", "a.qcow2", "host:b.qcow2"]).output();
    output.expect_no_crash().expect_exit(Exit::Done);
    same(&hosts.here.path("a.qcow2"), &hosts.there.path("b.qcow2"));
}

/// Waits until this much has gone over the wire.
fn wait_until_sent(running: &Running, bytes: u64) {
    running.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        let is_there = event["phase"] == "transfer" && event["done"].as_u64()? >= bytes;
        is_there.then_some(())
    });
}

/// Waits until whoever worked at the other end has let go of what it made.
fn wait_until_left(hosts: &Scratch, name: &str) {
    let part = hosts.path(&format!(".{name}.bitferry-part"));
    let begun = Instant::now();
    loop {
        let held = std::fs::read_dir("/proc").expect("proc").flatten().any(|process| {
            let open = std::fs::read_dir(process.path().join("fd"));
            let mut open = open.into_iter().flatten().flatten();
            open.any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == part))
        });
        if !held {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "the other end goes on without us");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_copy_that_was_killed_goes_on_with_the_same_command() {
    let Some(hosts) = Hosts::new() else { return };
    let image = make(&hosts.here, "a.qcow2", 256 * MIB).write(3, 0, 160 * MIB);
    image.bitmap("nightly", 65536).write(5, 200 * MIB, MIB).done();
    std::fs::copy(hosts.here.path("a.qcow2"), hosts.there.path("b.qcow2")).expect("copy");
    for (words, scratch, name) in [
        (["a.qcow2", "host:up.qcow2"], &hosts.there, "up.qcow2"),
        (["host:b.qcow2", "down.qcow2"], &hosts.here, "down.qcow2"),
    ] {
        let slow = hosts.copy(&["--bandwidth", "64M"]).args(words).spawn();
        if name == "up.qcow2" {
            wait_until_sent(&slow, 100 * MIB);
        } else {
            let part = scratch.path(&format!(".{name}.bitferry-part"));
            let begun = Instant::now();
            while part.metadata().map_or(0, |m| m.blocks() * 512) < 100 * MIB {
                assert!(begun.elapsed() < PATIENCE, "it does not arrive");
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        slow.kill();
        wait_until_left(scratch, name);
        assert!(!scratch.path(name).exists());
        let output = hosts.copy(&words).output().expect_no_crash().expect_exit(Exit::Done);
        let summary = json::summary(&output);
        assert_eq!(summary["resumed"], true, "{output}");
        assert!(summary["wire-bytes"].as_u64().expect("number") < 140 * MIB, "{output}");
        same(&hosts.here.path("a.qcow2"), &scratch.path(name));
        // Again, and it finds out that it had finished; wished otherwise, it had not.
        let output = hosts.copy(&words).output().expect_exit(Exit::Done);
        assert_eq!(json::summary(&output)["status"], "already-complete", "{output}");
        let output = hosts.copy(&words).arg("--fresh").output().expect_no_crash();
        assert!(!output.status.success(), "{output}");
        let output = hosts.copy(&words).args(["--fresh", "--force"]).output();
        let summary = json::summary(&output.expect_exit(Exit::Done));
        assert_eq!((&summary["status"], &summary["resumed"]), (&"completed".into(), &false.into()));
    }
}

#[test]
fn wishes_reach_the_other_end() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    let said = hosts.here.path("said");
    let copy = |words: &[&str]| hosts.copy(words).env("SAID", &said).output().expect_no_crash();
    for (words, name) in
        [(["a.qcow2", "host:b.qcow2"], &hosts.there), (["host:b.qcow2", "c.qcow2"], &hosts.here)]
            .map(|(words, scratch)| (words, (scratch, words[1].trim_start_matches("host:"))))
    {
        let (scratch, name) = name;
        let rename =
            format!("--rename-bitmap=any/{}", if name == "b.qcow2" { "nightly=n" } else { "n=m" });
        let output = copy(&[&rename, "--bandwidth=1G", words[0], words[1]]);
        let summary = json::summary(&output.expect_exit(Exit::Done));
        let to = if name == "b.qcow2" { "n" } else { "m" };
        assert!(qemu::dirty_ranges(&scratch.path(name), to).is_ok(), "{summary}");
    }
    let said = std::fs::read_to_string(&said).expect("what ssh was told");
    assert!(said.lines().last().expect("a line").contains("--bandwidth=1073741824"), "{said}");
    for (source, to) in [("a.qcow2", "host:n.qcow2"), ("host:b.qcow2", "n.qcow2")] {
        let summary = json::summary(&copy(&["--dry-run", source, to]).expect_exit(Exit::Done));
        assert_eq!(summary["event"], "plan", "{summary}");
        assert_eq!(summary["disks"][0]["virtual-size"], 64 * MIB, "{summary}");
    }
    assert!(!hosts.there.path("n.qcow2").exists() && !hosts.here.path("n.qcow2").exists());
    let lost = copy(&["--dry-run", "--bitmaps=missing", "host:b.qcow2", "n.qcow2"]);
    assert_ne!(lost.code(), Some(0), "{lost}");
    // What the destination cannot hold is refused by either end, with one status.
    std::fs::remove_file(hosts.here.path("c.qcow2")).expect("remove");
    for words in [["a.qcow2", "host:b.raw"], ["host:b.qcow2", "b.raw"]] {
        let output = copy(&["-O", "raw", words[0], words[1]]);
        output.expect_exit(Exit::Refused);
    }
    assert!(!hosts.there.path("b.raw").exists() && !hosts.here.path("b.raw").exists());
}

#[test]
fn an_overlay_goes_to_a_host_that_has_its_base() {
    let Some(hosts) = Hosts::new() else { return };
    let base = make(&hosts.here, "base.qcow2", 64 * MIB).write(1, 0, 24 * MIB).done();
    let there = hosts.there.path("its, base.raw");
    qemu::qemu_img("convert").words("-f qcow2 -O raw").arg(&base).arg(&there).ok();
    let top = make(&hosts.here, "top.qcow2", 64 * MIB).backing("base.qcow2", "qcow2");
    let top = top.write(3, 5 * MIB, MIB).bitmap("nightly", 65536).write(4, 40 * MIB, 65536);
    let top = top.io(format!("write -z {} {}", 9 * MIB, MIB)).done();
    let up = ["--backing", "its, base.raw", "top.qcow2", "host:up.qcow2"];
    let output = hosts.copy(&up).output().expect_no_crash();
    assert!(output.complaint().contains("--allow-backing"), "{output}");
    let output = hosts.copy(&up).arg("--allow-backing").output();
    let summary = json::summary(&output.expect_exit(Exit::Done));
    assert_eq!(summary["disks"][0]["verified"], "yes", "{summary}");
    assert!(summary["wire-bytes"].as_u64().expect("a number") < 3 * MIB, "{summary}");
    let copy = hosts.there.path("up.qcow2");
    assert_eq!(qemu::info(&copy, "qcow2")["backing-filename"], "its, base.raw");
    same(&top, &copy);

    let down = ["--allow-backing", "--backing", "base.qcow2", "host:up.qcow2", "down.qcow2"];
    let summary = json::summary(&hosts.copy(&down).output().expect_exit(Exit::Done));
    assert!(summary["wire-bytes"].as_u64().expect("a number") < 3 * MIB, "{summary}");
    let copy = hosts.here.path("down.qcow2");
    assert_eq!(qemu::info(&copy, "qcow2")["backing-filename"], "base.qcow2");
    same(&top, &copy);

    // A base that reads otherwise is found out, and nobody is told not to look.
    make(&hosts.there, "other", 64 * MIB).write(2, 0, 24 * MIB).done();
    let other = ["--allow-backing", "--backing", "other", "top.qcow2", "host:wrong.qcow2"];
    hosts.copy(&other).output().expect_exit(Exit::Different);
    hosts.copy(&other).arg("--no-verify").output().expect_exit(Exit::Refused);
    for wish in ["--in-place", "-Oraw"] {
        hosts.copy(&other).arg(wish).output().expect_exit(Exit::Usage);
    }
    assert!(!hosts.there.path("wrong.qcow2").exists());
}

/// A shell whose start file greets whoever comes.
const GREETS: &str =
    "#!/bin/sh\necho Welcome to the host, and mind the step\nexec \"$REAL\" \"$@\"\n";
/// One that does not answer. It keeps nothing open that the test would wait for.
const HANGS: &str = "#!/bin/sh\nexec sleep 30 2>/dev/null\n";
/// One that answers without end.
const FLOODS: &str = "#!/bin/sh\nexec yes\n";

/// Puts another program in the place of the remote `bitferry`.
fn instead(hosts: &Hosts, script: &str, words: &[&str]) -> Run {
    let wrapper = hosts.here.path("instead");
    std::fs::write(&wrapper, script).expect("script");
    std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).expect("mode");
    hosts.copy(words).env("BITFERRY_REMOTE", &wrapper).env("REAL", binary())
}

#[test]
fn a_greeting_is_told_from_a_migration() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    disk(&hosts.there, "b.qcow2");
    for words in [
        &["a.qcow2", "host:up.qcow2"][..],
        &["host:b.qcow2", "down.qcow2"],
        &["-O", "qcow2", "host:b.qcow2", "down.qcow2"],
    ] {
        let output = instead(&hosts, GREETS, words).output().expect_no_crash();
        let output = output.expect_exit(Exit::Transport);
        assert!(output.complaint().contains("writes before bitferry"), "{words:?}: {output}");
    }
}

#[test]
fn an_answer_is_not_waited_for_without_end() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.there, "b.qcow2");
    let words = ["host:b.qcow2", "down.qcow2"];
    for words in [&words[..], &["--dry-run", words[0], words[1]]] {
        let asking = instead(&hosts, HANGS, words).spawn();
        std::thread::sleep(Duration::from_millis(500));
        let begun = Instant::now();
        asking.signal(rustix::process::Signal::INT);
        asking.wait().expect_exit(Exit::Interrupted);
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
        let output = instead(&hosts, FLOODS, words).output().expect_exit(Exit::Transport);
        assert!(output.complaint().contains("prints more than"), "{output}");
    }
}

/// Ends with a status of its own choosing when all is done.
const ENDS_WITH: &str = r#"#!/bin/sh
"$REAL" "$@" || exit
exit "$STATUS"
"#;

#[test]
fn what_the_other_end_says_after_publishing_comes_with_the_summary() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    disk(&hosts.there, "b.qcow2");
    let wrapper = hosts.here.path("wrapper");
    std::fs::write(&wrapper, ENDS_WITH).expect("script");
    std::fs::set_permissions(&wrapper, PermissionsExt::from_mode(0o755)).expect("mode");
    for (status, up, down) in [
        (6, (6, "completed"), (6, "completed")),
        (8, (8, "unknown"), (0, "completed")),
        (3, (0, "completed"), (0, "completed")),
    ] {
        for (words, expected) in
            [(["a.qcow2", "host:up.qcow2"], up), (["host:b.qcow2", "down.qcow2"], down)]
        {
            let words = [&["-f", "qcow2", "-O", "qcow2", "--force"], &words[..]].concat();
            let run = hosts.copy(&words).env("BITFERRY_REMOTE", &wrapper);
            let run = run.env("REAL", binary()).env("STATUS", status.to_string());
            let output = run.output().expect_no_crash();
            assert_eq!(output.code(), Some(expected.0), "{output}");
            let summary = json::summary(&output);
            assert_eq!(summary["status"], expected.1, "{output}");
            assert_eq!(summary["disks"][0]["bitmaps"][0]["outcome"], "preserved", "{output}");
            let error = summary["error"].as_str().unwrap_or_default();
            assert!(error.contains(&format!("exit status: {status}")), "{output}");
            let complaint = output.complaint();
            let is_said =
                complaint.contains("error: not preserved at the other end: \"ssh host\" ended");
            assert_eq!(is_said, expected.0 == 6, "{output}");
        }
        for (scratch, name) in [(&hosts.there, "up.qcow2"), (&hosts.here, "down.qcow2")] {
            std::fs::remove_file(scratch.path(name)).expect("published");
        }
    }
}

#[test]
fn what_is_not_preserved_is_named_by_a_quiet_copy_too() {
    let Some(hosts) = Hosts::new() else { return };
    for (scratch, source, destination) in
        [(&hosts.here, "a.qcow2", "host:up.qcow2"), (&hosts.there, "host:a.qcow2", "down.qcow2")]
    {
        let image = make(scratch, "a.qcow2", 16 * MIB).bitmap("nightly", 65536).done();
        // As a program that died has left it.
        let bytes = Bytes::of(&image);
        let (extension, _) = bytes.extension(0x2385_2875).expect("bitmaps");
        bytes.put32(bytes.be64(extension + 16) + 12, 3);
        let run = hosts.copy(&["--skip-broken-bitmaps", "-f", "qcow2", source, destination]);
        let output = run.arg("-q").output().expect_no_crash().expect_exit(Exit::NotPreserved);
        assert!(output.complaint().contains("error: not preserved: nightly\nhint: "), "{output}");
    }
}

#[test]
fn an_ssh_that_fails_is_told() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    for channels in ["1", "3"] {
        for (source, destination) in [("a.qcow2", "host:b.qcow2"), ("host:a.qcow2", "b.qcow2")] {
            let said = hosts.here.path("said");
            // Of another host nothing is asked before.
            let words = ["--channels", channels, "-f", "qcow2", source, destination];
            let run = hosts.copy(&words).env("BITFERRY_REMOTE", "no-such-program");
            let output = run.env("SAID", &said).output().expect_no_crash();
            let output = output.expect_exit(Exit::Transport);
            assert!(output.complaint().contains("127"), "{output}");
            let started = std::fs::read_to_string(&said).expect("commands").lines().count();
            assert_eq!(started, 1, "{channels} {source}");
            std::fs::remove_file(said).expect("it is there");
        }
    }
}
