//! A bitmaps extension that breaks the format: with it nobody opens the image, without it the disk
//! is all there.

use std::sync::Arc;

use super::header::{
    AUTOCLEAR, ExtensionList, be32, be64, end_of_area, put, refuse_marked, write_sectors,
};
use crate::error::{Condition, Error, Result};
use crate::layout::extension::PADDING;
use crate::layout::header::{Header, autoclear};
use crate::limits::CLUSTER_BITS;
use crate::preflight::{check_readable, cluster_size};
use crate::storage::{Storage, StorageExt};

/// Hides it, durably, where the image is sound without it. Answers whether there was one; one that
/// can be read is none.
pub(super) fn hide(file: &Arc<dyn Storage>) -> Result<bool> {
    let Some(old) = first_cluster(&**file)? else { return Ok(false) };
    let Some((steps, header)) = hidden(&old).filter(|_| Header::decode(&old).is_err()) else {
        return Ok(false);
    };
    check_readable(&**file, &header, true)?;
    refuse_marked(&**file, &header)?;
    if crate::check::check(file, &header)?.is_corrupt() {
        let reason = " beyond its bitmaps and is not written to".to_owned();
        return Err(Error::condition(file.name(), Condition::Corrupt(reason)));
    }
    let mut before = old;
    for after in steps {
        write_sectors(&**file, &before, &after)?;
        before = after;
    }
    Ok(true)
}

fn first_cluster(file: &dyn Storage) -> Result<Option<Vec<u8>>> {
    let mut start = vec![0; 1 << CLUSTER_BITS.start()];
    if file.length()? < start.len() as u64 {
        return Ok(None);
    }
    file.read(&mut start, 0)?;
    let Some(len) = cluster_size(&start).and_then(|len| usize::try_from(len).ok()) else {
        return Ok(None);
    };
    let mut cluster = vec![0; len];
    file.read(&mut cluster, 0)?;
    Ok(Some(cluster))
}

/// The states of the first cluster on the way there, and what its header says in the end. The
/// extension becomes padding in its place: a type that programs skip.
fn hidden(old: &[u8]) -> Option<([Vec<u8>; 2], Header)> {
    let ExtensionList { bitmaps, end } = ExtensionList::of(old)?;
    let at = bitmaps?;
    let mut unmarked = old.to_vec();
    let bits = be64(old, AUTOCLEAR)? & !autoclear::BITMAPS;
    put(&mut unmarked, AUTOCLEAR.start, &bits.to_be_bytes())?;
    // Behind one of a wrong length what ends the list may be no end marker, which is all zero.
    if be32(old, end..end.checked_add(4)?) == Some(0) && end_of_area(old)? >= end.checked_add(8)? {
        put(&mut unmarked, end, &[0; 8])?;
    }
    let mut padded = unmarked.clone();
    put(&mut padded, at, &PADDING.to_be_bytes())?;
    let header = Header::decode(&padded).ok().filter(|header| header.version >= 3)?;
    Some(([unmarked, padded], header))
}
