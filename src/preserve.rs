//! Owner, mode and security label of what gets its final name: those of a model, in the manner of
//! `cp --preserve`, or those of any new file. SPEC 3.1.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use qcow2_file::{Access, HostFile};
use rustix::fs::{Gid, Mode, Uid, XattrFlags, fchmod, fchown, fgetxattr, fsetxattr};

use crate::publish::Draft;
use crate::{Error, Result};

/// The label of SELinux.
const SECURITY_LABEL: &str = "security.selinux";
/// Longest label that is carried.
const MAX_LABEL_BYTES: usize = 4096;
/// Permission bits that are carried: set-user-id and its kin make no sense on an image.
const MODE_BITS: u32 = 0o777;

/// Permission bits of a new file, before the umask.
const NEW_MODE_BITS: u32 = 0o666;

/// Makes a draft that nobody had a model for like the file that it replaces, or like any new file.
pub(crate) fn as_usual(draft: &Draft) -> Result<()> {
    match HostFile::open(draft.target(), Access::Read) {
        Ok(replaced) => like(&Arc::new(replaced), draft),
        Err(qcow2_file::Error::Open { source, .. }) if source.kind() == ErrorKind::NotFound => {
            let Some(umask) = umask() else { return Ok(()) };
            set_mode(draft, NEW_MODE_BITS & !umask)
        }
        Err(error) => Err(error.into()),
    }
}

/// This process's umask. The system call that tells it sets it too, under the feet of other
/// threads; where the kernel does not tell it otherwise, a file stays its owner's alone.
fn umask() -> Option<u32> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let octal = status.lines().find_map(|line| line.strip_prefix("Umask:"))?;
    u32::from_str_radix(octal.trim(), 8).ok()
}

fn set_mode(draft: &Draft, mode: u32) -> Result<()> {
    fchmod(draft.file().file(), Mode::from_raw_mode(mode)).map_err(|errno| failed(draft, errno))
}

fn failed(draft: &Draft, source: impl Into<io::Error>) -> Error {
    let (path, source) = (draft.temporary().to_owned(), source.into());
    Error::File { action: "set the mode of", path, source }
}

/// Gives a draft the mode of `model` and, as far as we may, its owner and label. A device's mode is
/// not a file's: then the copy stays its owner's alone.
pub(crate) fn like(model: &Arc<HostFile>, draft: &Draft) -> Result<()> {
    let metadata = model.file().metadata().map_err(|source| failed(draft, source))?;
    let file = draft.file().file();
    if model.is_device() {
        return Ok(());
    }
    // Owner first: changing it takes bits of the mode away. Not being allowed to is no error, as
    // with cp.
    let (owner, group) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    if let Err(error) = fchown(file, Some(owner), Some(group)) {
        tracing::debug!(%error, "the owner is not preserved");
    }
    set_mode(draft, metadata.mode() & MODE_BITS)?;
    copy_label(model, draft);
    Ok(())
}

fn copy_label(model: &HostFile, draft: &Draft) {
    let mut label = vec![0; MAX_LABEL_BYTES];
    let Ok(len) = fgetxattr(model.file(), SECURITY_LABEL, label.as_mut_slice()) else { return };
    let label = label.get(..len).unwrap_or_default();
    let flags = XattrFlags::empty();
    if let Err(error) = fsetxattr(draft.file().file(), SECURITY_LABEL, label, flags) {
        tracing::debug!(%error, "the security label is not preserved");
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::publish::publish;

    fn mode(path: &std::path::Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_is_replaced_is_the_model_else_the_umask_decides() {
        let dir = tempfile::tempdir().unwrap();
        let (usual, new) = (dir.path().join("usual"), dir.path().join("new"));
        fs::write(&usual, b"as everybody does").unwrap();
        let draft = Draft::create(&new).unwrap();
        assert_eq!(mode(draft.temporary()), 0o600);
        as_usual(&draft).unwrap();
        publish(vec![draft], false).unwrap();
        assert_eq!(mode(&new), mode(&usual));

        fs::set_permissions(&usual, fs::Permissions::from_mode(0o4750)).unwrap();
        let draft = Draft::create(&usual).unwrap();
        as_usual(&draft).unwrap();
        publish(vec![draft], true).unwrap();
        assert_eq!(mode(&usual), 0o750);
    }
}
