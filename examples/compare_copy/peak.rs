//! What a process took, and children that say so.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::Result;

/// Line by which a child tells its peak.
const MARK: &str = "peak-kib ";

/// What a run took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Taken {
    pub(crate) time: Duration,
    /// Largest resident memory in KiB, files mapped into it included; of our own children only.
    pub(crate) peak_kib: Option<u64>,
}

/// Runs a command to its end.
pub(crate) fn run(command: &mut Command) -> Result<Taken> {
    let begun = Instant::now();
    let output = command.stdin(Stdio::null()).output()?;
    let time = begun.elapsed();
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        return Err(format!("{command:?} failed: {text}").into());
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let peak_kib = text.lines().find_map(|l| l.strip_prefix(MARK)?.parse().ok());
    Ok(Taken { time, peak_kib })
}

/// Whether a peer is installed; says so where it is not.
pub(crate) fn is_here(program: &str) -> bool {
    let answer = Command::new(program).arg("--version").stdin(Stdio::null()).output();
    let is_here = answer.is_ok_and(|o| o.status.success());
    if !is_here {
        println!("{program} is not here: left out");
    }
    is_here
}

/// This program again, as a child.
pub(crate) fn child(arguments: &[&str], places: &[&Path]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("child").args(arguments).args(places);
    Ok(command)
}

/// Tells the parent how much memory this process has had.
pub(crate) fn tell() -> Result<()> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.split_whitespace().next()).ok_or("no VmHWM here")?;
    println!("{MARK}{kib}");
    Ok(())
}
