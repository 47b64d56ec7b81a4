use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::*;
use crate::memory::MemoryDisk;

const SIZE: u64 = 8 << 20;

/// Remembers what it was told.
#[derive(Default)]
struct Told(Mutex<Vec<Range<u64>>>);

impl Recorder for Told {
    fn record_write(&self, range: Range<u64>) {
        self.0.lock().unwrap().push(range);
    }
}

#[test]
fn every_change_is_marked_and_failed_ones_too() {
    let told = Arc::new(Told::default());
    let mut memory = MemoryDisk::new(SIZE);
    memory.bad = Some(3 << 20);
    let disk = TrackedDisk::new(memory, told.clone());
    disk.write(&[1; 512], 0).unwrap();
    let set = disk.start_tracking().unwrap();
    disk.write(&[1; 1024], 65536 - 512).unwrap();
    disk.write_zeroes(1 << 20, 65536).unwrap();
    disk.discard(2 << 20, 512).unwrap();
    disk.write(&[1; 512], 3 << 20).unwrap_err();
    for (at, len) in [(SIZE, 512), (0, 100), (512, SIZE), (u64::MAX - 511, 512), (3, 512)] {
        disk.write_zeroes(at, len).unwrap_err();
    }
    disk.write(&[], 512).unwrap();
    let unit = 1 << UNIT_BITS;
    let mut taken = Vec::new();
    let mut from = 0;
    while let Some(run) = set.take(from, SIZE) {
        from = run.end;
        taken.push(run);
    }
    let at = |at: u64, units: u64| at..at + units * unit;
    assert_eq!(taken, [at(0, 2), at(1 << 20, 1), at(2 << 20, 1), at(3 << 20, 1)]);
    assert_eq!(told.0.lock().unwrap().len(), 5);
    assert!(disk.start_tracking().is_err(), "a second migration would take its marks away");
    drop(set);
    disk.write(&[1; 512], 0).unwrap();
    assert_eq!(disk.start_tracking().unwrap().dirty_bytes(), 0);
}

#[test]
fn a_panic_of_the_disk_leaves_the_gate_and_is_marked() {
    let told = Arc::new(Told::default());
    let disk = TrackedDisk::new(MemoryDisk::new(SIZE), told.clone());
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        disk.change("write", 0, 512, |_| panic!("a broken device"))
    }));
    assert!(result.is_err());
    disk.pause();
    assert_eq!(told.0.lock().unwrap().len(), 1);
}

#[test]
fn pausing_drains_writes_in_flight_and_holds_new_ones() {
    let disk = TrackedDisk::new(MemoryDisk::new(SIZE), Arc::new(()));
    let (in_disk, done) = (AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let write = disk.change("write", 0, 512, |_| {
                        in_disk.fetch_add(1, Ordering::SeqCst);
                        std::thread::yield_now();
                        in_disk.fetch_sub(1, Ordering::SeqCst);
                        Ok(())
                    });
                    write.unwrap();
                }
            });
        }
        for _ in 0..300 {
            disk.pause();
            disk.pause();
            disk.resume();
            for _ in 0..20 {
                assert_eq!(in_disk.load(Ordering::SeqCst), 0);
            }
            disk.read(&mut [0; 512], 0).unwrap();
            disk.flush().unwrap();
            disk.resume();
            std::thread::yield_now();
        }
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_retired_disk_sends_writers_away() {
    let disk = TrackedDisk::new(MemoryDisk::new(SIZE), Arc::new(()));
    disk.pause();
    let error = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| disk.write(&[0; 512], 0).unwrap_err());
        let limit = Instant::now() + Duration::from_millis(20);
        while Instant::now() < limit {
            assert!(!waiting.is_finished());
        }
        disk.retire();
        waiting.join().unwrap()
    });
    assert!(is_handed_over(&error));
    disk.resume();
    assert!(is_handed_over(&disk.write_zeroes(0, 512).unwrap_err()));
    disk.read(&mut [0; 512], 0).unwrap();
}

fn is_handed_over(error: &Error) -> bool {
    std::error::Error::source(error).is_some_and(|source| source.is::<HandedOver>())
}
