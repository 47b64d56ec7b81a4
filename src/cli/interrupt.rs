//! Ctrl-C as a flag that long operations poll.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
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
            .map_err(|source| bitferry::Error::File {
                action: "install",
                path: "signal handler".into(),
                source,
            })?;
    }
    Ok(is_interrupted)
}
