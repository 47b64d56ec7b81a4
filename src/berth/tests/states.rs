//! What a destination answers of a session by what lies on the disk, and whose that is.

use std::fs;

use super::*;
use crate::copy::Rename;
use crate::publish;

/// The state that disks are found in which are configured like that.
fn begun(disks: Vec<DiskPlace>, options: FileOptions) -> (Files, SessionState) {
    let files = Files::new(disks, options);
    let state = files.begin(SESSION).unwrap();
    (files, state)
}

fn found(here: &Here) -> SessionState {
    begun(here.disks(), FileOptions::default()).1
}

/// Other wishes for each of the two disks.
fn other_wishes(here: &Here) -> Vec<Vec<DiskPlace>> {
    let change = |index: usize, f: &dyn Fn(&mut DiskPlace)| {
        let mut disks = here.disks();
        f(&mut disks[index]);
        disks
    };
    let rename = Rename { node: None, old: "dirty".into(), new: "clean".into() };
    vec![
        change(0, &|a| a.target.cluster_size = Some(1 << 17)),
        change(0, &|a| a.target = TargetOptions::default()),
        change(0, &|a| a.renames = Renames::of(std::slice::from_ref(&rename), "a")),
        change(0, &|a| (a.format, a.target) = (Format::Raw, TargetOptions::default())),
        change(1, &|b| b.format = Format::Qcow2),
    ]
}

#[test]
fn what_one_journal_commits_all_are_published() {
    // COMMIT is in the journal of one disk when the crash comes, or some names are there already.
    for committed in ["a", "b"] {
        let here = proved();
        here.commit(committed);
        assert_eq!(found(&here), SessionState::Committed, "{committed}");
        is_whole(&here);
    }
}

#[test]
fn what_another_session_proved_is_not_published_with_it() {
    let here = proved();
    // It waits for its own session, unless the user gives that up.
    let refused = here.files(FileOptions::default()).begin([6; 16]).unwrap_err();
    assert_eq!(refused.blame(), format_spec::Blame::Device, "{refused}");
    let files = here.files(FileOptions { is_fresh: true, ..FileOptions::default() });
    files.begin([6; 16]).unwrap();
    let b = place(&files, "b");
    send(&*b, 0..6, &[]);
    b.prepare(&sealed(false)).unwrap();
    drop((b, files));
    here.commit("b");
    assert_eq!(found(&here), SessionState::Resumable);
    assert!(here.path("b").exists() && !here.path("a").exists());
}

#[test]
fn what_was_proved_for_other_wishes_is_begun_anew() {
    for (index, disks) in other_wishes(&proved()).iter().enumerate() {
        let here = proved();
        let (disks, _) = (other_wishes(&here).swap_remove(index), disks);
        let (files, state) = begun(disks, FileOptions::default());
        assert_ne!(state, SessionState::Ready, "{index}");
        for place in &both(&files) {
            let known = have(&**place);
            send(&**place, 0..6, &known);
        }
    }
}

#[test]
fn a_publication_that_began_is_not_finished_as_something_else() {
    for index in 0..5 {
        let here = proved();
        here.commit("a");
        here.commit("b");
        let before = here.names();
        let files = Files::new(other_wishes(&here).swap_remove(index), FileOptions::default());
        let error = files.begin(SESSION).unwrap_err();
        assert_eq!(error.blame(), format_spec::Blame::Caller, "{index}");
        assert_eq!(here.names(), before);
        assert_eq!(found(&here), SessionState::Committed);
        is_whole(&here);
    }
}

#[test]
fn a_publication_that_began_is_not_finished_where_all_is_to_begin_anew() {
    let fresh = FileOptions { is_fresh: true, replaces: true, ..FileOptions::default() };
    // Nothing has its final name yet, or a part of it.
    for renamed in 0..3 {
        let here = proved();
        here.commit("a");
        here.commit("b");
        for name in ["a.data", "a"].iter().take(renamed) {
            fs::rename(here.path(&format!(".{name}.bitferry-part")), here.path(name)).unwrap();
        }
        let before = here.published();
        let (files, state) = begun(here.disks(), fresh);
        assert_eq!((state, here.published()), (SessionState::Fresh, before));
        // Whoever comes next does not go on with it either.
        drop(files);
        assert_eq!(found(&here), SessionState::Fresh, "{renamed}");
        let (files, _) = begun(here.disks(), fresh);
        let places = both(&files);
        places.iter().for_each(|place| assert_eq!(have(&**place), [] as [u64; 0]));
        complete(&here, &files, places);
    }
}

#[test]
fn a_journal_without_its_files_claims_nothing() {
    let part = |name: &str| format!(".{name}.bitferry-part");
    for (gone, expected) in [
        (vec!["a"], SessionState::Resumable),
        (vec!["a.data"], SessionState::Resumable),
        (vec!["b"], SessionState::Resumable),
        (vec!["a", "b"], SessionState::Fresh),
    ] {
        let here = proved();
        gone.iter().for_each(|name| fs::remove_file(here.path(&part(name))).unwrap());
        let (files, state) = begun(here.disks(), FileOptions::default());
        assert_eq!(state, expected, "{gone:?}");
        let places = both(&files);
        complete(&here, &files, places);
    }
}

#[test]
fn ready_is_not_said_of_what_has_gone_meanwhile() {
    let here = proved();
    let (files, state) = begun(here.disks(), FileOptions::default());
    assert_eq!(state, SessionState::Ready);
    fs::remove_file(here.path(".b.bitferry-part")).unwrap();
    let size = content().len() as u64;
    assert!(files.place(&Wanted { name: "a", size, keeps_rest: false }).is_ok());
    assert!(files.place(&Wanted { name: "b", size, keeps_rest: false }).is_err());
    // Another size is another disk.
    let here = proved();
    let (files, _) = begun(here.disks(), FileOptions::default());
    assert!(files.place(&Wanted { name: "b", size: size - 512, keeps_rest: false }).is_err());
}

