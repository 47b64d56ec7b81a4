//! What would be sent, decided before anything is: images are opened, bitmaps chosen, and what
//! stands in the way is found, by asking the destination's monitor too where there is one.

use std::collections::BTreeSet;
use std::path::Path;

use bitmap_mig::{Decision, Fate};
use block_mig::device::{AboveSource, ChainSource};
use block_mig::limits::UNIT_BYTES;
use block_mig::plan::{Scope, Units};
use mig_core::block::{BlockSource, is_zero};
use qcow2_file::chain::Backing;

use super::bitmaps::OutgoingBitmap;
use super::chunks::{CHUNK, Chunk, Chunks};
use super::options::{Options, SourceDisk};
use super::preflight::{self, Wish};
use super::selection::{MAX_NAME, check_mentions, select};
use crate::copy::BitmapSelection;
use crate::disk::{Disk, Request};
use crate::qemu::Version;
use crate::qemu::peer::Peer;
use crate::qemu::qmp::{self, Hurry};
use crate::renames::Renames;
use crate::{Error, Observer, Phase, Result};

/// A migration to QEMU that is decided: nothing stands in its way that can be known from here.
#[derive(Debug)]
pub struct Prepared<'a> {
    pub(super) options: &'a Options,
    pub(super) disks: Vec<PlannedDisk>,
    pub(super) peer: Option<Peer>,
}

/// A disk that is sent.
#[derive(Debug)]
pub(super) struct PlannedDisk {
    pub(super) id: String,
    pub(super) disk: Disk,
    /// Whether only what stands above its backing file is sent.
    pub(super) is_above: bool,
    pub(super) decision: Decision,
    /// Bitmaps that are there and cannot even be listed: why.
    pub(super) unlistable: Option<String>,
}

/// A bitmap that is sent, and where it comes from.
#[derive(Debug, Clone)]
pub(crate) struct PlannedBitmap {
    /// Position of its disk.
    pub(crate) disk: usize,
    /// Its name at the source.
    pub(crate) source_name: String,
    pub(crate) wire: OutgoingBitmap,
}

impl<'a> Prepared<'a> {
    /// Opens the disks, chooses the bitmaps and refuses what would lose one, kill the destination
    /// or make no sense. Nothing is sent.
    pub(super) fn decide(
        options: &'a Options,
        hurry: &Hurry,
        observer: &dyn Observer,
    ) -> Result<Self> {
        observer.phase(Phase::Plan);
        check_ids(&options.disks)?;
        Renames::check(&options.renames)?;
        let peer_qmp = options.peer_qmp.as_deref();
        let mut peer = peer((peer_qmp, hurry), options.blocks.then_some(options.version))?;
        let mut refusals = Vec::new();
        let mut disks = Vec::with_capacity(options.disks.len());
        for disk in &options.disks {
            disks.push(PlannedDisk::open(disk, options, observer, &mut refusals)?);
        }
        let names: Vec<_> = disks.iter().map(|d| (d.id.as_str(), d.bitmap_names())).collect();
        refusals.splice(0..0, check_mentions(options, &names));
        if !refusals.is_empty() {
            return Err(refusals.swap_remove(0));
        }
        let mut prepared = Self { options, disks, peer: None };
        if let Some(peer) = &mut peer {
            let disks = prepared.disks.iter().filter(|_| options.blocks);
            let wish = Wish {
                disks: disks.map(|disk| (disk.id.as_str(), disk.size())).collect(),
                bitmaps: &prepared.bitmaps(),
                machine: &options.machine,
                uuid: options.uuid,
            };
            preflight::check(&wish, peer, observer)?;
        }
        // A transfer of nothing is no mistake, and hardly what was meant.
        if !options.blocks && options.bitmaps == BitmapSelection::None {
            observer.warning("neither contents nor bitmaps are to be sent");
        }
        prepared.peer = peer;
        Ok(prepared)
    }

    /// The bitmaps that are sent, disk by disk.
    pub(super) fn bitmaps(&self) -> Vec<PlannedBitmap> {
        let disks = self.disks.iter().enumerate();
        disks.flat_map(|(index, disk)| disk.bitmaps(index)).collect()
    }
}

/// The destination's monitor, if there is one; what ends the waiting for it. Refuses contents
/// (`blocks`: to which version) that it has no place for.
pub(crate) fn peer(
    (path, hurry): (Option<&Path>, &Hurry),
    blocks: Option<Version>,
) -> Result<Option<Peer>> {
    let connect = |path| {
        let peer = Peer::connect(path, qmp::PATIENCE, hurry.clone());
        peer.map_err(crate::qemu::Error::Monitor)
    };
    let peer = path.map(connect).transpose()?;
    if let Some(version) = blocks {
        let found = peer.as_ref().map(Peer::version);
        found.unwrap_or(version).min(version).require_block_section()?;
        // A new QEMU with an old machine type has no place for contents either.
        found.map_or(Ok(()), Version::require_block_section)?;
    }
    Ok(peer)
}

