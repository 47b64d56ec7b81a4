//! QEMU's migration stream, as QEMU 7.2 to 10.0 write and read it. SPEC 4.2 to 4.4 and 7.
//!
//! Decoders are handed what has arrived and answer with a [`Step`]: an item that borrows from it,
//! or how many bytes they must see to go on. They keep what spans items (names, the section that is
//! open) and never more than a bounded amount of it. Every item encodes back to the bytes it was
//! decoded from, fields included that QEMU leaves stale.
//!
//! [`stream::Decoder`] takes a whole connection apart; the other modules are its parts and stand
//! alone too.

pub mod block;
pub mod command;
pub mod configuration;
pub mod container;
pub mod dirty_bitmap;
pub mod multifd;
pub mod ram;
pub mod reply;
mod scan;
mod show;
pub mod stream;

use crate::{Malformed, Problem, Reader};

/// Largest item of any decoder here: a record of the native dialect. A shell whose buffer holds
/// this much never has to grow it.
pub const MAX_ITEM: usize = crate::native::frame::MAX_BODY + 16;

/// What a decoder answers to the bytes that have arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step<T> {
    /// The next item, and how many bytes it took.
    Item(T, usize),
    /// The item needs at least this many bytes, more than there are: at most [`MAX_ITEM`]. At the
    /// end of the stream this is an error for the shell to make, with [`cut_off`].
    Need(usize),
}

/// The error for a stream that ends where a decoder answered [`Step::Need`].
pub fn cut_off(offset: u64, needed: usize, left: usize) -> Malformed {
    let problem = Problem::Truncated { needed: needed as u64, left: left as u64 };
    Malformed::new(offset, "next item of the stream", problem)
}

/// Runs `decode` on what has arrived; where it runs out of bytes that is a [`Step::Need`].
fn attempt<'a, T>(
    input: &'a [u8],
    offset: u64,
    decode: impl FnOnce(&mut Reader<'a>) -> Result<T, Malformed>,
) -> Result<Step<T>, Malformed> {
    let mut reader = Reader::new(input, offset);
    match decode(&mut reader) {
        Ok(item) => Ok(Step::Item(item, input.len().saturating_sub(reader.left()))),
        Err(Malformed { offset: at, problem: Problem::Truncated { needed, .. }, .. }) => {
            let end = at.saturating_sub(offset).saturating_add(needed);
            Ok(Step::Need(usize::try_from(end).unwrap_or(usize::MAX)))
        }
        Err(error) => Err(error),
    }
}

impl<T> Step<T> {
    fn map<U>(self, change: impl FnOnce(T) -> U) -> Step<U> {
        match self {
            Self::Item(item, len) => Step::Item(change(item), len),
            Self::Need(len) => Step::Need(len),
        }
    }
}
