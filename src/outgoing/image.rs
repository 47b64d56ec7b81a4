//! One image file at rest, sent with all its bitmaps.

use std::path::Path;

use bitmap_mig::{Bitmap, SaveBitmap, SaveBitmaps};
use block_mig::device::ChainSource;
use block_mig::limits::{UNIT_BYTES, workers};
use block_mig::plan::{Scope, survey};
use block_mig::{SaveBlocks, SaveDisk, SaveOptions};
use format_spec::native::answer::Ready;
use format_spec::native::block::DiskId;
use mig_core::block::BlockSource as _;
use mig_core::section::SaveHandler;
use mig_core::transport::Dial;
use qcow2_file::bitmaps::State;

use super::{Next, Outcome, OutgoingOptions, Policy, Round, send};
use crate::disk::{Disk, Request};
use crate::observe::Progress;
use crate::{DiskProof, Error, Observer, Phase, Result};

/// What was sent of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentDisk {
    /// Bytes of content on the wire.
    pub bytes_data: u64,
    /// Bytes of the disk that went as runs of zeroes, or not at all.
    pub bytes_zero: u64,
    /// What was sent hashes to.
    pub proof: DiskProof,
}

/// What was sent, and what the destination made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentImage {
    /// The destination's program and version.
    pub peer: String,
    /// Bytes written to the connection.
    pub wire_bytes: u64,
    /// What left this side.
    pub sent: SentDisk,
    /// How it reads back from the destination's storage. Equal to what was sent, or nothing would
    /// have been published.
    pub confirmed: DiskProof,
    /// The bitmaps' names, in the order of both proofs.
    pub bitmaps: Vec<String>,
}

/// Sends an image with all its bitmaps to a destination that publishes it. Refuses an image with a
/// bitmap that cannot be sent; opens nothing that the image names.
pub fn send_image(dial: &dyn Dial, image: &Path, observer: &dyn Observer) -> Result<SentImage> {
    let disk = Disk::open(&Request::new(image, None), observer)?;
    let bitmaps = usable_bitmaps(image, &disk)?;
    let source = ChainSource(&disk.chain);
    let found = survey(&source, Scope::Whole, UNIT_BYTES)?;
    let progress = Progress::begin(observer, Phase::Transfer, found.content);
    let (id, size) = (DiskId(0), source.size());
    let saved = SaveDisk { id, name: "disk0".to_owned(), source: &source, dirty: None };
    let options = SaveOptions { hashes: true, workers: workers(None), monitor: &progress };
    let content = found.data.saturating_add(found.compressed);
    let blocks = SaveBlocks::new(vec![saved], options)?.telling(id, content);
    let counts = blocks.counts();
    let of_disk = |bitmap| SaveBitmap { disk: id, disk_size: size, bitmap };
    let bitmap_handler = SaveBitmaps::new(bitmaps.iter().map(of_disk).collect(), true)?;
    let handlers: Vec<Box<dyn SaveHandler + '_>> = vec![Box::new(blocks), Box::new(bitmap_handler)];
    let session = crate::random_id().map_err(no_random)?;
    let options = OutgoingOptions { resumes: false, ..OutgoingOptions::new(session, &progress) };
    let done = send(dial, handlers, &mut (), &mut Watched(observer), &options)?;
    match done.outcome {
        Outcome::Unknown(error) => return Err(error.into()),
        _ => progress.end(),
    }
    let bytes_data =
        counts.first().map_or(0, |c| c.data.load(std::sync::atomic::Ordering::Relaxed));
    let proof = done.confirmed.as_ref().and_then(only_proof);
    let proof = proof.ok_or_else(|| Error::Usage { reason: "nobody answers here".to_owned() })?;
    let bytes_zero = size.saturating_sub(bytes_data);
    Ok(SentImage {
        peer: done.peer,
        wire_bytes: done.wire_bytes,
        // READY was held against what was sent, hash by hash.
        sent: SentDisk { bytes_data, bytes_zero, proof: proof.clone() },
        confirmed: proof,
        bitmaps: bitmaps.into_iter().map(|b| b.name).collect(),
    })
}

/// One round, and a word about what comes then.
struct Watched<'a>(&'a dyn Observer);

impl Policy for Watched<'_> {
    fn next(&mut self, _round: &Round) -> Next {
        self.0.phase(Phase::Prove);
        Next::Complete
    }
}

fn only_proof(ready: &Ready) -> Option<DiskProof> {
    let [(_, content)] = ready.disks.as_slice() else { return None };
    let bitmaps = ready.bitmaps.iter().map(|(_, digest)| *digest).collect();
    Some(DiskProof { content: Some(*content), bitmaps })
}

fn no_random(source: std::io::Error) -> Error {
    Error::File { action: "read", path: "/dev/urandom".into(), source }
}

fn usable_bitmaps(image: &Path, disk: &Disk) -> Result<Vec<Bitmap>> {
    let broken = |what: String| Error::WouldLose {
        reason: format!("{}: {what}", image.display()),
        hint: "`bitferry bitmap repair` shows what can be done".to_owned(),
    };
    if let Some(why) = disk.bitmaps.unlistable() {
        return Err(broken(why));
    }
    let Some(directory) = disk.bitmaps.directory() else { return Ok(Vec::new()) };
    let load = |entry: &qcow2_file::bitmaps::Entry| match entry.state {
        State::Consistent => Ok(bitmap_mig::load(directory, entry.name())?),
        bad => Err(broken(format!("bitmap {:?} {}", entry.name(), bad.reason()))),
    };
    directory.list().iter().map(load).collect()
}
