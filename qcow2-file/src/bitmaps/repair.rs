//! Making the bitmaps of an image sound again, and getting rid of them.

use std::sync::Arc;

use super::change::{Change, Content, Slot};
use super::check::{BitmapCheck, Defect, Severity, check};
use super::header::{read_writable, set_extension};
use super::load::{Bitmaps, image_facts, load_bits, read_directory, stale_extension};
use super::table::Table;
use super::unreadable;
use crate::edit::Allocator;
use crate::error::{Condition, Error, Result};
use crate::layout::bitmap_directory::LocatedEntry;
use crate::layout::extension::BitmapsExtension;
use crate::layout::header::{Header, autoclear, incompatible};
use crate::preflight::read_header;
use crate::storage::{Storage, StorageExt};

/// Header field `incompatible_features`.
const INCOMPATIBLE_AT: u64 = 72;

/// What [`repair`] may give up. What it may always do loses nothing: clear bits behind the end of
/// the disk, and drop bitmaps that were invalidated by a program that does not know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RepairOptions {
    /// Remove bitmaps whose content was not saved.
    pub may_remove_inconsistent: bool,
    /// Drop bitmaps whose entry, table or refcounts break the format. What their clusters are used
    /// for besides only a walk over all metadata can say, which is made afterwards; what nothing
    /// else refers to is then free.
    pub may_drop_broken: bool,
}

/// What [`repair`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Repaired {
    /// Invalidated bitmaps that were dropped.
    pub stale_dropped: u32,
    /// Bitmaps whose stray tail bits were cleared.
    pub tails_cleared: Vec<String>,
    /// Inconsistent bitmaps that were removed.
    pub removed: Vec<String>,
    /// Broken bitmaps that were dropped.
    pub broken_dropped: Vec<String>,
    /// Whether the whole directory was dropped because it could not be read.
    pub is_directory_dropped: bool,
    /// Whether clusters stay leaked that `qemu-img check -r leaks` would free.
    pub has_leaked: bool,
}

