//! Which format a file has, by its first bytes.

use std::fmt;
use std::str::FromStr;

use crate::layout::header::MAGIC;

/// The formats that are read and written here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// The disk's bytes as they are.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl Format {
    /// The name, as QEMU has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A format name that is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("format {0:?} is neither raw nor qcow2")]
pub struct UnknownFormat(pub String);

impl FromStr for Format {
    type Err = UnknownFormat;

    fn from_str(name: &str) -> Result<Self, UnknownFormat> {
        match name {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            other => Err(UnknownFormat(other.to_owned())),
        }
    }
}

/// Bytes that [`probe`] and [`foreign_format`] want to see.
pub const PROBE_BYTES: usize = 512;

/// What a file looks like. A guess: a guest can write a qcow2 header to the start of its raw disk,
/// so whoever acts on the answer says so to the user.
pub fn probe(first_bytes: &[u8]) -> Format {
    let magic = MAGIC.to_be_bytes();
    // A version to come is qcow2 all the same: it is refused by its number, not read as a raw disk.
    let version = first_bytes.get(4..8).and_then(|v| v.try_into().ok()).map(u32::from_be_bytes);
    let is_qcow2 = first_bytes.starts_with(&magic) && version.is_some_and(|v| v >= 2);
    if is_qcow2 { Format::Qcow2 } else { Format::Raw }
}

/// The name of a format that [`probe`] calls raw although it most likely is not: reading it as raw
/// would copy a container and not a disk.
pub fn foreign_format(first_bytes: &[u8]) -> Option<&'static str> {
    const SIGNATURES: [(usize, &[u8], &str); 11] = [
        (0, b"QFI\xfb\0\0\0\x01", "qcow"),
        (0, b"QED\0", "qed"),
        (0, b"KDMV", "vmdk"),
        (0, b"COWD", "vmdk"),
        (0, b"# Disk DescriptorFile", "vmdk"),
        (0, b"vhdxfile", "vhdx"),
        (0, b"conectix", "vpc"),
        (0, b"LUKS\xba\xbe", "luks"),
        (0x40, b"\x7f\x10\xda\xbe", "vdi"),
        (0, b"WithoutFreeSpace", "parallels"),
        (0, b"WithouFreSpacExt", "parallels"),
    ];
    let is_at =
        |at: &usize, bytes: &[u8]| first_bytes.get(*at..).is_some_and(|b| b.starts_with(bytes));
    SIGNATURES.iter().find(|(at, bytes, _)| is_at(at, bytes)).map(|(_, _, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probes_by_magic_and_version() {
        assert_eq!(probe(b"QFI\xfb\0\0\0\x03"), Format::Qcow2);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x04"), Format::Qcow2);
        assert_eq!(probe(b"QFI\xfb\0\0\0\x01"), Format::Raw);
        assert_eq!(foreign_format(b"QFI\xfb\0\0\0\x01"), Some("qcow"));
        assert_eq!((probe(b""), foreign_format(b"")), (Format::Raw, None));
    }
}
