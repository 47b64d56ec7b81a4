//! Changing the header of an image that holds data, one sector at a time.
//!
//! A disk writes a sector as a whole and nothing larger. The extension may lie behind the first
//! sector while the autoclear bit lies in it, and a new extension may need the place where the
//! backing file's name stands. The header is therefore changed as raw bytes, by as few as possible,
//! in steps each of which leaves a header that means the same as before or as after.

use std::ops::Range;

use crate::error::{Condition, Error, Result};
use crate::layout::extension::{BitmapsExtension, Extension, PADDING};
use crate::layout::geometry::Geometry;
use crate::layout::header::{Header, autoclear, incompatible};
use crate::preflight::{check_readable, read_header};
use crate::storage::{Storage, StorageExt};

/// What a disk writes in one piece.
const SECTOR: usize = 512;
const BACKING_OFFSET: Range<usize> = 8..16;
pub(super) const AUTOCLEAR: Range<usize> = 88..96;
const HEADER_LENGTH: Range<usize> = 100..104;
/// Bytes of the extension: type, length and body.
const EXTENSION_BYTES: usize = 32;
const EXTENSION_HEAD_BYTES: usize = 8;
const BITMAPS_KIND: u32 = 0x2385_2875;
/// Autoclear bits that stay right when this crate writes; others must be cleared (qcow2 spec).
pub(crate) const KNOWN_AUTOCLEAR: u64 = autoclear::BITMAPS | autoclear::DATA_FILE_RAW;

/// Reads the header of an image whose bitmaps are to be changed, and refuses what must not be
/// written.
pub(crate) fn read_writable(file: &dyn Storage) -> Result<Header> {
    let header = read_header(file)?;
    check_readable(file, &header, true)?;
    refuse_marked(file, &header)?;
    Ok(header)
}

/// Refuses an image that says of itself that it must not be written to.
pub(crate) fn refuse_marked(file: &dyn Storage, header: &Header) -> Result<()> {
    if header.incompatible_features & incompatible::CORRUPT != 0 {
        return Err(Error::condition(file.name(), Condition::MarkedCorrupt));
    }
    if header.incompatible_features & incompatible::DIRTY != 0 {
        return Err(Error::condition(file.name(), Condition::NotClosed));
    }
    Ok(())
}

/// File offset of the body of the bitmaps extension, for error messages; 0 where there is none.
pub(crate) fn extension_at(file: &dyn Storage, geometry: Geometry) -> Result<u64> {
    let cluster = usize::try_from(geometry.cluster_size()).unwrap_or(0);
    let mut bytes = vec![0; cluster];
    file.read(&mut bytes, 0)?;
    let at = ExtensionList::of(&bytes).and_then(|list| list.bitmaps);
    Ok(at.map_or(0, |at| (at + EXTENSION_HEAD_BYTES) as u64))
}

/// Clears autoclear bits durably, in one sector, without touching anything else.
pub(crate) fn clear_autoclear(file: &dyn Storage, header: &Header, bits: u64) -> Result<()> {
    let kept = header.autoclear_features & !bits;
    if header.version < 3 || kept == header.autoclear_features {
        return Ok(());
    }
    file.write(&kept.to_be_bytes(), AUTOCLEAR.start as u64)?;
    file.make_durable()
}

/// Durably replaces, adds or (with `None`) removes the extension of a version 3 image and sets the
/// autoclear bit accordingly. What the extension points at must be durable.
pub(crate) fn set_extension(file: &dyn Storage, extension: Option<BitmapsExtension>) -> Result<()> {
    let (mut before, steps) = planned_steps(file, extension)?;
    for after in steps {
        write_sectors(file, &before, &after)?;
        before = after;
    }
    Ok(())
}

/// Refuses an image in which [`set_extension`] would find no room, before anything is allocated for
/// what it shall point at.
pub(crate) fn check_room(file: &dyn Storage, header: &Header) -> Result<()> {
    let directory_offset = 1 << header.cluster_bits;
    let some = BitmapsExtension { count: 1, directory_size: 32, directory_offset };
    planned_steps(file, Some(some)).map(drop)
}

