//! A publication that a crash interrupted is finished: all renames happen once one has. SPEC 9, 10.

use std::path::Path;

use format_spec::content_hash::ContentHash;
use format_spec::native::journal::UNPROVED;

use super::log::Log;
use crate::publish::{Draft, hold, publish};
use crate::{Error, Result};

/// A destination whose publication may have begun.
pub(crate) struct Half<'a> {
    /// Its files in the order of their renames, the last one with the journal beside it.
    pub(crate) files: Vec<&'a Path>,
    /// What it is asked to be now, if that is known: it is published as nothing else.
    pub(crate) target: Option<String>,
}

impl Half<'_> {
    fn last(&self) -> &Path {
        self.files.last().copied().unwrap_or(Path::new(""))
    }
}

/// A publication that was finished now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Whose it was.
    pub(crate) session: [u8; 16],
    /// Guest-visible bytes.
    pub(crate) size: u64,
    /// What was proved before it began, if anything was.
    pub(crate) content: Option<ContentHash>,
    /// What it was asked to be.
    pub(crate) target: String,
}

/// What is to be published, its files locked.
struct Found<'a> {
    index: usize,
    files: &'a [&'a Path],
    log: &'a Log,
    drafts: Vec<Draft>,
    proved: Recovered,
}

/// Finishes the publication of destinations that belong together, if one of their journals says
/// that it had begun: of all that were proved in that session. A journal goes when `finish` was
/// done with what it says; its first argument is the index of the destination. Answers what is
/// there now.
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
        found.extend(find(place, log, &sessions)?.map(|(drafts, proved)| Found {
            index,
            files: &place.files,
            log,
            drafts,
            proved,
        }));
    }
    // From here on each journal says by itself what happens.
    found.iter().try_for_each(|found| commit(found.log))?;
    let drafts: Vec<_> = found.iter().flat_map(|found| &found.drafts).collect();
    let replaced = drafts.iter().filter(|_| replaces).map(|draft| hold(draft.target()));
    let _held = replaced.collect::<Result<Vec<_>>>()?;
    publish(drafts, replaces)?;
    let mut recovered = Vec::new();
    for Found { index, files, log, proved, .. } in found {
        // What was published and then taken away is not there any more.
        if files.iter().all(|file| file.exists()) {
            finish(index, log, &proved)?;
            recovered.push(proved);
        }
        log.remove()?;
    }
    Ok(recovered)
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
fn find(
    place: &Half<'_>,
    log: &Log,
    sessions: &[[u8; 16]],
) -> Result<Option<(Vec<Draft>, Recovered)>> {
    let Some(proved) = proved(log, sessions)? else { return Ok(None) };
    if place.target.as_ref().is_some_and(|target| *target != proved.target) {
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
    Ok(self::proved(log, sessions)?.map(|proved| (drafts, proved)))
}

fn proved(log: &Log, sessions: &[[u8; 16]]) -> Result<Option<Recovered>> {
    let found = log.peek()?.filter(|found| sessions.contains(&found.identity.session));
    Ok(found.and_then(|found| {
        let block_mig::journal::Identity { session, size, target } = found.identity;
        found.prepared.map(|root| {
            let content = Some(root).filter(|root| *root != UNPROVED);
            Recovered { session, size, content, target }
        })
    }))
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
