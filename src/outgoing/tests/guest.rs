//! A guest that writes at the worst moment, and destinations that stall.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use format_spec::native::answer::Answer;
use format_spec::native::control::Control;
use format_spec::native::hello::{Choice, Hello};
use format_spec::native::units::{UnitNodes, ZeroUnits};
use mig_core::channels::Outlet;
use mig_core::dirty::DirtySet;
use mig_core::section::{Pass, Pending, SectionKey, Stage, Start};
use mig_core::stream::{Element, StreamReader};

use super::*;

/// Sends nothing; does something when the handlers before it have learnt what the destination has.
struct Meddler<F: FnMut() + Send>(F);

impl<F: FnMut() + Send> SaveHandler for Meddler<F> {
    fn section(&self) -> SectionKey {
        block_mig::save::SECTION
    }

    fn setup(&mut self, _out: &Outlet<'_>) -> Result<()> {
        Ok(())
    }

    fn begin(&mut self, _start: &mut Start<'_>, _out: &Outlet<'_>) -> Result<()> {
        (self.0)();
        Ok(())
    }

    fn iterate(&mut self, _out: &Outlet<'_>, _budget: u64) -> Result<Pass> {
        Ok(Pass::Done)
    }

    fn pending(&self) -> Pending {
        Pending::default()
    }

    fn complete(&mut self, _stage: Stage, _out: &Outlet<'_>) -> Result<()> {
        Ok(())
    }

    fn expect(&self, _ready: &mut Ready) {}
}

/// A shelf that has all units of `bytes` from an earlier attempt.
fn shelf_with(bytes: &[u8]) -> Arc<Shelf> {
    let place = ShelfPlace {
        disk: MemoryDisk::new(bytes.to_vec()),
        arrived: Mutex::new(vec![true; bytes.len().div_ceil(1 << 20)]),
        ..ShelfPlace::default()
    };
    let shelf = Arc::new(Shelf::default());
    shelf.0.lock().unwrap().places.insert("vda".to_owned(), Arc::new(place));
    shelf
}

#[test]
fn what_a_guest_changes_between_comparing_and_sending_is_sent() {
    let size = 4 << 20;
    for hashes in [true, false] {
        // The destination has data and zeroes, both equal to what the source has when it is asked.
        let disk = MemoryDisk::new(pattern(size, &[(0, 3 << 20, 1)]));
        let shelf = shelf_with(&disk.bytes());
        let dirty = Arc::new(DirtySet::new(size as u64, 16));
        let saved = SaveDisk {
            id: DiskId(0),
            name: "vda".to_owned(),
            source: &disk,
            dirty: Some(dirty.clone()),
        };
        let options = SaveOptions { hashes, workers: 2, monitor: &Unwatched };
        let blocks = SaveBlocks::new(vec![saved], options).unwrap();
        let meddler = Meddler(|| {
            disk.write_zeroes(UNIT, UNIT).unwrap();
            dirty.mark(UNIT..2 * UNIT);
            disk.write_at(&[7; 512], 3 * UNIT + 4096).unwrap();
            dirty.mark(3 * UNIT + 4096..3 * UNIT + 4608);
        });
        let net = Net::new(None);
        let sent = std::thread::scope(|scope| {
            scope.spawn(|| {
                let main = net.accept(None).unwrap();
                let options =
                    IncomingOptions { timing: timing(), ..IncomingOptions::new(&Unwatched) };
                receive(main, &net, shelf.clone(), Registry::new(), &options)
            });
            let options =
                OutgoingOptions { timing: timing(), ..OutgoingOptions::new(SESSION, &Unwatched) };
            let handlers: Vec<Box<dyn SaveHandler + '_>> =
                vec![Box::new(blocks), Box::new(meddler)];
            send(&net, handlers, &mut (), &mut AtRest, &options)
        });
        let there = shelf.0.lock().unwrap().places["vda"].disk.bytes();
        let differs = disk.bytes().iter().zip(&there).position(|(a, b)| a != b);
        assert_eq!(differs, None, "hashes: {hashes}, {sent:?}");
        assert!(matches!(sent.unwrap().outcome, Outcome::Completed));
    }
}

