//! `file:PATH[,offset=N]`: a stream at rest.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek as _, SeekFrom, Write};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::Arc;

use format_spec::native::hello;
use format_spec::qemu::container;
use mig_core::transport::Connection;
use qcow2_file::lock::{self, Lock, Mode};

use super::error::{Error, Result};
use super::line::{Ends, NoWriter};

/// To a file, from `offset` on. What stood there and behind is lost, as with QEMU. From the start
/// it replaces a stream alone: whatever else is in a file is not ours to lose.
pub(super) fn create(path: &Path, offset: u64) -> Result<Connection> {
    let failed = |source| Error::File { action: "write", path: path.to_owned(), source };
    refuse_pipe(path)?;
    // A stream holds the guest's secrets.
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let open = options.open(path);
    let mut file = open.map_err(failed)?;
    let is_file = file.metadata().map_err(failed)?.is_file();
    // What somebody reads or writes as an image, the source of this very stream above all, is not
    // overwritten.
    let lock = is_file.then(|| lock::acquire(&file, &path.to_string_lossy().into(), Mode::Write));
    let lock = lock.transpose().map_err(|error| failed(io::Error::other(error)))?;
    if is_file && offset == 0 && !is_stream(&file).map_err(failed)? {
        return Err(Error::Holds { path: path.to_owned() });
    }
    if is_file {
        file.set_len(offset).map_err(failed)?;
    }
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    Ok(Connection {
        reader: Box::new(io::empty()),
        writer: Box::new(FileWriter { file, _lock: lock }),
        line: Arc::new(Ends(Vec::new())),
        peer: path.display().to_string(),
    })
}

/// Whether there is nothing in a file but a migration, as far as its first bytes tell.
fn is_stream(file: &File) -> io::Result<bool> {
    let mut magic = [0; 4];
    let len = file.metadata()?.len();
    let is_begun = len >= magic.len() as u64;
    if is_begun {
        file.read_exact_at(&mut magic, 0)?;
    }
    Ok(len == 0 || is_begun && [hello::MAGIC, container::MAGIC].contains(&&magic))
}

/// From a file, from `offset` on.
pub(super) fn open(path: &Path, offset: u64) -> Result<Connection> {
    let failed = |source| Error::File { action: "read", path: path.to_owned(), source };
    refuse_pipe(path)?;
    let mut file = File::open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let peer = path.display().to_string();
    Ok(Connection {
        reader: Box::new(file),
        writer: Box::new(NoWriter(peer.clone())),
        line: Arc::new(Ends(Vec::new())),
        peer,
    })
}

/// Opening a named pipe waits for its other end, without limit.
fn refuse_pipe(path: &Path) -> Result<()> {
    let is_pipe = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_fifo());
    if is_pipe {
        return Err(Error::Usage {
            uri: format!("file:{}", path.display()),
            reason: "is a named pipe: open it in the shell, and use - or fd:N",
        });
    }
    Ok(())
}

/// Flushing makes durable: a file is all that is left of its stream.
struct FileWriter {
    file: File,
    _lock: Option<Lock>,
}

impl Write for FileWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.file.write(buf)
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        self.file.write_vectored(bufs)
    }

    fn flush(&mut self) -> io::Result<()> {
        match self.file.sync_data() {
            // Nothing to make durable there: a terminal, /dev/null.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            result => result,
        }
    }
}