/// The first cluster as it is, and the states it goes through.
fn planned_steps(
    file: &dyn Storage,
    extension: Option<BitmapsExtension>,
) -> Result<(Vec<u8>, Vec<Vec<u8>>)> {
    let header = read_header(file)?;
    let mut old = vec![0; 1 << header.cluster_bits];
    file.read(&mut old, 0)?;
    let name_len = header.backing_file.as_ref().map_or(0, |n| n.len());
    let steps = steps(&old, extension, name_len);
    let steps = steps.filter(|steps| {
        // A list that this arithmetic does not fit must not reach the disk.
        steps
            .iter()
            .all(|bytes| Header::decode(bytes).is_ok_and(|h| h.backing_file == header.backing_file))
    });
    let steps = steps.ok_or_else(|| Error::Refused {
        file: file.name(),
        reason: "has no room in its first cluster for a change of the bitmaps extension".into(),
    })?;
    Ok((old, steps))
}

/// Writes the sectors that differ, durably.
pub(super) fn write_sectors(file: &dyn Storage, before: &[u8], after: &[u8]) -> Result<()> {
    let pairs = before.chunks(SECTOR).zip(after.chunks(SECTOR));
    let mut is_changed = false;
    for (at, (old, new)) in (0u64..).step_by(SECTOR).zip(pairs) {
        if old != new {
            file.write(new, at)?;
            is_changed = true;
        }
    }
    if is_changed { file.make_durable() } else { Ok(()) }
}

/// The states of the first cluster on the way from `old` to one with that extension. Of each step
/// either one sector changes, or only bytes that the state before does not refer to. `None` when
/// there is no room, or the cluster is not the header of a version 3 image.
fn steps(old: &[u8], extension: Option<BitmapsExtension>, name_len: usize) -> Option<Vec<Vec<u8>>> {
    let mut steps = Vec::new();
    let mut now = old.to_vec();
    let list = ExtensionList::of(&now)?;
    if extension.is_some() && list.bitmaps.is_none() && name_len > 0 {
        let name_at = usize::try_from(be64(&now, BACKING_OFFSET)?).ok()?;
        if name_at < list.end.checked_add(EXTENSION_HEAD_BYTES + EXTENSION_BYTES)? {
            let name = name_at..name_at.checked_add(name_len)?;
            let Some(moved) = move_name(&now, name.clone(), list.end) else {
                return Some(vec![shift_name(&now, name, &list, extension)?]);
            };
            steps.extend(moved);
            now.clone_from(steps.last()?);
        }
    }
    if extension.is_some()
        && let Some(at) = list.bitmaps.filter(|at| is_split(*at))
        && let Some(moved) = move_list(&now, at, &list, name_len)
    {
        steps.extend(moved);
        now.clone_from(steps.last()?);
    }
    let list = ExtensionList::of(&now)?;
    let bits = be64(&now, AUTOCLEAR)?;
    let kept = bits & KNOWN_AUTOCLEAR & !autoclear::BITMAPS;
    let mut path = Path { steps, now, before: None };
    // What cannot be changed at once is hidden meanwhile.
    let stays_valid = list.bitmaps.is_some_and(|at| !is_split(at)) && extension.is_some();
    let shown = if stays_valid { bits & autoclear::BITMAPS } else { 0 };
    path.set(AUTOCLEAR.start, kept | shown)?;
    let new = list.edit(&path.now, extension)?;
    match list.bitmaps {
        Some(at) if extension.is_none() && sectors_between(&path.now, &new).count() > 1 => {
            // What follows cannot be moved up at once, so it stays where it is.
            path.push(with(&path.now, at, &PADDING.to_be_bytes())?);
        }
        // Backwards: an extension that is added begins with what ended the list before.
        _ => path.push_backwards(&new),
    }
    if extension.is_some() {
        path.set(AUTOCLEAR.start, kept | autoclear::BITMAPS)?;
    }
    Some(path.steps)
}

/// The states that a cluster goes through, and the last of them.
struct Path {
    steps: Vec<Vec<u8>>,
    now: Vec<u8>,
    /// The state before the last step, where that was added here.
    before: Option<Vec<u8>>,
}

impl Path {
    /// Adds a state. One sector is written at once, so what differs in the same one only is joined
    /// with the step before.
    fn push(&mut self, next: Vec<u8>) {
        if next == self.now {
            return;
        }
        match (&self.before, self.steps.last_mut()) {
            (Some(before), Some(last)) if sectors_between(before, &next).count() <= 1 => {
                last.clone_from(&next);
            }
            _ => {
                self.before = Some(std::mem::take(&mut self.now));
                self.steps.push(next.clone());
            }
        }
        self.now = next;
    }

