//! The bitmaps of a copy: which are carried, and whether they arrived.

use bitmap_mig::{Bitmap, Holder};
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::limits::MAX_BITMAP_BYTES;

use super::in_place::Found;
use super::options::CopyOptions;
use super::resolve::Source;
use super::target::Target;
use crate::Result;
pub(super) use crate::carry::BitmapPlan;
use crate::carry::{self, Asked};
use crate::disk::Stored;
use crate::renames::{NO_PLACE_IN_RAW, NO_PLACE_IN_VERSION_2};
use crate::report::{BitmapOutcome, BitmapReport};

/// What to do where the destination cannot hold bitmaps.
const HINT: &str = "use --bitmaps none to go on without bitmaps, -O qcow2, or, for a raw disk with \
     bitmaps, -O qcow2 -o data_file=FILE,data_file_raw=on";

/// Decides about the bitmaps. `found` is what stands at a destination that is written in place.
pub(super) fn plan(
    options: &CopyOptions,
    source: &Source,
    target: &Target,
    found: Found,
) -> BitmapPlan {
    let asked = Asked {
        bitmaps: options.bitmaps.clone(),
        renames: options.renames.clone(),
        skips_broken: options.skip_broken_bitmaps,
        hint: HINT,
    };
    let holder = Holder {
        cannot: cannot_hold(target, &found),
        size: source.disk.chain.virtual_size(),
        max_bytes: MAX_BITMAP_BYTES,
    };
    let plan = carry::plan(&source.disk.bitmaps, &asked, &holder);
    BitmapPlan { found: found.bitmaps, ..plan }
}

fn cannot_hold(target: &Target, found: &Found) -> Option<String> {
    match target {
        Target::Raw | Target::RawInPlace => Some(NO_PLACE_IN_RAW.into()),
        Target::Qcow2 { shape, .. } => (shape.version < 3).then(|| NO_PLACE_IN_VERSION_2.into()),
        Target::Qcow2InPlace => found.is_version_2.then(|| NO_PLACE_IN_VERSION_2.into()),
    }
}

/// Bitmaps that are carried, with their bits and under their new names.
pub(super) fn load(source: &Source, plan: &BitmapPlan) -> Result<Vec<PersistentBitmap>> {
    let bitmaps = carry::load(&source.disk.bitmaps, plan)?.into_iter();
    let stored = bitmaps.map(|Bitmap { name, granularity_bits, is_enabled, bits }| {
        PersistentBitmap { name, granularity_bits, is_enabled, bits }
    });
    Ok(stored.collect())
}

/// What to say of the source's bitmaps once the carried ones are valid at the destination.
pub(super) fn reports(plan: &BitmapPlan) -> Vec<BitmapReport> {
    carry::reports(plan, BitmapOutcome::Preserved)
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
