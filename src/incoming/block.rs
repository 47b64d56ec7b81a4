//! Section `block` at the destination: disks and bitmaps, which know nothing of each other, joined.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitmap_mig::{ArrivedBitmap, Bitmap, KeptBitmaps, LoadBitmaps};
use block_mig::Landing;
use block_mig::arrive::{Known, LoadBlocks, SealedDisk, Tally};
use format_spec::content_hash::BitmapDigest;
use format_spec::native::answer::{Answer, Ready};
use format_spec::native::block::{
    BITMAP_CREATE, BitmapCreate, BitmapVersion, BlockRecord, Disk, DiskId,
};
use format_spec::native::frame::Record;
use format_spec::{Blame, Malformed};
use mig_core::section::{Fate, LoadContext, LoadHandler};
use mig_core::stream::{Arrival, Error, Result};

use super::{Destination, Introduced, Place, ReceivedDisk, Sealed, Wanted};
use crate::DiskProof;

/// Receives disks with their bitmaps.
pub(super) struct BlockSection {
    destination: Arc<dyn Destination>,
    blocks: LoadBlocks,
    bitmaps: LoadBitmaps,
    /// Whether the source is told what is there of each bitmap that it creates: before the first
    /// barrier of a session that goes on.
    tells: AtomicBool,
    places: Mutex<BTreeMap<DiskId, Arc<dyn Place>>>,
    /// What was introduced so far; `None` once it has been judged.
    introduced: Mutex<Option<Introductions>>,
    /// What became of each disk, once it was prepared.
    prepared: Mutex<Vec<Prepared>>,
}

/// What the source says of its disks before any content comes.
#[derive(Default)]
struct Introductions {
    content: BTreeMap<DiskId, u64>,
    bitmaps: BTreeMap<BitmapVersion, (DiskId, String, u32)>,
}

/// What the source says of a bitmap.
struct Said {
    version: BitmapVersion,
    digest: Option<BitmapDigest>,
    name: String,
}

struct Prepared {
    proof: Option<DiskProof>,
    bitmaps: Vec<String>,
}

impl BlockSection {
    pub(super) fn new(
        destination: Arc<dyn Destination>,
        known: Known,
        kept: Option<KeptBitmaps>,
        tally: Arc<Tally>,
    ) -> Self {
        Self {
            destination,
            blocks: LoadBlocks::new(known).counted_in(tally),
            bitmaps: kept.map_or_else(LoadBitmaps::new, LoadBitmaps::resumed),
            tells: AtomicBool::new(known == Known::Some),
            places: Mutex::default(),
            introduced: Mutex::new(Some(Introductions::default())),
            prepared: Mutex::default(),
        }
    }

    /// Takes the bitmaps of an attempt that failed.
    pub(super) fn keep_bitmaps(&self) -> KeptBitmaps {
        self.bitmaps.keep()
    }

    /// Whether all disks were introduced, and nothing spoke against them.
    pub(super) fn is_introduced(&self) -> bool {
        lock(&self.introduced).is_none()
    }

    /// The first barrier: all disks have been introduced.
    fn judge(&self) -> Result<()> {
        let mut introduced = lock(&self.introduced);
        let Some(Introductions { content, bitmaps }) = introduced.as_ref() else { return Ok(()) };
        let disk = |id: &DiskId| Introduced {
            name: self.blocks.name(*id).unwrap_or_default(),
            bitmaps: bitmaps
                .values()
                .filter(|(of, ..)| of == id)
                .map(|(_, name, granularity)| (name.clone(), *granularity))
                .collect(),
            content: content.get(id).copied(),
        };
        let disks: Vec<_> = lock(&self.places).keys().map(disk).collect();
        self.destination.introduced(&disks)?;
        *introduced = None;
        Ok(())
    }

    /// What was received, after it was prepared.
    pub(super) fn received(&self) -> Vec<ReceivedDisk> {
        let prepared = std::mem::take(&mut *lock(&self.prepared));
        let counts = self.blocks.counts().into_iter().zip(prepared);
        let disk = |((name, size, counts), prepared): ((String, u64, Arc<_>), Prepared)| {
            let counts: &block_mig::arrive::LoadCounts = &counts;
            ReceivedDisk {
                name,
                size,
                bytes_data: counts.data.load(Ordering::Relaxed),
                bytes_zero: counts.zero.load(Ordering::Relaxed),
                proof: prepared.proof,
                bitmaps: prepared.bitmaps,
            }
        };
        counts.map(disk).collect()
    }

