//! A new disk under temporary names, with its journal.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block_mig::device::RawSink;
use block_mig::journal::{Identity, Keeper, Prepared, Replayed};
use block_mig::ledger::Ledger;
use block_mig::recheck::{Recheck, Rechecked, clear_unknown, recheck};
use format_spec::content_hash::ContentHash;
use format_spec::native::journal::MAX_TARGET;
use format_spec::native::session::derive;
use mig_core::block::BlockSource;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::create::{Backing, CreateOptions, DataFile, NewImage};
use qcow2_file::storage::{Watched, Writes};
use qcow2_file::{Access, Guard, HostFile, Storage, preflight};

use super::base::uncover_unknown;
use super::log::Log;
use super::proved::{hold, stamps};
use super::prover::{Finds, Prover};
use super::sink::Sink;
use crate::copy::{DataFileTarget, Shape};
use crate::facts::{Stamp, stamp_of};
use crate::publish::{Draft, publish};
use crate::renames::{NO_PLACE_IN_RAW, NO_PLACE_IN_VERSION_2};
use crate::{Error, Result, preserve};

/// What a new disk is to be.
#[derive(Debug)]
pub(crate) struct NewDisk<'a> {
    /// Its final name.
    pub(crate) path: &'a Path,
    /// Guest-visible bytes.
    pub(crate) size: u64,
    /// Its format.
    pub(crate) kind: NewKind<'a>,
    /// All files that it stands on.
    pub(crate) below: Vec<PathBuf>,
    /// Whose it is; `None` where nothing is kept for another try.
    pub(crate) session: Option<[u8; 16]>,
    /// Whether another try can go on with what has arrived. Where it cannot, a journal notes only
    /// how far the publication is.
    pub(crate) resumes: bool,
    /// Whether what an earlier try left is removed.
    pub(crate) is_fresh: bool,
    /// What else is asked for that changes what is stored, in words.
    pub(crate) wishes: String,
}

/// Format of a new disk.
#[derive(Debug)]
pub(crate) enum NewKind<'a> {
    /// The guest's bytes.
    Raw,
    /// qcow2.
    Qcow2 {
        /// Its shape.
        shape: Shape,
        /// Where its data goes, if not into itself.
        data_file: Option<&'a DataFileTarget>,
        /// What it stands on.
        backing: Option<Backing>,
    },
}

impl<'a> NewDisk<'a> {
    /// Final names of its files, in the order in which they are published.
    pub(super) fn targets(&self) -> Vec<&'a Path> {
        let data = match &self.kind {
            NewKind::Qcow2 { data_file: Some(data), .. } => Some(data.path.as_path()),
            _ => None,
        };
        data.into_iter().chain([self.path]).collect()
    }

    /// What it is to be, in as many words as a journal takes. Its size is no part of it.
    pub(crate) fn target(&self) -> String {
        let kind = match &self.kind {
            NewKind::Raw => "raw".to_owned(),
            NewKind::Qcow2 { shape, data_file, backing } => {
                let data = data_file.map(|data| (data.is_raw, &data.name));
                let below = backing.as_ref().map(|b| format!(" on {:?} {:?}", b.name, b.format));
                format!("qcow2 {shape:?} {data:?}{}", below.unwrap_or_default())
            }
        };
        let words = [kind, self.wishes.clone()].join(" ");
        short_words(words.trim_end())
    }

    /// Why it can hold no bitmaps, if so.
    pub(super) fn cannot_hold(&self) -> Option<&'static str> {
        match &self.kind {
            NewKind::Raw => Some(NO_PLACE_IN_RAW),
            NewKind::Qcow2 { shape, .. } => (shape.version < 3).then_some(NO_PLACE_IN_VERSION_2),
        }
    }

    /// What its journal is of, in that session.
    pub(crate) fn identity(&self, session: [u8; 16]) -> Identity {
        Identity { session, size: self.size, target: self.target() }
    }
}

/// A destination under temporary names.
pub(crate) struct Unfinished {
    /// Published in this order: what others name comes first.
    pub(crate) drafts: Vec<Draft>,
    sink: Sink,
    size: u64,
    /// Counts what is written to the file that holds the content.
    writes: Arc<Writes>,
    log: Log,
    keeper: Option<Keeper>,
    resumes: bool,
    /// Whether an earlier try is gone on with.
    pub(crate) is_resumed: bool,
    below: Vec<PathBuf>,
    /// What its files were like when nothing more was written to them, and those below.
    stamps: Mutex<Vec<Stamp>>,
}

