//! A publication that a crash interrupted is finished: all renames happen once one has. SPEC 9.

use std::path::Path;

use format_spec::content_hash::ContentHash;

use super::log::Log;
use crate::Result;
use crate::publish::{Draft, publish};

/// A publication that was finished now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Recovered {
    /// Whose it was.
    pub(crate) session: [u8; 16],
    /// Guest-visible bytes.
    pub(crate) size: u64,
    /// What was proved before it began.
    pub(crate) content: ContentHash,
}

/// Finishes the publication of a destination, if its journal says that one had begun. `targets` are
/// its files in the order of their renames, the last one with the journal beside it.
/// The journal goes when `finish` was done with what it says.
pub(crate) fn recover(
    targets: &[&Path],
    replaces: bool,
    finish: impl FnOnce(&Log, &Recovered) -> Result<()>,
) -> Result<Option<Recovered>> {
    let Some(last) = targets.last() else { return Ok(None) };
    let log = Log::beside(last)?;
    let is_begun = |log: &Log| -> Result<Option<Recovered>> {
        Ok(log.peek()?.filter(|found| found.is_committing).and_then(|found| {
            let (session, size) = (found.identity.session, found.identity.size);
            found.prepared.map(|content| Recovered { session, size, content })
        }))
    };
    if is_begun(&log)?.is_none() {
        return Ok(None);
    }
    let mut drafts = Vec::new();
    for target in targets {
        drafts.extend(Draft::reopen(target)?);
    }
    // Looked at again under the locks: another process may have finished it meanwhile.
    let Some(found) = is_begun(&log)? else { return Ok(None) };
    publish(drafts, replaces)?;
    // What was published and then taken away is not there any more.
    let is_there = targets.iter().all(|target| target.exists());
    if is_there {
        finish(&log, &found)?;
    }
    log.remove()?;
    Ok(is_there.then_some(found))
}
