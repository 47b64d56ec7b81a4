//! Memory and time of disks that are far larger than any memory.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bitferry::Silent;
use bitferry::copy::{self, CopyOptions};
use block_mig::device::NewImageSink;
use block_mig::{TransferOptions, Unwatched, transfer};
use mig_core::block::{BlockSource, Extent, ExtentKind};
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::storage::Run;
use qcow2_file::{HostFile, Storage};

use crate::image::Noise;
use crate::{Result, image, peak};

const TIB: u64 = 1 << 40;
/// What every page of the full disk begins with.
const STAMP: [u8; 8] = *b"full 16T";
const PAGE_BYTES: usize = 4096;

/// Runs each case in a process of its own.
pub(crate) fn run(scratch: &Path) -> Result<()> {
    for (kind, name) in [
        ("sparse", "16 TiB sparse qcow2 with three bitmaps, copied and proved"),
        ("hashed", "64 GiB full device, moved and hashed"),
        ("full", "16 TiB full device, moved (data thrown away, metadata written)"),
    ] {
        let taken = peak::run(&mut peak::child(&[kind], &[scratch])?)?;
        let peak = taken.peak_kib.unwrap_or(0) as f64 / 1024.0;
        println!("{name}: {:.1} s, peak {peak:.1} MiB", taken.time.as_secs_f64());
    }
    Ok(())
}

/// One case.
pub(crate) fn child(kind: &str, scratch: &Path) -> Result<()> {
    let begun = Instant::now();
    match kind {
        "sparse" => sparse(scratch)?,
        "hashed" => full(scratch, TIB / 16, true)?,
        _ => full(scratch, 16 * TIB, false)?,
    }
    eprintln!("{kind}: {:?}", begun.elapsed());
    peak::tell()
}

fn sparse(scratch: &Path) -> Result<()> {
    let (source, destination) = (scratch.join("sparse.qcow2"), scratch.join("copy.qcow2"));
    image::make(&source, 16 * TIB, 64, Noise::Pure)?;
    let options = CopyOptions {
        source: source.clone(),
        destination: destination.clone(),
        ..CopyOptions::default()
    };
    let report = copy::run(&options, &Silent)?;
    if bitferry::exit_status(&report) != 0 {
        return Err(format!("{report:?}").into());
    }
    std::fs::remove_file(source)?;
    Ok(std::fs::remove_file(destination)?)
}

fn full(scratch: &Path, size: u64, hashes: bool) -> Result<()> {
    let path = scratch.join("full.qcow2");
    let storage = Arc::new(Forgetful { file: HostFile::create_new(&path)?, thrown: 0.into() });
    let image = NewImage::create(storage.clone(), &CreateOptions::new(size))?;
    let options = TransferOptions { hashes, ..TransferOptions::default() };
    transfer(&FullDisk(size), &NewImageSink(&image), &options, &Unwatched)?;
    image.finish(&[])?;
    if storage.thrown.load(Ordering::Relaxed) != size {
        return Err("not all data was written".into());
    }
    Ok(std::fs::remove_file(path)?)
}

/// A disk that is full of pages which cost nothing to make.
struct FullDisk(u64);

impl BlockSource for FullDisk {
    fn size(&self) -> u64 {
        self.0
    }

    fn extent(&self, _offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Data, host: None })
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> mig_core::Result<()> {
        for page in buf.chunks_mut(PAGE_BYTES) {
            if let Some(start) = page.first_chunk_mut() {
                *start = STAMP;
            }
        }
        Ok(())
    }
}

/// A file that keeps metadata and throws the full disk's data away.
#[derive(Debug)]
struct Forgetful {
    file: HostFile,
    thrown: AtomicU64,
}

impl Storage for Forgetful {
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
        if !buf.starts_with(&STAMP) {
            return self.file.write_at(buf, offset);
        }
        self.thrown.fetch_add(buf.len() as u64, Ordering::Relaxed);
        Ok(())
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
