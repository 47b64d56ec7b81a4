//! The way back to the source.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use format_spec::native::answer::Answer;
use mig_core::section::AnswerWriter;
use mig_core::stream::{Result, StreamWriter};

/// Writes answers on the reverse direction of main, from any thread. Silent on a one-way stream.
#[derive(Debug)]
pub(super) struct Back {
    writer: Option<Mutex<StreamWriter>>,
    written: Arc<AtomicU64>,
    /// Bytes written when life was last looked for.
    seen: AtomicU64,
}

impl Back {
    /// `None` where nobody reads answers.
    pub(super) fn new(writer: Option<StreamWriter>) -> Self {
        let written = writer.as_ref().map(StreamWriter::written).unwrap_or_default();
        Self { writer: writer.map(Mutex::new), written, seen: AtomicU64::new(0) }
    }

    /// Whether nobody reads answers.
    pub(super) fn is_one_way(&self) -> bool {
        self.writer.is_none()
    }

    /// Says that this side is still there, if nothing was said since the last call. An error where
    /// nobody can hear it.
    pub(super) fn keepalive(&self) -> Result<()> {
        let written = self.written.load(Ordering::Relaxed);
        if self.seen.swap(written, Ordering::Relaxed) != written {
            return Ok(());
        }
        let Some(writer) = &self.writer else { return Ok(()) };
        let mut writer = match writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        let said = writer.record(|out| Answer::Keepalive.encode(out)).and_then(|()| writer.flush());
        self.seen.store(self.written.load(Ordering::Relaxed), Ordering::Relaxed);
        said
    }
}

impl AnswerWriter for Back {
    fn answer(&self, answer: &Answer<'_>) -> Result<()> {
        let Some(writer) = &self.writer else { return Ok(()) };
        let mut writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
        writer.record(|out| answer.encode(out))?;
        writer.flush()
    }
}
