//! `--state-dir`: where the journals of block devices are kept, beside which there is no place.

use std::env;
use std::path::{Path, PathBuf};

use clap::Args as Group;

/// Where root's are, as those of other services.
const OF_ROOT: &str = "/var/lib/bitferry";
/// Where others' are, in their home directory, by the XDG base directory specification.
const OF_OTHERS: &str = ".local/state";

/// Where the journals of block devices are kept.
#[derive(Debug, Clone, Default, Group)]
pub(crate) struct StateDirArgs {
    /// Keep the journal of a block device that is written in place there, so that the same command
    /// goes on after a cut; root: /var/lib/bitferry, others: $XDG_STATE_HOME/bitferry
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl StateDirArgs {
    /// The directory, if one was named.
    pub(crate) fn named(&self) -> Option<&Path> {
        self.state_dir.as_deref()
    }

    /// The directory that was named, or the usual one. `None` for somebody without a home.
    pub(crate) fn directory(&self) -> Option<PathBuf> {
        if self.state_dir.is_some() {
            return self.state_dir.clone();
        }
        if rustix::process::geteuid().is_root() {
            return Some(OF_ROOT.into());
        }
        let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|p| p.is_absolute());
        let state = absolute("XDG_STATE_HOME").or_else(|| Some(absolute("HOME")?.join(OF_OTHERS)));
        Some(state?.join("bitferry"))
    }
}
