//! What has arrived so far, and the rules that hold between records (SPEC 6).

use std::collections::BTreeMap;
use std::sync::Arc;

use bitmap_mig::Bitmap;
use block_mig::load::SharedTree;
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapUpdate, BitmapVersion, Content, Disk, DiskId,
    DiskSeal, PIECE_BYTES, Piece, Run,
};
use mig_core::block::BlockSink;
use qcow2_file::bitmaps::Bits;

use super::error::{Error, Result};
use super::incoming::{Arrived, Place};

/// Most disks in one transfer. More than any machine type has slots for.
const MAX_DISKS: usize = 1024;
/// Most bitmaps in one transfer, as many as one qcow2 image may hold.
const MAX_BITMAPS: usize = 65535;
/// Most bytes of bitmaps in one transfer: they are held in memory until their disk is complete.
const MAX_BITMAP_BYTES: u64 = 1 << 30;

/// What has arrived so far.
#[derive(Default)]
pub(super) struct Landing<'s> {
    /// In the order of their arrival, with their numbers.
    disks: Vec<(DiskId, LandingDisk<'s>)>,
    /// By number. A removed one stays, to know its generation.
    bitmaps: BTreeMap<u32, LandingBitmap>,
    bitmap_bytes: u64,
}

struct LandingDisk<'s> {
    name: String,
    size: u64,
    sink: Arc<dyn BlockSink + 's>,
    /// `None` once it was sealed.
    tree: Option<SharedTree>,
    content: Option<format_spec::content_hash::ContentHash>,
}

struct LandingBitmap {
    disk: DiskId,
    generation: u32,
    /// `None` once it was removed.
    bitmap: Option<Bitmap>,
    shape: BitmapShape,
    is_sealed: bool,
}

fn protocol<T>(offset: u64, reason: impl Into<String>) -> Result<T> {
    Err(Error::Protocol { offset, reason: reason.into() })
}

