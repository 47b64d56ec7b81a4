//! Signals: Ctrl-C as a flag that long operations poll, and a limit that is an error like others.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;

/// The exit status of an interrupted command.
const INTERRUPTED: i32 = 130;

/// From now on SIGINT, SIGTERM and SIGHUP set the flag; a second one ends the process at once.
pub(crate) fn watch() -> bitferry::Result<Arc<AtomicBool>> {
    let is_interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // The order makes the first signal only set the flag, which arms the shutdown.
        flag::register_conditional_shutdown(signal, INTERRUPTED, Arc::clone(&is_interrupted))
            .and_then(|_| flag::register(signal, Arc::clone(&is_interrupted)))
            .map_err(failed)?;
    }
    Ok(is_interrupted)
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
