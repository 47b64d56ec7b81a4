//! The harness itself, held against QEMU: if these fail, no other result means anything.

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::{Peer, Scratch, qemu, require, require_all};
use serde_json::json;

const MIB: u64 = 1 << 20;

#[test]
fn images_are_made_and_bitmaps_are_read_through_nbd() {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd]) {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).write(1, 0, MIB).bitmap("b0", 65536);
    let image = image.write(2, 4 * MIB, 65536).write(3, 5 * MIB, 512).done();
    qemu::check_is_clean(&image);
    let ranges = qemu::dirty_ranges(&image, "b0").unwrap();
    assert_eq!(ranges, [4 * MIB..4 * MIB + 65536, 5 * MIB..5 * MIB + 65536]);
    assert!(qemu::dirty_ranges(&image, "b1").is_err());
    let bytes = Bytes::of(&image);
    assert_eq!(bytes.be64(24), 64 * MIB);
    assert_eq!(bytes.extension(0x2385_2875).map(|(_, len)| len), Some(24));
}

#[test]
fn qemu_10_answers() {
    if require(Peer::Qemu10).is_some() {
        answers(Peer::Qemu10);
    }
}

#[test]
fn qemu_7_2_answers() {
    if require(Peer::Qemu72).is_some() {
        answers(Peer::Qemu72);
    }
}

fn answers(which: Peer) {
    if !require_all(&[Peer::QemuImg, Peer::QemuIo]) {
        return;
    }
    let scratch = Scratch::new();
    let image = make(&scratch, "a.qcow2", 64 * MIB).bitmap("b0", 65536).done();
    let mut qemu = Qemu::block_only(which);
    qemu.open("n", &image, true).unwrap();
    let before = qemu.bitmap_hash("n", "b0");
    qemu.io("n", "write -P 7 1M 64k");
    assert_ne!(qemu.bitmap_hash("n", "b0"), before);
    assert_eq!(qemu.bitmaps("n")[0]["count"], json!(65536));
    assert!(qemu.execute("no-such-command", json!({})).is_err());
    assert!(qemu.quit().status.success());
    qemu::check_is_clean(&image);
}
