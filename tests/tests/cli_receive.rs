//! `receive` as its user meets it: the files it makes, what it says meanwhile. That what arrives is
//! right is held elsewhere.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use bitferry_tests::bitferry::binary;
use bitferry_tests::process::Running;
use bitferry_tests::{Exit, Output, Run, Scratch, bitferry};
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A raw disk with content all over.
fn disk(scratch: &Scratch, name: &str, size: usize) {
    let bytes: Vec<u8> = (0..size).map(|at| (at / 4096 % 251 + at % 7 + 1) as u8).collect();
    std::fs::write(scratch.path(name), bytes).expect("disk");
}

/// The command, under this umask.
fn with_umask(scratch: &Scratch, umask: &str, line: &str) -> Run {
    let script = format!("umask {umask}; exec \"$0\" \"$@\"");
    let shell = Run::new("sh").dir(scratch.dir()).args(["-c", &script]);
    shell.arg(binary()).words(line)
}

/// Where a destination says that it listens.
fn address(running: &Running) -> String {
    running.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        (event["event"] == "listening").then(|| event["uri"].as_str().expect("text").to_owned())
    })
}

/// Runs the destination and then a source with these words; what both said.
fn migrate(scratch: &Scratch, destination: Run, source: &str) -> (Output, Output) {
    let running = destination.spawn();
    let uri = address(&running);
    let send = bitferry().dir(scratch.dir()).words("send --json").words(source).arg(uri);
    let sent = send.output().expect_no_crash();
    (sent, running.wait().expect_no_crash())
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("there").permissions().mode() & 0o7777
}

#[test]
fn a_new_file_has_the_mode_of_any_new_file() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let source = "--disk vda=a.raw,format=raw";
    for (umask, expected) in [("022", 0o644), ("027", 0o640), ("077", 0o600), ("000", 0o666)] {
        let name = format!("{umask}.qcow2");
        let line =
            format!("receive --json -o data_file={umask}.data --disk vda={name} tcp:127.0.0.1:0");
        let (sent, received) = migrate(&scratch, with_umask(&scratch, umask, &line), source);
        sent.expect_exit(Exit::Done);
        received.expect_exit(Exit::Done);
        assert_eq!(mode(&scratch.path(&name)), expected, "umask {umask}");
        assert_eq!(mode(&scratch.path(&format!("{umask}.data"))), expected, "umask {umask}");
        // What is ours alone stays so.
        let receipt = scratch.path(&format!(".{name}.bitferry-receipt"));
        assert_eq!(mode(&receipt), 0o600, "umask {umask}");
    }
}

#[test]
fn a_replaced_file_hands_its_mode_and_owner_on() {
    let scratch = Scratch::new();
    disk(&scratch, "a.raw", MIB);
    let old = scratch.path("old.raw");
    std::fs::write(&old, b"old").expect("file");
    std::fs::set_permissions(&old, PermissionsExt::from_mode(0o4464)).expect("mode");
    let group = rustix::process::getgid().as_raw();
    // Only root may give files away.
    let owner = if rustix::process::getuid().is_root() { 12345 } else { 0 };
    if owner != 0 {
        std::os::unix::fs::chown(&old, Some(owner), None).expect("owner");
        std::fs::set_permissions(&old, PermissionsExt::from_mode(0o4464)).expect("mode");
    }
    let line = "receive --json --force --disk vda=old.raw,format=raw tcp:127.0.0.1:0";
    let destination = with_umask(&scratch, "022", line);
    let (sent, received) = migrate(&scratch, destination, "--disk vda=a.raw,format=raw");
    sent.expect_exit(Exit::Done);
    received.expect_exit(Exit::Done);
    let found = std::fs::metadata(&old).expect("there");
    assert_eq!((found.len(), mode(&old)), (MIB as u64, 0o464));
    assert_eq!(found.gid(), group);
    if owner != 0 {
        assert_eq!(found.uid(), owner);
    }
}
