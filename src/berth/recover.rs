//! A publication that a crash interrupted is finished: all renames happen once one has. SPEC 9, 10.

use std::path::{Path, PathBuf};

use block_mig::journal::{Identity, Prepared, Replayed};
use format_spec::content_hash::ContentHash;
use format_spec::native::journal::UNPROVED;

use super::log::Log;
use super::proved::{hold, parts};
use super::receipt::{Receipt, ReceiptBitmap};
use crate::facts::{Stamp, stamp_of};
use crate::publish::{self, Draft, publish};
use crate::{Error, Result};

/// A destination whose publication may have begun.
pub(crate) struct Half<'a> {
    /// Its files in the order of their renames, the last one with the journal beside it.
    pub(crate) files: Vec<&'a Path>,
    /// All files that it stands on.
    pub(crate) below: Vec<PathBuf>,
    /// What it is asked to be now, if that is known: it is published as nothing else.
    pub(crate) target: Option<String>,
}

impl Half<'_> {
    fn last(&self) -> &Path {
        self.files.last().copied().unwrap_or(Path::new(""))
    }

    /// What is to be published, its files locked, and there is something of it left to be
    /// published: whether all is as it was proved.
    fn hold(&self, drafts: &[Draft], proved: &[Stamp]) -> Result<()> {
        let is_left = |part: &Path| drafts.iter().any(|draft| draft.temporary() == part);
        let parts = parts(&self.files, &self.below)?;
        for (index, (part, stamp)) in parts.iter().zip(proved).enumerate() {
            if is_left(part) || index >= self.files.len() {
                hold(&[part], &[*stamp])?;
            }
        }
        match parts.get(proved.len()) {
            // It says nothing of these.
            Some(path) => Err(Error::Changed { path: path.clone() }),
            None => Ok(()),
        }
    }
}

/// A publication that was finished now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Whose it was.
    session: [u8; 16],
    /// Guest-visible bytes.
    size: u64,
    /// What was proved before it began, if anything was.
    content: Option<ContentHash>,
    /// What it was asked to be.
    target: String,
    /// What its files were like when they were proved.
    stamp: Stamp,
}

impl Recovered {
    /// What stays of it, which has these bitmaps.
    pub(crate) fn receipt(&self, bitmaps: Vec<ReceiptBitmap>) -> Receipt {
        let Self { session, size, content, target, stamp } = self.clone();
        let receipt = Receipt::of_stored((session, size, target), content, bitmaps);
        Receipt { stamp, ..receipt }
    }
}

/// What is to be published, its files locked.
struct Found<'a> {
    index: usize,
    place: &'a Half<'a>,
    log: &'a Log,
    drafts: Vec<Draft>,
    proved: Recovered,
    /// Why it is not, if so.
    changed: Option<Error>,
}

