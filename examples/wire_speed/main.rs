//! How fast the native dialect moves a disk over TCP on this host, beside the bare loop: as many
//! threads that write warm memory to as many sockets, and that read it into warm memory.
//!
//! `cargo run --release --example wire_speed [MiB [ROUNDS]]`

mod bare;
mod memory;
mod tcp;

use std::sync::Arc;
use std::time::{Duration, Instant};

use bitferry::incoming::{IncomingOptions, receive};
use bitferry::outgoing::{AtRest, Outcome, OutgoingOptions, send};
use block_mig::{SaveBlocks, SaveDisk, SaveOptions, Unwatched};
use format_spec::native::block::DiskId;
use mig_core::section::{Registry, SaveHandler};
use mig_core::transport::Listen as _;

use self::memory::{Slabs, Target};
use self::tcp::Loopback;

type Anything = Box<dyn std::error::Error + Send + Sync>;

fn main() -> Result<(), Anything> {
    let mut args = std::env::args().skip(1);
    let mib: u64 = args.next().map_or(Ok(1024), |arg| arg.parse())?;
    let rounds: usize = args.next().map_or(Ok(5), |arg| arg.parse())?;
    let source = Slabs::random(mib << 20);
    let target = Arc::new(Slabs::random(mib << 20));
    println!("{mib} MiB of data, medians of {rounds} rounds, GiB/s");
    println!("{:>11} {:>10} {:>10} {:>10}", "connections", "bare loop", "no proof", "proof");
    for channels in [1, 2, 4] {
        let mut columns = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..rounds {
            let [bare, unproved, proved] = &mut columns;
            bare.push(bare::run(channels, mib << 20)?);
            unproved.push(migrate(&source, &target, channels, false)?);
            proved.push(migrate(&source, &target, channels, true)?);
        }
        let [bare, unproved, proved] = columns.map(|column| speed(mib, column));
        println!("{channels:>11} {bare:>10.2} {unproved:>10.2} {proved:>10.2}");
    }
    Ok(())
}

/// GiB/s of the median.
fn speed(mib: u64, mut times: Vec<Duration>) -> f64 {
    times.sort();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    mib as f64 / 1024.0 / median.as_secs_f64()
}

/// One whole migration: hello to EOF, with or without hashes and read-back.
fn migrate(
    source: &Slabs,
    target: &Arc<Slabs>,
    channels: u16,
    proves: bool,
) -> Result<Duration, Anything> {
    let net = Loopback::new()?;
    let session = bitferry::random_id()?;
    let begun = Instant::now();
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None)?;
            let options = IncomingOptions::new(&Unwatched);
            let target = Arc::new(Target::new(target.clone()));
            Ok::<_, Anything>(receive(main, &net, target, Registry::new(), &options)?)
        });
        let disk = SaveDisk { id: DiskId(0), name: "vda".into(), source, dirty: None };
        let options = SaveOptions { hashes: proves, workers: 2, monitor: &Unwatched };
        let blocks = SaveBlocks::new(vec![disk], options)?;
        let handlers: Vec<Box<dyn SaveHandler + '_>> = vec![Box::new(blocks)];
        let options = OutgoingOptions { channels, ..OutgoingOptions::new(session, &Unwatched) };
        let sent = send(&net, handlers, &mut (), &mut AtRest, &options)?;
        if !matches!(sent.outcome, Outcome::Completed) {
            return Err(format!("{:?}", sent.outcome).into());
        }
        destination.join().map_err(|_| "the destination panicked")??;
        Ok(begun.elapsed())
    })
}