impl<'s> Landing<'s> {
    /// A disk is introduced.
    pub(super) fn disk(
        &mut self,
        disk: &Disk<'_>,
        at: u64,
        place: &mut Place<'_, 's>,
    ) -> Result<()> {
        let is_known =
            |(id, known): &(DiskId, LandingDisk<'_>)| *id == disk.disk || known.name == disk.name;
        if self.disks.len() >= MAX_DISKS || self.disks.iter().any(is_known) {
            return protocol(at, format!("disk {:?} comes twice, or too many do", disk.name));
        }
        if disk.keeps_rest {
            return protocol(at, format!("disk {:?} builds on content, and has none", disk.name));
        }
        let sink = place(disk.name, disk.size).map_err(|e| Error::Place(Box::new(e)))?;
        if sink.size() < disk.size {
            let (source_bytes, sink_bytes) = (disk.size, sink.size());
            return Err(block_mig::Error::Size { source_bytes, sink_bytes }.into());
        }
        let tree = Some(SharedTree::new(disk.size)?);
        let (name, size) = (disk.name.to_owned(), disk.size);
        self.disks.push((disk.disk, LandingDisk { name, size, sink, tree, content: None }));
        Ok(())
    }

    /// Content, zeroes, pieces.
    pub(super) fn run(&mut self, run: &Run<'_>, at: u64) -> Result<()> {
        let disk = self.open_disk(run.disk, at)?;
        if let Err(problem) = run.content.check(disk.size) {
            return protocol(at, format!("run of disk {:?} {problem}", disk.name));
        }
        disk.store(&run.content)?;
        for piece in run.pieces.iter() {
            self.piece(run.disk, &piece, at)?;
        }
        Ok(())
    }

    fn piece(&mut self, disk: DiskId, piece: &Piece<'_>, at: u64) -> Result<()> {
        let Some(found) = self.live_bitmap(piece.version, at)? else { return Ok(()) };
        let name = found.bitmap.as_ref().map(|b| b.name.as_str()).unwrap_or_default();
        if found.is_sealed || found.disk != disk {
            return protocol(at, format!("a piece of bitmap {name:?}, sealed or of another disk"));
        }
        if let Err(problem) = found.shape.check(piece) {
            return protocol(at, format!("piece {} of bitmap {name:?} {problem}", piece.index));
        }
        let len = found.shape.piece_len(piece.index).unwrap_or(0);
        let offset = piece.index.saturating_mul(PIECE_BYTES as u64);
        let zeroes = [0; PIECE_BYTES];
        let bits = if piece.bits.is_empty() { zeroes.get(..len) } else { Some(piece.bits) };
        if let Some(bitmap) = &mut found.bitmap {
            bitmap.bits.write_bytes(offset, bits.unwrap_or_default());
        }
        Ok(())
    }

    /// A disk is complete: every leaf must have come, and hash to what the source says.
    pub(super) fn seal_disk(&mut self, seal: &DiskSeal, at: u64) -> Result<()> {
        let disk = self.open_disk(seal.disk, at)?;
        let root = disk.tree.take().map(|tree| tree.root()).transpose();
        let root = match root {
            Ok(root) => root,
            Err(error) => return protocol(at, format!("disk {:?} is sealed: {error}", disk.name)),
        };
        match (seal.hash, root) {
            (Some(said), Some(root)) if said != root => protocol(
                at,
                format!("disk {:?} hashes to {root} here, to {said} at the source", disk.name),
            ),
            _ => {
                disk.content = root;
                Ok(())
            }
        }
    }

    /// A bitmap is created, all bits clear.
    pub(super) fn create_bitmap(&mut self, create: &BitmapCreate<'_>, at: u64) -> Result<()> {
        let size = self.open_disk(create.disk, at)?.size;
        let name = create.name;
        if let Err(problem) = create.check(size) {
            return protocol(at, format!("number of bits of bitmap {name:?} {problem}"));
        }
        if !create.is_persistent {
            return protocol(at, format!("bitmap {name:?} is not kept, and a file has no other"));
        }
        let is_taken = |b: &LandingBitmap| {
            b.disk == create.disk && b.bitmap.as_ref().is_some_and(|b| b.name == name)
        };
        let expected = match self.bitmaps.get(&create.version.bitmap) {
            Some(old) if old.bitmap.is_some() || old.disk != create.disk => None,
            Some(old) => old.generation.checked_add(1),
            None => Some(1),
        };
        if expected != Some(create.version.generation) || self.bitmaps.values().any(is_taken) {
            return protocol(at, format!("bitmap {name:?} exists, or its generation is wrong"));
        }
        self.bitmap_bytes = self.bitmap_bytes.saturating_add(create.shape.byte_len());
        if self.bitmaps.len() >= MAX_BITMAPS || self.bitmap_bytes > MAX_BITMAP_BYTES {
            return protocol(at, format!("bitmap {name:?} is more than this side holds"));
        }
        let Ok(granularity_bits) = u8::try_from(create.shape.granularity.trailing_zeros()) else {
            return protocol(at, format!("granularity of bitmap {name:?}"));
        };
        let bitmap = Bitmap {
            name: name.to_owned(),
            granularity_bits,
            is_enabled: create.is_enabled,
            bits: Bits::new(create.shape.bits),
        };
        let landing = LandingBitmap {
            disk: create.disk,
            generation: create.version.generation,
            bitmap: Some(bitmap),
            shape: create.shape,
            is_sealed: false,
        };
        self.bitmaps.insert(create.version.bitmap, landing);
        Ok(())
    }

    /// A bitmap's flags are replaced.
    pub(super) fn update_bitmap(&mut self, update: &BitmapUpdate, at: u64) -> Result<()> {
        let Some(found) = self.live_bitmap(update.version, at)? else { return Ok(()) };
        match &mut found.bitmap {
            Some(bitmap) if !found.is_sealed && update.is_persistent => {
                bitmap.is_enabled = update.is_enabled;
                Ok(())
            }
            _ => protocol(at, "flags of a bitmap change after its seal, or to what a file has not"),
        }
    }

    /// A bitmap is gone at the source.
    pub(super) fn remove_bitmap(&mut self, version: BitmapVersion, at: u64) -> Result<()> {
        let Some(found) = self.live_bitmap(version, at)? else { return Ok(()) };
        found.bitmap = None;
        let freed = found.shape.byte_len();
        self.bitmap_bytes = self.bitmap_bytes.saturating_sub(freed);
        Ok(())
    }

    /// A bitmap is complete, and must be what the source says.
    pub(super) fn seal_bitmap(&mut self, seal: &BitmapSeal, at: u64) -> Result<()> {
        let Some(found) = self.live_bitmap(seal.version, at)? else { return Ok(()) };
        let Some(bitmap) = found.bitmap.as_ref().filter(|_| !found.is_sealed) else {
            return protocol(at, "a bitmap is sealed twice");
        };
        let digest = bitmap.digest().map_err(block_mig::Error::from)?;
        if let Some(said) = seal.digest.filter(|said| *said != digest) {
            let name = &bitmap.name;
            return protocol(
                at,
                format!("bitmap {name:?} is {digest} here and {said} at the source"),
            );
        }
        found.is_sealed = true;
        Ok(())
    }

    /// The stream ends: everything must be sealed.
    pub(super) fn finish(self, at: u64) -> Result<Vec<Arrived>> {
        let mut bitmaps = self.bitmaps;
        let mut arrived = Vec::with_capacity(self.disks.len());
        for (id, disk) in self.disks {
            let Some(content) = disk.content else {
                return protocol(at, format!("the stream ends before disk {:?} does", disk.name));
            };
            let (mut of_disk, mut versions) = (Vec::new(), Vec::new());
            for (number, found) in bitmaps.iter_mut().filter(|(_, b)| b.disk == id) {
                let Some(bitmap) = found.bitmap.take() else { continue };
                if !found.is_sealed {
                    let name = bitmap.name;
                    return protocol(at, format!("the stream ends before bitmap {name:?} does"));
                }
                of_disk.push(bitmap);
                versions.push(BitmapVersion { bitmap: *number, generation: found.generation });
            }
            let name = disk.name;
            arrived.push(Arrived { name, content, bitmaps: of_disk, id, versions });
        }
        Ok(arrived)
    }

    /// A disk that was introduced and not sealed.
    fn open_disk(&mut self, id: DiskId, at: u64) -> Result<&mut LandingDisk<'s>> {
        let found = self.disks.iter_mut().find(|(known, _)| *known == id).map(|(_, disk)| disk);
        match found {
            Some(disk) if disk.tree.is_some() => Ok(disk),
            Some(disk) => protocol(at, format!("disk {:?} goes on after its seal", disk.name)),
            None => protocol(at, format!("disk {} was never introduced", id.0)),
        }
    }

