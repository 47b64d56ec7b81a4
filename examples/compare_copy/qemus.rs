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

/// The bitmaps that `image::make` writes.
const BITMAPS: [&str; 3] = ["hourly", "daily", "weekly"];

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

/// Both machines and the disks they have: QEMU stores bitmaps into what it has opened, so that the
/// source is an overlay, with the bitmaps of what lies under it.
fn machines(
    program: &Program,
    (source, destination): (&Path, &Path),
    mib: u64,
) -> Result<(Machine, Machine, PathBuf)> {
    let overlay = source.with_extension("overlay");
    let qemu_img = |arguments: &[&str]| peak::run(Command::new("qemu-img").args(arguments));
    let [above, under, there] = [overlay.as_path(), source, destination].map(Path::to_string_lossy);
    qemu_img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &under, &above])?;
    for (name, bits) in BITMAPS.into_iter().zip([16, 18, 20]) {
        let granularity = (1u64 << bits).to_string();
        qemu_img(&["bitmap", "--add", "-g", &granularity, &above, name])?;
        qemu_img(&["bitmap", "--merge", name, "-b", &under, "-F", "qcow2", &above, name])?;
    }
    qemu_img(&["create", "-q", "-f", "qcow2", &there, &format!("{mib}M")])?;
    let from = Machine::start(program, &overlay, "qcow2", false)?;
    let to = Machine::start(program, destination, "qcow2", true)?;
    Ok((from, to, overlay))
}

fn mirror(program: &Program, paths: (&Path, &Path), mib: u64) -> Result<Taken> {
    let (mut from, mut to, overlay) = machines(program, paths, mib)?;
    let port = free_port()?;
    let address = json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": port } });
    to.ask("nbd-server-start", json!({ "addr": address }))?;
    let export = json!({ "type": "nbd", "id": "export", "node-name": "disk0", "writable": true });
    let export = with_node(&mut to, export)?;
    to.ask("block-export-add", export)?;
    let uri = to.listen()?;
    let begun = Instant::now();
    let server = json!({ "type": "inet", "host": "127.0.0.1", "port": port });
    let target =
        json!({ "driver": "nbd", "node-name": "target", "server": server, "export": "disk0" });
    from.ask("blockdev-add", target)?;
    let job = json!({ "job-id": "job", "device": "disk0", "target": "target", "sync": "full" });
    from.ask("blockdev-mirror", job)?;
    from.until("query-block-jobs", |jobs| match jobs[0]["ready"].as_bool() {
        Some(is_ready) => Ok(is_ready),
        None => Err(format!("the mirror failed: {jobs}").into()),
    })?;
    for side in [&mut from, &mut to] {
        let capability = json!({ "capability": "dirty-bitmaps", "state": true });
        side.ask("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
    }
    hurry(&mut from)?;
    // The machine does not run: what was mirrored is final, and the job need not wait for a pause.
    from.ask("block-job-cancel", json!({ "device": "job" }))?;
    from.until("query-block-jobs", |jobs| Ok(jobs.as_array().is_some_and(Vec::is_empty)))?;
    to.ask("nbd-server-stop", json!({}))?;
    from.ask("migrate", json!({ "uri": uri }))?;
    from.completes()?;
    to.completes()?;
    to.quit()?;
    let time = begun.elapsed();
    from.quit()?;
    std::fs::remove_file(overlay)?;
    Ok(Taken { time, peak_kib: None })
}

fn blk(program: &Program, paths: (&Path, &Path), mib: u64) -> Result<Taken> {
    let (mut from, mut to, overlay) = machines(program, paths, mib)?;
    let uri = to.listen()?;
    hurry(&mut from)?;
    let begun = Instant::now();
    from.ask("migrate", json!({ "uri": uri, "blk": true }))?;
    from.completes()?;
    to.completes()?;
    to.quit()?;
    let time = begun.elapsed();
    from.quit()?;
    std::fs::remove_file(overlay)?;
    Ok(Taken { time, peak_kib: None })
}

/// Takes away what holds QEMU back by default. Were the limit of the pause longer, 7.2 would end
/// before all is sent.
fn hurry(machine: &mut Machine) -> Result<()> {
    let limits = json!({ "max-bandwidth": 16_000_000_000u64, "downtime-limit": 1 });
    machine.ask("migrate-set-parameters", limits)?;
    Ok(())
}

fn free_port() -> Result<String> {
    let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
    Ok(listener.local_addr()?.port().to_string())
}

/// An export of the node that the disk is, which has a name that QEMU made up.
fn with_node(machine: &mut Machine, mut export: serde_json::Value) -> Result<serde_json::Value> {
    let disks = machine.ask("query-block", json!({}))?;
    let all = disks.as_array().ok_or("query-block lists nothing")?;
    let disk = all.iter().find(|d| d["device"] == "disk0").ok_or("there is no disk0")?;
    export["node-name"] = disk["inserted"]["node-name"].clone();
    export["name"] = "disk0".into();
    Ok(export)
}
