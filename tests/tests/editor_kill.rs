//! `kill -9` at random moments of a program that edits an image.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bitferry_tests::peer::{Peer, require_all};
use bitferry_tests::random::{Random, seed};
use bitferry_tests::scratch::Scratch;
use bitferry_tests::{image, qemu};

/// Kills the child whatever happens to the test.
struct Scribble(Child);

impl Drop for Scribble {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_killed_editor_leaks_at_worst() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let mut random = Random::new(seed(), "editor_kill");
    let kinds: [&[&str]; 4] = [
        &["cluster_size=64k"],
        &["cluster_size=4k,refcount_bits=64"],
        &["extended_l2=on"],
        &["cluster_size=512"],
    ];
    for options in kinds {
        let scratch = Scratch::new();
        let mut maker = image::make(&scratch, "image.qcow2", 8 << 20);
        for option in options {
            maker = maker.option(*option);
        }
        let maker = maker.write(1, 0, 3 << 20).io("write -c -P 2 4M 1M").snapshot("s");
        let path = maker.bitmap("b", 65536).write(3, 1 << 20, 1 << 20).done();
        let snapshot = |name: &str| {
            let out = scratch.path(name);
            let run = qemu::qemu_img("convert").args(["-O", "raw", "-l", "snapshot.name=s"]);
            run.arg(&path).arg(&out).ok();
            std::fs::read(out).unwrap()
        };
        let before = snapshot("before.raw");
        for round in 0..4 {
            let mut command = Command::new(env!("CARGO_BIN_EXE_scribble"));
            command.arg(&path).arg(random.next().to_string()).stdout(Stdio::piped());
            let mut child = Scribble(command.spawn().unwrap());
            let mut line = String::new();
            BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
            assert_eq!(line, "ready\n", "{options:?}");
            std::thread::sleep(Duration::from_millis(5 + random.below(80)));
            drop(child);
            let checked = qemu::check(&path);
            assert_eq!(checked.corruptions, 0, "{options:?} round {round}: {checked:?}");
        }
        assert!(snapshot("after.raw") == before, "{options:?}: the snapshot changed");
        let info = qemu::info(&path, "qcow2");
        let flags = &info["format-specific"]["data"]["bitmaps"][0]["flags"];
        assert!(flags.as_array().unwrap().iter().any(|f| f == "in-use"), "{info}");
    }
}
