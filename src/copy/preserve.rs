//! Owner, mode and security label of a copy, in the manner of `cp --preserve`.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use qcow2_file::HostFile;
use rustix::fs::{Gid, Mode, Uid, XattrFlags, fchmod, fchown, fgetxattr, fsetxattr};

use crate::publish::Draft;
use crate::{Error, Result};

/// The label of SELinux.
const SECURITY_LABEL: &str = "security.selinux";
/// Longest label that is carried.
const MAX_LABEL_BYTES: usize = 4096;
/// Permission bits that are carried: set-user-id and its kin make no sense on an image.
const MODE_BITS: u32 = 0o777;

/// Gives a draft the mode of `model` and, as far as we may, its owner and label. A device's mode is
/// not a file's: then the copy stays its owner's alone.
pub(super) fn like(model: &Arc<HostFile>, draft: &Draft) -> Result<()> {
    let failed = |source| Error::File {
        action: "set the mode of",
        path: draft.temporary().to_owned(),
        source,
    };
    let metadata = model.file().metadata().map_err(failed)?;
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
    let mode = Mode::from_raw_mode(metadata.mode() & MODE_BITS);
    fchmod(file, mode).map_err(|errno| failed(errno.into()))?;
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
