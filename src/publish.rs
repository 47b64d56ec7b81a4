//! Files that get their final name only when they are complete. SPEC 3.1 and 3.2.
//!
//! A [`Draft`] is a file under its temporary name, locked, and removed when it is dropped without
//! having been published, unless it is kept to be gone on with. What belongs together is finished
//! and synced as drafts first, and then [`publish`]ed in one go; the directory is synced last.

use std::borrow::Borrow;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use format_spec::files::temporary_name;
use qcow2_file::lock::{self, Lock};
use qcow2_file::{HostFile, Storage};
use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::{Error, Result};

/// How often another writer's temporary file may vanish or be replaced under us.
const ATTEMPTS: usize = 16;

/// A destination under its temporary name.
#[derive(Debug)]
pub(crate) struct Draft {
    file: Arc<HostFile>,
    temporary: PathBuf,
    target: PathBuf,
    is_published: AtomicBool,
    is_kept: AtomicBool,
    /// Whether something had its final name before.
    has_replaced: AtomicBool,
    _lock: Lock,
}

impl Draft {
    fn new(file: Arc<HostFile>, (temporary, target): (PathBuf, PathBuf), lock: Lock) -> Self {
        let (is_published, is_kept) = (AtomicBool::new(false), AtomicBool::new(false));
        let has_replaced = AtomicBool::new(false);
        Self { file, temporary, target, is_published, is_kept, has_replaced, _lock: lock }
    }

    /// Opens and locks the temporary file that an earlier try left for `target`, if there is one.
    /// One that a living process writes is [`qcow2_file::Error::InUse`].
    pub(crate) fn reopen(target: &Path) -> Result<Option<Self>> {
        let target = followed(target)?;
        let temporary = temporary_path(&target)?;
        // Nobody of us makes anything but files there.
        if !fs::symlink_metadata(&temporary).is_ok_and(|m| m.is_file()) {
            return Ok(None);
        }
        let file = match HostFile::open(&temporary, qcow2_file::Access::ReadWrite) {
            Ok(file) => Arc::new(file),
            Err(qcow2_file::Error::Open { source, .. })
                if source.kind() == io::ErrorKind::NotFound =>
            {
                return Ok(None);
            }
            Err(e) => return Err(e.into()),
        };
        let lock = lock::acquire_temporary(file.file(), &temporary)?;
        Ok(lock.map(|lock| {
            let draft = Self::new(file, (temporary, target), lock);
            // Until it is known what it is.
            draft.keep();
            draft
        }))
    }

    /// Leaves the file where it is when it is dropped.
    pub(crate) fn keep(&self) {
        self.is_kept.store(true, Ordering::Relaxed);
    }

    /// Removes the file when it is dropped.
    pub(crate) fn forsake(&self) {
        self.is_kept.store(false, Ordering::Relaxed);
    }

    /// Whether it is what will stand at `target`.
    pub(crate) fn is_for(&self, target: &Path) -> bool {
        followed(target).is_ok_and(|target| target == self.target)
    }

    /// Where it will stand.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Creates and locks the temporary file for `target`. One that a dead process left is removed;
    /// one that a living process writes is [`qcow2_file::Error::InUse`].
    pub(crate) fn create(target: &Path) -> Result<Self> {
        let target = followed(target)?;
        let temporary = temporary_path(&target)?;
        for _ in 0..ATTEMPTS {
            match fs::symlink_metadata(&temporary) {
                Ok(_) => remove_abandoned(&temporary)?,
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(failed("look at", &temporary)(e)),
            }
            let file = match HostFile::create_new(&temporary) {
                Ok(file) => Arc::new(file),
                Err(qcow2_file::Error::Open { source, .. })
                    if source.kind() == io::ErrorKind::AlreadyExists =>
                {
                    continue;
                }
                Err(e) => return Err(e.into()),
            };
            if let Some(lock) = lock::acquire_temporary(file.file(), &temporary)? {
                return Ok(Self::new(file, (temporary, target), lock));
            }
        }
        Err(qcow2_file::Error::InUse { file: name_of(&temporary), holders: Vec::new() }.into())
    }

    /// The file.
    pub(crate) fn file(&self) -> &Arc<HostFile> {
        &self.file
    }

    /// The file, as what images are written to.
    pub(crate) fn storage(&self) -> Arc<dyn Storage> {
        self.file.clone()
    }

    /// Where it stands now.
    pub(crate) fn temporary(&self) -> &Path {
        &self.temporary
    }

