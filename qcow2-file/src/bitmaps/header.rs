//! Changing the header of an image that holds data: in an order in which no torn write, cut between
//! two sectors, leaves a header that means something else than the old or the new one.

use crate::error::{Error, Result};
use crate::layout::header::{Header, autoclear, incompatible};
use crate::preflight::read_header;
use crate::storage::{Storage, StorageExt};

/// What a disk writes in one piece.
const SECTOR: usize = 512;
/// Header field `backing_file_offset`.
const BACKING_OFFSET: std::ops::Range<usize> = 8..16;
/// Header field `autoclear_features`.
const AUTOCLEAR_AT: u64 = 88;
/// Autoclear bits that stay right when this crate writes; others must be cleared (qcow2 spec).
pub(crate) const KNOWN_AUTOCLEAR: u64 = autoclear::BITMAPS | autoclear::DATA_FILE_RAW;

/// Reads the header of an image whose bitmaps are to be changed, and refuses what must not be
/// written.
pub(crate) fn read_writable(file: &dyn Storage) -> Result<Header> {
    let header = read_header(file)?;
    crate::preflight::check_readable(file, &header, true)?;
    let refuse = |reason: &str| Err(Error::Refused { file: file.name(), reason: reason.into() });
    if header.incompatible_features & incompatible::CORRUPT != 0 {
        return refuse(
            "is marked corrupt and is not written to; repair it with qemu-img check -r all",
        );
    }
    if header.incompatible_features & incompatible::DIRTY != 0 {
        return refuse(
            "was not closed properly, so its refcounts are not to be trusted; repair it with \
             qemu-img check -r all",
        );
    }
    Ok(header)
}

/// Clears autoclear bits durably, in one sector, without touching anything else.
pub(crate) fn clear_autoclear(file: &dyn Storage, header: &Header, bits: u64) -> Result<()> {
    let kept = header.autoclear_features & !bits;
    if header.version < 3 || kept == header.autoclear_features {
        return Ok(());
    }
    file.write(&kept.to_be_bytes(), AUTOCLEAR_AT)?;
    file.make_durable()
}

/// Reads the header as it is now, changes it and writes it back durably. What it points at must be
/// durable.
pub(crate) fn update(file: &dyn Storage, change: impl FnOnce(&mut Header)) -> Result<()> {
    let mut header = read_header(file)?;
    let mut old = vec![0; 1 << header.cluster_bits];
    file.read(&mut old, 0)?;
    change(&mut header);
    header.autoclear_features &= KNOWN_AUTOCLEAR;
    let new = header.encode().ok_or_else(|| Error::Refused {
        file: file.name(),
        reason: "has no room in its first cluster for the bitmaps extension".into(),
    })?;
    let Some(name_len) = header.backing_file.as_ref().map(String::len).filter(|n| *n > 0) else {
        return write_in_order(file, &old, new);
    };
    if is_safe(&old, &new) {
        return write_in_order(file, &old, new);
    }
    match relocate_name(&old, &new, name_len) {
        Some(relocated) => write_in_order(file, &old, relocated),
        None => write_in_order(file, &old, new),
    }
}

/// Whether the sectors behind the first may be written before it: they change nothing that the old
/// first sector refers to.
fn is_safe(old: &[u8], new: &[u8]) -> bool {
    let end = used_end(old);
    let tail = |bytes: &[u8]| bytes.get(SECTOR..end.max(SECTOR)).map(<[u8]>::to_vec);
    tail(old) == tail(new)
}

/// The same header with the backing file's name behind everything that either header uses, and with
/// the old one's bytes left where the new one needs none. `None` when there is no room.
fn relocate_name(old: &[u8], new: &[u8], name_len: usize) -> Option<Vec<u8>> {
    let from = u64::from_be_bytes(new.get(BACKING_OFFSET)?.try_into().ok()?);
    let from = usize::try_from(from).ok()?;
    let to = used_end(old).max(used_end(new)).next_multiple_of(8);
    let name = new.get(from..from.checked_add(name_len)?)?.to_vec();
    let mut moved = new.to_vec();
    let kept = from.max(SECTOR);
    moved.get_mut(from..)?.fill(0);
    moved.get_mut(kept..)?.copy_from_slice(old.get(kept..)?);
    moved.get_mut(to..to.checked_add(name_len)?)?.copy_from_slice(&name);
    moved.get_mut(BACKING_OFFSET)?.copy_from_slice(&(to as u64).to_be_bytes());
    Some(moved)
}

/// Writes what differs: the sectors behind the first and, once they are durable, the first. Where
/// the old header needs what changes behind its first sector, which takes a list of extensions
/// longer than a sector, all goes in one write.
fn write_in_order(file: &dyn Storage, old: &[u8], new: Vec<u8>) -> Result<()> {
    let (head, tail) = new.split_at(SECTOR.min(new.len()));
    let (old_head, old_tail) = old.split_at(SECTOR.min(old.len()));
    if tail != old_tail {
        if head != old_head && !is_safe(old, &new) {
            file.write(&new, 0)?;
            return file.make_durable();
        }
        file.write(tail, head.len() as u64)?;
        file.make_durable()?;
    }
    if head != old_head {
        file.write(head, 0)?;
        file.make_durable()?;
    }
    Ok(())
}

fn used_end(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1)
}
