//! Copies of images that the library makes; real images are the `tests` member's business.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qcow2_file::bitmaps::{Bits, PersistentBitmap};
use qcow2_file::create::{Backing, CreateOptions, DataFile, NewImage};
use qcow2_file::{GuestOffset, HostFile, Opener};
use tempfile::TempDir;

use super::*;
use crate::Phase;
use crate::compare::{self, CompareOptions};
use crate::info::InfoOptions;
use crate::report::BitmapOutcome;
use crate::{Error, Silent, exit_status};

const SIZE: u64 = 20 << 20;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A qcow2 image with some data, and bitmaps `a` (enabled) and `b` (disabled).
    fn image(&self, name: &str) -> PathBuf {
        self.image_with(name, &CreateOptions::new(SIZE))
    }

    fn image_with(&self, name: &str, options: &CreateOptions) -> PathBuf {
        let path = self.path(name);
        let image =
            NewImage::create(Arc::new(HostFile::create_new(&path).unwrap()), options).unwrap();
        for (offset, len, byte) in [(0, 70_000, 1), (5 << 20, 3 << 20, 2), (SIZE - 512, 512, 3)] {
            image.write_at(&vec![byte; len], GuestOffset(offset)).unwrap();
        }
        let bitmap = |name: &str, granularity_bits, is_enabled| {
            let mut bits = Bits::for_disk(SIZE, granularity_bits);
            bits.set_range(3..9);
            PersistentBitmap { name: name.into(), granularity_bits, is_enabled, bits }
        };
        image.finish(&[bitmap("a", 16, true), bitmap("b", 12, false)]).unwrap();
        path
    }

    fn options(&self, source: &str, destination: &str) -> CopyOptions {
        CopyOptions {
            source: self.path(source),
            destination: self.path(destination),
            ..CopyOptions::default()
        }
    }

    fn names(&self) -> Vec<String> {
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(name).collect();
        names.sort();
        names
    }
}

fn outcomes(report: &Report) -> BTreeMap<&str, BitmapOutcome> {
    report.disks[0].bitmaps.iter().map(|b| (b.name.as_str(), b.outcome)).collect()
}

fn are_equal(a: &Path, b: &Path, bitmaps: bool) -> bool {
    let options = CompareOptions {
        a: a.to_owned(),
        b: b.to_owned(),
        allow_backing: true,
        bitmaps: Some(if bitmaps { BitmapSelection::All } else { BitmapSelection::None }),
        ..CompareOptions::default()
    };
    let found = compare::run(&options, &Silent).unwrap();
    found.equal
}

#[test]
fn a_copy_is_equal_and_says_so() {
    let place = Place::new();
    let source = place.image("s.qcow2");
    let report = run(&place.options("s.qcow2", "d.qcow2"), &Silent).unwrap();
    assert_eq!((report.status, exit_status(&report)), (Status::Completed, 0));
    assert_eq!(report.disks[0].verified, Verified::Yes);
    assert!(outcomes(&report).values().all(|o| *o == BitmapOutcome::Preserved));
    assert!(are_equal(&source, &place.path("d.qcow2"), true));
    assert_eq!(place.names(), [".d.qcow2.bitferry-receipt", "d.qcow2", "s.qcow2"]);
}

#[test]
fn an_existing_destination_is_replaced_only_on_request() {
    let place = Place::new();
    let source = place.image("s.qcow2");
    fs::write(place.path("d.qcow2"), b"mine").unwrap();
    let mut options = place.options("s.qcow2", "d.qcow2");
    let refused = run(&options, &Silent).unwrap_err();
    assert!(matches!(refused, Error::Exists { .. }));
    assert_eq!(fs::read(place.path("d.qcow2")).unwrap(), b"mine");
    options.existing = Existing::Replace;
    run(&options, &Silent).unwrap();
    assert!(are_equal(&source, &place.path("d.qcow2"), true));
}

