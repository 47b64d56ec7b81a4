//! The failure after which a file is left alone.
//!
//! Whoever comes after it is told what failed, not merely that something did: where several threads
//! write, the user may hear of the one that came second.

use std::io;
use std::sync::{Arc, OnceLock};

use crate::error::{Error, Result};

/// Remembers the first failure.
#[derive(Debug, Default)]
pub(crate) struct FirstFailure(OnceLock<Failure>);

#[derive(Debug)]
enum Failure {
    /// Of the system: what an [`Error::Io`] is made of.
    System {
        file: Arc<str>,
        action: &'static str,
        offset: u64,
        errno: i32,
    },
    Other,
}

impl FirstFailure {
    /// Notes a failure, unless there was one before.
    pub(crate) fn note(&self, error: &Error) {
        self.0.get_or_init(|| match error {
            Error::Io { file, action, offset, source } => {
                source.raw_os_error().map_or(Failure::Other, |errno| Failure::System {
                    file: Arc::clone(file),
                    action,
                    offset: *offset,
                    errno,
                })
            }
            _ => Failure::Other,
        });
    }

    /// `Err` once something failed: the same again where it was the system's failure, else a
    /// refusal of `file` for `reason`.
    pub(crate) fn check(&self, file: impl FnOnce() -> Arc<str>, reason: &str) -> Result<()> {
        match self.0.get() {
            None => Ok(()),
            Some(Failure::System { file, action, offset, errno }) => Err(Error::Io {
                file: Arc::clone(file),
                action,
                offset: *offset,
                source: io::Error::from_raw_os_error(*errno),
            }),
            Some(Failure::Other) => Err(Error::Refused { file: file(), reason: reason.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Error {
        let source = io::Error::from_raw_os_error(28);
        Error::Io { file: "f".into(), action: "write", offset: 7, source }
    }

    fn refused() -> Error {
        Error::Refused { file: "f".into(), reason: "first".into() }
    }

    #[test]
    fn the_first_failure_is_told_again() {
        let check = |failure: &FirstFailure| failure.check(|| "g".into(), "later");
        let failure = FirstFailure::default();
        assert!(check(&failure).is_ok());
        failure.note(&full());
        failure.note(&refused());
        for _ in 0..2 {
            let Err(Error::Io { file, action: "write", offset: 7, source }) = check(&failure)
            else {
                panic!("another failure")
            };
            assert_eq!((&*file, source.raw_os_error()), ("f", Some(28)));
        }
        let failure = FirstFailure::default();
        failure.note(&refused());
        failure.note(&full());
        let Err(Error::Refused { file, reason }) = check(&failure) else {
            panic!("another failure")
        };
        assert_eq!((&*file, &*reason), ("g", "later"));
    }
}
