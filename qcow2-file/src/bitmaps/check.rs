//! Everything that is wrong with the bitmaps of an image, in one go.
//!
//! Only bitmaps are looked at: whether their clusters also serve as guest data or L2 tables is for
//! the walk over all metadata to say.

use std::fmt;

use format_spec::{Malformed, Problem};

use super::load::{State, image_facts, read_directory, stale_extension};
use super::table::Table;
use crate::edit::refcounts::Refcounts;
use crate::error::{Error, Result};
use crate::layout::bitmap_directory::{ImageFacts, LocatedEntry, TableEntry, broken_set_rules};
use crate::layout::extension::BitmapsExtension;
use crate::layout::geometry::Geometry;
use crate::layout::header::Header;
use crate::layout::units::HostOffset;
use crate::limits;
use crate::storage::{Storage, StorageExt};

/// What is wrong with the bitmaps of an image.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BitmapCheck {
    /// The findings in file order, the first [`limits::MAX_BITMAP_FINDINGS`] of them.
    pub findings: Vec<Finding>,
    /// Findings beyond that.
    pub omitted: u64,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The bitmap it concerns; `None` for the directory as a whole.
    pub bitmap: Option<String>,
    /// What it is.
    pub defect: Defect,
}

/// What can be wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Defect {
    /// The extension is there without the autoclear bit: a program that does not know bitmaps wrote
    /// to the image, and its bitmaps are lost.
    Stale {
        /// How many there were.
        count: u32,
    },
    /// The `in_use` flag is set: the content was not saved, or somebody has the image open.
    InUse,
    /// It uses something that is not known here, as the phrase says.
    Unknown(&'static str),
    /// It breaks the format.
    Malformed(Malformed),
    /// A cluster of it has a refcount other than one.
    Refcount {
        /// What the cluster holds.
        role: &'static str,
        /// Where it is.
        at: HostOffset,
        /// Its refcount.
        refcount: u64,
    },
    /// Bits behind the last granule are set. Readers must ignore them.
    TailBits,
    /// The padding behind the name is not zero. Harmless.
    StrayPadding,
}

/// How bad a [`Defect`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// Content is right, and nobody is misled.
    Harmless,
    /// A bitmap cannot be used. The image is sound.
    Lost,
    /// The image breaks the format, or could lose data when it is written.
    Corrupt,
}

impl Defect {
    /// How bad it is.
    pub fn severity(&self) -> Severity {
        match self {
            Self::TailBits | Self::StrayPadding => Severity::Harmless,
            Self::Stale { .. } | Self::InUse | Self::Unknown(_) => Severity::Lost,
            Self::Malformed(_) | Self::Refcount { .. } => Severity::Corrupt,
        }
    }
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stale { count } => write!(
                f,
                "a program that does not know bitmaps wrote to the image, so its {count} bitmaps \
                 are lost"
            ),
            Self::InUse => write!(f, "{}", State::Inconsistent.reason()),
            Self::Unknown(why) => write!(f, "{why}"),
            Self::Malformed(what) => write!(f, "{what}"),
            Self::Refcount { role, at, refcount } => {
                write!(f, "the {role} at {at} has refcount {refcount} instead of 1")
            }
            Self::TailBits => write!(f, "has bits set behind the end of the disk"),
            Self::StrayPadding => write!(f, "has padding that is not zero behind its name"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.bitmap {
            Some(name) => write!(f, "bitmap {name:?}: {}", self.defect),
            None => write!(f, "bitmaps: {}", self.defect),
        }
    }
}

impl BitmapCheck {
    /// The worst of the findings; `None` when there are none.
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|f| f.defect.severity()).max()
    }

    fn push(&mut self, bitmap: Option<&str>, defect: Defect) {
        if self.findings.len() >= limits::MAX_BITMAP_FINDINGS {
            self.omitted += 1;
            return;
        }
        self.findings.push(Finding { bitmap: bitmap.map(str::to_owned), defect });
    }
}

/// Looks at everything that belongs to the bitmaps of an image and goes on after what is wrong.
/// Reads only; fails only when the file cannot be read.
pub fn check(file: &std::sync::Arc<dyn Storage>, header: &Header) -> Result<BitmapCheck> {
    let mut report = BitmapCheck::default();
    let Some(extension) = header.bitmaps() else { return Ok(report) };
    if stale_extension(header).is_some() {
        report.push(None, Defect::Stale { count: extension.count });
        return Ok(report);
    }
    let image = image_facts(&**file, header)?;
    let located = match read_directory(&**file, extension, image) {
        Ok(located) => located,
        Err(Error::Malformed { what, .. }) => {
            report.push(None, Defect::Malformed(what));
            return Ok(report);
        }
        Err(other) => return Err(other),
    };
    for what in broken_set_rules(extension, &located, image.geometry) {
        let owner = located.iter().rev().find(|l| l.at <= what.offset);
        report.push(owner.map(|l| l.entry.name.as_str()), Defect::Malformed(what));
    }
    let refcounts = Refcounts::open(file.clone(), header)?;
    let mut check = Checker { file: &**file, image, refcounts, report, owned: Vec::new() };
    let directory = (extension.directory_offset, extension.directory_size);
    check.own(None, "bitmap directory", directory)?;
    for entry in &located {
        check.bitmap(entry)?;
    }
    check.overlaps(extension, &located);
    Ok(check.report)
}

struct Checker<'a> {
    file: &'a dyn Storage,
    image: ImageFacts,
    refcounts: Refcounts,
    report: BitmapCheck,
    /// Data clusters: offset, and where the table entry stands.
    owned: Vec<(u64, u64)>,
}

