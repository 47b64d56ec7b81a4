//! Test support: real peers, child processes that cannot hang a test, scratch directories, images
//! made by `qemu-img`, and the `bitferry` command under test.
//!
//! Only test code is here, so helpers panic with a message that names the command that failed: that
//! is what a test wants. What must be waited for is waited for with a limit.
#![allow(clippy::missing_panics_doc)]

pub mod bitferry;
pub mod destination;
pub mod device;
pub mod faults;
pub mod fuzz;
pub mod image;
#[cfg(feature = "programs")]
pub mod incoming;
pub mod json;
pub mod middle;
pub mod migration;
#[cfg(feature = "programs")]
pub mod outgoing;
pub mod peer;
#[cfg(feature = "programs")]
pub mod pki;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod random;
pub mod scratch;
pub mod sshd;

pub use bitferry::{Exit, bitferry};
pub use peer::{Peer, require, require_all};
pub use process::{Output, Run};
pub use scratch::Scratch;
