//! Writing into an existing qcow2 image. Its own bitmaps follow what is written; those of the
//! source come beside them.

use std::sync::Arc;

use block_mig::Transferred;
use block_mig::device::EditorSink;
use qcow2_file::bitmaps::{Bitmaps, Entry, PersistentBitmap, State};
use qcow2_file::edit::{Backing, Editor, EditorOptions};
use qcow2_file::{Access, Chain, Opener, Storage};

use super::super::plan::Job;
use super::super::prove::Proof;
use super::super::{Done, bitmaps, new, prove};
use super::own;
use super::resume::Continued;
use crate::disk::Disk;
use crate::report::{BitmapOutcome, BitmapReport, Verified};
use crate::{Observer, Phase, Result, Silent};

/// Copies into a qcow2 image. It refuses to open elsewhere from the first write on until its
/// content is proved.
pub(super) fn copy(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    let chain = open(job)?;
    let editor = open_editor(&chain, job.options.allow_backing)?;
    if editor.header().version < 3 {
        observer.warning(&format!(
            "{} is written in place, and as an image of version 2 it cannot say so: until the copy \
             is complete it holds neither the old nor the new content",
            job.options.destination.display()
        ));
    }
    let filled = match fill(job, &editor, observer) {
        Ok(filled) => filled,
        Err(error) => {
            suspend(editor);
            return Err(error);
        }
    };
    let Filled { moved, mut proof, stored, continued } = filled;
    let (is_resumed, repeated) =
        continued.as_ref().map_or((false, 0), |c| (c.is_resumed, c.repeated));
    if proof.verified == Verified::Mismatch {
        // Never closed: the mark of the unfinished copy stays.
        continued.map_or(Ok(()), Continued::end)?;
        return Ok(Done { moved, proof, invalidated: Vec::new(), is_resumed, repeated });
    }
    observer.phase(Phase::Publish);
    editor.close()?;
    let found = Disk::open(&own(job), &Silent)?;
    prove_bitmaps(&found, &stored, &mut proof)?;
    continued.map_or(Ok(()), |continued| continued.finish((job, observer), &proof, &stored))?;
    Ok(Done { moved, proof, invalidated: invalidated(&found), is_resumed, repeated })
}

/// The destination, which holds its lock.
pub(super) fn open(job: &Job<'_>) -> Result<Chain> {
    let opener = Opener::new()
        .format(Some(qcow2_file::Format::Qcow2))
        .access(Access::ReadWrite)
        .allow_named_files(job.options.allow_backing)
        .accept_unfinished(true)
        .lock(true);
    Ok(opener.open(&job.options.destination)?)
}

/// What an image holds that only has to be closed.
struct Filled {
    moved: Transferred,
    proof: Proof,
    stored: Vec<PersistentBitmap>,
    continued: Option<Continued>,
}

/// Everything but the last step. An error may be an interruption.
fn fill(job: &Job<'_>, editor: &Editor, observer: &dyn Observer) -> Result<Filled> {
    let sink = EditorSink::new(editor);
    let continued = Continued::begin(job, &sink, observer)?;
    let keeper = continued.as_ref().and_then(Continued::keeper);
    let moved = new::move_data(job, &sink, keeper, observer)?;
    observer.phase(Phase::Seal);
    editor.sync()?;
    let proof = prove::prove(job, &own(job), &moved, &[], observer)?;
    if proof.verified == Verified::Mismatch {
        return Ok(Filled { moved, proof, stored: Vec::new(), continued });
    }
    observer.phase(Phase::Bitmaps);
    new::go_on(observer)?;
    let stored = bitmaps::load(&job.source, &job.bitmaps)?;
    add(editor, &stored)?;
    Ok(Filled { moved, proof, stored, continued })
}

/// Leaves an image to the next try: it stays marked as unfinished, and its own bitmaps have
/// recorded what was written so far. Whoever calls has an error to tell already.
pub(crate) fn suspend(editor: Editor) {
    if let Err(error) = editor.suspend() {
        tracing::warn!(%error, "bitmaps of the destination that record writes are not valid now");
    }
}

/// An editor for the top of a locked chain, which marks the image as unfinished before it writes
/// guest data. What it stands on is opened where that is allowed.
pub(crate) fn open_editor(chain: &Chain, allow_named_files: bool) -> Result<Editor> {
    open_editor_in(chain, chain.top().file().clone(), allow_named_files)
}

/// [`open_editor`] that reaches the top's own file through `file`.
pub(crate) fn open_editor_in(
    chain: &Chain,
    file: Arc<dyn Storage>,
    allow_named_files: bool,
) -> Result<Editor> {
    let own = chain.files().first();
    let data = own.and_then(|f| f.data.clone()).map(|d| d as Arc<dyn Storage>);
    let options = EditorOptions {
        data,
        backing: backing(chain, allow_named_files)?,
        is_in_place_copy: true,
        ..EditorOptions::default()
    };
    Ok(Editor::open(file, options)?)
}

/// What the top of a chain stands on, as a disk of its own.
pub(crate) fn backing(chain: &Chain, allow_named_files: bool) -> Result<Option<Arc<dyn Backing>>> {
    let (Some(files), Some(layer)) = (chain.files().get(1), chain.layers().get(1)) else {
        return Ok(None);
    };
    let opener =
        Opener::new().format(Some(layer.format())).allow_named_files(allow_named_files).lock(true);
    Ok(Some(Arc::new(opener.open(files.file.path())?)))
}

/// Bitmaps come last, so that enabled ones do not record the copy itself.
fn add(editor: &Editor, stored: &[PersistentBitmap]) -> Result<()> {
    if let Some(guard) = editor.guard() {
        for bitmap in stored {
            if guard.list().iter().any(|found| found.name == bitmap.name) {
                guard.remove(&bitmap.name)?;
            }
            guard.add(bitmap.clone())?;
        }
    }
    Ok(())
}

fn prove_bitmaps(found: &Disk, stored: &[PersistentBitmap], proof: &mut Proof) -> Result<()> {
    if proof.verified != Verified::Yes {
        return Ok(());
    }
    proof.mismatch = bitmaps::difference(stored, &found.bitmaps)?;
    if proof.mismatch.is_some() {
        proof.verified = Verified::Mismatch;
    }
    Ok(())
}

/// Nobody can tell which of the two.
const WAS_INCONSISTENT: &str =
    "it is the destination's own, and was inconsistent, before or since an interrupted copy";

/// Bitmaps of the destination that cannot be trusted. They were so before, if only since an earlier
/// try was interrupted: this copy has kept the others right.
pub(crate) fn invalidated(found: &Disk) -> Vec<BitmapReport> {
    let listed = found.bitmaps.directory().map(Bitmaps::list).unwrap_or_default();
    let broken = listed.iter().filter(|entry| entry.state != State::Consistent);
    let report = |entry: &Entry| BitmapReport {
        name: entry.name().to_owned(),
        outcome: BitmapOutcome::Invalidated,
        changed: Vec::new(),
        reason: Some(WAS_INCONSISTENT.to_owned()),
        is_wanted: false,
    };
    broken.map(report).collect()
}
