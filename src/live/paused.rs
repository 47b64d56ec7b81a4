//! The guest with its disks and bitmaps: paused and resumed as one.

use std::time::Instant;

use mig_core::guest::{Guest, GuestError};

use super::builder::LiveDisk;
use crate::status::{Migration, Status};

/// What the driver pauses: the guest itself, then what is in flight of its disks, then backup jobs.
pub(super) struct Whole<'a> {
    pub(super) guest: &'a mut dyn Guest,
    pub(super) disks: &'a [LiveDisk],
    pub(super) migration: &'a Migration,
    /// Since when the guest is paused.
    pub(super) since: Option<Instant>,
}

impl Whole<'_> {
    /// The destination has taken over: nothing of it is ours any more.
    pub(super) fn retire(&self) {
        for disk in self.disks {
            disk.disk.retire();
            disk.bitmaps.retire();
        }
    }
}

impl Guest for Whole<'_> {
    /// Once: it is paused already where an earlier run has let go of it.
    fn pause(&mut self) -> Result<(), GuestError> {
        if self.since.is_some() {
            return Ok(());
        }
        let since = Instant::now();
        self.guest.pause()?;
        self.disks.iter().for_each(|disk| disk.disk.pause());
        // A job that is at work may need no guest to come to its end.
        self.disks.iter().for_each(|disk| disk.bitmaps.freeze());
        self.since = Some(since);
        self.migration.enter(Status::Device);
        Ok(())
    }

    fn throttle(&mut self, percent: u8) {
        if self.migration.throttle() != percent {
            self.migration.set_throttle(percent);
            self.guest.throttle(percent);
        }
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.since = None;
        for disk in self.disks {
            disk.bitmaps.thaw();
            disk.disk.resume();
        }
        self.guest.resume()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers how much it was slowed down.
    #[derive(Default)]
    struct Slow(Vec<u8>);

    impl Guest for Slow {
        fn pause(&mut self) -> Result<(), GuestError> {
            Ok(())
        }

        fn resume(&mut self) -> Result<(), GuestError> {
            Ok(())
        }

        fn throttle(&mut self, percent: u8) {
            self.0.push(percent);
        }
    }

    #[test]
    fn a_guest_hears_of_each_level_once_and_so_does_who_asks() {
        let (mut guest, migration) = (Slow::default(), Migration::default());
        let mut whole = Whole { guest: &mut guest, disks: &[], migration: &migration, since: None };
        whole.throttle(0);
        for percent in [20, 20, 99] {
            whole.throttle(percent);
            assert_eq!(migration.throttle(), percent);
        }
        whole.throttle(0);
        assert_eq!((guest.0, migration.throttle()), (vec![20, 99, 0], 0));
    }
}
