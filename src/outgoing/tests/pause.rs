//! A guest that is paused goes on again whatever happens, unless the destination may have it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use format_spec::native::answer::Answer;
use format_spec::native::control::Control;
use mig_core::channels::Outlet;
use mig_core::section::{Pass, Pending, SectionKey, Stage};

use super::guest::{Paused, Peer, acknowledge, send_to};
use super::*;

/// Sends nothing, and does something in the final pass.
struct AtTheEnd<F: FnMut() -> Result<()> + Send>(F);

impl<F: FnMut() -> Result<()> + Send> SaveHandler for AtTheEnd<F> {
    fn section(&self) -> SectionKey {
        block_mig::save::SECTION
    }

    fn setup(&mut self, _out: &Outlet<'_>) -> Result<()> {
        Ok(())
    }

    fn iterate(&mut self, _out: &Outlet<'_>, _budget: u64) -> Result<Pass> {
        Ok(Pass::Done)
    }

    fn pending(&self) -> Pending {
        Pending::default()
    }

    fn complete(&mut self, _stage: Stage, _out: &Outlet<'_>) -> Result<()> {
        (self.0)()
    }

    fn expect(&self, _ready: &mut Ready) {}
}

/// One that only says that it lives when it is asked for `silent`, and is ready otherwise.
fn lively(control: &Control, silent: impl Fn(&Control) -> bool) -> Vec<Answer<'static>> {
    match control {
        control if silent(control) => vec![Answer::Keepalive; 3],
        Control::Prepare(session) => {
            let (session, disks, bitmaps) = (*session, Vec::new(), Vec::new());
            vec![Answer::Ready(Ready { session, disks, bitmaps })]
        }
        other => acknowledge(other),
    }
}

fn options() -> OutgoingOptions<'static> {
    let timing = Timing { linger: Duration::from_millis(100), ..timing() };
    let max_pause = Some(Duration::from_millis(500));
    OutgoingOptions { timing, max_pause, ..OutgoingOptions::new(SESSION, &Unwatched) }
}

fn migrate(
    on: &(dyn Fn(&Control) -> Vec<Answer<'static>> + Sync),
    guest: &mut Paused,
    at_the_end: impl FnMut() -> Result<()> + Send,
) -> Result<Sent> {
    let peer = Peer { state: SessionState::Fresh, first: &[], on };
    send_to(&peer, vec![Box::new(AtTheEnd(at_the_end))], guest, &options())
}

#[test]
fn who_only_says_that_it_lives_does_not_keep_the_guest() {
    let begun = Instant::now();
    let mut guest = Paused::default();
    let on = |control: &Control| lively(control, |c| matches!(c, Control::Prepare(_)));
    let error = migrate(&on, &mut guest, || Ok(())).unwrap_err();
    assert!(error.to_string().contains("has not answered"), "{error:?}");
    assert!(guest.resumed.is_some());
    // It may have it once it was told to commit.
    let mut guest = Paused::default();
    let on = |control: &Control| lively(control, |c| matches!(c, Control::Commit(_)));
    let sent = migrate(&on, &mut guest, || Ok(())).unwrap();
    assert!(matches!(sent.outcome, Outcome::Unknown(_)), "{sent:?}");
    assert!(guest.resumed.is_none());
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn a_panic_lets_the_guest_go_on() {
    let mut guest = Paused::default();
    let on = |control: &Control| lively(control, |_| false);
    let migrated =
        catch_unwind(AssertUnwindSafe(|| migrate(&on, &mut guest, || panic!("on purpose"))));
    assert!(migrated.is_err());
    assert!(guest.resumed.is_some());
}

#[test]
fn a_guest_that_cannot_go_on_is_told() {
    let mut guest = Paused { is_stuck: true, ..Paused::default() };
    let on = |control: &Control| lively(control, |_| false);
    let failing = || Err(Error::handler(format_spec::Blame::Device, "bad sector"));
    let error = migrate(&on, &mut guest, failing).unwrap_err().to_string();
    assert!(error.contains("bad sector") && error.contains("no power"), "{error}");
}
