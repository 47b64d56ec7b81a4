//! Whether a new disk can be as large as its source says, before anything is made of it.

use std::path::Path;

use rustix::fs::{Mode, OFlags, ftruncate, open};
use rustix::io::Errno;

use super::unfinished::{NewDisk, NewKind};
use crate::publish::directory;
use crate::{Error, Result};

/// Most bytes of any disk: offsets in files are signed.
const MAX_DISK: u64 = i64::MAX as u64;

/// Fails where the disk `name` cannot be made as large as it is said to be. Nothing is left behind.
pub(super) fn check(name: &str, disk: &NewDisk<'_>) -> Result<()> {
    let size = disk.size;
    if size > MAX_DISK {
        let reason =
            format!("the source says that disk {name:?} has {size} bytes, as no disk can have");
        return Err(Error::Unfit { reason });
    }
    let whole = match &disk.kind {
        NewKind::Raw => Some(disk.path),
        NewKind::Qcow2 { data_file, .. } => data_file.map(|data| data.path.as_path()),
    };
    if let NewKind::Qcow2 { shape, .. } = &disk.kind
        && let Err(error) = shape.create_options(size).check(&disk.path.to_string_lossy().into())
    {
        let reason = match error {
            qcow2_file::Error::Refused { reason, .. } => reason,
            other => other.to_string(),
        };
        return Err(Error::Unfit {
            reason: format!("disk {name:?} has {size} bytes: no image of it can be made: {reason}"),
        });
    }
    match whole.map(directory) {
        Some(directory) if is_too_long(directory, size) => {
            let (disk, directory) = (name.to_owned(), directory.to_owned());
            Err(Error::TooLarge { disk, size, directory })
        }
        _ => Ok(()),
    }
}

/// Whether the file system there says that no file may be so long. Asked with a file that has no
/// name; a file system that has none such is asked later, by the disk itself.
fn is_too_long(directory: &Path, size: u64) -> bool {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let Ok(file) = open(directory, flags, Mode::RUSR | Mode::WUSR) else { return false };
    matches!(ftruncate(&file, size), Err(Errno::FBIG | Errno::INVAL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::copy::{Shape, TargetOptions};

    fn told(kind: NewKind<'_>, size: u64) -> (Option<Error>, Vec<std::ffi::OsString>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let (session, wishes, below) = (None, String::new(), Vec::new());
        let (resumes, is_fresh) = (false, false);
        let disk = NewDisk { path: &path, size, kind, below, session, resumes, is_fresh, wishes };
        let error = check("vda", &disk).err();
        let names = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
        (error, names.collect())
    }

    #[test]
    fn a_size_that_cannot_be_is_told_before_anything_is_made() {
        let usual = || Shape::decide(None, &TargetOptions::default()).unwrap();
        let qcow2 = || NewKind::Qcow2 { shape: usual(), data_file: None, backing: None };
        for (kind, size) in [
            (NewKind::Raw, 1 << 63),
            (qcow2(), 1 << 63),
            (NewKind::Raw, u64::MAX),
            (qcow2(), 1 << 62),
        ] {
            let (error, left) = told(kind, size);
            let error = error.unwrap_or_else(|| panic!("{size} bytes"));
            let text = error.to_string();
            assert!(text.contains("\"vda\"") && text.contains(&size.to_string()), "{text}");
            assert!(matches!(error.exit_status(), 3 | 4), "{text}");
            assert!(left.is_empty());
        }
        assert!(told(NewKind::Raw, 1 << 40).0.is_none());
        assert!(told(qcow2(), 1 << 40).0.is_none());
    }
}