    fn set(&mut self, at: usize, word: u64) -> Option<()> {
        self.push(with(&self.now, at, &word.to_be_bytes())?);
        Some(())
    }

    /// Takes over the sectors of `new`, the last one first.
    fn push_backwards(&mut self, new: &[u8]) {
        let changed: Vec<usize> = sectors_between(&self.now, new).collect();
        for sector in changed.into_iter().rev() {
            let range = sector..sector.saturating_add(SECTOR).min(new.len());
            let bytes = new.get(range).unwrap_or_default();
            if let Some(next) = with(&self.now, sector, bytes) {
                self.push(next);
            }
        }
    }
}

/// Where the sectors begin in which two states differ.
fn sectors_between<'a>(a: &'a [u8], b: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    let pairs = a.chunks(SECTOR).zip(b.chunks(SECTOR)).enumerate();
    pairs.filter(|(_, (a, b))| a != b).map(|(n, _)| n * SECTOR)
}

fn with(bytes: &[u8], at: usize, value: &[u8]) -> Option<Vec<u8>> {
    let mut new = bytes.to_vec();
    put(&mut new, at, value)?;
    Some(new)
}

/// Whether the fields of an extension at `at` lie in two sectors.
fn is_split(at: usize) -> bool {
    let (first, last) = (at + EXTENSION_HEAD_BYTES, at + EXTENSION_BYTES - 1);
    first / SECTOR != last / SECTOR
}

/// Moves the bitmaps extension, and what follows it, to a place where it lies in one sector: a copy
/// of the list's end behind everything in use, the backing file's name behind that, then the
/// reference to the name, and last the type and length of the old extension, which becomes padding
/// up to the copy (SPEC 3.4). `None` where the cluster has no room for that.
fn move_list(now: &[u8], at: usize, list: &ExtensionList, name_len: usize) -> Option<[Vec<u8>; 3]> {
    let name_at = usize::try_from(be64(now, BACKING_OFFSET)?).ok()?;
    let name = now.get(name_at..name_at.checked_add(name_len)?)?.to_vec();
    let end = list.end.checked_add(EXTENSION_HEAD_BYTES)?;
    let used = now.iter().rposition(|b| *b != 0)?.checked_add(1)?;
    let mut to = used.max(end).next_multiple_of(8);
    if is_split(to) {
        to = to.next_multiple_of(SECTOR);
    }
    let tail = now.get(at..list.end)?.to_vec();
    let new_end = to.checked_add(tail.len())?;
    let new_name = new_end.checked_add(EXTENSION_HEAD_BYTES)?;
    let mut copied = now.to_vec();
    put(&mut copied, to, &tail)?;
    put(&mut copied, new_end, &[0; EXTENSION_HEAD_BYTES])?;
    put(&mut copied, new_name, &name)?;
    let mut named = copied.clone();
    if name_len > 0 {
        put(&mut named, BACKING_OFFSET.start, &(new_name as u64).to_be_bytes())?;
    }
    let mut moved = named.clone();
    let padding = u32::try_from(to - at - EXTENSION_HEAD_BYTES).ok()?;
    put(&mut moved, at, &PADDING.to_be_bytes())?;
    put(&mut moved, at + 4, &padding.to_be_bytes())?;
    Some([copied, named, moved])
}

/// Moves the backing file's name behind everything in use, to make room for one more extension: the
/// copy first, then the reference to it.
fn move_name(now: &[u8], name: Range<usize>, list_end: usize) -> Option<[Vec<u8>; 2]> {
    let used = now.iter().rposition(|b| *b != 0)?.checked_add(1)?;
    let to = used.max(list_end + EXTENSION_HEAD_BYTES + EXTENSION_BYTES).next_multiple_of(8);
    let name = now.get(name)?.to_vec();
    let mut copied = now.to_vec();
    // A name that would share the first sector with its reference moves in one step with it.
    put(&mut copied, to, &name)?;
    let mut moved = copied.clone();
    put(&mut moved, BACKING_OFFSET.start, &(to as u64).to_be_bytes())?;
    Some([copied, moved])
}

