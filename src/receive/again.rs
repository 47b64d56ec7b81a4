//! Receiving over a link that may be cut (`--reconnect`): the same session is let in again, and
//! goes on where it was.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use format_spec::Blame;
use format_spec::content_hash::BitmapDigest;
use format_spec::native::answer::{Published, PublishedBitmap};
use format_spec::native::hello::SessionState;
use mig_core::section::{Fate, Registry};
use mig_core::stream;
use mig_core::transport::{Connection, Listen};

use super::{Arrivals, Dialect, first};
use crate::incoming::{
    Destination, IncomingOptions, Introduced, Place, Received, ReceivedDisk, SessionId, Wanted,
    receive,
};
use crate::reconnect::{Counted, Passed, Patience, RETRY_PAUSE};
use crate::report::error_chain;
use crate::{Error, Observer, Phase, Result};

/// Receives from `main`, and after a cut from whoever of the same session comes within `limit`.
/// `destination` makes the places of an attempt; it is told whether it is the first.
pub(super) fn receive_all(
    (main, arrivals): (Connection, &Arrivals<'_>),
    destination: impl Fn(bool) -> Arc<dyn Destination>,
    limit: Duration,
    (incoming, observer): (&IncomingOptions<'_>, &dyn Observer),
) -> Result<Received> {
    let session = Arc::default();
    let mut patience = Patience::new(limit);
    let mut next = Some(main);
    let mut bytes = 0u64;
    let mut published: Option<Received> = None;
    let mut is_first = true;
    loop {
        let door = Arc::new(Door::new(destination(is_first), &session, told(published.as_ref())));
        let (on_main, on_others) = (Arc::<Passed>::default(), Arc::<Passed>::default());
        let ended = match next.take().map_or_else(|| come_back(arrivals, observer, &patience), Ok) {
            Ok(main) => {
                incoming.tally.reset();
                observer.phase(Phase::Transfer);
                let listen = Counted { way: arrivals as &dyn Listen, passed: on_others.clone() };
                let others = Registry::new();
                receive(on_main.count(main), &listen, door.clone(), others, incoming)
                    .map_err(Error::from)
            }
            Err(error) => Err(error),
        };
        is_first &= !door.is_passed();
        bytes = bytes.saturating_add(on_main.read()).saturating_add(on_others.read());
        let now = Instant::now();
        let error = match ended {
            // What was published in this run is told as such, whoever asks for it again.
            Ok(received) => {
                let received = published.take().unwrap_or(received);
                let received = Received { wire_bytes: bytes, ..received };
                if !on_main.has_ended() || !patience.wait_once_more(now) {
                    return Ok(received);
                }
                published = Some(received);
                continue;
            }
            Err(error) => error,
        };
        let may_go_on = match &error {
            Error::Stream(cut) if !door.is_refused() => {
                patience.may_go_on(cut, door.is_passed(), now)
            }
            _ => door.is_refused() && patience.is_waiting(now),
        };
        match (may_go_on, published.take()) {
            (true, kept) => published = kept,
            (false, Some(received)) => return Ok(received),
            (false, None) => return Err(error),
        }
        observer.warning(&format!("the migration is waited for: {}", error_chain(&error)));
        std::thread::sleep(RETRY_PAUSE);
    }
}

/// The next connection that begins as ours did.
fn come_back(
    arrivals: &Arrivals<'_>,
    observer: &dyn Observer,
    patience: &Patience,
) -> Result<Connection> {
    observer.phase(Phase::Wait);
    match first(arrivals, observer, patience.end())? {
        (Dialect::Native, connection) => Ok(connection),
        (Dialect::Qemu, connection) => {
            let reason = format!("{} is another source: a QEMU", connection.peer);
            Err(stream::Error::Connect(std::io::Error::other(reason)).into())
        }
    }
}

/// What a source that asks again is told of what was published in this run; `None` where that is
/// not known without what lies on storage.
fn told(received: Option<&Received>) -> Option<Vec<Published>> {
    let received = received.filter(|received| !received.already_complete)?;
    // Its guest may run by now.
    let is_unchanged = false;
    let of = |disk: &ReceivedDisk| {
        let proof = disk.proof.as_ref()?;
        let bitmap = |(name, digest): (&String, &BitmapDigest)| PublishedBitmap {
            name: name.clone(),
            sent_as: name.clone(),
            digest: *digest,
        };
        let bitmaps = disk.bitmaps.iter().zip(&proof.bitmaps).map(bitmap).collect();
        let (name, size, content) = (disk.name.clone(), disk.size, proof.content);
        // Of what came whole without proof nothing is told here.
        let is_bitmaps_alone = content.is_none();
        Some(Published { name, size, content, is_unchanged, is_bitmaps_alone, bitmaps })
    };
    received.disks.iter().map(of).collect()
}

/// Lets one session in: that of the first source that was let in.
struct Door {
    inner: Arc<dyn Destination>,
    session: Arc<OnceLock<SessionId>>,
    /// What was published of it, for a source that missed the last word: it has let go, and nothing
    /// may be taken back, whatever there is left on storage that says so.
    published: Option<Vec<Published>>,
    is_passed: AtomicBool,
    is_refused: AtomicBool,
}

impl Door {
    fn new(
        inner: Arc<dyn Destination>,
        session: &Arc<OnceLock<SessionId>>,
        published: Option<Vec<Published>>,
    ) -> Self {
        let (is_passed, is_refused) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { inner, session: session.clone(), published, is_passed, is_refused }
    }

    /// Whether somebody was let in.
    fn is_passed(&self) -> bool {
        self.is_passed.load(Ordering::Acquire)
    }

    /// Whether somebody else came.
    fn is_refused(&self) -> bool {
        self.is_refused.load(Ordering::Acquire)
    }
}

impl Destination for Door {
    fn begin(&self, session: SessionId) -> stream::Result<SessionState> {
        if self.session.get().is_some_and(|ours| *ours != session) {
            self.is_refused.store(true, Ordering::Release);
            let reason = "another migration was cut off here, and is waited for";
            return Err(stream::Error::handler(Blame::Caller, reason));
        }
        let state = match self.published {
            Some(_) => SessionState::Committed,
            None => self.inner.begin(session)?,
        };
        let _ = self.session.set(session);
        self.is_passed.store(true, Ordering::Release);
        Ok(state)
    }

    fn forget(&self) -> stream::Result<()> {
        self.inner.forget()
    }

    fn published(&self) -> stream::Result<Vec<Published>> {
        let Some(told) = &self.published else { return self.inner.published() };
        // Whether somebody has written to a disk since is what storage says best, if it says.
        let stored = self.inner.published().unwrap_or_default();
        let is_unchanged = |told: &Published| {
            let mut same = stored.iter().filter(|found| found.name == told.name);
            same.any(|found| found.is_unchanged && found.content == told.content)
        };
        let told =
            told.iter().map(|told| Published { is_unchanged: is_unchanged(told), ..told.clone() });
        Ok(told.collect())
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        self.inner.place(wanted)
    }

    fn introduced(&self, disks: &[Introduced]) -> stream::Result<()> {
        self.inner.introduced(disks)
    }

    fn commit(&self) -> stream::Result<()> {
        self.inner.commit()
    }

    fn abort(&self, fate: Fate) {
        self.inner.abort(fate);
    }
}
