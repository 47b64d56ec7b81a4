//! Owner, mode with access list, times and security label of what gets its final name: those of a
//! model, in the manner of `cp --preserve`, or those of any new file. SPEC 3.1.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::sync::Arc;

use qcow2_file::{Access, HostFile};
use rustix::fs::{
    Gid, Mode, Timespec, Timestamps, Uid, XattrFlags, fchmod, fchown, fgetxattr, fremovexattr,
    fsetxattr, futimens,
};
use rustix::io::Errno;

use crate::publish::Draft;
use crate::{Error, Result};

/// The label of SELinux.
const SECURITY_LABEL: &str = "security.selinux";
/// Longest label that is carried.
const MAX_LABEL_BYTES: usize = 4096;
/// The access list of POSIX. Where there is one, the mode's bits of the group are the most that it
/// grants to anybody but owner and others, and not what the group may.
const ACCESS_LIST: &str = "system.posix_acl_access";
/// Longest value that Linux gives to an extended attribute.
const MAX_ACCESS_LIST_BYTES: usize = 1 << 16;
/// Permission bits that are carried: set-user-id and its kin make no sense on an image.
const MODE_BITS: u32 = 0o777;

/// Permission bits of what stays its owner's alone.
const PRIVATE_MODE_BITS: u32 = 0o600;
/// Those of the owner.
const OWNER_MODE_BITS: u32 = 0o700;

/// Permission bits of a new file, before the umask.
const NEW_MODE_BITS: u32 = 0o666;

/// What a copy has from its source beside the content, in the words of `cp --preserve`. A set of
/// attributes; the default is what a copy on one host preserves unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "a set of four")]
pub struct Preserve {
    /// Permission bits, those of set-user-id and its kin never, and the access list of POSIX.
    pub mode: bool,
    /// User and group, as far as this process may.
    pub ownership: bool,
    /// When it was written and read last.
    pub timestamps: bool,
    /// The label of SELinux, as far as this process may.
    pub context: bool,
}

impl Default for Preserve {
    fn default() -> Self {
        Self { mode: true, ownership: true, timestamps: false, context: true }
    }
}

impl Preserve {
    /// Every attribute.
    pub const ALL: Self = Self { mode: true, ownership: true, timestamps: true, context: true };
    /// No attribute.
    pub const NONE: Self =
        Self { mode: false, ownership: false, timestamps: false, context: false };

    /// What is in either set.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self {
            mode: self.mode | other.mode,
            ownership: self.ownership | other.ownership,
            timestamps: self.timestamps | other.timestamps,
            context: self.context | other.context,
        }
    }

    /// What is in this set and not in `other`.
    #[must_use]
    pub fn without(self, other: Self) -> Self {
        Self {
            mode: self.mode & !other.mode,
            ownership: self.ownership & !other.ownership,
            timestamps: self.timestamps & !other.timestamps,
            context: self.context & !other.context,
        }
    }
}

/// A list with commas.
impl FromStr for Preserve {
    type Err = Error;

    fn from_str(list: &str) -> Result<Self> {
        list.split(',').try_fold(Self::NONE, |set, word| {
            Ok(set.with(match word {
                "mode" => Self { mode: true, ..Self::NONE },
                "ownership" => Self { ownership: true, ..Self::NONE },
                "timestamps" => Self { timestamps: true, ..Self::NONE },
                "context" => Self { context: true, ..Self::NONE },
                "all" => Self::ALL,
                _ => {
                    let known = "mode, ownership, timestamps, context or all";
                    return Err(Error::Usage {
                        reason: format!("unknown attribute {word:?}: {known}"),
                    });
                }
            }))
        })
    }
}

