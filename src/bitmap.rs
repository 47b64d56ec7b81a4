//! Change, show, check and repair the persistent bitmaps of a qcow2 image that nobody writes to.
//!
//! Every function takes the image's lock, so that an image in use is refused, and every change is
//! one atomic step: see [`BitmapEditor`].

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qcow2_file::bitmaps::{
    self, BitmapCheck, BitmapEditor, Bitmaps, Bits, MergeSource, RepairOptions, Repaired,
};
use qcow2_file::chain::{PROBE_BYTES, probe};
use qcow2_file::lock::{self, Lock, Mode};
use qcow2_file::{Access, Chain, Format, HostFile, Opener, Storage};

use crate::disk::is_named_qcow2;
use crate::{Error, Result};

/// One change. Several are made in one step, in their order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// Adds an empty bitmap.
    Add {
        /// Its name, new in the image.
        name: String,
        /// Guest bytes per bit: a power of two from 512 to 2 GiB.
        granularity: u64,
        /// Whether it records writes.
        is_enabled: bool,
    },
    /// Removes a bitmap in whatever state it is.
    Remove(String),
    /// Clears all bits.
    Clear(String),
    /// Lets it record writes, or stop doing so.
    SetEnabled(String, bool),
    /// Sets in one bitmap what is set in others.
    Merge {
        /// The bitmap that takes them in.
        into: String,
        /// Those that are read.
        sources: Vec<String>,
        /// The image that has the sources; the same one where `None`. Of the same virtual size.
        other: Option<PathBuf>,
    },
}

/// What a repair may do beyond what loses nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// Mend what can be mended, and give up what the options allow.
    Mend(RepairOptions),
    /// Remove all bitmaps, whatever state they are in.
    Strip,
    /// Clear the mark of an unfinished in-place copy (SPEC 3.3), on the user's word.
    ClearUnfinished,
}

/// The bits of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dump {
    /// Guest bytes per bit.
    pub granularity: u64,
    /// Guest-visible size of the disk in bytes.
    pub virtual_size: u64,
    /// The bits.
    pub bits: Bits,
}

impl Dump {
    /// Dirty byte ranges in order, as offset and length; the last one ends with the disk.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.bits.runs().map(|run| {
            let start = run.start.saturating_mul(self.granularity);
            let end = run.end.saturating_mul(self.granularity).min(self.virtual_size);
            (start, end.saturating_sub(start))
        })
    }
}

/// Makes changes durable in one atomic step.
pub fn edit(image: &Path, edits: &[Edit]) -> Result<()> {
    let (file, _lock) = open_for_writing(image)?;
    let mut editor = BitmapEditor::open(file)?;
    for edit in edits {
        apply(&mut editor, edit)?;
    }
    Ok(editor.commit()?)
}

fn apply(editor: &mut BitmapEditor, edit: &Edit) -> Result<()> {
    match edit {
        Edit::Add { name, granularity, is_enabled } => {
            editor.add_empty(name, granularity_bits(*granularity)?, *is_enabled)?;
        }
        Edit::Remove(name) => editor.remove(name)?,
        Edit::Clear(name) => editor.clear(name)?,
        Edit::SetEnabled(name, is_enabled) => editor.set_enabled(name, *is_enabled)?,
        Edit::Merge { into, sources, other: None } => {
            let sources: Vec<_> = sources.iter().map(|name| MergeSource::Named(name)).collect();
            editor.merge(into, &sources)?;
        }
        Edit::Merge { into, sources, other: Some(other) } => {
            let opened = Opened::new(other)?;
            for name in sources {
                let bits = &opened.bitmaps.load(name)?;
                let granularity_bits = opened.bitmaps.find(name)?.granularity_bits();
                editor.merge(into, &[MergeSource::Bits { bits, granularity_bits }])?;
            }
        }
    }
    Ok(())
}

/// log2 of a granularity that a bitmap may have.
fn granularity_bits(granularity: u64) -> Result<u8> {
    let bits = granularity.trailing_zeros();
    u8::try_from(bits).ok().filter(|_| granularity.is_power_of_two()).ok_or_else(|| Error::Usage {
        reason: format!("a granularity of {granularity} bytes: it must be a power of two"),
    })
}

/// Loads one bitmap.
pub fn dump(image: &Path, name: &str) -> Result<Dump> {
    let opened = Opened::new(image)?;
    let granularity = opened.bitmaps.find(name)?.granularity();
    let bits = opened.bitmaps.load(name)?;
    Ok(Dump { granularity, virtual_size: opened.chain.virtual_size(), bits })
}

/// Looks at everything that belongs to the bitmaps of an image. Reads only.
pub fn check(image: &Path) -> Result<BitmapCheck> {
    let chain = open_for_reading(image)?;
    let Some(top) = chain.top().as_qcow2() else { return Err(not_qcow2(image)) };
    Ok(bitmaps::check(top.file(), top.header())?)
}

/// Repairs, and says what was done.
pub fn repair(image: &Path, repair: Repair) -> Result<Repaired> {
    let (file, _lock) = open_for_writing(image)?;
    match repair {
        Repair::Mend(options) => Ok(bitmaps::repair(&file, options)?),
        Repair::Strip => {
            let has_leaked = bitmaps::strip(&file)?;
            Ok(Repaired { has_leaked, ..Repaired::default() })
        }
        Repair::ClearUnfinished => {
            bitmaps::clear_unfinished(&*file)?;
            Ok(Repaired::default())
        }
    }
}

/// Why it is not certain that an image is one, if so: only its content says it, which the guest of
/// a raw disk can have written. A sentence for whoever has just changed it.
pub fn doubt(image: &Path) -> Option<String> {
    (!is_named_qcow2(image)).then(|| {
        format!(
            "{} is taken for qcow2 because of its content, which the guest of a raw disk could have \
             written; a raw disk has been changed for its guest now",
            image.display()
        )
    })
}

fn open_for_writing(image: &Path) -> Result<(Arc<dyn Storage>, Lock)> {
    let file = HostFile::open(image, Access::ReadWrite)?;
    let lock = lock::acquire(file.file(), &file.name(), Mode::Write)?;
    let mut first = [0; PROBE_BYTES];
    let failed = |source| Error::File { action: "read", path: image.to_owned(), source };
    file.read_at(&mut first, 0).map_err(failed)?;
    if probe(&first) != Format::Qcow2 {
        return Err(not_qcow2(image));
    }
    Ok((Arc::new(file), lock))
}

/// An image with bitmaps, open for reading. Files that it names are left alone.
struct Opened {
    chain: Chain,
    bitmaps: Bitmaps,
}

impl Opened {
    fn new(image: &Path) -> Result<Self> {
        let chain = open_for_reading(image)?;
        let Some(top) = chain.top().as_qcow2() else { return Err(not_qcow2(image)) };
        let bitmaps = Bitmaps::open(Arc::clone(top.file()), top.header())?;
        let bitmaps = bitmaps.ok_or_else(|| Error::Usage {
            reason: format!("{} holds no bitmaps", image.display()),
        })?;
        Ok(Self { chain, bitmaps })
    }
}

fn open_for_reading(image: &Path) -> Result<Chain> {
    Ok(Opener::new().without_named_files(true).lock(true).open(image)?)
}

fn not_qcow2(image: &Path) -> Error {
    Error::NotQcow2 { path: image.to_owned() }
}
