//! Turn *sent* into *confirmed*: ask the destination's monitor for each bitmap. QEMU drops bitmaps
//! that it cannot place and calls the migration a success all the same.

use std::time::{Duration, Instant};

use qcow2_file::bitmaps::Bits;

use super::plan::PlannedBitmap;
use super::report;
use super::session::{Ending, Session};
use crate::Observer;
use crate::qemu::peer::{Inventory, NodeBitmap, Peer};
use crate::qemu::{self, Version, bitmap_sha256, qmp};
use crate::report::Status;

/// How long a destination may take from the end of the stream to a state that lasts.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is asked meanwhile.
const PAUSE: Duration = Duration::from_millis(20);

/// What left this side of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Fingerprint {
    /// Set bits, in bytes of whole granules.
    pub(crate) count: u64,
    /// QEMU's hash of the bits.
    pub(crate) sha256: String,
}

impl Fingerprint {
    /// Of bits of that many guest bytes each.
    pub(crate) fn of(bits: &Bits, granularity: u64) -> Self {
        let count = bits.count().saturating_mul(granularity);
        Self { count, sha256: bitmap_sha256(bits) }
    }
}

/// What became of a bitmap at the destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It is there, bit for bit; what is different apart from bits, as `what: old -> new`.
    Preserved(Vec<String>),
    /// It is not there, or is another one: why.
    Dropped(String),
    /// It is there, and nobody can tell any more whether it was as it was sent: why.
    Unsure(String),
}

/// What is known in the end.
pub(crate) struct Outcome {
    pub(crate) status: Status,
    pub(crate) error: Option<String>,
    /// Of each bitmap that was sent; or why there are none.
    pub(crate) verdicts: Result<Vec<Verdict>, String>,
}

impl Outcome {
    /// Nobody can tell, for this reason.
    fn unknown(why: String) -> Self {
        Self { status: Status::Unknown, error: Some(why.clone()), verdicts: Err(why) }
    }

    /// It ended well, and this is known of the bitmaps.
    fn completed(verdicts: Result<Vec<Verdict>, String>) -> Self {
        Self { status: Status::Completed, error: None, verdicts }
    }
}

/// Asks the destination's monitor, where there is one, how it ended and what it has. What cannot be
/// found out is unknown: the destination may run by now, and who takes that for a failure lets the
/// guest go on twice. An error means that it failed.
pub(crate) fn conclude(
    peer: Option<&mut Peer>,
    (bitmaps, sent): (&[PlannedBitmap], &[Fingerprint]),
    ending: Ending,
    observer: &dyn Observer,
) -> qemu::Result<Outcome> {
    let Some(peer) = peer else {
        return Ok(match ending {
            Ending::Loaded | Ending::Unheard => Outcome::completed(Err(report::unasked())),
            Ending::Unknown(why) | Ending::Expired(why) => Outcome::unknown(why),
        });
    };
    // Who was waited for in vain is asked once, and not waited for again.
    let patience = if matches!(ending, Ending::Expired(_)) { Duration::ZERO } else { PATIENCE };
    match wait(peer, patience, observer) {
        Standing::Completed => {}
        Standing::Failed(why) => return Err(qemu::Error::Peer(why)),
        Standing::Unsure(why) => return Ok(Outcome::unknown(why)),
    }
    Ok(match verdicts(peer, bitmaps, sent, observer) {
        Ok(verdicts) => Outcome::completed(Ok(verdicts)),
        Err(error) => Outcome::unknown(unanswered(&error)),
    })
}

/// What the destination itself says of a failure, where it can still be asked.
pub(crate) fn explain(
    peer: Option<&mut Peer>,
    session: &mut Session,
    error: qemu::Error,
) -> qemu::Error {
    let error = session.reason_of(error);
    if !matches!(error, qemu::Error::Connection { .. } | qemu::Error::Peer(_)) {
        return error;
    }
    let migration = peer.and_then(|peer| peer.migration().ok());
    match migration.and_then(|migration| migration.error) {
        Some(said) => qemu::Error::Peer(said),
        None => error,
    }
}