/// Makes a draft that nobody had a model for like the file that it replaces, or like any new file.
pub(crate) fn as_usual(draft: &Draft) -> Result<()> {
    match HostFile::open(draft.target(), Access::Read) {
        Ok(replaced) => like(&Arc::new(replaced), Preserve::default(), draft),
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

/// Gives a draft what is to be preserved of `model`, as far as we may; the rest is as usual. A
/// device's attributes are not a file's: then the copy stays its owner's alone.
pub(crate) fn of(model: &Arc<HostFile>, what: Preserve, draft: &Draft) -> Result<()> {
    if !(what.mode && what.ownership && what.context) {
        as_usual(draft)?;
    }
    like(model, what, draft)
}

fn like(model: &Arc<HostFile>, what: Preserve, draft: &Draft) -> Result<()> {
    let metadata = model.file().metadata().map_err(|source| failed(draft, source))?;
    let file = draft.file().file();
    if model.is_device() {
        return if what.mode { set_mode(draft, PRIVATE_MODE_BITS) } else { Ok(()) };
    }
    // Owner first: changing it takes bits of the mode away. Not being allowed to is no error, as
    // with cp.
    let (owner, group) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
    if what.ownership
        && let Err(error) = fchown(file, Some(owner), Some(group))
    {
        tracing::debug!(%error, "the owner is not preserved");
    }
    if what.mode {
        copy_mode(model, draft, metadata.mode() & MODE_BITS)?;
    }
    if what.context {
        copy_label(model, draft);
    }
    if what.timestamps {
        let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: time(metadata.atime(), metadata.atime_nsec()),
            last_modification: time(metadata.mtime(), metadata.mtime_nsec()),
        };
        futimens(file, &times).map_err(|errno| failed(draft, errno))?;
    }
    Ok(())
}

/// Gives a draft the permissions of `model`. At no moment may somebody read it who may not read
/// that: an access list that cannot be carried leaves it to its owner.
fn copy_mode(model: &HostFile, draft: &Draft, mode: u32) -> Result<()> {
    let file = draft.file().file();
    let mut list = vec![0; MAX_ACCESS_LIST_BYTES];
    let carried = match fgetxattr(model.file(), ACCESS_LIST, list.as_mut_slice()) {
        Err(Errno::NODATA | Errno::NOTSUP) => {
            // It may have one from its directory, whose entries the mode would let in.
            match fremovexattr(file, ACCESS_LIST) {
                Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => return set_mode(draft, mode),
                Err(errno) => return Err(failed(draft, errno)),
            }
        }
        Err(errno) => Err(errno),
        Ok(len) => {
            set_mode(draft, mode & OWNER_MODE_BITS)?;
            // Brings the bits of group and others with it.
            let list = list.get(..len).unwrap_or_default();
            fsetxattr(file, ACCESS_LIST, list, XattrFlags::empty())
        }
    };
    carried.or_else(|error| {
        tracing::warn!(%error, "the access list is not preserved: the copy is its owner's alone");
        set_mode(draft, mode & OWNER_MODE_BITS)
    })
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

    /// An access list of version 2: tag, permissions and ID of each entry.
    fn access_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut list = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            list.extend(tag.to_le_bytes());
            list.extend(permissions.to_le_bytes());
            list.extend(id.to_le_bytes());
        }
        list
    }

    #[test]
    fn an_access_list_is_carried_and_opens_the_copy_to_nobody_else() {
        const NOBODY: u32 = u32::MAX;
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("source");
        fs::write(&source, b"a disk").unwrap();
        fs::set_permissions(&source, fs::Permissions::from_mode(0o600)).unwrap();
        // Owner, one user, the group, which may do nothing, the mask, others.
        let (owner, user, group) = ((1, 6, NOBODY), (2, 6, 65534), (4, 0, NOBODY));
        let list = access_list(&[owner, user, group, (16, 6, NOBODY), (32, 0, NOBODY)]);
        let file = fs::File::open(&source).unwrap();
        if let Err(error) = fsetxattr(&file, ACCESS_LIST, &list, XattrFlags::empty()) {
            assert_eq!(error, Errno::NOTSUP);
            eprintln!("skipped: no access lists here");
            return;
        }
        assert_eq!(mode(&source), 0o660);
        let model = Arc::new(HostFile::open(&source, Access::Read).unwrap());
        let read = |draft: &Draft| {
            let mut found = vec![0; MAX_ACCESS_LIST_BYTES];
            let len = fgetxattr(draft.file().file(), ACCESS_LIST, found.as_mut_slice());
            len.map(|len| found[..len].to_vec())
        };
        let draft = Draft::create(&dir.path().join("copy")).unwrap();
        of(&model, Preserve::ALL, &draft).unwrap();
        assert_eq!((read(&draft), mode(draft.temporary())), (Ok(list), 0o660));
        drop(draft);
        let draft = Draft::create(&dir.path().join("copy")).unwrap();
        of(&model, Preserve::NONE, &draft).unwrap();
        assert_eq!(read(&draft), Err(Errno::NODATA));
        drop(draft);

        // What a directory gives to new files is not the source's.
        let plain = dir.path().join("plain");
        fs::write(&plain, b"a disk").unwrap();
        fs::set_permissions(&plain, fs::Permissions::from_mode(0o640)).unwrap();
        let plain = Arc::new(HostFile::open(&plain, Access::Read).unwrap());
        let given = access_list(&[owner, user, group, (16, 7, NOBODY), (32, 0, NOBODY)]);
        let directory = fs::File::open(dir.path()).unwrap();
        let default = "system.posix_acl_default";
        fsetxattr(&directory, default, &given, XattrFlags::empty()).unwrap();
        let draft = Draft::create(&dir.path().join("copy")).unwrap();
        assert!(read(&draft).is_ok());
        of(&plain, Preserve::ALL, &draft).unwrap();
        assert_eq!((read(&draft), mode(draft.temporary())), (Err(Errno::NODATA), 0o640));
    }
}
