//! Header extensions. qcow2 spec, "Header extensions".

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use format_spec::{Malformed, Problem, Reader, Writer};

use crate::limits;

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const DATA_FILE: u32 = 0x4441_5441;
const FEATURE_NAME_BYTES: usize = 48;
/// Type of an extension without meaning, by which the bitmaps extension is kept inside one sector
/// (SPEC 3.4). To everybody else it is an unknown extension, which they keep. "BfPd".
pub const PADDING: u32 = 0x4266_5064;

/// A header extension. What is not understood is kept byte for byte.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extension {
    /// Format of the backing file.
    BackingFormat(String),
    /// Names of feature bits, for error messages.
    FeatureNames(Vec<FeatureName>),
    /// Where the bitmap directory is. Valid only with the autoclear bit.
    Bitmaps(BitmapsExtension),
    /// Name of the external data file: any bytes that a path can have.
    DataFile(OsString),
    /// Anything else.
    Unknown {
        /// The type found.
        kind: u32,
        /// Its data.
        data: Vec<u8>,
    },
}

/// Where the bitmap directory is. qcow2 spec, "Bitmaps extension".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Number of bitmaps, at least 1.
    pub count: u32,
    /// Size of the directory in bytes.
    pub directory_size: u64,
    /// Offset of the directory, cluster aligned.
    pub directory_offset: u64,
}

/// The name of one feature bit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Bit number, 0 to 63.
    pub bit: u8,
    /// The name, at most 46 bytes.
    pub name: String,
}

/// Decodes extensions up to the end marker or the end of `reader`.
pub fn decode_all(mut reader: Reader<'_>) -> Result<Vec<Extension>, Malformed> {
    let mut found: Vec<Extension> = Vec::new();
    while reader.left() >= 8 {
        let at = reader.offset();
        let kind = reader.be32("extension type")?;
        let len = reader.be32("extension length")?;
        if kind == END {
            break;
        }
        let padded = u64::from(len).next_multiple_of(8);
        let padded = usize::try_from(padded).unwrap_or(usize::MAX);
        // The last extension may touch the end of its area without padding.
        let mut body = reader.sub(padded.min(reader.left()), "extension data")?;
        let data = body.take(usize::try_from(len).unwrap_or(usize::MAX), "extension data")?;
        let extension = decode_one(kind, data, at.saturating_add(8))?;
        if found.iter().any(|f| f.kind() == kind && !matches!(f, Extension::Unknown { .. })) {
            return Err(Malformed::new(at, "extension type", Problem::Duplicate));
        }
        found.push(extension);
    }
    Ok(found)
}

fn decode_one(kind: u32, data: &[u8], at: u64) -> Result<Extension, Malformed> {
    Ok(match kind {
        BACKING_FORMAT => Extension::BackingFormat(format_name(data, at)?),
        DATA_FILE => Extension::DataFile(file_name(data, at)?),
        FEATURE_NAMES => Extension::FeatureNames(feature_names(data, at)?),
        BITMAPS => Extension::Bitmaps(bitmaps(data, at)?),
        _ => Extension::Unknown { kind, data: data.to_vec() },
    })
}

fn name<'a>(data: &'a [u8], at: u64, field: &'static str) -> Result<&'a [u8], Malformed> {
    if data.len() > limits::MAX_FILE_NAME_BYTES as usize || data.contains(&0) {
        return Err(Malformed::new(at, field, Problem::BadName));
    }
    Ok(data)
}

fn format_name(data: &[u8], at: u64) -> Result<String, Malformed> {
    let field = "backing format name";
    let text = std::str::from_utf8(name(data, at, field)?);
    Ok(text.map_err(|_| Malformed::new(at, field, Problem::BadName))?.to_owned())
}

fn file_name(data: &[u8], at: u64) -> Result<OsString, Malformed> {
    Ok(OsStr::from_bytes(name(data, at, "data file name")?).to_owned())
}

fn feature_names(data: &[u8], at: u64) -> Result<Vec<FeatureName>, Malformed> {
    let mut reader = Reader::new(data, at);
    let mut names = Vec::new();
    // A length that is no multiple of the entry size is a table of whole entries with a tail that
    // means nothing: the table serves error messages only, so it never makes an image unreadable.
    while reader.left() >= FEATURE_NAME_BYTES {
        let kind = reader.u8("feature type")?;
        let bit = reader.u8("feature bit")?;
        let raw = reader.take(FEATURE_NAME_BYTES.saturating_sub(2), "feature name")?;
        let text = raw.split(|b| *b == 0).next().unwrap_or_default();
        names.push(FeatureName { kind, bit, name: String::from_utf8_lossy(text).into_owned() });
    }
    Ok(names)
}

fn bitmaps(data: &[u8], at: u64) -> Result<BitmapsExtension, Malformed> {
    if data.len() != 24 {
        let problem = Problem::Mismatch { value: data.len() as u64, expected: 24 };
        return Err(Malformed::new(at, "bitmaps extension length", problem));
    }
    let mut reader = Reader::new(data, at);
    let count = reader.be32("nb_bitmaps")?;
    if count == 0 || count > limits::MAX_BITMAPS {
        let max = u64::from(limits::MAX_BITMAPS);
        let problem = Problem::OutOfRange { value: u64::from(count), min: 1, max };
        return Err(Malformed::new(at, "nb_bitmaps", problem));
    }
    let reserved = reader.be32("bitmaps extension reserved")?;
    if reserved != 0 {
        let problem = Problem::Reserved { value: u64::from(reserved) };
        return Err(Malformed::new(at.saturating_add(4), "bitmaps extension reserved", problem));
    }
    let directory_size = reader.be64("bitmap_directory_size")?;
    let directory_offset = reader.be64("bitmap_directory_offset")?;
    if directory_size == 0 || directory_size > limits::MAX_BITMAP_DIRECTORY_BYTES {
        let max = limits::MAX_BITMAP_DIRECTORY_BYTES;
        let problem = Problem::OutOfRange { value: directory_size, min: 1, max };
        return Err(Malformed::new(at.saturating_add(8), "bitmap_directory_size", problem));
    }
    Ok(BitmapsExtension { count, directory_size, directory_offset })
}

impl Extension {
    /// The type number on disk.
    pub fn kind(&self) -> u32 {
        match self {
            Self::BackingFormat(_) => BACKING_FORMAT,
            Self::FeatureNames(_) => FEATURE_NAMES,
            Self::Bitmaps(_) => BITMAPS,
            Self::DataFile(_) => DATA_FILE,
            Self::Unknown { kind, .. } => *kind,
        }
    }

    /// Appends the extension with its header and padding.
    pub fn encode(&self, out: &mut Writer) {
        let mut body = Writer::new();
        match self {
            Self::BackingFormat(name) => {
                body.bytes(name.as_bytes());
            }
            Self::DataFile(name) => {
                body.bytes(name.as_bytes());
            }
            Self::FeatureNames(names) => {
                for feature in names {
                    let mut padded = feature.name.clone().into_bytes();
                    padded.resize(FEATURE_NAME_BYTES.saturating_sub(2), 0);
                    body.u8(feature.kind).u8(feature.bit).bytes(&padded);
                }
            }
            Self::Bitmaps(b) => {
                body.be32(b.count).be32(0).be64(b.directory_size).be64(b.directory_offset);
            }
            Self::Unknown { data, .. } => {
                body.bytes(data);
            }
        }
        let body = body.into_bytes();
        let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
        out.be32(self.kind()).be32(len).bytes(&body).pad_to(8);
    }
}

/// Appends the end marker.
pub fn encode_end(out: &mut Writer) {
    out.be32(END).be32(0);
}