impl Repaired {
    /// Whether nothing had to be done.
    pub fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Repairs the bitmaps of an image that nobody else has open. What would need an option that is not
/// given is left; [`check`] tells. Fails on an image that must not be written for other reasons.
pub fn repair(file: &Arc<dyn Storage>, options: RepairOptions) -> Result<Repaired> {
    let header = match read_writable(&**file) {
        Err(Error::Malformed { .. }) if options.may_drop_broken && unreadable::hide(file)? => {
            let has_leaked = has_leaks_left(file)?;
            return Ok(Repaired { is_directory_dropped: true, has_leaked, ..Repaired::default() });
        }
        header => header?,
    };
    let Some(extension) = header.bitmaps() else { return Ok(Repaired::default()) };
    if stale_extension(&header).is_some() {
        let dropped = drop_directory(file, &header)?;
        let stale_dropped = extension.count;
        return Ok(Repaired { stale_dropped, is_directory_dropped: false, ..dropped });
    }
    let report = check(file, &header)?;
    let is_broken = report.worst() == Some(Severity::Corrupt);
    if is_broken && !options.may_drop_broken {
        return Ok(Repaired::default());
    }
    let image = image_facts(&**file, &header)?;
    let located = match read_directory(&**file, extension, image) {
        Ok(located) => located,
        Err(Error::Malformed { .. }) => return drop_directory(file, &header),
        Err(other) => return Err(other),
    };
    let is_set_broken = report.findings.iter().any(|f| f.bitmap.is_none()) || report.omitted > 0;
    if is_set_broken {
        return drop_directory(file, &header);
    }
    let mut repaired = Repaired::default();
    let mut change = Change { replaced: Some(extension), ..Change::default() };
    for found in &located {
        let table = Table { file: &**file, image, entry: &found.entry };
        match Verdict::of(&report, found, options) {
            Verdict::Keep => change.slots.push(Slot::kept(found.entry.clone())),
            Verdict::ClearTail => {
                let content = Content::Bits(load_bits(&table)?);
                change.slots.push(Slot { content, ..Slot::kept(found.entry.clone()) });
                repaired.tails_cleared.push(found.entry.name.clone());
            }
            Verdict::Remove => {
                change.removed.push(found.entry.clone());
                repaired.removed.push(found.entry.name.clone());
            }
            Verdict::Drop => repaired.broken_dropped.push(found.entry.name.clone()),
        }
    }
    if repaired.is_nothing() {
        return Ok(repaired);
    }
    match commit(file, &header, change) {
        Ok(()) => {
            repaired.has_leaked = is_broken && has_leaks_left(file)?;
            Ok(repaired)
        }
        // What only the walk over all metadata finds: clusters shared with the guest's data.
        Err(Error::Malformed { .. }) if options.may_drop_broken => drop_directory(file, &header),
        Err(other) => Err(other),
    }
}

/// What happens to one bitmap.
enum Verdict {
    Keep,
    ClearTail,
    Remove,
    Drop,
}

impl Verdict {
    fn of(report: &BitmapCheck, found: &LocatedEntry, options: RepairOptions) -> Self {
        let name = Some(found.entry.name.as_str());
        let defects = || report.findings.iter().filter(|f| f.bitmap.as_deref() == name);
        let has = |wanted: &Defect| defects().any(|f| f.defect == *wanted);
        if defects().any(|f| f.defect.severity() == Severity::Corrupt) {
            Self::Drop
        } else if options.may_remove_inconsistent && has(&Defect::InUse) {
            Self::Remove
        } else if has(&Defect::TailBits) {
            Self::ClearTail
        } else {
            Self::Keep
        }
    }
}

/// Makes the change. Where broken bitmaps make the image corrupt, nothing may be allocated or freed
/// in it, so they are taken out of the header first; the good ones come back with a new directory,
/// and with the old one when that fails.
fn commit(file: &Arc<dyn Storage>, header: &Header, mut change: Change) -> Result<()> {
    let image = image_facts(&**file, header)?;
    let apply = |change: Change| {
        let mut allocator = Allocator::open(file.clone(), &read_header(&**file)?)?;
        change.apply(&**file, image, &mut allocator)
    };
    let Some(old) = change.replaced else { return apply(change) };
    let is_dropping = change.slots.len() + change.removed.len() < old.count as usize;
    if !is_dropping {
        return apply(change);
    }
    // What is leaked together with the broken bitmaps may be shared with them.
    change.replaced = None;
    change.removed.clear();
    set_extension(&**file, None)?;
    apply(change).inspect_err(|_| restore(&**file, old))
}

fn restore(file: &dyn Storage, extension: BitmapsExtension) {
    if let Err(error) = set_extension(file, Some(extension)) {
        tracing::warn!(%error, "the bitmaps extension could not be put back");
    }
}

/// Removes all bitmaps and the extension and frees their clusters. The answer is whether some stay
/// leaked. Refuses an image that would be corrupt without its bitmaps too.
pub fn strip(file: &Arc<dyn Storage>) -> Result<bool> {
    let header = match read_writable(&**file) {
        Err(Error::Malformed { .. }) if unreadable::hide(file)? => return has_leaks_left(file),
        header => header?,
    };
    let Some(extension) = header.bitmaps() else { return Ok(false) };
    let is_corrupt = check(file, &header)?.worst() == Some(Severity::Corrupt);
    if stale_extension(&header).is_some() || is_corrupt {
        return Ok(drop_directory(file, &header)?.has_leaked);
    }
    let Some(bitmaps) = Bitmaps::open(file.clone(), &header)? else { return Ok(false) };
    let removed = bitmaps.list().iter().map(|e| e.located.entry.clone()).collect();
    let change = Change { slots: Vec::new(), removed, replaced: Some(extension) };
    match commit(file, &header, change) {
        // A damaged table may have lost sight of clusters before.
        Ok(()) => has_leaks_left(file),
        Err(Error::Malformed { .. }) => {
            drop_directory(file, &header).map(|dropped| dropped.has_leaked)
        }
        Err(other) => Err(other),
    }
}

/// Clears, on the user's word, the mark of an in-place copy that was not finished (SPEC 3.3).
/// Answers whether it was there. The content may be partly old and partly new; bitmaps that
/// recorded writes say so if the copy had the time to store them, and are invalid if not.
pub fn clear_unfinished(file: &dyn Storage) -> Result<bool> {
    let header = read_header(file)?;
    if header.incompatible_features & incompatible::UNFINISHED_COPY == 0 {
        return Ok(false);
    }
    let kept = header.incompatible_features & !incompatible::UNFINISHED_COPY;
    file.write(&kept.to_be_bytes(), INCOMPATIBLE_AT)?;
    file.make_durable()?;
    Ok(true)
}

/// Takes the extension out of the header, and frees what nothing refers to then. Only where the
/// image is sound without it: a corrupt image is not written to.
fn drop_directory(file: &Arc<dyn Storage>, header: &Header) -> Result<Repaired> {
    let mut without = header.clone();
    without.set_bitmaps(None);
    without.autoclear_features &= !autoclear::BITMAPS;
    let report = crate::check::check(file, &without)?;
    if report.is_corrupt() {
        let reason = " beyond its bitmaps and is not written to".to_owned();
        return Err(Error::condition(file.name(), Condition::Corrupt(reason)));
    }
    set_extension(&**file, None)?;
    let has_leaked = has_leaks_left(file)?;
    Ok(Repaired { is_directory_dropped: true, has_leaked, ..Repaired::default() })
}

/// Frees what nothing refers to any more, and answers whether leaks stay all the same.
fn has_leaks_left(file: &Arc<dyn Storage>) -> Result<bool> {
    let header = read_header(&**file)?;
    crate::check::reclaim(file, &header)?;
    Ok(crate::check::check(file, &header)?.leaks > 0)
}