    fn introduce(&self, disk: &Disk<'_>, at: &Arrival, context: LoadContext<'_>) -> Result<()> {
        if self.is_introduced() {
            return Err(at.protocol("a disk is introduced behind the first barrier"));
        }
        let mut found = None;
        self.blocks.introduce(disk, at, context.answers, || {
            let Disk { name, size, keeps_rest, .. } = *disk;
            let place = self.destination.place(&Wanted { name, size, keeps_rest })?;
            found = Some(place.clone());
            Ok(place as Arc<dyn Landing>)
        })?;
        lock(&self.places).extend(found.map(|place| (disk.disk, place)));
        Ok(())
    }

    fn create(&self, create: &BitmapCreate<'_>, at: &Arrival, to: LoadContext<'_>) -> Result<()> {
        self.name_of(create.disk, create.name)?;
        let (disk, size) = self.blocks.facts(create.disk, at)?;
        self.bitmaps.create(create, (&disk, size), at)?;
        if let Some(introduced) = &mut *lock(&self.introduced) {
            let bitmap = (create.disk, create.name.to_owned(), create.shape.granularity);
            introduced.bitmaps.insert(create.version, bitmap);
        }
        if self.tells.load(Ordering::Acquire) {
            let leaves = self.bitmaps.leaves(create.version)?;
            to.answers.answer(&Answer::HaveBitmap(create.version, leaves))?;
        }
        Ok(())
    }

    /// The name under which a bitmap of a disk is stored.
    fn name_of(&self, disk: DiskId, sent: &str) -> Result<String> {
        let place = lock(&self.places).get(&disk).cloned();
        place.map_or_else(|| Ok(sent.to_owned()), |place| place.bitmap_name(sent))
    }

    /// Bitmaps of a disk, by the names under which they are stored, and what the source says of
    /// them. They are moved: large ones are not held twice while a guest is paused.
    fn renamed(
        &self,
        disk: DiskId,
        arrived: Vec<ArrivedBitmap>,
    ) -> Result<(Vec<Bitmap>, Vec<Said>)> {
        let renamed = |ArrivedBitmap { version, digest, mut bitmap }: ArrivedBitmap| {
            let stored = self.name_of(disk, &bitmap.name)?;
            let name = std::mem::replace(&mut bitmap.name, stored);
            Ok((bitmap, Said { version, digest, name }))
        };
        arrived.into_iter().map(renamed).collect()
    }

    /// What is said of a record that is not well formed: of a bitmap, which one, too.
    fn malformed(&self, at: &Arrival, record: &Record<'_>, error: Malformed) -> Error {
        let named = Some(record).filter(|record| record.header.kind == BITMAP_CREATE);
        let Some((disk, name)) = named.and_then(|record| BitmapCreate::named(record.body)) else {
            return at.malformed(error);
        };
        let of = self.blocks.name(disk).unwrap_or_default();
        Error::handler(Blame::Bytes, format!("bitmap {name:?} of disk {of:?}: {error}"))
    }

    /// One disk: its place stores the bitmaps, and says how everything reads.
    fn prepare_disk(&self, sealed: Sealed, of: DiskId, arrived: &[Said]) -> Result<Prepared> {
        let place = lock(&self.places).get(&of).cloned().ok_or(Error::Ended)?;
        let name = self.blocks.name(of).unwrap_or_default();
        let proof = place.prepare(&sealed)?;
        if let (Some(said), Some(read)) = (sealed.content, proof.as_ref().and_then(|p| p.content))
            && said != read
        {
            let reason = format!("disk {name:?} reads as {read}, the source sealed {said}");
            return Err(Error::Mismatch { reason });
        }
        let digests = proof.iter().flat_map(|proof| &proof.bitmaps);
        for (bitmap, read) in arrived.iter().zip(digests) {
            if let Some(said) = bitmap.digest.filter(|said| said != read) {
                let bitmap = &bitmap.name;
                let reason = format!(
                    "bitmap {bitmap:?} of disk {name:?} reads as {read}, the source sealed {said}"
                );
                return Err(Error::Mismatch { reason });
            }
        }
        let bitmaps = arrived.iter().map(|b| b.name.clone()).collect();
        Ok(Prepared { proof, bitmaps })
    }
}

