//! A source and a destination in one process, over a socket pair.

use std::cell::OnceCell;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use bitmap_mig::Bitmap;
use block_mig::Unwatched;
use block_mig::device::{ChainSource, NewImageSink};
use format_spec::native::block::{
    BitmapCreate, BitmapSeal, BitmapShape, BitmapVersion, BlockRecord, Disk, DiskId, DiskSeal, Run,
};
use format_spec::native::control::Control;
use format_spec::native::hello::{Hello, Offer};
use mig_core::block::BlockSink;
use qcow2_file::bitmaps::Bits;
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::{Chain, GuestOffset, Image, Layer, Memory};

use super::*;

const SIZE: u64 = (4 << 20) + 512;
/// What the source writes, at least.
const STREAM_BYTES: u64 = 460_000;
const SESSION: [u8; 16] = [7; 16];

/// A disk with something at its start, in its middle and in its last sector.
fn disk() -> Chain {
    let file = Arc::new(Memory::new());
    let image = NewImage::create(file.clone(), &CreateOptions::new(SIZE)).unwrap();
    for (at, len, byte) in [(0, 4096, 1), (1_500_000, 300_000, 2), (SIZE - 512, 512, 3)] {
        image.write_at(&vec![byte; len], GuestOffset(at)).unwrap();
    }
    image.finish(&[]).unwrap();
    Chain::from_layers(vec![Layer::Qcow2(Box::new(Image::open(file, None).unwrap()))]).unwrap()
}

fn bitmaps() -> Vec<Bitmap> {
    let mut fine = Bits::for_disk(SIZE, 9);
    fine.set_range(0..1);
    fine.set_range(8000..8193);
    let bits = |granularity_bits| Bits::for_disk(SIZE, granularity_bits);
    let named = |name: &str, granularity_bits, bits| Bitmap {
        name: name.to_owned(),
        granularity_bits,
        is_enabled: name != "stopped",
        bits,
    };
    vec![named("fine", 9, fine), named("empty", 16, bits(16)), named("stopped", 31, bits(31))]
}

/// What a destination kept, if it published.
type Kept = (ContentProof, Vec<Bitmap>);
type ContentProof = format_spec::content_hash::ContentHash;

/// A destination in memory that believes what it stored.
fn receive(reader: impl Read, writer: impl Write) -> Result<Kept> {
    let mut incoming = Incoming::accept(reader, writer, [9; 16])?;
    let file = Arc::new(Memory::new());
    let place = OnceCell::new();
    let arrived = incoming.transfer(&mut |_: &str, size: u64| {
        let image = NewImage::create(file.clone(), &CreateOptions::new(size))?;
        Ok(Arc::new(NewImageSink(place.get_or_init(|| image))) as Arc<dyn BlockSink + '_>)
    })?;
    place.get().unwrap().finish(&[]).unwrap();
    let image = Image::open(file.clone(), None).unwrap();
    let chain = Chain::from_layers(vec![Layer::Qcow2(Box::new(image))]).unwrap();
    let content = block_mig::content_hash(&ChainSource(&chain), 1, &Unwatched)?;
    let digests = arrived[0].bitmaps.iter().map(|b| b.digest().unwrap()).collect();
    incoming.prepare(&arrived, &[DiskProof { content, bitmaps: digests }])?;
    let kept = (content, arrived.into_iter().next().unwrap().bitmaps);
    incoming.commit()?;
    Ok(kept)
}

/// A source; `Ok` when it has heard that everything is published.
fn send(reader: impl Read, writer: impl Write + Send) -> Result<DiskProof> {
    let chain = disk();
    let bitmaps = bitmaps();
    let disk = OutgoingDisk { name: "vda", source: &ChainSource(&chain), bitmaps: &bitmaps };
    let mut outgoing = Outgoing::connect(reader, writer, SESSION)?;
    let sent = outgoing.transfer(&[disk], &Unwatched)?;
    let proofs = outgoing.prepare(&sent)?;
    assert_eq!(proofs[0], sent[0].proof);
    outgoing.commit()?;
    Ok(proofs[0].clone())
}

/// Both ends, with something done to the bytes from the source on their way.
fn run(to_destination: impl Fn(UnixStream) -> Tap) -> (Result<DiskProof>, Result<Kept>) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let kept = receive(&theirs, &theirs);
            let _ = theirs.shutdown(Shutdown::Both);
            kept
        });
        let sent = send(&ours, to_destination(ours.try_clone().unwrap()));
        let _ = ours.shutdown(Shutdown::Both);
        (sent, destination.join().unwrap())
    })
}

/// A connection that is cut, or flips a bit, behind a number of bytes.
struct Tap {
    stream: UnixStream,
    passed: u64,
    cut_at: u64,
    flip_at: u64,
}

impl Tap {
    fn new(stream: UnixStream) -> Self {
        Self { stream, passed: 0, cut_at: u64::MAX, flip_at: u64::MAX }
    }
}

