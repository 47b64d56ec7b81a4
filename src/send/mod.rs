//! Send disks at rest with their bitmaps to a destination, and report what became of them.

mod attempts;
mod options;
mod plan;

use std::sync::Arc;
use std::time::Instant;

use bitmap_mig::{Bitmap, SaveBitmap, SaveBitmaps};
use block_mig::device::{AboveSource, ChainSource};
use block_mig::limits::workers;
use block_mig::save::SaveCounts;
use block_mig::{SaveBlocks, SaveDisk, SaveOptions};
use format_spec::Blame;
use format_spec::content_hash::HashError;
use format_spec::native::block::DiskId;
use mig_core::block::BlockSource;
use mig_core::section::SaveHandler;
use mig_core::stream;
use mig_core::transport::{Dial, Nature};

use self::attempts::{Moved, MovedDisk, attempts};
pub use self::options::SendOptions;
pub(crate) use self::plan::{BELOW, check_ids};
pub use self::plan::{Plan, PlannedDisk};
use self::plan::{Planned, decide, describe};
use crate::carry::{self, Asked};
use crate::facts::{Facts, FileFacts, host};
use crate::observe::Progress;
use crate::outgoing::{ExpectedDisk, Next, Outcome, OutgoingOptions, Policy, Round, Sent, send};
use crate::report::{BitmapOutcome, DiskReport, Report, Status, Verified, error_chain};
use crate::{Error, Observer, Phase, Result};

/// What would be sent. Connects nothing.
pub fn plan(options: &SendOptions, observer: &dyn Observer) -> Result<Plan> {
    let (disks, refusals) = decide(options, observer)?;
    describe(&disks, &refusals)
}

/// Sends. On an error the destination has published nothing, or says by itself what it has.
pub fn run(options: &SendOptions, dial: &dyn Dial, observer: &dyn Observer) -> Result<Report> {
    let started = Instant::now();
    check_transport(options, dial.nature())?;
    let (disks, mut refusals) = decide(options, observer)?;
    if !refusals.is_empty() {
        return Err(refusals.swap_remove(0));
    }
    let bitmaps: Vec<Vec<Bitmap>> = disks.iter().map(Planned::load).collect::<Result<_>>()?;
    let session = session(options, &disks)?;
    let expected = expected(&disks, &bitmaps)?;
    let (sent, moved) = attempts(options, dial, |dial, moved| {
        let content = disks.iter().map(Planned::content_bytes).fold(0, u64::saturating_add);
        let progress = Progress::begin(observer, Phase::Transfer, content);
        let sources: Vec<_> = disks.iter().map(Source::of).collect();
        let (handlers, counts) = handlers(options, (&disks, &sources, &bitmaps), &progress)?;
        let expected = moved.sealed_of(&expected);
        moved.begin(counts);
        let outgoing =
            OutgoingOptions { expected, ..outgoing_options(options, session, &progress) };
        let sent = send(dial, handlers, &mut (), &mut OneRound(observer), &outgoing)?;
        progress.end();
        Ok(sent)
    })?;
    wants_no_more_than_was_proved(options, &sent)?;
    Ok(report(options, &disks, &sent, (&moved, started)))
}

/// What an earlier run did without proof is not what a run that asks for one asks for.
fn wants_no_more_than_was_proved(options: &SendOptions, sent: &Sent) -> Result<()> {
    let Outcome::AlreadyComplete(published) = &sent.outcome else { return Ok(()) };
    let wanted = !options.no_verify && options.blocks;
    match published.iter().find(|disk| wanted && disk.content.is_none()) {
        Some(disk) => Err(Error::NeverProved { name: disk.name.clone() }),
        None => Ok(()),
    }
}

/// A disk as it is read.
struct Source<'a> {
    whole: ChainSource<'a>,
    top: AboveSource<'a>,
    /// Whether only what the top layer holds is sent.
    is_above: bool,
}

impl<'a> Source<'a> {
    fn of(planned: &'a Planned) -> Self {
        let chain = &planned.disk.chain;
        let (whole, top) = (ChainSource(chain), AboveSource { chain, layers: 1 });
        Self { whole, top, is_above: planned.is_above() }
    }

    fn above(&self) -> Option<&dyn BlockSource> {
        self.is_above.then_some(&self.top as &dyn BlockSource)
    }
}

/// What the transport cannot do is refused, not left out.
fn check_transport(options: &SendOptions, nature: Nature) -> Result<()> {
    let usage = |reason: &str| Err(Error::Usage { reason: reason.to_owned() });
    if options.channels > nature.max_connections {
        return usage("this transport has one connection: leave --channels out");
    }
    if nature.is_one_way && options.compression.is_some() {
        return usage(
            "nobody answers over this transport what it can decompress: leave --compress out, and \
             compress the stream outside",
        );
    }
    if nature.is_one_way && options.no_verify {
        return usage(
            "nobody answers over this transport, so that the destination alone can prove what it \
             publishes: leave --no-verify out",
        );
    }
    Ok(())
}

type Parts<'a> = (&'a [Planned], &'a [Source<'a>], &'a [Vec<Bitmap>]);
type Handlers<'a> = (Vec<Box<dyn SaveHandler + 'a>>, Vec<Arc<SaveCounts>>);

