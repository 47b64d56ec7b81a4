//! The same image, copied by everybody on one host.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use bitferry::Silent;
use bitferry::copy::{self, CopyOptions};

use crate::contest::{Contender, Role};
use crate::image::Noise;
use crate::{Result, contest, image, peak};

/// Bytes that the bare loop moves at a time, as our engine does.
const LOOP_BYTES: u64 = 1 << 20;

fn convert(source: &Path, destination: &Path, further: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "--bitmaps", "-O", "qcow2"]).args(further);
    command.args([source, destination]);
    command
}

/// Two commands, one after the other.
fn followed(first: &mut Command, second: &mut Command) -> Result<peak::Taken> {
    let mut taken = peak::run(first)?;
    taken.time += peak::run(second)?.time;
    Ok(taken)
}

/// A contender of one command.
fn command(
    name: &str,
    role: Role,
    make: impl Fn(&Path, &Path) -> Result<Command> + 'static,
) -> Contender {
    Contender::new(name, role, move |s, d| peak::run(&mut make(s, d)?))
}

fn ours(name: &str, kind: &'static str, role: Role) -> Contender {
    command(name, role, move |s, d| peak::child(&[kind], &[s, d]))
}

fn contenders() -> Vec<Contender> {
    let mut all = vec![
        ours("bitferry copy", "proof", Role::Runner),
        ours("bitferry copy --no-verify", "no-proof", Role::Runner),
    ];
    if peak::is_here("qemu-img") {
        let plain = |s: &Path, d: &Path| Ok(convert(s, d, &[]));
        all.push(command("qemu-img convert --bitmaps", Role::Peer("qemu-img"), plain));
        let wide = |s: &Path, d: &Path| Ok(convert(s, d, &["-m", "8", "-W"]));
        all.push(command("qemu-img convert --bitmaps -m 8 -W", Role::Peer("qemu-img"), wide));
        let durable = |s: &Path, d: &Path| {
            followed(&mut convert(s, d, &["-m", "8", "-W"]), Command::new("sync").arg(d))
        };
        all.push(Contender::new("the same, then sync", Role::Runner, durable));
        let compared = |s: &Path, d: &Path| {
            let compare = &mut Command::new("qemu-img");
            followed(&mut convert(s, d, &["-m", "8", "-W"]), compare.arg("compare").args([s, d]))
        };
        all.push(Contender::new("the same, then qemu-img compare", Role::Runner, compared));
    }
    all.push(command("cp (no bitmap is looked at)", Role::Runner, |source, destination| {
        let mut command = Command::new("cp");
        command.arg("--reflink=never").args([source, destination]);
        Ok(command)
    }));
    all.push(ours("bare loop: read and write, 2 threads", "bare", Role::Limit("bare loop")));
    all
}

/// Copies in turn and prints the table.
pub(crate) fn run(scratch: &Path, mib: u64, rounds: usize) -> Result<()> {
    let (source, destination) = (scratch.join("source.qcow2"), scratch.join("destination.qcow2"));
    image::make(&source, mib << 20, mib, Noise::Pure)?;
    println!("{mib} MiB of noise in a qcow2 image with three bitmaps, {rounds} rounds, warm\n");
    contest::run(&mut contenders(), (&source, &destination), rounds)?;
    Ok(std::fs::remove_file(&source)?)
}

/// One of our own contenders, in its own process.
pub(crate) fn child(kind: &str, source: &Path, destination: &Path) -> Result<()> {
    match kind {
        "bare" => bare_loop(source, destination)?,
        _ => {
            let options = CopyOptions {
                source: source.to_owned(),
                destination: destination.to_owned(),
                no_verify: kind == "no-proof",
                ..CopyOptions::default()
            };
            let report = copy::run(&options, &Silent)?;
            if bitferry::exit_status(&report) != 0 {
                return Err(format!("{report:?}").into());
            }
        }
    }
    peak::tell()
}

/// What the machine gives to two threads that read and write and do nothing else.
fn bare_loop(source: &Path, destination: &Path) -> Result<()> {
    let (source, destination) = (File::open(source)?, File::create_new(destination)?);
    let len = source.metadata()?.len();
    destination.set_len(len)?;
    let next = AtomicU64::new(0);
    let work = || -> std::io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let at = next.fetch_add(LOOP_BYTES, Ordering::Relaxed);
            if at >= len {
                return Ok(());
            }
            let piece = usize::try_from(LOOP_BYTES.min(len - at)).unwrap_or(buffer.len());
            let buffer = buffer.get_mut(..piece).unwrap_or_default();
            source.read_exact_at(buffer, at)?;
            destination.write_all_at(buffer, at)?;
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mine = work();
        other.join().unwrap_or(Ok(())).and(mine)
    })?;
    Ok(())
}
