//! What lies at the places of a migration, and what is answered to its source because of it.

use format_spec::native::hello::SessionState;
use format_spec::native::journal::UNPROVED;

use super::files::DiskPlace;
use super::log::Log;
use super::proved::{hold, parts};
use super::receipt::Receipt;
use crate::Result;
use crate::copy::Format;
use crate::publish::is_begun;

/// What an earlier attempt of the same command left of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trace {
    /// Nothing, or what is of no use for what is asked for now.
    Nothing,
    /// Unfinished files and their journal.
    Begun,
    /// The same, and all of it was proved.
    Proved,
    /// It was published and is still there.
    Published,
}

impl Trace {
    /// Looks at the place of a disk.
    pub(super) fn of(disk: &DiskPlace, session: [u8; 16]) -> Result<Self> {
        let log = Log::beside(&disk.path)?;
        let data = disk.data_file();
        // Which size it has is known when the disk comes.
        let new = disk.new_disk(0, data.as_ref())?;
        let target = new.target();
        let is_of = |found: &Receipt| found.session == session && found.target == target;
        if let Some(receipt) = Receipt::read(&log)?.filter(is_of) {
            let size = size_of(&disk.path, disk.format);
            let is_there = size == Some(receipt.size);
            return Ok(if is_there { Self::Published } else { Self::Nothing });
        }
        let Some(found) = log.peek()? else { return Ok(Self::Nothing) };
        let is_ours = found.identity.session == session && found.identity.target == target;
        for file in new.targets() {
            if !is_ours || !is_begun(file)? {
                return Ok(Self::Nothing);
            }
        }
        // What nobody proved cannot be held against anything.
        Ok(match found.prepared {
            // Nor what was proved and is not as it was.
            Some(proved) if proved.root != UNPROVED => {
                let parts = parts(&new.targets(), &new.below)?;
                if hold(&parts, &proved.stamps).is_ok() { Self::Proved } else { Self::Begun }
            }
            _ => Self::Begun,
        })
    }
}

/// Whether a migration of another session left something unfinished at the place of a disk; then
/// whether all of it was proved, so that it waits for that session's last word.
pub(super) fn of_another(disk: &DiskPlace, session: [u8; 16]) -> Result<Option<bool>> {
    let found = Log::beside(&disk.path)?.peek()?.filter(|found| found.identity.session != session);
    let Some(found) = found else { return Ok(None) };
    // What nobody proved its own session begins anew, too.
    let is_proved = found.prepared.is_some_and(|proved| proved.root != UNPROVED);
    Ok(is_begun(&disk.path)?.then_some(is_proved))
}

/// What all disks together amount to, where attempts leave something. One does not speak for the
/// others.
pub(crate) fn state(traces: &[Trace], keeps: bool) -> SessionState {
    let all = |wanted| !traces.is_empty() && traces.iter().all(|trace| *trace == wanted);
    let is_left = |trace: &Trace| matches!(trace, Trace::Begun | Trace::Proved);
    if all(Trace::Published) {
        SessionState::Committed
    } else if !keeps || !traces.iter().any(is_left) {
        // What is not hashed is not gone on with, and what was proved is of no use without proof.
        SessionState::Fresh
    } else if all(Trace::Proved) {
        SessionState::Ready
    } else {
        SessionState::Resumable
    }
}

/// Guest-visible bytes of a disk, if it is one.
fn size_of(path: &std::path::Path, format: Format) -> Option<u64> {
    if !path.exists() {
        return None;
    }
    let opener = qcow2_file::Opener::new().format(Some(format.into())).without_named_files(true);
    opener.open(path).ok().map(|chain| chain.virtual_size())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_disk_has_its_say() {
        use Trace::{Begun, Nothing, Proved, Published};
        for (traces, verified, unverified) in [
            (&[][..], SessionState::Fresh, SessionState::Fresh),
            (&[Nothing, Nothing], SessionState::Fresh, SessionState::Fresh),
            (&[Published, Published], SessionState::Committed, SessionState::Committed),
            (&[Published, Nothing], SessionState::Fresh, SessionState::Fresh),
            (&[Published, Proved], SessionState::Resumable, SessionState::Fresh),
            (&[Proved, Proved], SessionState::Ready, SessionState::Fresh),
            (&[Proved, Begun], SessionState::Resumable, SessionState::Fresh),
            (&[Proved, Nothing], SessionState::Resumable, SessionState::Fresh),
            (&[Begun, Nothing], SessionState::Resumable, SessionState::Fresh),
        ] {
            assert_eq!(state(traces, true), verified, "{traces:?}");
            assert_eq!(state(traces, false), unverified, "{traces:?}");
        }
    }
}