/// What a destination that we play says first, and when it was told to do something.
pub(super) struct Peer<'a> {
    pub(super) state: SessionState,
    pub(super) first: &'a [Answer<'a>],
    pub(super) on: &'a (dyn Fn(&Control) -> Vec<Answer<'static>> + Sync),
}

impl Peer<'_> {
    /// Plays until the source closes.
    fn play(&self, net: &Net) {
        let main = net.accept(None).unwrap();
        let (mut reader, mut writer) = (StreamReader::new(main.reader, 0), main.writer);
        let Hello::Offer(offer) = reader.hello().unwrap() else { panic!() };
        let choice = Choice {
            session: offer.session,
            ticket: [0; 16],
            state: self.state,
            features: 0,
            channels: 1,
            program: "played".to_owned(),
        };
        writer.write_all(&Hello::Choice(choice).encode()).unwrap();
        let mut say = |answers: &[Answer<'_>]| {
            let mut bytes = Vec::new();
            answers.iter().for_each(|answer| answer.encode(&mut bytes));
            let _ = writer.write_all(&bytes);
        };
        say(self.first);
        let mut listen = || -> Result<()> {
            reader.start()?;
            loop {
                let id = match reader.element()? {
                    Element::Eof => return Ok(()),
                    Element::Start { id, .. } | Element::Part(id) | Element::End(id) => id,
                };
                let buffers = stream::Buffers::new(1);
                loop {
                    let arrival = reader.record(&buffers)?;
                    if arrival.header.is_end() {
                        break;
                    }
                    let Ok(Some(control)) = Control::decode(&arrival.record()) else { continue };
                    if id == 1 {
                        say(&(self.on)(&control));
                    }
                }
                reader.footer(id)?;
            }
        };
        drop(listen());
    }
}

pub(super) fn acknowledge(control: &Control) -> Vec<Answer<'static>> {
    match control {
        Control::Barrier { number, .. } => vec![Answer::Ack(*number)],
        _ => Vec::new(),
    }
}

/// A guest that says when it was paused and resumed.
#[derive(Default)]
pub(super) struct Paused {
    pub(super) at_pause: Option<Arc<dyn Fn() + Send + Sync>>,
    pub(super) resumed: Option<Instant>,
    /// Whether it cannot be resumed.
    pub(super) is_stuck: bool,
    pub(super) pauses: u32,
}

impl mig_core::guest::Guest for Paused {
    fn pause(&mut self) -> std::result::Result<(), mig_core::guest::GuestError> {
        self.pauses += 1;
        self.at_pause.iter().for_each(|at_pause| at_pause());
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<(), mig_core::guest::GuestError> {
        self.resumed = Some(Instant::now());
        if self.is_stuck { Err("no power".into()) } else { Ok(()) }
    }
}

pub(super) fn send_to(
    peer: &Peer<'_>,
    handlers: Vec<Box<dyn SaveHandler + '_>>,
    guest: &mut Paused,
    options: &OutgoingOptions<'_>,
) -> Result<Sent> {
    let net = Net::new(None);
    std::thread::scope(|scope| {
        scope.spawn(|| peer.play(&net));
        send(&net, handlers, guest, &mut AtRest, options)
    })
}

/// Waits a moment before it says what it expects: what the destination says next is read by then.
struct Slow;

impl SaveHandler for Slow {
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
        Ok(())
    }

    fn expect(&self, _ready: &mut Ready) {
        std::thread::sleep(Duration::from_millis(300));
    }
}

#[test]
fn a_destination_that_fails_before_commit_leaves_the_guest_running() {
    let on = |control: &Control| match control {
        Control::Prepare(session) => {
            let ready = Ready { session: *session, disks: Vec::new(), bitmaps: Vec::new() };
            let (blame, text) = (format_spec::Blame::Device, "no space".to_owned());
            vec![Answer::Ready(ready), Answer::Failed { blame, offset: None, text }]
        }
        other => acknowledge(other),
    };
    let peer = Peer { state: SessionState::Fresh, first: &[], on: &on };
    let mut guest = Paused::default();
    let options = OutgoingOptions { timing: timing(), ..OutgoingOptions::new(SESSION, &Unwatched) };
    let error = send_to(&peer, vec![Box::new(Slow)], &mut guest, &options).unwrap_err();
    assert!(error.to_string().contains("no space"), "{error:?}");
    assert!(guest.resumed.is_some());
}

