//! What arrives is read back on the way: what is at rest is not read again in the end, and nothing
//! that the finished disk reads otherwise goes unnoticed.

use mig_core::block::BlockSink as _;
use mig_core::section::Fate;

use super::super::prover::Prover;
use super::super::{NewDisk, Unfinished};
use super::*;
use crate::disk::{Disk, Request};

/// Every way to store a disk, that maps it differently.
fn formats() -> Vec<(Format, TargetOptions)> {
    let default = TargetOptions::default;
    let data_file = |is_raw| TargetOptions {
        data_file: Some("disk.data".into()),
        data_file_raw: Some(is_raw),
        ..default()
    };
    let clusters = |bits: u32| TargetOptions { cluster_size: Some(1 << bits), ..default() };
    let subclusters =
        TargetOptions { extended_l2: Some(true), cluster_size: Some(1 << 17), ..default() };
    let qcow2 = [9, 12, 16, 21].map(clusters).into_iter();
    let qcow2 = qcow2.chain([subclusters, data_file(false), data_file(true)]);
    let old = TargetOptions { version: Some(2), ..default() };
    let qcow2 = qcow2.chain([old]).map(|target| (Format::Qcow2, target));
    qcow2.chain([(Format::Raw, default())]).collect()
}

struct Written {
    here: Here,
    place: DiskPlace,
}

impl Written {
    fn new(format: Format, target: TargetOptions) -> Self {
        let here = Here::new();
        let (name, renames) = ("disk".to_owned(), Renames::default());
        let place =
            DiskPlace { name, path: here.path("disk"), format, target, base: None, renames };
        Self { here, place }
    }

    fn open(&self, unfinished: &Unfinished) -> Disk {
        let (path, data) = unfinished.paths();
        let data_file = data.map(Path::to_owned);
        let request = Request { data_file, ..Request::new(path, Some(self.place.format)) };
        Disk::open(&request, &crate::Silent).unwrap()
    }
}

/// Whole units of content, parts of units, zeroes over content.
fn write(unfinished: &Unfinished, prover: &Prover, bytes: &mut [u8], units: &[usize], byte: u8) {
    for unit in units {
        let parts: &[(usize, usize, bool)] = match unit % 3 {
            0 => &[(0, MIB, true)],
            1 => &[(0, 65536, true), (4 * 65536, MIB - 4 * 65536, true)],
            _ => &[(65536, 8 * 65536, true), (3 * 65536, 65536, false)],
        };
        for (into, len, is_data) in parts {
            let start = unit * MIB + into;
            let range = start..(start + len).min(bytes.len());
            let guest = range.start as u64..range.end as u64;
            prover.begin(guest.clone());
            bytes[range.clone()].fill(if *is_data { byte } else { 0 });
            if *is_data {
                unfinished.sink().write_at(&bytes[range], guest.start).unwrap();
                prover.arrived(guest);
            } else {
                unfinished.sink().write_zeroes(guest.start, *len as u64).unwrap();
                prover.arrived_zeroes(guest);
            }
        }
    }
}

#[test]
fn what_is_at_rest_is_not_read_again_in_the_end() {
    for (format, target) in formats() {
        let written = Written::new(format, target);
        let mut bytes = vec![0; 9 * MIB + 512];
        let data = written.place.data_file();
        let new: NewDisk<'_> = written.place.new_disk(bytes.len() as u64, data.as_ref()).unwrap();
        let unfinished = Arc::new(Unfinished::open(&new).unwrap());
        let prover = unfinished.prover().unwrap();
        write(&unfinished, &prover, &mut bytes, &[0, 1, 2, 3, 4, 6, 7, 8, 9], 1);
        prover.settled();
        prover.wait();
        write(&unfinished, &prover, &mut bytes, &[6, 7, 8], 2);
        prover.settled();
        prover.wait();
        write(&unfinished, &prover, &mut bytes, &[0, 4], 3);
        prover.stop();
        unfinished.seal(&[]).unwrap();
        let disk = written.open(&unfinished);
        let proof = prover.finish(&disk.chain, None, &crate::Silent).unwrap();
        assert_eq!(proof.content, root(&bytes), "{:?}", written.place);
        // Units that share a cluster, or a part of the file that is counted, are read with them.
        let read = proof.bytes_read / MIB as u64;
        assert!((2..=5).contains(&read), "{read} MiB of {:?}", written.place);
        drop(prover);
        unfinished.forsake().unwrap();
        drop(unfinished);
        assert_eq!(written.here.names(), [] as [&str; 0]);
    }
}

#[test]
fn a_write_that_nobody_meant_is_noticed() {
    for (format, target) in formats() {
        for offset in [4096, 3 * MIB as u64] {
            let written = Written::new(format, target.clone());
            let files = Files::new(vec![written.place.clone()], FileOptions::default());
            files.begin(SESSION).unwrap();
            let place = place(&files, "disk");
            send(&*place, 0..6, &[]);
            place.settled();
            place.durable().unwrap();
            place.sink().write_at(&[77], offset).unwrap();
            let error = crate::report::error_chain(&place.prepare(&sealed(false)).unwrap_err());
            assert!(error.contains("was read"), "{error}");
            drop(place);
            files.abort(Fate::Dropped);
        }
    }
}
