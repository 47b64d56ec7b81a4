//! Signals: Ctrl-C as a flag that long operations poll, what is said where somebody does not wait
//! for that, and a limit that is an error like others.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::exit;

/// The exit status of an interrupted command.
const INTERRUPTED: i32 = 130;
/// How long the last word may take: who reads it may have stopped reading.
const LAST_WORD: Duration = Duration::from_secs(1);

/// Whether somebody says, or has said, how it all ended.
static IS_SAID: AtomicBool = AtomicBool::new(false);

/// Whether the caller is to say how it ended, which is said once.
pub(crate) fn claim_last_word() -> bool {
    !IS_SAID.swap(true, Ordering::AcqRel)
}

/// From now on SIGINT, SIGTERM and SIGHUP set the flag. A second one ends the process as soon as
/// `last_word` is said, a third one at once.
pub(crate) fn watch(
    last_word: impl FnOnce() + Send + 'static,
) -> bitferry::Result<Arc<AtomicBool>> {
    let is_interrupted = Arc::new(AtomicBool::new(false));
    let is_ending = Arc::new(AtomicBool::new(false));
    let watched = [SIGINT, SIGTERM, SIGHUP];
    for signal in watched {
        let ending = Arc::clone(&is_ending);
        flag::register_conditional_shutdown(signal, INTERRUPTED, ending).map_err(failed)?;
    }
    let signals = Signals::new(watched).map_err(failed)?;
    let flag = Arc::clone(&is_interrupted);
    let wait = move || wait(signals, &flag, &is_ending, last_word);
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).map_err(failed)?;
    Ok(is_interrupted)
}

fn wait(
    mut signals: Signals,
    is_interrupted: &AtomicBool,
    is_ending: &AtomicBool,
    last_word: impl FnOnce() + Send + 'static,
) {
    let mut signals = signals.forever();
    if signals.next().is_none() {
        return;
    }
    is_interrupted.store(true, Ordering::Relaxed);
    if signals.next().is_none() {
        return;
    }
    is_ending.store(true, Ordering::Relaxed);
    let (told, is_told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        last_word();
        // Nobody waits any more where it took too long.
        let _ = told.send(());
    });
    let _ = is_told.recv_timeout(LAST_WORD);
    exit(INTERRUPTED);
}

/// From now on a file that grows beyond the process's limit (`ulimit -f`) is an error of the write,
/// with a name, and not the end without a word that SIGXFSZ is. What this process starts is spared:
/// a handler is not inherited.
pub(crate) fn outlive_file_size_limit() -> bitferry::Result<()> {
    flag::register(SIGXFSZ, Arc::default()).map(drop).map_err(failed)
}

fn failed(source: std::io::Error) -> bitferry::Error {
    bitferry::Error::File { action: "install", path: "signal handler".into(), source }
}
