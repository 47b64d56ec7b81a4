//! QEMU's tools, with the rules for absent ones that `tests/src/peer.rs` describes.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where a tool is; without it the test is skipped aloud, or fails where tools are demanded.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).map(|dir| dir.join(name)).find(|p| p.is_file());
    if found.is_none() {
        let test = std::thread::current().name().unwrap_or("unnamed").to_owned();
        let is_demanded = std::env::var_os("BITFERRY_DEMAND_PEERS").is_some_and(|v| v == "1");
        assert!(!is_demanded, "{test}: {name} is not here, and peers are demanded");
        let line = format!("new_image::{test}: {name} is not here\n");
        let _ = std::io::stderr().write_all(format!("skipped: {line}").as_bytes());
        if let Some(log) = std::env::var_os("BITFERRY_SKIP_LOG") {
            let file = std::fs::OpenOptions::new().append(true).create(true).open(&log);
            file.and_then(|mut f| f.write_all(line.as_bytes())).unwrap();
        }
    }
    found
}

/// Runs a tool in `dir`, which must succeed within a minute, and answers with what it printed.
pub fn run(dir: &Path, line: &str) -> String {
    run_args(dir, &line.split_whitespace().collect::<Vec<_>>())
}

/// [`run`] with arguments that may hold spaces.
pub fn run_args(dir: &Path, args: &[&str]) -> String {
    let mut command = Command::new("timeout");
    command.arg("60").args(args).current_dir(dir).stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {}\n{text}{complaint}", output.status);
    text
}

/// A directory for one test's files, on a tmpfs where there is one: syncing what is thrown away
/// would be most of the time. `BITFERRY_SCRATCH` names another place.
pub fn scratch() -> tempfile::TempDir {
    let usual = || {
        let shared = PathBuf::from("/dev/shm");
        if shared.is_dir() { shared } else { std::env::temp_dir() }
    };
    let place = std::env::var_os("BITFERRY_SCRATCH").map_or_else(usual, PathBuf::from);
    tempfile::Builder::new().prefix("bft-").tempdir_in(place).unwrap()
}
