//! What a user can ask of a copy.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use mig_core::meter::Meter;
use serde::Serialize;

use crate::preserve::Preserve;
use crate::{Error, Result};

/// Format of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// The guest's bytes and nothing else.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl From<Format> for qcow2_file::Format {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl From<qcow2_file::Format> for Format {
    fn from(format: qcow2_file::Format) -> Self {
        match format {
            qcow2_file::Format::Raw => Self::Raw,
            qcow2_file::Format::Qcow2 => Self::Qcow2,
        }
    }
}

impl FromStr for Format {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(Error::Usage { reason: format!("unknown format {text:?}: raw or qcow2") }),
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// What to do where the destination exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Existing {
    /// Refuse.
    #[default]
    Refuse,
    /// Replace it at the end, by rename (`--force`).
    Replace,
    /// Write into it (`--in-place`); the only way for block devices.
    InPlace,
}

/// What to do with the source's backing chain.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum BackingChoice {
    /// Read through whatever `allow_backing` lets open; the copy stands alone.
    #[default]
    Unsaid,
    /// Read through the chain into one image (`--flatten`), which implies `allow_backing`.
    Flatten,
    /// Copy only what is allocated above this file, and name it as the destination's backing.
    Keep(PathBuf),
}

/// Which bitmaps to carry.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum BitmapSelection {
    /// Every bitmap of the source.
    #[default]
    All,
    /// None.
    None,
    /// These; a missing one is an error.
    Named(Vec<String>),
}

impl FromStr for BitmapSelection {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "all" => Self::All,
            "none" => Self::None,
            names => Self::Named(names.split(',').map(str::to_owned).collect()),
        })
    }
}

/// `[NODE/]OLD=NEW`. A copy has one disk, whose node name is ignored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rename {
    /// The disk, where several are moved.
    pub node: Option<String>,
    /// Name at the source.
    pub old: String,
    /// Name at the destination.
    pub new: String,
}

impl FromStr for Rename {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (left, new) = text.split_once('=').ok_or_else(|| Error::Usage {
            reason: format!("{text:?} is not of the form [NODE/]OLD=NEW"),
        })?;
        let (node, old) = match left.split_once('/') {
            Some((node, old)) => (Some(node.to_owned()), old),
            None => (None, left),
        };
        Ok(Self { node, old: old.to_owned(), new: new.to_owned() })
    }
}

/// `-o K=V,…`, in qemu-img's words. `None` means: as the source, else the default.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TargetOptions {
    /// `cluster_size`, in bytes.
    pub cluster_size: Option<u64>,
    /// `extended_l2`.
    pub extended_l2: Option<bool>,
    /// `compression_type`.
    pub compression_type: Option<mig_core::block::Compression>,
    /// `refcount_bits`.
    pub refcount_bits: Option<u32>,
    /// `compat`: 2 for 0.10, 3 for 1.1.
    pub version: Option<u32>,
    /// `data_file`: makes an overlay whose contents are in this file.
    pub data_file: Option<String>,
    /// `data_file_raw`.
    pub data_file_raw: Option<bool>,
}

/// What to copy where, and how.
#[derive(Debug, Clone, Default)]
pub struct CopyOptions {
    /// The source image.
    pub source: PathBuf,
    /// The destination.
    pub destination: PathBuf,
    /// Format of the source; probed where `None`.
    pub source_format: Option<Format>,
    /// Format of the destination; the source's where `None`.
    pub target_format: Option<Format>,
    /// Shape of the destination.
    pub target: TargetOptions,
    /// What to do where the destination exists.
    pub existing: Existing,
    /// Open backing and data files that images name.
    pub allow_backing: bool,
    /// What to do with the source's backing chain.
    pub backing: BackingChoice,
    /// Which bitmaps to carry.
    pub bitmaps: BitmapSelection,
    /// New names for bitmaps.
    pub renames: Vec<Rename>,
    /// Go on without inconsistent bitmaps.
    pub skip_broken_bitmaps: bool,
    /// What a new destination has from the source beside its content. What exists and is written
    /// into stays as it is.
    pub preserve: Preserve,
    /// Leave out the proof.
    pub no_verify: bool,
    /// What limits the bytes of content that are read from the source.
    pub meter: Arc<Meter>,
    /// Ignore what an earlier try left.
    pub fresh: bool,
    /// A directory for the journals of block devices, beside which there is no place for files. It
    /// is made when it is needed. Where there is none, an attempt that fails is begun again.
    pub device_journals: Option<PathBuf>,
    /// Worker threads; by the number of cores where `None`.
    pub workers: Option<NonZeroUsize>,
}
