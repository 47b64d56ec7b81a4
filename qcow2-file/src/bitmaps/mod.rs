//! Persistent dirty bitmaps in a qcow2 file. qcow2 spec, "Bitmaps extension".
//!
//! * [`Bitmaps`] lists and loads them, [`write()`] stores new ones, [`BitmapEditor`] changes those
//!   of an existing image in one atomic step, [`check`] reports everything that is wrong with them.
//! * [`Guard`](crate::guard::Guard) keeps them right while guest data is being written.
//!
//! A bitmap may be used when the autoclear bit is set and its own `in_use` flag is clear. What the
//! spec allows but this crate does not know (another type, unknown flags or extra data) is listed,
//! kept byte for byte, never loaded and never changed except to be marked `in_use` or removed. QEMU
//! 10.0 refuses to open an image that holds such a bitmap.

mod bits;
pub(crate) mod change;
mod check;
mod edit;
pub(crate) mod header;
pub(crate) mod load;
mod repair;
pub(crate) mod store;
pub(crate) mod table;
pub(crate) mod tracker;
mod unreadable;

pub use bits::{Bits, Runs, granules};
pub use check::{BitmapCheck, Defect, Finding, Severity, check};
pub use edit::{BitmapEditor, MergeSource};
pub use load::{Bitmaps, Entry, State, stale_extension};
pub use repair::{RepairOptions, Repaired, clear_unfinished, repair, strip};
pub use store::write;

/// A bitmap as it is to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PersistentBitmap {
    /// Name, 1 to 1023 bytes, unique in its image.
    pub name: String,
    /// log2 of the guest bytes per bit: 9 to 31.
    pub granularity_bits: u8,
    /// Whether it records writes (`auto` on disk).
    pub is_enabled: bool,
    /// Its bits, one per granule of the disk.
    pub bits: Bits,
}
