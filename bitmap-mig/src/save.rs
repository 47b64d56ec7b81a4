//! Bitmaps at rest on their way out, in the section of their disks (SPEC 6).

use format_spec::Reader;
use format_spec::content_hash::{self, BitmapDigest, LEAF_BYTES, Node};
use format_spec::native::answer::Ready;
use format_spec::native::block::{
    self, BitmapCreate, BitmapSeal, BitmapShape, BitmapVersion, BlockRecord, Content, DiskId,
    PIECE_BYTES, Piece, Pieces, RUN, Run,
};
use mig_core::block::is_zero;
use mig_core::channels::Outlet;
use mig_core::section::{Pass, Pending, SaveHandler, SectionKey, Stage, Start};
use mig_core::stream::{Error, Result};

use crate::Bitmap;
use crate::running_digest::pieces_of;

/// The only generation: nothing is created twice while it is at rest.
const GENERATION: u32 = 1;
/// Bytes of pieces that go into one record.
const RECORD_BYTES: usize = 512 << 10;

/// A bitmap that is sent, with the disk that it belongs to.
#[derive(Debug, Clone, Copy)]
pub struct SaveBitmap<'a> {
    /// The number of its disk in the session.
    pub disk: DiskId,
    /// The disk's size in bytes.
    pub disk_size: u64,
    /// The bitmap.
    pub bitmap: &'a Bitmap,
}

/// Sends bitmaps that nobody changes meanwhile.
#[derive(Debug)]
pub struct SaveBitmaps<'a> {
    bitmaps: Vec<SaveBitmap<'a>>,
    digests: Vec<Option<BitmapDigest>>,
    hashes: bool,
    is_sent: bool,
    /// Leaves that the destination has kept of each.
    kept: Vec<Vec<(u64, Node)>>,
}

impl<'a> SaveBitmaps<'a> {
    /// Sends `bitmaps`, numbered in their order. `hashes`: whether the destination is told what
    /// they hash to. Refuses one that does not fit its disk.
    pub fn new(bitmaps: Vec<SaveBitmap<'a>>, hashes: bool) -> Result<Self> {
        for saved in &bitmaps {
            if saved.bitmap.bits.len() != saved.shape().bits {
                let reason = format!("bitmap {:?} is not one of its disk", saved.bitmap.name);
                return Err(Error::handler(format_spec::Blame::Caller, reason));
            }
        }
        let (digests, kept) = (vec![None; bitmaps.len()], vec![Vec::new(); bitmaps.len()]);
        Ok(Self { bitmaps, digests, hashes, is_sent: false, kept })
    }

    fn numbered(&self) -> impl Iterator<Item = (BitmapVersion, &SaveBitmap<'a>)> {
        let version = |bitmap| BitmapVersion { bitmap, generation: GENERATION };
        (0..).map(version).zip(&self.bitmaps)
    }

    fn send(&mut self, out: &Outlet<'_>) -> Result<()> {
        if std::mem::replace(&mut self.is_sent, true) {
            return Ok(());
        }
        let sent = self.numbered().zip(&self.kept);
        sent.into_iter().try_for_each(|((version, saved), kept)| saved.pieces(version, kept, out))
    }

    fn seal(&mut self, out: &Outlet<'_>) -> Result<()> {
        let digest = |saved: &SaveBitmap<'_>| saved.bitmap.digest().map(Some);
        for (saved, sealed) in self.bitmaps.iter().zip(&mut self.digests) {
            let digest = if self.hashes { digest(saved) } else { Ok(None) };
            *sealed = digest.map_err(|e| Error::handler(format_spec::Blame::Caller, e))?;
        }
        for ((version, _), digest) in self.numbered().zip(&self.digests) {
            let seal = BlockRecord::BitmapSeal(BitmapSeal { version, digest: *digest });
            out.record(|bytes| seal.encode(bytes))?;
        }
        Ok(())
    }
}