#[test]
fn bitmaps_that_would_be_lost_stop_the_copy_before_it_begins() {
    let place = Place::new();
    place.image("s.qcow2");
    let mut options = place.options("s.qcow2", "d.raw");
    options.target_format = Some(Format::Raw);
    assert_eq!(run(&options, &Silent).unwrap_err().exit_status(), 7);
    let mut old = place.options("s.qcow2", "d.qcow2");
    old.target.version = Some(2);
    assert_eq!(run(&old, &Silent).unwrap_err().exit_status(), 7);
    assert_eq!(place.names(), ["s.qcow2"]);
    assert_eq!(plan(&options, &Silent).unwrap().refusals.len(), 2);
    options.bitmaps = BitmapSelection::None;
    let report = run(&options, &Silent).unwrap();
    assert_eq!(exit_status(&report), 0);
    assert!(are_equal(&place.path("s.qcow2"), &place.path("d.raw"), false));
}

#[test]
fn some_bitmaps_go_under_new_names() {
    let place = Place::new();
    place.image("s.qcow2");
    let mut options = place.options("s.qcow2", "d.qcow2");
    options.bitmaps = BitmapSelection::Named(vec!["b".into()]);
    options.renames = vec!["disk0/b=c".parse().unwrap()];
    let report = run(&options, &Silent).unwrap();
    let outcomes = outcomes(&report);
    assert_eq!(outcomes["a"], BitmapOutcome::Dropped);
    assert_eq!(report.disks[0].bitmaps[1].changed, ["name: b -> c"]);
    assert_eq!(exit_status(&report), 0);
    options.renames = vec!["x=y".parse().unwrap()];
    options.destination = place.path("e.qcow2");
    assert_eq!(run(&options, &Silent).unwrap_err().exit_status(), 2);
}

#[test]
fn an_overlay_pair_is_replaced_without_a_stale_moment() {
    let place = Place::new();
    let source = place.image("s.qcow2");
    let mut options = place.options("s.qcow2", "o.qcow2");
    options.target.data_file = Some("o.data".into());
    options.target.data_file_raw = Some(true);
    for existing in [Existing::Refuse, Existing::Replace] {
        options.existing = existing;
        let report = run(&options, &Silent).unwrap();
        assert_eq!(exit_status(&report), 0);
        assert!(are_equal(&source, &place.path("o.qcow2"), true));
        assert!(are_equal(&source, &place.path("o.data"), false));
    }
    options.existing = Existing::Refuse;
    fs::remove_file(place.path("o.qcow2")).unwrap();
    assert!(matches!(run(&options, &Silent), Err(Error::Exists { .. })));
    assert_eq!(place.names(), [".o.qcow2.bitferry-receipt", "o.data", "s.qcow2"]);
}

#[test]
fn an_overlay_is_a_source_where_its_data_file_may_be_opened() {
    let place = Place::new();
    let mut create = CreateOptions::new(SIZE);
    create.data_file = Some(DataFile {
        name: "s.data".into(),
        is_raw: true,
        storage: Arc::new(HostFile::create_new(&place.path("s.data")).unwrap()),
    });
    let source = place.image_with("s.qcow2", &create);
    let mut options = place.options("s.qcow2", "d.qcow2");
    assert_eq!(run(&options, &Silent).unwrap_err().exit_status(), 2);
    options.allow_backing = true;
    let report = run(&options, &Silent).unwrap();
    assert!(report.disks[0].not_carried.iter().any(|p| p.contains("s.data")));
    assert!(are_equal(&source, &place.path("d.qcow2"), true));
    options.destination = place.path("s.data");
    options.existing = Existing::Replace;
    assert_eq!(run(&options, &Silent).unwrap_err().exit_status(), 2);
}

/// Changes one byte of what was written, when the copy is about to be proved.
struct Spoiler(PathBuf);

impl Observer for Spoiler {
    fn phase(&self, phase: Phase) {
        if phase == Phase::Prove {
            let mut bytes = fs::read(&self.0).unwrap();
            let at = bytes.windows(4096).rposition(|w| w.iter().all(|b| *b == 2)).unwrap();
            bytes[at] = 0xee;
            fs::write(&self.0, bytes).unwrap();
        }
    }
}

