//! A listener while a user waits for it: Ctrl-C ends the waiting, and who is turned away is told.

use std::io;
use std::sync::mpsc::Receiver;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use mig_core::transport::{Connection, Listen, Nature};

use crate::Observer;

/// How often it is looked whether the user wants to stop.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// A listener that an observer watches. Accepting ends with an error when the observer wants to
/// stop.
pub struct Arrivals<'a> {
    listen: &'a dyn Listen,
    observer: &'a dyn Observer,
    /// Why connections were turned away before they were handed out.
    refused: Mutex<Receiver<String>>,
    /// What was put back.
    early: Mutex<Option<Connection>>,
}

impl<'a> Arrivals<'a> {
    /// `refused`: where the listener tells of connections that it turns away, one sentence each.
    pub fn new(
        listen: &'a dyn Listen,
        observer: &'a dyn Observer,
        refused: Receiver<String>,
    ) -> Self {
        Self { listen, observer, refused: Mutex::new(refused), early: Mutex::default() }
    }

    fn tell(&self) {
        let refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.try_iter().for_each(|why| self.observer.warning(&why));
    }
}

impl Listen for Arrivals<'_> {
    fn nature(&self) -> Nature {
        self.listen.nature()
    }

    fn has_strangers(&self) -> bool {
        self.listen.has_strangers()
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        let end = limit.and_then(|limit| Instant::now().checked_add(limit));
        if let Some(early) = self.early.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Ok(early);
        }
        loop {
            // However many come, one after the other, and are no migration.
            if self.observer.is_cancelled() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let slice = left.map_or(LOOK_INTERVAL, |left| left.min(LOOK_INTERVAL));
            let accepted = self.listen.accept(Some(slice));
            self.tell();
            match accepted {
                Err(error)
                    if error.kind() == io::ErrorKind::TimedOut
                        && left.is_none_or(|left| left > slice) => {}
                accepted => return accepted,
            }
        }
    }

    fn put_back(&self, connection: Connection) {
        *self.early.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
    }

    fn close(&self) {
        self.listen.close();
    }
}
