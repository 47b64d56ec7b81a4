//! How far the migration is: what commands may come, and what they ask for. Pure.

use format_spec::qemu::command::Command;

use super::super::error::{Error, Result};

/// What a command asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaction {
    /// Nothing.
    None,
    /// A PONG with this value.
    Pong(u32),
    /// Leave to stop the guest, which a source with `switchover-ack` waits for.
    SwitchoverAck,
}

/// How far the migration is.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Course {
    /// Whether the source is known to take SWITCHOVER_ACK; an older QEMU fails of it.
    pub(super) takes_switchover_ack: bool,
    has_return_path: bool,
    is_advised: bool,
    is_listening: bool,
}

impl Course {
    /// Whether the source waits for answers.
    pub(super) fn has_return_path(&self) -> bool {
        self.has_return_path
    }

    /// Whether the guest runs at the destination, as far as the source knows. No VM description
    /// comes then.
    pub(super) fn is_postcopy(&self) -> bool {
        self.is_listening
    }

    /// Takes a command that stands at byte `at`.
    pub(super) fn command(&mut self, command: &Command<'_>, at: u64) -> Result<Reaction> {
        let protocol =
            |reason: &str| Err(Error::Protocol { offset: at, reason: reason.to_owned() });
        let unsupported =
            |reason: &str| Err(Error::Unsupported { offset: at, reason: reason.to_owned() });
        match command {
            // Whether the source waits for that the stream does not say.
            Command::OpenReturnPath if self.takes_switchover_ack && !self.has_return_path => {
                self.has_return_path = true;
                return Ok(Reaction::SwitchoverAck);
            }
            Command::OpenReturnPath => self.has_return_path = true,
            Command::Ping(_) if !self.has_return_path => {
                return protocol("PING without a return path");
            }
            Command::Ping(value) => return Ok(Reaction::Pong(*value)),
            Command::PostcopyAdvise(_) if self.is_advised => {
                return protocol("a second POSTCOPY_ADVISE");
            }
            // Bitmaps alone: nothing to be ready for.
            Command::PostcopyAdvise(None) => self.is_advised = true,
            Command::PostcopyAdvise(Some(_)) => {
                return unsupported(
                    "the source may go over to postcopy of RAM, and guest memory is not kept here; \
                     switch the capability postcopy-ram off at the source",
                );
            }
            Command::PostcopyListen | Command::PostcopyRun if !self.is_advised => {
                return protocol("postcopy begins without POSTCOPY_ADVISE");
            }
            Command::PostcopyListen => self.is_listening = true,
            Command::PostcopyRun if !self.is_listening => {
                return protocol("POSTCOPY_RUN before POSTCOPY_LISTEN");
            }
            Command::PostcopyRun | Command::SwitchoverStart | Command::Packaged(_) => {}
            Command::PostcopyRamDiscard { .. } => {
                return unsupported("postcopy of RAM, and guest memory is not kept here");
            }
            Command::EnableColo => {
                return unsupported("COLO; switch the capability x-colo off at the source");
            }
            Command::PostcopyResume | Command::RecvBitmap(_) => {
                return protocol("a postcopy is to be resumed that was not begun here");
            }
        }
        Ok(Reaction::None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(commands: &[Command<'_>]) -> Result<Vec<Reaction>> {
        let mut course = Course::default();
        commands.iter().map(|command| course.command(command, 7)).collect()
    }

    #[test]
    fn what_qemu_sends_is_taken() {
        let pings = take(&[Command::OpenReturnPath, Command::OpenReturnPath, Command::Ping(9)]);
        assert_eq!(pings.unwrap()[2], Reaction::Pong(9));
        let postcopy = [
            Command::PostcopyAdvise(None),
            Command::SwitchoverStart,
            Command::Packaged(5),
            Command::PostcopyListen,
            Command::PostcopyRun,
        ];
        assert!(take(&postcopy).is_ok());
    }

    #[test]
    fn who_takes_it_gets_leave_to_stop_its_guest_once() {
        let mut course = Course { takes_switchover_ack: true, ..Course::default() };
        for reaction in [Reaction::SwitchoverAck, Reaction::None] {
            assert_eq!(course.command(&Command::OpenReturnPath, 7).unwrap(), reaction);
        }
        assert!(course.has_return_path());
    }

    #[test]
    fn what_makes_no_sense_or_loses_memory_is_refused() {
        for commands in [
            &[Command::Ping(1)][..],
            &[Command::PostcopyAdvise(None), Command::PostcopyAdvise(None)],
            &[Command::PostcopyListen],
            &[Command::PostcopyAdvise(None), Command::PostcopyRun],
            &[Command::PostcopyResume],
            &[Command::RecvBitmap("m")],
        ] {
            let error = take(commands).unwrap_err();
            assert!(matches!(error, Error::Protocol { offset: 7, .. }), "{commands:?}: {error}");
        }
        let discard = Command::PostcopyRamDiscard { block: "m", ranges: &[[0; 16]] };
        for command in [Command::PostcopyAdvise(Some((4096, 4096))), discard, Command::EnableColo] {
            let error = take(std::slice::from_ref(&command)).unwrap_err();
            assert!(matches!(error, Error::Unsupported { .. }), "{command:?}: {error}");
        }
    }
}
