//! The destination alone, against a source that only asks.

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use block_mig::device::RawSink;
use block_mig::{Landing, Unwatched};
use format_spec::native::block::{
    BitmapCreate, BitmapShape, BitmapVersion, BlockRecord, Disk, DiskId, DiskSeal, Run,
};
use format_spec::native::control::Control;
use format_spec::native::hello::{Choice, Hello, Offer};
use mig_core::block::BlockSink;
use mig_core::channels::{CONTROL, CONTROL_ID, Channels, Outlet};
use mig_core::section::{Fate, Have};
use mig_core::stream::{self, Breaker, Buffers, StreamReader, StreamWriter};
use mig_core::transport::Single;

use super::*;
use crate::DiskProof;

const SESSION: SessionId = [9; 16];
/// Longest silence that the source puts up with.
const PATIENCE: Duration = Duration::from_millis(500);

/// Reads again what an earlier attempt left, for much longer than the source waits in silence.
struct SlowToRecheck(RawSink);

impl Landing for SlowToRecheck {
    fn sink(&self) -> &dyn BlockSink {
        &self.0
    }

    fn have(&self, tell: &mut dyn FnMut(Have) -> stream::Result<()>) -> stream::Result<()> {
        std::thread::sleep(PATIENCE * 3);
        tell(Have::Zeroes(0, 1))
    }
}

impl Place for SlowToRecheck {
    fn prepare(&self, _sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        Ok(None)
    }
}

struct Slow;

impl Destination for Slow {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Resumable)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        let memory = Arc::new(qcow2_file::Memory::new());
        Ok(Arc::new(SlowToRecheck(RawSink::new(memory, wanted.size))))
    }

    fn commit(&self) -> stream::Result<()> {
        Ok(())
    }

    fn abort(&self, _fate: Fate) {}
}

/// Agrees with the destination, and starts the sections.
fn open_session(line: &UnixStream) -> (Channels, StreamReader, Choice) {
    let mut writer = StreamWriter::new(Box::new(line.try_clone().unwrap()), 0);
    let mut reader = StreamReader::new(Box::new(line.try_clone().unwrap()), 0);
    let (session, program) = (SESSION, String::new());
    let (features, required, channels, is_one_way) = (RESUME, 0, 1, false);
    let offer = Offer { session, is_one_way, features, required, channels, program };
    writer.hello(&Hello::Offer(offer)).unwrap();
    let Hello::Choice(choice) = reader.hello().unwrap() else { panic!("refused") };
    let channels = Channels::new(vec![writer], Arc::default(), Arc::new(Breaker::new()));
    channels.start().unwrap();
    channels.start_section(CONTROL_ID, CONTROL).unwrap();
    channels.start_section(2, block_mig::save::SECTION).unwrap();
    (channels, reader, choice)
}

#[test]
fn a_long_recheck_is_no_silence() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    let main = Connection::from_unix(ours, "a test").unwrap();
    let timing = Timing { keepalive: PATIENCE / 5, linger: PATIENCE, ..Timing::default() };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let options = IncomingOptions { timing, ..IncomingOptions::new(&Unwatched) };
            let nobody = Single::new(Connection::from_unix(theirs.try_clone()?, "nobody")?);
            let received = receive(main, &nobody, Arc::new(Slow), Registry::new(), &options);
            assert!(received.is_err(), "the source goes away");
            std::io::Result::Ok(())
        });
        let (channels, mut reader, choice) = open_session(&theirs);
        assert_eq!(choice.state, SessionState::Resumable);
        let outlet = Outlet::new(&channels, 2);
        let disk = Disk { disk: DiskId(0), keeps_rest: false, size: 512, name: "a" };
        outlet.record(|out| BlockRecord::Disk(disk).encode(out)).unwrap();
        outlet.flush().unwrap();
        let (buffers, mut told) = (Buffers::new(1), Vec::new());
        while !matches!(told.last(), Some(Answer::HaveDone(_))) {
            let arrival = reader.record(&buffers).expect("never silent for long");
            told.push(match Answer::decode(&arrival.record()).unwrap().unwrap() {
                Answer::Keepalive => Answer::Keepalive,
                Answer::HaveZeroes(disk, units) => Answer::HaveZeroes(disk, units),
                Answer::HaveDone(disk) => Answer::HaveDone(disk),
                other => panic!("{other:?}"),
            });
        }
        let is_life = |answer: &&Answer<'_>| matches!(answer, Answer::Keepalive);
        assert!(told.iter().filter(is_life).count() >= 3, "{told:?}");
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
    });
}

struct Anywhere(AtomicBool);

impl Destination for Anywhere {
    fn begin(&self, _session: SessionId) -> stream::Result<SessionState> {
        Ok(SessionState::Fresh)
    }

    fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
        let memory = Arc::new(qcow2_file::Memory::new());
        Ok(Arc::new(InMemory(RawSink::new(memory, wanted.size))))
    }

    fn commit(&self) -> stream::Result<()> {
        self.0.store(true, Ordering::Release);
        Ok(())
    }

    fn abort(&self, _fate: Fate) {}
}

struct InMemory(RawSink);

impl Landing for InMemory {
    fn sink(&self) -> &dyn BlockSink {
        &self.0
    }
}

impl Place for InMemory {
    fn prepare(&self, _sealed: &Sealed) -> stream::Result<Option<DiskProof>> {
        Ok(None)
    }
}

const SIZE: u64 = 1 << 20;

/// What a source says beside what it has to.
enum Extra {
    Bitmap,
    Zeroes,
    Barrier,
}

impl Extra {
    fn say(&self, channels: &Channels) {
        let outlet = Outlet::new(channels, 2);
        let said = match self {
            Self::Barrier => return channels.barrier(3, false).unwrap(),
            Self::Zeroes => BlockRecord::Run(Run::zeroes(DiskId(0), 0, SIZE)),
            Self::Bitmap => BlockRecord::BitmapCreate(BitmapCreate {
                version: BitmapVersion { bitmap: 0, generation: 1 },
                disk: DiskId(0),
                shape: BitmapShape::of_disk(SIZE, 65536),
                is_persistent: true,
                is_enabled: true,
                name: "late",
            }),
        };
        outlet.record(|out| said.encode(out)).unwrap();
        outlet.flush().unwrap();
    }
}

/// Sends a disk, with something more behind its seal and behind READY. Answers what the source was
/// told in the end, and whether the disk was published.
fn move_with(behind_seal: Option<Extra>, behind_ready: Option<Extra>) -> (String, bool) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let main = Connection::from_unix(ours, "a test").unwrap();
    let destination = Arc::new(Anywhere(AtomicBool::new(false)));
    let told = std::thread::scope(|scope| {
        scope.spawn(|| {
            let timing = Timing { linger: PATIENCE, ..Timing::default() };
            let options = IncomingOptions { timing, ..IncomingOptions::new(&Unwatched) };
            let nobody = Connection::from_unix(theirs.try_clone().unwrap(), "nobody").unwrap();
            let (nobody, place) = (Single::new(nobody), destination.clone());
            receive(main, &nobody, place, Registry::new(), &options).map(drop)
        });
        let (channels, mut reader, _) = open_session(&theirs);
        let outlet = Outlet::new(&channels, 2);
        let say = |record: BlockRecord<'_>| {
            outlet.record(|out| record.encode(out)).unwrap();
            outlet.flush().unwrap();
        };
        say(BlockRecord::Disk(Disk { disk: DiskId(0), keeps_rest: false, size: SIZE, name: "a" }));
        channels.barrier(1, false).unwrap();
        say(BlockRecord::Run(Run::zeroes(DiskId(0), 0, SIZE)));
        say(BlockRecord::DiskSeal(DiskSeal { disk: DiskId(0), hash: None }));
        behind_seal.iter().for_each(|extra| extra.say(&channels));
        channels.barrier(2, false).unwrap();
        channels.control(&Control::Prepare(SESSION)).unwrap();
        let buffers = Buffers::new(1);
        let told = loop {
            let arrival = reader.record(&buffers).unwrap();
            match Answer::decode(&arrival.record()).unwrap().unwrap() {
                Answer::Ready(_) => {
                    behind_ready.iter().for_each(|extra| extra.say(&channels));
                    channels.control(&Control::Commit(SESSION)).unwrap();
                }
                Answer::Failed { blame, offset, text } => {
                    assert_eq!(blame, Blame::PeerBehaviour, "{text}");
                    assert!(offset.is_some_and(|at| at > 0), "{text}");
                    break text;
                }
                Answer::Committed(_) => break "committed".to_owned(),
                _ => {}
            }
        };
        theirs.shutdown(std::net::Shutdown::Both).unwrap();
        told
    });
    (told, destination.0.load(Ordering::Acquire))
}

/// What comes when it cannot be part of what is published any more is refused, not dropped.
#[test]
fn nothing_comes_behind_ready_and_no_bitmap_behind_a_seal() {
    assert_eq!(move_with(None, None), ("committed".to_owned(), true));
    for (extra, named) in [
        (Extra::Bitmap, "a record of kind 4 in section 2"),
        (Extra::Zeroes, "a record of kind 2 in section 2"),
        (Extra::Barrier, "BARRIER 3"),
    ] {
        let (told, is_published) = move_with(None, Some(extra));
        assert!(told.contains(&format!("{named} comes behind PREPARE")), "{told}");
        assert!(!is_published, "{told}");
    }
    let (told, is_published) = move_with(Some(Extra::Bitmap), None);
    assert!(told.contains("disk \"a\" is sealed, and gets another bitmap"), "{told}");
    assert!(!is_published, "{told}");
}
