//! Block devices and small file systems, where the machine lets us make some.

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

/// A file system in memory with little room; let go of when dropped.
pub struct Small(PathBuf);

impl Small {
    /// Mounts one at the directory `dir`, which is made. `options` are tmpfs's: `size=4k`,
    /// `nr_inodes=3`. `None` where the machine does not let us, which is said and counted.
    pub fn at(dir: &Path, options: &str) -> Option<Self> {
        std::fs::create_dir_all(dir).expect("a directory");
        let mount = Run::new("mount").words("-t tmpfs -o").arg(options).arg("tmpfs").arg(dir);
        if !mount.works() {
            cannot("no file system can be mounted here");
            return None;
        }
        Some(Self(dir.to_owned()))
    }

    /// Makes room, or takes it away.
    pub fn resize(&self, options: &str) {
        Run::new("mount").arg("-o").arg(format!("remount,{options}")).arg(&self.0).ok();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        // Whatever still uses it: nothing of it stays.
        Run::new("umount").arg("-l").arg(&self.0).output();
    }
}