    /// The bitmap of that number and generation; `None` for an older generation, whose records may
    /// come late and are ignored.
    fn live_bitmap(
        &mut self,
        version: BitmapVersion,
        at: u64,
    ) -> Result<Option<&mut LandingBitmap>> {
        let BitmapVersion { bitmap, generation } = version;
        match self.bitmaps.get_mut(&bitmap) {
            Some(found) if generation < found.generation => Ok(None),
            Some(found) if generation == found.generation && found.bitmap.is_some() => {
                Ok(Some(found))
            }
            _ => protocol(at, format!("bitmap {bitmap}, generation {generation}, does not exist")),
        }
    }
}

impl LandingDisk<'_> {
    fn store(&self, content: &Content<'_>) -> Result<()> {
        let Some(tree) = &self.tree else { return Ok(()) };
        let stored = match content {
            Content::None => Ok(()),
            Content::Data { offset, bytes } => {
                tree.put(*offset, bytes)?;
                self.sink.write_at(bytes, *offset)
            }
            Content::Zeroes { offset, len } => {
                tree.put_zeroes(*offset, *len)?;
                if self.sink.reads_as_zero(*offset, *len) {
                    Ok(())
                } else {
                    self.sink.write_zeroes(*offset, *len)
                }
            }
        };
        Ok(stored.map_err(block_mig::Error::Sink)?)
    }
}
