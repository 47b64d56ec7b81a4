//! What QEMU says of the result, where it is installed.

use std::path::Path;
use std::process::{Command, Stdio};

use bitferry::{Error, Result};

use super::Output;

/// The verdict of `qemu-img`, as said by it; a line that says so where it is not installed. An
/// error where QEMU disagrees with us.
pub(super) fn verdict(source: &Path, copy: &Path, output: &Output) -> Result<String> {
    let check = Command::new("qemu-img").args(["check", "-q"]).arg(copy).status_of();
    let compare = Command::new("qemu-img").args(["compare", "-q"]).args([source, copy]).status_of();
    match (check, compare) {
        (Some(true), Some(true)) => Ok(format!(
            "QEMU says the same. qemu-img check: {}, qemu-img compare: {}\n",
            output.good("no errors"),
            output.good("identical"),
        )),
        (Some(_), Some(_)) => Err(Error::ProofMismatch {
            path: copy.to_owned(),
            reason: "qemu-img check or qemu-img compare disagrees".to_owned(),
        }),
        _ => Ok("qemu-img is not installed here; with it, QEMU's verdict would follow.\n".into()),
    }
}

trait StatusOf {
    /// Whether the command succeeded; `None` where it could not be started.
    fn status_of(&mut self) -> Option<bool>;
}

impl StatusOf for Command {
    fn status_of(&mut self) -> Option<bool> {
        self.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.status().ok().map(|status| status.success())
    }
}
