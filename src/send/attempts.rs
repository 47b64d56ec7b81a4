//! A migration over a link that may be cut: attempts of one session, until one comes to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use block_mig::save::SaveCounts;
use mig_core::stream;
use mig_core::transport::Dial;

use super::SendOptions;
use crate::outgoing::{ExpectedDisk, Outcome, Sent};
use crate::reconnect::{Counted, Passed, Patience, RETRY_PAUSE};
use crate::{Observer, Result};

/// What moved, in all attempts together.
#[derive(Debug, Default)]
pub(super) struct Moved {
    /// The counts of each attempt, disk by disk.
    attempts: Vec<Vec<Arc<SaveCounts>>>,
}

/// What moved of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct MovedDisk {
    /// Bytes of content that were sent and count.
    pub(super) data: u64,
    /// Bytes of content that were sent again.
    pub(super) repeated: u64,
    /// Bytes that the destination had before the first attempt.
    pub(super) kept: u64,
    /// What the content hashes to, where it was sealed.
    pub(super) content_hash: Option<String>,
}

impl Moved {
    /// Another attempt begins.
    pub(super) fn begin(&mut self, counts: Vec<Arc<SaveCounts>>) {
        self.attempts.push(counts);
    }

    /// The same disks, with what they hashed to where an attempt came that far: a disk at rest
    /// does not change from one attempt to the next.
    pub(super) fn sealed_of(&self, disks: &[ExpectedDisk]) -> Vec<ExpectedDisk> {
        let root = |index: usize| {
            let of = |counts: &Vec<Arc<SaveCounts>>| {
                counts.get(index).and_then(|counts| counts.root.get().copied())
            };
            self.attempts.iter().rev().find_map(of)
        };
        let disks = disks.iter().cloned().enumerate();
        disks.map(|(index, disk)| ExpectedDisk { content: root(index), ..disk }).collect()
    }

    /// Of each disk.
    pub(super) fn disks(&self) -> impl Iterator<Item = MovedDisk> + '_ {
        let count = self.attempts.first().map_or(0, Vec::len);
        (0..count).map(|index| {
            let counts: Vec<_> = self.attempts.iter().filter_map(|a| a.get(index)).collect();
            of_disk(&counts)
        })
    }
}

fn of_disk(attempts: &[&Arc<SaveCounts>]) -> MovedDisk {
    let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let Some(last) = attempts.last() else { return MovedDisk::default() };
    // An attempt that was cut before it sent anything may not know what the destination has.
    let first = attempts.iter().find(|counts| load(&counts.data) > 0).unwrap_or(last);
    let kept = load(&first.kept);
    let sent = attempts.iter().map(|counts| load(&counts.data)).fold(0, u64::saturating_add);
    let fresh = load(&last.data).saturating_sub(load(&last.repeated));
    let data = fresh.saturating_add(load(&last.kept).saturating_sub(kept));
    MovedDisk {
        data: data.min(sent),
        repeated: sent.saturating_sub(data),
        kept,
        content_hash: last.root.get().map(ToString::to_string),
    }
}

/// Makes attempts until one comes to its end, or a cut lasts for too long. Where nobody could say
/// whether the destination has published, it is asked again.
pub(super) fn attempts(
    options: &SendOptions,
    (dial, observer): (&dyn Dial, &dyn Observer),
    attempt: impl Fn(&dyn Dial, &mut Moved) -> Result<Sent>,
) -> Result<(Sent, Moved)> {
    let counted = Counted { way: dial, passed: Arc::<Passed>::default() };
    let ended = until_one_ends(options, &counted, attempt);
    ended.inspect_err(|_| observer.wire(counted.passed.written()))
}

fn until_one_ends(
    options: &SendOptions,
    counted: &Counted<'_, dyn Dial + '_>,
    attempt: impl Fn(&dyn Dial, &mut Moved) -> Result<Sent>,
) -> Result<(Sent, Moved)> {
    let mut patience = Patience::new(options.reconnect);
    let mut moved = Moved::default();
    let mut unknown = None;
    loop {
        let heard = counted.passed.read();
        let ended = attempt(counted, &mut moved);
        let was_answered = counted.passed.read() > heard;
        let may_go_on = |error: &stream::Error, patience: &mut Patience| {
            patience.may_go_on(error, was_answered, Instant::now())
        };
        match ended {
            Ok(mut sent) => {
                sent.wire_bytes = counted.passed.written();
                match (&sent.outcome, &unknown) {
                    (Outcome::Unknown(error), _) if may_go_on(error, &mut patience) => {
                        unknown = Some(sent);
                    }
                    // It was this run whose last answer was lost.
                    (Outcome::AlreadyComplete(_), Some(_)) => {
                        return Ok((Sent { outcome: Outcome::Completed, ..sent }, moved));
                    }
                    _ => return Ok((sent, moved)),
                }
            }
            Err(error) => match &error {
                crate::Error::Stream(cut) if may_go_on(cut, &mut patience) => {
                    tracing::warn!(%error, "the connection was lost");
                }
                // It has published, and not what was sent.
                crate::Error::Stream(stream::Error::Mismatch { .. }) => return Err(error),
                // Once it was asked to publish, only the destination can say that it did not.
                _ => match unknown {
                    Some(sent) => return Ok((sent, moved)),
                    None => return Err(error),
                },
            },
        }
        std::thread::sleep(RETRY_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_attempt_left_at_the_destination_counts_once() {
        let counts = |data: u64, repeated: u64, kept: u64| {
            let counts = SaveCounts::default();
            counts.data.store(data, Ordering::Relaxed);
            counts.repeated.store(repeated, Ordering::Relaxed);
            counts.kept.store(kept, Ordering::Relaxed);
            Arc::new(counts)
        };
        let moved = |attempts: &[(u64, u64, u64)]| {
            let all: Vec<_> = attempts.iter().map(|(d, r, k)| counts(*d, *r, *k)).collect();
            let disk = of_disk(&all.iter().collect::<Vec<_>>());
            (disk.data, disk.repeated, disk.kept)
        };
        assert_eq!(moved(&[(100, 0, 0)]), (100, 0, 0));
        assert_eq!(moved(&[(60, 10, 40)]), (50, 10, 40));
        // 70 of 80 had arrived.
        assert_eq!(moved(&[(80, 0, 0), (30, 0, 70)]), (100, 10, 0));
        assert_eq!(moved(&[(40, 0, 20), (10, 0, 60), (25, 0, 65)]), (70, 5, 20));
        assert_eq!(moved(&[(0, 0, 0), (30, 0, 70)]), (30, 0, 70));
        assert_eq!(moved(&[]), (0, 0, 0));
    }
}