    /// Gives it its final name. Without `replaces`, a file of that name is an error.
    fn rename(&self, replaces: bool) -> Result<()> {
        // A crash between the two halves of a rename by link leaves both names.
        let is_same = |a: &Path, b: &Path| {
            let id = |m: fs::Metadata| (m.dev(), m.ino());
            fs::symlink_metadata(a).map(id).ok() == fs::symlink_metadata(b).map(id).ok()
        };
        if is_same(&self.temporary, &self.target) {
            fs::remove_file(&self.temporary).map_err(failed("remove", &self.temporary))?;
            self.is_published.store(true, Ordering::Relaxed);
            return Ok(());
        }
        if replaces {
            let has_replaced = fs::symlink_metadata(&self.target).is_ok();
            self.has_replaced.store(has_replaced, Ordering::Relaxed);
            fs::rename(&self.temporary, &self.target).map_err(failed("rename to", &self.target))?;
        } else {
            rename_new(&self.temporary, &self.target)?;
        }
        self.is_published.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Takes the final name away again; `false` where it stays, since what it replaced is gone.
    fn withdraw(&self) -> bool {
        if self.has_replaced.load(Ordering::Relaxed) {
            return false;
        }
        match fs::rename(&self.target, &self.temporary) {
            Ok(()) => self.is_published.store(false, Ordering::Relaxed),
            Err(error) => {
                tracing::warn!(%error, "{} stays", self.target.display());
                return false;
            }
        }
        true
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if self.is_published.load(Ordering::Relaxed) || self.is_kept.load(Ordering::Relaxed) {
            return;
        }
        if let Err(error) = fs::remove_file(&self.temporary) {
            tracing::warn!(%error, "{} stays behind", self.temporary.display());
        }
    }
}

/// Publishes drafts whose content is durable, in the order given, and makes their names durable.
/// Where one of them cannot be published, those before it are taken back that replaced nothing; if
/// others are left, the error names them.
pub(crate) fn publish<D: Borrow<Draft>>(drafts: Vec<D>, replaces: bool) -> Result<()> {
    for (index, draft) in drafts.iter().enumerate() {
        if let Err(error) = draft.borrow().rename(replaces) {
            let done = drafts.iter().take(index).rev().map(Borrow::borrow);
            let left: Vec<_> = done.filter(|done| !done.withdraw()).collect();
            return Err(left_published(&left, error));
        }
    }
    drafts.iter().try_for_each(|draft| sync_directory(&draft.borrow().target))
}

fn left_published(left: &[&Draft], error: Error) -> Error {
    if left.is_empty() {
        return error;
    }
    let published = left.iter().rev().map(|draft| draft.target.clone()).collect();
    Error::HalfPublished { published, source: Box::new(error) }
}

/// Removes the temporary file of a process that died. One that is locked stays, and is an error.
fn remove_abandoned(temporary: &Path) -> Result<()> {
    // Nobody of us makes links there, and following one would touch a stranger's file.
    if fs::symlink_metadata(temporary).is_ok_and(|m| m.file_type().is_symlink()) {
        return fs::remove_file(temporary).map_err(failed("remove", temporary));
    }
    let file = match HostFile::open(temporary, qcow2_file::Access::ReadWrite) {
        Ok(file) => file,
        Err(qcow2_file::Error::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(());
        }
        Err(e) => return Err(e.into()),
    };
    match lock::acquire_temporary(file.file(), temporary)? {
        Some(_lock) => fs::remove_file(temporary).map_err(failed("remove", temporary)),
        None => Ok(()),
    }
}

/// Renames to a name that must be free.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        // File systems that cannot: a hard link never replaces either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            fs::hard_link(from, to).map_err(already_there(to))?;
            fs::remove_file(from).map_err(failed("remove", from))
        }
        Err(e) => Err(already_there(to)(e.into())),
    }
}

fn already_there(path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Exists { path: path.to_owned() },
        _ => failed("rename to", path)(source),
    }
}

/// Where a destination really stands: the target of a symbolic link to an existing file.
pub(crate) fn followed(target: &Path) -> Result<PathBuf> {
    let is_link = fs::symlink_metadata(target).is_ok_and(|m| m.file_type().is_symlink());
    if is_link && target.exists() {
        return fs::canonicalize(target).map_err(failed("follow", target));
    }
    Ok(target.to_owned())
}

/// Where `target` stands until it is complete.
pub(crate) fn temporary(target: &Path) -> Result<PathBuf> {
    temporary_path(&followed(target)?)
}

/// Whether an earlier try left something for `target`.
pub(crate) fn is_begun(target: &Path) -> Result<bool> {
    Ok(fs::symlink_metadata(temporary(target)?).is_ok_and(|found| found.is_file()))
}

