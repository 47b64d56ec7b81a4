//! The source's connections: lanes on which records of any section go out (SPEC 4.2 and 8).

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use format_spec::native::control::{self, Control};
use format_spec::native::frame;
use format_spec::qemu::container::{self, Section, SectionKind, SectionName};

use crate::meter::Meter;
use crate::section::SectionKey;
use crate::stream::{Breaker, Compression, Result, StreamWriter};

/// Number of the section `bitferry`, fixed since data channels refer to it before anything ordered
/// them behind main.
pub const CONTROL_ID: u32 = 1;

/// All connections of a session at the source. Lane 0 is main. Any thread may write to any lane; a
/// record is never torn by another.
pub struct Channels {
    lanes: Vec<Lane>,
    meter: Arc<Meter>,
    breaker: Arc<Breaker>,
    /// Where the search for a free lane begins.
    next: AtomicUsize,
    is_unmetered: AtomicBool,
}

struct Lane {
    state: Mutex<LaneState>,
    /// Bytes that were handed to the system.
    written: Arc<AtomicU64>,
    /// The same when life was last looked for.
    seen: AtomicU64,
}

struct LaneState {
    writer: StreamWriter,
    /// The section whose body is open.
    open: Option<u32>,
}

impl Channels {
    /// Main, then the data channels, hellos and JOINs said.
    pub fn new(writers: Vec<StreamWriter>, meter: Arc<Meter>, breaker: Arc<Breaker>) -> Self {
        let lane = |writer: StreamWriter| Lane {
            written: writer.written(),
            seen: AtomicU64::new(0),
            state: Mutex::new(LaneState { writer, open: None }),
        };
        let lanes = writers.into_iter().map(lane).collect();
        let (next, is_unmetered) = (AtomicUsize::new(0), AtomicBool::new(false));
        Self { lanes, meter, breaker, next, is_unmetered }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.lanes.len()
    }

    /// Bytes handed to the system on all of them.
    pub fn written(&self) -> u64 {
        let written = |lane: &Lane| lane.written.load(Ordering::Relaxed);
        self.lanes.iter().map(written).fold(0, u64::saturating_add)
    }

    /// Waits until so many bytes may be sent on all of them together.
    pub fn spend(&self, bytes: u64) {
        let is_free = || self.breaker.is_broken() || self.is_unmetered.load(Ordering::Acquire);
        self.meter.spend(bytes, &is_free);
    }

    /// Nobody waits for bandwidth any more: the migration is about to stop.
    pub fn unmeter(&self) {
        self.is_unmetered.store(true, Ordering::Release);
    }

    /// Content is compressed from now on, on all lanes.
    pub fn compress(&self, compression: Compression) -> Result<()> {
        self.lanes.iter().try_for_each(|lane| lane.lock().writer.compress(compression))
    }

    /// Writes magic and version of the container on main.
    pub fn start(&self) -> Result<()> {
        self.main(|main| main.writer.element(container::encode_start))
    }

    /// Starts section `id` on main; what is written to it next belongs to its first part.
    pub fn start_section(&self, id: u32, key: SectionKey) -> Result<()> {
        self.main(|main| {
            main.close()?;
            let SectionKey { name, instance, version } = key;
            let name = Some(SectionName { name, instance, version });
            main.begin(Section { id, kind: SectionKind::Start, name })
        })
    }

    /// Writes BARRIER on every lane and flushes them. Nobody else may write meanwhile. Only for
    /// whoever drives the migration.
    pub fn barrier(&self, number: u64, is_durable: bool) -> Result<()> {
        for lane in &self.lanes {
            lane.lock().control(&Control::Barrier { number, is_durable })?;
        }
        Ok(())
    }

    /// Writes a record of the section that drives the others, on main, at once.
    pub fn control(&self, control: &Control) -> Result<()> {
        self.main(|main| main.control(control))
    }

