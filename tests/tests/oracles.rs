//! Other people's qcow2 crates as oracles: imago and qcow2-rs read the same bytes as we do, from
//! images that QEMU made and from images that we made, where they are known to be right.
//!
//! Neither is asked for what it gets wrong: qcow2-rs reads one layer of at least 4 KiB clusters, by
//! aligned reads on I/O of our own, and never writes; imago does not read zstd or extended L2.

#[path = "matrix/case.rs"]
#[allow(dead_code)]
mod case;
#[path = "matrix/source.rs"]
#[allow(dead_code)]
mod source;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bitferry_tests::random::{Random, seed};
use bitferry_tests::{Exit, Peer, Scratch, bitferry, require_all};
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2_file::chain::{Format, Opener};
use qcow2_file::{Chain, GuestOffset};
use qcow2_rs::dev::Qcow2DevParams;
use qcow2_rs::error::Qcow2Result;
use qcow2_rs::ops::Qcow2IoOps;

use case::{Below, Case, Layout, Target};

/// Bytes per comparison: no oracle is asked for more at once.
const STEP: usize = 65536;

const PEERS: &[Peer] = &[Peer::QemuImg, Peer::QemuIo];

fn ours(path: &Path) -> Chain {
    let opener = Opener::new().format(Some(Format::Qcow2)).allow_named_files(true);
    opener.open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Compares our reading with another, block by block.
#[track_caller]
fn same_bytes(chain: &Chain, case: &str, mut other: impl FnMut(&mut [u8], u64)) {
    let size = chain.virtual_size();
    let (mut a, mut b) = (vec![0; STEP], vec![0; STEP]);
    for at in (0..size).step_by(STEP) {
        let len = STEP.min(usize::try_from(size - at).unwrap_or(STEP));
        b[..len].fill(0xee);
        chain.read_at(&mut a[..len], GuestOffset(at)).expect("ours reads");
        other(&mut b[..len], at);
        let differs = a[..len].iter().zip(&b[..len]).position(|(a, b)| a != b);
        assert_eq!(differs.map(|d| at + d as u64), None, "first difference: {case}");
    }
}

fn imago(path: &Path, is_writable: bool) -> FormatAccess<imago::file::File> {
    let builder = imago::qcow2::Qcow2::<imago::file::File>::builder_path(path).write(is_writable);
    let image = builder.open(PermissiveImplicitOpenGate::default()).expect("imago opens");
    FormatAccess::new(image)
}

/// Reads for qcow2-rs: all or an error, zeroes behind the end, never a write.
struct ReadOnly(File);

impl Qcow2IoOps for ReadOnly {
    async fn read_to(&self, offset: u64, buf: &mut [u8]) -> Qcow2Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.0.read_at(&mut buf[done..], offset + done as u64)? {
                0 => break,
                n => done += n,
            }
        }
        buf[done..].fill(0);
        Ok(buf.len())
    }

    async fn write_from(&self, _offset: u64, _buf: &[u8]) -> Qcow2Result<()> {
        panic!("qcow2-rs wrote to a read-only image");
    }

    async fn fallocate(&self, _offset: u64, _len: usize, _flags: u32) -> Qcow2Result<()> {
        panic!("qcow2-rs wrote to a read-only image");
    }

    async fn fsync(&self, _offset: u64, _len: usize, _flags: u32) -> Qcow2Result<()> {
        Ok(())
    }
}

/// Drives a future whose I/O never waits.
fn finish<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1000 {
        if let Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
    panic!("qcow2-rs waits for something");
}

#[track_caller]
fn agrees_with_qcow2_rs(path: &Path, case: &str) {
    let io = ReadOnly(File::open(path).expect("open"));
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let (device, backing) =
        qcow2_rs::utils::qcow2_alloc_dev_sync(path, io, &params).expect("qcow2-rs opens");
    assert_eq!(backing, None::<PathBuf>);
    finish(device.qcow2_prep_io()).expect("qcow2-rs prepares");
    same_bytes(&ours(path), case, |buf, at| {
        let read = finish(device.read_at(buf, at)).expect("qcow2-rs reads");
        assert_eq!(read, buf.len(), "{case}: short read at {at}");
    });
}

#[track_caller]
fn agrees_with_imago(path: &Path, case: &str) {
    let image = imago(path, false);
    assert_eq!(image.size(), ours(path).virtual_size(), "{case}");
    same_bytes(&ours(path), case, |buf, at| image.read(buf, at).expect("imago reads"));
}

/// Cases of the matrix that imago reads.
fn cases(purpose: &str) -> impl Iterator<Item = (Case, Random)> {
    let mut random = Random::new(seed(), purpose);
    let sample = case::sample(&mut random, 120);
    let cases = sample
        .into_iter()
        .filter(|c| c.layout != Layout::Raw && !c.is_extended && c.compression != Some("zstd"));
    cases.take(25).map(move |c| {
        let random = Random::new(seed(), &c.name());
        (c, random)
    })
}

fn is_for_qcow2_rs(case: &Case) -> bool {
    case.layout == Layout::Qcow2 && case.cluster >= 4096 && case.below == Below::Nothing
}

#[test]
fn images_of_qemu_read_the_same() {
    if !require_all(PEERS) {
        return;
    }
    let mut compared = 0;
    for (case, mut random) in cases("oracles of QEMU's images") {
        let scratch = Scratch::new();
        let source = source::build(&case, &scratch, &mut random);
        agrees_with_imago(&source.path, &case.name());
        if is_for_qcow2_rs(&case) {
            agrees_with_qcow2_rs(&source.path, &case.name());
            compared += 1;
        }
    }
    assert!(compared > 0, "no case was one for qcow2-rs");
}

#[test]
fn images_of_ours_read_the_same() {
    if !require_all(PEERS) {
        return;
    }
    for (case, mut random) in cases("oracles of our images") {
        let scratch = Scratch::new();
        let source = source::build(&case, &scratch, &mut random);
        let copy = scratch.path("copy");
        let run = bitferry().args(["copy", "-f", "qcow2", "--flatten"]);
        let run = match case.target {
            Target::Shape(options)
                if !options.contains("extended") && !options.contains("zstd") =>
            {
                run.args(["-O", "qcow2", "-o", options])
            }
            _ => run,
        };
        run.arg(&source.path).arg(&copy).output().expect_exit(Exit::Done);
        agrees_with_imago(&copy, &case.name());
        // On smaller clusters qcow2-rs hangs.
        if ours(&copy).top().as_qcow2().expect("qcow2").geometry().cluster_size() >= 4096 {
            agrees_with_qcow2_rs(&copy, &case.name());
        }
    }
}

#[test]
fn a_writer_that_knows_no_bitmaps_makes_them_invalid_for_us_too() {
    if !require_all(PEERS) {
        return;
    }
    let scratch = Scratch::new();
    let image = bitferry_tests::image::make(&scratch, "a.qcow2", 8 << 20).bitmap("b0", 65536);
    let image = image.write(1, 0, 65536).done();
    let other = imago(&image, true);
    other.write(&[7; 4096][..], 1 << 20).expect("imago writes");
    other.flush().expect("imago flushes");
    drop(other);
    let copy = scratch.path("copy.qcow2");
    let run = bitferry().args(["copy", "-f", "qcow2"]).arg(&image).arg(&copy);
    run.output().expect_exit(Exit::Refused);
    assert!(!copy.exists());
    agrees_with_imago(&image, "written by imago");
}
