//! Bitmaps of running guests on their way out, in the section of their disks (SPEC 6).

use format_spec::Blame;
use format_spec::Reader;
use format_spec::content_hash::BitmapDigest;
use format_spec::native::answer::Ready;
use format_spec::native::block::{self, BitmapVersion, BlockRecord, Content, DiskId, Pieces, Run};
use mig_core::channels::Outlet;
use mig_core::section::{Pass, Pending, SaveHandler, SectionKey, Stage, Start};
use mig_core::stream::{Error, Result};

use super::Sender;

/// Bytes of pieces in one record: what is gathered before it goes to the system.
const RECORD_BYTES: usize = 60 << 10;

/// Sends the bitmaps of disks that guests write to. All its records go on main: what creates a
/// bitmap is before its pieces there, also in the middle of a round.
pub struct SaveLive {
    senders: Vec<Sender>,
    hashes: bool,
    place: Place,
    is_bulk_done: bool,
    sealed: Vec<(BitmapVersion, BitmapDigest)>,
    /// What went wrong where nobody could be told.
    failed: Option<Error>,
}

/// Where the pass stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Nothing was announced yet.
    Start,
    /// This sender's pieces are being sent.
    Pieces(usize),
    /// The pass is done; the next one needs a barrier before it.
    Done,
}

impl SaveLive {
    /// Sends what `senders` have, one for each disk. `hashes`: whether the destination is told what
    /// the bitmaps hash to.
    pub fn new(senders: Vec<Sender>, hashes: bool) -> Self {
        let (place, sealed) = (Place::Start, Vec::new());
        Self { senders, hashes, place, is_bulk_done: false, sealed, failed: None }
    }

    /// The senders, for reports.
    pub fn senders(&self) -> &[Sender] {
        &self.senders
    }

    fn announce(&mut self, out: &Outlet<'_>) -> Result<()> {
        let mut emit = |record: &BlockRecord<'_>| emit(record, out);
        self.senders.iter_mut().try_for_each(|sender| sender.announce(&mut emit))?;
        self.place = Place::Pieces(0);
        Ok(())
    }

    /// Sends about `budget` bytes of the pass.
    fn advance(&mut self, out: &Outlet<'_>, budget: u64) -> Result<Pass> {
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        if self.place == Place::Start {
            self.announce(out)?;
        }
        let mut packed = Vec::new();
        let mut left = budget;
        while let Place::Pieces(at) = self.place {
            let Some(sender) = self.senders.get_mut(at) else {
                self.place = Place::Done;
                self.is_bulk_done = true;
                break;
            };
            if left == 0 {
                return Ok(Pass::Open);
            }
            packed.clear();
            sender.pieces(RECORD_BYTES, &mut packed)?;
            if packed.is_empty() {
                self.place = Place::Pieces(at + 1);
                continue;
            }
            let pieces = Pieces::decode(Reader::new(&packed, 0));
            let pieces = pieces.map_err(|error| Error::handler(Blame::Caller, error))?;
            let disk = sender.disk();
            let channels = out.channels();
            channels.spend(packed.len() as u64);
            emit(&BlockRecord::Run(Run { disk, content: Content::None, pieces }), out)?;
            left = left.saturating_sub(packed.len() as u64);
        }
        Ok(Pass::Done)
    }
}

fn emit(record: &BlockRecord<'_>, out: &Outlet<'_>) -> Result<()> {
    out.record(|bytes| record.encode(bytes))
}

impl SaveHandler for SaveLive {
    fn section(&self) -> SectionKey {
        SectionKey { name: block::SECTION, instance: 0, version: block::SECTION_VERSION }
    }

    fn setup(&mut self, out: &Outlet<'_>) -> Result<()> {
        self.announce(out)
    }

    fn begin(&mut self, start: &mut Start<'_>, _out: &Outlet<'_>) -> Result<()> {
        match start {
            Start::Resumable(have) => {
                self.senders.iter_mut().try_for_each(|sender| sender.compare(*have))
            }
            Start::Fresh | Start::Ready => Ok(()),
        }
    }

    fn iterate(&mut self, out: &Outlet<'_>, budget: u64) -> Result<Pass> {
        self.advance(out, budget)
    }

    fn pending(&self) -> Pending {
        let bytes = self.senders.iter().map(Sender::pending_bytes);
        let must_precopy = bytes.fold(0, u64::saturating_add);
        Pending { must_precopy, can_postcopy: 0, has_bulk: !self.is_bulk_done }
    }

    fn complete(&mut self, stage: Stage, out: &Outlet<'_>) -> Result<()> {
        match stage {
            Stage::Content => self.advance(out, u64::MAX).map(|_| ()),
            Stage::Seal => {
                if let Some(error) = self.failed.take() {
                    return Err(error);
                }
                let hashes = self.hashes;
                let mut emit = |record: &BlockRecord<'_>| emit(record, out);
                self.sealed.clear();
                for sender in &mut self.senders {
                    self.sealed.extend(sender.seal(hashes, &mut emit)?);
                }
                Ok(())
            }
        }
    }

    fn expect(&self, ready: &mut Ready) {
        ready.bitmaps.extend(&self.sealed);
        ready.bitmaps.sort_by_key(|(version, _)| *version);
    }

    fn bitmap_name(&self, bitmap: u32) -> Option<(DiskId, String)> {
        self.senders
            .iter()
            .find_map(|sender| sender.name_of(bitmap).map(|name| (sender.disk(), name.to_owned())))
    }

    /// Hashes what was sent while the destination does the same: the guest may be paused.
    fn barrier(&mut self) {
        if self.place == Place::Done {
            self.place = Place::Start;
        }
        if self.hashes {
            self.failed = self.senders.iter_mut().try_for_each(Sender::hash).err();
        }
    }

    fn acknowledged(&mut self) {
        self.senders.iter_mut().for_each(Sender::acknowledged);
    }

    fn abort(&mut self) {
        self.senders.iter_mut().for_each(Sender::give_back);
    }
}
