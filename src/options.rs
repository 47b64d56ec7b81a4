//! Options that several verbs take, in QEMU's words. Pure.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use crate::copy::Format;
use crate::{Error, Result};

/// Longest name of a disk: one length byte on the wire.
const MAX_ID_BYTES: usize = 255;

/// `ID=PATH[,format=F][,readonly]`: a disk that takes part in a migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskOption {
    /// Its name on the wire: what QEMU calls its device or node.
    pub id: String,
    /// Its image.
    pub path: PathBuf,
    /// Format of the image; probed, or by default qcow2 for a new one, where `None`.
    pub format: Option<Format>,
    /// Whether the guest only reads it.
    pub is_readonly: bool,
}

impl DiskOption {
    /// Reads what was typed. A path may consist of any bytes.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let shown = text.display();
        let usage = |reason: &str| Error::Usage {
            reason: format!("--disk {shown}: {reason}; it is ID=PATH[,format=F][,readonly]"),
        };
        let mut parts = cut(text.as_bytes()).into_iter();
        let first = parts.next().unwrap_or_default();
        let (id, path) = at_equals(&first).ok_or_else(|| usage("no PATH is given"))?;
        let id = std::str::from_utf8(id).map_err(|_| usage("ID is not UTF-8"))?;
        if id.is_empty() || id.len() > MAX_ID_BYTES || id.contains(char::is_control) {
            return Err(usage("ID has to have 1 to 255 bytes and no control characters"));
        }
        if path.is_empty() {
            return Err(usage("PATH is empty"));
        }
        let (id, path) = (id.to_owned(), OsStr::from_bytes(path).into());
        let mut disk = Self { id, path, format: None, is_readonly: false };
        for part in parts {
            let part = String::from_utf8_lossy(&part);
            match part.split_once('=') {
                None if part == "readonly" => disk.is_readonly = true,
                Some(("format", format)) => disk.format = Some(format.parse()?),
                _ => return Err(usage(&format!("{part:?} is not known, and a comma is doubled"))),
            }
        }
        Ok(disk)
    }
}

impl FromStr for DiskOption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text.as_ref())
    }
}

/// `[ID=]PATH[,format=F]`: what the new image of a disk stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingOption {
    /// The disk; `None` where there is only one.
    pub id: Option<String>,
    /// The backing file.
    pub path: PathBuf,
    /// Its format; probed where `None`.
    pub format: Option<Format>,
}

impl BackingOption {
    /// Reads what was typed. A path may consist of any bytes; a `=` behind a slash belongs to it.
    pub fn parse(text: &OsStr) -> Result<Self> {
        let shown = text.display();
        let usage = |reason: &str| Error::Usage {
            reason: format!("--backing {shown}: {reason}; it is [ID=]PATH[,format=F]"),
        };
        let mut parts = cut(text.as_bytes()).into_iter();
        let first = parts.next().unwrap_or_default();
        let named = at_equals(&first).filter(|(id, _)| !id.contains(&b'/'));
        let (id, path) = named.map_or((None, first.as_slice()), |(id, path)| (Some(id), path));
        let id = id.map(std::str::from_utf8).transpose().map_err(|_| usage("ID is not UTF-8"))?;
        if path.is_empty() || id == Some("") {
            return Err(usage("ID or PATH is empty"));
        }
        let path = OsStr::from_bytes(path).into();
        let mut backing = Self { id: id.map(str::to_owned), path, format: None };
        for part in parts {
            let part = String::from_utf8_lossy(&part);
            match part.split_once('=') {
                Some(("format", format)) => backing.format = Some(format.parse()?),
                _ => return Err(usage(&format!("{part:?} is not known, and a comma is doubled"))),
            }
        }
        Ok(backing)
    }
}

impl FromStr for BackingOption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text.as_ref())
    }
}

/// Cuts at single commas; a doubled one stands for itself.
pub fn split(text: &str) -> Vec<String> {
    let parts = cut(text.as_bytes()).into_iter();
    parts.map(|part| String::from_utf8_lossy(&part).into_owned()).collect()
}

fn cut(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().peekable();
    while let Some(byte) = bytes.next() {
        if *byte == b',' && bytes.next_if_eq(&&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(*byte);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

fn at_equals(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = text.iter().position(|byte| *byte == b'=')?;
    let (before, behind) = text.split_at_checked(at)?;
    Some((before, behind.strip_prefix(b"=")?))
}

/// What [`split`] and the options take for one part.
pub fn doubled(text: &OsStr) -> OsString {
    let mut doubled = Vec::with_capacity(text.len());
    for byte in text.as_bytes() {
        doubled.extend(std::iter::repeat_n(*byte, if *byte == b',' { 2 } else { 1 }));
    }
    OsString::from_vec(doubled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_disk_has_an_id_and_a_path() {
        let disk: DiskOption = "vda=/a,,b=c.qcow2,format=raw,readonly".parse().unwrap();
        assert_eq!((disk.id.as_str(), disk.path.to_str()), ("vda", Some("/a,b=c.qcow2")));
        assert_eq!((disk.format, disk.is_readonly), (Some(Format::Raw), true));
        let disk: DiskOption = "#block123=x".parse().unwrap();
        assert_eq!((disk.format, disk.is_readonly), (None, false));
    }

    #[test]
    fn a_backing_file_may_be_that_of_one_disk() {
        let parse = |text: &str| text.parse::<BackingOption>().ok();
        let backing = |id: Option<&str>, path: &str, format| {
            Some(BackingOption { id: id.map(str::to_owned), path: path.into(), format })
        };
        assert_eq!(parse("base"), backing(None, "base", None));
        assert_eq!(parse("./a=b,format=raw"), backing(None, "./a=b", Some(Format::Raw)));
        assert_eq!(parse("vda=/a=b,,c"), backing(Some("vda"), "/a=b,c", None));
        for text in ["", "=a", "vda=", "a,b", "a,format=vmdk"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for text in
            ["", "vda", "=x", "vda=", "vda=x,format=vmdk", "vda=x,size=5", "vda=x,readonly=on"]
        {
            let error = text.parse::<DiskOption>().unwrap_err();
            assert_eq!(error.exit_status(), 2, "{text}");
        }
        assert!(format!("{}=x", "i".repeat(256)).parse::<DiskOption>().is_err());
    }

    proptest! {
        #[test]
        fn any_path_can_be_said(
            id in "[a-z0-9#-]{1,20}",
            path in prop::collection::vec(1u8..=255, 1..30),
        ) {
            let path = OsString::from_vec(path);
            let mut text = OsString::from(format!("{id}="));
            text.push(doubled(&path));
            let backing = BackingOption::parse(&text).unwrap();
            prop_assert_eq!((backing.id.as_ref(), backing.path.as_os_str()), (Some(&id), &*path));
            text.push(",readonly");
            let disk = DiskOption::parse(&text).unwrap();
            prop_assert_eq!((disk.id, disk.path), (id, PathBuf::from(path)));
        }
    }
}