#[test]
fn what_reads_back_different_is_not_published() {
    for (source, destination) in [("s.qcow2", "d.qcow2"), ("s.qcow2", "d.raw")] {
        let place = Place::new();
        place.image(source);
        let mut options = place.options(source, destination);
        if destination.ends_with("raw") {
            options.target_format = Some(Format::Raw);
            options.bitmaps = BitmapSelection::None;
        }
        let spoiler = Spoiler(place.path(&format!(".{destination}.bitferry-part")));
        let report = run(&options, &spoiler).unwrap();
        assert_eq!(report.disks[0].verified, Verified::Mismatch);
        assert_eq!((report.status, exit_status(&report)), (Status::Failed, 1));
        let error = report.error.unwrap();
        assert!(error.contains("sent bf1:") && error.contains("read bf1:"), "{error}");
        assert_eq!(place.names(), [source], "nothing stays");
    }
}

/// Does something to a file when the transfer begins.
struct Meddler<F> {
    path: PathBuf,
    change: F,
}

impl<F: Fn(&fs::File) + Send + Sync> Observer for Meddler<F> {
    fn phase(&self, phase: Phase) {
        if phase == Phase::Transfer {
            (self.change)(&fs::OpenOptions::new().write(true).open(&self.path).unwrap());
        }
    }
}

#[test]
fn a_source_that_is_cut_meanwhile_is_no_source() {
    let place = Place::new();
    place.image("s.qcow2");
    let mut options = place.options("s.qcow2", "s.raw");
    options.target_format = Some(Format::Raw);
    options.bitmaps = BitmapSelection::None;
    run(&options, &Silent).unwrap();
    for name in ["s.raw", "s.qcow2"] {
        let options = place.options(name, "copy");
        let change = |file: &fs::File| file.set_len(1 << 20).unwrap();
        let path = place.path(name);
        let observer = Meddler { path, change };
        let error = run(&options, &observer).unwrap_err();
        assert!(matches!(error.exit_status(), 1 | 3 | 5), "{error:?}");
        let text = crate::report::error_chain(&error);
        assert!(text.contains(name), "{text}");
        // What was copied is kept as after any error; it is of another source than there is now.
        assert!(!place.path("copy").exists());
    }
}

#[test]
fn a_source_that_is_written_to_meanwhile_is_said() {
    use std::os::unix::fs::FileExt;
    let place = Place::new();
    place.image("s.qcow2");
    let change = |file: &fs::File| file.write_all_at(&[9; 512], 19 << 20).unwrap();
    let path = place.path("s.qcow2");
    let observer = Meddler { path, change };
    let error = run(&place.options("s.qcow2", "copy"), &observer).unwrap_err();
    assert!(
        matches!(&error, Error::SourceChanged { path } if path.ends_with("s.qcow2")),
        "{error}"
    );
    assert!(!place.path("copy").exists());
}

#[test]
fn file_names_are_bytes() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let odd = std::ffi::OsStr::from_bytes(b"b\xffse.qcow2");
    std::fs::rename(place.image("base.qcow2"), place.0.path().join(odd)).unwrap();
    let mut create = CreateOptions::new(SIZE);
    create.backing =
        Some(Backing { name: odd.to_owned(), format: Some("qcow2".into()), reader: None });
    let top = Arc::new(HostFile::create_new(&place.path("top.qcow2")).unwrap());
    let image = NewImage::create(top, &create).unwrap();
    image.write_at(&[9; 65536], GuestOffset(10 << 20)).unwrap();
    image.finish(&[]).unwrap();
    let mut options = place.options("top.qcow2", "flat.qcow2");
    options.backing = BackingChoice::Flatten;
    run(&options, &Silent).unwrap();
    assert!(are_equal(&place.path("top.qcow2"), &place.path("flat.qcow2"), false));
    options.destination = place.path("kept.qcow2");
    options.backing = BackingChoice::Keep(place.0.path().join(odd));
    options.allow_backing = true;
    run(&options, &Silent).unwrap();
    let kept = Opener::new().without_named_files(true).open(&options.destination).unwrap();
    let name = kept.top().as_qcow2().unwrap().header().backing_file.clone().unwrap();
    assert!(name.as_bytes().ends_with(odd.as_bytes()), "{name:?}");
    let info = InfoOptions { image: options.destination, ..Default::default() };
    let shown = crate::info::run(&info).unwrap().backing_filename.unwrap();
    assert!(shown.contains('\u{fffd}'), "{shown}");
}

