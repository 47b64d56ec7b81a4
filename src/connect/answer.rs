//! What a command at another host prints, as a whole: in bounded time and memory, and not for
//! somebody who does not want it any more.

use std::ffi::OsString;
use std::io::Read as _;
use std::time::{Duration, Instant};

use mig_core::heart::Heart;

use super::child::{Pipes, Running};
use super::error::{End, Error, Result};
use super::limits::{IDLE, MAX_ANSWER};
use super::ssh;

/// How often it is looked whether the user wants to stop.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Runs `bitferry` with `args` at another host, over ssh, and answers what it prints and its exit
/// status, which has to be 0 or one of `accepted`. It ends at once when `is_cancelled`, and does
/// not last longer than [`IDLE`].
pub fn run_ssh(
    destination: &str,
    args: &[OsString],
    accepted: &[u8],
    is_cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<(Vec<u8>, u8)> {
    let (command, name) = (ssh::command(destination, args), ssh::name(destination));
    let running = Running::default();
    let connection = running.start(command, name.clone(), Pipes::Both, IDLE)?;
    // It reads nothing.
    drop(connection.writer);
    let (mut said, line, begun) = (Vec::new(), connection.line, Instant::now());
    let over = Heart::new();
    let read = std::thread::scope(|scope| {
        let _stopping = over.stop_on_drop();
        scope.spawn(|| {
            over.run(LOOK_INTERVAL, || {
                if is_cancelled() || begun.elapsed() >= IDLE {
                    line.hang_up();
                }
            });
        });
        let mut limited = connection.reader.take(MAX_ANSWER.saturating_add(1));
        limited.read_to_end(&mut said)
    });
    if is_cancelled() {
        return Err(Error::HungUp);
    }
    if said.len() as u64 > MAX_ANSWER {
        return Err(Error::TooMuch { command: name, limit: MAX_ANSWER });
    }
    let failed = match read {
        Ok(_) => running.end(IDLE.saturating_sub(begun.elapsed())).err(),
        Err(error) => Some(match error.downcast::<Error>() {
            Ok(Error::HungUp) => Error::Idle { seconds: IDLE.as_secs() },
            Ok(error) => error,
            Err(source) => Error::System { action: "read what a command prints", source },
        }),
    };
    match failed {
        None => Ok((said, 0)),
        Some(Error::Ended { command, end: End::Status(status) }) => {
            let code = status.code().and_then(|code| u8::try_from(code).ok());
            match code.filter(|code| accepted.contains(code)) {
                Some(code) => Ok((said, code)),
                None => Err(Error::Ended { command, end: End::Status(status) }),
            }
        }
        Some(error) => Err(error),
    }
}
