//! The end of a migration that ended well: content made durable, bitmaps stored and made valid, all
//! of it read back, and what is said of it.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qcow2_file::bitmaps::{BitmapEditor, PersistentBitmap};
use qcow2_file::{Format, Opener};

use super::super::error::{Error, Result};
use super::bitmaps::Fate;
use super::disk::{Body, Disk};
use super::options::IncomingOptions;
use crate::copy::{BitmapSelection, difference, invalidated};
use crate::disk::{Disk as OpenDisk, Stored as Listed};
use crate::report::{BitmapOutcome, BitmapReport, DiskReport, ONLY_BITMAPS, Verified};
use crate::{Observer, Phase};

/// The bitmaps of one disk of the stream.
type Fates = BTreeMap<String, Fate>;

/// A disk whose changes are ready to be made.
struct Ready<'d, 'o> {
    disk: &'d mut Disk<'o>,
    stored: Vec<PersistentBitmap>,
    reports: Vec<BitmapReport>,
    /// For an image that got bitmaps only.
    editor: Option<BitmapEditor>,
}

/// What is stored and may have to be taken out again.
#[derive(Debug, Default)]
pub(super) struct Stored {
    pub(super) reports: Vec<DiskReport>,
    /// Names of bitmaps in the images, by the disks' order.
    added: Vec<Vec<String>>,
}

