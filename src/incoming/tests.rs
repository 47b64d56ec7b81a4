//! The destination alone, against a source that only asks.

use std::os::unix::net::UnixStream;
use std::time::Duration;

use block_mig::device::RawSink;
use block_mig::{Landing, Unwatched};
use format_spec::native::block::{BlockRecord, Disk, DiskId};
use format_spec::native::hello::{Hello, Offer};
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
        let mut writer = StreamWriter::new(Box::new(theirs.try_clone().unwrap()), 0);
        let mut reader = StreamReader::new(Box::new(theirs.try_clone().unwrap()), 0);
        let (session, program) = (SESSION, String::new());
        let (features, required, channels, is_one_way) = (RESUME, 0, 1, false);
        let offer = Offer { session, is_one_way, features, required, channels, program };
        writer.hello(&Hello::Offer(offer)).unwrap();
        let Hello::Choice(choice) = reader.hello().unwrap() else { panic!("refused") };
        assert_eq!(choice.state, SessionState::Resumable);
        let channels = Channels::new(vec![writer], Arc::default(), Arc::new(Breaker::new()));
        channels.start().unwrap();
        channels.start_section(CONTROL_ID, CONTROL).unwrap();
        channels.start_section(2, block_mig::save::SECTION).unwrap();
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
