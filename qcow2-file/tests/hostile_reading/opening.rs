//! Which files are opened, and which are not.

use std::path::Path;

use qcow2_file::chain::{Backing, Format};
use qcow2_file::layout::extension::Extension;
use qcow2_file::layout::header::incompatible;
use qcow2_file::preflight::Warning;
use qcow2_file::{Access, Error, GuestOffset, Opener};

use crate::hand::Hand;
use crate::{K64, text};

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// An image with one cluster of data (`fill`, unless 0) that names a backing file.
    fn image(&self, name: &str, fill: u8, backing: Option<(&str, Option<&str>)>) {
        let mut hand = Hand::new(16, 2 * K64);
        if fill != 0 {
            hand.data(0, fill);
        }
        if let Some((file, format)) = backing {
            hand.header.backing_file = Some(file.into());
            hand.header.extensions.extend(format.map(|f| Extension::BackingFormat(f.to_owned())));
        }
        self.put(name, &hand.finish().to_bytes());
    }

    fn complaint(&self, opener: &Opener, name: &str) -> String {
        text(&opener.open(&self.path(name)).unwrap_err())
    }
}

fn first_byte(opener: &Opener, path: &Path) -> u8 {
    let mut buf = [0xee];
    opener.open(path).unwrap().read_at(&mut buf, GuestOffset(0)).unwrap();
    buf[0]
}

fn trusting() -> Opener {
    Opener::new().allow_named_files(true)
}

#[test]
fn named_files_are_opened_only_when_that_is_allowed() {
    let dir = Dir::new();
    dir.put("base.raw", &[7; 4096]);
    dir.image("top.qcow2", 0, Some(("base.raw", Some("raw"))));
    let top = dir.path("top.qcow2");
    match Opener::new().open(&top).unwrap_err() {
        Error::NotAllowed { role: "backing file", named, .. } => assert_eq!(named, "base.raw"),
        other => panic!("{other}"),
    }
    assert_eq!(first_byte(&trusting(), &top), 7);
    assert_eq!(first_byte(&Opener::new().backing(Backing::Ignored), &top), 0);
    assert_eq!(first_byte(&Opener::new().without_named_files(true), &top), 0);
    dir.put("other.raw", &[9; 4096]);
    let other = Backing::File(dir.path("other.raw"), Some(Format::Raw));
    assert_eq!(first_byte(&Opener::new().backing(other), &top), 9);

    let mut hand = Hand::new(16, K64).extension(Extension::DataFile("disk.data".into()));
    hand.header.incompatible_features = incompatible::EXTERNAL_DATA_FILE;
    let entry = hand.l2_at(0);
    hand.word(entry, 1 << 63);
    dir.put("data.qcow2", &hand.finish().to_bytes());
    dir.put("disk.data", &[3; 4096]);
    let top = dir.path("data.qcow2");
    match Opener::new().open(&top).unwrap_err() {
        Error::NotAllowed { role: "external data file", named, .. } => {
            assert_eq!(named, "disk.data");
        }
        other => panic!("{other}"),
    }
    assert_eq!(first_byte(&trusting(), &top), 3);
    let given = Opener::new().data_file(Some(dir.path("other.raw")));
    assert_eq!(first_byte(&given, &top), 9);
    assert!(Opener::new().without_named_files(true).open(&top).is_ok());
}

#[test]
fn a_data_file_without_a_name_must_be_given() {
    let dir = Dir::new();
    let mut hand = Hand::new(16, K64);
    hand.header.incompatible_features = incompatible::EXTERNAL_DATA_FILE;
    dir.put("data.qcow2", &hand.finish().to_bytes());
    assert!(dir.complaint(&trusting(), "data.qcow2").contains("does not name"));
    dir.put("disk.data", &[3; 4096]);
    let given = Opener::new().data_file(Some(dir.path("disk.data")));
    assert!(given.open(&dir.path("data.qcow2")).is_ok());
    // A data file is not to be one of the disk's images.
    let itself = Opener::new().data_file(Some(dir.path("data.qcow2")));
    assert!(dir.complaint(&itself, "data.qcow2").contains("occurs twice"));
}

