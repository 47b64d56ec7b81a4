//! What a copy would do, before anything is written: everything is decided here, and what stands in
//! the way is collected, not met halfway.

use block_mig::limits::UNIT_BYTES;
use block_mig::plan::{Survey, survey_noting};
use block_mig::recorded::Runs;
use qcow2_file::{Access, HostFile, Storage};
use serde::Serialize;

use super::bitmaps::{self, BitmapPlan};
use super::in_place;
use super::new::session;
use super::options::{BackingChoice, CopyOptions, Format};
use super::receipt;
use super::resolve::Source;
use super::space::{self, Space};
use super::target::{self, Places, Target};
use crate::info::allocated_bytes;
use crate::publish::{self, directory};
use crate::renames::Renames;
use crate::report::error_chain;
use crate::{Error, Observer, Phase, Result};

/// What would become of one bitmap.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlannedBitmap {
    /// Name at the source.
    pub name: String,
    /// Name at the destination, where it would be carried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub becomes: Option<String>,
    /// Why it would not be carried.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// What a copy would do (`--dry-run`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// The source as given.
    pub source: String,
    /// The destination as given.
    pub destination: String,
    /// Format of the source.
    pub source_format: Format,
    /// Format of the destination.
    pub target_format: Format,
    /// Guest-visible bytes.
    pub virtual_size: u64,
    /// Bytes of stored content that would be read.
    pub bytes_data: u64,
    /// Bytes known to read as zero.
    pub bytes_zero: u64,
    /// Upper estimate of what the destination allocates, in bytes.
    pub space_needed: u64,
    /// What the destination's file system gives, in bytes.
    pub space_free: u64,
    /// What the source has and the destination would not have, one phrase each.
    pub not_carried: Vec<String>,
    /// Every bitmap of the source.
    pub bitmaps: Vec<PlannedBitmap>,
    /// Whether an earlier run had made this very copy, so that nothing would be done.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub already_complete: bool,
    /// Why the copy would be refused, one sentence each; empty where it would go on.
    pub refusals: Vec<String>,
    /// The exit status of the copy itself, as far as it is known before. Not part of the JSON.
    #[serde(skip)]
    pub exit_status: u8,
}

/// A copy that is decided.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) options: &'a CopyOptions,
    pub(super) source: Source,
    pub(super) target: Target,
    pub(super) survey: Survey,
    /// What the survey found, so that the transfer need not look again.
    pub(super) runs: Runs,
    pub(super) space: Space,
    pub(super) bitmaps: BitmapPlan,
    pub(super) not_carried: Vec<String>,
    /// Which copy this is, by the source as it was before it was read.
    pub(super) session: [u8; 16],
    /// What stands in the way, the most telling first.
    pub(super) refusals: Vec<Error>,
    places: Places,
}

/// Decides what a copy would do. Writes nothing.
pub fn plan(options: &CopyOptions, observer: &dyn Observer) -> Result<Plan> {
    let mut job = Job::decide(options, observer)?;
    let already_complete = receipt::finished(&job)?.is_some();
    if already_complete {
        job.refusals.clear();
    } else if let Err(refusal) = in_place::check(&job) {
        job.refusals.push(refusal);
    }
    Ok(Plan { already_complete, ..job.describe() })
}

impl<'a> Job<'a> {
    /// Opens the source and decides everything.
    pub(super) fn decide(options: &'a CopyOptions, observer: &dyn Observer) -> Result<Self> {
        observer.phase(Phase::Plan);
        Renames::check_of_one_disk(&options.renames)?;
        let source = Source::open(options, observer)?;
        let target = Target::decide(options, &source, observer)?;
        let mut places = target::places(options, &source, &target);
        let mut refusals = std::mem::take(&mut places.refusals);
        let found = in_place::inspect(options, &source, &target)?;
        let mut bitmaps = bitmaps::plan(options, &source, &target, found);
        refusals.append(&mut bitmaps.refusals);
        let mut runs = Runs::default();
        let found = survey_noting(&*source.blocks(), source.scope(), UNIT_BYTES, &mut runs)?;
        let mut job = Self {
            options,
            not_carried: not_carried(options, &source, &target, &found),
            session: session(options, &source, &target)?,
            survey: found,
            runs,
            space: Space::default(),
            source,
            target,
            bitmaps,
            refusals,
            places,
        };
        job.check_space()?;
        Ok(job)
    }

    /// The first refusal, if there is one.
    pub(super) fn go_or_refuse(&mut self) -> Result<()> {
        match self.refusals.is_empty() {
            true => Ok(()),
            false => Err(self.refusals.swap_remove(0)),
        }
    }

    /// Lets go of what is to be replaced, for who takes it anew.
    pub(super) fn let_go(&mut self) {
        self.places = Places::default();
    }

    /// Whether compressed clusters can be passed on.
    pub(super) fn passes_compressed(&self) -> bool {
        passes_compressed(&self.source, &self.target)
    }

    fn check_space(&mut self) -> Result<()> {
        let place = directory(self.target.data_path(self.options));
        if !place.exists() {
            return Ok(());
        }
        let needed = match &self.target {
            // At least what has no room there yet; more cannot be told before it is written.
            Target::RawInPlace | Target::Qcow2InPlace => {
                let data = self.survey.data.saturating_add(self.survey.compressed);
                data.saturating_sub(held_bytes(&self.options.destination))
            }
            Target::Raw => self.survey.data.saturating_add(self.survey.compressed),
            Target::Qcow2 { shape, .. } => self.qcow2_bytes(shape.geometry()),
        };
        // What an earlier try left is gone on with, or removed first.
        let left = publish::left_bytes(self.target.data_path(self.options));
        let free = space::free_bytes(place)?.saturating_add(left);
        self.space = Space { needed, free };
        if self.space.needed > self.space.free {
            let Space { needed, free } = self.space;
            self.refusals.push(Error::NoSpace { path: place.to_owned(), needed, free });
        }
        Ok(())
    }

