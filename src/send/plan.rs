//! What would be sent, decided before anything is connected.

use std::collections::BTreeSet;

use bitmap_mig::{Bitmap, Fate, Holder};
use block_mig::device::{AboveSource, ChainSource};
use block_mig::limits::UNIT_BYTES;
use block_mig::plan::{Scope, Survey, survey};
use qcow2_file::limits::MAX_BITMAP_BYTES;
use serde::Serialize;

use super::SendOptions;
use crate::carry::{self, Asked, BitmapPlan};
use crate::copy::space::received_bytes;
use crate::copy::{BitmapSelection, Format, PlannedBitmap};
use crate::disk::{Disk, Request};
use crate::options::DiskOption;
use crate::renames::Renames;
use crate::report::{BitmapOutcome, ONLY_BITMAPS, error_chain};
use crate::{Error, Observer, Phase, Result};

/// What to do where a bitmap cannot be carried.
const HINT: &str = "use --bitmaps none to go on without bitmaps or --bitmaps with names for some \
     of them; a raw disk with bitmaps is -O qcow2 -o data_file=FILE,data_file_raw=on";

/// Said of a disk of which what its own image holds is sent.
pub(crate) const BELOW: &str = "the backing file: the destination has its own";

/// What would become of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct PlannedDisk {
    /// Its name on the wire.
    pub id: String,
    /// Its image.
    pub source: String,
    /// Format of the image.
    pub source_format: Format,
    /// Guest-visible bytes.
    pub virtual_size: u64,
    /// Bytes of stored content that would be sent.
    pub bytes_data: u64,
    /// Bytes known to read as zero.
    pub bytes_zero: u64,
    /// Upper estimate of what a new image at the destination allocates, of the shape that it has
    /// where nothing else is asked for there.
    pub space_needed: u64,
    /// What the source has and the destination would not have, one phrase each.
    pub not_carried: Vec<String>,
    /// Every bitmap of the source.
    pub bitmaps: Vec<PlannedBitmap>,
}

/// What would be sent (`--dry-run`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Plan {
    /// In the order in which they were given.
    pub disks: Vec<PlannedDisk>,
    /// Upper estimate of what all of them allocate.
    pub space_needed: u64,
    /// Why it would be refused, one sentence each; empty where it would go on.
    pub refusals: Vec<String>,
    /// The exit status of what is refused, 0 where nothing is. Not part of the JSON.
    #[serde(skip)]
    pub exit_status: u8,
}

impl Plan {
    pub(crate) fn new(disks: Vec<PlannedDisk>, refusals: &[Error]) -> Self {
        let space_needed = disks.iter().map(|disk| disk.space_needed).fold(0, u64::saturating_add);
        let exit_status = refusals.first().map_or(0, Error::exit_status);
        let refusals = refusals.iter().map(|error| error_chain(error)).collect();
        Self { disks, space_needed, refusals, exit_status }
    }
}

/// A disk that is open, and what is decided about it.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) option: DiskOption,
    pub(super) disk: Disk,
    pub(super) reach: Reach,
    /// Of what is sent; of nothing where bitmaps go alone.
    pub(super) survey: Survey,
    /// Bytes that will be read.
    pub(super) content_bytes: u64,
    /// Whether the destination is raw.
    holds_no_bitmaps: bool,
    pub(super) bitmaps: BitmapPlan,
}

/// How much of a disk is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// All of it.
    Whole,
    /// What its own image holds.
    Above,
    /// Bitmaps alone.
    Nothing,
}

impl Reach {
    fn of(options: &SendOptions, disk: &Disk) -> Self {
        match options.blocks {
            false => Self::Nothing,
            true if options.shared_base && disk.chain.layers().len() > 1 => Self::Above,
            true => Self::Whole,
        }
    }

    /// What is sent, and how many bytes are read for it.
    fn survey(self, options: &SendOptions, disk: &Disk) -> Result<(Survey, u64)> {
        let chain = &disk.chain;
        let whole = || survey(&ChainSource(chain), Scope::Whole, UNIT_BYTES);
        Ok(match self {
            Self::Nothing => (Survey::default(), 0),
            Self::Whole => whole().map(|survey| (survey, survey.content))?,
            Self::Above => {
                let above = survey(&AboveSource { chain, layers: 1 }, Scope::Above, UNIT_BYTES)?;
                // The proof is of all that a guest reads.
                let is_hashed = !options.no_verify;
                (above, if is_hashed { whole()?.content } else { above.content })
            }
        })
    }
}