impl Unfinished {
    /// Goes on with what an earlier try of the same session left, or begins anew.
    pub(crate) fn open(disk: &NewDisk<'_>) -> Result<Self> {
        let log = Log::beside(disk.path)?;
        if let Some(found) = Self::find(disk, &log)? {
            return Ok(found);
        }
        let mut drafts = Vec::new();
        for target in disk.targets() {
            drafts.push(Draft::create(target)?);
        }
        log.remove_receipt()?;
        let keeper = match disk.session {
            Some(session) => log.start(disk.identity(session))?.map(Keeper::new).transpose()?,
            None => log.remove().map(|()| None)?,
        };
        let (writes, content) = watched(disk, &drafts);
        let sink = match create_options(disk, &drafts, &content) {
            Some((options, file)) => Sink::Image(Box::new(NewImage::create(file, &options)?)),
            None => Sink::Raw(RawSink::new(content, disk.size)),
        };
        let size = disk.size;
        let (resumes, is_resumed) = (disk.resumes, false);
        let (below, stamps) = (disk.below.clone(), Mutex::default());
        let unfinished =
            Self { drafts, sink, size, writes, log, keeper, resumes, is_resumed, below, stamps };
        unfinished.begin()?;
        Ok(unfinished)
    }

    /// What an earlier try left, if it can be gone on with.
    fn find(disk: &NewDisk<'_>, log: &Log) -> Result<Option<Self>> {
        let Some(session) = disk.session.filter(|_| disk.resumes && !disk.is_fresh) else {
            return Ok(None);
        };
        let mut drafts = Vec::new();
        for target in disk.targets() {
            let Some(draft) = Draft::reopen(target)? else { return Ok(None) };
            drafts.push(draft);
        }
        let Some(replayed) = log.find(&disk.identity(session))? else { return Ok(None) };
        let (writes, content) = watched(disk, &drafts);
        let sink = match create_options(disk, &drafts, &content) {
            Some((options, file)) => match NewImage::reopen(file, &options) {
                Ok(image) => Sink::Image(Box::new(image)),
                Err(error @ qcow2_file::Error::Io { .. }) => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(%error, "what an earlier try left is of no use");
                    return Ok(None);
                }
            },
            None => Sink::Raw(RawSink::new(content, disk.size)),
        };
        let Some(keeper) = resume(log, replayed)? else { return Ok(None) };
        let (log, size, keeper) = (log.clone(), disk.size, Some(keeper));
        let (resumes, is_resumed) = (disk.resumes, true);
        let (below, stamps) = (disk.below.clone(), Mutex::default());
        let unfinished =
            Self { drafts, sink, size, writes, log, keeper, resumes, is_resumed, below, stamps };
        unfinished.begin()?;
        Ok(Some(unfinished))
    }

    /// Before anything is written.
    fn begin(&self) -> Result<()> {
        if let Some(keeper) = &self.keeper {
            keeper.unprepare()?;
            self.drafts.iter().for_each(Draft::keep);
        }
        match (&self.sink, self.drafts.first()) {
            (Sink::Raw(_), Some(draft)) => set_length(draft, self.size),
            _ => Ok(()),
        }
    }

    /// What notes which parts have arrived, where they can be gone on with.
    pub(crate) fn keeper(&self) -> Option<&Keeper> {
        self.keeper.as_ref().filter(|_| self.resumes)
    }

    /// Begins to read back what will be written to it.
    pub(super) fn prover(self: &Arc<Self>) -> Result<Prover> {
        let of = (self.size, Arc::clone(&self.writes));
        Prover::start(self, Finds { disk: |this| &this.sink, keeper: Self::keeper }, of)
    }

    /// Where content goes.
    pub(crate) fn sink(&self) -> &Sink {
        &self.sink
    }

    /// Reads again what an earlier try left, and clears what is not as its journal says.
    pub(crate) fn recheck(
        &self,
        source: Option<&dyn BlockSource>,
        workers: usize,
        monitor: &dyn block_mig::Monitor,
    ) -> Result<Rechecked> {
        let Some(keeper) = self.keeper.as_ref().filter(|_| self.is_resumed) else {
            return Ok(Rechecked::default());
        };
        let request = Recheck { disk: &self.sink, source, workers, monitor };
        // Nobody else uses the keeper yet.
        keeper.with_claims(|claims: &mut Ledger| {
            let found = recheck(request, claims)?;
            match self.sink.image() {
                Some(image) if !self.below.is_empty() => uncover_unknown(image, claims)?,
                _ => clear_unknown(&self.sink, claims)?,
            }
            Ok(found)
        })
    }

    /// Stores bitmaps and metadata and makes everything durable. From here on nothing is written to
    /// it: what is read now is what is proved.
    pub(crate) fn seal(&self, stored: &[PersistentBitmap]) -> Result<()> {
        if let Some(image) = self.sink.image() {
            image.finish(stored)?;
        }
        self.sync()?;
        self.look()?;
        if let Some(keeper) = &self.keeper {
            keeper.checkpoint::<Error>(|| Ok(()))?;
        }
        Ok(())
    }

    /// Its files, in the order of their renames, and those below.
    fn files(&self) -> Vec<&Path> {
        let below = self.below.iter().map(PathBuf::as_path);
        self.drafts.iter().map(Draft::temporary).chain(below).collect()
    }

    /// Notes what it is like.
    fn look(&self) -> Result<()> {
        *self.lock_stamps() = stamps(&self.files())?;
        Ok(())
    }

    /// Gives its files attributes, times among them. What was proved stays proved.
    pub(crate) fn attribute(&self, give: impl Fn(&Draft) -> Result<()>) -> Result<()> {
        self.hold()?;
        self.drafts.iter().try_for_each(give)?;
        self.sync()?;
        self.look()
    }

    /// Fails where somebody has written to it since it was [sealed](Self::seal).
    pub(super) fn hold(&self) -> Result<()> {
        hold(&self.files(), &self.lock_stamps())
    }

    /// What it was like when it was sealed.
    pub(crate) fn stamp(&self) -> Stamp {
        stamp_of(&self.lock_stamps())
    }

    fn lock_stamps(&self) -> MutexGuard<'_, Vec<Stamp>> {
        self.stamps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the files durable.
    pub(crate) fn sync(&self) -> Result<()> {
        self.drafts.iter().try_for_each(sync)
    }

    /// Gives the files owner and mode of what they replace, or those of new files: until here they
    /// were ours alone.
    pub(super) fn open_to_others(&self) -> Result<()> {
        self.drafts.iter().try_for_each(preserve::as_usual)?;
        self.sync()
    }

    /// Notes durably that everything is there, and what was proved, or
    /// [`UNPROVED`](format_spec::native::journal::UNPROVED).
    pub(crate) fn prepare(&self, root: ContentHash) -> Result<()> {
        self.hold()?;
        if let Some(keeper) = &self.keeper {
            keeper.prepare(Prepared { root, stamps: self.lock_stamps().clone() })?;
            self.log.sync_name()?;
        }
        Ok(())
    }

    /// Where it can be read: its own file, and its data file where that is another.
    pub(crate) fn paths(&self) -> (&Path, Option<&Path>) {
        match self.drafts.as_slice() {
            [first, .., last] => (last.temporary(), Some(first.temporary())),
            [only] => (only.temporary(), None),
            [] => (Path::new(""), None),
        }
    }

    /// Its journal and receipt.
    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// A disk that was proved by an earlier try, if there is one. Nothing of it is opened for
    /// writing.
    pub(crate) fn prepared(disk: &NewDisk<'_>) -> Result<Option<(Self, ContentHash)>> {
        let Some(session) = disk.session else { return Ok(None) };
        let log = Log::beside(disk.path)?;
        let mut drafts = Vec::new();
        for target in disk.targets() {
            let Some(draft) = Draft::reopen(target)? else { return Ok(None) };
            drafts.push(draft);
        }
        let Some(replayed) = log.find(&disk.identity(session))? else { return Ok(None) };
        let Some(Prepared { root, stamps }) = replayed.prepared.clone() else { return Ok(None) };
        let Some(keeper) = resume(&log, replayed)? else { return Ok(None) };
        let (sink, size, keeper) = (Sink::Closed(disk.size), disk.size, Some(keeper));
        let writes = Arc::new(Writes::new(0, 0));
        let (resumes, is_resumed) = (disk.resumes, true);
        let (below, stamps) = (disk.below.clone(), Mutex::new(stamps));
        let known =
            Self { drafts, sink, size, writes, log, keeper, resumes, is_resumed, below, stamps };
        known.hold()?;
        Ok(Some((known, root)))
    }

    /// Makes what has arrived durable, and its journal say so, as far as that can be done.
    pub(crate) fn checkpoint(&self) -> Result<()> {
        use mig_core::block::BlockSink as _;
        let Some(keeper) = &self.keeper else { return Ok(()) };
        keeper.checkpoint(|| self.sink.sync().map_err(block_mig::Error::Sink))?;
        self.log.compact(keeper)
    }

    /// Nothing is kept for another try.
    pub(crate) fn forsake(&self) -> Result<()> {
        self.drafts.iter().for_each(Draft::forsake);
        self.log.remove()
    }
}