    fn qcow2_bytes(&self, geometry: qcow2_file::layout::geometry::Geometry) -> u64 {
        let mut survey = self.survey;
        let mut compressed = 0;
        // Which layer has them is known cluster by cluster only.
        if fitting(&self.source, &self.target).all(|fits| fits) {
            // How much they take is known cluster by cluster only; no more than all there is.
            compressed = self.source.disk.files().map(|f| allocated_bytes(f)).sum::<u64>();
            compressed = compressed.min(survey.compressed);
        } else {
            survey.data = survey.data.saturating_add(survey.compressed);
        }
        let size = self.source.disk.chain.virtual_size();
        let carried = self.bitmaps.decision.choices.iter();
        let carried = carried.filter(|choice| matches!(choice.fate, bitmap_mig::Fate::Carried(_)));
        let bitmaps =
            carried.map(|choice| space::bitmap_bytes(geometry, size, choice.bitmap.granularity));
        space::qcow2_bytes(geometry, &survey, compressed).saturating_add(bitmaps.sum())
    }

    fn describe(&self) -> Plan {
        let bitmap = |report: crate::report::BitmapReport, becomes: Option<String>| PlannedBitmap {
            name: report.name,
            becomes,
            reason: report.reason,
        };
        let names = self.bitmaps.decision.choices.iter().map(|c| match &c.fate {
            bitmap_mig::Fate::Carried(name) => Some(name.clone()),
            bitmap_mig::Fate::Unwanted | bitmap_mig::Fate::Left(_) => None,
        });
        let reports = bitmaps::reports(&self.bitmaps).into_iter();
        Plan {
            source: self.options.source.display().to_string(),
            destination: self.options.destination.display().to_string(),
            source_format: self.source.disk.format(),
            target_format: self.target.format(),
            virtual_size: self.source.disk.chain.virtual_size(),
            bytes_data: self.survey.data.saturating_add(self.survey.compressed),
            bytes_zero: self.survey.zero,
            space_needed: self.space.needed,
            space_free: self.space.free,
            not_carried: self.not_carried.clone(),
            bitmaps: reports
                .zip(names.chain(std::iter::repeat(None)))
                .map(|(report, name)| bitmap(report, name))
                .collect(),
            already_complete: false,
            refusals: self.refusals.iter().map(|e| error_chain(e)).collect(),
            exit_status: self.refusals.first().map_or(0, Error::exit_status),
        }
    }
}

/// Bytes that the file system has given to a file; a device has all it needs.
fn held_bytes(path: &std::path::Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let found = std::fs::metadata(path).ok().filter(std::fs::Metadata::is_file);
    found.map_or(u64::MAX, |m| m.blocks().saturating_mul(512))
}

/// Whether the destination can hold compressed clusters of the source as they are.
fn passes_compressed(source: &Source, target: &Target) -> bool {
    fitting(source, target).any(|fits| fits)
}

/// Of each qcow2 layer of the source, whether the destination can hold its compressed clusters.
fn fitting<'a>(source: &'a Source, target: &'a Target) -> impl Iterator<Item = bool> + 'a {
    let layers = source.disk.chain.layers().iter().filter_map(qcow2_file::Layer::as_qcow2);
    layers.map(move |image| match target {
        Target::Qcow2 { shape, data_file: None } => {
            image.geometry().cluster_bits() == shape.cluster_bits
                && image.header().compression_type == shape.compression_type
        }
        _ => false,
    })
}

/// What the source has and the destination will not have.
fn not_carried(
    options: &CopyOptions,
    source: &Source,
    target: &Target,
    survey: &Survey,
) -> Vec<String> {
    let mut phrases: Vec<String> = source.disk.snapshots().into_iter().collect();
    if let Some(image) = source.disk.image() {
        let has_data_file = matches!(target, Target::Qcow2 { data_file: Some(_), .. });
        if let (Some(name), false) = (image.header().data_file(), has_data_file) {
            phrases.push(format!("external data file {name:?}: its content is in the copy itself"));
        }
    }
    if !matches!(options.backing, BackingChoice::Keep(_)) {
        phrases.extend(source.disk.flattened());
    }
    let layers = source.kept.as_ref().map_or(usize::MAX, |kept| kept.layers);
    phrases.extend(source.disk.bitmaps_below(layers));
    if survey.compressed > 0 && !passes_compressed(source, target) {
        phrases.push(format!("compression of {} bytes: stored plain", survey.compressed));
    }
    phrases.extend(left_over(options, source, target));
    phrases
}

/// What is on a device that is longer than the disk, which is not the source's: somebody who reads
/// the whole of it finds something else.
fn left_over(options: &CopyOptions, source: &Source, target: &Target) -> Option<String> {
    if *target != Target::RawInPlace {
        return None;
    }
    // What cannot be opened is refused elsewhere.
    let device =
        HostFile::open(&options.destination, Access::Read).ok().filter(HostFile::is_device)?;
    let rest = device
        .len()
        .ok()?
        .checked_sub(source.disk.chain.virtual_size())
        .filter(|rest| *rest > 0)?;
    Some(format!("the end of the device: its last {rest} bytes stay as they are"))
}