impl SaveBitmap<'_> {
    fn shape(&self) -> BitmapShape {
        let granularity = 1u32.checked_shl(self.bitmap.granularity_bits.into()).unwrap_or(0);
        BitmapShape::of_disk(self.disk_size, granularity)
    }

    /// Sends the pieces with bits in them, found by jumping from run to run. Of a leaf that the
    /// destination has kept, all pieces or, where it is as it is here, none.
    fn pieces(&self, version: BitmapVersion, kept: &[(u64, Node)], out: &Outlet<'_>) -> Result<()> {
        let (bits, shape) = (&self.bitmap.bits, self.shape());
        let (mut packed, mut leaf_bytes) = (Vec::new(), vec![0; LEAF_BYTES]);
        for (leaf, node) in kept {
            let pieces = pieces_of(*leaf, shape.piece_count())?;
            leaf_bytes.fill(0);
            bits.read_bytes(leaf.saturating_mul(LEAF_BYTES as u64), &mut leaf_bytes);
            if content_hash::leaf(&leaf_bytes) != *node {
                pieces.for_each(|index| self.piece(version, index, &mut packed));
                self.record(&packed, out)?;
                packed.clear();
            }
        }
        let is_kept = |index| {
            let leaf = index / (LEAF_BYTES / PIECE_BYTES) as u64;
            kept.binary_search_by_key(&leaf, |(leaf, _)| *leaf).is_ok()
        };
        let bits_per_piece = PIECE_BYTES as u64 * 8;
        let mut next = bits.next_set(0);
        while let Some(bit) = next {
            let index = bit / bits_per_piece;
            if !is_kept(index) {
                self.piece(version, index, &mut packed);
            }
            if packed.len() >= RECORD_BYTES {
                self.record(&packed, out)?;
                packed.clear();
            }
            next = bits.next_set((index + 1).saturating_mul(bits_per_piece));
        }
        if packed.is_empty() { Ok(()) } else { self.record(&packed, out) }
    }

    /// Appends a piece.
    fn piece(&self, version: BitmapVersion, index: u64, packed: &mut Vec<u8>) {
        let mut piece = [0; PIECE_BYTES];
        let len = self.shape().piece_len(index).unwrap_or(0);
        let bits = piece.get_mut(..len).unwrap_or_default();
        self.bitmap.bits.read_bytes(index.saturating_mul(PIECE_BYTES as u64), bits);
        let bits = if is_zero(bits) { &[] } else { &*bits };
        Piece { version, index, bits }.encode(packed);
    }

    fn record(&self, packed: &[u8], out: &Outlet<'_>) -> Result<()> {
        let pieces = Pieces::decode(Reader::new(packed, 0));
        let pieces = pieces.map_err(|e| Error::handler(format_spec::Blame::Caller, e))?;
        let mut head = Vec::new();
        Run { disk: self.disk, content: Content::None, pieces }.encode_body_head(&mut head);
        out.content(RUN, &head, &[])
    }
}

impl SaveHandler for SaveBitmaps<'_> {
    fn section(&self) -> SectionKey {
        SectionKey { name: block::SECTION, instance: 0, version: block::SECTION_VERSION }
    }

    fn setup(&mut self, out: &Outlet<'_>) -> Result<()> {
        for (version, saved) in self.numbered() {
            let create = BlockRecord::BitmapCreate(BitmapCreate {
                version,
                disk: saved.disk,
                shape: saved.shape(),
                is_enabled: saved.bitmap.is_enabled,
                is_persistent: true,
                name: &saved.bitmap.name,
            });
            out.record(|bytes| create.encode(bytes))?;
        }
        Ok(())
    }

    fn begin(&mut self, start: &mut Start<'_>, _out: &Outlet<'_>) -> Result<()> {
        let Start::Resumable(have) = start else { return Ok(()) };
        let kept: Result<Vec<_>> =
            self.numbered().map(|(version, _)| have.next_bitmap(version)).collect();
        self.kept = kept?;
        Ok(())
    }

    fn iterate(&mut self, out: &Outlet<'_>, _budget: u64) -> Result<Pass> {
        self.send(out).map(|()| Pass::Done)
    }

    fn pending(&self) -> Pending {
        let left = |saved: &SaveBitmap<'_>| saved.bitmap.bits.byte_len();
        let bytes = if self.is_sent { 0 } else { self.bitmaps.iter().map(left).sum() };
        Pending { must_precopy: bytes, can_postcopy: 0, has_bulk: bytes > 0 }
    }

    fn complete(&mut self, stage: Stage, out: &Outlet<'_>) -> Result<()> {
        match stage {
            Stage::Content => self.send(out),
            Stage::Seal => self.seal(out),
        }
    }

    fn expect(&self, ready: &mut Ready) {
        let sealed = self.numbered().zip(&self.digests);
        let known = sealed.filter_map(|((version, _), digest)| Some((version, (*digest)?)));
        ready.bitmaps.extend(known);
    }

    fn bitmap_name(&self, bitmap: u32) -> Option<(DiskId, String)> {
        let found = self.numbered().find(|(version, _)| version.bitmap == bitmap);
        found.map(|(_, saved)| (saved.disk, saved.bitmap.name.clone()))
    }
}
