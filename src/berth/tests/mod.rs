//! A destination of files through its contract: cut off anywhere, gone on with, published once.

mod changed;
mod proving;
mod states;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitmap_mig::Bitmap;
use format_spec::content_hash::{ContentHash, Tree, hash_run};
use format_spec::native::hello::SessionState;
use mig_core::block::is_zero;
use mig_core::section::{Fate, Have};
use qcow2_file::bitmaps::Bits;
use tempfile::TempDir;

use super::{DiskPlace, FileOptions, Files};
use crate::Renames;
use crate::copy::{Format, TargetOptions};
use crate::incoming::{Destination, Place, Sealed, Wanted};

const MIB: usize = 1 << 20;
const SESSION: [u8; 16] = [5; 16];

struct Here(TempDir);

impl Here {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What is noted in the journal of a disk when COMMIT has come.
    fn commit(&self, name: &str) {
        let log = super::Log::beside(&self.path(name)).unwrap();
        let found = log.peek().unwrap().unwrap();
        log.resume(found).unwrap().unwrap().commit().unwrap();
    }

    fn names(&self) -> Vec<String> {
        let name = |e: std::io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(name).collect();
        names.sort();
        names
    }

    /// What has its final name.
    fn published(&self) -> Vec<String> {
        self.names().into_iter().filter(|name| !name.starts_with('.')).collect()
    }

    fn files(&self, options: FileOptions) -> Files {
        Files::new(self.disks(), options)
    }

    /// Two disks: a qcow2 file with a raw data file, and a raw file.
    fn disks(&self) -> Vec<DiskPlace> {
        let target = TargetOptions {
            data_file: Some("a.data".into()),
            data_file_raw: Some(true),
            ..TargetOptions::default()
        };
        let place = |name: &str, format, target| DiskPlace {
            name: name.into(),
            path: self.path(name),
            format,
            target,
            base: None,
            renames: Renames::default(),
        };
        let raw = place("b", Format::Raw, TargetOptions::default());
        vec![place("a", Format::Qcow2, target), raw]
    }
}

fn content() -> Vec<u8> {
    let mut bytes = vec![0; 5 * MIB + 512];
    bytes[..MIB].fill(1);
    bytes[2 * MIB..3 * MIB + 70_000].fill(2);
    *bytes.last_mut().unwrap() = 3;
    bytes
}

fn root(bytes: &[u8]) -> ContentHash {
    let mut tree = Tree::new(bytes.len() as u64).unwrap();
    for p in hash_run(0, bytes, is_zero) {
        tree.put(p.height, p.index, p.node).unwrap();
    }
    tree.root().unwrap()
}

fn bitmap() -> Bitmap {
    let mut bits = Bits::for_disk(content().len() as u64, 16);
    bits.set_range(3..9);
    Bitmap { name: "dirty".into(), granularity_bits: 16, is_enabled: true, bits }
}

fn place(files: &Files, name: &str) -> Arc<dyn Place> {
    let size = content().len() as u64;
    files.place(&Wanted { name, size, keeps_rest: false }).unwrap()
}

/// Units that the place has, after it was asked as the engine does.
fn have(place: &dyn Place) -> Vec<u64> {
    let mut units = Vec::new();
    place
        .have(&mut |have| {
            match have {
                Have::Units(first, nodes) => units.extend(first..first + nodes.len() as u64),
                Have::Zeroes(first, count) => units.extend(first..first + count),
            }
            Ok(())
        })
        .unwrap();
    units
}

/// Sends the units in `units` that are not known, as the engine does.
fn send(place: &dyn Place, units: std::ops::Range<u64>, known: &[u64]) {
    let bytes = content();
    for unit in units.filter(|unit| !known.contains(unit)) {
        let start = usize::try_from(unit).unwrap() * MIB;
        let part = &bytes[start..bytes.len().min(start + MIB)];
        let range = start as u64..(start + part.len()) as u64;
        place.begin(range.clone()).unwrap();
        if is_zero(part) {
            if !place.sink().reads_as_zero(range.start, part.len() as u64) {
                place.sink().write_zeroes(range.start, part.len() as u64).unwrap();
            }
            place.arrived_zeroes(range).unwrap();
        } else {
            place.sink().write_at(part, range.start).unwrap();
            let nodes: Vec<_> = match place.wants_nodes() {
                true => vec![format_spec::content_hash::subtree(4, part, &is_zero)],
                false => Vec::new(),
            };
            place.arrived(range, unit, &nodes).unwrap();
        }
    }
}

fn sealed(with_bitmap: bool) -> Sealed {
    let bitmaps = if with_bitmap { vec![bitmap()] } else { Vec::new() };
    Sealed { content: Some(root(&content())), bitmaps }
}

fn prepare(places: &[Arc<dyn Place>; 2]) {
    let [a, b] = places;
    let proof = a.prepare(&sealed(true)).unwrap().unwrap();
    assert_eq!(proof.content, Some(root(&content())));
    assert_eq!(proof.bitmaps, [bitmap().digest().unwrap()]);
    assert_eq!(b.prepare(&sealed(false)).unwrap().unwrap().bitmaps, []);
}