/// Opens all disks and decides everything. What stands in the way is collected.
pub(super) fn decide(
    options: &SendOptions,
    observer: &dyn Observer,
) -> Result<(Vec<Planned>, Vec<Error>)> {
    observer.phase(Phase::Plan);
    check_ids(&options.disks)?;
    Renames::check(&options.renames)?;
    let mut planned = Vec::new();
    for option in &options.disks {
        let request = Request {
            allow_named: options.allow_backing,
            // Bitmaps are in the image itself, and its content may be in use at the destination.
            only_top: !options.blocks,
            ..Request::new(&option.path, option.format)
        };
        planned.push((option.clone(), Disk::open(&request, observer)?));
    }
    // A transfer of nothing is no mistake, and hardly what was meant.
    if !options.blocks && options.bitmaps == BitmapSelection::None {
        observer.warning("neither contents nor bitmaps are to be sent");
    }
    if options.shared_base && planned.iter().all(|(_, disk)| disk.chain.layers().len() < 2) {
        let reason =
            "no disk has a backing file, so nothing stands above one: leave --shared-base out";
        return Err(Error::Usage { reason: reason.to_owned() });
    }
    let mut refusals = unknown_names(options, &planned);
    let mut disks = Vec::new();
    for (option, disk) in planned {
        let holder = Holder {
            cannot: options.cannot_hold.clone(),
            size: disk.chain.virtual_size(),
            max_bytes: MAX_BITMAP_BYTES,
        };
        let asked = asked(options, &option, &disk);
        let mut bitmaps = carry::plan(&disk.bitmaps, &asked, &holder);
        refusals.append(&mut bitmaps.refusals);
        let reach = Reach::of(options, &disk);
        let (survey, content_bytes) = reach.survey(options, &disk)?;
        let holds_no_bitmaps = options.cannot_hold.is_some();
        disks.push(Planned {
            option,
            disk,
            reach,
            survey,
            content_bytes,
            holds_no_bitmaps,
            bitmaps,
        });
    }
    Ok((disks, refusals))
}

/// Each disk has a name of its own.
pub(crate) fn check_ids(disks: &[DiskOption]) -> Result<()> {
    let mut seen = BTreeSet::new();
    let usage = |reason| Err(Error::Usage { reason });
    match disks.iter().find(|disk| !seen.insert(disk.id.as_str())) {
        Some(twice) => usage(format!("--disk {}=…: that ID is given twice", twice.id)),
        None if disks.is_empty() => usage("no disk is given: use --disk ID=PATH".to_owned()),
        None => Ok(()),
    }
}

/// What of the user's wishes is meant for this disk: names of bitmaps that others have are not.
fn asked(options: &SendOptions, option: &DiskOption, disk: &Disk) -> Asked {
    let listed = carry::listed(&disk.bitmaps);
    let has = |name: &String| listed.iter().any(|bitmap| bitmap.name == *name);
    Asked {
        bitmaps: match &options.bitmaps {
            BitmapSelection::Named(names) => {
                BitmapSelection::Named(names.iter().filter(|n| has(n)).cloned().collect())
            }
            all_or_none => all_or_none.clone(),
        },
        renames: Renames::of(&options.renames, &option.id).only(has),
        skips_broken: options.skip_broken_bitmaps,
        hint: HINT,
    }
}

/// Names in the user's wishes that are on no disk.
fn unknown_names(options: &SendOptions, disks: &[(DiskOption, Disk)]) -> Vec<Error> {
    let is_somewhere = |name: &str, node: Option<&String>| {
        let mut meant = disks.iter().filter(|(o, _)| node.is_none_or(|node| *node == o.id));
        // Where they cannot be listed it may be among them.
        let may_have = |disk: &Disk| {
            disk.bitmaps.unlistable().is_some()
                || carry::listed(&disk.bitmaps).iter().any(|b| b.name == name)
        };
        meant.any(|(_, disk)| may_have(disk))
    };
    let mut wanted: Vec<(&str, Option<&String>)> = match &options.bitmaps {
        BitmapSelection::Named(names) => names.iter().map(|n| (n.as_str(), None)).collect(),
        BitmapSelection::All | BitmapSelection::None => Vec::new(),
    };
    wanted.extend(options.renames.iter().map(|r| (r.old.as_str(), r.node.as_ref())));
    let unknown = wanted.into_iter().filter(|(name, node)| !is_somewhere(name, *node));
    let error = |(name, node): (&str, Option<&String>)| Error::Usage {
        reason: match node {
            Some(node) => format!("disk {node:?} has no bitmap {name:?}"),
            None => format!("no disk has a bitmap {name:?}"),
        },
    };
    unknown.map(error).collect()
}

