//! `copy` to and from another host. A stand-in for ssh runs the remote command on this one, in a
//! directory of its own, through a shell as sshd does.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use bitferry_tests::bitferry::binary;
use bitferry_tests::image::make;
use bitferry_tests::{Exit, Peer, Run, Scratch, bitferry, json, qemu, require_all};

const MIB: u64 = 1 << 20;

/// What ssh does as far as `bitferry` can tell: the last argument goes to a shell at the other end,
/// which begins in a directory of its own.
const STAND_IN: &str = r#"#!/bin/sh
for last; do :; done
cd "$ELSEWHERE" && exec sh -c "$last"
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
    qemu::same_content((a, "qcow2"), (b, "qcow2"));
    qemu::check_is_clean(b);
    let read = |image| qemu::dirty_ranges(image, "nightly").unwrap_or_else(|o| panic!("{o}"));
    assert_eq!(read(a), read(b));
    assert!(!read(a).is_empty());
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

#[test]
fn an_ssh_that_fails_is_told() {
    let Some(hosts) = Hosts::new() else { return };
    disk(&hosts.here, "a.qcow2");
    let run = hosts.copy(&["a.qcow2", "host:b.qcow2"]).env("BITFERRY_REMOTE", "no-such-program");
    let output = run.output().expect_no_crash().expect_exit(Exit::Transport);
    assert!(output.complaint().contains("127"), "{output}");
}