/// Sends what the places do not have, and publishes.
fn complete(here: &Here, files: &Files, places: [Arc<dyn Place>; 2]) {
    for place in &places {
        let known = have(&**place);
        send(&**place, 0..6, &known);
    }
    prepare(&places);
    drop(places);
    files.commit().unwrap();
    is_whole(here);
}

fn is_whole(here: &Here) {
    assert!(fs::read(here.path("b")).unwrap() == content());
    assert!(fs::read(here.path("a.data")).unwrap() == content());
    let receipts = [".a.bitferry-receipt", ".b.bitferry-receipt"];
    assert_eq!(here.names(), [&receipts[..], &["a", "a.data", "b"][..]].concat());
}

/// A destination where everything was proved and nothing published.
fn proved() -> Here {
    let here = Here::new();
    let files = here.files(FileOptions::default());
    files.begin(SESSION).unwrap();
    let places = both(&files);
    places.iter().for_each(|p| send(&**p, 0..6, &[]));
    prepare(&places);
    here
}

/// A destination where everything was published.
fn published() -> Here {
    let here = proved();
    let files = here.files(FileOptions::default());
    files.begin(SESSION).unwrap();
    prepare(&both(&files));
    files.commit().unwrap();
    here
}

fn both(files: &Files) -> [Arc<dyn Place>; 2] {
    [place(files, "a"), place(files, "b")]
}

#[test]
fn every_state_is_found_again_by_another_process() {
    let here = Here::new();
    // Cut off in the middle.
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Fresh);
    let places = both(&files);
    places.iter().for_each(|p| send(&**p, 0..3, &[]));
    drop(places);
    files.abort(Fate::Kept);
    // Gone on with, and cut off before COMMIT.
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Resumable);
    let places = both(&files);
    for place in &places {
        let known = have(&**place);
        assert_eq!(known, [0, 1, 2]);
        send(&**place, 0..6, &known);
    }
    prepare(&places);
    drop((places, files));
    // Nothing is sent; the proof still stands.
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Ready);
    let places = both(&files);
    assert!(places[1].sink().write_at(&[1; 512], 0).is_err());
    prepare(&places);
    drop(places);
    files.commit().unwrap();
    is_whole(&here);
    // The answer was lost.
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Committed);
    let told = || {
        let told = files.published().unwrap().into_iter();
        told.map(|disk| (disk.content, disk.is_unchanged)).collect::<Vec<_>>()
    };
    let proved = Some(root(&content()));
    assert_eq!(told(), [(proved, true); 2]);
    // It stays so, but a receipt speaks of the disk that it was written for.
    let written = fs::OpenOptions::new().write(true).open(here.path("b")).unwrap();
    written.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_eq!(told(), [(proved, true), (proved, false)]);
    // Another session finds the place taken.
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin([6; 16]).unwrap(), SessionState::Fresh);
    assert!(files.place(&Wanted { name: "b", size: 512, keeps_rest: false }).is_err());
}

#[test]
fn a_publication_is_finished_from_any_point() {
    // Files that have their final names when the crash comes.
    for renamed in 0..=3 {
        let here = proved();
        here.commit("a");
        here.commit("b");
        for name in ["a.data", "a", "b"].iter().take(renamed) {
            fs::rename(here.path(&format!(".{name}.bitferry-part")), here.path(name)).unwrap();
        }
        let files = here.files(FileOptions::default());
        assert_eq!(files.begin(SESSION).unwrap(), SessionState::Committed, "{renamed}");
        is_whole(&here);
    }
}

#[test]
fn fresh_and_other_sessions_begin_anew() {
    for (session, is_fresh) in [(SESSION, true), ([6; 16], false)] {
        let here = Here::new();
        let files = here.files(FileOptions::default());
        files.begin(SESSION).unwrap();
        let places = both(&files);
        places.iter().for_each(|p| send(&**p, 0..3, &[]));
        drop(places);
        files.abort(Fate::Kept);
        let files = here.files(FileOptions { is_fresh, ..FileOptions::default() });
        assert_eq!(files.begin(session).unwrap(), SessionState::Fresh);
        let places = both(&files);
        complete(&here, &files, places);
    }
}

#[test]
fn what_is_dropped_or_not_hashed_leaves_nothing() {
    for no_verify in [false, true] {
        let here = Here::new();
        let files = here.files(FileOptions { no_verify, ..FileOptions::default() });
        files.begin(SESSION).unwrap();
        let places = both(&files);
        places.iter().for_each(|p| send(&**p, 0..3, &[]));
        drop(places);
        files.abort(if no_verify { Fate::Kept } else { Fate::Dropped });
        drop(files);
        assert_eq!(here.names(), [] as [&str; 0]);
    }
}

#[test]
fn names_on_the_wire_are_no_paths() {
    let here = Here::new();
    let files = here.files(FileOptions::default());
    files.begin(SESSION).unwrap();
    for name in ["c", "../b", "/b", ""] {
        assert!(files.place(&Wanted { name, size: 512, keeps_rest: false }).is_err());
    }
    assert!(files.place(&Wanted { name: "b", size: 512, keeps_rest: true }).is_err());
    assert_eq!(here.names(), [] as [&str; 0]);
    assert!(!Path::new("c").exists());
}
