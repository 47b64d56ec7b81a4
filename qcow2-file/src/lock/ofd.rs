//! Open-file-description locks on byte ranges. The system calls are here and nowhere else.
#![allow(unsafe_code)]
// The C library declares small constants as `int` and the fields that take them as `short`.
#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What a lock allows others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Others may hold it too.
    Shared,
    /// Nobody else may hold any.
    Exclusive,
}

/// A range of bytes that need not exist in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bytes {
    pub(super) start: u32,
    pub(super) len: u32,
}

/// Takes a lock without waiting. `false` when another open file holds a conflicting one.
pub(super) fn try_lock(file: &File, kind: Kind, bytes: Bytes) -> io::Result<bool> {
    match call(file, libc::F_OFD_SETLK, raw_kind(kind), bytes) {
        Ok(_) => Ok(true),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(e) => Err(e),
    }
}

/// Gives a lock back.
pub(super) fn unlock(file: &File, bytes: Bytes) -> io::Result<()> {
    call(file, libc::F_OFD_SETLK, libc::F_UNLCK as i16, bytes).map(drop)
}

/// Whether a lock of that kind could be taken now.
pub(super) fn is_free(file: &File, kind: Kind, bytes: Bytes) -> io::Result<bool> {
    let found = call(file, libc::F_OFD_GETLK, raw_kind(kind), bytes)?;
    Ok(i32::from(found.l_type) == libc::F_UNLCK)
}

fn raw_kind(kind: Kind) -> i16 {
    match kind {
        Kind::Shared => libc::F_RDLCK as i16,
        Kind::Exclusive => libc::F_WRLCK as i16,
    }
}

fn call(file: &File, command: i32, kind: i16, bytes: Bytes) -> io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind,
        l_whence: libc::SEEK_SET as i16,
        l_start: bytes.start.into(),
        l_len: bytes.len.into(),
        // Must be 0 for these commands.
        l_pid: 0,
    };
    loop {
        // SAFETY: `file` keeps its descriptor open during the call, and `lock` is a valid `flock`
        // that the kernel reads and, for F_OFD_GETLK, writes; it keeps no pointer to it.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if result == 0 {
            return Ok(lock);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
