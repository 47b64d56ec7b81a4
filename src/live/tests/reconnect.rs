//! `--reconnect` on both sides: a link that is cut around the handover.

use std::io::{self, Read, Write};
use std::sync::atomic::AtomicUsize;
use std::sync::mpsc;

use format_spec::native::answer::{Answer, Ready};
use format_spec::native::control::Control;
use mig_core::guest::{Guest, GuestError};
use mig_core::transport::{Connection, Dial, HangUp, Nature};

use super::*;
use crate::options::DiskOption;
use crate::receive::{Arrivals, ReceiveOptions};
use crate::report;

const SESSION: [u8; 16] = [7; 16];

/// When the first connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    BeforePrepare,
    BehindPrepare,
    BehindReady,
    BeforeCommit,
    BehindCommit,
}

/// A way to the destination whose first connection is cut, and the next ones where `is_gone`.
struct Cutter<'a> {
    line: &'a Line,
    moment: Moment,
    dialled: AtomicUsize,
    is_gone: AtomicBool,
}

impl<'a> Cutter<'a> {
    fn new(line: &'a Line, moment: Moment) -> Self {
        let (dialled, is_gone) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { line, moment, dialled, is_gone }
    }
}

impl Dial for Cutter<'_> {
    fn nature(&self) -> Nature {
        Dial::nature(self.line)
    }

    fn dial(&self) -> io::Result<Connection> {
        let is_first = self.dialled.fetch_add(1, Ordering::Relaxed) == 0;
        if !is_first && self.is_gone.load(Ordering::Acquire) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let connection = self.line.dial()?;
        if !is_first {
            return Ok(connection);
        }
        let mut needle = Vec::new();
        match self.moment {
            Moment::BeforePrepare | Moment::BehindPrepare => {
                Control::Prepare(SESSION).encode(&mut needle);
            }
            Moment::BeforeCommit | Moment::BehindCommit => {
                Control::Commit(SESSION).encode(&mut needle);
            }
            Moment::BehindReady => {
                let (disks, bitmaps) = (Vec::new(), Vec::new());
                Answer::Ready(Ready { session: SESSION, disks, bitmaps }).encode(&mut needle);
                // Its kind; the length of what comes then is another.
                needle.truncate(2);
            }
        }
        let Connection { reader, writer, line, peer } = connection;
        let passes = matches!(self.moment, Moment::BehindPrepare | Moment::BehindCommit);
        let (reader, writer): (Box<dyn Read + Send>, Box<dyn Write + Send>) = match self.moment {
            Moment::BehindReady => {
                let is_prepared = mpsc::channel();
                let mut prepare = Vec::new();
                Control::Prepare(SESSION).encode(&mut prepare);
                let told =
                    Told { inner: writer, needle: prepare, tail: Vec::new(), tell: is_prepared.0 };
                (
                    Box::new(Hearing {
                        inner: reader,
                        line: line.clone(),
                        prepared: is_prepared.1,
                        is_over: false,
                    }),
                    Box::new(told),
                )
            }
            _ => (
                reader,
                Box::new(Cutting {
                    inner: writer,
                    line: line.clone(),
                    needle,
                    tail: Vec::new(),
                    passes,
                }),
            ),
        };
        Ok(Connection { reader, writer, line, peer })
    }
}

/// Whether `needle` ends within what was written now.
fn finds(tail: &mut Vec<u8>, bytes: &[u8], needle: &[u8]) -> bool {
    tail.extend(bytes);
    let found = tail.windows(needle.len()).any(|window| window == needle);
    let kept = tail.len().saturating_sub(needle.len() - 1);
    tail.drain(..kept);
    found
}

/// Cuts where a record is written: before it, or behind it.
struct Cutting {
    inner: Box<dyn Write + Send>,
    line: Arc<dyn HangUp>,
    needle: Vec<u8>,
    tail: Vec<u8>,
    passes: bool,
}