/// How the destination's migration stands, as its monitor says.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    /// It has everything, and may run.
    Completed,
    /// It failed, in its own words, and will not run.
    Failed(String),
    /// Nobody can tell: why.
    Unsure(String),
}

/// Waits until the destination's migration has ended, the user stops waiting, or the time is up.
fn wait(peer: &mut Peer, patience: Duration, observer: &dyn Observer) -> Standing {
    let end = Instant::now() + patience;
    loop {
        let migration = match peer.migration() {
            Ok(migration) => migration,
            Err(error) => return Standing::Unsure(unanswered(&error)),
        };
        let status = migration.status.as_str();
        match status {
            "completed" => return Standing::Completed,
            "failed" | "cancelled" => {
                let why = migration.error.unwrap_or_else(|| "it does not say why".to_owned());
                return Standing::Failed(why);
            }
            _ => {}
        }
        let still = || format!("the destination's migration is still {status:?}");
        if observer.is_cancelled() {
            return Standing::Unsure(format!("{}, and was not waited for", still()));
        }
        if Instant::now() > end {
            return Standing::Unsure(format!("{} after {patience:?}", still()));
        }
        std::thread::sleep(PAUSE);
    }
}

/// What is said of a monitor that does not answer.
fn unanswered(error: &qmp::Error) -> String {
    let said = crate::report::error_chain(error);
    format!("the destination's monitor does not answer any more: {said}")
}

/// Asks what became of the bitmaps; one verdict for each.
fn verdicts(
    peer: &mut Peer,
    bitmaps: &[PlannedBitmap],
    sent: &[Fingerprint],
    observer: &dyn Observer,
) -> qmp::Result<Vec<Verdict>> {
    if bitmaps.is_empty() {
        return Ok(Vec::new());
    }
    let is_running = peer.run_state()? == "running";
    let inventory = peer.inventory()?;
    let mut verdicts = Vec::with_capacity(bitmaps.len());
    for (bitmap, sent) in bitmaps.iter().zip(sent) {
        verdicts.push(verdict(peer, &inventory, bitmap, (sent, is_running))?);
    }
    let is_kept = bitmaps.iter().any(|bitmap| bitmap.wire.is_persistent);
    if is_kept && !is_running && peer.version() >= Version::new(10, 0) {
        observer.warning(
            "the destination is paused, and a QEMU of this version stores persistent bitmaps only \
             once it has run (`cont`) or its disks were activated (`blockdev-set-active`): do not \
             quit it before",
        );
    }
    Ok(verdicts)
}

fn verdict(
    peer: &mut Peer,
    inventory: &Inventory,
    bitmap: &PlannedBitmap,
    (sent, is_running): (&Fingerprint, bool),
) -> qmp::Result<Verdict> {
    let (node, name) = match inventory.place(&bitmap.wire.device, &bitmap.wire.name) {
        Ok(place) => place,
        Err(why) => return Ok(Verdict::Dropped(why)),
    };
    let Some(found) = node.bitmap(name) else {
        let why =
            format!("the destination dropped it: its node {:?} has no bitmap {name:?}", node.name);
        return Ok(Verdict::Dropped(why));
    };
    if let Some(why) = unusable(found, bitmap) {
        return Ok(Verdict::Dropped(why));
    }
    let sha256 = peer.bitmap_sha256(&node.name, name)?;
    Ok(judge(bitmap, sent, (found, &sha256), is_running))
}

