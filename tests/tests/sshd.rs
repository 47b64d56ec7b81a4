//! `copy` to and from another host through a real sshd, which is this one.

use std::path::{Path, PathBuf};
use std::time::Instant;

use bitferry_tests::bitferry::binary;
use bitferry_tests::image::make;
use bitferry_tests::process::PATIENCE;
use bitferry_tests::sshd::RealSsh;
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, qemu, require_all};

const MIB: u64 = 1 << 20;

struct Hosts {
    ssh: RealSsh,
    scratch: Scratch,
}

impl Hosts {
    fn new() -> Option<Self> {
        if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
            return None;
        }
        Some(Self { ssh: RealSsh::new()?, scratch: Scratch::new() })
    }

    fn copy(&self, words: &[&str]) -> Run {
        let run = bitferry().dir(self.scratch.dir()).env("BITFERRY_SSH", self.ssh.program());
        run.env("BITFERRY_REMOTE", binary()).args(["copy", "--json"]).args(words)
    }

    fn image(&self, name: &str, data: u64) -> PathBuf {
        let image = make(&self.scratch, name, 300 * MIB).write(3, 0, data);
        image.bitmap("nightly", 65536).write(5, 250 * MIB, MIB).done()
    }

    /// The remote operand for a file of this test.
    fn there(&self, name: &str) -> String {
        format!("some.host:{}", self.scratch.path(name).display())
    }
}

#[track_caller]
fn same(a: &Path, b: &Path) {
    qemu::same_disk(a, b, &["nightly"]);
    assert!(!qemu::dirty_ranges(a, "nightly").unwrap_or_else(|o| panic!("{o}")).is_empty());
}

#[test]
fn there_and_back_through_sshd() {
    let Some(hosts) = Hosts::new() else { return };
    let image = hosts.image("a.qcow2", 4 * MIB);
    let name = "it's a $(copy) & more.qcow2";
    let up = hosts.copy(&["--compress=zstd", "a.qcow2", &hosts.there(name)]).output();
    let summary = json::summary(&up.expect_no_crash().expect_exit(Exit::Done));
    assert_eq!(summary["disks"][0]["verified"], "yes", "{summary}");
    same(&image, &hosts.scratch.path(name));
    let down = hosts.copy(&[&hosts.there(name), "back.qcow2"]).output();
    down.expect_no_crash().expect_exit(Exit::Done);
    same(&image, &hosts.scratch.path("back.qcow2"));
    assert!(hosts.ssh.log().contains("Accepted publickey"), "{}", hosts.ssh.log());
    // What stands there is not replaced, and what cannot be had is told with the words of there.
    let again = hosts.copy(&["--fresh", "a.qcow2", &hosts.there("back.qcow2")]).output();
    let complaint = again.expect_no_crash().expect_exit(Exit::Transport).complaint();
    assert!(complaint.contains("exists"), "{complaint}");
    let missing = hosts.copy(&["-f", "qcow2", &hosts.there("missing"), "x.qcow2"]).output();
    let complaint = missing.expect_no_crash().expect_exit(Exit::Transport).complaint();
    assert!(complaint.contains("missing"), "{complaint}");
    assert!(!hosts.scratch.path("x.qcow2").exists());
}

#[test]
fn a_connection_that_is_cut_is_made_again() {
    let Some(hosts) = Hosts::new() else { return };
    let image = hosts.image("a.qcow2", 200 * MIB);
    for (words, name) in [
        (["a.qcow2".to_owned(), hosts.there("up.qcow2")], "up.qcow2"),
        ([hosts.there("a.qcow2"), "down.qcow2".to_owned()], "down.qcow2"),
    ] {
        let words = ["--channels=3", "--reconnect=30", "--bandwidth=64M", &words[0], &words[1]];
        let copying = hosts.copy(&words).spawn();
        let part = hosts.scratch.path(&format!(".{name}.bitferry-part"));
        let begun = Instant::now();
        while qemu_blocks(&part) < 40 * MIB {
            assert!(begun.elapsed() < PATIENCE, "it does not arrive");
            if copying.ends_within(std::time::Duration::from_millis(10)) {
                panic!("it ended before it was cut\n{}", copying.wait());
            }
        }
        kill_ssh_of(copying.id());
        let summary = json::summary(&copying.wait().expect_no_crash().expect_exit(Exit::Done));
        assert_eq!(summary["resumed"], true, "{summary}");
        assert_eq!(summary["status"], "completed", "{summary}");
        let wire = summary["wire-bytes"].as_u64().expect("a number");
        assert!((200 * MIB..280 * MIB).contains(&wire), "{summary}");
        same(&image, &hosts.scratch.path(name));
    }
}

#[test]
fn ctrl_c_ends_both_ends_and_the_same_command_goes_on() {
    let Some(hosts) = Hosts::new() else { return };
    let image = hosts.image("a.qcow2", 200 * MIB);
    for (words, name) in [
        (["a.qcow2".to_owned(), hosts.there("up.qcow2")], "up.qcow2"),
        ([hosts.there("a.qcow2"), "down.qcow2".to_owned()], "down.qcow2"),
    ] {
        for reconnect in ["--reconnect=0", "--reconnect=60"] {
            let words = [reconnect, "--bandwidth=64M", &words[0], &words[1]];
            let copying = hosts.copy(&words).spawn();
            let part = hosts.scratch.path(&format!(".{name}.bitferry-part"));
            let (begun, had) = (Instant::now(), qemu_blocks(&part));
            while qemu_blocks(&part) < had.max(60 * MIB) + 8 * MIB {
                assert!(begun.elapsed() < PATIENCE, "it does not arrive");
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            copying.signal(rustix::process::Signal::INT);
            copying.wait().expect_exit(Exit::Interrupted);
            assert!(!hosts.scratch.path(name).exists());
        }
        let done = hosts.copy(&[&words[0], &words[1]]).output();
        let summary = json::summary(&done.expect_no_crash().expect_exit(Exit::Done));
        assert_eq!(summary["resumed"], true, "{summary}");
        same(&image, &hosts.scratch.path(name));
    }
}

fn qemu_blocks(path: &Path) -> u64 {
    if path.exists() { qemu::allocated_bytes(path) } else { 0 }
}

/// Kills the ssh that a process of ours has started.
#[track_caller]
fn kill_ssh_of(parent: u32) {
    let children = format!("/proc/{parent}/task/{parent}/children");
    let mut children = std::fs::read_to_string(children).expect("children");
    for entry in std::fs::read_dir(format!("/proc/{parent}/task")).expect("tasks").flatten() {
        children += &std::fs::read_to_string(entry.path().join("children")).unwrap_or_default();
        children.push(' ');
    }
    let mut killed = 0;
    for child in children.split_whitespace() {
        let name = std::fs::read_to_string(format!("/proc/{child}/comm")).unwrap_or_default();
        let pid = child.parse().ok().and_then(rustix::process::Pid::from_raw);
        if let (Some(pid), "ssh") = (pid, name.trim()) {
            killed += u32::from(
                rustix::process::kill_process(pid, rustix::process::Signal::KILL).is_ok(),
            );
        }
    }
    assert!(killed > 0, "no ssh among {children:?}");
}
