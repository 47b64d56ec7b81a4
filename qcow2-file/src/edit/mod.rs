//! Writing into an existing image: refcounts, allocator, ordered flush.

mod allocator;
pub(crate) mod refcounts;

pub use allocator::Allocator;
pub(crate) use refcounts::Refcounts;

use crate::error::Error;
use crate::storage::Storage;

/// What every call answers once a metadata write or sync has failed: what the file holds is not
/// known any more, so nothing is written on top of it.
fn poisoned(file: &dyn Storage) -> Error {
    let reason = "an earlier write or sync of its metadata failed; close it, check it and open it \
                  again";
    Error::Refused { file: file.name(), reason: reason.into() }
}