/// Records that introduce, change or seal have their place on main: there they are ordered.
fn on_main(arrival: &Arrival) -> Result<()> {
    if arrival.channel == 0 {
        return Ok(());
    }
    Err(arrival.protocol("a record that belongs on main comes on a data channel"))
}

impl LoadHandler for BlockSection {
    fn load(&self, arrival: Arrival, context: LoadContext<'_>) -> Result<()> {
        let record = arrival.record();
        let decoded =
            BlockRecord::decode(&record).map_err(|e| self.malformed(&arrival, &record, e))?;
        if !matches!(decoded, None | Some(BlockRecord::Run(_))) {
            on_main(&arrival)?;
        }
        let at = &arrival;
        match decoded {
            None | Some(BlockRecord::End) => Ok(()),
            Some(BlockRecord::Disk(disk)) => self.introduce(&disk, at, context),
            Some(BlockRecord::DiskSeal(seal)) => self.blocks.seal(&seal, at),
            Some(BlockRecord::DiskContent(content)) => {
                self.blocks.facts(content.disk, at)?;
                let said = &mut *lock(&self.introduced);
                said.iter_mut().for_each(|s| _ = s.content.insert(content.disk, content.bytes));
                Ok(())
            }
            Some(BlockRecord::BitmapCreate(create)) => self.create(&create, at, context),
            Some(BlockRecord::BitmapUpdate(update)) => self.bitmaps.update(&update, at),
            Some(BlockRecord::BitmapRemove(version)) => {
                lock(&self.introduced).iter_mut().for_each(|s| _ = s.bitmaps.remove(&version));
                self.bitmaps.remove(version, at)
            }
            Some(BlockRecord::BitmapSeal(seal)) => self.bitmaps.seal(&seal, at),
            Some(BlockRecord::Run(run)) => {
                let store = self.blocks.run(&run, at)?;
                self.bitmaps.pieces(&run, at)?;
                store.map_or(Ok(()), |store| store.put(arrival, context.jobs))
            }
        }
    }

    fn barrier(&self, is_durable: bool) -> Result<()> {
        self.judge()?;
        if self.tells.swap(false, Ordering::AcqRel) {
            self.bitmaps.drop_kept();
        }
        self.bitmaps.hash()?;
        self.blocks.barrier(is_durable)
    }

    fn prepare(&self, proves_all: bool, ready: &mut Ready) -> Result<()> {
        let unsealed = |what: String| {
            Error::protocol(0, 0, format!("everything is said to be sent, {what} is not sealed"))
        };
        let sealed = self.blocks.sealed();
        let mut prepared = Vec::new();
        for sealed in sealed.map_err(|name| unsealed(format!("disk {name:?}")))? {
            let SealedDisk { id: disk, hash: content, is_as_it_was } = sealed;
            let arrived = self.bitmaps.take(disk).map_err(unsealed)?;
            let is_proved =
                (content.is_some() || is_as_it_was) && arrived.iter().all(|b| b.digest.is_some());
            if proves_all && !is_proved {
                let reason = "a seal has no hash, and nobody else could notice a difference";
                return Err(Error::protocol(0, 0, reason));
            }
            let (bitmaps, arrived) = self.renamed(disk, arrived)?;
            let done = self.prepare_disk(Sealed { content, bitmaps }, disk, &arrived)?;
            if let Some(proof) = &done.proof {
                let read = content.and(proof.content);
                ready.disks.extend(read.map(|content| (disk, content)));
                let read = arrived.iter().map(|b| b.version).zip(proof.bitmaps.iter().copied());
                let wanted = arrived.iter().map(|b| b.digest.is_some());
                ready.bitmaps.extend(read.zip(wanted).filter_map(|(read, is)| is.then_some(read)));
            }
            prepared.push(done);
        }
        ready.bitmaps.sort_by_key(|(version, _)| *version);
        *lock(&self.prepared) = prepared;
        Ok(())
    }

    fn commit(&self) -> Result<()> {
        self.destination.commit()
    }

    fn abort(&self, fate: Fate) {
        lock(&self.places).clear();
        self.destination.abort(fate);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
