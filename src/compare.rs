//! Compare two images as a guest and a backup program see them.

use std::path::PathBuf;

use block_mig::device::ChainSource;
use block_mig::first_difference;
use block_mig::limits::{UNIT_BYTES, workers};
use block_mig::plan::{Scope, survey};
use qcow2_file::bitmaps::{Bitmaps, State};
use serde::Serialize;

use crate::copy::{BitmapSelection, Format};
use crate::disk::{Disk, Request};
use crate::observe::Progress;
use crate::{Error, Observer, Phase, Result};

/// What to compare, and how.
#[derive(Debug, Clone, Default)]
pub struct CompareOptions {
    /// One image.
    pub a: PathBuf,
    /// The other.
    pub b: PathBuf,
    /// Format of `a`; probed where `None`.
    pub format_a: Option<Format>,
    /// Format of `b`; probed where `None`.
    pub format_b: Option<Format>,
    /// Open backing and data files that the images name.
    pub allow_backing: bool,
    /// A longer image equals a shorter one if the rest is zero.
    pub allow_size: bool,
    /// Which bitmaps count: `None` compares all of them where both sides can hold some.
    pub bitmaps: Option<BitmapSelection>,
}

/// How the content of two images compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct ContentComparison {
    /// Whether a guest sees the same bytes.
    pub equal: bool,
    /// Byte offset of the first difference; the shorter size where only the sizes differ.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first_difference: Option<u64>,
}

/// How one bitmap name compares.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BitmapComparison {
    /// The name.
    pub name: String,
    /// Whether both sides have it with the same bits, granularity and flags.
    pub equal: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Comparison {
    /// Whether everything that was compared is equal.
    pub equal: bool,
    /// The guest-visible content.
    pub content: ContentComparison,
    /// The bitmaps, by name; empty where they were not compared.
    pub bitmaps: Vec<BitmapComparison>,
}

impl Comparison {
    /// 0 if equal, else 1.
    pub fn exit_status(&self) -> u8 {
        u8::from(!self.equal)
    }
}

/// Compares two images. Stops reading at the first difference of content.
pub fn run(options: &CompareOptions, observer: &dyn Observer) -> Result<Comparison> {
    let open = |path, format, format_option| {
        let allow_named = options.allow_backing;
        let request = Request { allow_named, format_option, ..Request::new(path, format) };
        Disk::open(&request, observer)
    };
    let a = open(&options.a, options.format_a, "-f ")?;
    let b = open(&options.b, options.format_b, "-F ")?;
    let both_can = a.image().is_some() && b.image().is_some();
    let names = match &options.bitmaps {
        None if both_can => all_names(&a, &b),
        None | Some(BitmapSelection::None) => Vec::new(),
        Some(BitmapSelection::All) => all_names(&a, &b),
        Some(BitmapSelection::Named(names)) => known(names, &all_names(&a, &b))?,
    };
    let counts = options.bitmaps.as_ref().map_or(both_can, |b| *b != BitmapSelection::None);
    let content = contents(&a, &b, options.allow_size, observer)?;
    let mut bitmaps: Vec<_> =
        names.iter().map(|name| one_bitmap(name, &a, &b)).collect::<Result<_>>()?;
    if counts {
        bitmaps.extend(unlistable(&a, &b));
    }
    let equal = content.equal && bitmaps.iter().all(|b| b.equal);
    Ok(Comparison { equal, content, bitmaps })
}

fn contents(
    a: &Disk,
    b: &Disk,
    allow_size: bool,
    observer: &dyn Observer,
) -> Result<ContentComparison> {
    let sources = [ChainSource(&a.chain), ChainSource(&b.chain)];
    let mut total = 0;
    for source in &sources {
        total = total.max(survey(source, Scope::Whole, UNIT_BYTES)?.content);
    }
    let progress = Progress::begin(observer, Phase::Read, total);
    let found = first_difference(&sources[0], &sources[1], workers(None), &progress)?;
    progress.end();
    let sizes = [a.chain.virtual_size(), b.chain.virtual_size()];
    let by_size = (sizes[0] != sizes[1] && !allow_size).then(|| sizes[0].min(sizes[1]));
    let first_difference = match (found.map(|d| d.offset), by_size) {
        (Some(content), Some(size)) => Some(content.min(size)),
        (content, size) => content.or(size),
    };
    Ok(ContentComparison { equal: first_difference.is_none(), first_difference })
}

/// Every name that either side has, in the order of `a`, then of `b`.
fn all_names(a: &Disk, b: &Disk) -> Vec<String> {
    let names = |disk: &Disk| -> Vec<String> {
        let directory = disk.bitmaps.directory();
        directory.iter().flat_map(|d| d.list()).map(|e| e.name().to_owned()).collect()
    };
    let mut found = names(a);
    let others: Vec<_> = names(b).into_iter().filter(|name| !found.contains(name)).collect();
    found.extend(others);
    found
}

/// The names that were asked for, each once. One that neither side has is a slip of the pen.
fn known(asked: &[String], all: &[String]) -> Result<Vec<String>> {
    if let Some(unknown) = asked.iter().find(|name| !all.contains(name)) {
        return Err(Error::Usage { reason: format!("neither image has a bitmap {unknown:?}") });
    }
    Ok(all.iter().filter(|name| asked.contains(name)).cloned().collect())
}

/// A side whose bitmaps nobody can name equals nothing.
fn unlistable(a: &Disk, b: &Disk) -> Vec<BitmapComparison> {
    let sides = [(a, "first"), (b, "second")].into_iter();
    let of_side = |(disk, side): (&Disk, &str)| {
        disk.bitmaps.unlistable().map(|why| BitmapComparison {
            name: "*".into(),
            equal: false,
            reason: Some(format!("the {side} image: {why}")),
        })
    };
    sides.filter_map(of_side).collect()
}

fn one_bitmap(name: &str, a: &Disk, b: &Disk) -> Result<BitmapComparison> {
    let reason = difference(name, a.bitmaps.directory(), b.bitmaps.directory())?;
    Ok(BitmapComparison { name: name.to_owned(), equal: reason.is_none(), reason })
}

/// The first way in which a bitmap of that name differs.
fn difference(name: &str, a: Option<&Bitmaps>, b: Option<&Bitmaps>) -> Result<Option<String>> {
    let missing = |side| Ok(Some(format!("only the {side} image has it")));
    let Some((a, left)) = a.and_then(|d| d.find(name).ok().map(|e| (d, e))) else {
        return missing("second");
    };
    let Some((b, right)) = b.and_then(|d| d.find(name).ok().map(|e| (d, e))) else {
        return missing("first");
    };
    for (entry, side) in [(left, "first"), (right, "second")] {
        if entry.state != State::Consistent {
            return Ok(Some(format!("it is inconsistent in the {side} image")));
        }
    }
    if left.granularity() != right.granularity() {
        let text = format!("granularity {} against {}", left.granularity(), right.granularity());
        return Ok(Some(text));
    }
    if left.is_enabled() != right.is_enabled() {
        let side = if left.is_enabled() { "first" } else { "second" };
        return Ok(Some(format!("it is enabled only in the {side} image")));
    }
    let (left, right) = (a.load(name)?, b.load(name)?);
    if left.len() != right.len() {
        return Ok(Some(format!("it has {} bits against {}", left.len(), right.len())));
    }
    Ok((left != right).then(|| "their bits differ".to_owned()))
}