fn handlers<'a>(
    options: &SendOptions,
    (disks, sources, bitmaps): Parts<'a>,
    progress: &'a Progress<'_>,
) -> Result<Handlers<'a>> {
    let mut saved = Vec::new();
    let mut saved_bitmaps = Vec::new();
    for (((id, disk), source), bitmaps) in (0..).map(DiskId).zip(disks).zip(sources).zip(bitmaps) {
        let (name, source, above) = (disk.option.id.clone(), &source.whole, source.above());
        saved.push((SaveDisk { id, name, source, dirty: None }, above));
        let disk_size = disk.disk.chain.virtual_size();
        let of_disk = |bitmap| SaveBitmap { disk: id, disk_size, bitmap };
        saved_bitmaps.extend(bitmaps.iter().map(of_disk));
    }
    let hashes = !options.no_verify;
    let save = SaveOptions { hashes, workers: workers(None), monitor: progress };
    let blocks = match options.blocks {
        true => SaveBlocks::above(saved, save)?,
        false => {
            let disks = saved.into_iter().map(|(disk, _)| disk).collect();
            SaveBlocks::without_content(disks, save)?
        }
    };
    let content = (0..).map(DiskId).zip(disks.iter().map(Planned::sent_content));
    let blocks = content.fold(blocks, |blocks, (disk, bytes)| blocks.telling(disk, bytes));
    let counts = blocks.counts();
    let bitmaps = SaveBitmaps::new(saved_bitmaps, hashes)?;
    Ok((vec![Box::new(blocks), Box::new(bitmaps)], counts))
}

fn outgoing_options<'a>(
    options: &SendOptions,
    session: [u8; 16],
    progress: &'a Progress<'_>,
) -> OutgoingOptions<'a> {
    OutgoingOptions {
        channels: options.channels,
        compression: options.compression,
        meter: options.meter.clone(),
        ..OutgoingOptions::new(session, progress)
    }
}

/// What a destination must have published that says it had finished.
fn expected(disks: &[Planned], bitmaps: &[Vec<Bitmap>]) -> Result<Vec<ExpectedDisk>> {
    let of = |(planned, bitmaps): (&Planned, &Vec<Bitmap>)| {
        let named = |bitmap: &Bitmap| Ok((bitmap.name.clone(), bitmap.digest()?));
        let digests = bitmaps.iter().map(named).collect::<Result<_, HashError>>();
        Ok(ExpectedDisk {
            name: planned.option.id.clone(),
            size: planned.disk.chain.virtual_size(),
            content: None,
            bitmaps: Some(digests.map_err(|e| stream::Error::handler(Blame::Caller, e))?),
        })
    };
    disks.iter().zip(bitmaps).map(of).collect()
}

/// The session of this command: the same command finds what an earlier run of it left, as long as
/// the disks have not changed.
fn session(options: &SendOptions, disks: &[Planned]) -> Result<[u8; 16]> {
    let failed =
        |path: std::path::PathBuf| move |source| Error::File { action: "look at", path, source };
    if options.fresh || options.destination.is_empty() {
        return crate::random_id().map_err(failed("/dev/urandom".into()));
    }
    let facts = |planned: &Planned| {
        let facts = |file: &Arc<qcow2_file::HostFile>| {
            FileFacts::of(file.file()).map_err(failed(file.path().to_owned()))
        };
        let files = planned.disk.files().map(facts).collect::<Result<_>>()?;
        Ok((planned.option.id.clone(), planned.disk.chain.virtual_size(), files))
    };
    let bitmaps = Asked::wishes(&options.bitmaps, &options.renames, options.skip_broken_bitmaps);
    let facts = Facts {
        host: host(),
        disks: disks.iter().map(facts).collect::<Result<_>>()?,
        destination: options.destination.clone().into_bytes(),
        wishes: vec![options.verb(), bitmaps],
    };
    Ok(facts.session())
}

/// Nothing changes: one round is enough, and then the destination proves what it has.
struct OneRound<'a>(&'a dyn Observer);

impl Policy for OneRound<'_> {
    fn next(&mut self, _round: &Round) -> Next {
        self.0.phase(Phase::Prove);
        Next::Complete
    }
}

fn report(
    options: &SendOptions,
    disks: &[Planned],
    sent: &Sent,
    (moved, started): (&Moved, Instant),
) -> Report {
    let (status, error) = match &sent.outcome {
        Outcome::Completed | Outcome::Unconfirmed => (Status::Completed, None),
        Outcome::AlreadyComplete(_) => (Status::AlreadyComplete, None),
        Outcome::Unknown(error) => (Status::Unknown, Some(error_chain(error))),
    };
    let (verified, outcome) = match &sent.outcome {
        _ if options.no_verify => (Verified::No, BitmapOutcome::Preserved),
        Outcome::Unconfirmed | Outcome::Unknown(_) => (Verified::Unconfirmed, BitmapOutcome::Sent),
        _ if !options.blocks => (Verified::No, BitmapOutcome::Preserved),
        _ => (Verified::Yes, BitmapOutcome::Preserved),
    };
    let report = |(planned, moved): (&Planned, MovedDisk)| {
        let report = DiskReport {
            id: planned.option.id.clone(),
            bytes_data: moved.data,
            bytes_zero: planned.sent_size().saturating_sub(moved.data + moved.kept),
            content_hash: moved.content_hash,
            verified,
            not_carried: planned.not_carried(),
            bitmaps: carry::reports(&planned.bitmaps, outcome),
        };
        match &sent.outcome {
            Outcome::AlreadyComplete(published) => {
                // Of a device nobody can tell whether it is what it was then.
                let found = published.iter().find(|found| found.name == report.id);
                let found = found.filter(|_| !planned.disk.files().any(|file| file.is_device()));
                report.of_before(found)
            }
            _ => report,
        }
    };
    Report {
        status,
        error,
        total_time_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
        downtime_ms: None,
        wire_bytes: sent.wire_bytes,
        repeated_bytes: moved.disks().map(|disk| disk.repeated).fold(0, u64::saturating_add),
        resumed: sent.resumed,
        disks: disks.iter().zip(moved.disks()).map(report).map(DiskReport::only_seen).collect(),
        ram: None,
    }
}
