//! Faults in the system calls of `bitferry`, injected by `strace`.
//!
//! `strace` counts calls by their name and by thread: a fault "in the n-th write, sync or rename"
//! is one in the n-th of whichever of them comes first that often, and never in one that is made
//! once. So one name at a time gets a fault.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use crate::bitferry::binary;
use crate::process::{Output, Run};
use crate::random::{Random, seed};
use crate::{Peer, Scratch};

/// What changes a file or makes it last.
pub const CHANGES: &[&str] = &[
    "pwrite64",
    "pwritev",
    "pwritev2",
    "write",
    "writev",
    "fallocate",
    "ftruncate",
    "copy_file_range",
    "fsync",
    "fdatasync",
    "sync_file_range",
    "rename",
    "renameat",
    "renameat2",
    "linkat",
    "unlink",
    "unlinkat",
];

/// `bitferry` with a fault in these system calls (names with commas), in strace's words.
pub fn with_fault(arguments: &[&str], calls: &str, fault: &str) -> Run {
    let run = strace(Path::new("/dev/null"), calls);
    run.arg("-e").arg(format!("inject={calls}:{fault}")).arg(binary()).args(arguments)
}

fn strace(log: &Path, calls: &str) -> Run {
    let strace = Peer::Strace.find().expect("asked for");
    let run = Run::new(strace).args(["-f", "-qqq", "-o"]).arg(log);
    run.arg("-e").arg(format!("trace={calls}")).patience(Duration::from_secs(120))
}

/// Whether the fault was a kill, and came.
pub fn is_killed(output: &Output) -> bool {
    // strace dies of the signal that killed its child.
    use std::os::unix::process::ExitStatusExt;
    output.status.signal() == Some(9) || output.code() == Some(137)
}

/// How often each of these calls is made by the thread that makes most of them, in one run that is
/// not disturbed and succeeds.
#[track_caller]
pub fn count(arguments: &[&str], calls: &[&'static str]) -> BTreeMap<&'static str, usize> {
    let scratch = Scratch::new();
    let log = scratch.path("strace");
    strace(&log, &calls.join(",")).arg(binary()).args(arguments).ok();
    let log = std::fs::read_to_string(log).expect("a log");
    let mut threads: BTreeMap<(&str, &'static str), usize> = BTreeMap::new();
    for line in log.lines() {
        let Some((thread, rest)) = line.split_once(' ') else { continue };
        let name = rest.trim_start().split('(').next().unwrap_or_default();
        if let Some(call) = calls.iter().find(|call| **call == name) {
            *threads.entry((thread, call)).or_default() += 1;
        }
    }
    let mut most = BTreeMap::new();
    for ((_, call), times) in threads {
        let known: &mut usize = most.entry(call).or_default();
        *known = times.max(*known);
    }
    most
}

/// Runs the command again and again, killed at one system call each time: at the first and the last
/// of each kind, and at as many others as `most` of a kind allows, by the seed. `prepare` comes
/// before each run, `judge` behind it. Panics unless a kill came at each kind that is made.
#[track_caller]
pub fn kill_at_each_change(
    arguments: &[&str],
    most: usize,
    mut prepare: impl FnMut(),
    mut judge: impl FnMut(&Output),
) {
    prepare();
    let made = count(arguments, CHANGES);
    let mut random = Random::new(seed(), &arguments.join(" "));
    for (call, times) in made {
        let mut kills = 0;
        for number in sample(times, most, &mut random) {
            prepare();
            let fault = format!("signal=SIGKILL:when={number}");
            let output = with_fault(arguments, call, &fault).output();
            // Threads share their work otherwise each time: one may make fewer calls now.
            kills += usize::from(is_killed(&output));
            assert!(is_killed(&output) || output.status.success(), "{output}");
            judge(&output);
        }
        assert!(kills > 0, "no {call} was hit: {arguments:?}");
    }
}

/// At most so many of the numbers from 1 to `count`, the first and the last one among them.
fn sample(count: usize, most: usize, random: &mut Random) -> Vec<usize> {
    let mut left: Vec<usize> = (2..count).collect();
    while left.len() + 2 > most.max(2) {
        let index = usize::try_from(random.below(left.len() as u64)).expect("an index");
        left.swap_remove(index);
    }
    left.extend([1, count]);
    left.sort_unstable();
    left.dedup();
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_the_first_and_the_last() {
        let mut random = Random::new(1, "sample");
        assert_eq!(sample(1, 5, &mut random), [1]);
        assert_eq!(sample(2, 1, &mut random), [1, 2]);
        assert_eq!(sample(5, 5, &mut random), [1, 2, 3, 4, 5]);
        let some = sample(100, 5, &mut random);
        assert_eq!((some.len(), some[0], some[4]), (5, 1, 100));
    }
}