impl Checker<'_> {
    fn geometry(&self) -> Geometry {
        self.image.geometry
    }

    fn bitmap(&mut self, located: &LocatedEntry) -> Result<()> {
        let entry = &located.entry;
        let name = Some(entry.name.as_str());
        if located.has_stray_padding {
            self.report.push(name, Defect::StrayPadding);
        }
        match State::of(entry) {
            State::Consistent => {}
            State::Inconsistent => self.report.push(name, Defect::InUse),
            State::Unknown(why) => self.report.push(name, Defect::Unknown(why)),
        }
        let broken = entry.broken_rules(located.at, self.image);
        // Without a sound place and length the table cannot be looked into.
        let is_readable = broken
            .iter()
            .all(|m| m.field != "bitmap_table_offset" && m.field != "bitmap_table_size");
        broken.into_iter().for_each(|m| self.report.push(name, Defect::Malformed(m)));
        if !is_readable {
            return Ok(());
        }
        self.own(name, "bitmap table", (entry.table.0, u64::from(entry.table_entries) * 8))?;
        let table = Table { file: self.file, image: self.image, entry };
        let mut is_sound = true;
        table.raw_entries(0..u64::from(entry.table_entries), |index, at, raw| {
            match table.decode(index, at, raw) {
                Ok(TableEntry::Data(data)) => self.data(name, data, at),
                Ok(_) => Ok(()),
                Err(what) => {
                    is_sound = false;
                    self.report.push(name, Defect::Malformed(what));
                    Ok(())
                }
            }
        })?;
        if is_sound && State::of(entry) == State::Consistent && table.has_tail_bits()? {
            self.report.push(name, Defect::TailBits);
        }
        Ok(())
    }

    /// Looks at a data cluster and notes it for the search for overlaps.
    fn data(&mut self, name: Option<&str>, at: HostOffset, entry_at: u64) -> Result<()> {
        self.own(name, "bitmap data cluster", (at.0, 1))?;
        if self.owned.len() < limits::MAX_CHECKED_BITMAP_CLUSTERS {
            self.owned.push((at.0, entry_at));
        }
        Ok(())
    }

    /// Checks the refcounts of the clusters that `len` bytes at `start` take.
    fn own(
        &mut self,
        name: Option<&str>,
        role: &'static str,
        (start, len): (u64, u64),
    ) -> Result<()> {
        let g = self.geometry();
        for index in 0..g.clusters_for(len) {
            let at = HostOffset(start.saturating_add(index * g.cluster_size()));
            let refcount = match self.refcounts.count(at.0 >> g.cluster_bits()) {
                Ok(count) => count,
                Err(Error::Malformed { what, .. }) => {
                    self.report.push(name, Defect::Malformed(what));
                    return Ok(());
                }
                Err(other) => return Err(other),
            };
            if refcount != 1 {
                self.report.push(name, Defect::Refcount { role, at, refcount });
            }
        }
        Ok(())
    }

    /// Reports data clusters that are named twice, or that lie in a table or in the directory.
    fn overlaps(&mut self, extension: BitmapsExtension, located: &[LocatedEntry]) {
        let size = self.geometry().cluster_size();
        let whole =
            |start: u64, len: u64| (start, start.saturating_add(len.next_multiple_of(size)));
        let tables =
            located.iter().map(|l| (l.entry.table.0, u64::from(l.entry.table_entries) * 8));
        let directory = (extension.directory_offset, extension.directory_size);
        let mut areas: Vec<_> = tables.chain([directory]).map(|(s, l)| whole(s, l)).collect();
        areas.sort_unstable();
        self.owned.sort_unstable();
        let mut broken = Vec::new();
        for pair in self.owned.windows(2) {
            if let [(one, _), (two, at)] = pair
                && one == two
            {
                broken.push((*at, "names a cluster that holds other bitmap data"));
            }
        }
        for (data, at) in &self.owned {
            let below = areas.partition_point(|(start, _)| start <= data);
            if areas.get(..below).and_then(<[_]>::last).is_some_and(|(_, end)| data < end) {
                broken.push((*at, "names a cluster that holds a bitmap table or the directory"));
            }
        }
        for (at, problem) in broken {
            let table_of = |l: &&LocatedEntry| {
                let len = u64::from(l.entry.table_entries) * 8;
                (l.entry.table.0..l.entry.table.0.saturating_add(len)).contains(&at)
            };
            let owner = located.iter().find(table_of).map(|l| l.entry.name.as_str());
            let what = Malformed::new(at, "bitmap table entry", Problem::Other(problem));
            self.report.push(owner, Defect::Malformed(what));
        }
    }
}

impl Table<'_> {
    /// Whether bits behind the last granule are set, in the cluster that holds it.
    fn has_tail_bits(&self) -> Result<bool> {
        let g = self.image.geometry;
        let shape = self.shape();
        let Some(last) = shape.table_entries.checked_sub(1) else { return Ok(false) };
        let mut found = false;
        self.entries(last..last + 1, |_, entry| {
            let TableEntry::Data(at) = entry else { return Ok(()) };
            let start = last * g.cluster_size();
            let mut raw = vec![0; usize::try_from(g.cluster_size()).unwrap_or(0)];
            self.file.read(&mut raw, at.0)?;
            let mut clean = raw.clone();
            self.clear_tail(start, &mut clean);
            found = raw != clean;
            Ok(())
        })?;
        Ok(found)
    }
}
