//! Receipts: what a finished destination leaves, so that a command whose last answer was lost finds
//! out that it had finished. SPEC 10.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use bitmap_mig::Bitmap;
use format_spec::Reader;
use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::answer::{Published, PublishedBitmap};
use format_spec::native::frame::{Record, encode_end};
use format_spec::native::journal::{JournalRecord, RECEIPT_MAGIC, decode_start, encode_start};

use super::device::change_unseen;
use super::log::Log;
use super::proved::stamps;
use crate::facts::{Stamp, stamp_of};
use crate::proof::DiskProof;
use crate::publish::sync_directory;
use crate::{Error, Renames, Result};

/// Longest receipt that is read.
const MAX_RECEIPT_BYTES: u64 = 16 << 20;

/// A bitmap that was published with the disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ReceiptBitmap {
    pub(crate) name: String,
    pub(crate) granularity: u32,
    pub(crate) is_enabled: bool,
    pub(crate) digest: BitmapDigest,
}

impl ReceiptBitmap {
    /// Of a bitmap that is stored as `name`, and hashes to that.
    pub(crate) fn of(name: String, bitmap: &Bitmap, digest: BitmapDigest) -> Self {
        let granularity = 1u32.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0);
        Self { name, granularity, is_enabled: bitmap.is_enabled, digest }
    }
}

/// What was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) session: [u8; 16],
    pub(crate) size: u64,
    /// `None` where it was not proved.
    pub(crate) content: Option<ContentHash>,
    /// Whether its bitmaps were sent and its content was not.
    pub(crate) is_bitmaps_alone: bool,
    /// What the destination was asked to be; see [`NewDisk::target`](super::NewDisk::target).
    pub(crate) target: String,
    /// What its files were like when they were proved.
    pub(crate) stamp: Stamp,
    pub(crate) bitmaps: Vec<ReceiptBitmap>,
}

impl Receipt {
    /// Of a disk of a session, a size and a target, with the bitmaps that are stored with it, by
    /// the names that they are stored by, in the order of the proof, if there is one.
    pub(crate) fn of<'b>(
        of: ([u8; 16], u64, String),
        proof: Option<&DiskProof>,
        bitmaps: impl Iterator<Item = (String, &'b Bitmap)>,
    ) -> Result<Self> {
        let bitmap = |(index, (name, bitmap)): (usize, (String, &Bitmap))| {
            let read = proof.and_then(|proof| proof.bitmaps.get(index)).copied();
            Ok(ReceiptBitmap::of(name, bitmap, read.map_or_else(|| bitmap.digest(), Ok)?))
        };
        let bitmaps = bitmaps.enumerate().map(bitmap).collect::<Result<_>>()?;
        Ok(Self::of_stored(of, proof.and_then(|proof| proof.content), bitmaps))
    }

    /// The same, of what is stored already.
    pub(crate) fn of_stored(
        (session, size, target): ([u8; 16], u64, String),
        content: Option<ContentHash>,
        bitmaps: Vec<ReceiptBitmap>,
    ) -> Self {
        let (stamp, is_bitmaps_alone) = ([0; 16], false);
        Self { session, size, content, is_bitmaps_alone, target, stamp, bitmaps }
    }

