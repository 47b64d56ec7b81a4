//! The bitmaps of a copy: which are carried, their bits, and what is said of them in the end.

use bitmap_mig::{Bitmap, Choice, Decision, Fate, Holder, Problem, Wanted, Wish, decide};
use mig_core::bitmap::BitmapInfo;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::limits::MAX_BITMAP_BYTES;

use super::in_place::Found;
use super::options::{BitmapSelection, CopyOptions};
use super::resolve::Source;
use super::target::Target;
use crate::disk::Stored;
use crate::report::{BitmapOutcome, BitmapReport};
use crate::{Error, Result};

/// Why an old image cannot hold bitmaps.
const VERSION_2: &str = "a qcow2 image of version 2 has no place for bitmaps";
/// Stands for bitmaps whose names cannot be known.
const NAMELESS: &str = "*";

/// What was decided about the source's bitmaps.
#[derive(Debug)]
pub(super) struct BitmapPlan {
    pub(super) decision: Decision,
    /// Bitmaps that are there and cannot even be listed: why.
    pub(super) unlistable: Option<String>,
    /// Bitmaps of a destination that is written in place. Those of the same name are replaced.
    pub(super) found: Vec<String>,
    /// Whether any bitmap was asked for.
    pub(super) wants_any: bool,
    /// What stands in the way.
    pub(super) refusals: Vec<Error>,
}

/// Decides about the bitmaps. `found` is what stands at a destination that is written in place.
pub(super) fn plan(
    options: &CopyOptions,
    source: &Source,
    target: &Target,
    found: Found,
) -> BitmapPlan {
    let stored = &source.disk.bitmaps;
    let listed: Vec<BitmapInfo> = stored
        .directory()
        .map(|b| b.list().iter().map(bitmap_mig::summary).collect())
        .unwrap_or_default();
    let holder = Holder {
        cannot: cannot_hold(target, &found),
        size: source.disk.chain.virtual_size(),
        max_bytes: MAX_BITMAP_BYTES,
    };
    let decision = decide(&listed, &wish(options), &holder);
    let mut refusals: Vec<Error> = decision.problems.iter().map(refusal).collect();
    let unlistable = stored.unlistable();
    let is_accepted = options.skip_broken_bitmaps || options.bitmaps == BitmapSelection::None;
    if let Some(reason) = unlistable.clone().filter(|_| !is_accepted) {
        let hint = "use --skip-broken-bitmaps to go on without them, or `bitferry bitmap repair`";
        refusals.push(Error::WouldLose { reason, hint: hint.into() });
    }
    let wants_any = options.bitmaps != BitmapSelection::None;
    BitmapPlan { decision, unlistable, found: found.bitmaps, wants_any, refusals }
}

fn wish(options: &CopyOptions) -> Wish {
    Wish {
        wanted: match &options.bitmaps {
            BitmapSelection::All => Wanted::All,
            BitmapSelection::None => Wanted::None,
            BitmapSelection::Named(names) => Wanted::Named(names.clone()),
        },
        renames: options
            .renames
            .iter()
            .map(|r| bitmap_mig::Rename { old: r.old.clone(), new: r.new.clone() })
            .collect(),
        skips_broken: options.skip_broken_bitmaps,
    }
}

fn cannot_hold(target: &Target, found: &Found) -> Option<String> {
    match target {
        Target::Raw | Target::RawInPlace => Some("a raw image has no place for bitmaps".into()),
        Target::Qcow2 { shape, .. } => (shape.version < 3).then(|| VERSION_2.into()),
        Target::Qcow2InPlace => found.is_version_2.then(|| VERSION_2.into()),
    }
}

fn refusal(problem: &Problem) -> Error {
    match problem {
        Problem::Wrong(reason) => Error::Usage { reason: reason.clone() },
        Problem::Loses { name, reason, is_broken } => Error::WouldLose {
            reason: format!("bitmap {name:?}: {reason}"),
            hint: if *is_broken {
                "use --skip-broken-bitmaps to go on without it".into()
            } else {
                "use --bitmaps none to go on without bitmaps, -O qcow2, or, for a raw disk with \
                 bitmaps, -O qcow2 -o data_file=FILE,data_file_raw=on"
                    .into()
            },
        },
    }
}

/// Bitmaps that are carried, with their bits and under their new names.
pub(super) fn load(source: &Source, plan: &BitmapPlan) -> Result<Vec<PersistentBitmap>> {
    let Some(directory) = source.disk.bitmaps.directory() else { return Ok(Vec::new()) };
    let carried = plan.decision.choices.iter().filter_map(|c| match &c.fate {
        Fate::Carried(name) => Some((c, name)),
        Fate::Unwanted | Fate::Left(_) => None,
    });
    carried
        .map(|(choice, name)| {
            let bitmap = bitmap_mig::load(directory, &choice.bitmap.name)?;
            Ok(bitmap.into_stored_as(name))
        })
        .collect()
}

/// Whether a destination holds exactly what was stored: `None`, or the first difference.
pub(crate) fn difference(stored: &[PersistentBitmap], found: &Stored) -> Result<Option<String>> {
    let Some(directory) = found.directory() else {
        let lost = stored.first().map(|b| format!("bitmap {:?} is not there", b.name));
        return Ok(lost);
    };
    for expected in stored {
        let Bitmap { name, granularity_bits, is_enabled, bits } =
            bitmap_mig::load(directory, &expected.name)?;
        let found = PersistentBitmap { name, granularity_bits, is_enabled, bits };
        if found != *expected {
            return Ok(Some(format!("bitmap {:?} does not read back as stored", expected.name)));
        }
    }
    Ok(None)
}

/// What to say of the source's bitmaps once the carried ones are valid at the destination.
pub(super) fn reports(plan: &BitmapPlan) -> Vec<BitmapReport> {
    let nameless = plan.unlistable.as_ref().map(|reason| BitmapReport {
        name: NAMELESS.into(),
        outcome: BitmapOutcome::Dropped,
        changed: Vec::new(),
        reason: Some(reason.clone()),
        is_wanted: plan.wants_any,
    });
    plan.decision.choices.iter().map(|c| report(c, &plan.found)).chain(nameless).collect()
}

fn report(choice: &Choice, found: &[String]) -> BitmapReport {
    let name = choice.bitmap.name.clone();
    let dropped = |reason: String, is_wanted| BitmapReport {
        name: name.clone(),
        outcome: BitmapOutcome::Dropped,
        changed: Vec::new(),
        reason: Some(reason),
        is_wanted,
    };
    match &choice.fate {
        Fate::Unwanted => dropped("it was not asked for".into(), false),
        Fate::Left(reason) => dropped(reason.clone(), true),
        Fate::Carried(new) => BitmapReport {
            name: name.clone(),
            outcome: BitmapOutcome::Preserved,
            changed: changes(&name, new, found),
            reason: None,
            is_wanted: true,
        },
    }
}

fn changes(name: &str, new: &str, found: &[String]) -> Vec<String> {
    let renamed = (name != new).then(|| format!("name: {name} -> {new}"));
    let is_replaced = found.iter().any(|f| f == new);
    let replaced = is_replaced.then(|| "replaces the destination's bitmap of that name".to_owned());
    renamed.into_iter().chain(replaced).collect()
}