    /// Says on lanes where nothing has passed since the last call that this side is still there. A
    /// lane that somebody writes to right now needs no such word.
    pub fn keepalive(&self) -> Result<()> {
        for lane in &self.lanes {
            let written = lane.written.load(Ordering::Relaxed);
            if lane.seen.swap(written, Ordering::Relaxed) != written {
                continue;
            }
            if let Some(mut state) = lane.try_lock() {
                state.control(&Control::Keepalive)?;
                lane.seen.store(lane.written.load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Ends the sections on main and all lanes.
    pub fn finish(&self, sections: &[u32]) -> Result<()> {
        self.main(|main| {
            main.close()?;
            for id in sections {
                main.begin(Section { id: *id, kind: SectionKind::End, name: None })?;
                main.close()?;
            }
            Ok(())
        })?;
        for lane in &self.lanes {
            let mut state = lane.lock();
            state.close()?;
            state.writer.element(|out| container::Element::Eof.encode(out))?;
            state.writer.flush()?;
        }
        Ok(())
    }

    /// Takes main for a last word. Nothing was written when this fails, and nothing but the system
    /// can keep the word back when it does not.
    pub fn hold_main(&self) -> Result<Main<'_>> {
        let lane = self.lanes.first().ok_or(crate::stream::Error::Ended)?;
        let main = lane.lock();
        self.breaker_check()?;
        Ok(Main(main))
    }

    fn main<T>(&self, write: impl FnOnce(&mut LaneState) -> Result<T>) -> Result<T> {
        write(&mut self.hold_main()?.0)
    }

    fn breaker_check(&self) -> Result<()> {
        self.breaker.check()
    }

    /// A lane that nobody writes to, or else one that is free soon.
    fn any(&self) -> Option<MutexGuard<'_, LaneState>> {
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        let lane = |n: usize| self.lanes.get(first.wrapping_add(n) % self.lanes.len().max(1));
        let free = (0..self.lanes.len()).find_map(|n| lane(n)?.try_lock());
        free.or_else(|| Some(lane(0)?.lock()))
    }
}

/// The first lane, held: nobody else writes to it.
pub struct Main<'c>(MutexGuard<'c, LaneState>);

impl Main<'_> {
    /// Writes a record of the section that drives the others, at once.
    pub fn control(mut self, control: &Control) -> Result<()> {
        self.0.control(control)
    }
}

impl std::fmt::Debug for Main<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Main")
    }
}

impl std::fmt::Debug for Channels {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channels").field("lanes", &self.lanes.len()).finish_non_exhaustive()
    }
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, LaneState>> {
        match self.state.try_lock() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl LaneState {
    fn begin(&mut self, section: Section<'_>) -> Result<()> {
        self.writer.element(|out| section.encode(out))?;
        self.open = Some(section.id);
        Ok(())
    }

    /// Makes sure that a part of section `id` is open.
    fn enter(&mut self, id: u32) -> Result<()> {
        if self.open == Some(id) {
            return Ok(());
        }
        self.close()?;
        self.begin(Section { id, kind: SectionKind::Part, name: None })
    }

    /// Ends the part that is open.
    fn close(&mut self) -> Result<()> {
        let Some(id) = self.open.take() else { return Ok(()) };
        self.writer.record(frame::encode_end)?;
        self.writer.element(|out| container::encode_footer(id, out))
    }

    fn control(&mut self, control: &Control) -> Result<()> {
        self.enter(CONTROL_ID)?;
        self.writer.record(|out| control.encode(out))?;
        self.close()?;
        self.writer.flush()
    }
}

/// Where a handler's records go: one section, any lane.
#[derive(Debug, Clone, Copy)]
pub struct Outlet<'c> {
    channels: &'c Channels,
    id: u32,
}

impl<'c> Outlet<'c> {
    /// The outlet of section `id`.
    pub fn new(channels: &'c Channels, id: u32) -> Self {
        Self { channels, id }
    }

    /// All connections.
    pub fn channels(&self) -> &'c Channels {
        self.channels
    }

    /// Writes a record on main, where everything goes that introduces, changes or seals.
    pub fn record(&self, encode: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        self.channels.main(|main| {
            main.enter(self.id)?;
            main.writer.record(encode)
        })
    }

    /// Writes a record whose body is `head` and `content` on any lane, compressed if that was
    /// chosen, as soon as the bandwidth allows it.
    pub fn content(&self, kind: u16, head: &[u8], content: &[u8]) -> Result<()> {
        let len = head.len().saturating_add(content.len()) as u64;
        self.channels.spend(len);
        self.channels.breaker_check()?;
        let Some(mut lane) = self.channels.any() else {
            return Err(crate::stream::Error::Ended);
        };
        lane.enter(self.id)?;
        lane.writer.content(kind, head, content)
    }

    /// Hands everything that was written to the system.
    pub fn flush(&self) -> Result<()> {
        self.channels.lanes.iter().try_for_each(|lane| lane.lock().writer.flush())
    }
}

/// The key of the section that drives the others.
pub const CONTROL: SectionKey =
    SectionKey { name: control::SECTION, instance: 0, version: control::SECTION_VERSION };
