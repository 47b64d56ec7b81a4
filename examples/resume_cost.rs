//! What does a cut cost?
//!
//! ```text
//! cargo run --release --example resume_cost -- [--dir DIR] [--mib N]
//! ```
//!
//! An image goes over TCP through somebody who counts the bytes and cuts the connection at a
//! quarter, at a half, and at three quarters of them; then the same command is given once more.
//! Printed are the bytes of both attempts beside those of a move that nobody cuts, and at last what
//! it costs to ask again when all has arrived.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bitferry::connect::{self, Options};
use bitferry::options::DiskOption;
use bitferry::receive::{self, Arrivals, ReceiveOptions};
use bitferry::report::Status;
use bitferry::send::{self, SendOptions};
use bitferry::{Report, Silent};

#[path = "common/image.rs"]
mod image;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    match asked(std::env::args().skip(1)).and_then(|(dir, mib)| measure(&dir, mib)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("resume_cost: {error}");
            ExitCode::FAILURE
        }
    }
}

fn asked(mut arguments: impl Iterator<Item = String>) -> Result<(PathBuf, u64)> {
    let (mut dir, mut mib) = (PathBuf::from("/dev/shm"), 1024);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--dir" => dir = value.into(),
            "--mib" => mib = value.parse()?,
            _ => return Err(format!("{argument} is not known").into()),
        }
    }
    Ok((dir, mib))
}

/// One attempt: how it ended, the bytes that passed in both directions, and how long it took.
struct Attempt {
    report: Option<Report>,
    bytes: u64,
    took: Duration,
}

fn measure(dir: &Path, mib: u64) -> Result<()> {
    let scratch = tempfile::Builder::new().prefix("resume_cost-").tempdir_in(dir)?;
    let source = scratch.path().join("source.qcow2");
    image::make(&source, mib << 20, mib, image::Noise::Pure)?;
    let destination = scratch.path().join("destination.qcow2");
    let whole = whole(&source, &destination)?;
    println!("{mib} MiB of noise in a qcow2 image with three bitmaps over TCP\n");
    println!("{:24}{:>14}{:>14}{:>14}{:>10}", "", "first MiB", "second MiB", "of uncut", "ms");
    line("not cut", whole.bytes, 0, &whole, whole.took);
    for (name, quarters) in
        [("cut at a quarter", 1), ("cut at a half", 2), ("at three quarters", 3)]
    {
        remove(&destination)?;
        let first = attempt(&source, &destination, whole.bytes / 4 * quarters)?;
        let second = whole_of(attempt(&source, &destination, u64::MAX)?, Status::Completed)?;
        line(name, first.bytes, second.bytes, &whole, second.took);
    }
    let again = attempt(&source, &destination, u64::MAX)?;
    let again = whole_of(again, Status::AlreadyComplete)?;
    line("asked again, complete", 0, again.bytes, &whole, again.took);
    Ok(())
}

/// The move that nobody cuts; the second, when everything is warm.
fn whole(source: &Path, destination: &Path) -> Result<Attempt> {
    whole_of(attempt(source, destination, u64::MAX)?, Status::Completed)?;
    remove(destination)?;
    whole_of(attempt(source, destination, u64::MAX)?, Status::Completed)
}

fn whole_of(attempt: Attempt, status: Status) -> Result<Attempt> {
    let found = attempt.report.as_ref().map(|report| report.status);
    if found == Some(status) { Ok(attempt) } else { Err(format!("it ended with {found:?}").into()) }
}

#[expect(clippy::cast_precision_loss, reason = "shown with few digits")]
fn line(name: &str, first: u64, second: u64, whole: &Attempt, took: Duration) {
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let share = (first + second) as f64 / whole.bytes as f64;
    let ms = took.as_millis();
    println!("{name:24}{:14.2}{:14.2}{share:14.3}{ms:10}", mib(first), mib(second));
}

/// Removes a destination with its receipt.
fn remove(destination: &Path) -> Result<()> {
    let receipt = destination.with_file_name(".destination.qcow2.bitferry-receipt");
    std::fs::remove_file(receipt)?;
    Ok(std::fs::remove_file(destination)?)
}

fn disk(path: &Path) -> DiskOption {
    DiskOption { id: "disk".into(), path: path.to_owned(), format: None, is_readonly: false }
}

/// Both sides, until they have ended; the connection is cut when `limit` bytes have passed.
fn attempt(source: &Path, destination: &Path, limit: u64) -> Result<Attempt> {
    let listener = connect::listen(&"tcp:127.0.0.1:0".parse()?, &Options::default())?;
    let to = listener.uri().to_string().replacen("tcp:", "", 1);
    let middle = TcpListener::bind("127.0.0.1:0")?;
    let uri = format!("tcp:{}", middle.local_addr()?).parse()?;
    // Where it goes is part of what makes it the same command; here the ports differ.
    let goes_to = "the other side".to_owned();
    let disks = vec![disk(source)];
    let sending = SendOptions { disks, destination: goes_to, ..SendOptions::default() };
    let disks = vec![disk(destination)];
    let receiving = ReceiveOptions { disks, ..ReceiveOptions::default() };
    std::thread::scope(|scope| {
        let begun = Instant::now();
        let counting = scope.spawn(move || pass(&middle, &to, limit));
        let receiver = scope.spawn(|| {
            let (_tell, told) = mpsc::channel();
            receive::run(&receiving, &Arrivals::new(&listener, &Silent, told), &Silent)
        });
        let dialer = connect::dial(&uri, &Options::default())?;
        let sent = send::run(&sending, &dialer, &Silent);
        let took = begun.elapsed();
        // Its end is the source's, whose report is the one that counts.
        let _ = receiver.join().map_err(|_| "the destination panicked")?;
        let bytes = counting.join().map_err(|_| "who counts panicked")??;
        Ok(Attempt { report: sent.ok(), bytes, took })
    })
}

/// Passes one connection on until `limit` bytes have gone forth. How many went, either way.
fn pass(middle: &TcpListener, to: &str, limit: u64) -> Result<u64> {
    let (near, _) = middle.accept()?;
    let far = TcpStream::connect(to)?;
    let bytes = std::thread::scope(|scope| {
        let back = scope.spawn(|| copy(&far, &near, u64::MAX));
        let forth = copy(&near, &far, limit);
        forth + back.join().unwrap_or(0)
    });
    Ok(bytes)
}

/// Copies until either end is closed or `limit` bytes have passed, then ends both.
fn copy(mut from: &TcpStream, mut to: &TcpStream, limit: u64) -> u64 {
    let mut buffer = vec![0; 256 << 10];
    let mut passed = 0;
    while passed < limit {
        let most = usize::try_from(limit - passed).unwrap_or(usize::MAX).min(buffer.len());
        let Some(room) = buffer.get_mut(..most) else { break };
        let Ok(len @ 1..) = from.read(room) else { break };
        if to.write_all(buffer.get(..len).unwrap_or_default()).is_err() {
            break;
        }
        passed += len as u64;
    }
    for stream in [from, to] {
        // Either may be gone.
        let _ = stream.shutdown(Shutdown::Both);
    }
    passed
}
