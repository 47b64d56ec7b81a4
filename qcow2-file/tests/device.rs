//! A real block device below: a loop device, where this user may make one.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/skip.rs"]
mod skip;

use std::path::PathBuf;
use std::process::Command;

use qcow2_file::chain::Format;
use qcow2_file::storage::Run;
use qcow2_file::{Access, ChainKind, GuestOffset, HostFile, Opener, Storage};

const SIZE: u64 = 8 << 20;

/// A loop device over a file; taken down at the end.
struct Loop {
    device: PathBuf,
    _file: tempfile::NamedTempFile,
}

impl Loop {
    fn new() -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(SIZE).unwrap();
        let made = Command::new("timeout")
            .args(["10", "losetup", "--find", "--show"])
            .arg(file.path())
            .output()
            .ok()
            .filter(|output| output.status.success());
        let Some(output) = made else {
            skip::skip("no loop device can be made here");
            return None;
        };
        let device = PathBuf::from(String::from_utf8(output.stdout).unwrap().trim());
        Some(Self { device, _file: file })
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.device).status();
    }
}

#[test]
fn a_block_device_is_storage() {
    let Some(made) = Loop::new() else { return };
    let device = HostFile::open(&made.device, Access::ReadWrite).unwrap();
    assert!(device.is_device());
    assert_eq!(device.len().unwrap(), SIZE);
    assert_eq!(device.id(), HostFile::open(&made.device, Access::Read).unwrap().id());
    device.write_at(&vec![7; SIZE as usize], 0).unwrap();
    device.write_zeroes(1 << 20, 1 << 20).unwrap();
    // Not aligned to the device's blocks: zeroes are written.
    device.write_zeroes((4 << 20) + 5, 10_001).unwrap();
    device.discard(7 << 20, 1 << 20).unwrap();
    device.sync().unwrap();
    let mut buf = vec![9; SIZE as usize + 1000];
    device.read_at(&mut buf, 0).unwrap();
    let is_zero = |at: usize, len: usize| buf[at..at + len].iter().all(|b| *b == 0);
    assert!(is_zero(1 << 20, 1 << 20) && is_zero((4 << 20) + 5, 10_001));
    assert!(is_zero(SIZE as usize, 1000), "beyond the end there is nothing");
    for at in [0, (1 << 20) - 1, 2 << 20, (4 << 20) + 4, (4 << 20) + 10_006] {
        assert_eq!(buf[at], 7, "{at}");
    }
    assert_eq!(device.run_at(5, u64::MAX).unwrap(), Run { len: SIZE - 5, is_hole: false });
    assert!(device.run_at(SIZE, 5).unwrap().is_hole);
    assert!(device.write_at(&[1; 4096], SIZE).is_err());
    assert!(device.set_len(SIZE * 2).is_err());
    assert!(HostFile::create_new(&made.device).is_err());
    let chain = Opener::new().format(Some(Format::Raw)).open(&made.device).unwrap();
    let first = chain.extent(GuestOffset(0), u64::MAX).unwrap();
    assert_eq!((first.kind, first.len), (ChainKind::Data, SIZE));
}
