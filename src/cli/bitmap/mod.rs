//! `bitmap`: the persistent bitmaps of a qcow2 image at rest.

mod change;
mod look;

use std::path::PathBuf;

use clap::{Args as Group, Subcommand};

use bitferry::bitmap::{Edit, Repair};
use qcow2_file::bitmaps::RepairOptions;

use super::{Outcome, Output, size};

/// List, change, check and repair the bitmaps of a qcow2 image
///
/// Every change is one atomic step: after a crash the image has its old bitmaps or its new ones. An
/// image that is in use is refused, saying by whom.
#[derive(Debug, Group)]
pub(crate) struct BitmapArgs {
    #[command(subcommand)]
    verb: BitmapVerb,
}

#[derive(Debug, Subcommand)]
enum BitmapVerb {
    /// List the bitmaps with granularity, state and dirty bytes
    List {
        /// The image
        image: PathBuf,
    },
    /// Add an empty bitmap
    Add {
        /// Guest bytes per bit: a power of two from 512 to 2G
        #[arg(short, long, value_name = "SIZE", default_value = "64K", value_parser = size::parse)]
        granularity: u64,
        /// Do not record writes yet
        #[arg(long)]
        disabled: bool,
        /// The image
        image: PathBuf,
        /// Name of the new bitmap
        name: String,
    },
    /// Remove bitmaps, in whatever state they are
    Remove(Names),
    /// Clear all bits of bitmaps
    Clear(Names),
    /// Let bitmaps record writes
    Enable(Names),
    /// Let bitmaps stop recording writes
    Disable(Names),
    /// Set in DST, the last bitmap named, every granule that is set in a SRC; granularities may
    /// differ
    Merge {
        /// Take SRC from this image, which has the same virtual size
        #[arg(short = 'b', long, value_name = "OTHER_IMAGE")]
        source_file: Option<PathBuf>,
        /// The image
        image: PathBuf,
        /// Bitmaps to read
        #[arg(required = true, value_name = "SRC")]
        sources: Vec<String>,
        /// The bitmap that takes them in: the last one named
        #[arg(value_name = "DST")]
        into: String,
    },
    /// Print the dirty byte ranges: offset and length, one range per line
    Dump {
        /// The image
        image: PathBuf,
        /// The bitmap
        name: String,
    },
    /// Look for everything that is wrong with the bitmaps
    ///
    /// Exit status 0: nothing that matters, 1: a bitmap cannot be used, 5: the format is broken.
    Check {
        /// The image
        image: PathBuf,
    },
    /// Repair the bitmaps; without an option only what loses nothing
    ///
    /// Exit status 0: nothing is left to repair, 1: a bitmap still cannot be used, 5: the format is
    /// still broken.
    Repair(RepairArgs),
}

/// Bitmaps of an image.
#[derive(Debug, Group)]
struct Names {
    /// The image
    image: PathBuf,
    /// The bitmaps
    #[arg(required = true, value_name = "NAME")]
    names: Vec<String>,
}

/// What may be given up.
#[derive(Debug, Group)]
struct RepairArgs {
    /// Remove bitmaps whose content was not saved
    #[arg(long)]
    remove_inconsistent: bool,
    /// Drop bitmaps that break the format; what nothing else uses of them is freed
    #[arg(long)]
    drop_broken: bool,
    /// Remove all bitmaps
    #[arg(long, conflicts_with_all = ["remove_inconsistent", "drop_broken", "clear_unfinished"])]
    strip: bool,
    /// Clear the mark of an in-place copy that was not finished; the content may be partly old
    #[arg(long, conflicts_with_all = ["remove_inconsistent", "drop_broken"])]
    clear_unfinished: bool,
    /// The image
    image: PathBuf,
}

impl RepairArgs {
    fn plan(&self) -> Repair {
        if self.strip {
            return Repair::Strip;
        }
        if self.clear_unfinished {
            return Repair::ClearUnfinished;
        }
        Repair::Mend(RepairOptions {
            may_remove_inconsistent: self.remove_inconsistent,
            may_drop_broken: self.drop_broken,
        })
    }
}

pub(crate) fn run(args: BitmapArgs, output: &Output) -> Outcome {
    match args.verb {
        BitmapVerb::List { image } => look::list(image, output),
        BitmapVerb::Dump { image, name } => look::dump(&image, &name, output),
        BitmapVerb::Check { image } => look::check(&image, output),
        BitmapVerb::Repair(args) => change::repair(&args.image, args.plan(), output),
        BitmapVerb::Add { granularity, disabled, image, name } => {
            let is_enabled = !disabled;
            change::edit(&image, &[Edit::Add { name, granularity, is_enabled }], output)
        }
        BitmapVerb::Remove(args) => args.each(Edit::Remove, output),
        BitmapVerb::Clear(args) => args.each(Edit::Clear, output),
        BitmapVerb::Enable(args) => args.each(|name| Edit::SetEnabled(name, true), output),
        BitmapVerb::Disable(args) => args.each(|name| Edit::SetEnabled(name, false), output),
        BitmapVerb::Merge { source_file, image, sources, into } => {
            let edit = Edit::Merge { into, sources, other: source_file };
            change::edit(&image, &[edit], output)
        }
    }
}

impl Names {
    /// The same change to all of them, in one step.
    fn each(self, edit: impl Fn(String) -> Edit, output: &Output) -> Outcome {
        let edits: Vec<Edit> = self.names.into_iter().map(edit).collect();
        change::edit(&self.image, &edits, output)
    }
}