fn check_ids(disks: &[SourceDisk]) -> Result<()> {
    let refuse = |reason| Err(Error::Usage { reason });
    if disks.is_empty() {
        return refuse("there is nothing to send: name a disk with --disk ID=PATH".to_owned());
    }
    let mut seen = BTreeSet::new();
    for SourceDisk { id, .. } in disks {
        if id.is_empty() || id.len() > MAX_NAME || id.contains('\0') {
            return refuse(format!("the disk name {id:?} does not have 1 to {MAX_NAME} bytes"));
        }
        if !seen.insert(id) {
            return refuse(format!("two disks are called {id:?}"));
        }
    }
    Ok(())
}

impl PlannedDisk {
    fn open(
        wanted: &SourceDisk,
        options: &Options,
        observer: &dyn Observer,
        refusals: &mut Vec<Error>,
    ) -> Result<Self> {
        // Bitmaps are in the top layer: for them alone nothing below it is opened.
        let backing = if options.blocks { Backing::Named } else { Backing::Ignored };
        let request = Request {
            allow_named: options.allow_backing,
            backing,
            ..Request::new(&wanted.path, wanted.format)
        };
        let disk = Disk::open(&request, observer)?;
        let unlistable = disk.bitmaps.unlistable();
        let is_accepted = options.skip_broken_bitmaps || options.bitmaps == BitmapSelection::None;
        if let Some(reason) = unlistable.as_ref().filter(|_| !is_accepted) {
            refusals.push(Error::WouldLose {
                reason: format!("disk {:?}: {reason}", wanted.id),
                hint:
                    "use --skip-broken-bitmaps to go on without them, or `bitferry bitmap repair`"
                        .to_owned(),
            });
        }
        let directory = disk.bitmaps.directory().map(qcow2_file::bitmaps::Bitmaps::list);
        let listed: Vec<_> =
            directory.unwrap_or_default().iter().map(bitmap_mig::summary).collect();
        let size = disk.chain.virtual_size();
        let decision = select((&wanted.id, size), &listed, options, refusals);
        let is_above = options.shared_base && disk.chain.layers().len() > 1;
        let planned = Self { id: wanted.id.clone(), disk, is_above, decision, unlistable };
        if options.blocks {
            refusals.extend(planned.check_size()?);
        }
        Ok(planned)
    }

    /// The block section has chunks of 1 MiB only, and QEMU dies when one reaches beyond the end of
    /// its disk: a smaller disk can be sent only as zeroes.
    fn check_size(&self) -> Result<Option<Error>> {
        let size = self.size();
        let len = usize::try_from(size.min(CHUNK)).unwrap_or(usize::MAX);
        let mut content = vec![0; len];
        if size >= CHUNK || size == 0 {
            return Ok(None);
        }
        self.blocks().read_at(&mut content, 0)?;
        if is_zero(&content) {
            return Ok(None);
        }
        Ok(Some(Error::WouldLose {
            reason: format!(
                "disk {:?} has {size} bytes: QEMU's stream carries contents in chunks of {CHUNK} \
                 bytes and QEMU dies of one that reaches beyond the end of the disk",
                self.id
            ),
            hint: "resize the disk to 1M at both ends, or send bitmaps alone with --no-blocks and \
                   copy the disk"
                .to_owned(),
        }))
    }

    pub(super) fn size(&self) -> u64 {
        self.disk.chain.virtual_size()
    }

    /// What is read.
    pub(super) fn blocks(&self) -> Box<dyn BlockSource + '_> {
        let chain = &self.disk.chain;
        // As with QEMU's `migrate -i`, only the top layer counts.
        if self.is_above {
            Box::new(AboveSource { chain, layers: 1 })
        } else {
            Box::new(ChainSource(chain))
        }
    }

    /// The chunks of what is read, in order.
    pub(super) fn chunks<'s>(
        &self,
        source: &'s dyn BlockSource,
    ) -> impl Iterator<Item = block_mig::Result<Chunk>> + use<'s> {
        let scope = if self.is_above { Scope::Above } else { Scope::Whole };
        Chunks::new(Units::new(source, scope, UNIT_BYTES), source.size())
    }

    /// `None` where they cannot be listed.
    fn bitmap_names(&self) -> Option<Vec<&str>> {
        let names = self.decision.choices.iter().map(|choice| choice.bitmap.name.as_str());
        self.unlistable.is_none().then(|| names.collect())
    }

    fn bitmaps(&self, index: usize) -> impl Iterator<Item = PlannedBitmap> + '_ {
        self.decision.choices.iter().filter_map(move |choice| {
            let Fate::Carried(name) = &choice.fate else { return None };
            let bitmap = &choice.bitmap;
            let wire = OutgoingBitmap {
                device: self.id.clone(),
                name: name.clone(),
                disk_size: self.size(),
                // An image has none beyond 2 GiB.
                granularity: u32::try_from(bitmap.granularity).unwrap_or(u32::MAX),
                is_enabled: bitmap.is_enabled,
                is_persistent: bitmap.is_persistent,
            };
            Some(PlannedBitmap { disk: index, source_name: bitmap.name.clone(), wire })
        })
    }
}