/// Adds the extension where the cluster has no room for two copies of the backing file's name, all
/// in one step. With 512-byte clusters that is one sector all the same; a name that long in
/// clusters of 1 or 2 KiB is what a cut could tear.
fn shift_name(
    now: &[u8],
    name: Range<usize>,
    list: &ExtensionList,
    extension: Option<BitmapsExtension>,
) -> Option<Vec<u8>> {
    let text = now.get(name.clone())?.to_vec();
    let mut new = now.to_vec();
    new.get_mut(name)?.fill(0);
    let mut new = list.edit(&new, extension)?;
    let to = list.end + EXTENSION_BYTES + EXTENSION_HEAD_BYTES;
    put(&mut new, to, &text)?;
    put(&mut new, BACKING_OFFSET.start, &(to as u64).to_be_bytes())?;
    let bits = be64(&new, AUTOCLEAR)? & KNOWN_AUTOCLEAR | autoclear::BITMAPS;
    put(&mut new, AUTOCLEAR.start, &bits.to_be_bytes())?;
    Some(new)
}

/// Where the extensions of a raw header are.
pub(super) struct ExtensionList {
    /// The bitmaps extension.
    pub(super) bitmaps: Option<usize>,
    /// The end marker, or where one would stand.
    pub(super) end: usize,
}

impl ExtensionList {
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let area_end = end_of_area(bytes)?;
        let mut list = Self { bitmaps: None, end: be32(bytes, HEADER_LENGTH)? as usize };
        while list.end + EXTENSION_HEAD_BYTES <= area_end {
            let kind = be32(bytes, list.end..list.end + 4)?;
            let len = be32(bytes, list.end + 4..list.end + 8)? as usize;
            if kind == 0 {
                break;
            }
            if kind == BITMAPS_KIND {
                list.bitmaps = Some(list.end);
            }
            let next = len.checked_next_multiple_of(8)?.checked_add(EXTENSION_HEAD_BYTES)?;
            list.end = list.end.checked_add(next)?;
        }
        Some(list)
    }

    /// The cluster with the extension replaced, added at the end, or cut out.
    fn edit(&self, bytes: &[u8], extension: Option<BitmapsExtension>) -> Option<Vec<u8>> {
        let mut new = bytes.to_vec();
        let mut body = format_spec::Writer::new();
        if let Some(e) = extension {
            Extension::Bitmaps(e).encode(&mut body);
        }
        let body = body.into_bytes();
        match (self.bitmaps, extension) {
            (Some(at), Some(_)) => put(&mut new, at, &body)?,
            (None, Some(_)) => {
                put(&mut new, self.end, &body)?;
                put(&mut new, self.end + EXTENSION_BYTES, &[0; EXTENSION_HEAD_BYTES])?;
            }
            (Some(at), None) => {
                let behind = new.get(at + EXTENSION_BYTES..self.end)?.to_vec();
                let end = at.checked_add(behind.len())?;
                put(&mut new, at, &behind)?;
                put(&mut new, end, &[0; EXTENSION_HEAD_BYTES])?;
            }
            (None, None) => {}
        }
        Some(new)
    }
}

/// Where the place for extensions ends.
pub(super) fn end_of_area(bytes: &[u8]) -> Option<usize> {
    let backing = usize::try_from(be64(bytes, BACKING_OFFSET)?).ok()?;
    Some(if backing == 0 { bytes.len() } else { backing.min(bytes.len()) })
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    bytes.get_mut(at..at.checked_add(value.len())?)?.copy_from_slice(value);
    Some(())
}

pub(super) fn be32(bytes: &[u8], at: Range<usize>) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at)?.try_into().ok()?))
}

