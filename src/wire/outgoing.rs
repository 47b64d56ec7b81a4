//! The source's side.

use std::io::{Read, Write};
use std::sync::{Mutex, PoisonError};

use bitmap_mig::Bitmap;
use block_mig::load::{Loader, SharedTree};
use block_mig::plan::{Content, Scope, Unit, Units};
use block_mig::pool::Pool;
use block_mig::{Monitor, limits};
use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::answer::{Answer, Ready};
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapVersion, BlockRecord, Disk, DiskId, DiskSeal,
    PIECE_BYTES, PIECE_HEAD_BYTES, Piece, Pieces, Run,
};
use format_spec::native::control::Control;
use format_spec::native::frame::MAX_PAYLOAD;
use format_spec::native::hello::{Hello, Offer};
use format_spec::{Blame, Reader};
use mig_core::block::BlockSource;

use super::error::{Error, Result};
use super::records::{RecordReader, RecordWriter};
use crate::proof::DiskProof;

/// The only generation: nothing is created twice in a transfer of disks at rest.
const GENERATION: u32 = 1;
/// Pieces that go into one record.
const PIECES_PER_RECORD: usize = MAX_PAYLOAD / (PIECE_HEAD_BYTES + PIECE_BYTES);

/// A disk that is sent, at rest: nobody writes to it meanwhile.
#[derive(Clone, Copy)]
pub struct OutgoingDisk<'a> {
    /// Name on the wire, at most 255 bytes.
    pub name: &'a str,
    /// Its content.
    pub source: &'a dyn BlockSource,
    /// Its bitmaps.
    pub bitmaps: &'a [Bitmap],
}

/// What was sent of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sent {
    /// Bytes of content on the wire.
    pub bytes_data: u64,
    /// Bytes of the disk that were sent as runs of zeroes.
    pub bytes_zero: u64,
    /// What the content and the bitmaps that were sent hash to.
    pub proof: DiskProof,
}

/// A connection to a destination that agreed.
#[derive(Debug)]
pub struct Outgoing<R, W> {
    reader: RecordReader<R>,
    writer: RecordWriter<W>,
    session: [u8; 16],
    /// The destination's program and version, for messages.
    peer: String,
}

impl<R: Read, W: Write + Send> Outgoing<R, W> {
    /// Says hello on a fresh connection and hears the answer.
    pub fn connect(reader: R, writer: W, session: [u8; 16]) -> Result<Self> {
        let offer = Offer {
            session,
            is_one_way: false,
            features: 0,
            required: 0,
            channels: 1,
            program: super::program(),
        };
        let mut writer = RecordWriter::new(writer);
        writer.hello(&Hello::Offer(offer.clone()))?;
        let mut reader = RecordReader::new(reader);
        match reader.hello()? {
            Hello::Choice(choice) => {
                offer.accepts(&choice)?;
                Ok(Self { reader, writer, session, peer: choice.program })
            }
            Hello::Refusal(refusal) => {
                Err(Error::Peer { blame: refusal.blame, text: refusal.text })
            }
            Hello::Offer(_) | Hello::Join(_) => Err(Error::Protocol {
                offset: 0,
                reason: "it answered the hello with a hello of its own".to_owned(),
            }),
        }
    }

    /// The destination's program and version.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// Bytes written to the connection so far.
    pub fn wire_bytes(&self) -> u64 {
        self.writer.offset()
    }

