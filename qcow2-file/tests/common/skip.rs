//! Says that a test is skipped, past the test runner, which keeps what tests print to itself.

use std::io::Write;

/// Notes that the calling test is skipped, and why, on stderr and in the skip log.
pub(crate) fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let line = format!("qcow2-file::{test}: {reason}\n");
    let _ = std::io::stderr().write_all(format!("skipped: {line}").as_bytes());
    if let Some(log) = std::env::var_os("BITFERRY_SKIP_LOG") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(log).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}
