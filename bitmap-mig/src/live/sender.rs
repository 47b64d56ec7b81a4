//! What a migration's source tells of the bitmaps of one disk.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use format_spec::Blame;
use format_spec::content_hash::{self, BitmapDigest, HashError, Node};
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapUpdate, BitmapVersion, BlockRecord, DiskId, PIECE_BYTES,
    PIECE_HEAD_BYTES, Piece,
};
use mig_core::bitmap::BitmapInfo;
use mig_core::dirty::{AtomicBits, CHUNK_BYTES};
use mig_core::section::HaveReader;
use mig_core::stream::{Error, Result};

use super::LiveBitmaps;
use super::one::Life;
use crate::running_digest::{RunningDigest, pieces_of, read_chunk};

/// Pieces that are hashed sooner than another thread is started for them and has its turn.
const LEAST_SHARE: u64 = 4096;

/// Decides of each bitmap that exists or appears whether it goes along, and under which name.
pub type Carry = Box<dyn Fn(&BitmapInfo) -> Option<String> + Send>;

/// Hands out the numbers of a session's bitmaps, for all its disks.
#[derive(Debug, Default)]
pub struct Numbers(AtomicU32);

impl Numbers {
    fn next(&self) -> u32 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }
}

/// What was sent of pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PieceCounts {
    /// Pieces sent, resent ones included.
    pub pieces: u64,
    /// Their bytes on the wire, heads included.
    pub bytes: u64,
}

/// Sends the bitmaps of one disk while they change.
///
/// A *pass* is [`announce`](Self::announce) and then [`pieces`](Self::pieces) until it has no more;
/// between two passes there must be a barrier, since a pass may send a piece that the one before
/// has sent. The last pass comes with the guest paused and backup jobs
/// [frozen](LiveBitmaps::freeze); [`seal`](Self::seal) follows it. Dropping a sender ends tracking:
/// the bitmaps at the source are right at any time, whatever was sent.
pub struct Sender {
    bitmaps: Arc<LiveBitmaps>,
    disk: DiskId,
    numbers: Arc<Numbers>,
    carry: Carry,
    told: Vec<Told>,
    /// How far the pass has come: which of `told`, which piece.
    at: (usize, u64),
    counts: PieceCounts,
}

/// A name that the destination was told of, in its present generation.
struct Told {
    version: BitmapVersion,
    source_name: String,
    name: String,
    /// `None` once the destination was told that it is gone.
    life: Option<Arc<Life>>,
    is_enabled: bool,
    changed: Arc<AtomicBits>,
    /// Pieces that were taken since the last barrier that was acknowledged, in rising order within
    /// a pass.
    in_flight: Vec<Range<u64>>,
    /// Pieces that the destination may hold bits of: a zero piece that was never sent is not sent.
    sent: AtomicBits,
    digest: RunningDigest,
}

/// Something to be told, in this order: what goes makes room for what comes.
enum News {
    Removed(BitmapVersion),
    Created(usize),
    Updated(usize),
}

impl Sender {
    /// Begins to track what changes. `carry` must not give two bitmaps the same name: the second
    /// one is left out.
    pub fn new(
        bitmaps: Arc<LiveBitmaps>,
        disk: DiskId,
        numbers: Arc<Numbers>,
        carry: Carry,
    ) -> Self {
        let (told, counts) = (Vec::new(), PieceCounts::default());
        Self { bitmaps, disk, numbers, carry, told, at: (0, 0), counts }
    }

    /// What was sent of pieces so far.
    pub fn counts(&self) -> PieceCounts {
        self.counts
    }

    /// The disk whose bitmaps they are.
    pub fn disk(&self) -> DiskId {
        self.disk
    }

    /// Names of the bitmaps that go along now: at the source, at the destination.
    pub fn names(&self) -> impl Iterator<Item = (&str, &str)> {
        let alive = self.told.iter().filter(|told| told.life.is_some());
        alive.map(|told| (told.source_name.as_str(), told.name.as_str()))
    }

    /// What the bitmap of a number is called.
    pub(super) fn name_of(&self, bitmap: u32) -> Option<&str> {
        let found = self.told.iter().find(|told| told.version.bitmap == bitmap);
        found.map(|told| told.name.as_str())
    }