#[test]
fn a_kept_backing_file_takes_what_stands_above_it() {
    let place = Place::new();
    let base = place.image("base.qcow2");
    let mut create = CreateOptions::new(SIZE);
    let name = base.clone().into_os_string();
    create.backing = Some(Backing { name, format: Some("qcow2".into()), reader: None });
    let top = Arc::new(HostFile::create_new(&place.path("top.qcow2")).unwrap());
    let image = NewImage::create(top, &create).unwrap();
    image.write_at(&[9; 65536], GuestOffset(10 << 20)).unwrap();
    image.write_zeroes(GuestOffset(6 << 20), 1 << 20).unwrap();
    image.finish(&[]).unwrap();
    for (allow_backing, cluster_size) in [(true, None), (false, None), (true, Some(1 << 20))] {
        let mut options = place.options("top.qcow2", "d.qcow2");
        options.backing = BackingChoice::Keep(base.clone());
        options.allow_backing = allow_backing;
        options.target.cluster_size = cluster_size;
        options.existing = Existing::Replace;
        options.fresh = true;
        let report = run(&options, &Silent).unwrap();
        assert_eq!(report.disks[0].verified, Verified::Yes);
        assert_eq!(report.disks[0].bytes_data, 65536);
        assert!(are_equal(&place.path("top.qcow2"), &place.path("d.qcow2"), false));
        options.destination = base.clone();
        assert_eq!(run(&options, &Silent).unwrap_err().exit_status(), 2);
    }
}

#[test]
fn in_place_keeps_the_destinations_bitmaps_and_adds_ours() {
    let place = Place::new();
    let source = place.image("s.qcow2");
    let mut shape = CreateOptions::new(SIZE);
    shape.cluster_bits = 12;
    place.image_with("d.qcow2", &shape);
    let mut options = place.options("s.qcow2", "d.qcow2");
    options.existing = Existing::InPlace;
    options.renames = vec!["a=x".parse().unwrap(), "b=y".parse().unwrap()];
    options.fresh = true;
    for changed in [1, 2] {
        let report = run(&options, &Silent).unwrap();
        assert_eq!(exit_status(&report), 0);
        assert_eq!(report.disks[0].bitmaps[0].changed.len(), changed, "the second time replaces");
    }
    assert!(are_equal(&source, &place.path("d.qcow2"), false));
    let info =
        crate::info::run(&InfoOptions { image: place.path("d.qcow2"), ..Default::default() });
    let info = info.unwrap();
    let names: Vec<_> = info.bitmaps.iter().map(|b| b.name.as_str()).collect();
    assert_eq!(names, ["a", "b", "x", "y"]);
    assert!(info.bitmaps.iter().all(|b| !b.inconsistent));
    assert!(info.notes.is_empty(), "{:?}", info.notes);
}

#[test]
fn in_place_never_takes_an_image_for_a_raw_file() {
    let place = Place::new();
    fs::write(place.path("s.raw"), vec![7; 1 << 20]).unwrap();
    place.image("d.qcow2");
    let mut options = place.options("s.raw", "d.qcow2");
    options.existing = Existing::InPlace;
    let before = fs::read(place.path("d.qcow2")).unwrap();
    assert_eq!(run(&options, &Silent).unwrap_err().exit_status(), 2, "sizes differ");
    assert_eq!(fs::read(place.path("d.qcow2")).unwrap(), before);
}

/// Stops when a phase begins.
struct StopAt(Phase, AtomicU64);

