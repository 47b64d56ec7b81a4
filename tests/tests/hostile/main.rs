//! Hostile images through the command line: every recipe changes bytes of a sound image that QEMU
//! made, then every verb meets it, with limits on memory and time. Whatever happens, nothing
//! crashes or hangs, the source keeps its bytes, nothing is left behind, nothing is opened that the
//! user did not name, and the message says which file, where and what.

mod bases;
mod bitmaps;
mod chains;
mod header;
mod judge;
mod maps;
mod recipes;

use std::process::ExitCode;

use bitferry_tests::{Peer, peer};
use libtest_mimic::{Arguments, Failed, Trial};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let has_peers = [Peer::QemuImg, Peer::QemuIo].iter().all(|p| p.find().is_some());
    let is_skipped = !has_peers && !peer::is_demanded();
    let mut trials = Vec::new();
    for recipe in [header::recipes(), maps::recipes(), bitmaps::recipes()].into_iter().flatten() {
        let name = recipe.name.clone();
        trials.push(trial("image", &name, move || judge::judge(&recipe)));
    }
    for (name, test) in chains::ALL {
        trials.push(trial("chain", name, move || test(&chains::World::new())));
    }
    let trials = trials.into_iter().map(|t| t.with_ignored_flag(is_skipped)).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(kind: &str, name: &str, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(format!("{kind}: {name}"), move || -> Result<(), Failed> {
        test();
        Ok(())
    })
}