#[test]
fn a_guest_is_not_kept_waiting_for_farewells() {
    #[derive(Default)]
    struct Stop(AtomicBool);
    impl block_mig::Monitor for Stop {
        fn is_cancelled(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }
    let stop = Arc::new(Stop::default());
    let at_pause = stop.clone();
    let mut guest = Paused {
        at_pause: Some(Arc::new(move || at_pause.0.store(true, Ordering::Relaxed))),
        ..Paused::default()
    };
    // It does not close when it is told that all is off.
    let peer = Peer { state: SessionState::Fresh, first: &[], on: &acknowledge };
    let timing = Timing { linger: Duration::from_millis(1500), ..timing() };
    let options = OutgoingOptions { timing, ..OutgoingOptions::new(SESSION, &*stop) };
    let error = send_to(&peer, vec![Box::new(Slow)], &mut guest, &options).unwrap_err();
    assert!(matches!(error, Error::Interrupted), "{error:?}");
    let resumed = guest.resumed.unwrap();
    assert!(resumed.elapsed() > Duration::from_millis(1000), "{:?}", resumed.elapsed());
}

#[test]
fn a_destination_that_tells_without_end_is_refused() {
    let disk = MemoryDisk::new(vec![1; 2 << 20]);
    let blocks = |disk| {
        let (id, name) = (DiskId(0), "vda".to_owned());
        let options = SaveOptions { hashes: true, workers: 1, monitor: &Unwatched };
        SaveBlocks::new(vec![SaveDisk { id, name, source: disk, dirty: None }], options).unwrap()
    };
    let timing = Timing { linger: Duration::from_millis(100), ..timing() };
    let options = OutgoingOptions { timing, ..OutgoingOptions::new(SESSION, &Unwatched) };
    let (disk_id, node) = (DiskId(0), [[3; 32]]);
    let unit = |first| Answer::Have(disk_id, UnitNodes { first, nodes: &node });
    let zeroes = |first, count| Answer::HaveZeroes(disk_id, ZeroUnits { first, count });
    let more: Vec<_> = std::iter::once(Answer::HaveDone(disk_id))
        .chain((0..400).map(|_| Answer::HaveDone(disk_id)))
        .collect();
    let begun = Instant::now();
    for (first, reason) in [
        (vec![unit(1), unit(0)], "behind"),
        (vec![unit(1), unit(1)], "behind"),
        (vec![unit(2)], "which has 2"),
        (vec![zeroes(0, 3)], "which has 2"),
        (vec![unit(0), zeroes(1, 2)], "which has 2"),
        (more, "more of what it has"),
    ] {
        let peer = Peer { state: SessionState::Resumable, first: &first, on: &acknowledge };
        let handlers: Vec<Box<dyn SaveHandler + '_>> = vec![Box::new(blocks(&disk))];
        let error = send_to(&peer, handlers, &mut Paused::default(), &options).unwrap_err();
        let said = crate::report::error_chain(&error);
        assert!(said.contains(reason) || said.contains("nobody asked"), "{said}");
    }
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[test]
fn a_failure_here_ends_all_though_more_is_told_than_is_heard() {
    /// A disk that cannot be read.
    struct Broken;
    impl BlockSource for Broken {
        fn size(&self) -> u64 {
            400 << 20
        }
        fn extent(&self, _offset: u64, max_len: u64) -> mig_core::Result<Extent> {
            Ok(Extent { len: max_len, kind: ExtentKind::Data, host: None })
        }
        fn read_at(&self, _buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
            let (blame, source) = (format_spec::Blame::Device, "bad sector".into());
            Err(mig_core::Error::Device { operation: "read", offset, blame, source })
        }
    }
    let (id, name, node) = (DiskId(0), "vda".to_owned(), [[3; 32]]);
    let options = SaveOptions { hashes: true, workers: 1, monitor: &Unwatched };
    let disk = SaveDisk { id, name, source: &Broken, dirty: None };
    let blocks = SaveBlocks::new(vec![disk], options).unwrap();
    let first: Vec<_> =
        (0..400).map(|first| Answer::Have(id, UnitNodes { first, nodes: &node })).collect();
    let peer = Peer { state: SessionState::Resumable, first: &first, on: &acknowledge };
    let timing = Timing { linger: Duration::from_millis(200), ..timing() };
    let options = OutgoingOptions { timing, ..OutgoingOptions::new(SESSION, &Unwatched) };
    let error = send_to(&peer, vec![Box::new(blocks)], &mut Paused::default(), &options);
    let said = crate::report::error_chain(&error.unwrap_err());
    assert!(said.contains("bad sector"), "{said}");
}

#[test]
fn whoever_stops_does_not_wait_for_bandwidth() {
    struct Soon(Instant);
    impl block_mig::Monitor for Soon {
        fn is_cancelled(&self) -> bool {
            self.0.elapsed() > Duration::from_millis(200)
        }
    }
    let disk = MemoryDisk::new(vec![1; 4 << 20]);
    let soon = Soon(Instant::now());
    let (id, name) = (DiskId(0), "vda".to_owned());
    let options = SaveOptions { hashes: false, workers: 1, monitor: &soon };
    let disk = SaveDisk { id, name, source: &disk, dirty: None };
    let blocks = SaveBlocks::new(vec![disk], options).unwrap();
    let peer = Peer { state: SessionState::Fresh, first: &[], on: &acknowledge };
    let timing = Timing { linger: Duration::from_millis(200), ..timing() };
    // A unit would take a quarter of an hour.
    let meter = Arc::new(Meter::new(Some(1000)));
    let options = OutgoingOptions { timing, meter, ..OutgoingOptions::new(SESSION, &soon) };
    let error = send_to(&peer, vec![Box::new(blocks)], &mut Paused::default(), &options);
    assert!(matches!(error.unwrap_err(), Error::Interrupted));
    assert!(soon.0.elapsed() < Duration::from_secs(20), "{:?}", soon.0.elapsed());
}

#[test]
fn whoever_is_stuck_in_a_write_is_freed() {
    struct Soon(Instant);
    impl block_mig::Monitor for Soon {
        fn is_cancelled(&self) -> bool {
            self.0.elapsed() > Duration::from_millis(400)
        }
    }
    let bytes = pattern(4_000_000, &[(0, 4_000_000, 1)]);
    let cargo = Cargo { disks: vec![("vda".into(), MemoryDisk::new(bytes))], bitmaps: vec![] };
    let net = Net::new(None);
    let is_over = AtomicBool::new(false);
    // Acknowledges what introduces the disk, and reads nothing.
    let deaf = || {
        let main = net.accept(None).unwrap();
        let (mut reader, mut writer) = (StreamReader::new(main.reader, 0), main.writer);
        let Hello::Offer(offer) = reader.hello().unwrap() else { panic!() };
        let choice = Choice {
            session: offer.session,
            ticket: [0; 16],
            state: SessionState::Fresh,
            features: 0,
            channels: 1,
            program: "played".to_owned(),
        };
        let mut said = Hello::Choice(choice).encode();
        writer.write_all(&said).unwrap();
        std::thread::sleep(Duration::from_millis(100));
        said.clear();
        Answer::Ack(1).encode(&mut said);
        writer.write_all(&said).unwrap();
        while !is_over.load(Ordering::Acquire) {
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    let soon = Soon(Instant::now());
    let timing = Timing { linger: Duration::from_millis(100), ..timing() };
    let options = OutgoingOptions { timing, ..OutgoingOptions::new(SESSION, &soon) };
    let took = std::thread::scope(|scope| {
        scope.spawn(deaf);
        let begun = Instant::now();
        let sent = send(&net, cargo.handlers(true), &mut (), &mut AtRest, &options);
        is_over.store(true, Ordering::Release);
        assert!(matches!(sent, Err(Error::Interrupted)), "{sent:?}");
        begun.elapsed()
    });
    assert!(took < Duration::from_secs(5), "{took:?}");
}