    /// Begins a pass: tells what was created, changed its flags or is gone. These records go on
    /// main.
    pub fn announce(&mut self, emit: &mut dyn FnMut(&BlockRecord<'_>) -> Result<()>) -> Result<()> {
        self.at = (0, 0);
        for news in self.look().map_err(unhashable)? {
            match news {
                News::Removed(version) => emit(&BlockRecord::BitmapRemove(version))?,
                News::Created(at) => self.told.get(at).map_or(Ok(()), |told| {
                    let Some(life) = &told.life else { return Ok(()) };
                    emit(&BlockRecord::BitmapCreate(BitmapCreate {
                        version: told.version,
                        disk: self.disk,
                        shape: life.shape(),
                        is_enabled: told.is_enabled,
                        is_persistent: life.is_persistent,
                        name: &told.name,
                    }))
                })?,
                News::Updated(at) => self.told.get(at).map_or(Ok(()), |told| {
                    emit(&BlockRecord::BitmapUpdate(BitmapUpdate {
                        version: told.version,
                        is_enabled: told.is_enabled,
                        is_persistent: told.life.as_ref().is_some_and(|life| life.is_persistent),
                    }))
                })?,
            }
        }
        Ok(())
    }

    /// Hears what the destination has kept of each bitmap that was announced, and leaves out what
    /// is there.
    pub fn compare(&mut self, have: &mut dyn HaveReader) -> Result<()> {
        for told in &mut self.told {
            let leaves = have.next_bitmap(told.version)?;
            told.compare(&leaves)?;
        }
        Ok(())
    }

    /// Appends changed pieces to `packed`, up to `max_bytes` and at least one, as
    /// [`Pieces`](format_spec::native::block::Pieces) has them. Nothing is appended once the pass
    /// is done.
    pub fn pieces(&mut self, max_bytes: usize, packed: &mut Vec<u8>) -> Result<()> {
        let begin = packed.len();
        let room = max_bytes.saturating_sub(PIECE_HEAD_BYTES + PIECE_BYTES);
        while let Some(told) = self.told.get_mut(self.at.0) {
            let before = packed.len();
            match told.next_piece(self.at.1, packed) {
                Some(next) => self.at.1 = next,
                None => self.at = (self.at.0 + 1, 0),
            }
            self.counts.pieces += u64::from(packed.len() > before);
            if packed.len() > begin && packed.len() - begin > room {
                break;
            }
        }
        self.counts.bytes += (packed.len() - begin) as u64;
        Ok(())
    }

    /// Hashes what the pass took, so that [`seal`](Self::seal) has little left to do. Best done
    /// while the destination, which does the same, is waited for.
    pub fn hash(&mut self) -> Result<()> {
        let mut stale: Vec<_> =
            self.told.iter_mut().filter(|told| told.digest.stale_pieces() > 0).collect();
        let stale_len = stale.len();
        let hash = |some: &mut [&mut Told]| some.iter_mut().try_for_each(|told| told.hash());
        let pieces: u64 = stale.iter().map(|told| told.digest.stale_pieces()).sum();
        let worthwhile = usize::try_from(pieces / LEAST_SHARE).unwrap_or(usize::MAX);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = cores.min(worthwhile).max(1);
        let mut shares = stale.chunks_mut(stale_len.div_ceil(workers).max(1));
        let first = shares.next().unwrap_or_default();
        std::thread::scope(|scope| {
            let others: Vec<_> = shares.map(|some| scope.spawn(move || hash(some))).collect();
            let mine = hash(first);
            others.into_iter().map(joined).fold(mine, Result::and)
        })
        .map_err(unhashable)
    }

    /// Bytes of pieces that are to be sent.
    pub fn pending_bytes(&self) -> u64 {
        let changed = self.told.iter().filter(|told| told.life.is_some());
        let pieces: u64 = changed.map(|told| told.changed.count()).sum();
        pieces.saturating_mul((PIECE_HEAD_BYTES + PIECE_BYTES) as u64)
    }

    /// What was sent has arrived: a barrier behind the pass was acknowledged.
    pub fn acknowledged(&mut self) {
        self.told.iter_mut().for_each(|told| told.in_flight.clear());
    }

    /// What was sent and not acknowledged will be sent again.
    pub fn give_back(&mut self) {
        for told in &mut self.told {
            told.in_flight.drain(..).for_each(|pieces| _ = told.changed.set_range(pieces));
        }
    }

    /// Says of each bitmap that it was all, on main. The last pass is done, the guest paused and
    /// jobs are frozen. With `hashes`, answers
    /// what READY must say of them.
    pub fn seal(
        &mut self,
        hashes: bool,
        emit: &mut dyn FnMut(&BlockRecord<'_>) -> Result<()>,
    ) -> Result<Vec<(BitmapVersion, BitmapDigest)>> {
        let mut sealed = Vec::new();
        if hashes {
            self.hash()?;
        }
        for told in self.told.iter_mut().filter(|told| told.life.is_some()) {
            let version = told.version;
            let digest = hashes.then(|| told.digest.digest());
            emit(&BlockRecord::BitmapSeal(BitmapSeal { version, digest }))?;
            sealed.extend(digest.map(|digest| (version, digest)));
        }
        Ok(sealed)
    }

    /// Compares what the destination was told with what is there, and notes it as told.
    fn look(&mut self) -> Result<Vec<News>, HashError> {
        // No job is at work, so that none goes on with a slot that is not tracked.
        let _jobs = self.bitmaps.lock_jobs();
        let mut slots = self.bitmaps.write();
        let mut news = Vec::new();
        for told in &mut self.told {
            // One that has become inconsistent is worth nothing at the destination either.
            let is_there = |life: &Arc<Life>| {
                slots.iter().any(|s| Arc::ptr_eq(&s.life, life) && !s.life.info().is_inconsistent)
            };
            if told.life.as_ref().is_some_and(|life| !is_there(life)) {
                told.life = None;
                news.push(News::Removed(told.version));
            }
        }
        for slot in slots.iter_mut().filter(|slot| slot.successor.is_none()) {
            let info = slot.life.info();
            if info.is_inconsistent {
                continue;
            }
            let known = self.told.iter().position(|told| {
                told.life.as_ref().is_some_and(|life| Arc::ptr_eq(life, &slot.life))
            });
            if let Some((at, told)) = known.and_then(|at| Some((at, self.told.get_mut(at)?))) {
                if told.is_enabled != info.is_enabled {
                    told.is_enabled = info.is_enabled;
                    news.push(News::Updated(at));
                }
                continue;
            }
            let Some(name) = (self.carry)(&info) else { continue };
            if self.told.iter().any(|told| told.life.is_some() && told.name == name) {
                continue;
            }
            let before = self.told.iter().position(|told| told.source_name == info.name);
            let version = before.and_then(|at| self.told.get(at)).map_or_else(
                || BitmapVersion { bitmap: self.numbers.next(), generation: 1 },
                |told| BitmapVersion { generation: told.version.generation + 1, ..told.version },
            );
            let life = slot.life.clone();
            let told = Told::new(version, name, life, info.is_enabled, slot.track())?;
            let at = match before.and_then(|at| Some((at, self.told.get_mut(at)?))) {
                Some((at, old)) => {
                    *old = told;
                    at
                }
                None => {
                    self.told.push(told);
                    self.told.len() - 1
                }
            };
            news.push(News::Created(at));
        }
        Ok(news)
    }
}

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn unhashable(error: HashError) -> Error {
    Error::handler(Blame::Caller, error)
}

impl Drop for Sender {
    fn drop(&mut self) {
        let _jobs = self.bitmaps.lock_jobs();
        self.bitmaps.write().iter_mut().for_each(|slot| slot.changed = None);
    }
}

impl Told {
    fn new(
        version: BitmapVersion,
        name: String,
        life: Arc<Life>,
        is_enabled: bool,
        changed: Arc<AtomicBits>,
    ) -> Result<Self, HashError> {
        let shape = life.shape();
        let pieces = shape.piece_count();
        Ok(Self {
            version,
            source_name: life.name.clone(),
            name,
            is_enabled,
            changed,
            in_flight: Vec::new(),
            sent: AtomicBits::new(pieces),
            digest: RunningDigest::new(shape)?,
            life: Some(life),
        })
    }

    /// Takes the next changed piece at or behind `from` and appends it, unless it is zero and was
    /// never sent. Answers where to go on; `None` when there are no more.
    fn next_piece(&mut self, from: u64, packed: &mut Vec<u8>) -> Option<u64> {
        let life = self.life.as_ref()?;
        // What is being marked right now and not yet counted is for the next pass: in the last one
        // nothing is.
        if self.changed.count() == 0 {
            return None;
        }
        let index = self.changed.next_run(from, 1)?.start;
        match self.in_flight.last_mut() {
            Some(last) if last.end == index => last.end += 1,
            _ => self.in_flight.push(index..index + 1),
        }
        // Taken before it is read: what changes afterwards marks it again.
        self.changed.take_run(index, 1).filter(|taken| taken.start == index)?;
        let mut bits = [0; PIECE_BYTES];
        let bits = bits.get_mut(..life.shape().piece_len(index)?)?;
        let has_bits = life.bits.read_bytes(index.saturating_mul(PIECE_BYTES as u64), bits);
        let was_sent = self.sent.get(index);
        if has_bits {
            self.sent.set_range(index..index + 1);
        }
        if has_bits || was_sent {
            self.digest.touch(index);
            let bits = if has_bits { &*bits } else { &[] };
            Piece { version: self.version, index, bits }.encode(packed);
        }
        Some(index + 1)
    }

    /// Takes back what is to be sent of leaves that are there as they are here, and sends all of
    /// those that are not.
    fn compare(&mut self, leaves: &[(u64, Node)]) -> Result<()> {
        let Some(life) = &self.life else { return Ok(()) };
        let pieces = life.shape().piece_count();
        let mut bytes = Vec::new();
        for (leaf, node) in leaves {
            let of_leaf = pieces_of(*leaf, pieces)?;
            self.sent.set_range(of_leaf.clone());
            // Before it is read: what changes from now on is marked again.
            self.changed.clear_range(of_leaf.clone());
            read_chunk(&life.bits, leaf.saturating_mul(CHUNK_BYTES), &mut bytes);
            if content_hash::leaf(&bytes) == *node {
                of_leaf.for_each(|piece| self.digest.touch(piece));
            } else {
                self.changed.set_range(of_leaf);
            }
        }
        Ok(())
    }

    /// Hashes the leaves whose pieces were taken since they were hashed.
    fn hash(&mut self) -> Result<(), HashError> {
        let Some(life) = &self.life else { return Ok(()) };
        self.digest.hash(|offset, bytes| _ = life.bits.read_bytes(offset, bytes))
    }
}