/// Stores everything, and says what became of it, unless the source turns out to have left before.
/// An error leaves images that were written marked as unfinished, and the others without the new
/// bitmaps.
pub(super) fn store(
    disks: &mut [Disk<'_>],
    mut fates: BTreeMap<String, Fates>,
    options: &IncomingOptions,
    is_there: &dyn Fn() -> Result<()>,
    observer: &dyn Observer,
) -> Result<Stored> {
    observer.phase(Phase::Seal);
    for disk in disks.iter() {
        match &disk.body {
            Body::Untouched => {}
            Body::Raw(sink) => mig_core::block::BlockSink::sync(sink)?,
            Body::Qcow2(editor) => editor.sync()?,
        }
    }
    observer.phase(Phase::Bitmaps);
    let mut ready = Vec::new();
    for disk in disks.iter_mut() {
        let fates = fates.remove(&disk.place.id).unwrap_or_default();
        ready.push(prepare(disk, fates)?);
    }
    if observer.is_cancelled() {
        return Err(Error::Interrupted);
    }
    is_there()?;
    observer.phase(Phase::Publish);
    let mut done: usize = 0;
    let committed = ready.iter_mut().try_for_each(|ready| {
        commit(ready)?;
        done = done.saturating_add(1);
        Ok(())
    });
    let names = |ready: &Ready<'_, '_>| ready.stored.iter().map(|b| b.name.clone()).collect();
    let mut added: Vec<Vec<String>> = ready.iter().map(names).collect();
    observer.phase(Phase::Prove);
    let reports = committed.and_then(|()| ready.into_iter().map(report).collect());
    let mut reports: Vec<DiskReport> = match reports {
        Ok(reports) => reports,
        Err(error) => {
            added.truncate(done);
            take_back(disks, &added)?;
            return Err(error);
        }
    };
    reports.extend(fates.into_iter().map(|(id, fates)| homeless(id, fates)));
    add_missing(options, &mut reports);
    Ok(Stored { reports, added })
}

impl Stored {
    /// Takes the bitmaps out of the images again: the source may go on with its own, of which
    /// these are then stale.
    pub(super) fn take_back(&mut self, disks: &[Disk<'_>], why: &str) -> Result<()> {
        take_back(disks, &self.added)?;
        let bitmaps = self.reports.iter_mut().flat_map(|disk| &mut disk.bitmaps);
        for bitmap in bitmaps.filter(|b| b.outcome == BitmapOutcome::Preserved) {
            (bitmap.outcome, bitmap.reason) = (BitmapOutcome::Dropped, Some(why.to_owned()));
        }
        Ok(())
    }
}

/// Removes bitmaps by the disks' order: all that can be, and answers for the first that cannot.
fn take_back(disks: &[Disk<'_>], added: &[Vec<String>]) -> Result<()> {
    let mut result = Ok(());
    for (disk, names) in disks.iter().zip(added) {
        let Some(first) = names.first() else { continue };
        let removed = remove(disk, names).map_err(|source| Error::Stale {
            bitmap: first.clone(),
            path: disk.place.path.clone(),
            source: Box::new(source.into()),
        });
        result = result.and(removed);
    }
    result
}

fn remove(disk: &Disk<'_>, names: &[String]) -> qcow2_file::Result<()> {
    let mut editor = BitmapEditor::open(Arc::clone(disk.chain.top().file()))?;
    names.iter().try_for_each(|name| editor.remove(name))?;
    editor.commit()
}

/// Gets the changes of a disk ready. Nothing is written.
fn prepare<'d, 'o>(disk: &'d mut Disk<'o>, fates: Fates) -> Result<Ready<'d, 'o>> {
    let mut stored = Vec::new();
    let mut reports = Vec::new();
    let mut replaced = Vec::new();
    for (name, fate) in fates {
        reports.push(bitmap_report(&name, &fate));
        if let Fate::Loaded(loading) = fate
            && loading.is_complete
        {
            if loading.replaces {
                replaced.push(loading.name.clone());
            }
            let name = loading.name.clone();
            stored.push(loading.into_bitmap().into_stored_as(&name));
        }
    }
    let editor = match &disk.body {
        Body::Qcow2(editor) => {
            if let Some(guard) = editor.guard() {
                replaced.iter().try_for_each(|name| guard.remove(name))?;
                stored.iter().cloned().try_for_each(|bitmap| guard.add(bitmap))?;
            }
            None
        }
        Body::Untouched if !stored.is_empty() => {
            if disk.is_unfinished {
                return Err(unfinished(disk));
            }
            let mut editor = BitmapEditor::open(Arc::clone(disk.chain.top().file()))?;
            replaced.iter().try_for_each(|name| editor.remove(name))?;
            stored.iter().cloned().try_for_each(|bitmap| editor.add(bitmap))?;
            Some(editor)
        }
        Body::Untouched | Body::Raw(_) => None,
    };
    Ok(Ready { disk, stored, reports, editor })
}

fn unfinished(disk: &Disk<'_>) -> Error {
    let path = disk.place.path.display();
    let reason = format!(
        "bitmaps of disk {:?} arrived and no content, and {path} holds an in-place copy that was \
         not finished, which they cannot belong to",
        disk.place.id
    );
    let hint = "migrate the disk again, too, or clear the mark with `bitferry bitmap repair \
                --clear-unfinished`";
    crate::Error::WouldLose { reason, hint: hint.to_owned() }.into()
}

/// Makes the changes of a disk, durably.
fn commit(ready: &mut Ready<'_, '_>) -> Result<()> {
    if let Some(editor) = ready.editor.take() {
        return Ok(editor.commit()?);
    }
    match std::mem::replace(&mut ready.disk.body, Body::Untouched) {
        Body::Qcow2(editor) => Ok(editor.close()?),
        _ => Ok(()),
    }
}

fn bitmap_report(name: &str, fate: &Fate) -> BitmapReport {
    let dropped = |reason: &str, is_wanted| BitmapReport {
        name: name.to_owned(),
        outcome: BitmapOutcome::Dropped,
        changed: Vec::new(),
        reason: Some(reason.to_owned()),
        is_wanted,
    };
    match fate {
        Fate::Unwanted => dropped("it was not asked for", false),
        Fate::Homeless => dropped("there is no image for its disk", true),
        Fate::Loaded(loading) if !loading.is_complete => {
            dropped("the source did not say that it is complete", true)
        }
        Fate::Loaded(loading) => BitmapReport {
            name: name.to_owned(),
            outcome: BitmapOutcome::Preserved,
            changed: loading.changes(name),
            reason: None,
            is_wanted: true,
        },
    }
}

/// Reads back what was stored, and puts it into words.
fn report(ready: Ready<'_, '_>) -> Result<DiskReport> {
    let Ready { disk, stored, reports: mut bitmaps, .. } = ready;
    let has_content = disk.counts != Default::default();
    let mut verified = if has_content { Verified::Unconfirmed } else { Verified::No };
    if disk.chain.top().as_qcow2().is_some() && (has_content || !stored.is_empty()) {
        let found = reopen(&disk.place.path)?;
        if let Some(reason) = difference(&stored, &found.bitmaps).map_err(Error::from)? {
            verified = Verified::Mismatch;
            let preserved = bitmaps.iter_mut().filter(|b| b.outcome == BitmapOutcome::Preserved);
            for bitmap in preserved {
                bitmap.outcome = BitmapOutcome::Invalidated;
                bitmap.reason = Some(reason.clone());
            }
        }
        bitmaps.extend(invalidated(&found));
    }
    Ok(DiskReport {
        id: disk.place.id.clone(),
        bytes_data: disk.counts.data,
        bytes_zero: disk.counts.zero,
        content_hash: None,
        verified,
        not_carried: not_carried(disk, has_content, !stored.is_empty()),
        bitmaps,
    })
}

/// Opens the image as anybody would, without what it stands on. We hold the locks.
fn reopen(path: &Path) -> Result<OpenDisk> {
    let opener = Opener::new().format(Some(Format::Qcow2)).without_named_files(true);
    let chain = opener.open(path)?;
    let bitmaps = chain.top().as_qcow2().map_or(Listed::None, Listed::of);
    Ok(OpenDisk { chain, bitmaps })
}

fn not_carried(disk: &Disk<'_>, has_content: bool, has_bitmaps: bool) -> Vec<String> {
    let mut phrases = Vec::new();
    match disk.missing_chunks() {
        Some((missing @ 1.., all)) if has_content => phrases.push(format!(
            "{missing} of {all} MiB did not come, as with `migrate -i`: there the image keeps its \
             own content"
        )),
        _ => {}
    }
    if disk.padding > 0 {
        // QEMU sends what its buffer held before.
        phrases.push(format!(
            "{} bytes beyond the end of the image: memory of QEMU's without meaning if the \
             source's disk has {} bytes, too, else part of the disk",
            disk.padding, disk.size
        ));
    }
    if !has_content && has_bitmaps {
        phrases.push(ONLY_BITMAPS.to_owned());
    }
    if !has_content && !has_bitmaps {
        phrases.push("nothing was sent for it".to_owned());
        if disk.is_unfinished {
            phrases.push("it still holds an in-place copy that was not finished".to_owned());
        }
    }
    phrases
}

/// Adds bitmaps that were asked for by name, or were to get another one, and did not come.
fn add_missing(options: &IncomingOptions, reports: &mut [DiskReport]) {
    let named: &[String] = match &options.bitmaps {
        BitmapSelection::Named(names) => names,
        BitmapSelection::All | BitmapSelection::None => &[],
    };
    let renamed = options.renames.iter().map(|rename| (rename.node.as_deref(), &rename.old));
    for (disk, name) in named.iter().map(|name| (None, name)).chain(renamed) {
        let is_meant = |report: &DiskReport| disk.is_none_or(|disk| disk == report.id);
        let has_it = |report: &DiskReport| report.bitmaps.iter().any(|b| b.name == *name);
        if reports.iter().any(|report| is_meant(report) && has_it(report)) {
            continue;
        }
        let Some(report) = reports.iter_mut().find(|report| is_meant(report)) else { continue };
        report.bitmaps.push(BitmapReport {
            name: name.clone(),
            outcome: BitmapOutcome::Dropped,
            changed: Vec::new(),
            reason: Some("the source sent no bitmap of this name".to_owned()),
            is_wanted: true,
        });
    }
}

/// What is said of a disk of the stream for which there is no image, and whose bitmaps nobody
/// asked for.
fn homeless(id: String, fates: Fates) -> DiskReport {
    DiskReport {
        id,
        bytes_data: 0,
        bytes_zero: 0,
        content_hash: None,
        verified: Verified::No,
        not_carried: vec!["no image was named for it".to_owned()],
        bitmaps: fates.iter().map(|(name, fate)| bitmap_report(name, fate)).collect(),
    }
}
