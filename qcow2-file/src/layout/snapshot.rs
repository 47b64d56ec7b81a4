//! The snapshot table. qcow2 spec, "Snapshots".
//!
//! Entries have no fixed length and the header does not give the table's: whoever reads it decodes
//! [`SnapshotHead`] from 40 bytes, then the whole entry from as many as the head asks for.

use format_spec::{Malformed, Problem, Reader};

use super::geometry::Geometry;
use crate::limits;

/// Bytes of an entry before its extra data.
pub const HEAD_BYTES: usize = 40;

/// The fixed part of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SnapshotHead {
    /// Offset of the snapshot's L1 table, cluster aligned.
    pub l1_table_offset: u64,
    /// Entries of that table.
    pub l1_size: u32,
    /// Length of the unique id in bytes.
    pub id_len: u16,
    /// Length of the name in bytes.
    pub name_len: u16,
    /// Seconds since the epoch when it was taken.
    pub date_seconds: u32,
    /// Bytes of VM state, 0 when there is none. Extra data may give a longer one.
    pub vm_state_size: u32,
    /// Length of the extra data in bytes.
    pub extra_len: u32,
}

impl SnapshotHead {
    /// Decodes the head of an entry that stands at file offset `at`.
    pub fn decode(bytes: &[u8], at: u64, geometry: Geometry) -> Result<Self, Malformed> {
        let mut r = Reader::new(bytes, at);
        let l1_table_offset = r.be64("snapshot l1_table_offset")?;
        let l1_size = r.be32("snapshot l1_size")?;
        let id_len = r.be16("snapshot id length")?;
        let name_len = r.be16("snapshot name length")?;
        let date_seconds = r.be32("snapshot date")?;
        r.take(12, "snapshot clock")?;
        let vm_state_size = r.be32("snapshot vm_state_size")?;
        let extra_len = r.be32("snapshot extra data size")?;
        let max = limits::MAX_L1_BYTES / 8;
        if u64::from(l1_size) > max {
            let problem = Problem::OutOfRange { value: u64::from(l1_size), min: 0, max };
            return Err(Malformed::new(at.saturating_add(8), "snapshot l1_size", problem));
        }
        let align = geometry.cluster_size();
        if geometry.in_cluster(l1_table_offset) != 0 || (l1_size > 0 && l1_table_offset == 0) {
            let problem = Problem::Misaligned { value: l1_table_offset, align };
            return Err(Malformed::new(at, "snapshot l1_table_offset", problem));
        }
        if extra_len > limits::MAX_SNAPSHOT_EXTRA_BYTES {
            let max = u64::from(limits::MAX_SNAPSHOT_EXTRA_BYTES);
            let problem = Problem::OutOfRange { value: u64::from(extra_len), min: 0, max };
            return Err(Malformed::new(at.saturating_add(36), "snapshot extra data size", problem));
        }
        Ok(Self {
            l1_table_offset,
            l1_size,
            id_len,
            name_len,
            date_seconds,
            vm_state_size,
            extra_len,
        })
    }

    /// Length of the whole entry in bytes, padding included.
    pub fn entry_len(&self) -> u64 {
        let strings = u64::from(self.id_len).saturating_add(u64::from(self.name_len));
        let len = strings.saturating_add(u64::from(self.extra_len));
        len.saturating_add(HEAD_BYTES as u64).next_multiple_of(8)
    }
}

/// An entry of the snapshot table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The fixed part.
    pub head: SnapshotHead,
    /// Unique id.
    pub id: String,
    /// Name. Not unique.
    pub name: String,
    /// Virtual size when it was taken, where the entry says so.
    pub disk_size: Option<u64>,
    /// Bytes of VM state.
    pub vm_state_size: u64,
}

impl Snapshot {
    /// Decodes an entry of [`SnapshotHead::entry_len`] bytes that stands at file offset `at`.
    /// Names serve messages only, so bytes that are no UTF-8 are replaced, not refused.
    pub fn decode(bytes: &[u8], at: u64, geometry: Geometry) -> Result<Self, Malformed> {
        let head = SnapshotHead::decode(bytes, at, geometry)?;
        let mut r = Reader::new(bytes, at);
        r.take(HEAD_BYTES, "snapshot")?;
        let mut extra = r.sub(head.extra_len as usize, "snapshot extra data")?;
        let mut vm_state_size = u64::from(head.vm_state_size);
        if extra.left() >= 8 {
            vm_state_size = extra.be64("snapshot vm_state_size_large")?;
        }
        let has_size = extra.left() >= 8;
        let disk_size =
            if has_size { Some(extra.be64("snapshot virtual disk size")?) } else { None };
        let id = r.take(usize::from(head.id_len), "snapshot id")?;
        let name = r.take(usize::from(head.name_len), "snapshot name")?;
        Ok(Self {
            head,
            id: String::from_utf8_lossy(id).into_owned(),
            name: String::from_utf8_lossy(name).into_owned(),
            disk_size,
            vm_state_size,
        })
    }
}

#[cfg(test)]
mod tests {
    use format_spec::Writer;

    use super::*;

    fn entry(extra: &[u8]) -> Vec<u8> {
        let mut w = Writer::new();
        w.be64(0x50000).be32(3).bytes(&[0, 1, 0, 4]).be32(7).bytes(&[0; 12]).be32(9);
        w.be32(u32::try_from(extra.len()).unwrap())
            .bytes(extra)
            .bytes(b"1")
            .bytes(b"snap")
            .pad_to(8);
        w.into_bytes()
    }

    #[test]
    fn entries_with_and_without_extra_data() {
        let g = Geometry::new(16, 4, false);
        let bytes = entry(&[0; 0]);
        let s = Snapshot::decode(&bytes, 0, g).unwrap();
        assert_eq!(s.head.entry_len(), bytes.len() as u64);
        assert_eq!((s.id.as_str(), s.name.as_str(), s.disk_size), ("1", "snap", None));
        assert_eq!((s.head.l1_table_offset, s.head.l1_size, s.vm_state_size), (0x50000, 3, 9));
        let mut extra = [0; 24];
        extra[7] = 5;
        extra[14] = 1;
        let bytes = entry(&extra);
        let s = Snapshot::decode(&bytes, 0, g).unwrap();
        assert_eq!((s.disk_size, s.vm_state_size, s.name.as_str()), (Some(256), 5, "snap"));
        assert_eq!(s.head.entry_len(), bytes.len() as u64);
    }

    #[test]
    fn lies_are_named() {
        let g = Geometry::new(16, 4, false);
        let whole = entry(&[0; 16]);
        for cut in 0..whole.len() - 3 {
            assert!(Snapshot::decode(&whole[..cut], 0, g).is_err(), "cut at {cut}");
        }
        for (at, field) in [
            (7, "snapshot l1_table_offset"),
            (8, "snapshot l1_size"),
            (36, "snapshot extra data size"),
        ] {
            let mut bytes = whole.clone();
            bytes[at] = 0x7f;
            assert_eq!(Snapshot::decode(&bytes, 0, g).unwrap_err().field, field);
        }
    }
}
