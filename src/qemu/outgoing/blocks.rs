//! Disk contents as records of the `block` section: workers read, whoever is done first writes
//! first.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use block_mig::Monitor;
use block_mig::load::SharedTree;
use block_mig::pool::Pool;
use format_spec::qemu::block::{Body, CHUNK_BYTES, Record};
use mig_core::block::{BlockSource, is_zero};
use mig_core::meter::Meter;

use super::chunks::{Chunk, placed};
use super::session::Session;
use super::stream::Stream;
use crate::qemu::{Error, Result};

/// A disk whose chunks are sent.
#[derive(Clone, Copy)]
pub struct OutgoingDisk<'a> {
    /// Name of the block backend at the destination, at most 255 bytes.
    pub name: &'a str,
    /// Its content. What is read of a chunk is at least as new as the call that sends it.
    pub source: &'a dyn BlockSource,
    /// Where its content is hashed: only for a pass over the whole disk at rest.
    pub tree: Option<&'a SharedTree>,
}

/// How chunks are sent.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    /// Worker threads; each holds one chunk.
    pub workers: usize,
    /// Told of every byte that was read, and asked whether to stop.
    pub monitor: &'a dyn Monitor,
    /// What limits the bytes of content that are sent.
    pub meter: &'a Meter,
    /// Bytes that the monitor is told of before the whole is done, for the destination's progress.
    pub total: u64,
}

/// What was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Bytes of the disk in records with content.
    pub data: u64,
    /// Bytes of the disk in records of zeroes.
    pub zero: u64,
}

/// What workers share.
struct Shared<'s, W> {
    stream: &'s mut Stream<W>,
    sent: Sent,
    percent: u8,
    /// The pool knows errors of disks only; the stream's is kept here.
    failure: Option<Error>,
}

impl Session {
    /// Sends chunks of a disk, as a part of the `block` section. May be called for any disk, any
    /// number of times, between [`start_blocks`](Session::start_blocks) and
    /// [`end_blocks`](Session::end_blocks). When it returns everything is written.
    pub fn blocks(
        &mut self,
        disk: &OutgoingDisk<'_>,
        chunks: impl Iterator<Item = block_mig::Result<Chunk>>,
        pass: &Pass<'_>,
    ) -> Result<Sent> {
        self.block_part(|stream| send(stream, disk, chunks, pass))
    }
}

fn send<W: Write + Send>(
    stream: &mut Stream<W>,
    disk: &OutgoingDisk<'_>,
    chunks: impl Iterator<Item = block_mig::Result<Chunk>>,
    pass: &Pass<'_>,
) -> Result<Sent> {
    let sent = Sent::default();
    let shared = Mutex::new(Shared { stream, sent, percent: 0, failure: None });
    let work = |buffer: &mut Vec<u8>, chunk: Chunk| {
        let len = chunk.len_on(disk.source.size());
        let record = load(disk, chunk, buffer)?;
        if let Body::Data { content, .. } = record.body {
            pass.meter.spend(content.len() as u64, &|| pass.monitor.is_cancelled());
        }
        let mut shared = lock(&shared);
        // Another worker has waited already for a peer that takes nothing.
        if shared.failure.is_some() {
            return Err(block_mig::Error::Cancelled);
        }
        let total = pass.total;
        let written = shared.put(&record, len, total);
        if let Err(error) = written {
            shared.failure.get_or_insert(error);
            return Err(block_mig::Error::Cancelled);
        }
        drop(shared);
        if !chunk.is_zero {
            pass.monitor.advance(len);
        }
        Ok(())
    };
    let pool = Pool { workers: pass.workers, monitor: pass.monitor };
    let result = pool.run(chunks, || vec![0; CHUNK_BYTES], work);
    let shared = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(error) = shared.failure {
        return Err(error);
    }
    match result {
        Err(block_mig::Error::Cancelled) => Err(Error::Interrupted),
        Err(error) => Err(crate::Error::from(error).into()),
        Ok(()) => Ok(shared.sent),
    }
}

/// Reads a chunk and makes its record. Its bytes stand in `buffer`, which has room for one.
fn load<'b>(
    disk: &OutgoingDisk<'b>,
    chunk: Chunk,
    buffer: &'b mut [u8],
) -> block_mig::Result<Record<'b>> {
    let (offset, size) = (chunk.offset, disk.source.size());
    let len = chunk.len_on(size);
    // A destination may be larger than the disk: what lies behind the disk's end stays as it is, so
    // that zeroes at the end are sent like all that would reach beyond it, in a record that ends
    // with the disk. One that is smaller than a record has none.
    let Some(start) = placed(offset, size) else {
        return small(disk, chunk, buffer);
    };
    if chunk.is_zero && start == offset {
        disk.tree.map_or(Ok(()), |tree| tree.put_zeroes(offset, len))?;
        return Ok(Record::zeroes(offset, disk.name));
    }
    let before = usize::try_from(offset.saturating_sub(start)).unwrap_or(usize::MAX);
    let content = buffer.first_chunk_mut::<CHUNK_BYTES>().ok_or_else(|| no_record(size))?;
    disk.source.read_at(content, start).map_err(block_mig::Error::Source)?;
    let own = content.get(before..).unwrap_or_default();
    disk.tree.map_or(Ok(()), |tree| tree.put(offset, own))?;
    if is_zero(content) {
        return Ok(Record::zeroes(start, disk.name));
    }
    Ok(Record::data(start, disk.name, content))
}

/// The record of a disk that is smaller than one: only zeroes can be sent.
fn small<'b>(
    disk: &OutgoingDisk<'b>,
    chunk: Chunk,
    buffer: &mut [u8],
) -> block_mig::Result<Record<'b>> {
    let size = disk.source.size();
    let len = usize::try_from(chunk.len_on(size)).unwrap_or(usize::MAX);
    let bytes = buffer.get_mut(..len).ok_or_else(|| no_record(size))?;
    disk.source.read_at(bytes, chunk.offset).map_err(block_mig::Error::Source)?;
    if !is_zero(bytes) {
        return Err(no_record(size));
    }
    disk.tree.map_or(Ok(()), |tree| tree.put(chunk.offset, bytes))?;
    Ok(Record::zeroes(chunk.offset, disk.name))
}

/// A record does not fit a disk of `size` bytes.
fn no_record(size: u64) -> block_mig::Error {
    block_mig::Error::Size { source_bytes: size, sink_bytes: CHUNK_BYTES as u64 }
}

impl<W: Write> Shared<'_, W> {
    fn put(&mut self, record: &Record<'_>, len: u64, total: u64) -> Result<()> {
        match record.body {
            Body::Data { content, .. } => {
                self.stream.content(|out| record.encode_head(out), content)?;
                self.sent.data = self.sent.data.saturating_add(len);
                self.tell(total)
            }
            _ => {
                self.stream.write(|out| record.encode(out))?;
                self.sent.zero = self.sent.zero.saturating_add(len);
                Ok(())
            }
        }
    }

    /// Tells the destination how far this pass is, when the number changes.
    fn tell(&mut self, total: u64) -> Result<()> {
        let percent = self.sent.data.saturating_mul(100).checked_div(total).unwrap_or(0);
        let percent = u8::try_from(percent.min(99)).unwrap_or(99);
        if percent == self.percent {
            return Ok(());
        }
        self.percent = percent;
        self.stream.write(|out| Record::progress(percent).encode(out))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