impl Planned {
    /// Bytes that will be read and sent.
    pub(super) fn content_bytes(&self) -> u64 {
        self.content_bytes
    }

    /// Bytes of content that will be sent, as far as its maps tell.
    pub(super) fn sent_content(&self) -> u64 {
        self.survey.data.saturating_add(self.survey.compressed)
    }

    /// Whether only what its own image holds is sent.
    pub(super) fn is_above(&self) -> bool {
        self.reach == Reach::Above
    }

    /// Bytes of the disk that the destination is told of.
    pub(super) fn sent_size(&self) -> u64 {
        match self.reach {
            Reach::Whole => self.disk.chain.virtual_size(),
            Reach::Above => {
                let Survey { data, compressed, zero, .. } = self.survey;
                data.saturating_add(compressed).saturating_add(zero)
            }
            Reach::Nothing => 0,
        }
    }

    /// What the source has and the destination will not have.
    pub(super) fn not_carried(&self) -> Vec<String> {
        let below = match self.reach {
            Reach::Nothing => return vec![ONLY_BITMAPS.to_owned()],
            Reach::Whole => {
                let bitmaps = self.disk.bitmaps_below(usize::MAX);
                self.disk.flattened().into_iter().chain(bitmaps).collect()
            }
            Reach::Above => vec![BELOW.to_owned()],
        };
        let mut phrases: Vec<String> = self.disk.snapshots().into_iter().chain(below).collect();
        if self.survey.compressed > 0 {
            phrases.push(format!("compression of {} bytes: sent plain", self.survey.compressed));
        }
        phrases
    }

    /// Its bitmaps that are carried.
    pub(super) fn load(&self) -> Result<Vec<Bitmap>> {
        carry::load(&self.disk.bitmaps, &self.bitmaps)
    }

    /// An upper estimate of what it takes at the destination.
    fn space_needed(&self, bytes_data: u64) -> Result<u64> {
        if self.holds_no_bitmaps {
            return Ok(bytes_data);
        }
        let choices = self.bitmaps.decision.choices.iter();
        let carried = choices.filter(|choice| matches!(choice.fate, Fate::Carried(_)));
        let granularities: Vec<_> = carried.map(|choice| choice.bitmap.granularity).collect();
        received_bytes(bytes_data, self.disk.chain.virtual_size(), &granularities)
    }

    pub(super) fn describe(&self) -> Result<PlannedDisk> {
        let names = self.bitmaps.decision.choices.iter().map(|c| match &c.fate {
            Fate::Carried(name) => Some(name.clone()),
            Fate::Unwanted | Fate::Left(_) => None,
        });
        let reports = carry::reports(&self.bitmaps, BitmapOutcome::Preserved).into_iter();
        let bitmap = |(report, becomes): (crate::report::BitmapReport, _)| PlannedBitmap {
            name: report.name,
            becomes,
            reason: report.reason,
        };
        let bytes_data = self.sent_content();
        Ok(PlannedDisk {
            id: self.option.id.clone(),
            source: self.option.path.display().to_string(),
            source_format: self.disk.format(),
            virtual_size: self.disk.chain.virtual_size(),
            bytes_data,
            bytes_zero: self.survey.zero,
            space_needed: self.space_needed(bytes_data)?,
            not_carried: self.not_carried(),
            bitmaps: reports.zip(names.chain(std::iter::repeat(None))).map(bitmap).collect(),
        })
    }
}

/// What would be sent, in words.
pub(super) fn describe(disks: &[Planned], refusals: &[Error]) -> Result<Plan> {
    let disks = disks.iter().map(Planned::describe).collect::<Result<_>>()?;
    Ok(Plan::new(disks, refusals))
}
