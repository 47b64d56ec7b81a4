//! Receipts: what a finished destination leaves, so that a command whose last answer was lost finds
//! out that it had finished. SPEC 10.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use bitmap_mig::Bitmap;
use format_spec::Reader;
use format_spec::content_hash::{BitmapDigest, ContentHash};
use format_spec::native::answer::{NO_CONTENT, Published, PublishedBitmap};
use format_spec::native::frame::{Record, encode_end};
use format_spec::native::journal::{JournalRecord, RECEIPT_MAGIC, decode_start, encode_start};

use super::log::Log;
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

/// What was published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Receipt {
    pub(crate) session: [u8; 16],
    pub(crate) size: u64,
    pub(crate) content: ContentHash,
    /// What the destination was asked to be; see [`NewDisk::target`](super::NewDisk::target).
    pub(crate) target: String,
    pub(crate) bitmaps: Vec<ReceiptBitmap>,
}

impl Receipt {
    /// Of a disk of a session, a size and a target that was proved, with its bitmaps in the order
    /// of the proof, by the names that they are stored by.
    pub(crate) fn of<'b>(
        (session, size, target): ([u8; 16], u64, String),
        proof: &DiskProof,
        bitmaps: impl Iterator<Item = (String, &'b Bitmap)>,
    ) -> Self {
        let bitmaps = bitmaps.zip(&proof.bitmaps).map(|((name, bitmap), digest)| ReceiptBitmap {
            name,
            granularity: 1u32.checked_shl(bitmap.granularity_bits.into()).unwrap_or(0),
            is_enabled: bitmap.is_enabled,
            digest: *digest,
        });
        let (content, bitmaps) = (proof.content.unwrap_or(NO_CONTENT), bitmaps.collect());
        Self { session, size, content, target, bitmaps }
    }

    /// What the receipt of the disk at `path` says, for a source that asks again. `disk` is its
    /// name on the wire.
    pub(crate) fn published(
        log: Option<&Log>,
        path: &Path,
        (disk, renames): (&str, &Renames),
    ) -> Result<Published> {
        let receipt = log.map(Self::read).transpose()?.flatten();
        let receipt = receipt.ok_or_else(|| Error::Usage {
            reason: format!("the receipt of {} is gone", path.display()),
        })?;
        let bitmap = |ReceiptBitmap { name, digest, .. }| {
            let sent_as = renames.sent(&name);
            PublishedBitmap { name, sent_as, digest }
        };
        let Self { size, content, bitmaps, .. } = receipt;
        let bitmaps = bitmaps.into_iter().map(bitmap).collect();
        Ok(Published { name: disk.to_owned(), size, content, bitmaps })
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
        let file = qcow2_file::HostFile::create_new(half)?;
        let mut writer = file.file();
        writer.write_all(&self.encode()).map_err(failed("write", half))?;
        file.file().sync_all().map_err(failed("sync", half))?;
        fs::rename(half, path).map_err(failed("rename to", path))?;
        sync_directory(path)
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        encode_start(RECEIPT_MAGIC, &mut out);
        let Self { session, size, content, target, bitmaps } = self;
        let (session, size, hash, target) = (*session, *size, *content, target.clone());
        JournalRecord::Receipt { session, size, hash, target }.encode(&mut out);
        for bitmap in bitmaps {
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
        let JournalRecord::Receipt { session, size, hash: content, target } =
            JournalRecord::decode(&first).ok()??
        else {
            return None;
        };
        let mut bitmaps = Vec::new();
        loop {
            let record = Record::decode(&mut reader).ok()?;
            if record.header.is_end() {
                let receipt = Self { session, size, content, target, bitmaps };
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
            content: ContentHash([2; 32]),
            target: "raw".into(),
            bitmaps: vec![bitmap("a"), bitmap("b")],
        }
    }

    #[test]
    fn a_receipt_is_read_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let log = Log::beside(&dir.path().join("disk")).unwrap();
        assert_eq!(Receipt::read(&log).unwrap(), None);
        receipt().write(&log).unwrap();
        receipt().write(&log).unwrap();
        assert_eq!(Receipt::read(&log).unwrap(), Some(receipt()));
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