/// Publishes disks that belong together: all of their files get their names, or, where a crash
/// comes between, the rest of them when it is gone on with. `finish` is told of each disk before
/// its journal goes.
pub(crate) fn publish_together(
    disks: &[&Unfinished],
    replaces: bool,
    finish: impl Fn(usize) -> Result<()>,
) -> Result<()> {
    // All or none: what is not as it was proved is not published, nor what belongs to it.
    disks.iter().try_for_each(|disk| disk.hold())?;
    for disk in disks {
        if let [_, .., last] = disk.drafts.as_slice() {
            retire(last.target())?;
        }
    }
    // One rename is done or not. Of several, and of a receipt that is still to come, this tells.
    for disk in disks {
        if let Some(keeper) = disk.keeper.as_ref().filter(|keeper| keeper.is_prepared()) {
            keeper.commit()?;
            disk.log.sync_name()?;
        }
    }
    let drafts: Vec<_> = disks.iter().flat_map(|disk| &disk.drafts).collect();
    if let Err(error) = publish(drafts, replaces) {
        disks.iter().filter_map(|disk| disk.keeper.as_ref()).try_for_each(Keeper::unprepare)?;
        return Err(error);
    }
    for (index, disk) in disks.iter().enumerate() {
        finish(index)?;
        disk.log.remove()?;
    }
    Ok(())
}

