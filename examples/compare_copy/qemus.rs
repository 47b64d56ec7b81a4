//! How stock QEMUs move a disk between two of their own: version 10 mirrors it over NBD and
//! migrates the bitmaps then, version 7.2 migrates it with `blk` and without them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use serde_json::json;

use crate::Result;
use crate::contest::{Contender, Role};
use crate::machine::{Machine, Program};
use crate::peak::{self, Taken};

/// Those whose programs are named.
pub(crate) fn contenders(mib: u64) -> Vec<Contender> {
    let mut all = Vec::new();
    match Program::named_by("BITFERRY_QEMU_10") {
        Some(program) => {
            let name = "QEMU 10: mirror over NBD, then dirty-bitmaps";
            let mirror = move |s: &Path, d: &Path| mirror(&program, (s, d), mib);
            all.push(Contender::new(name, Role::Peer("mirror"), mirror));
        }
        None => println!("BITFERRY_QEMU_10 is not set: left out"),
    }
    match Program::named_by("BITFERRY_QEMU_72") {
        Some(program) => {
            let blk = move |s: &Path, d: &Path| blk(&program, (s, d), mib);
            all.push(Contender::new("QEMU 7.2: migrate -b", Role::Peer("blk"), blk));
        }
        None => println!("BITFERRY_QEMU_72 is not set: left out"),
    }
    all
}

/// Both machines, and the copy that is the source's disk: QEMU stores bitmaps into what it has
/// opened, and drops those that it migrated.
fn machines(
    program: &Program,
    (source, destination): (&Path, &Path),
    mib: u64,
) -> Result<(Machine, Machine, PathBuf)> {
    let copy = source.with_extension("copy");
    std::fs::copy(source, &copy)?;
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(destination).arg(format!("{mib}M"));
    peak::run(&mut create)?;
    let from = Machine::start(program, &copy, "qcow2", false)?;
    let to = Machine::start(program, destination, "qcow2", true)?;
    Ok((from, to, copy))
}

fn mirror(program: &Program, paths: (&Path, &Path), mib: u64) -> Result<Taken> {
    let (mut from, mut to, copy) = machines(program, paths, mib)?;
    let port = to.export("disk0")?;
    let uri = to.listen()?;
    let begun = Instant::now();
    from.mirror("disk0", &port)?;
    from.until("query-block-jobs", |jobs| match jobs[0]["ready"].as_bool() {
        Some(is_ready) => Ok(is_ready),
        None => Err(format!("the mirror failed: {jobs}").into()),
    })?;
    for side in [&mut from, &mut to] {
        let capability = json!({ "capability": "dirty-bitmaps", "state": true });
        side.ask("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
    }
    hurry(&mut from, 300)?;
    // The machine does not run: what was mirrored is final, and the job need not wait for a pause.
    from.end_mirror()?;
    to.ask("nbd-server-stop", json!({}))?;
    from.ask("migrate", json!({ "uri": uri }))?;
    ended((from, to, copy), begun)
}

fn blk(program: &Program, paths: (&Path, &Path), mib: u64) -> Result<Taken> {
    let (mut from, mut to, copy) = machines(program, paths, mib)?;
    let uri = to.listen()?;
    // Were it longer, 7.2 would end before all is sent.
    hurry(&mut from, 1)?;
    let begun = Instant::now();
    from.ask("migrate", json!({ "uri": uri, "blk": true }))?;
    ended((from, to, copy), begun)
}

/// Waits for the end of a migration, and for the destination to have stored everything.
fn ended((mut from, mut to, copy): (Machine, Machine, PathBuf), begun: Instant) -> Result<Taken> {
    from.completes()?;
    to.completes()?;
    to.quit()?;
    let time = begun.elapsed();
    from.quit()?;
    std::fs::remove_file(copy)?;
    Ok(Taken { time, peak_kib: None })
}

/// Takes away what holds QEMU back by default.
fn hurry(machine: &mut Machine, downtime_ms: u64) -> Result<()> {
    let limits = json!({ "max-bandwidth": 16_000_000_000u64, "downtime-limit": downtime_ms });
    machine.ask("migrate-set-parameters", limits)?;
    Ok(())
}
