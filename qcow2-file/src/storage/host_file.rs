//! Regular files and block devices.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::{Run, Storage};
use crate::error::{Error, Result};

/// Bytes that are written at a time where the system cannot zero a range by itself.
const ZERO_BUFFER_BYTES: usize = 64 << 10;
static ZEROES: [u8; ZERO_BUFFER_BYTES] = [0; ZERO_BUFFER_BYTES];

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Access {
    /// Reading only.
    #[default]
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// Which file a path led to, whatever its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
}

/// A regular file or a block device. Anything else is refused: a pipe or a terminal has no offsets.
#[derive(Debug)]
pub struct HostFile {
    file: File,
    name: Arc<str>,
    path: PathBuf,
    id: FileId,
    is_device: bool,
    /// Whether `SEEK_DATA` works here, until it has answered that it does not.
    knows_holes: AtomicBool,
    /// A stretch that held data when it was last looked at. Some file systems walk a stretch page
    /// by page to find its end, so asking again for every extent in it would take quadratic time.
    /// That what was data may be a hole by now does no harm: it reads all the same.
    known_data: Mutex<Range<u64>>,
    /// Held while a regular file is written. The kernel takes one write to a file at a time and
    /// lets the next one spin for its turn, on a core that could be reading or hashing; here it
    /// sleeps.
    turn: Mutex<()>,
}

impl HostFile {
    /// Opens an existing file or block device. Follows symbolic links.
    pub fn open(path: &Path, access: Access) -> Result<Self> {
        let mode = match access {
            Access::Read => OFlags::RDONLY,
            Access::ReadWrite => OFlags::RDWR,
        };
        // Without NONBLOCK, opening a pipe that somebody put there would wait for its other end.
        let flags = mode | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|e| open_error(path, e))?;
        let opened = Self::from_fd(fd, path)?;
        rustix::fs::fcntl_setfl(&opened.file, OFlags::empty()).map_err(|e| open_error(path, e))?;
        Ok(opened)
    }

    /// Creates a file that must not exist, readable and writable by its owner alone. A symbolic
    /// link at `path` counts as existing.
    pub fn create_new(path: &Path) -> Result<Self> {
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let fd = rustix::fs::open(path, flags, mode).map_err(|e| open_error(path, e))?;
        Self::from_fd(fd, path)
    }

    /// Takes an open file. `path` serves error messages and resolves relative names.
    pub fn from_fd(fd: OwnedFd, path: &Path) -> Result<Self> {
        let stat = rustix::fs::fstat(&fd).map_err(|e| open_error(path, e))?;
        let name: Arc<str> = path.display().to_string().into();
        let is_device = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            _ => {
                let reason = "is neither a regular file nor a block device".to_owned();
                return Err(Error::Refused { file: name, reason });
            }
        };
        // A device node may exist twice: what counts is the device it stands for.
        let id = if is_device {
            FileId { device: u64::MAX, inode: stat.st_rdev }
        } else {
            FileId { device: stat.st_dev, inode: stat.st_ino }
        };
        let file = File::from(fd);
        let knows_holes = AtomicBool::new(!is_device);
        let path = path.to_owned();
        let known_data = Mutex::new(0..0);
        let turn = Mutex::new(());
        Ok(Self { file, name, path, id, is_device, knows_holes, known_data, turn })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Which file it is.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Whether it is a block device.
    pub fn is_device(&self) -> bool {
        self.is_device
    }

    /// The open file, for owner, mode and times.
    pub fn file(&self) -> &File {
        &self.file
    }

    fn write_zero_bytes(&self, mut offset: u64, len: u64) -> io::Result<()> {
        let end = end_of(offset, len)?;
        while offset < end {
            let left = usize::try_from(end - offset).unwrap_or(usize::MAX);
            let piece = ZEROES.get(..left.min(ZERO_BUFFER_BYTES)).unwrap_or(&ZEROES);
            self.file.write_all_at(piece, offset)?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    fn known_data(&self) -> MutexGuard<'_, Range<u64>> {
        self.known_data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for this writer's turn. A device takes writes side by side.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        (!self.is_device).then(|| self.turn.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn seek(&self, to: SeekFrom) -> rustix::io::Result<u64> {
        rustix::fs::seek(&self.file, to)
    }
}