#[test]
fn a_proof_is_of_no_use_where_none_is_wanted() {
    let here = proved();
    let options = FileOptions { no_verify: true, ..FileOptions::default() };
    assert_eq!(begun(here.disks(), options).1, SessionState::Fresh);
}

#[test]
fn committed_is_what_every_disk_has_a_receipt_of() {
    for name in ["a", "b"] {
        let here = published();
        assert_eq!(found(&here), SessionState::Committed);
        fs::remove_file(here.path(&format!(".{name}.bitferry-receipt"))).unwrap();
        assert_eq!(found(&here), SessionState::Fresh, "{name}");
        // A receipt speaks for what is there, and for its own session.
        let here = published();
        fs::remove_file(here.path(name)).unwrap();
        assert_eq!(found(&here), SessionState::Fresh, "{name}");
    }
    let here = published();
    fs::write(here.path("b"), [1; 512]).unwrap();
    assert_eq!(found(&here), SessionState::Fresh);
    let here = published();
    let files = here.files(FileOptions::default());
    assert_eq!(files.begin([6; 16]).unwrap(), SessionState::Fresh);
}

#[test]
fn a_receipt_is_of_what_was_asked_for() {
    for index in 0..5 {
        let here = published();
        let disks = other_wishes(&here).swap_remove(index);
        let (files, state) = begun(disks, FileOptions::default());
        assert_eq!(state, SessionState::Fresh, "{index}");
        let size = content().len() as u64;
        assert!(files.place(&Wanted { name: "b", size, keeps_rest: false }).is_err());
        is_whole(&here);
    }
}

#[test]
fn every_name_that_files_may_have_will_do() {
    for len in (230..=255).chain([1]) {
        let here = Here::new();
        let (name, size) = ("n".repeat(len), content().len() as u64);
        let mut disks = here.disks();
        disks.remove(0);
        disks[0].path = here.path(&name);
        for expected in [SessionState::Fresh, SessionState::Ready] {
            let (files, state) = begun(disks.clone(), FileOptions::default());
            assert_eq!(state, expected, "{len}");
            let place = files.place(&Wanted { name: "b", size, keeps_rest: false }).unwrap();
            if expected == SessionState::Fresh {
                send(&*place, 0..6, &[]);
            }
            place.prepare(&sealed(false)).unwrap();
            drop(place);
            if expected == SessionState::Ready {
                files.commit().unwrap();
            }
        }
        assert_eq!(begun(disks, FileOptions::default()).1, SessionState::Committed, "{len}");
        assert_eq!(here.names().len(), 2, "{:?}", here.names());
    }
}

#[test]
fn what_is_replaced_is_held_until_then() {
    let here = Here::new();
    let in_the_way = ["a", "a.data", "b"].map(|name| here.path(name));
    in_the_way.iter().for_each(|path| fs::write(path, [7; 4096]).unwrap());
    let options = FileOptions { replaces: true, is_fresh: true, ..FileOptions::default() };
    for path in &in_the_way {
        let used = publish::hold(path).unwrap();
        let (files, state) = begun(here.disks(), options);
        assert_eq!(state, SessionState::Fresh);
        let size = content().len() as u64;
        let opened = ["a", "b"].map(|name| files.place(&Wanted { name, size, keeps_rest: false }));
        assert!(opened.iter().any(Result::is_err), "{}", path.display());
        drop((opened, files, used));
    }
    let files = here.files(options);
    files.begin(SESSION).unwrap();
    let places = both(&files);
    places.iter().for_each(|p| send(&**p, 0..6, &[]));
    prepare(&places);
    in_the_way.iter().for_each(|path| assert!(publish::hold(path).is_err()));
    drop(places);
    files.commit().unwrap();
    is_whole(&here);
    in_the_way.iter().for_each(|path| assert!(publish::hold(path).unwrap().is_some()));
}

#[test]
fn what_is_given_up_is_begun_anew() {
    for is_proved in [true, false] {
        let here = proved();
        if !is_proved {
            fs::remove_file(here.path(".a.bitferry-part")).unwrap();
        }
        let (files, state) = begun(here.disks(), FileOptions::default());
        assert_ne!(state, SessionState::Fresh);
        files.forget().unwrap();
        let places = both(&files);
        places.iter().for_each(|p| assert_eq!(have(&**p), [] as [u64; 0]));
        complete(&here, &files, places);
    }
}

#[test]
fn what_was_proved_of_something_else_is_gone_on_with() {
    let changed = |change: fn(&mut Sealed)| {
        let mut sealed = sealed(true);
        change(&mut sealed);
        sealed
    };
    for other in [
        changed(|sealed| sealed.content = Some(root(&[0; 512]))),
        changed(|sealed| sealed.content = None),
        changed(|sealed| sealed.bitmaps.clear()),
        changed(|sealed| sealed.bitmaps[0].is_enabled ^= true),
    ] {
        let here = proved();
        let files = here.files(FileOptions::default());
        assert_eq!(files.begin(SESSION).unwrap(), SessionState::Ready);
        let places = both(&files);
        assert!(places[0].prepare(&other).is_err(), "{other:?}");
        drop(places);
        files.abort(Fate::Kept);
        let files = here.files(FileOptions::default());
        assert_eq!(files.begin(SESSION).unwrap(), SessionState::Resumable);
        let places = both(&files);
        complete(&here, &files, places);
    }
}
