//! A link that somebody cuts: TCP connections passed on to a destination, each up to a number of
//! bytes.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use format_spec::Writer;
use format_spec::native::control::Control;
use format_spec::native::frame::HEADER_BYTES;
use format_spec::qemu::container::{Section, SectionKind};
use mig_core::channels::CONTROL_ID;

/// How often a waiting thread looks whether it is over.
const TICK: Duration = Duration::from_millis(20);

/// When a connection is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Never.
    Never,
    /// When so many bytes have gone to the destination.
    Forth(u64),
    /// When so many bytes have come back from it.
    Back(u64),
    /// When the source has begun to say COMMIT, and so many bytes of that have gone.
    Commit(u64),
    /// Never, and nothing is passed on either: the source is let in and hears no more.
    Silence,
}

/// What stands between two sides. Dropping it cuts everything.
#[derive(Debug)]
pub struct Middle {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    cuts: Vec<Cut>,
    bytes: AtomicU64,
    bytes_back: AtomicU64,
    connections: AtomicUsize,
    is_over: AtomicBool,
}

impl Middle {
    /// Passes connections on to `to`. The n-th one has the n-th cut, those that follow are refused
    /// unless the last cut is [`Cut::Never`] or [`Cut::Silence`], which hold for all of them.
    pub fn start(to: SocketAddr, cuts: Vec<Cut>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("socket");
        let (bytes, bytes_back) = (AtomicU64::new(0), AtomicU64::new(0));
        let shared = Arc::new(Shared {
            to,
            cuts,
            bytes,
            bytes_back,
            connections: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
        });
        let passing = shared.clone();
        let thread = Some(std::thread::spawn(move || passing.accept(&listener)));
        Self { address, shared, thread }
    }

    /// Where a source connects, as QEMU writes it.
    pub fn uri(&self) -> String {
        format!("tcp:{}", self.address)
    }

    /// Bytes that went to the destination.
    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// Bytes that came back from it.
    pub fn bytes_back(&self) -> u64 {
        self.shared.bytes_back.load(Ordering::Relaxed)
    }

    /// Connections that were made.
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.shared.is_over.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn accept(&self, listener: &TcpListener) {
        std::thread::scope(|scope| {
            while !self.is_over.load(Ordering::Acquire) {
                let Ok((source, _)) = listener.accept() else {
                    std::thread::sleep(TICK);
                    continue;
                };
                let number = self.connections.fetch_add(1, Ordering::Relaxed);
                let stays = |cut: &&Cut| matches!(cut, Cut::Never | Cut::Silence);
                let last = self.cuts.last().filter(stays);
                let Some(cut) = self.cuts.get(number).or(last).copied() else { continue };
                let Ok(destination) = TcpStream::connect(self.to) else { continue };
                scope.spawn(move || self.pass(&source, &destination, cut));
            }
        });
    }

    /// Passes on what comes from either side until one of them ends, or the cut comes.
    fn pass(&self, source: &TcpStream, destination: &TcpStream, cut: Cut) {
        let (forth, commit, back) = match cut {
            Cut::Never => (u64::MAX, None, u64::MAX),
            Cut::Forth(limit) => (limit, None, u64::MAX),
            Cut::Back(limit) => (u64::MAX, None, limit),
            Cut::Commit(limit) => (u64::MAX, Some(limit), u64::MAX),
            Cut::Silence => return self.wait_for_the_end(),
        };
        std::thread::scope(|scope| {
            scope.spawn(|| self.copy((source, destination), (forth, commit), &self.bytes));
            self.copy((destination, source), (back, None), &self.bytes_back);
        });
    }

    fn wait_for_the_end(&self) {
        while !self.is_over.load(Ordering::Acquire) {
            std::thread::sleep(TICK);
        }
    }

    fn copy(
        &self,
        (mut from, mut to): (&TcpStream, &TcpStream),
        (limit, commit): (u64, Option<u64>),
        count: &AtomicU64,
    ) {
        from.set_nonblocking(false).expect("socket");
        from.set_read_timeout(Some(TICK)).expect("socket");
        let mut buf = vec![0; 256 << 10];
        let mut left = limit;
        let mut commit = commit.map(|limit| (commit_head(), limit));
        while left > 0 && !self.is_over.load(Ordering::Acquire) {
            let len = match from.read(&mut buf) {
                Ok(0) => {
                    // An orderly end in one direction.
                    let _ = to.shutdown(Shutdown::Write);
                    return;
                }
                Ok(len) => usize::try_from(left).unwrap_or(usize::MAX).min(len),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    continue;
                }
                Err(_) => break,
            };
            // It is written after the answer to PREPARE, so what is read then begins with it.
            if let Some((_, limit)) = commit.take_if(|(head, _)| buf[..len].starts_with(head)) {
                left = limit;
            }
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(len);
            if to.write_all(&buf[..len]).is_err() {
                break;
            }
            count.fetch_add(len as u64, Ordering::Relaxed);
            left -= len as u64;
        }
        for stream in [from, to] {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// How COMMIT begins on the wire: a part of the first section, the record in it.
fn commit_head() -> Vec<u8> {
    let mut part = Writer::new();
    Section { id: CONTROL_ID, kind: SectionKind::Part, name: None }.encode(&mut part);
    let mut bytes = part.into_bytes();
    let mut record = Vec::new();
    Control::Commit([0; 16]).encode(&mut record);
    bytes.extend(&record[..HEADER_BYTES]);
    bytes
}
