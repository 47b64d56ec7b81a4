//! Making a new destination: temporary files, transfer, bitmaps, seal, proof, publication.

use std::path::Path;
use std::sync::Arc;

use block_mig::device::{ChainBacking, NewImageSink, RawSink};
use block_mig::limits::{MAX_UNIT_BYTES, UNIT_BYTES};
use block_mig::recorded::Recorded;
use block_mig::{TransferOptions, Transferred, transfer};
use mig_core::block::BlockSink;
use mig_core::meter::Meter;
use qcow2_file::bitmaps::PersistentBitmap;
use qcow2_file::create::{Backing, DataFile, NewImage};
use qcow2_file::{Access, Guard, HostFile, Opener, Storage, preflight};

use super::metered::Metered;
use super::options::Existing;
use super::plan::Job;
use super::shape::Shape;
use super::target::{DataFileTarget, Target};
use super::{Done, bitmaps, preserve, prove};
use crate::observe::Progress;
use crate::publish::{Draft, publish};
use crate::report::Verified;
use crate::{Error, Observer, Phase, Result};

/// A destination under temporary names.
pub(super) struct Unfinished {
    /// Published in this order: what others name comes first.
    pub(super) drafts: Vec<Draft>,
    /// The qcow2 writer, where it is one.
    image: Option<NewImage>,
    size: u64,
}

/// Copies to a new destination. Nothing has a final name before everything is durable and proved.
pub(super) fn copy(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    let unfinished = Unfinished::create(job)?;
    let moved = move_data(job, &*unfinished.sink(), observer)?;
    observer.phase(Phase::Bitmaps);
    let stored = bitmaps::load(&job.source, &job.bitmaps)?;
    observer.phase(Phase::Seal);
    unfinished.seal(&stored)?;
    let proof = prove::new_destination(job, &unfinished, &moved, &stored, observer)?;
    if proof.verified != Verified::Mismatch {
        observer.phase(Phase::Publish);
        go_on(observer)?;
        unfinished.publish(job)?;
    }
    Ok(Done { moved, proof, invalidated: Vec::new() })
}

/// Moves the guest's data. What was asked of the proof decides whether it is hashed on the way.
pub(super) fn move_data(
    job: &Job<'_>,
    sink: &dyn BlockSink,
    observer: &dyn Observer,
) -> Result<Transferred> {
    let progress = Progress::begin(observer, Phase::Transfer, job.survey.content);
    let largest_cluster = job.source.disk.image().map_or(0, |i| i.geometry().cluster_size());
    let options = TransferOptions {
        scope: job.source.scope(),
        hashes: !job.options.no_verify,
        fingerprint: prove::seed(job)?,
        offers_compressed: job.passes_compressed(),
        workers: block_mig::limits::workers(job.options.workers),
        unit_bytes: largest_cluster.clamp(UNIT_BYTES, MAX_UNIT_BYTES),
    };
    let blocks = job.source.blocks();
    let recorded = Recorded { source: &*blocks, runs: &job.runs };
    let meter = Meter::new(job.options.bandwidth.filter(|rate| *rate > 0));
    let source = Metered { source: &recorded, meter: &meter, observer };
    let moved = transfer(&source, sink, &options, &progress)?;
    job.source.check_unchanged(observer)?;
    progress.end();
    Ok(moved)
}

/// Stops if the user wants to.
pub(super) fn go_on(observer: &dyn Observer) -> Result<()> {
    if observer.is_cancelled() { Err(Error::Interrupted) } else { Ok(()) }
}

impl Unfinished {
    /// Creates the temporary files.
    fn create(job: &Job<'_>) -> Result<Self> {
        let size = job.source.disk.chain.virtual_size();
        match &job.target {
            Target::Qcow2 { shape, data_file } => Self::qcow2(job, *shape, data_file.as_ref()),
            _ => {
                let draft = Draft::create(&job.options.destination)?;
                set_length(&draft, size)?;
                Ok(Self { drafts: vec![draft], image: None, size })
            }
        }
    }

    fn qcow2(job: &Job<'_>, shape: Shape, data_file: Option<&DataFileTarget>) -> Result<Self> {
        let size = job.source.disk.chain.virtual_size();
        let mut options = shape.create_options(size);
        let mut drafts = Vec::new();
        if let Some(data) = data_file {
            let draft = Draft::create(&data.path)?;
            options.data_file = Some(DataFile {
                name: data.name.clone().into(),
                is_raw: data.is_raw,
                storage: draft.storage(),
            });
            drafts.push(draft);
        }
        if let Some(kept) = &job.source.kept {
            let opener = Opener::new()
                .format(Some(kept.format.into()))
                .allow_named_files(job.options.allow_backing);
            options.backing = Some(Backing {
                name: kept.name.clone(),
                format: Some(kept.format.to_string()),
                reader: Some(Arc::new(ChainBacking(opener.open(&kept.path)?))),
            });
        }
        let draft = Draft::create(&job.options.destination)?;
        let image = NewImage::create(draft.storage(), &options)?;
        drafts.push(draft);
        Ok(Self { drafts, image: Some(image), size })
    }

    fn sink(&self) -> Box<dyn BlockSink + '_> {
        match (&self.image, self.drafts.first()) {
            (None, Some(draft)) => Box::new(RawSink::new(draft.storage(), self.size)),
            (Some(image), _) => Box::new(NewImageSink(image)),
            // `create` makes one draft at least; an empty sink would be refused by its size.
            (None, None) => Box::new(RawSink::new(Arc::new(qcow2_file::Memory::new()), 0)),
        }
    }

    /// Stores bitmaps and metadata and makes everything durable.
    fn seal(&self, stored: &[PersistentBitmap]) -> Result<()> {
        if let Some(image) = &self.image {
            image.finish(stored)?;
        }
        for draft in &self.drafts {
            sync(draft)?;
        }
        Ok(())
    }

    /// Gives the files their owner, mode and final names.
    fn publish(self, job: &Job<'_>) -> Result<()> {
        let model = job.source.disk.files().next();
        for draft in &self.drafts {
            if let Some(model) = model {
                preserve::like(model, draft)?;
            }
            sync(draft)?;
        }
        if self.drafts.len() > 1 {
            retire(&job.options.destination)?;
        }
        publish(self.drafts, job.options.existing == Existing::Replace)
    }
}

/// Takes the validity of the bitmaps of an overlay whose data file is about to be replaced: between
/// the two renames it would stand on data that it does not describe. SPEC 3.2.
fn retire(overlay: &Path) -> Result<()> {
    if !overlay.exists() {
        return Ok(());
    }
    let file = HostFile::open(overlay, Access::ReadWrite)?;
    // What is no qcow2 image has no bitmaps.
    let has_bitmaps = preflight::read_header(&file).is_ok_and(|h| h.bitmaps().is_some());
    if has_bitmaps { Ok(Guard::invalidate(&file)?) } else { Ok(()) }
}

fn set_length(draft: &Draft, size: u64) -> Result<()> {
    draft.file().set_len(size).map_err(|source| Error::File {
        action: "set the length of",
        path: draft.temporary().to_owned(),
        source,
    })
}

fn sync(draft: &Draft) -> Result<()> {
    draft.file().file().sync_all().map_err(|source| Error::File {
        action: "sync",
        path: draft.temporary().to_owned(),
        source,
    })
}
