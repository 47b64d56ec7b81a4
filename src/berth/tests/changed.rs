//! Somebody writes to what was proved before it has its name, and asks no lock.

use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::*;
use crate::berth::Base;
use crate::{Blame, Error, Silent};

/// Writes a few bytes into a file, as late as clocks of files tell apart.
fn scribble(path: &Path) {
    std::thread::sleep(Duration::from_millis(30));
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(b"scribbled", 4 * MIB as u64).unwrap();
}

fn part(here: &Here, name: &str) -> PathBuf {
    here.path(&format!(".{name}.bitferry-part"))
}

/// Goes on with what is there, which has no final name.
fn goes_on(here: &Here) {
    assert_eq!(here.published(), [] as [&str; 0]);
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Resumable);
    assert_eq!(here.published(), [] as [&str; 0]);
    let places = both(&files);
    complete(here, &files, places);
}

#[test]
fn between_ready_and_commit_nothing_of_it_is_published() {
    for name in ["a", "a.data", "b"] {
        let here = Here::new();
        let files = here.files(FileOptions::default());
        files.begin(SESSION).unwrap();
        let places = both(&files);
        places.iter().for_each(|p| send(&**p, 0..6, &[]));
        prepare(&places);
        scribble(&part(&here, name));
        drop(places);
        let error = crate::Error::from(files.commit().unwrap_err());
        assert!(matches!(&error, Error::Changed { path } if *path == part(&here, name)), "{error}");
        assert_eq!((error.blame(), error.exit_status()), (Blame::Mismatch, 1));
        drop(files);
        goes_on(&here);
    }
}

#[test]
fn another_file_in_its_place_is_another() {
    let here = proved();
    let (b, other) = (part(&here, "b"), here.path("other"));
    fs::copy(&b, &other).unwrap();
    let modified = fs::metadata(&b).unwrap().modified().unwrap();
    fs::OpenOptions::new().write(true).open(&other).unwrap().set_modified(modified).unwrap();
    fs::rename(&other, &b).unwrap();
    goes_on(&here);
}

#[test]
fn ready_is_not_said_of_what_was_written_to() {
    for name in ["a", "a.data", "b"] {
        let here = proved();
        scribble(&part(&here, name));
        goes_on(&here);
    }
}

#[test]
fn an_interrupted_commit_is_not_finished_with_it() {
    for name in ["a", "a.data", "b"] {
        let here = proved();
        here.commit("a");
        scribble(&part(&here, name));
        goes_on(&here);
    }
}

#[test]
fn what_has_its_name_already_is_told() {
    let here = proved();
    ["a", "b"].iter().for_each(|name| here.commit(name));
    for name in ["a.data", "a"] {
        fs::rename(part(&here, name), here.path(name)).unwrap();
    }
    // A guest may run on the first one by now.
    scribble(&here.path("a.data"));
    scribble(&part(&here, "b"));
    for _ in 0..2 {
        let files = here.files(FileOptions::default());
        let error = Error::from(files.begin(SESSION).unwrap_err());
        let Error::HalfPublished { published, source } = &error else { panic!("{error}") };
        assert_eq!(*published, [here.path("a.data"), here.path("a")]);
        assert!(matches!(&**source, Error::Changed { path } if *path == part(&here, "b")));
        assert_eq!(error.exit_status(), 1);
        assert!(error.hint().unwrap().contains("--fresh"));
        assert!(!here.path("b").exists());
    }
    let fresh = FileOptions { is_fresh: true, replaces: true, ..FileOptions::default() };
    let files = here.files(fresh);
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Fresh);
    let places = both(&files);
    complete(&here, &files, places);
}

#[test]
fn what_was_published_and_written_to_is_told_as_it_was() {
    let here = proved();
    here.commit("a");
    here.commit("b");
    fs::rename(part(&here, "a.data"), here.path("a.data")).unwrap();
    scribble(&here.path("a.data"));
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin(SESSION).unwrap(), SessionState::Committed);
    let told = files.published().unwrap();
    assert_eq!(told.iter().map(|disk| disk.is_unchanged).collect::<Vec<_>>(), [false, true]);
}

#[test]
fn what_it_stands_on_counts_too() {
    for is_killed in [false, true] {
        let here = Here::new();
        let base = here.path("base");
        fs::write(&base, content()).unwrap();
        let (path, size) = (here.path("c"), content().len() as u64);
        let opened = Base::open(&base, Some(Format::Raw), (&path, false), &Silent).unwrap();
        let disk = DiskPlace {
            name: "c".into(),
            path,
            format: Format::Qcow2,
            target: TargetOptions::default(),
            base: Some(opened),
            renames: Renames::default(),
        };
        let files = Files::new(vec![disk.clone()], FileOptions::default());
        files.begin(SESSION).unwrap();
        let place = files.place(&Wanted { name: "c", size, keeps_rest: true }).unwrap();
        send(&*place, 2..3, &[]);
        place.prepare(&sealed(false)).unwrap();
        drop(place);
        scribble(&base);
        if is_killed {
            drop(files);
            here.commit("c");
            let files = Files::new(vec![disk], FileOptions::default());
            assert_eq!(files.begin(SESSION).unwrap(), SessionState::Resumable);
        } else {
            let error = Error::from(files.commit().unwrap_err());
            assert!(matches!(&error, Error::Changed { path } if *path == base), "{error}");
        }
        assert_eq!(here.published(), ["base"]);
    }
}