impl Write for Cutting {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if !finds(&mut self.tail, bytes, &self.needle) {
            self.inner.write_all(bytes)?;
            return Ok(bytes.len());
        }
        if self.passes {
            self.inner.write_all(bytes)?;
        }
        self.line.hang_up();
        if self.passes { Ok(bytes.len()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Tells that a record was written.
struct Told {
    inner: Box<dyn Write + Send>,
    needle: Vec<u8>,
    tail: Vec<u8>,
    tell: mpsc::Sender<()>,
}

impl Write for Told {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if finds(&mut self.tail, bytes, &self.needle) {
            let _ = self.tell.send(());
        }
        self.inner.write_all(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Cuts when the first answer behind PREPARE has come.
struct Hearing {
    inner: Box<dyn Read + Send>,
    line: Arc<dyn HangUp>,
    prepared: mpsc::Receiver<()>,
    is_over: bool,
}

impl Read for Hearing {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.is_over {
            return Ok(0);
        }
        let len = self.inner.read(buf)?;
        if self.prepared.try_recv().is_ok() {
            self.is_over = true;
            self.line.hang_up();
        }
        Ok(len)
    }
}

/// How often a guest was paused and resumed.
#[derive(Default)]
struct Counted {
    pauses: u32,
    resumes: u32,
}

impl Guest for Counted {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.pauses += 1;
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.resumes += 1;
        Ok(())
    }
}

fn receives(target: &std::path::Path) -> ReceiveOptions {
    let disk = DiskOption {
        id: NAME.to_owned(),
        path: target.to_owned(),
        format: Some(crate::copy::Format::Qcow2),
        is_readonly: false,
    };
    ReceiveOptions {
        disks: vec![disk],
        reconnect: Duration::from_secs(20),
        ..ReceiveOptions::default()
    }
}

fn outgoing(machine: &Machine, reconnect: Duration) -> Outgoing<'static> {
    Outgoing::builder()
        .disk(NAME, machine.disk.clone(), machine.bitmaps.clone())
        .migration(Arc::new(Migration::new(0, Duration::from_secs(5))))
        .session(SESSION)
        .reconnect(reconnect)
        .timing(patience())
        .build()
        .unwrap()
}

#[test]
fn a_cut_at_any_point_of_the_handover_is_made_good() {
    let moments = [
        Moment::BeforePrepare,
        Moment::BehindPrepare,
        Moment::BehindReady,
        Moment::BeforeCommit,
        Moment::BehindCommit,
    ];
    for (seed, moment) in (900..).zip(moments) {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target.qcow2");
        let (machine, line) = (Machine::new(seed), Line::new());
        let cutter = Cutter::new(&line, moment);
        let mut guest = Counted::default();
        let (result, received) = std::thread::scope(|scope| {
            machine.start(scope);
            let there = scope.spawn(|| {
                let refused = mpsc::channel().1;
                let arrivals = Arrivals::new(&line, &crate::Silent, refused);
                crate::receive::run(&receives(&target), &arrivals, &crate::Silent)
            });
            let result = outgoing(&machine, Duration::from_secs(20)).run(&cutter, &mut guest);
            machine.stop();
            (result, there.join().unwrap())
        });
        let report = result.unwrap_or_else(|error| panic!("{moment:?}: {error:?}"));
        assert!(matches!(report.sent.outcome, Outcome::Completed), "{moment:?}: {report:?}");
        assert_eq!(guest.pauses, guest.resumes + 1, "{moment:?}");
        // COMMIT had begun to be written: the guest stays paused until it is settled.
        let is_let_go = matches!(moment, Moment::BeforeCommit | Moment::BehindCommit);
        assert!(!is_let_go || guest.resumes == 0, "{moment:?}");
        let received = received.unwrap_or_else(|error| panic!("{moment:?}: {error:?}"));
        assert_eq!(received.status, report::Status::Completed, "{moment:?}");
        machine.compare_image(&target);
    }
}

#[test]
fn what_is_unknown_is_settled_by_the_same_command_and_the_guest_waits() {
    for (seed, moment) in (950..).zip([Moment::BeforeCommit, Moment::BehindCommit]) {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("target.qcow2");
        let (machine, line) = (Machine::new(seed), Line::new());
        let cutter = Cutter::new(&line, moment);
        cutter.is_gone.store(true, Ordering::Release);
        let mut guest = Counted::default();
        std::thread::scope(|scope| {
            machine.start(scope);
            let there = scope.spawn(|| {
                let refused = mpsc::channel().1;
                let arrivals = Arrivals::new(&line, &crate::Silent, refused);
                crate::receive::run(&receives(&target), &arrivals, &crate::Silent)
            });
            let outgoing = outgoing(&machine, Duration::ZERO);
            for _ in 0..2 {
                let report = outgoing.run(&cutter, &mut guest).unwrap();
                assert!(matches!(report.sent.outcome, Outcome::Unknown(_)), "{report:?}");
                assert_eq!((guest.pauses, guest.resumes), (1, 0), "{moment:?}");
                assert!(machine.disk.is_paused());
                assert_eq!(outgoing.migration.info().status, Status::Unknown);
            }
            cutter.is_gone.store(false, Ordering::Release);
            let report = outgoing.run(&cutter, &mut guest).unwrap();
            let is_done =
                matches!(report.sent.outcome, Outcome::Completed | Outcome::AlreadyComplete(_));
            assert!(is_done, "{moment:?}: {report:?}");
            assert_eq!(outgoing.migration.info().status, Status::Completed);
            assert_eq!((guest.pauses, guest.resumes), (1, 0), "{moment:?}");
            machine.stop();
            there.join().unwrap().unwrap();
        });
        machine.compare_image(&target);
    }
}