/// Holds everybody else off a file that is to be replaced, where there is one. One that a program
/// uses is [`qcow2_file::Error::InUse`].
pub(crate) fn hold(target: &Path) -> Result<Option<Lock>> {
    match HostFile::open(target, qcow2_file::Access::Read) {
        Ok(file) => Ok(Some(lock::acquire(file.file(), &file.name(), lock::Mode::Write)?)),
        Err(qcow2_file::Error::Open { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Bytes that the file system has given to what an earlier try left for `target`.
pub(crate) fn left_bytes(target: &Path) -> u64 {
    let found = temporary(target).ok().and_then(|path| fs::symlink_metadata(path).ok());
    found.filter(fs::Metadata::is_file).map_or(0, |m| m.blocks().saturating_mul(512))
}

/// The directory of a path; `.` for a bare name.
pub(crate) fn directory(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Whether a path is a symbolic link to a file that has another directory: what is named relative
/// to it has two meanings.
pub(crate) fn leads_elsewhere(path: &Path) -> bool {
    let is_link = fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_symlink());
    let real = fs::canonicalize(path).ok().filter(|_| is_link);
    real.is_some_and(|real| fs::canonicalize(directory(path)).ok().as_deref() != real.parent())
}

fn temporary_path(target: &Path) -> Result<PathBuf> {
    let name = target
        .file_name()
        .ok_or_else(|| Error::Usage { reason: format!("{} is no file name", target.display()) })?;
    Ok(directory(target).join(OsString::from_vec(temporary_name(OsStr::as_bytes(name)))))
}

/// Makes the names in the directory of `path` durable.
pub(crate) fn sync_directory(path: &Path) -> Result<()> {
    let directory = directory(path);
    let sync = || File::open(directory)?.sync_all();
    sync().map_err(failed("sync", directory))
}

fn name_of(path: &Path) -> Arc<str> {
    path.to_string_lossy().into()
}

fn failed(action: &'static str, path: &Path) -> impl Fn(io::Error) -> Error {
    move |source| Error::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let name = |e: io::Result<fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(directory).unwrap().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn a_dropped_draft_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let draft = Draft::create(&dir.path().join("a")).unwrap();
        assert_eq!(names(dir.path()), [".a.bitferry-part"]);
        drop(draft);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn a_kept_draft_is_found_again_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        assert!(Draft::reopen(&target).unwrap().is_none());
        let draft = Draft::create(&target).unwrap();
        draft.keep();
        assert!(Draft::reopen(&target).is_err(), "it is being written");
        drop(draft);
        let draft = Draft::reopen(&target).unwrap().unwrap();
        assert_eq!(names(dir.path()), [".a.bitferry-part"]);
        draft.forsake();
        drop(draft);
        assert!(names(dir.path()).is_empty());
    }

    #[test]
    fn two_writers_of_one_destination_keep_apart() {
        let dir = tempfile::tempdir().unwrap();
        let first = Draft::create(&dir.path().join("a")).unwrap();
        let second = Draft::create(&dir.path().join("a")).unwrap_err();
        assert!(matches!(second, Error::Image(qcow2_file::Error::InUse { .. })), "{second:?}");
        publish(vec![first], false).unwrap();
        assert_eq!(names(dir.path()), ["a"]);
    }

    #[test]
    fn what_a_dead_process_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".a.bitferry-part"), b"left over").unwrap();
        let draft = Draft::create(&dir.path().join("a")).unwrap();
        assert_eq!(draft.file().file().metadata().unwrap().len(), 0);
    }

    #[test]
    fn nothing_is_replaced_unasked_and_pairs_stay_together() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let pair =
            || vec![Draft::create(&path("data")).unwrap(), Draft::create(&path("top")).unwrap()];
        let drafts = pair();
        fs::write(path("top"), b"mine").unwrap();
        assert!(matches!(publish(drafts, false), Err(Error::Exists { .. })));
        assert_eq!(names(dir.path()), ["top"]);
        publish(pair(), true).unwrap();
        assert_eq!(names(dir.path()), ["data", "top"]);
        assert!(fs::read(path("top")).unwrap().is_empty());
    }

    #[test]
    fn a_second_rename_that_fails_takes_the_first_one_back_or_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let pair =
            || vec![Draft::create(&path("data")).unwrap(), Draft::create(&path("top")).unwrap()];
        fs::create_dir(path("top")).unwrap();
        let error = publish(pair(), true).unwrap_err();
        assert!(matches!(&error, Error::File { path: of, .. } if *of == path("top")), "{error:?}");
        assert_eq!(names(dir.path()), ["top"], "nothing is published");
        // What replaced something cannot be taken back.
        fs::write(path("data"), b"old").unwrap();
        let error = publish(pair(), true).unwrap_err();
        let Error::HalfPublished { published, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*published, [path("data")]);
        assert!(fs::read(path("data")).unwrap().is_empty());
        assert_eq!(names(dir.path()), ["data", "top"]);
    }

    #[test]
    fn a_link_to_a_file_is_followed() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("real"), b"old").unwrap();
        std::os::unix::fs::symlink("real", path("link")).unwrap();
        publish(vec![Draft::create(&path("link")).unwrap()], true).unwrap();
        assert!(fs::symlink_metadata(path("link")).unwrap().is_symlink());
        assert!(fs::read(path("real")).unwrap().is_empty());
    }
}
