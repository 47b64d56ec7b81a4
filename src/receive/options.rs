//! What to receive, and where.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use format_spec::native::hello::MAX_CHANNELS;

use super::Dialect;
use crate::berth::has_traces;
use crate::copy::{BitmapSelection, DataFileTarget, Existing, Format, Rename, TargetOptions};
use crate::options::{BackingOption, DiskOption};
use crate::renames::Renames;
use crate::send::check_ids;
use crate::{Error, Result, destinations};

/// What to receive, and where.
#[derive(Debug, Clone)]
pub struct ReceiveOptions {
    /// A place for each disk, by its name on the wire. What does not exist is made, as qcow2 unless
    /// a format is given.
    pub disks: Vec<DiskOption>,
    /// Shape of new qcow2 images.
    pub target: TargetOptions,
    /// What to do where a place exists.
    pub existing: Existing,
    /// What new images stand on, where the source sends only what stands above that.
    pub backing: Vec<BackingOption>,
    /// Open backing and data files that existing images name, and backing files of new ones.
    pub allow_backing: bool,
    /// From a QEMU: which bitmaps to store. A bitferry is told at the source which ones to send.
    pub bitmaps: BitmapSelection,
    /// New names for bitmaps; without a node for those of all disks.
    pub renames: Vec<Rename>,
    /// Leave out the proof, where the source leaves it out too.
    pub no_verify: bool,
    /// Ignore what an earlier try left.
    pub fresh: bool,
    /// A directory for the journals of block devices, beside which there is no place for files. It
    /// is made when it is needed. Where there is none, an attempt that fails is begun again.
    pub device_journals: Option<PathBuf>,
    /// What the source has to speak; whatever it does where `None`.
    pub dialect: Option<Dialect>,
    /// From a QEMU that migrates with `-i`: what is not sent is there already.
    pub shared_base: bool,
    /// Data connections that are granted, at most.
    pub max_channels: u16,
    /// How long a source that was cut off is waited for; then it goes on where it was.
    pub reconnect: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        Self {
            disks: Vec::new(),
            target: TargetOptions::default(),
            existing: Existing::Refuse,
            backing: Vec::new(),
            allow_backing: false,
            bitmaps: BitmapSelection::All,
            renames: Vec::new(),
            no_verify: false,
            fresh: false,
            device_journals: None,
            dialect: None,
            shared_base: false,
            max_channels: MAX_CHANNELS,
            reconnect: Duration::ZERO,
        }
    }
}

impl ReceiveOptions {
    /// What makes no sense is refused before anybody connects.
    pub fn check(&self) -> Result<()> {
        check_ids(&self.disks)?;
        Renames::check(&self.renames)?;
        self.dialect.map_or(Ok(()), |dialect| self.check_for(dialect))?;
        let usage = |reason| Err(Error::Usage { reason });
        let has_shape = self.target != TargetOptions::default();
        if has_shape && self.existing == Existing::InPlace {
            return usage("-o options shape new images; --in-place writes into what exists".into());
        }
        if self.target.data_file.is_some() && self.disks.len() > 1 {
            return usage("-o data_file= names one file, and there are several disks".into());
        }
        self.check_backing()?;
        self.check_places()?;
        for disk in &self.disks {
            if disk.is_readonly {
                return usage(format!("disk {:?} is read-only: nothing can arrive in it", disk.id));
            }
            if has_shape && disk.format == Some(Format::Raw) {
                return usage(format!("disk {:?} is raw and takes no -o options", disk.id));
            }
            DataFileTarget::check(&disk.path, &self.target)?;
            self.check_place(disk)?;
        }
        let nodes = self.renames.iter().filter_map(|rename| rename.node.as_ref());
        let mut unknown = nodes.filter(|node| self.disks.iter().all(|disk| disk.id != **node));
        match unknown.next() {
            Some(node) => {
                usage(format!("a bitmap of disk {node:?} is renamed, which is not named"))
            }
            None => Ok(()),
        }
    }

    /// What only a QEMU can be asked for is refused where a bitferry sends.
    pub(super) fn check_for(&self, dialect: Dialect) -> Result<()> {
        if dialect == Dialect::Qemu {
            if self.backing.is_empty() {
                return Ok(());
            }
            let reason = "--backing is for new images, and a QEMU's stream needs existing ones";
            return Err(Error::Usage { reason: reason.to_owned() });
        }
        let reason = if self.bitmaps != BitmapSelection::All {
            "--bitmaps chooses among what a QEMU sends; a bitferry is told at the source"
        } else if self.shared_base {
            "--shared-base is about what a QEMU does not send; a bitferry says by itself what it \
             leaves out, and --backing says what a new image stands on"
        } else {
            return Ok(());
        };
        Err(Error::Usage { reason: reason.to_owned() })
    }

    fn check_backing(&self) -> Result<()> {
        let usage = |reason: String| Err(Error::Usage { reason });
        if !self.backing.is_empty() && self.existing == Existing::InPlace {
            return usage("--backing is for new images; --in-place writes into what exists".into());
        }
        let mut seen = BTreeSet::new();
        for BackingOption { id, path, .. } in &self.backing {
            let path = path.display();
            let disk = match (id, self.disks.as_slice()) {
                (None, [only]) => only,
                (None, _) => {
                    return usage(format!("--backing {path}: say of which disk: ID={path}"));
                }
                (Some(id), disks) => match disks.iter().find(|disk| disk.id == *id) {
                    Some(disk) => disk,
                    None => return usage(format!("--backing {id}={path}: no disk is {id:?}")),
                },
            };
            if disk.format == Some(Format::Raw) {
                return usage(format!("disk {:?} is raw and has no backing file", disk.id));
            }
            if !seen.insert(&disk.id) {
                return usage(format!("disk {:?} is given two backing files", disk.id));
            }
        }
        Ok(())
    }

    /// What the image of a disk is to stand on.
    pub(super) fn backing_of(&self, disk: &DiskOption) -> Option<&BackingOption> {
        self.backing.iter().find(|backing| backing.id.as_ref().is_none_or(|id| *id == disk.id))
    }

    /// No place is another's, nor what is kept beside one.
    fn check_places(&self) -> Result<()> {
        let disk = self.disks.first();
        let data = disk.and_then(|disk| DataFileTarget::of(&disk.path, &self.target));
        let places = self.disks.iter().map(|disk| disk.path.as_path());
        let places: Vec<_> = places.chain(data.as_ref().map(|data| data.path.as_path())).collect();
        destinations::check(&places)
    }

    fn check_place(&self, disk: &DiskOption) -> Result<()> {
        let found = disk.path.symlink_metadata();
        match (self.existing, found) {
            // One that this very migration published may be asked for again.
            (Existing::Refuse, Ok(_)) if !has_traces(&disk.path)? => {
                Err(Error::Exists { path: disk.path.clone() })
            }
            (Existing::InPlace, Err(source)) => {
                let path = disk.path.clone();
                Err(Error::File { action: "write in place to", path, source })
            }
            (Existing::Replace, Ok(found)) if !found.is_file() && !found.is_symlink() => {
                let path = disk.path.display();
                let reason = format!("{path} is no file: only --in-place writes to it");
                Err(Error::Usage { reason })
            }
            _ => Ok(()),
        }
    }
}
