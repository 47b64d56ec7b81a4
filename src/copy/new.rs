//! Making a new destination: temporary files, transfer, bitmaps, seal, proof, publication.

use std::path::PathBuf;
use std::sync::Arc;

use block_mig::device::ChainBacking;
use block_mig::journal::Keeper;
use block_mig::limits::{MAX_UNIT_BYTES, UNIT_BYTES, workers};
use block_mig::recorded::Recorded;
use block_mig::{TransferOptions, Transferred, transfer};
use format_spec::Blame;
use format_spec::native::journal::UNPROVED;
use mig_core::block::BlockSink;
use qcow2_file::Opener;
use qcow2_file::create::Backing;

use super::metered::Metered;
use super::options::{CopyOptions, Existing};
use super::plan::Job;
use super::resolve::Source;
use super::target::Target;
use super::{Done, bitmaps, prove, receipt};
use crate::berth::{Half, Log, NewDisk, NewKind, Unfinished, publish_together, recover};
use crate::carry::Asked;
use crate::facts::{Facts, FileFacts, host};
use crate::observe::Progress;
use crate::report::Verified;
use crate::{Error, Observer, Phase, Result, preserve};

/// Copies to a new destination. Nothing has a final name before everything is durable and proved.
/// What an error leaves is gone on with by the same command, where there is a journal and the error
/// is not in the source's bytes.
pub(super) fn copy(job: &Job<'_>, observer: &dyn Observer) -> Result<Done> {
    let unfinished = Unfinished::open(&disk(job)?)?;
    let is_kept = unfinished.keeper().is_some();
    let done = finish(job, &unfinished, observer);
    match &done {
        // A source that is damaged stays so: there is nothing to go on with.
        Err(error) if !is_kept || error.blame() == Blame::Bytes => unfinished.forsake()?,
        Err(_) => observer.warning(
            "what was copied so far is kept: the same command goes on with it, --fresh starts anew",
        ),
        Ok(_) => {}
    }
    done
}

fn finish(job: &Job<'_>, unfinished: &Unfinished, observer: &dyn Observer) -> Result<Done> {
    let is_resumed = unfinished.is_resumed;
    let repeated = if is_resumed { recheck(job, unfinished, observer)? } else { 0 };
    let moved = move_data(job, unfinished.sink(), unfinished.keeper(), observer)?;
    observer.phase(Phase::Bitmaps);
    let stored = bitmaps::load(&job.source, &job.bitmaps)?;
    observer.phase(Phase::Seal);
    unfinished.seal(&stored)?;
    let proof = prove::new_destination(job, unfinished, &moved, &stored, observer)?;
    if proof.verified == Verified::Mismatch {
        unfinished.forsake()?;
    } else {
        observer.phase(Phase::Publish);
        go_on(observer)?;
        let what = job.options.preserve;
        if let Some(model) = job.source.disk.files().next() {
            unfinished.attribute(|draft| preserve::of(model, what, draft))?;
        }
        unfinished.prepare(proof.content.unwrap_or(UNPROVED))?;
        let replaces = job.options.existing == Existing::Replace;
        publish_together(&[unfinished], replaces, |_| {
            let stamp = Some(unfinished.stamp());
            receipt::write_or_warn(job, (unfinished.log(), observer), (&proof, stamp), &stored);
            Ok(())
        })?;
    }
    Ok(Done { moved, proof, invalidated: Vec::new(), is_resumed, repeated })
}

/// Reads again what an earlier try left; how many bytes of it are of no use.
fn recheck(job: &Job<'_>, unfinished: &Unfinished, observer: &dyn Observer) -> Result<u64> {
    let known = unfinished.keeper().map_or(0, Keeper::claimed_bytes);
    let progress = Progress::begin(observer, Phase::Recheck, known);
    let source = job.source.blocks();
    let found = unfinished.recheck(Some(&*source), workers(job.options.workers), &progress)?;
    progress.end();
    Ok(found.lost.saturating_mul(UNIT_BYTES))
}

/// What the destination is to be.
fn disk<'a>(job: &'a Job<'_>) -> Result<NewDisk<'a>> {
    let kind = match &job.target {
        Target::Qcow2 { shape, data_file } => {
            NewKind::Qcow2 { shape: *shape, data_file: data_file.as_ref(), backing: backing(job)? }
        }
        _ => NewKind::Raw,
    };
    Ok(NewDisk {
        path: &job.options.destination,
        size: job.source.disk.chain.virtual_size(),
        kind,
        below: receipt::below(job),
        session: Some(job.session),
        resumes: resumes(job),
        is_fresh: job.options.fresh,
        wishes: String::new(),
    })
}