    /// Whether nobody has written to the disk since. A device among its files does not tell.
    pub(crate) fn is_unchanged<'p>(&self, files: impl Iterator<Item = &'p Path>) -> bool {
        let files: Vec<_> = files.collect();
        !change_unseen(&files) && stamp_now(files.into_iter()).is_ok_and(|now| now == self.stamp)
    }

    /// Notes what the disk's files are like now, which nobody writes to any more.
    pub(crate) fn look<'p>(&mut self, files: impl Iterator<Item = &'p Path>) -> Result<()> {
        self.stamp = stamp_now(files)?;
        Ok(())
    }

    /// What the receipt says of a disk in these files, for a source that asks again. `disk` is its
    /// name on the wire.
    pub(crate) fn published<'p>(
        self,
        files: impl Iterator<Item = &'p Path>,
        (disk, renames): (&str, &Renames),
    ) -> Published {
        let is_unchanged = self.is_unchanged(files);
        let bitmap = |ReceiptBitmap { name, digest, .. }| {
            let sent_as = renames.sent(&name);
            PublishedBitmap { name, sent_as, digest }
        };
        let Self { size, content, is_bitmaps_alone, bitmaps, .. } = self;
        let (name, bitmaps) = (disk.to_owned(), bitmaps.into_iter().map(bitmap).collect());
        Published { name, size, content, is_unchanged, is_bitmaps_alone, bitmaps }
    }

    /// The receipt beside a destination, if there is one that is whole.
    pub(crate) fn read(log: &Log) -> Result<Option<Self>> {
        let path = log.receipt();
        if !fs::symlink_metadata(path).is_ok_and(|m| m.is_file()) {
            return Ok(None);
        }
        let mut bytes = Vec::new();
        let file = fs::File::open(path).map_err(failed("open", path))?;
        file.take(MAX_RECEIPT_BYTES).read_to_end(&mut bytes).map_err(failed("read", path))?;
        Ok(Self::decode(&bytes))
    }

    /// Writes it durably, whole or not at all.
    pub(crate) fn write(&self, log: &Log) -> Result<()> {
        let (path, half) = (log.receipt(), log.half_receipt());
        if let Err(e) = fs::remove_file(half)
            && e.kind() != io::ErrorKind::NotFound
        {
            return Err(failed("remove", half)(e));
        }
        let written = self
            .write_half(half)
            .and_then(|()| fs::rename(half, path).map_err(failed("rename to", path)));
        if written.is_err() {
            // Best effort: what is half is never read.
            let _ = fs::remove_file(half);
        }
        written?;
        sync_directory(path)
    }

    fn write_half(&self, half: &Path) -> Result<()> {
        let file = qcow2_file::HostFile::create_new(half)?;
        let mut writer = file.file();
        writer.write_all(&self.encode()).map_err(failed("write", half))?;
        file.file().sync_all().map_err(failed("sync", half))
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        encode_start(RECEIPT_MAGIC, &mut out);
        let first = JournalRecord::Receipt {
            session: self.session,
            size: self.size,
            is_bitmaps_alone: self.is_bitmaps_alone,
            hash: self.content,
            stamp: self.stamp,
            target: self.target.clone(),
        };
        first.encode(&mut out);
        for bitmap in &self.bitmaps {
            let record = JournalRecord::ReceiptBitmap {
                granularity: bitmap.granularity,
                is_enabled: bitmap.is_enabled,
                is_persistent: true,
                digest: bitmap.digest,
                name: &bitmap.name,
            };
            record.encode(&mut out);
        }
        encode_end(&mut out);
        out
    }

    /// `None` for what is torn or wrong: a receipt is believed whole or not at all.
    fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes, 0);
        decode_start(&mut reader, RECEIPT_MAGIC).ok()?;
        let first = Record::decode(&mut reader).ok()?;
        let JournalRecord::Receipt { session, size, is_bitmaps_alone, hash, stamp, target } =
            JournalRecord::decode(&first).ok()??
        else {
            return None;
        };
        let (content, mut bitmaps) = (hash, Vec::new());
        loop {
            let record = Record::decode(&mut reader).ok()?;
            if record.header.is_end() {
                let receipt =
                    Self { session, size, content, is_bitmaps_alone, target, stamp, bitmaps };
                return (reader.left() == 0).then_some(receipt);
            }
            match JournalRecord::decode(&record).ok()? {
                Some(JournalRecord::ReceiptBitmap {
                    granularity,
                    is_enabled,
                    digest,
                    name,
                    ..
                }) => {
                    let name = name.to_owned();
                    bitmaps.push(ReceiptBitmap { name, granularity, is_enabled, digest });
                }
                None => {}
                Some(_) => return None,
            }
        }
    }
}

fn stamp_now<'p>(files: impl Iterator<Item = &'p Path>) -> Result<Stamp> {
    Ok(stamp_of(&stamps(&files.collect::<Vec<_>>())?))
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt() -> Receipt {
        let bitmap = |name: &str| ReceiptBitmap {
            name: name.into(),
            granularity: 65536,
            is_enabled: name == "a",
            digest: BitmapDigest([4; 32]),
        };
        Receipt {
            session: [1; 16],
            size: 512,
            content: Some(ContentHash([2; 32])),
            is_bitmaps_alone: true,
            target: "raw".into(),
            stamp: [0; 16],
            bitmaps: vec![bitmap("a"), bitmap("b")],
        }
    }

    #[test]
    fn a_receipt_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        let log = Log::beside(&disk).unwrap();
        let files = || std::iter::once(disk.as_path());
        assert_eq!(Receipt::read(&log).unwrap(), None);
        receipt().look(files()).unwrap_err();
        fs::write(&disk, b"content").unwrap();
        let mut written = receipt();
        written.look(files()).unwrap();
        written.write(&log).unwrap();
        written.write(&log).unwrap();
        assert_ne!(written.stamp, [0; 16]);
        assert_eq!(Receipt::read(&log).unwrap().as_ref(), Some(&written));
        assert!(written.is_unchanged(files()));
        fs::write(&disk, b"another").unwrap();
        fs::File::open(&disk).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        assert!(!written.is_unchanged(files()));
        let bytes = fs::read(log.receipt()).unwrap();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert_eq!(Receipt::decode(&bad), None, "{at}");
            assert_eq!(Receipt::decode(&bytes[..at]), None, "{at}");
        }
        log.remove_receipt().unwrap();
        assert_eq!(Receipt::read(&log).unwrap(), None);
    }
}