/// What a destination is to be, in as many words as a journal and a receipt take.
pub(crate) fn short_words(words: &str) -> String {
    match words.len() {
        0..=MAX_TARGET => words.to_owned(),
        _ => format!("{:032x}", u128::from_be_bytes(derive(&[words.as_bytes()]))),
    }
}

fn resume(log: &Log, replayed: Replayed) -> Result<Option<Keeper>> {
    Ok(log.resume(replayed)?.map(Keeper::new).transpose()?)
}

/// The file that holds the content: a data file comes first.
fn watched(disk: &NewDisk<'_>, drafts: &[Draft]) -> (Arc<Writes>, Arc<dyn Storage>) {
    let cluster_bits = match &disk.kind {
        NewKind::Raw => u32::MAX,
        NewKind::Qcow2 { shape, .. } => shape.cluster_bits,
    };
    let writes = Arc::new(Writes::new(disk.size, cluster_bits));
    // `targets` names one file at least; an empty sink would be refused by its size.
    let nothing = || Arc::new(qcow2_file::Memory::new()) as Arc<dyn Storage>;
    let content = drafts.first().map_or_else(nothing, Draft::storage);
    (writes.clone(), Arc::new(Watched::new(content, writes)))
}

/// How the image of a qcow2 disk is created, and in which file.
fn create_options(
    disk: &NewDisk<'_>,
    drafts: &[Draft],
    content: &Arc<dyn Storage>,
) -> Option<(CreateOptions, Arc<dyn Storage>)> {
    let NewKind::Qcow2 { shape, data_file, backing } = &disk.kind else { return None };
    let mut options = shape.create_options(disk.size);
    options.backing = backing.clone();
    options.data_file = data_file.map(|data| DataFile {
        name: data.name.clone().into(),
        is_raw: data.is_raw,
        storage: content.clone(),
    });
    let file = if data_file.is_some() { drafts.last()?.storage() } else { content.clone() };
    Some((options, file))
}

/// Takes the validity of the bitmaps of an overlay whose data file is about to be replaced: between
/// the two renames it would stand on data that it does not describe. SPEC 3.2.
fn retire(overlay: &Path) -> Result<()> {
    if !overlay.exists() {
        return Ok(());
    }
    let file = HostFile::open(overlay, Access::ReadWrite)?;
    // What is no qcow2 image has no bitmaps.
    let has_bitmaps = preflight::read_header(&file).is_ok_and(|h| h.bitmaps().is_some());
    if has_bitmaps { Ok(Guard::invalidate(&file)?) } else { Ok(()) }
}

fn set_length(draft: &Draft, size: u64) -> Result<()> {
    draft.file().set_len(size).map_err(|source| Error::File {
        action: "set the length of",
        path: draft.temporary().to_owned(),
        source,
    })
}

fn sync(draft: &Draft) -> Result<()> {
    draft.file().file().sync_all().map_err(|source| Error::File {
        action: "sync",
        path: draft.temporary().to_owned(),
        source,
    })
}