impl Observer for StopAt {
    fn phase(&self, phase: Phase) {
        self.1.fetch_or(u64::from(phase == self.0), Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.1.load(Ordering::Relaxed) != 0
    }
}

type Change = fn(&mut CopyOptions);

/// Ways to copy that are interrupted and gone on with: changes of the options, and files of the
/// destination.
fn interruptible() -> Vec<(Change, Vec<&'static str>)> {
    let raw: Change = |o| {
        o.target_format = Some(Format::Raw);
        o.bitmaps = BitmapSelection::None;
    };
    let pair: Change = |o| {
        o.target.data_file = Some("d.data".into());
        o.target.data_file_raw = Some(true);
    };
    let fine: Change = |o| o.target.cluster_size = Some(4096);
    vec![(|_| (), vec!["d"]), (raw, vec!["d"]), (pair, vec!["d", "d.data"]), (fine, vec!["d"])]
}

#[test]
fn the_same_command_goes_on_after_an_interruption() {
    for (change, files) in interruptible() {
        for phase in [Phase::Transfer, Phase::Bitmaps, Phase::Prove, Phase::Publish] {
            let place = Place::new();
            let source = place.image("s");
            let mut options = place.options("s", "d");
            change(&mut options);
            let stop = StopAt(phase, AtomicU64::new(0));
            let error = run(&options, &stop).unwrap_err();
            assert_eq!(error.exit_status(), 130, "{phase:?}");
            let parts = files.iter().map(|name| format!(".{name}.bitferry-part"));
            let mut kept: Vec<_> = parts.collect();
            kept.extend([".d.bitferry-journal".to_owned(), "s".to_owned()]);
            kept.sort();
            assert_eq!(place.names(), kept, "{phase:?}");
            let report = run(&options, &Silent).unwrap();
            assert!(report.resumed, "{phase:?}");
            let disk = &report.disks[0];
            assert_eq!((disk.verified, report.repeated_bytes), (Verified::Yes, 0));
            if phase != Phase::Transfer {
                assert_eq!(disk.bytes_data, 0, "{phase:?}: all was there");
            }
            let bitmaps = options.bitmaps == BitmapSelection::All;
            if files.len() == 1 {
                assert!(are_equal(&source, &place.path("d"), bitmaps), "{phase:?}");
            }
            let mut all = vec![".d.bitferry-receipt"];
            all.extend(files.iter().copied().chain(["s"]));
            assert_eq!(place.names(), all, "{phase:?}");
        }
    }
}

#[test]
fn a_source_that_was_written_to_since_is_gone_on_with_where_it_is_as_it_was() {
    let place = Place::new();
    let mut bytes = vec![7; 5 << 20];
    fs::write(place.path("s"), &bytes).unwrap();
    let options = place.options("s", "d");
    run(&options, &StopAt(Phase::Prove, AtomicU64::new(0))).unwrap_err();
    bytes[3 << 20] = 8;
    fs::write(place.path("s"), &bytes).unwrap();
    // A clock that has not moved on would make it the same session.
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    fs::File::options().write(true).open(place.path("s")).unwrap().set_modified(later).unwrap();
    let report = run(&options, &Silent).unwrap();
    assert!(report.resumed);
    assert_eq!(report.disks[0].bytes_data, 1 << 20);
    assert!(are_equal(&place.path("s"), &place.path("d"), false));
    assert_eq!(place.names(), [".d.bitferry-receipt", "d", "s"]);
}

#[test]
fn another_command_or_another_source_begins_anew() {
    let changes: [fn(&Place, &mut CopyOptions); 4] = [
        |_, o| o.fresh = true,
        |_, o| o.target.cluster_size = Some(4096),
        |_, o| o.no_verify = true,
        |place, _| {
            fs::copy(place.path("s"), place.path("s.new")).unwrap();
            fs::rename(place.path("s.new"), place.path("s")).unwrap();
        },
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let place = Place::new();
        place.image("s");
        let mut options = place.options("s", "d");
        let stop = StopAt(Phase::Prove, AtomicU64::new(0));
        run(&options, &stop).unwrap_err();
        change(&place, &mut options);
        let report = run(&options, &Silent).unwrap();
        assert!(!report.resumed && report.disks[0].bytes_data > 0, "{i}");
        assert!(are_equal(&place.path("s"), &place.path("d"), true), "{i}");
        assert_eq!(place.names(), [".d.bitferry-receipt", "d", "s"], "{i}");
    }
}

#[test]
fn a_raw_disk_of_odd_length_is_rounded_up() {
    let place = Place::new();
    fs::write(place.path("s.raw"), vec![7; 70_001]).unwrap();
    let mut options = place.options("s.raw", "d.qcow2");
    options.target_format = Some(Format::Qcow2);
    let report = run(&options, &Silent).unwrap();
    assert_eq!(report.disks[0].verified, Verified::Yes);
    assert!(are_equal(&place.path("s.raw"), &place.path("d.qcow2"), false));
}
