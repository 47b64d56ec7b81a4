//! The stream by itself: what is on the wire, and that a destination with QEMU's rules gets the
//! disk.

use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use block_mig::Monitor;
use block_mig::load::SharedTree;
use block_mig::plan::{Scope, Units};
use format_spec::qemu::Step;
use format_spec::qemu::block::{Body, Record};
use format_spec::qemu::stream::{Decoder, Item};
use mig_core::block::{BlockSource, Extent, ExtentKind};
use mig_core::meter::Meter;
use mig_core::transport::{Connection, HangUp};
use qcow2_file::bitmaps::Bits;

use super::bitmaps::OutgoingBitmap;
use super::blocks::{OutgoingDisk, Pass};
use super::chunks::{CHUNK, Chunk, Chunks};
use super::session::{Ending, Greeting, Session};

/// What was written, and nothing to read.
#[derive(Clone, Default)]
struct Tape(Arc<Mutex<Vec<u8>>>);

impl Tape {
    fn session(&self) -> Session {
        let connection = Connection {
            reader: Box::new(io::empty()),
            writer: Box::new(self.clone()),
            line: Arc::new(self.clone()),
            peer: "tape".to_owned(),
        };
        let greeting = Greeting { is_one_way: true, ..Greeting::default() };
        Session::open(connection, &greeting).unwrap()
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.lock().unwrap().clone()
    }
}

impl Write for Tape {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl HangUp for Tape {
    fn hang_up(&self) {}
}

fn bitmap(device: &str, name: &str, disk_size: u64, granularity: u32) -> OutgoingBitmap {
    OutgoingBitmap {
        device: device.to_owned(),
        name: name.to_owned(),
        disk_size,
        granularity,
        is_enabled: true,
        is_persistent: false,
    }
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.chars().filter(char::is_ascii_hexdigit).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap();
    digits.chunks(2).map(byte).collect()
}

/// A stream that QEMU 7.2 and 10.0 were seen to take, but for its section's number.
#[test]
fn the_smallest_bitmap_stream() {
    let tape = Tape::default();
    let mut session = tape.session();
    let bitmaps = [bitmap("disk0", "bm", 4 << 20, 65536)];
    session.start_bitmaps(&bitmaps).unwrap();
    let send = |_| {
        let mut bits = Bits::for_disk(4 << 20, 16);
        bits.set_range(2..3);
        bits.set_range(48..49);
        Ok(bits)
    };
    session.end_bitmaps(&bitmaps, send).unwrap();
    assert!(matches!(session.finish().unwrap(), Ending::Unheard));
    let expected = hex("5145564d 00000003 07 00000000 \
         01 00000002 0c 64697274792d6269746d6170 00000000 00000001 \
         1c 05 6469736b30 02 626d 00010000 01 01 7e 00000002 \
         03 00000002 40 0000000000000000 00002000 0000000000000020 0400000000000100 \
         000000000000000000000000000000000000000000000000 20 01 7e 00000002 \
         00 06 00000002 7b7d");
    assert_eq!(tape.bytes(), expected);
    assert_eq!(session.wire_bytes(), expected.len() as u64);
}

#[test]
fn bitmaps_of_one_name_on_two_disks_are_told_apart() {
    let tape = Tape::default();
    let mut session = tape.session();
    let bitmaps = [bitmap("d0", "b", 1 << 20, 512), bitmap("d1", "b", 1 << 20, 512)];
    session.start_bitmaps(&bitmaps).unwrap();
    session.end_bitmaps(&bitmaps, |_| Ok(Bits::for_disk(1 << 20, 9))).unwrap();
    session.finish().unwrap();
    let (mut decoder, bytes) = (Decoder::new(), tape.bytes());
    let (mut at, mut names) = (0, Vec::new());
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        let Step::Item(item, len) = decoder.next(rest, true).unwrap() else { panic!("cut") };
        at += len;
        if let Item::DirtyBitmap(record) = item
            && !record.ends_body()
        {
            names.push((record.device.map(str::to_owned), record.bitmap.map(str::to_owned)));
        }
    }
    // Created, clear, complete: on each disk in its turn.
    let both = |device: &str| (Some(device.to_owned()), Some("b".to_owned()));
    assert_eq!(names, ["d0", "d1", "d0", "d1", "d0", "d1"].map(both));
}

/// A disk in memory, whose zero sectors are holes.
struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn is_zero(&self, at: u64) -> bool {
        let bytes = self.0.lock().unwrap();
        let at = usize::try_from(at).unwrap();
        bytes[at..at + 512].iter().all(|byte| *byte == 0)
    }
}

