//! Options that several verbs take, in QEMU's words. Pure.

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

impl FromStr for DiskOption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let usage = |reason: &str| Error::Usage {
            reason: format!("--disk {text}: {reason}; it is ID=PATH[,format=F][,readonly]"),
        };
        let mut parts = split(text).into_iter();
        let first = parts.next().unwrap_or_default();
        let (id, path) = first.split_once('=').ok_or_else(|| usage("no PATH is given"))?;
        if id.is_empty() || id.len() > MAX_ID_BYTES || id.contains(char::is_control) {
            return Err(usage("ID has to have 1 to 255 bytes and no control characters"));
        }
        if path.is_empty() {
            return Err(usage("PATH is empty"));
        }
        let (id, path) = (id.to_owned(), path.into());
        let mut disk = Self { id, path, format: None, is_readonly: false };
        for part in parts {
            match part.split_once('=') {
                None if part == "readonly" => disk.is_readonly = true,
                Some(("format", format)) => disk.format = Some(format.parse()?),
                _ => return Err(usage(&format!("{part:?} is not known, and a comma is doubled"))),
            }
        }
        Ok(disk)
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

impl FromStr for BackingOption {
    type Err = Error;

    /// A `=` behind a slash belongs to the path.
    fn from_str(text: &str) -> Result<Self> {
        let usage = |reason: &str| Error::Usage {
            reason: format!("--backing {text}: {reason}; it is [ID=]PATH[,format=F]"),
        };
        let mut parts = split(text).into_iter();
        let first = parts.next().unwrap_or_default();
        let named = first.split_once('=').filter(|(id, _)| !id.contains('/'));
        let (id, path) = named.map_or((None, first.as_str()), |(id, path)| (Some(id), path));
        if path.is_empty() || id == Some("") {
            return Err(usage("ID or PATH is empty"));
        }
        let mut backing = Self { id: id.map(str::to_owned), path: path.into(), format: None };
        for part in parts {
            match part.split_once('=') {
                Some(("format", format)) => backing.format = Some(format.parse()?),
                _ => return Err(usage(&format!("{part:?} is not known, and a comma is doubled"))),
            }
        }
        Ok(backing)
    }
}

/// Cuts at single commas; a doubled one stands for itself.
pub fn split(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars().peekable();
    while let Some(c) = letters.next() {
        if c == ',' && letters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(c);
        }
    }
    parts.retain(|part| !part.is_empty());
    parts
}

/// What [`split`] takes for one part.
pub fn doubled(text: &str) -> String {
    text.replace(',', ",,")
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
        fn any_path_can_be_said(id in "[a-z0-9#-]{1,20}", path in "[^\0]{1,30}") {
            let disk: DiskOption = format!("{id}={},readonly", doubled(&path)).parse().unwrap();
            prop_assert_eq!((disk.id, disk.path), (id, PathBuf::from(path)));
        }
    }
}
