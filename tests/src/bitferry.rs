//! The `bitferry` command under test.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use crate::process::{Output, Run};

/// Address space the command may use in a test: threads, a 64 MiB cache and some bitmaps fit many
/// times, a table sized by a hostile image does not.
pub const MEMORY: u64 = 3 << 30;

/// Exit statuses, as the command line's contract names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Exit {
    /// All that was asked for is done.
    Done = 0,
    /// Compared and different, or the proof did not match.
    Different = 1,
    /// Wrong usage.
    Usage = 2,
    /// Local device or file.
    Device = 3,
    /// Transport or peer.
    Transport = 4,
    /// Malformed input or stream.
    Malformed = 5,
    /// Finished and published, but something asked for was not preserved.
    NotPreserved = 6,
    /// Refused before anything was written.
    Refused = 7,
    /// Outcome unknown.
    Unknown = 8,
    /// The user stopped it.
    Interrupted = 130,
}

/// The command, ready for arguments, with the limits every test wants.
pub fn bitferry() -> Run {
    Run::new(binary()).memory(MEMORY).patience(Duration::from_secs(90))
}

/// Where the command is: `BITFERRY_BIN`, else built now, so that a test never meets an old one.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        if let Some(path) = std::env::var_os("BITFERRY_BIN") {
            return PathBuf::from(path);
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let build = Run::new(cargo).words("build --quiet -p bitferry --bin bitferry");
        build.dir(workspace()).patience(Duration::from_secs(900)).ok();
        target_dir().join("debug/bitferry")
    })
}

/// The root of the workspace.
pub fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace")
}

/// Cargo's target directory.
pub fn target_dir() -> PathBuf {
    let named = std::env::var_os("CARGO_TARGET_DIR");
    named.map_or_else(|| workspace().join("target"), |d| workspace().join(d))
}

impl Output {
    /// Panics unless the command ended with this status.
    #[track_caller]
    pub fn expect_exit(self, expected: Exit) -> Self {
        assert_eq!(self.code(), Some(expected as i32), "expected {expected:?}\n{self}");
        self
    }

    /// Panics if the command died of a bug: a panic, an abort, a signal, the time limit.
    #[track_caller]
    pub fn expect_no_crash(self) -> Self {
        let said = self.complaint();
        let is_panic = said.contains("panicked at") || said.contains("RUST_BACKTRACE");
        assert!(self.code().is_some_and(|c| c < 101) && !is_panic, "crashed\n{self}");
        self
    }
}
