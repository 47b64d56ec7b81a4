//! Connections that are cut while the guest is paused for the handover, and made again.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use mig_core::guest::{Guest, GuestError};
use mig_core::transport::{Connection, Dial, HangUp, Nature};

use super::line::Line;
use super::machine::Machine;
use super::{NAME, patience};
use crate::live::Outgoing;
use crate::options::DiskOption;
use crate::outgoing::Outcome;
use crate::receive::{self, Arrivals, ReceiveOptions};
use crate::report::Status;
use crate::{Report, Silent};

/// Where the connection is cut, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    /// What the source writes.
    Forth,
    /// What it reads.
    Back,
}

/// Cuts the connection at a read or a write behind the first pause of the guest.
struct Scissors {
    side: Side,
    /// Reads or writes until then.
    left: AtomicI64,
    is_armed: AtomicBool,
    pauses: AtomicU32,
    resumes: AtomicU32,
}

impl Scissors {
    fn cut(&self, side: Side, line: &dyn HangUp) -> io::Result<()> {
        if side != self.side || !self.is_armed.load(Ordering::Acquire) {
            return Ok(());
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) != 0 {
            return Ok(());
        }
        line.hang_up();
        Err(io::ErrorKind::ConnectionReset.into())
    }
}

struct Ends<E> {
    end: E,
    line: Arc<dyn HangUp>,
    scissors: Arc<Scissors>,
}

impl Read for Ends<Box<dyn Read + Send>> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.end.read(buf)?;
        self.scissors.cut(Side::Back, &*self.line)?;
        Ok(len)
    }
}

impl Write for Ends<Box<dyn Write + Send>> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.scissors.cut(Side::Forth, &*self.line)?;
        self.end.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.end.flush()
    }
}

struct Fragile<'a>(&'a Line, Arc<Scissors>);

impl Dial for Fragile<'_> {
    fn nature(&self) -> Nature {
        Dial::nature(self.0)
    }

    fn dial(&self) -> io::Result<Connection> {
        let Connection { reader, writer, line, peer } = self.0.dial()?;
        let scissors = self.1.clone();
        let reader = Box::new(Ends { end: reader, line: line.clone(), scissors });
        let scissors = self.1.clone();
        let writer = Box::new(Ends { end: writer, line: line.clone(), scissors });
        Ok(Connection { reader, writer, line, peer })
    }
}

/// A guest whose first pause arms the scissors.
struct Arming(Arc<Scissors>);

impl Guest for Arming {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.0.pauses.fetch_add(1, Ordering::Relaxed);
        self.0.is_armed.store(true, Ordering::Release);
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.0.resumes.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// What was seen of one migration that was cut.
struct Seen {
    sent: crate::live::Report,
    received: Report,
    resumes: u32,
}

/// A migration that is cut there, with a destination that waits for its own session alone.
fn migrate(seed: u64, side: Side, left: i64) -> Seen {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target.qcow2");
    let (line, machine) = (Line::new(), Machine::new(seed));
    let scissors = Arc::new(Scissors {
        side,
        left: AtomicI64::new(left),
        is_armed: AtomicBool::new(false),
        pauses: AtomicU32::new(0),
        resumes: AtomicU32::new(0),
    });
    let disk =
        DiskOption { id: NAME.into(), path: target.clone(), format: None, is_readonly: false };
    let reconnect = Duration::from_secs(20);
    let options = ReceiveOptions { disks: vec![disk], reconnect, ..ReceiveOptions::default() };
    let (sent, received) = std::thread::scope(|scope| {
        machine.start(scope);
        let there = scope.spawn(|| {
            let (_tell, told) = channel();
            receive::run(&options, &Arrivals::new(&line, &Silent, told), &Silent)
        });
        let outgoing = Outgoing::builder()
            .disk(NAME, machine.disk.clone(), machine.bitmaps.clone())
            .reconnect(reconnect)
            .timing(patience())
            .build()
            .unwrap();
        let fragile = Fragile(&line, scissors.clone());
        let sent = outgoing.run(&fragile, &mut Arming(scissors.clone()));
        machine.stop();
        (sent, there.join().unwrap())
    });
    let what = format!("{side:?} {left}");
    let sent = sent.unwrap_or_else(|e| panic!("{what}: {e:?}, {received:?}"));
    let received = received.unwrap_or_else(|e| panic!("{what}: {e:?}"));
    machine.compare_image(&target);
    Seen { sent, received, resumes: scissors.resumes.load(Ordering::Relaxed) }
}

#[test]
fn a_cut_in_the_handover_is_made_good() {
    let mut kinds = [0; 3];
    for (side, most) in [(Side::Forth, 12), (Side::Back, 12)] {
        for left in 0..most {
            let Seen { sent, received, resumes } = migrate(900, side, left);
            let what = format!("{side:?} {left}: {sent:?}");
            assert!(
                matches!(sent.sent.outcome, Outcome::Completed | Outcome::AlreadyComplete),
                "{what}"
            );
            assert!(matches!(received.status, Status::Completed), "{what}: {received:?}");
            // Either the guest went on and was paused again, or it stayed paused throughout.
            let kind = match (sent.reconnects, resumes) {
                (0, 0) => 0,
                (_, 0) => 1,
                _ => 2,
            };
            kinds[kind] += 1;
        }
    }
    assert!(kinds.iter().all(|n| *n > 0), "{kinds:?}");
}
