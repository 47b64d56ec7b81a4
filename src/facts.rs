//! Which command this is: the same command continues what it began, another one does not.
//!
//! A session is derived, not stored: from the disks' files as they are, where they go, and what was
//! asked. A file is named by what it is (device, inode) and by its last change, so that a source
//! that was written to since is another session and no receipt speaks for it. Two runs that derive
//! the same session although the content differs (a clock that stands still, a clone with equal
//! numbers) are told apart by hashes where anything is left to be sent: units by the recheck, a
//! disk that was proved by READY (SPEC 9). A receipt is held against what the source knows without
//! reading its disks: names, sizes, bitmaps.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use format_spec::native::session::derive;
use qcow2_file::HostFile;

use crate::disk::Disk;
use crate::{Error, Result};

/// Says which host this is, where there is such a file.
const MACHINE_ID: &str = "/etc/machine-id";

/// A file as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileFacts {
    /// Device that it is on.
    pub device: u64,
    /// Its number there; for a device file the device that it stands for.
    pub inode: u64,
    /// Length in bytes.
    pub len: u64,
    /// Last change of its content, seconds and nanoseconds.
    pub modified: (i64, i64),
    /// Last change of content or attributes, which nobody can set back.
    pub changed: (i64, i64),
}

/// What a file is like, short: equal as long as nobody writes to it. A new name, owner or mode
/// makes no difference.
pub type Stamp = [u8; 16];

impl FileFacts {
    /// Of an open file.
    pub fn of(file: &File) -> io::Result<Self> {
        file.metadata().map(Self::from)
    }

    /// The same file, whatever is written to it.
    pub(crate) fn anyhow(self) -> Self {
        Self { len: 0, modified: (0, 0), changed: (0, 0), ..self }
    }

    /// What is told of it by a [`Stamp`].
    fn stamp(&self) -> Stamp {
        derive(&[&Self { changed: (0, 0), ..*self }.bytes()])
    }

    fn bytes(&self) -> Vec<u8> {
        let numbers = [self.device, self.inode, self.len].map(u64::to_le_bytes);
        let times = [self.modified, self.changed].map(|(s, n)| [s.to_le_bytes(), n.to_le_bytes()]);
        [numbers.as_flattened(), times.as_flattened().as_flattened()].concat()
    }
}

/// What tells commands apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// This host, see [`host`].
    pub host: Vec<u8>,
    /// Each disk: its name in the operation, its size, and its files from top to bottom. The files
    /// are left out where the disk changes while it is moved: then the caller has the session from
    /// elsewhere.
    pub disks: Vec<(String, u64, Vec<FileFacts>)>,
    /// Where they go: a URI, a path.
    pub destination: Vec<u8>,
    /// What was asked that changes what arrives, one phrase each.
    pub wishes: Vec<String>,
}

impl Facts {
    /// The session of this command.
    pub fn session(&self) -> [u8; 16] {
        let mut facts = vec![self.host.clone(), self.destination.clone()];
        facts.push((self.disks.len() as u64).to_le_bytes().to_vec());
        for (name, size, files) in &self.disks {
            facts.push(name.clone().into_bytes());
            facts.push(size.to_le_bytes().to_vec());
            facts.push(files.iter().flat_map(FileFacts::bytes).collect());
        }
        facts.extend(self.wishes.iter().map(|wish| wish.clone().into_bytes()));
        derive(&facts.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }
}

impl From<Metadata> for FileFacts {
    fn from(m: Metadata) -> Self {
        Self {
            device: m.dev(),
            inode: if m.rdev() == 0 { m.ino() } else { m.rdev() },
            len: m.len(),
            modified: (m.mtime(), m.mtime_nsec()),
            changed: (m.ctime(), m.ctime_nsec()),
        }
    }
}

/// A disk's files as they were when it was opened: what shows that one was written to by somebody
/// who does not ask for locks. A device does not show it.
#[derive(Debug)]
pub(crate) struct Opened(Vec<(Arc<HostFile>, Stamp)>);

impl Opened {
    /// As they are now.
    pub(crate) fn of(disk: &Disk) -> Result<Self> {
        let files = disk.files().filter(|file| !file.is_device());
        let files = files.map(|file| Ok((Arc::clone(file), stamp_of_open(file)?)));
        files.collect::<Result<_>>().map(Self)
    }

    /// Fails where one of them is not as it was.
    pub(crate) fn check(&self) -> Result<()> {
        for (file, before) in &self.0 {
            if stamp_of_open(file)? != *before {
                return Err(Error::SourceChanged { path: file.path().to_owned() });
            }
        }
        Ok(())
    }
}

fn stamp_of_open(file: &HostFile) -> Result<Stamp> {
    let failed = |source| Error::File { action: "look at", path: file.path().into(), source };
    Ok(FileFacts::of(file.file()).map_err(failed)?.stamp())
}

/// What the file of a name is like. It is not opened.
pub fn stamp(file: &Path) -> io::Result<Stamp> {
    Ok(FileFacts::from(std::fs::metadata(file)?).stamp())
}

/// What some files are like, as one.
pub fn stamp_of(stamps: &[Stamp]) -> Stamp {
    derive(&stamps.iter().map(<[u8; 16]>::as_slice).collect::<Vec<_>>())
}

/// What this host calls itself; empty where it has no name that lasts.
pub fn host() -> Vec<u8> {
    std::fs::read(MACHINE_ID).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        let file = FileFacts { device: 1, inode: 2, len: 3, modified: (4, 5), changed: (6, 7) };
        Facts {
            host: b"here".to_vec(),
            disks: vec![("a".into(), 512, vec![file]), ("b".into(), 1024, vec![])],
            destination: b"/there".to_vec(),
            wishes: vec!["qcow2".into()],
        }
    }

    #[test]
    fn the_same_command_is_the_same_session_and_no_other_is() {
        assert_eq!(facts().session(), facts().session());
        let changes: [fn(&mut Facts); 9] = [
            |f| f.host.clear(),
            |f| f.destination.push(b'x'),
            |f| f.wishes.push("raw".into()),
            |f| f.disks[0].1 += 512,
            |f| f.disks[1].0.push('x'),
            |f| f.disks[0].2[0].modified.1 += 1,
            |f| f.disks[0].2[0].changed.1 += 1,
            |f| f.disks[0].2[0].inode += 1,
            |f| drop(f.disks.pop()),
        ];
        for (i, change) in changes.into_iter().enumerate() {
            let mut other = facts();
            change(&mut other);
            assert_ne!(other.session(), facts().session(), "{i}");
        }
    }

    #[test]
    fn a_write_makes_it_another_session() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, b"one").unwrap();
        let before = FileFacts::of(&File::open(&path).unwrap()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        std::fs::write(&path, b"two").unwrap();
        assert_ne!(FileFacts::of(&File::open(&path).unwrap()).unwrap(), before);
    }

    #[test]
    fn a_stamp_is_of_content_and_not_of_names() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
        std::fs::write(&one, b"one").unwrap();
        let before = stamp(&one).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(30));
        std::fs::rename(&one, &two).unwrap();
        std::fs::set_permissions(&two, PermissionsExt::from_mode(0o640)).unwrap();
        assert_eq!(stamp(&two).unwrap(), before);
        std::fs::write(&two, b"two").unwrap();
        assert_ne!(stamp(&two).unwrap(), before);
        std::fs::rename(&two, &one).unwrap();
        std::fs::write(&two, b"one").unwrap();
        assert_ne!(stamp(&two).unwrap(), before, "another file");
    }
}
