//! Images made by hand, in memory, so that every byte of them can be wrong.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use qcow2_file::layout::entry::{COPIED, CompressedEntry, L2Entry};
use qcow2_file::layout::extension::Extension;
use qcow2_file::layout::header::{CompressionType, Header, incompatible};
use qcow2_file::{HostOffset, Memory, Storage};

/// An image in the making: header, refcount table, L1 table, then whatever is mapped, in order.
pub(crate) struct Hand {
    pub(crate) header: Header,
    pub(crate) file: Memory,
    tables: BTreeMap<u64, u64>,
    end: u64,
}

impl Hand {
    pub(crate) fn new(cluster_bits: u32, size: u64) -> Self {
        let cluster = 1u64 << cluster_bits;
        let mut header = Header {
            version: 3,
            cluster_bits,
            size,
            crypt_method: 0,
            l1_size: 0,
            l1_table_offset: 2 * cluster,
            refcount_table_offset: cluster,
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            compression_type: CompressionType::Zlib,
            further_fields: Vec::new(),
            extensions: Vec::new(),
            backing_file: None,
        };
        let entries = header.geometry().l1_entries(size);
        header.l1_size = u32::try_from(entries).unwrap();
        let end = (2 * cluster + entries * 8).next_multiple_of(cluster);
        let hand = Self { header, file: Memory::named("hand"), tables: BTreeMap::new(), end };
        hand.file.set_len(end).unwrap();
        hand
    }

    pub(crate) fn with_subclusters(cluster_bits: u32, size: u64) -> Self {
        let mut hand = Self::new(cluster_bits, size);
        hand.header.incompatible_features |= incompatible::EXTENDED_L2;
        let g = hand.header.geometry();
        hand.header.l1_size = u32::try_from(g.l1_entries(size)).unwrap();
        hand.end = (hand.header.l1_table_offset + g.l1_entries(size) * 8)
            .next_multiple_of(g.cluster_size());
        hand
    }

    pub(crate) fn cluster(&self) -> u64 {
        1 << self.header.cluster_bits
    }

    pub(crate) fn allocate(&mut self) -> u64 {
        let at = self.end;
        self.end += self.cluster();
        self.file.set_len(self.end).unwrap();
        at
    }

    /// Where the L1 entry of `guest` stands.
    pub(crate) fn l1_at(&self, guest: u64) -> u64 {
        self.header.l1_table_offset + guest / self.header.geometry().l2_span() * 8
    }

    /// Where the L2 entry of `guest` stands; makes the table when there is none.
    pub(crate) fn l2_at(&mut self, guest: u64) -> u64 {
        let g = self.header.geometry();
        let index = guest / g.l2_span();
        let table = match self.tables.get(&index) {
            Some(table) => *table,
            None => {
                let table = self.allocate();
                self.tables.insert(index, table);
                self.word(self.l1_at(guest), table | COPIED);
                table
            }
        };
        table + guest % g.l2_span() / g.cluster_size() * g.l2_entry_size()
    }

    pub(crate) fn word(&self, at: u64, value: u64) {
        self.file.write_at(&value.to_be_bytes(), at).unwrap();
    }

    /// Maps a data cluster full of `fill`.
    pub(crate) fn data(&mut self, guest: u64, fill: u8) -> u64 {
        let entry = self.l2_at(guest);
        let host = self.allocate();
        self.file.write_at(&vec![fill; 1 << self.header.cluster_bits], host).unwrap();
        self.word(entry, host | COPIED);
        if self.header.geometry().has_subclusters() {
            self.word(entry + 8, 0xffff_ffff);
        }
        host
    }

    /// Maps a compressed cluster.
    pub(crate) fn compressed(&mut self, guest: u64, content: &[u8]) -> u64 {
        let entry = self.l2_at(guest);
        let stored = match self.header.compression_type {
            CompressionType::Zlib => {
                let level = flate2::Compression::default();
                let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), level);
                deflate.write_all(content).unwrap();
                deflate.finish().unwrap()
            }
            CompressionType::Zstd => zstd::bulk::compress(content, 3).unwrap(),
        };
        let host = self.allocate() + 77;
        self.file.write_at(&stored, host).unwrap();
        let g = self.header.geometry();
        let covering = CompressedEntry::covering(HostOffset(host), stored.len() as u64, g);
        self.word(entry, L2Entry::Compressed(covering.unwrap()).encode(g).0);
        host
    }

    pub(crate) fn extension(mut self, extension: Extension) -> Self {
        self.header.extensions.push(extension);
        self
    }

    pub(crate) fn finish(self) -> Arc<Memory> {
        self.file.write_at(&self.header.encode().unwrap(), 0).unwrap();
        Arc::new(self.file)
    }
}
