//! Block devices, where the machine lets us make some.

use std::path::{Path, PathBuf};

use crate::Run;
use crate::peer::cannot;

/// A file as a block device; let go of when dropped.
pub struct Loop(pub PathBuf);

impl Loop {
    /// `None` where the machine does not let us, which is said and counted.
    pub fn over(file: &Path) -> Option<Self> {
        let output = Run::new("losetup").words("-f --show").arg(file).output();
        if !output.status.success() {
            cannot("no loop device can be set up here");
            return None;
        }
        Some(Self(output.text().trim().into()))
    }

    /// The same device, over another file.
    #[must_use]
    pub fn again_over(self, file: &Path) -> Self {
        Run::new("losetup").arg("-d").arg(&self.0).ok();
        Run::new("losetup").arg(&self.0).arg(file).ok();
        self
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Run::new("losetup").arg("-d").arg(&self.0).output();
    }
}