/// Why a bitmap of the right name cannot be the one that was sent.
fn unusable(found: &NodeBitmap, bitmap: &PlannedBitmap) -> Option<String> {
    let granularity = u64::from(bitmap.wire.granularity);
    if found.granularity != granularity {
        let other = found.granularity;
        Some(format!("its granularity at the destination is {other}, not {granularity}"))
    } else if found.is_busy {
        Some("it was not completed: it is busy at the destination".to_owned())
    } else if found.is_inconsistent {
        Some("it is inconsistent at the destination".to_owned())
    } else {
        None
    }
}

/// Holds what the destination has against what was sent.
fn judge(
    bitmap: &PlannedBitmap,
    sent: &Fingerprint,
    (found, sha256): (&NodeBitmap, &str),
    is_running: bool,
) -> Verdict {
    let flags = [
        ("enabled", bitmap.wire.is_enabled, found.is_recording),
        ("persistent", bitmap.wire.is_persistent, found.is_persistent),
    ];
    let changed = flags.iter().filter(|(_, old, new)| old != new);
    let changed = changed.map(|(what, old, new)| format!("{what}: {old} -> {new}")).collect();
    if (found.count, sha256) == (sent.count, sent.sha256.as_str()) {
        return Verdict::Preserved(changed);
    }
    let difference = format!(
        "{} dirty bytes were sent (SHA-256 {}), the destination has {} ({sha256})",
        sent.count, sent.sha256, found.count
    );
    // A guest that runs has written already; it only ever adds bits.
    if is_running && found.is_recording && found.count >= sent.count {
        return Verdict::Unsure(format!(
            "the destination's guest runs already, and what it wrote cannot be told from what was \
             sent: {difference}"
        ));
    }
    Verdict::Dropped(format!("it is not what was sent: {difference}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::outgoing::bitmaps::OutgoingBitmap;

    fn bitmap() -> PlannedBitmap {
        let wire = OutgoingBitmap {
            device: "d".to_owned(),
            name: "b".to_owned(),
            disk_size: 1 << 20,
            granularity: 65536,
            is_enabled: true,
            is_persistent: true,
        };
        PlannedBitmap { disk: 0, source_name: "b".to_owned(), wire }
    }

    fn found(count: u64) -> NodeBitmap {
        NodeBitmap {
            name: "b".to_owned(),
            granularity: 65536,
            count,
            is_recording: true,
            is_busy: false,
            is_persistent: true,
            is_inconsistent: false,
        }
    }

    fn sent() -> Fingerprint {
        Fingerprint { count: 65536, sha256: "aa".to_owned() }
    }

    #[test]
    fn only_equal_bits_are_preserved() {
        let judge = |found: NodeBitmap, hash, is_running| {
            judge(&bitmap(), &sent(), (&found, hash), is_running)
        };
        assert_eq!(judge(found(65536), "aa", false), Verdict::Preserved(vec![]));
        let other = NodeBitmap { is_recording: false, is_persistent: false, ..found(65536) };
        let Verdict::Preserved(changed) = judge(other, "aa", true) else { panic!() };
        assert_eq!(changed, ["enabled: true -> false", "persistent: true -> false"]);
        for (count, hash, is_running) in
            [(65536, "bb", false), (131_072, "aa", false), (0, "bb", true)]
        {
            let verdict = judge(found(count), hash, is_running);
            assert!(matches!(verdict, Verdict::Dropped(_)), "{verdict:?}");
        }
        assert!(matches!(judge(found(131_072), "bb", true), Verdict::Unsure(_)));
        let disabled = NodeBitmap { is_recording: false, ..found(131_072) };
        assert!(matches!(judge(disabled, "bb", true), Verdict::Dropped(_)));
    }

    #[test]
    fn what_is_half_there_is_dropped() {
        assert_eq!(unusable(&found(0), &bitmap()), None);
        for bad in [
            NodeBitmap { granularity: 512, ..found(0) },
            NodeBitmap { is_busy: true, ..found(0) },
            NodeBitmap { is_inconsistent: true, ..found(0) },
        ] {
            assert!(unusable(&bad, &bitmap()).is_some(), "{bad:?}");
        }
    }
}