/// Finishes the publication of this very copy, which a crash interrupted. Where it was another
/// copy's, that one is to be given again: nothing is published that was not asked for.
pub(super) fn recover_publication(job: &mut Job<'_>) -> Result<bool> {
    let options = job.options;
    if options.existing == Existing::InPlace || options.fresh {
        return Ok(false);
    }
    let destination = options.destination.as_path();
    let begun = Log::beside(destination)?.peek()?;
    let Some(begun) = begun.filter(|found| found.is_committing && found.prepared.is_some()) else {
        return Ok(false);
    };
    if begun.identity.session != job.session {
        let reason = format!(
            "another copy had begun to publish {} when it was killed: give that command again, or \
             begin anew with --fresh",
            destination.display()
        );
        return Err(Error::Usage { reason });
    }
    // Whoever finishes it holds what it replaces.
    job.let_go();
    let job = &*job;
    let targets: Vec<_> = job.target.data_file().into_iter().chain([destination]).collect();
    let place = Half { files: targets, below: receipt::below(job), target: None };
    recover(&[place], options.existing == Existing::Replace, |_, log, found| {
        receipt::of_recovered(job, log, found)
    })?;
    Ok(true)
}

/// Whether the same command can go on with what this one leaves: not where nothing is hashed, nor
/// above a backing file.
pub(super) fn resumes(job: &Job<'_>) -> bool {
    !job.options.no_verify && job.source.kept.is_none()
}

/// The session of a copy, by its source as it is now.
pub(super) fn session(options: &CopyOptions, source: &Source, target: &Target) -> Result<[u8; 16]> {
    let failed = |path: PathBuf| move |source| Error::File { action: "look at", path, source };
    let facts = |file: &Arc<qcow2_file::HostFile>| {
        FileFacts::of(file.file()).map_err(failed(file.path().to_owned()))
    };
    let files = source.disk.files().map(facts).collect::<Result<_>>()?;
    let destination = &options.destination;
    let absolute = std::path::absolute(destination).map_err(failed(destination.clone()))?;
    let bitmaps = Asked::wishes(&options.bitmaps, &options.renames, options.skip_broken_bitmaps);
    let formats = source.disk.chain.layers().iter().map(qcow2_file::Layer::format);
    let read_as = format!("{:?}", formats.collect::<Vec<_>>());
    let kept = source.kept.as_ref().map(|kept| format!("{kept:?}")).unwrap_or_default();
    let facts = Facts {
        host: host(),
        disks: vec![(String::new(), source.disk.chain.virtual_size(), files)],
        destination: absolute.into_os_string().into_encoded_bytes(),
        wishes: vec!["copy".to_owned(), read_as, format!("{target:?}"), bitmaps, kept],
    };
    Ok(facts.session())
}

fn backing(job: &Job<'_>) -> Result<Option<Backing>> {
    let Some(kept) = &job.source.kept else { return Ok(None) };
    let opener =
        Opener::new().format(Some(kept.format.into())).allow_named_files(job.options.allow_backing);
    Ok(Some(Backing {
        name: kept.name.clone(),
        format: Some(kept.format.to_string()),
        reader: Some(Arc::new(ChainBacking(opener.open(&kept.path)?))),
    }))
}

/// Moves the guest's data. What was asked of the proof decides whether it is hashed on the way.
pub(super) fn move_data(
    job: &Job<'_>,
    sink: &dyn BlockSink,
    keeper: Option<&Keeper>,
    observer: &dyn Observer,
) -> Result<Transferred> {
    let known = keeper.map_or(0, Keeper::claimed_bytes);
    let total = job.survey.content.saturating_sub(known);
    let progress = Progress::begin(observer, Phase::Transfer, total);
    let largest_cluster = job.source.disk.image().map_or(0, |i| i.geometry().cluster_size());
    let options = TransferOptions {
        scope: job.source.scope(),
        hashes: !job.options.no_verify,
        fingerprint: prove::seed(job)?,
        offers_compressed: job.passes_compressed(),
        workers: workers(job.options.workers),
        unit_bytes: largest_cluster.clamp(UNIT_BYTES, MAX_UNIT_BYTES),
        keeper,
    };
    let blocks = job.source.blocks();
    let recorded = Recorded { source: &*blocks, runs: &job.runs };
    let source = Metered { source: &recorded, meter: &job.options.meter, observer };
    let moved = transfer(&source, sink, &options, &progress)?;
    job.source.check_unchanged(observer)?;
    progress.end();
    Ok(moved)
}

/// Stops if the user wants to.
pub(super) fn go_on(observer: &dyn Observer) -> Result<()> {
    if observer.is_cancelled() { Err(Error::Interrupted) } else { Ok(()) }
}
