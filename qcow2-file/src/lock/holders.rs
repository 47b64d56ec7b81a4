//! Who holds a lock: what `/proc` tells.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::ofd::Bytes;

/// Most processes that are named.
const MAX_HOLDERS: usize = 8;

/// The processes with an open-file-description lock on `bytes` of `file`, as "name (pid N)". Only
/// those that this process may look into; best effort, for an error message.
pub(super) fn of(file: &File, bytes: Bytes) -> Vec<String> {
    let Ok(wanted) = file.metadata().map(|m| (m.dev(), m.ino())) else { return Vec::new() };
    let Ok(processes) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|p| p.file_name().to_str()?.parse().ok());
    let mut pids: Vec<u32> = pids.collect();
    pids.sort_unstable();
    pids.into_iter()
        .filter(|pid| holds(*pid, wanted, bytes))
        .take(MAX_HOLDERS)
        .map(describe)
        .collect()
}

fn describe(pid: u32) -> String {
    if pid == std::process::id() {
        return format!("this process (pid {pid})");
    }
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name = name.trim_end();
    format!("{} (pid {pid})", if name.is_empty() { "a process" } else { name })
}

fn holds(pid: u32, wanted: (u64, u64), bytes: Bytes) -> bool {
    let base = format!("/proc/{pid}");
    let Ok(descriptors) = fs::read_dir(format!("{base}/fd")) else { return false };
    descriptors.flatten().any(|fd| {
        let is_same = fs::metadata(fd.path()).is_ok_and(|m| (m.dev(), m.ino()) == wanted);
        is_same && {
            let info = Path::new(&base).join("fdinfo").join(fd.file_name());
            fs::read_to_string(info).is_ok_and(|text| has_lock(&text, bytes))
        }
    })
}

/// Whether a `fdinfo` text lists an open-file-description lock that overlaps `bytes`: lines like
/// `lock: 1: OFDLCK ADVISORY READ -1 00:2a:57 100 101`.
fn has_lock(fdinfo: &str, bytes: Bytes) -> bool {
    let (first, last) = (u64::from(bytes.start), u64::from(bytes.start) + u64::from(bytes.len) - 1);
    fdinfo.lines().filter_map(|line| line.strip_prefix("lock:")).any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [.., start, end] = words.as_slice() else { return false };
        let end = if *end == "EOF" { Ok(u64::MAX) } else { end.parse() };
        let (Ok(start), Ok(end)) = (start.parse::<u64>(), end) else { return false };
        words.contains(&"OFDLCK") && start <= last && first <= end
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_lock_lines() {
        let text = "pos:\t0\nflags:\t02\nlock:\t1: OFDLCK  ADVISORY  READ -1 00:2a:57 100 101\n\
                    lock:\t2: POSIX  ADVISORY  WRITE 9 00:2a:57 300 EOF\n";
        let at = |start, len| has_lock(text, Bytes { start, len });
        assert!(at(100, 1) && at(90, 11) && at(101, 50));
        assert!(!at(99, 1) && !at(102, 1) && !at(300, 1));
        assert!(has_lock(
            "lock:\t1: OFDLCK ADVISORY WRITE -1 00:2a:57 0 EOF",
            Bytes { start: 5, len: 1 }
        ));
    }
}
