//! A header and its tables against the file: what is safe to open, and with which warnings.
//!
//! Nothing here follows a name found in the image, and nothing is written.

use std::fmt;

use format_spec::{Malformed, Problem};

use crate::error::{Condition, Error, Result};
use crate::layout::extension::Extension;
use crate::layout::header::{Header, MAGIC, incompatible};
use crate::limits;
use crate::storage::{Storage, StorageExt};

/// What a user should know about an image that was opened all the same.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// The dirty bit: refcounts may be wrong. Reading does not use them.
    Dirty,
    /// The corrupt bit: somebody found wrong metadata. What can be read may be wrong.
    Corrupt,
    /// An in-place copy into this image was not finished (SPEC 3.3).
    UnfinishedCopy,
    /// The image that names this backing file does not say which format it has, and its content
    /// looks like qcow2. A guest that was given it as a raw disk could have written that.
    ProbedBacking {
        /// The backing file.
        backing: String,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dirty => write!(f, "was not closed properly; its refcounts may be wrong"),
            Self::Corrupt => write!(f, "is marked corrupt; what is read from it may be wrong"),
            Self::UnfinishedCopy => write!(f, "holds an in-place copy that was not finished"),
            Self::ProbedBacking { backing } => write!(
                f,
                "does not record the format of its backing file {backing:?}, which is taken for \
                 qcow2 because of its content"
            ),
        }
    }
}

/// Reads and decodes the header with its extensions. Takes at most one cluster of memory.
pub fn read_header(file: &dyn Storage) -> Result<Header> {
    let len = file.length()?;
    let mut bytes = vec![0; small(len.min(4096))];
    file.read(&mut bytes, 0)?;
    if let Some(cluster) = cluster_size(&bytes) {
        let first = bytes.len();
        bytes.resize(small(len.min(cluster)), 0);
        if let Some(rest) = bytes.get_mut(first..) {
            file.read(rest, first as u64)?;
        }
    }
    Header::decode(&bytes).map_err(|what| file.malformed(what))
}

/// The cluster size that a header claims, where it is one at all.
pub(crate) fn cluster_size(bytes: &[u8]) -> Option<u64> {
    let bits = u32::from_be_bytes(*bytes.get(20..)?.first_chunk()?);
    let is_qcow2 = bytes.get(..4)? == MAGIC.to_be_bytes();
    (is_qcow2 && limits::CLUSTER_BITS.contains(&bits)).then(|| 1 << bits)
}

/// Judges the features of an image that is to be *read*. `accept_unfinished` lets pass what SPEC
/// 3.3 marks as unfinished.
pub fn check_readable(
    file: &dyn Storage,
    header: &Header,
    accept_unfinished: bool,
) -> Result<Vec<Warning>> {
    const KNOWN: u64 = incompatible::DIRTY
        | incompatible::CORRUPT
        | incompatible::EXTERNAL_DATA_FILE
        | incompatible::COMPRESSION_TYPE
        | incompatible::EXTENDED_L2
        | incompatible::UNFINISHED_COPY;
    let unsupported = |feature: String| Error::Unsupported { file: file.name(), feature };
    match header.crypt_method {
        0 => {}
        1 => return Err(unsupported("AES encryption".to_owned())),
        _ => return Err(unsupported("LUKS encryption".to_owned())),
    }
    let unknown = header.incompatible_features & !KNOWN;
    if unknown != 0 {
        return Err(unsupported(unknown_features_text(header, unknown)));
    }
    let is_set = |bit: u64| header.incompatible_features & bit != 0;
    if is_set(incompatible::UNFINISHED_COPY) && !accept_unfinished {
        return Err(Error::condition(file.name(), Condition::UnfinishedCopy));
    }
    let all = [
        (incompatible::DIRTY, Warning::Dirty),
        (incompatible::CORRUPT, Warning::Corrupt),
        (incompatible::UNFINISHED_COPY, Warning::UnfinishedCopy),
    ];
    Ok(all.into_iter().filter(|(bit, _)| is_set(*bit)).map(|(_, warning)| warning).collect())
}

/// Names unknown incompatible bits as the image's own table does.
fn unknown_features_text(header: &Header, unknown: u64) -> String {
    let names = header.extensions.iter().find_map(|e| match e {
        Extension::FeatureNames(names) => Some(names.as_slice()),
        _ => None,
    });
    let describe = |bit: u32| {
        let mut entries = names.unwrap_or_default().iter();
        match entries.find(|n| n.kind == 0 && u32::from(n.bit) == bit) {
            Some(n) => format!("incompatible feature {:?} (bit {bit})", n.name),
            None => format!("incompatible feature bit {bit}"),
        }
    };
    let bits = (0..u64::BITS).filter(|bit| unknown >> bit & 1 == 1);
    bits.map(describe).collect::<Vec<_>>().join(", ")
}

/// Reads the active L1 table: as many raw entries as the disk needs. Bounded by
/// [`limits::MAX_L1_BYTES`]; the table must lie inside the file.
pub fn read_l1(file: &dyn Storage, header: &Header) -> Result<Vec<u64>> {
    let entries = header.geometry().l1_entries(header.size).min(u64::from(header.l1_size));
    let bytes = entries.saturating_mul(8);
    let (len, start) = (file.length()?, header.l1_table_offset);
    if entries > 0 && (bytes > limits::MAX_L1_BYTES || start.saturating_add(bytes) > len) {
        let problem = Problem::OutOfRange { value: start, min: 0, max: len.saturating_sub(bytes) };
        return Err(file.malformed(Malformed::new(40, "l1_table_offset", problem)));
    }
    // Piece by piece, so that the largest table is never held twice.
    const PIECE_BYTES: u64 = 1 << 20;
    let mut l1 = Vec::with_capacity(small(entries));
    let mut raw = vec![0; small(bytes.min(PIECE_BYTES))];
    for done in (0..bytes).step_by(small(PIECE_BYTES)) {
        raw.truncate(small(bytes - done));
        file.read(&mut raw, start.saturating_add(done))?;
        l1.extend(words(&raw));
    }
    Ok(l1)
}

/// Big-endian 64-bit words; a cut-off last one is left out.
pub(crate) fn words(raw: &[u8]) -> impl Iterator<Item = u64> + '_ {
    raw.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}

/// A length that has met its limit before.
fn small(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}
