//! Descriptors that this process was started with. The one module of connections with unsafe code.
#![allow(unsafe_code)]

use std::os::fd::{BorrowedFd, FromRawFd as _, OwnedFd};

use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use super::error::{Error, Result};

/// Takes a descriptor over from whoever started this process; it is closed when it is dropped. Each
/// can be taken once.
pub(super) fn take(number: i32) -> Result<OwnedFd> {
    let fault = |reason| Error::Descriptor { number, reason };
    if number <= 2 {
        return Err(fault("is a standard stream"));
    }
    // SAFETY: the borrow ends in this function, and the number is only asked for its flags; one
    // that is not open answers with an error.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = fcntl_getfd(borrowed).map_err(|_| fault("is not open"))?;
    // All that Rust programs open closes on exec; what lives without that flag came in with exec
    // and has no owner yet. Setting it is what makes a second taking fail.
    if flags.contains(FdFlags::CLOEXEC) {
        return Err(fault("was not inherited, or is in use already"));
    }
    fcntl_setfd(borrowed, flags | FdFlags::CLOEXEC).map_err(|_| fault("cannot be set up"))?;
    // SAFETY: it is open, and as said above nobody in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd as _, IntoRawFd as _};

    #[test]
    fn only_what_was_inherited_can_be_taken_and_only_once() {
        let (reader, _writer) = std::io::pipe().unwrap();
        assert!(take(reader.as_raw_fd()).is_err());
        assert!(take(1).is_err() && take(-1).is_err() && take(1 << 20).is_err());
        let inherited = rustix::io::dup(&reader).unwrap();
        let number = inherited.into_raw_fd();
        let taken = take(number).unwrap();
        assert!(take(number).is_err());
        drop(taken);
        assert!(take(number).is_err());
    }
}