/// Finishes the publication of destinations that belong together, if one of their journals says
/// that it had begun: of all that were proved in that session, and are as they were then. A journal
/// goes when `finish` was done with what it says; its first argument is the index of the
/// destination. Answers what is there now.
pub(crate) fn recover(
    places: &[Half<'_>],
    replaces: bool,
    finish: impl Fn(usize, &Log, &Recovered) -> Result<()>,
) -> Result<Vec<Recovered>> {
    let log = |place: &Half<'_>| Log::beside(place.last());
    let logs = places.iter().map(log).collect::<Result<Vec<_>>>()?;
    let sessions = sessions_begun(&logs)?;
    let mut found = Vec::new();
    for (index, (place, log)) in places.iter().zip(&logs).enumerate() {
        found.extend(find((index, place), log, &sessions)?);
    }
    if let Some(changed) = found.iter_mut().find_map(|found| found.changed.take()) {
        return take_back(&found, changed).map(|()| Vec::new());
    }
    // From here on each journal says by itself what happens.
    found.iter().try_for_each(|found| commit(found.log))?;
    let drafts: Vec<_> = found.iter().flat_map(|found| &found.drafts).collect();
    let replaced = drafts.iter().filter(|_| replaces).map(|draft| publish::hold(draft.target()));
    let _held = replaced.collect::<Result<Vec<_>>>()?;
    publish(drafts, replaces)?;
    let mut recovered = Vec::new();
    for Found { index, place, log, proved, .. } in found {
        // What was published and then taken away is not there any more.
        if place.files.iter().all(|file| file.exists()) {
            finish(index, log, &proved)?;
            recovered.push(proved);
        }
        log.remove()?;
    }
    Ok(recovered)
}

/// What was to be published together is not what was proved. Where nothing of it has its name yet,
/// nothing gets one, and all of it is gone on with; otherwise that is an error.
fn take_back(found: &[Found<'_>], changed: Error) -> Result<()> {
    let has_name = |found: &Found<'_>| {
        let is_left = |file: &Path| found.drafts.iter().any(|draft| draft.is_for(file));
        let files = found.place.files.iter().copied();
        files.filter(|file| !is_left(file) && file.exists()).map(Path::to_owned).collect::<Vec<_>>()
    };
    let published: Vec<_> = found.iter().flat_map(has_name).collect();
    if !published.is_empty() {
        return Err(Error::HalfPublished { published, source: Box::new(changed) });
    }
    tracing::warn!(error = %changed, "it is not published as it is");
    for found in found {
        let journal = found.log.peek()?.map(|replayed| found.log.resume(replayed));
        journal.transpose()?.flatten().map_or(Ok(()), |mut journal| journal.unprepare())?;
    }
    Ok(())
}

/// A publication that a crash interrupted is not to be finished, whoever asks next: what says so
/// goes, as long as nobody uses what it is of. These are the files of one destination, the last one
/// with the journal beside it.
pub(crate) fn give_up(files: &[&Path]) -> Result<()> {
    let Some(last) = files.last() else { return Ok(()) };
    let log = Log::beside(last)?;
    if log.peek()?.is_none_or(|found| !found.is_committing) {
        return Ok(());
    }
    let _held = files.iter().map(|file| Draft::reopen(file)).collect::<Result<Vec<_>>>()?;
    log.remove()
}

/// Sessions whose publication has begun.
fn sessions_begun(logs: &[Log]) -> Result<Vec<[u8; 16]>> {
    let mut sessions = Vec::new();
    for log in logs {
        let begun = log.peek()?.filter(|found| found.is_committing && found.prepared.is_some());
        sessions.extend(begun.map(|found| found.identity.session));
    }
    Ok(sessions)
}

/// What was proved at a place in one of these sessions, and its files, locked.
fn find<'a>(
    (index, place): (usize, &'a Half<'a>),
    log: &'a Log,
    sessions: &[[u8; 16]],
) -> Result<Option<Found<'a>>> {
    let Some((Identity { target, .. }, _)) = proved(log, sessions)? else { return Ok(None) };
    if place.target.as_ref().is_some_and(|wanted| *wanted != target) {
        let file = place.last().display();
        let reason = format!(
            "an earlier run began to publish {file} with other options: run it with those again, \
             or begin anew with --fresh"
        );
        return Err(Error::Usage { reason });
    }
    let mut drafts = Vec::new();
    for file in &place.files {
        drafts.extend(Draft::reopen(file)?);
    }
    // Looked at again under the locks: another process may have finished it meanwhile.
    let Some((identity, Prepared { root, stamps })) = proved(log, sessions)? else {
        return Ok(None);
    };
    let changed = match drafts.is_empty() {
        true => None,
        false => place.hold(&drafts, &stamps).err(),
    };
    let Identity { session, size, target } = identity;
    let (content, stamp) = (Some(root).filter(|root| *root != UNPROVED), stamp_of(&stamps));
    let proved = Recovered { session, size, content, target, stamp };
    Ok(Some(Found { index, place, log, drafts, proved, changed }))
}

fn proved(log: &Log, sessions: &[[u8; 16]]) -> Result<Option<(Identity, Prepared)>> {
    let found = log.peek()?.filter(|found| sessions.contains(&found.identity.session));
    Ok(found.and_then(|Replayed { identity, prepared, .. }| Some((identity, prepared?))))
}

/// Notes durably that publication has begun.
fn commit(log: &Log) -> Result<()> {
    let Some(found) = log.peek()?.filter(|found| !found.is_committing) else { return Ok(()) };
    if let Some(mut journal) = log.resume(found)? {
        journal.commit()?;
        log.sync_name()?;
    }
    Ok(())
}
