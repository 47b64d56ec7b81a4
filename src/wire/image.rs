//! One image file over a connection: what a source's and a destination's process do with it.

use std::cell::OnceCell;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use block_mig::device::{ChainSource, NewImageSink};
use block_mig::limits::{UNIT_BYTES, workers};
use block_mig::plan::{Scope, survey};
use mig_core::block::BlockSink;
use qcow2_file::bitmaps::State;
use qcow2_file::create::{CreateOptions, NewImage};

use super::{Arrived, DiskProof, Incoming, Outgoing, OutgoingDisk, Sent};
use crate::disk::{Disk, Request};
use crate::hash::content_of;
use crate::observe::Progress;
use crate::publish::{Draft, publish};
use crate::{Error, Observer, Phase, Result, Silent};

/// What was sent, and what the destination made of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SentImage {
    /// The destination's program and version.
    pub peer: String,
    /// Bytes written to the connection.
    pub wire_bytes: u64,
    /// What left this side.
    pub sent: Sent,
    /// How it reads back from the destination's storage. Equal to what was sent, or nothing would
    /// have been published.
    pub confirmed: DiskProof,
    /// The bitmaps' names, in the order of both proofs.
    pub bitmaps: Vec<String>,
}

/// Sends an image with all its bitmaps to a destination that publishes it. Refuses an image with a
/// bitmap that cannot be sent; opens nothing that the image names.
pub fn send_image<R: Read, W: Write + Send>(
    (reader, writer): (R, W),
    image: &Path,
    observer: &dyn Observer,
) -> Result<SentImage> {
    let disk = Disk::open(&Request::new(image, None), observer)?;
    let bitmaps = usable_bitmaps(image, &disk)?;
    let source = ChainSource(&disk.chain);
    let session = super::random_id().map_err(super::no_random)?;
    let mut outgoing = Outgoing::connect(reader, writer, session)?;
    let outgoing_disk = OutgoingDisk { name: "disk0", source: &source, bitmaps: &bitmaps };
    let content = survey(&source, Scope::Whole, UNIT_BYTES)?.content;
    let progress = Progress::begin(observer, Phase::Transfer, content);
    let sent = outgoing.transfer(&[outgoing_disk], &progress)?;
    progress.end();
    observer.phase(Phase::Prove);
    let confirmed = outgoing.prepare(&sent)?;
    let (Some(sent), Some(confirmed)) = (sent.into_iter().next(), confirmed.into_iter().next())
    else {
        return Err(Error::Usage { reason: "nothing was sent".to_owned() });
    };
    if sent.proof != confirmed {
        let reason =
            format!("sent {}, the destination reads {}", sent.proof.content, confirmed.content);
        outgoing.abort("the proof does not hold".to_owned())?;
        return Err(Error::ProofMismatch { path: image.to_owned(), reason });
    }
    observer.phase(Phase::Publish);
    let (peer, wire_bytes) = (outgoing.peer().to_owned(), outgoing.wire_bytes());
    outgoing.commit()?;
    let bitmaps = bitmaps.into_iter().map(|b| b.name).collect();
    Ok(SentImage { peer, wire_bytes, sent, confirmed, bitmaps })
}

fn usable_bitmaps(image: &Path, disk: &Disk) -> Result<Vec<bitmap_mig::Bitmap>> {
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

/// Receives one image and publishes it at `target`, which must not exist, as qcow2. Until the
/// source has agreed to the proof the image has a temporary name.
pub fn receive_image<R: Read, W: Write>(
    (reader, writer): (R, W),
    target: &Path,
    observer: &dyn Observer,
) -> Result<()> {
    let ticket = super::random_id().map_err(super::no_random)?;
    let mut incoming = Incoming::accept(reader, writer, ticket)?;
    match land(&mut incoming, target, observer) {
        Ok(()) => Ok(incoming.commit()?),
        Err(error) => {
            // The first error is the one to report; a source that is gone needs no answer.
            let _ = incoming.fail(error.blame(), crate::report::error_chain(&error));
            Err(error)
        }
    }
}

fn land<R: Read, W: Write>(
    incoming: &mut Incoming<R, W>,
    target: &Path,
    observer: &dyn Observer,
) -> Result<()> {
    let draft = Draft::create(target)?;
    let place = OnceCell::new();
    observer.phase(Phase::Transfer);
    let arrived = incoming.transfer(&mut |name: &str, size| {
        if place.get().is_some() {
            let reason = format!("disk {name:?} is a second one, and there is place for one");
            return Err(Error::Usage { reason });
        }
        let image = NewImage::create(draft.storage(), &CreateOptions::new(size))?;
        Ok(Arc::new(NewImageSink(place.get_or_init(|| image))) as Arc<dyn BlockSink + '_>)
    })?;
    let (Some(image), [disk]) = (place.get(), arrived.as_slice()) else {
        return Err(Error::Usage { reason: "the source sent no disk".to_owned() });
    };
    observer.phase(Phase::Seal);
    let stored: Vec<_> = disk.bitmaps.iter().map(|b| b.clone().into_stored_as(&b.name)).collect();
    image.finish(&stored)?;
    let proof = read_back(draft.temporary(), disk, observer)?;
    incoming.prepare(&arrived, std::slice::from_ref(&proof))?;
    observer.phase(Phase::Publish);
    publish(vec![draft], false)
}

/// Opens what was written as anybody would, and holds it against what arrived.
fn read_back(path: &Path, arrived: &Arrived, observer: &dyn Observer) -> Result<DiskProof> {
    let disk = Disk::open(&Request::new(path, Some(crate::copy::Format::Qcow2)), &Silent)?;
    let content = content_of(&disk, workers(None), None, (Phase::Prove, observer))?;
    let mismatch = |reason| Error::ProofMismatch { path: path.to_owned(), reason };
    if content != arrived.content {
        return Err(mismatch(format!("{} arrived, {content} was read", arrived.content)));
    }
    let mut bitmaps = Vec::new();
    for bitmap in &arrived.bitmaps {
        let directory = disk.bitmaps.directory();
        let directory = directory.ok_or_else(|| mismatch("the bitmaps are gone".to_owned()))?;
        bitmaps.push(bitmap_mig::load(directory, &bitmap.name)?.digest()?);
    }
    Ok(DiskProof { content, bitmaps })
}
