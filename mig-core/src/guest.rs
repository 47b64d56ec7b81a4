//! The guest, as the driver of a migration sees it.

/// What a device or guest answers when it cannot do what was asked.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// The guest whose disks and memory are migrated. Called by the one thread that drives the
/// migration; none of the methods is called twice in a row.
pub trait Guest: Send {
    /// Stops the guest: when this returns, no write to its disks or memory is in flight and none
    /// will start. An error leaves it running.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Lets the guest go on here: the migration failed or was called off before the handover.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Slows the guest down, which runs, so that it has this percentage less of its time; 0 lets it
    /// run freely again. Called as often as the level changes, and with 0 in the end whatever
    /// becomes of the migration. Nobody is slowed down who does not implement this.
    fn throttle(&mut self, _percent: u8) {}
}

/// No guest: what is migrated is at rest.
impl Guest for () {
    fn pause(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}