impl AsFd for HostFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Storage for HostFile {
    fn name(&self) -> Arc<str> {
        self.name.clone()
    }

    fn len(&self) -> io::Result<u64> {
        if self.is_device {
            return Ok(self.seek(SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn read_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    break;
                }
                Ok(count) => {
                    buf = buf.get_mut(count..).unwrap_or_default();
                    offset = offset.saturating_add(count as u64);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _turn = self.turn();
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        let end = end_of(offset, len)?;
        *self.known_data() = 0..0;
        if !self.is_device && end > self.len()? {
            // Not by setting the length: another thread may have written beyond `end` meanwhile,
            // and that would be cut off. The last byte of the range is ours to write.
            self.file.write_all_at(&[0], end - 1)?;
        }
        // Block devices take the same calls: the kernel turns them into what BLKZEROOUT does.
        let keep = FallocateFlags::KEEP_SIZE;
        for mode in [FallocateFlags::PUNCH_HOLE | keep, FallocateFlags::ZERO_RANGE | keep] {
            match retry(|| rustix::fs::fallocate(&self.file, mode, offset, len)) {
                Ok(()) => return Ok(()),
                Err(e) if is_unsupported(e) => {}
                Err(e) => return Err(e.into()),
            }
        }
        self.write_zero_bytes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        *self.known_data() = 0..0;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(&self.file, mode, offset, len)) {
            Err(e) if !is_unsupported(e) => Err(e.into()),
            _ => Ok(()),
        }
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.is_device || len == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::KEEP_SIZE;
        match retry(|| rustix::fs::fallocate(&self.file, mode, offset, len)) {
            Err(e) if !is_unsupported(e) => Err(e.into()),
            _ => Ok(()),
        }
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if self.is_device {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "a block device has its size"));
        }
        *self.known_data() = 0..0;
        self.file.set_len(len)
    }

    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<Run> {
        let data = |end: u64| Run { len: max_len.min(end.saturating_sub(offset)), is_hole: false };
        let hole = |end: u64| Run { len: max_len.min(end.saturating_sub(offset)), is_hole: true };
        if offset >= i64::MAX as u64 {
            return Ok(hole(u64::MAX));
        }
        if !self.knows_holes.load(Ordering::Relaxed) {
            let end = self.len()?;
            return Ok(if end > offset { data(end) } else { hole(u64::MAX) });
        }
        let known = self.known_data().clone();
        if known.contains(&offset) {
            return Ok(data(known.end));
        }
        let next_data = match self.seek(SeekFrom::Data(offset)) {
            Ok(at) => at,
            Err(Errno::NXIO) => return Ok(hole(u64::MAX)),
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                self.knows_holes.store(false, Ordering::Relaxed);
                return self.run_at(offset, max_len);
            }
            Err(e) => return Err(e.into()),
        };
        if next_data > offset {
            return Ok(hole(next_data));
        }
        match self.seek(SeekFrom::Hole(offset)) {
            Ok(end) if end > offset => {
                *self.known_data() = offset..end;
                Ok(data(end))
            }
            // Punched or cut between the two calls: data is always a true answer.
            Ok(_) | Err(Errno::NXIO) => Ok(data(offset + 1)),
            Err(e) => Err(e.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync writes the metadata that is needed to read the data back: length and extents.
        self.file.sync_data()
    }
}

fn open_error(path: &Path, errno: Errno) -> Error {
    Error::Open { file: path.display().to_string().into(), source: errno.into() }
}

fn end_of(offset: u64, len: u64) -> io::Result<u64> {
    let end = offset.checked_add(len).filter(|end| *end <= i64::MAX as u64);
    end.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
}

fn retry<T>(mut call: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            answer => return answer,
        }
    }
}