#[test]
fn names_are_relative_to_the_image_and_plain_paths() {
    let dir = Dir::new();
    std::fs::create_dir_all(dir.path("sub/deep")).unwrap();
    dir.put("base.raw", &[7; 4096]);
    dir.image("sub/mid.qcow2", 0, Some(("../base.raw", Some("raw"))));
    dir.image("sub/deep/top.qcow2", 0, Some(("../mid.qcow2", Some("qcow2"))));
    assert_eq!(first_byte(&trusting(), &dir.path("sub/deep/top.qcow2")), 7);
    for name in ["json:{\"driver\":\"file\"}", "nbd:unix:/x", "https://h/x", "file:base.raw"] {
        dir.image("odd.qcow2", 0, Some((name, Some("raw"))));
        assert!(dir.complaint(&trusting(), "odd.qcow2").contains("not a plain path"), "{name}");
        let refused = Opener::new().open(&dir.path("odd.qcow2")).unwrap_err();
        assert!(matches!(refused, Error::NotAllowed { .. }));
    }
    // What has a colon, as QEMU names it so that it is a path all the same.
    dir.put("a:b.raw", &[8; 4096]);
    let absolute = format!("file:{}", dir.path("a:b.raw").display());
    for name in ["./a:b.raw", absolute.as_str()] {
        dir.image("odd.qcow2", 0, Some((name, Some("raw"))));
        assert_eq!(first_byte(&trusting(), &dir.path("odd.qcow2")), 8, "{name}");
    }
}

#[test]
fn loops_and_bombs_end() {
    let dir = Dir::new();
    dir.image("self.qcow2", 0, Some(("self.qcow2", Some("qcow2"))));
    assert!(dir.complaint(&trusting(), "self.qcow2").contains("occurs twice"));
    dir.image("a.qcow2", 0, Some(("b.qcow2", Some("qcow2"))));
    dir.image("b.qcow2", 0, Some(("link.qcow2", Some("qcow2"))));
    std::os::unix::fs::symlink("a.qcow2", dir.path("link.qcow2")).unwrap();
    assert!(dir.complaint(&trusting(), "a.qcow2").contains("occurs twice"));
    let max = qcow2_file::limits::MAX_CHAIN_DEPTH;
    for n in 0..=max {
        let below = format!("{}.qcow2", n + 1);
        let backing = (n < max).then_some((below.as_str(), Some("qcow2")));
        dir.image(&format!("{n}.qcow2"), 0, backing);
    }
    assert!(trusting().open(&dir.path("1.qcow2")).is_ok());
    assert!(dir.complaint(&trusting(), "0.qcow2").contains("deeper than 200 layers"));
}

