//! Writes every cluster of a huge disk through [`NewImage`] into a file that swallows guest data,
//! and says how much memory and time the map and the refcounts took.
//!
//! ```text
//! full_disk [GIB] [CLUSTER_BITS] [FILE]
//! ```
//!
//! FILE gets the metadata (2.5 GiB for 16 TiB at 64 KiB clusters) at its true place, so that the
//! result can be given to `qemu-img check`; without a name it is deleted. The file system must
//! allow files as long as the disk.
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::storage::Run;
use qcow2_file::{GuestOffset, HostFile, Storage};

/// Bytes of one write, as a copy makes them.
const UNIT_BYTES: u64 = 2 << 20;
const THREADS: u64 = 2;

/// A file that keeps metadata and only counts what comes from `unit`, the guest's data.
#[derive(Debug)]
struct Swallowing {
    file: HostFile,
    unit: Arc<Vec<u8>>,
    swallowed_bytes: AtomicU64,
}

impl Storage for Swallowing {
    fn name(&self) -> Arc<str> {
        self.file.name()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if self.unit.as_ptr_range().contains(&buf.as_ptr()) {
            self.swallowed_bytes.fetch_add(buf.len() as u64, Ordering::Relaxed);
            return Ok(());
        }
        self.file.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<Run> {
        self.file.run_at(offset, max_len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let gibibytes: u64 = args.next().map_or(Ok(16 << 10), |a| a.parse())?;
    let cluster_bits: u32 = args.next().map_or(Ok(16), |a| a.parse())?;
    let kept = args.next().map(PathBuf::from);
    let scratch = PathBuf::from(format!("full_disk-{}.qcow2", std::process::id()));
    let path = kept.clone().unwrap_or_else(|| scratch.clone());
    let outcome = fill(&path, gibibytes << 30, cluster_bits);
    if kept.is_none() {
        std::fs::remove_file(&scratch)?;
    }
    outcome
}

fn fill(path: &std::path::Path, size: u64, cluster_bits: u32) -> Result<(), Box<dyn Error>> {
    let unit = Arc::new(vec![0x5a; usize::try_from(UNIT_BYTES)?]);
    let file = HostFile::create_new(path)?;
    let file = Arc::new(Swallowing { file, unit: Arc::clone(&unit), swallowed_bytes: 0.into() });
    let before = anonymous_bytes()?;
    let start = Instant::now();
    let options = CreateOptions { cluster_bits, ..CreateOptions::new(size) };
    let image = NewImage::create(Arc::clone(&file) as Arc<dyn Storage>, &options)?;
    let next = AtomicU64::new(0);
    let worker = || -> qcow2_file::Result<()> {
        loop {
            let at = next.fetch_add(UNIT_BYTES, Ordering::Relaxed);
            if at >= size {
                return Ok(());
            }
            image.write_at(&unit, GuestOffset(at))?;
        }
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..THREADS).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or(Ok(())))
    })?;
    let written = (start.elapsed(), anonymous_bytes()?);
    image.finish(&[])?;
    let finished = (start.elapsed() - written.0, anonymous_bytes()?);
    println!("guest data swallowed: {} bytes", file.swallowed_bytes.load(Ordering::Relaxed));
    println!("file length: {} bytes", file.len()?);
    println!(
        "writing: {:.1} s, anonymous memory +{} KiB",
        written.0.as_secs_f64(),
        kib(written.1, before)
    );
    println!(
        "finishing: {:.1} s, anonymous memory +{} KiB",
        finished.0.as_secs_f64(),
        kib(finished.1, before)
    );
    println!("peak resident memory: {} KiB", status("VmHWM:")?);
    Ok(())
}

fn kib(now: u64, before: u64) -> u64 {
    now.saturating_sub(before)
}

fn anonymous_bytes() -> Result<u64, Box<dyn Error>> {
    status("RssAnon:")
}

/// A line of the process's status, in KiB.
fn status(key: &str) -> Result<u64, Box<dyn Error>> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|l| l.strip_prefix(key)).ok_or("no such line")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}
