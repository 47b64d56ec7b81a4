//! The destination's side.

use std::io::{Read, Write};
use std::sync::Arc;

use bitmap_mig::Bitmap;
use format_spec::Blame;
use format_spec::content_hash::ContentHash;
use format_spec::native::answer::{Answer, Ready};
use format_spec::native::block::{BitmapVersion, BlockRecord, DiskId};
use format_spec::native::control::Control;
use format_spec::native::hello::{Choice, Hello, Refusal, SessionState};
use mig_core::block::BlockSink;

use super::error::{Error, Result};
use super::landing::Landing;
use super::records::{RecordReader, RecordWriter};
use crate::proof::DiskProof;

/// Finds or makes the place for a disk, by the name that the source gives it, which selects among
/// what this side's user configured and is never a path, and the size in bytes that the source
/// says. The place must be at least as large; its content is lost.
pub type Place<'p, 's> = dyn FnMut(&str, u64) -> crate::Result<Arc<dyn BlockSink + 's>> + 'p;

/// A disk that arrived whole, and what the source says of it.
#[derive(Debug)]
pub struct Arrived {
    /// Its name on the wire. Never a path.
    pub name: String,
    /// What arrived hashes to; equal to the source's seal, where the source gave one.
    pub content: ContentHash,
    /// Its bitmaps, complete, equal to the source's seals. Not stored anywhere yet.
    pub bitmaps: Vec<Bitmap>,
    pub(super) id: DiskId,
    /// Numbers of the bitmaps on the wire.
    pub(super) versions: Vec<BitmapVersion>,
}

/// A connection from a source, hello said.
#[derive(Debug)]
pub struct Incoming<R, W> {
    reader: RecordReader<R>,
    writer: RecordWriter<W>,
    session: [u8; 16],
    /// The source's program and version, for messages.
    peer: String,
}

impl<R: Read, W: Write> Incoming<R, W> {
    /// Hears the hello on a fresh connection and agrees to it, or refuses and says why. `ticket` is
    /// random: see [`random_id`](super::random_id).
    pub fn accept(reader: R, writer: W, ticket: [u8; 16]) -> Result<Self> {
        let mut reader = RecordReader::new(reader);
        let mut writer = RecordWriter::new(writer);
        let reason = match reader.hello()? {
            Hello::Offer(offer) if offer.is_one_way => {
                "this side answers, and the stream has no way back"
            }
            Hello::Offer(offer) if offer.required != 0 => "a feature is required that is not here",
            Hello::Offer(offer) => {
                writer.hello(&Hello::Choice(Choice {
                    session: offer.session,
                    ticket,
                    state: SessionState::Fresh,
                    features: 0,
                    channels: 1,
                    program: super::program(),
                }))?;
                return Ok(Self { reader, writer, session: offer.session, peer: offer.program });
            }
            _ => "a transfer opens with an offer",
        };
        let (blame, text) = (Blame::PeerFeatures, reason.to_owned());
        writer.hello(&Hello::Refusal(Refusal { blame, text }))?;
        Err(Error::Protocol { offset: 0, reason: reason.to_owned() })
    }

    /// The source's program and version.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Receives all disks and waits until the source asks for the proof.
    pub fn transfer(&mut self, place: &mut Place<'_, '_>) -> Result<Vec<Arrived>> {
        let arrived = self.receive(place)?;
        match self.control()? {
            (Control::Prepare(session), _) if session == self.session => Ok(arrived),
            (other, offset) => Err(unexpected(other, "PREPARE", offset)),
        }
    }

    fn receive(&mut self, place: &mut Place<'_, '_>) -> Result<Vec<Arrived>> {
        let mut landing = Landing::default();
        loop {
            let record = self.reader.record()?;
            let at = record.offset;
            match BlockRecord::decode(&record)? {
                None => {}
                Some(BlockRecord::End) => return landing.finish(at),
                Some(BlockRecord::Disk(disk)) => landing.disk(&disk, at, place)?,
                Some(BlockRecord::Run(run)) => landing.run(&run, at)?,
                Some(BlockRecord::DiskSeal(seal)) => landing.seal_disk(&seal, at)?,
                Some(BlockRecord::BitmapCreate(create)) => landing.create_bitmap(&create, at)?,
                Some(BlockRecord::BitmapUpdate(update)) => landing.update_bitmap(&update, at)?,
                Some(BlockRecord::BitmapRemove(version)) => landing.remove_bitmap(version, at)?,
                Some(BlockRecord::BitmapSeal(seal)) => landing.seal_bitmap(&seal, at)?,
            }
        }
    }

    /// Tells the source how the storage reads back: one proof for each disk that arrived, in order.
    /// All of it must be durable. Returns when the source says that it may be published.
    pub fn prepare(&mut self, arrived: &[Arrived], proofs: &[DiskProof]) -> Result<()> {
        let mut ready = Ready { session: self.session, disks: Vec::new(), bitmaps: Vec::new() };
        for (disk, proof) in arrived.iter().zip(proofs) {
            ready.disks.push((disk.id, proof.content));
            let digests = proof.bitmaps.iter().copied();
            ready.bitmaps.extend(disk.versions.iter().copied().zip(digests));
        }
        self.say(&Answer::Ready(ready))?;
        match self.control()? {
            (Control::Commit(session), _) if session == self.session => Ok(()),
            (other, offset) => Err(unexpected(other, "COMMIT", offset)),
        }
    }

    /// Tells the source that everything is published.
    pub fn commit(mut self) -> Result<()> {
        self.say(&Answer::Committed(self.session))
    }

    /// Tells the source why this side gives up. Says nothing where the source is who failed.
    pub fn fail(mut self, blame: Blame, text: String) -> Result<()> {
        self.say(&Answer::Failed { blame, offset: None, text })
    }

    fn say(&mut self, answer: &Answer<'_>) -> Result<()> {
        self.writer.record(|out| answer.encode(out))?;
        self.writer.flush()
    }

    /// The next record of the section that drives the others, and where it stands.
    fn control(&mut self) -> Result<(Control, u64)> {
        loop {
            let record = self.reader.record()?;
            if let Some(control) = Control::decode(&record)? {
                return Ok((control, record.offset));
            }
        }
    }
}

/// The error for a step of the handover that is not the one awaited.
fn unexpected(control: Control, awaited: &str, offset: u64) -> Error {
    match control {
        Control::Abort { blame, text } => Error::Peer { blame, text },
        _ => Error::Protocol { offset, reason: format!("{awaited} of this session is awaited") },
    }
}
