//! What would be sent to a QEMU, in the words of a plan.

use bitmap_mig::Fate;

use super::plan::{PlannedDisk, Prepared};
use super::report;
use crate::Result;
use crate::copy::PlannedBitmap;
use crate::copy::space::received_bytes;
use crate::send;

impl Prepared<'_> {
    /// What would be sent (`--dry-run`). What stands in the way was refused before.
    pub fn describe(&self) -> Result<send::Plan> {
        let disks = self.disks.iter().map(|disk| describe(self, disk));
        Ok(send::Plan::new(disks.collect::<Result<_>>()?, &[]))
    }
}

/// Bytes of a disk in chunks that will be read.
pub(super) fn bytes_data(disk: &PlannedDisk) -> Result<u64> {
    let source = disk.blocks();
    let mut total = 0u64;
    for chunk in disk.chunks(&*source) {
        let chunk = chunk?;
        let len = if chunk.is_zero { 0 } else { chunk.len_on(disk.size()) };
        total = total.saturating_add(len);
    }
    Ok(total)
}

fn describe(prepared: &Prepared<'_>, disk: &PlannedDisk) -> Result<send::PlannedDisk> {
    let has_blocks = prepared.options.blocks;
    let bytes_data = if has_blocks { bytes_data(disk)? } else { 0 };
    let wanted = prepared.options.disks.iter().find(|wanted| wanted.id == disk.id);
    let bitmap = |choice: &bitmap_mig::Choice| {
        let (becomes, reason) = match &choice.fate {
            Fate::Carried(new) => (Some(new.clone()), None),
            Fate::Unwanted => (None, Some(report::UNWANTED.to_owned())),
            Fate::Left(why) => (None, Some(why.clone())),
        };
        PlannedBitmap { name: choice.bitmap.name.clone(), becomes, reason }
    };
    let choices = disk.decision.choices.iter();
    let carried = choices.filter(|choice| matches!(choice.fate, Fate::Carried(_)));
    let granularities: Vec<_> = carried.map(|choice| choice.bitmap.granularity).collect();
    Ok(send::PlannedDisk {
        id: disk.id.clone(),
        source: wanted.map_or_else(String::new, |wanted| wanted.path.display().to_string()),
        source_format: disk.disk.format(),
        virtual_size: disk.size(),
        bytes_data,
        bytes_zero: if has_blocks { disk.size().saturating_sub(bytes_data) } else { 0 },
        space_needed: received_bytes(bytes_data, disk.size(), &granularities)?,
        not_carried: report::not_carried(disk, has_blocks),
        bitmaps: disk.decision.choices.iter().map(bitmap).collect(),
    })
}