pub(super) fn be64(bytes: &[u8], at: Range<usize>) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::header::CompressionType;

    #[test]
    fn a_long_name_in_a_small_cluster_is_shifted() {
        let one = BitmapsExtension { count: 3, directory_size: 96, directory_offset: 0x3000 };
        for (bits, features, name_len) in [(9, 2, 200), (9, 2, 240), (11, 7, 900)] {
            let mut from = header(features, name_len, None);
            from.cluster_bits = bits;
            let steps = steps(&from.encode().unwrap(), Some(one), name_len).unwrap();
            assert_eq!(steps.len(), 1);
            let to = Header::decode(&steps[0]).unwrap();
            assert_eq!((valid(&to), to.backing_file), (Some(one), from.backing_file));
        }
        let full = Header { cluster_bits: 9, ..header(2, 241, None) };
        assert!(steps(&full.encode().unwrap(), Some(one), 241).is_none());
    }

    fn header(features: u8, name_len: usize, extension: Option<BitmapsExtension>) -> Header {
        let feature =
            |bit| crate::layout::extension::FeatureName { kind: 0, bit, name: "x".into() };
        let mut extensions = vec![Extension::FeatureNames((0..features).map(feature).collect())];
        if name_len > 0 {
            extensions.insert(0, Extension::BackingFormat("raw".into()));
        }
        extensions.extend(extension.map(Extension::Bitmaps));
        Header {
            version: 3,
            cluster_bits: 11,
            size: 1 << 20,
            crypt_method: 0,
            l1_size: 64,
            l1_table_offset: 0x1000,
            refcount_table_offset: 0x2000,
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: u64::from(extension.is_some()),
            refcount_order: 4,
            compression_type: CompressionType::Zlib,
            further_fields: Vec::new(),
            extensions,
            backing_file: (name_len > 0).then(|| "n".repeat(name_len).into()),
        }
    }

    fn valid(h: &Header) -> Option<BitmapsExtension> {
        h.bitmaps().filter(|_| h.autoclear_features & autoclear::BITMAPS != 0)
    }

    fn without_padding(h: &Header) -> usize {
        let is_padding = |e: &&Extension| !matches!(e, Extension::Unknown { kind: PADDING, .. });
        h.extensions.iter().filter(is_padding).count()
    }

    /// Every mix of old and new sectors of every step decodes to the old or the new bitmaps, or to
    /// none where that cannot be helped, and to the same backing file.
    fn walk(from: &Header, to: Option<BitmapsExtension>) -> bool {
        let old = from.encode().unwrap();
        let name_len = from.backing_file.as_ref().map_or(0, |n| n.len());
        let mut before = old.clone();
        let mut has_lost = false;
        for after in steps(&old, to, name_len).unwrap() {
            for mix in 0..16usize {
                let pairs = before.chunks(SECTOR).zip(after.chunks(SECTOR)).enumerate();
                let mixed = pairs.flat_map(|(i, (b, a))| if mix >> i & 1 == 0 { b } else { a });
                let mixed: Vec<u8> = mixed.copied().collect();
                let h = Header::decode(&mixed).unwrap();
                assert_eq!(h.backing_file, from.backing_file);
                let now = valid(&h);
                assert!(now == valid(from) || now == to || now.is_none());
                has_lost |= now.is_none() && valid(from).is_some() && to.is_some();
            }
            before = after;
        }
        let h = Header::decode(&before).unwrap();
        assert_eq!((valid(&h), h.bitmaps()), (to, to));
        assert_eq!(
            without_padding(&h),
            from.extensions.len() + usize::from(to.is_some())
                - usize::from(from.bitmaps().is_some())
        );
        has_lost
    }

    #[test]
    fn no_cut_between_two_sectors_breaks_the_header() {
        let one = BitmapsExtension { count: 3, directory_size: 96, directory_offset: 0x3000 };
        let two = BitmapsExtension { count: 4, directory_size: 128, directory_offset: 0x13000 };
        // Moves the extension by 8 bytes at a time across the borders of the first three sectors.
        for shift in 0..90 {
            for name_len in [0, 1, 7, 8, 33, 100, 300] {
                let header = |extension| {
                    let mut h = header(5, name_len, extension);
                    let data = vec![1; shift * 8];
                    h.extensions.insert(0, Extension::Unknown { kind: 7, data });
                    h
                };
                walk(&header(None), Some(one));
                walk(&header(Some(one)), None);
                let has_lost = walk(&header(Some(one)), Some(two));
                let at = header(Some(one)).encode().unwrap();
                let list = ExtensionList::of(&at).unwrap();
                let is_full = list.end + 2 * (EXTENSION_BYTES + name_len) + 16 > 2048;
                assert!(
                    !has_lost || is_full,
                    "extension at {:?}, name of {name_len}",
                    list.bitmaps
                );
            }
        }
    }
}