/// What file systems and devices answer that cannot deallocate or zero a range, or not at this
/// alignment.
fn is_unsupported(e: Errno) -> bool {
    matches!(e, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV | Errno::TXTBSY)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    fn scratch() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        (dir, path)
    }

    #[test]
    fn creates_only_what_is_not_there_and_for_its_owner_alone() {
        let (dir, path) = scratch();
        let file = HostFile::create_new(&path).unwrap();
        assert_eq!(file.file().metadata().unwrap().permissions().mode() & 0o7777, 0o600);
        assert!(HostFile::create_new(&path).is_err());
        let link = dir.path().join("link");
        symlink("nowhere", &link).unwrap();
        assert!(HostFile::create_new(&link).is_err());
        assert!(!dir.path().join("nowhere").exists());
        symlink("file", dir.path().join("same")).unwrap();
        let same = HostFile::open(&dir.path().join("same"), Access::Read).unwrap();
        assert_eq!(same.id(), file.id());
        assert!(same.write_at(b"x", 0).is_err());
    }

    #[test]
    fn zeroes_become_holes_and_holes_are_found() {
        let (_dir, path) = scratch();
        let file = HostFile::create_new(&path).unwrap();
        let block = 1 << 20;
        file.write_at(&vec![7; 3 << 20], 0).unwrap();
        assert_eq!(file.run_at(5, u64::MAX).unwrap(), Run { len: 3 * block - 5, is_hole: false });
        file.write_zeroes(block, block).unwrap();
        let mut buf = vec![9; 4 << 20];
        file.read_at(&mut buf, 0).unwrap();
        let at = |n: usize| (buf[n << 20], buf[((n + 1) << 20) - 1]);
        assert_eq!([at(0), at(1), at(2), at(3)], [(7, 7), (0, 0), (7, 7), (0, 0)]);
        // A file system without holes answers one stretch of data, which is true as well.
        let run = file.run_at(0, u64::MAX).unwrap();
        assert!(!run.is_hole && [block, 3 * block].contains(&run.len), "{run:?}");
        if run.len == block {
            assert!(file.file().metadata().unwrap().blocks() * 512 <= 2 * block + 65536);
            let hole = file.run_at(block + 4096, u64::MAX).unwrap();
            assert_eq!(hole, Run { len: block - 4096, is_hole: true });
        }
        assert!(file.run_at(3 * block, 10).unwrap().is_hole);
        file.write_zeroes(3 * block, block).unwrap();
        assert_eq!(file.len().unwrap(), 4 * block);
        file.write_zeroes(100, 0).unwrap();
        assert!(file.write_zeroes(u64::MAX - 5, 10).is_err());
        file.write_zero_bytes(5, 70_000).unwrap();
        file.read_at(&mut buf, 0).unwrap();
        assert_eq!((buf[4], buf[5], buf[70_004], buf[70_005]), (7, 0, 0, 7));
        file.discard(2 * block, block).unwrap();
        file.set_len(10).unwrap();
        file.sync().unwrap();
        assert_eq!((file.len().unwrap(), file.is_empty().unwrap()), (10, false));
    }

    #[test]
    fn room_is_taken_and_nothing_else_changes() {
        let (_dir, path) = scratch();
        let file = HostFile::create_new(&path).unwrap();
        file.write_at(b"content", 0).unwrap();
        file.reserve(4096, 64 << 10).unwrap();
        file.reserve(0, 0).unwrap();
        assert_eq!(file.len().unwrap(), 7);
        let taken = file.file().metadata().unwrap().blocks() * 512;
        // Not every file system can.
        assert!(taken >= 64 << 10 || taken <= 4096, "{taken}");
    }

    #[test]
    fn runs_are_cut_between_sectors() {
        use crate::storage::StorageExt;
        let (_dir, path) = scratch();
        let file = HostFile::create_new(&path).unwrap();
        file.write_at(&[1; 700], 0).unwrap();
        assert_eq!(file.run(0, 4096).unwrap(), Run { len: 1024, is_hole: false });
        assert_eq!(file.run(1024, 4096).unwrap(), Run { len: 4096, is_hole: true });
        assert_eq!(file.run(0, 600).unwrap(), Run { len: 600, is_hole: false });
    }
}
