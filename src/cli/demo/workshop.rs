//! The demo's directory.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use bitferry::{Error, Result};

/// A directory for this process alone, gone with everything in it when the demo ends, however it
/// ends short of a kill.
#[derive(Debug)]
pub(super) struct Workshop(PathBuf);

impl Workshop {
    pub(super) fn new() -> Result<Self> {
        let name = format!("bitferry-demo-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let failed = |source| Error::File { action: "create", path: path.clone(), source };
        std::fs::DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        Path::join(&self.0, name)
    }
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("warning: {} stays behind: {error}", self.0.display());
        }
    }
}