impl Write for Tap {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = usize::try_from(self.cut_at - self.passed).unwrap_or(usize::MAX);
        if room == 0 {
            self.stream.shutdown(Shutdown::Both)?;
        }
        let mut bytes = bytes[..bytes.len().min(room.max(1))].to_vec();
        if (self.passed..self.passed + bytes.len() as u64).contains(&self.flip_at) {
            bytes[usize::try_from(self.flip_at - self.passed).unwrap()] ^= 0x10;
        }
        let len = self.stream.write(&bytes)?;
        self.passed += len as u64;
        Ok(len)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_disk_and_its_bitmaps_arrive_equal() {
    let (sent, kept) = run(Tap::new);
    let (content, received) = kept.unwrap();
    assert_eq!(sent.unwrap().content, content);
    assert_eq!(received, bitmaps());
    assert_eq!(content, block_mig::content_hash(&ChainSource(&disk()), 1, &Unwatched).unwrap());
}

#[test]
fn a_cut_anywhere_is_never_a_success_at_the_source() {
    let (sent, _) = run(Tap::new);
    sent.unwrap();
    // Every byte of the hello and the first records, then in strides that no record has.
    let cuts = (0..400).chain((400..STREAM_BYTES + 100_000).step_by(31_013));
    let mut completed = 0;
    for cut_at in cuts {
        let (sent, kept) = run(|stream| Tap { cut_at, ..Tap::new(stream) });
        match (sent, kept) {
            (Ok(_), Ok(_)) => completed += 1,
            (Ok(_), Err(e)) => panic!("cut at {cut_at}: the source believes in success: {e}"),
            // COMMIT had gone out: the destination may have published; the source does not know.
            (Err(_), _) => assert_eq!(completed, 0, "cut at {cut_at}"),
        }
    }
    assert!(completed > 0, "the cuts do not reach the end");
}

#[test]
fn a_flipped_bit_is_seen() {
    for flip_at in (0..600).chain((600..STREAM_BYTES).step_by(13_007)) {
        let (sent, kept) = run(|stream| Tap { flip_at, ..Tap::new(stream) });
        assert!(sent.is_err() && kept.is_err(), "bit flipped at {flip_at}");
    }
}

/// Sends these records behind a good hello and answers what the destination says of them.
fn lie(records: &[BlockRecord<'_>]) -> String {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let offer = Offer {
        session: SESSION,
        is_one_way: false,
        features: 0,
        required: 0,
        channels: 1,
        program: String::new(),
    };
    let mut bytes = Hello::Offer(offer).encode();
    records.iter().for_each(|record| record.encode(&mut bytes));
    Control::Prepare(SESSION).encode(&mut bytes);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let _ = (&ours).write_all(&bytes);
            let _ = ours.shutdown(Shutdown::Write);
        });
        let error = receive(&theirs, &theirs).unwrap_err();
        drop(theirs);
        writer.join().unwrap();
        crate::report::error_chain(&error)
    })
}

const D: DiskId = DiskId(0);

fn vda() -> BlockRecord<'static> {
    BlockRecord::Disk(Disk { disk: D, keeps_rest: false, size: SIZE, name: "vda" })
}

fn create(number: u32, generation: u32, granularity: u32) -> BlockRecord<'static> {
    BlockRecord::BitmapCreate(BitmapCreate {
        version: BitmapVersion { bitmap: number, generation },
        disk: D,
        shape: BitmapShape::of_disk(SIZE, granularity),
        is_enabled: true,
        is_persistent: true,
        name: "b",
    })
}

fn zeroes(offset: u64, len: u64) -> BlockRecord<'static> {
    BlockRecord::Run(Run::zeroes(D, offset, len))
}

fn seal() -> BlockRecord<'static> {
    BlockRecord::DiskSeal(DiskSeal { disk: D, hash: None })
}

#[test]
fn every_lie_is_named() {
    let bitmap_seal = |generation| {
        let version = BitmapVersion { bitmap: 0, generation };
        BlockRecord::BitmapSeal(BitmapSeal { version, digest: None })
    };
    let other_hash = BlockRecord::DiskSeal(DiskSeal {
        disk: D,
        hash: Some(format_spec::content_hash::ContentHash([0; 32])),
    });
    let huge = |n| {
        let mut record = create(n, 1, 512);
        if let BlockRecord::BitmapCreate(create) = &mut record {
            create.shape.bits += 1;
        }
        record
    };
    let cases: Vec<(&str, Vec<BlockRecord<'_>>)> = vec![
        ("never introduced", vec![zeroes(0, SIZE)]),
        ("twice", vec![vda(), vda()]),
        ("outside", vec![vda(), zeroes(65536, SIZE)]),
        ("not a multiple", vec![vda(), zeroes(0, 512)]),
        ("is sealed", vec![vda(), zeroes(0, 65536), seal()]),
        ("after its seal", vec![vda(), zeroes(0, SIZE), seal(), zeroes(0, SIZE)]),
        ("at the source", vec![vda(), zeroes(0, SIZE), other_hash]),
        ("before disk", vec![vda(), zeroes(0, SIZE), BlockRecord::End]),
        ("bits of bitmap", vec![vda(), huge(0)]),
        ("exists", vec![vda(), create(0, 1, 512), create(1, 1, 512)]),
        ("generation", vec![vda(), create(0, 2, 512)]),
        ("does not exist", vec![vda(), create(0, 1, 512), bitmap_seal(2)]),
        ("sealed twice", vec![vda(), create(0, 1, 512), bitmap_seal(1), bitmap_seal(1)]),
        (
            "before bitmap",
            vec![vda(), create(0, 1, 512), zeroes(0, SIZE), seal(), BlockRecord::End],
        ),
        (
            "builds on content",
            vec![BlockRecord::Disk(Disk { disk: D, keeps_rest: true, size: SIZE, name: "vda" })],
        ),
    ];
    for (word, records) in cases {
        let said = lie(&records);
        assert!(said.contains(word), "{word}: {said}");
        assert!(said.contains("offset"), "{said}");
    }
}