impl BlockSource for Ram {
    fn size(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn extent(&self, offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        let is_hole = self.is_zero(offset);
        let end = (offset..offset + max_len).step_by(512).find(|at| self.is_zero(*at) != is_hole);
        let len = end.map_or(max_len, |end| end - offset);
        let kind = if is_hole { ExtentKind::Hole } else { ExtentKind::Data };
        Ok(Extent { len, kind, host: None })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()> {
        let at = usize::try_from(offset).unwrap();
        buf.copy_from_slice(&self.0.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }
}

#[derive(Default)]
struct Count(AtomicU64);

impl Monitor for Count {
    fn advance(&self, bytes: u64) {
        self.0.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// Writes a stream's chunks as QEMU 7.2 does, which dies of what reaches beyond the end.
fn replay(stream: &[u8], disk: &mut [u8]) -> (usize, Vec<u8>) {
    let (mut decoder, mut at) = (Decoder::new(), 0);
    let (mut records, mut percents) = (0, Vec::new());
    while at < stream.len() {
        let Step::Item(item, len) = decoder.next(&stream[at..], true).unwrap() else {
            panic!("cut")
        };
        at += len;
        let Item::Block(Record { word, body }) = item else { continue };
        let start = usize::try_from(word & !511).unwrap();
        match body {
            Body::Data { content, .. } => {
                disk[start..start + content.len()].copy_from_slice(content);
                records += 1;
            }
            Body::Zeroes { .. } => {
                let end = disk.len().min(start + content_bytes());
                disk[start..end].fill(0);
                records += 1;
            }
            Body::Progress => percents.push(u8::try_from(word >> 9).unwrap()),
            Body::None => {}
        }
    }
    assert!(decoder.may_end());
    (records, percents)
}

fn content_bytes() -> usize {
    usize::try_from(CHUNK).unwrap()
}

#[test]
fn a_disk_arrives_and_what_changed_is_sent_again() {
    for (size, workers) in [(5 * CHUNK + 512, 1), (9 * CHUNK - 512, 3), (2 * CHUNK, 2)] {
        let mut content = vec![0u8; usize::try_from(size).unwrap()];
        let len = content.len();
        content[..100].fill(1);
        content[len - 700..].fill(2);
        content[content_bytes() + 512..content_bytes() + 1024].fill(3);
        let disk = Ram(Mutex::new(content));
        let tape = Tape::default();
        let mut session = tape.session();
        session.start_blocks().unwrap();
        let tree = SharedTree::new(size).unwrap();
        let outgoing = OutgoingDisk { name: "d", source: &disk, tree: Some(&tree) };
        let count = Count::default();
        let pass = Pass { workers, monitor: &count, meter: &Meter::default(), total: 4 * CHUNK };
        let units = Units::new(&disk, Scope::Whole, CHUNK);
        let sent = session.blocks(&outgoing, Chunks::new(units, size), &pass).unwrap();
        assert_eq!(sent.data + sent.zero, size);
        let hash = block_mig::content_hash(&disk, 1, &block_mig::Unwatched).unwrap();
        assert_eq!(tree.root().unwrap(), hash);
        // A guest wrote meanwhile: the chunk is sent again.
        disk.0.lock().unwrap()[content_bytes()] = 9;
        let chunk = Chunk { offset: CHUNK, is_zero: false };
        let outgoing = OutgoingDisk { tree: None, ..outgoing };
        session.blocks(&outgoing, [Ok(chunk)].into_iter(), &pass).unwrap();
        session.end_blocks().unwrap();
        session.finish().unwrap();
        let mut arrived = vec![0xee; len];
        let (records, percents) = replay(&tape.bytes(), &mut arrived);
        assert!(arrived == *disk.0.lock().unwrap());
        assert_eq!(records as u64, size.div_ceil(CHUNK) + 1);
        assert_eq!(percents.last(), Some(&100));
        assert!(count.0.into_inner() > 0);
    }
}

#[test]
fn what_does_not_fit_a_record_is_an_error() {
    let disk = Ram(Mutex::new(vec![1; 4096]));
    let tape = Tape::default();
    let mut session = tape.session();
    session.start_blocks().unwrap();
    let outgoing = OutgoingDisk { name: "d", source: &disk, tree: None };
    let pass =
        Pass { workers: 1, meter: &Meter::default(), monitor: &block_mig::Unwatched, total: 0 };
    let chunk = Chunk { offset: 0, is_zero: false };
    assert!(session.blocks(&outgoing, [Ok(chunk)].into_iter(), &pass).is_err());
    disk.0.lock().unwrap().fill(0);
    let sent = session.blocks(&outgoing, [Ok(chunk)].into_iter(), &pass).unwrap();
    assert_eq!(sent.zero, 4096);
}