    /// Sends all disks and ends the transfer.
    pub fn transfer(
        &mut self,
        disks: &[OutgoingDisk<'_>],
        monitor: &dyn Monitor,
    ) -> Result<Vec<Sent>> {
        self.send(disks, monitor).map_err(|error| self.reason_of(error))
    }

    fn send(&mut self, disks: &[OutgoingDisk<'_>], monitor: &dyn Monitor) -> Result<Vec<Sent>> {
        let mut all = Vec::with_capacity(disks.len());
        let mut first_bitmap = 0;
        for (id, disk) in (0..).map(DiskId).zip(disks) {
            all.push(self.disk(id, disk, first_bitmap, monitor)?);
            first_bitmap += number_of(disk.bitmaps.len());
        }
        self.writer.record(|out| BlockRecord::End.encode(out))?;
        self.writer.flush()?;
        Ok(all)
    }

    fn disk(
        &mut self,
        id: DiskId,
        disk: &OutgoingDisk<'_>,
        first_bitmap: u32,
        monitor: &dyn Monitor,
    ) -> Result<Sent> {
        let size = disk.source.size();
        let record = Disk { disk: id, keeps_rest: false, size, name: disk.name };
        self.writer.record(|out| BlockRecord::Disk(record).encode(out))?;
        let mut digests = Vec::new();
        for (number, bitmap) in (first_bitmap..).zip(disk.bitmaps) {
            digests.push(self.bitmap(number, id, bitmap, size)?);
        }
        let (content, bytes_data) = self.content(id, disk.source, monitor)?;
        let seal = BlockRecord::DiskSeal(DiskSeal { disk: id, hash: Some(content) });
        self.writer.record(|out| seal.encode(out))?;
        let bytes_zero = size.saturating_sub(bytes_data);
        Ok(Sent { bytes_data, bytes_zero, proof: DiskProof { content, bitmaps: digests } })
    }

    /// Sends a bitmap: created, its pieces that hold bits, sealed.
    fn bitmap(
        &mut self,
        number: u32,
        disk: DiskId,
        bitmap: &Bitmap,
        size: u64,
    ) -> Result<BitmapDigest> {
        let version = BitmapVersion { bitmap: number, generation: GENERATION };
        let granularity = 1u32.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0);
        let shape = BitmapShape::of_disk(size, granularity);
        if bitmap.bits.len() != shape.bits {
            let reason = format!("bitmap {:?} is not one of this disk", bitmap.name);
            return Err(Error::Unsendable(reason));
        }
        let create = BlockRecord::BitmapCreate(BitmapCreate {
            version,
            disk,
            shape,
            is_enabled: bitmap.is_enabled,
            is_persistent: true,
            name: &bitmap.name,
        });
        self.writer.record(|out| create.encode(out))?;
        self.pieces(version, disk, bitmap, shape)?;
        let digest = bitmap.digest().map_err(block_mig::Error::from)?;
        let seal = BlockRecord::BitmapSeal(BitmapSeal { version, digest: Some(digest) });
        self.writer.record(|out| seal.encode(out))?;
        Ok(digest)
    }

    /// The pieces with bits in them, found by jumping from run to run.
    fn pieces(
        &mut self,
        version: BitmapVersion,
        disk: DiskId,
        bitmap: &Bitmap,
        shape: BitmapShape,
    ) -> Result<()> {
        let mut packed = Vec::new();
        let mut bits = [0; PIECE_BYTES];
        let bits_per_piece = PIECE_BYTES as u64 * 8;
        let mut next = bitmap.bits.next_set(0);
        let mut count = 0;
        while let Some(bit) = next {
            let index = bit / bits_per_piece;
            let len = shape.piece_len(index).unwrap_or(0);
            let bits = bits.get_mut(..len).unwrap_or_default();
            bitmap.bits.read_bytes(index.saturating_mul(PIECE_BYTES as u64), bits);
            Piece { version, index, bits }.encode(&mut packed);
            count += 1;
            if count == PIECES_PER_RECORD {
                self.pieces_record(disk, &packed)?;
                packed.clear();
                count = 0;
            }
            next = bitmap.bits.next_set((index + 1).saturating_mul(bits_per_piece));
        }
        if packed.is_empty() { Ok(()) } else { self.pieces_record(disk, &packed) }
    }

    fn pieces_record(&mut self, disk: DiskId, packed: &[u8]) -> Result<()> {
        use format_spec::native::block::Content;
        let pieces = Pieces::decode(Reader::new(packed, 0))?;
        self.writer.run(&Run { disk, content: Content::None, pieces }, &[])
    }

    /// Sends the content: workers read and hash, whoever is done first writes first.
    fn content(
        &mut self,
        disk: DiskId,
        source: &dyn BlockSource,
        monitor: &dyn Monitor,
    ) -> Result<(ContentHash, u64)> {
        let tree = SharedTree::new(source.size())?;
        let loader = Loader { source, tree: Some(&tree) };
        let writer = Mutex::new(&mut self.writer);
        let failure = Mutex::new(None);
        let sent = Mutex::new(0u64);
        let work = |buffer: &mut Vec<u8>, unit: Unit| {
            let bytes = loader.load(&unit, buffer)?;
            let has_content = matches!(unit.content, Content::Bytes { .. });
            let run = if has_content {
                Run::data(disk, unit.offset, bytes)
            } else {
                Run::zeroes(disk, unit.offset, unit.len)
            };
            let written = lock(&writer).run(&run, bytes);
            if let Err(error) = written {
                // The pool knows errors of disks only; the connection's is kept here.
                lock(&failure).get_or_insert(error);
                return Err(block_mig::Error::Cancelled);
            }
            if has_content {
                *lock(&sent) += unit.len;
                monitor.advance(unit.len);
            }
            Ok(())
        };
        let units = Units::new(source, Scope::Whole, limits::UNIT_BYTES);
        let pool = Pool { workers: limits::workers(None), monitor };
        let result = pool.run(units, Vec::new, work);
        if let Some(error) = failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        match result {
            Err(block_mig::Error::Cancelled) => return Err(Error::Interrupted),
            other => other?,
        }
        Ok((tree.root()?, *lock(&sent)))
    }

    /// Asks the destination to make everything durable and to read it back, and waits for the
    /// hashes: one proof for each disk, in the order in which they were sent.
    pub fn prepare(&mut self, sent: &[Sent]) -> Result<Vec<DiskProof>> {
        let session = self.session;
        self.writer.record(|out| Control::Prepare(session).encode(out))?;
        self.writer.flush()?;
        let (answer, offset) = self.answer()?;
        let Verdict::Ready(ready) = answer else {
            let reason = "it answers PREPARE with something else than READY".to_owned();
            return Err(Error::Protocol { offset, reason });
        };
        proofs(sent, &ready).ok_or_else(|| Error::Protocol {
            offset,
            reason: "READY does not name the disks and bitmaps that were sent".to_owned(),
        })
    }

    /// Lets the destination publish. An error means that it may have done so, or not.
    pub fn commit(mut self) -> Result<()> {
        let session = self.session;
        self.writer.record(|out| Control::Commit(session).encode(out))?;
        self.writer.flush()?;
        let (answer, offset) = self.answer()?;
        if !matches!(answer, Verdict::Committed(said) if said == session) {
            let reason = "it answers COMMIT with something else than COMMITTED".to_owned();
            return Err(Error::Protocol { offset, reason });
        }
        // The destination has published and may have closed: whether this arrives changes nothing.
        let _ =
            self.writer.record(|out| Control::End.encode(out)).and_then(|()| self.writer.flush());
        Ok(())
    }

    /// Tells the destination to throw everything away, for a reason its user will read.
    pub fn abort(mut self, text: String) -> Result<()> {
        let abort = Control::Abort { blame: Blame::Caller, text };
        self.writer.record(|out| abort.encode(out))?;
        self.writer.flush()
    }

    /// The next answer, and where it stands. FAILED becomes the peer's error.
    fn answer(&mut self) -> Result<(Verdict, u64)> {
        loop {
            let record = self.reader.record()?;
            let verdict = match Answer::decode(&record)? {
                None => continue,
                Some(Answer::Failed { blame, text, .. }) => {
                    return Err(Error::Peer { blame, text });
                }
                Some(Answer::Ready(ready)) => Verdict::Ready(ready),
                Some(Answer::Committed(session)) => Verdict::Committed(session),
                Some(_) => Verdict::Other,
            };
            return Ok((verdict, record.offset));
        }
    }

    /// A connection that broke while it was written to may hold the reason in the other direction.
    fn reason_of(&mut self, error: Error) -> Error {
        match error {
            Error::Connection { .. } => match self.answer() {
                Err(said @ Error::Peer { .. }) => said,
                _ => error,
            },
            error => error,
        }
    }
}

/// What the handover waits for.
enum Verdict {
    Ready(Ready),
    Committed([u8; 16]),
    Other,
}

/// What READY says of what was sent, in that order; `None` unless it says exactly that.
fn proofs(sent: &[Sent], ready: &Ready) -> Option<Vec<DiskProof>> {
    let mut bitmaps = (0..).zip(&ready.bitmaps);
    let mut proofs = Vec::with_capacity(sent.len());
    for ((id, sent), (disk, content)) in (0..).map(DiskId).zip(sent).zip(&ready.disks) {
        let mut digests = Vec::new();
        for _ in &sent.proof.bitmaps {
            let (number, (version, digest)) = bitmaps.next()?;
            if *version != (BitmapVersion { bitmap: number, generation: GENERATION }) {
                return None;
            }
            digests.push(*digest);
        }
        if *disk != id {
            return None;
        }
        proofs.push(DiskProof { content: *content, bitmaps: digests });
    }
    let is_all = ready.disks.len() == sent.len() && bitmaps.next().is_none();
    is_all.then_some(proofs)
}

/// A count as the wire has it. What does not fit is refused by the peer as unknown.
fn number_of(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