#[test]
fn content_never_decides_silently() {
    let dir = Dir::new();
    dir.image("inner.qcow2", 5, None);
    let inner = std::fs::read(dir.path("inner.qcow2")).unwrap();
    dir.put("guest.raw", &inner);
    // Recorded as raw: the guest's qcow2 header is its own business, in version 2 as well.
    for version in [2, 3] {
        let mut hand = Hand::new(16, 2 * K64).extension(Extension::BackingFormat("raw".into()));
        hand.header.version = version;
        hand.header.backing_file = Some("guest.raw".into());
        dir.put("top.qcow2", &hand.finish().to_bytes());
        let chain = trusting().open(&dir.path("top.qcow2")).unwrap();
        assert_eq!(chain.layers()[1].format(), Format::Raw);
        assert!(chain.warnings().is_empty());
    }
    // Not recorded: looked at, and said.
    dir.image("top.qcow2", 0, Some(("guest.raw", None)));
    let chain = trusting().open(&dir.path("top.qcow2")).unwrap();
    assert_eq!(chain.layers()[1].format(), Format::Qcow2);
    let backing = dir.path("guest.raw").display().to_string();
    assert_eq!(chain.warnings()[0].1, Warning::ProbedBacking { backing });
    dir.put("plain.raw", &[1; 512]);
    dir.image("top.qcow2", 0, Some(("plain.raw", None)));
    assert!(trusting().open(&dir.path("top.qcow2")).unwrap().warnings().is_empty());
    // What only its content calls qcow2 gets no further file opened.
    dir.image("guest.raw", 0, Some(("/etc/passwd", Some("raw"))));
    dir.image("top.qcow2", 0, Some(("guest.raw", None)));
    assert!(dir.complaint(&trusting(), "top.qcow2").contains("names further files"));
    let chain = Opener::new().format(Some(Format::Raw)).open(&dir.path("guest.raw")).unwrap();
    assert!(!chain.is_probed() && chain.top().format() == Format::Raw);
    dir.image("top.qcow2", 0, Some(("guest.raw", Some("vmdk"))));
    assert!(dir.complaint(&trusting(), "top.qcow2").contains("format \"vmdk\" is not supported"));
}

#[test]
fn foreign_formats_are_not_taken_for_raw_disks() {
    let dir = Dir::new();
    dir.put("disk.vmdk", b"KDMV and more");
    assert!(dir.complaint(&trusting(), "disk.vmdk").contains("looks like vmdk"));
    assert_eq!(first_byte(&trusting().format(Some(Format::Raw)), &dir.path("disk.vmdk")), b'K');
    // Both of its magics: the newer one has lost some letters.
    for magic in ["WithoutFreeSpace", "WithouFreSpacExt"] {
        dir.put("disk.hdd", format!("{magic} and more").as_bytes());
        assert!(dir.complaint(&trusting(), "disk.hdd").contains("looks like parallels"));
    }
    dir.image("top.qcow2", 0, Some(("disk.vmdk", None)));
    assert!(dir.complaint(&trusting(), "top.qcow2").contains("looks like vmdk"));
}

#[test]
fn files_are_locked_while_a_chain_lives() {
    let dir = Dir::new();
    dir.put("base.raw", &[7; 4096]);
    dir.image("top.qcow2", 0, Some(("base.raw", Some("raw"))));
    let open = |access| trusting().lock(true).access(access).open(&dir.path("top.qcow2"));
    let reader = open(Access::Read).unwrap();
    assert!(reader.is_locked());
    assert!(open(Access::Read).is_ok());
    assert!(matches!(open(Access::ReadWrite), Err(Error::InUse { .. })));
    drop(reader);
    let writer = open(Access::ReadWrite).unwrap();
    assert!(matches!(open(Access::Read), Err(Error::InUse { .. })));
    assert!(!trusting().open(&dir.path("top.qcow2")).unwrap().is_locked());
    // The backing file is only read, whatever the top is opened for.
    let base = Opener::new().format(Some(Format::Raw)).lock(true);
    assert!(base.open(&dir.path("base.raw")).is_ok());
    assert!(base.access(Access::ReadWrite).open(&dir.path("base.raw")).is_err());
    drop(writer);
    assert!(open(Access::ReadWrite).is_ok());
}

#[test]
fn only_files_and_devices_are_opened() {
    let dir = Dir::new();
    let status = std::process::Command::new("mkfifo").arg(dir.path("pipe")).status().unwrap();
    assert!(status.success());
    for name in ["pipe", "."] {
        assert!(dir.complaint(&trusting(), name).contains("neither a regular file"), "{name}");
    }
    assert!(matches!(trusting().open(&dir.path("none")), Err(Error::Open { .. })));
    dir.image("top.qcow2", 0, Some(("none", Some("raw"))));
    assert!(dir.complaint(&trusting(), "top.qcow2").starts_with("cannot open"));
}
