//! Speed of the content hash on one core, beside its limits: reading the memory, plain BLAKE3.
#![allow(clippy::unwrap_used, clippy::cast_precision_loss)]

use std::hint::black_box;
use std::time::Instant;

use format_spec::content_hash::{LEDGER_HEIGHT, Tree, bitmap_digest, hash_run, leaf, subtree};

const MIB: usize = 1 << 20;
const GIB: f64 = (1u64 << 30) as f64;

fn main() {
    let disk: Vec<u8> =
        (0..32 * MIB).map(|n| (n.wrapping_mul(0x9e37_79b9) >> 13).to_le_bytes()[0]).collect();
    rate("read (limit)", disk.len(), || {
        let words = disk.as_chunks::<8>().0;
        black_box(words.iter().fold(0, |acc, w| acc ^ u64::from_ne_bytes(*w)));
    });
    rate("BLAKE3 of all at once (limit)", disk.len(), || {
        black_box(blake3::keyed_hash(&[7; 32], &disk));
    });
    rate("leaf", disk.len(), || {
        for bytes in disk.chunks(65536) {
            black_box(leaf(bytes));
        }
    });
    rate("subtree of 1 MiB", disk.len(), || {
        for bytes in disk.chunks(MIB) {
            black_box(subtree(LEDGER_HEIGHT, bytes, &|_| false));
        }
    });
    rate("hash_run of 2 MiB into a tree", disk.len(), || {
        let mut tree = Tree::new(disk.len() as u64).unwrap();
        for (at, run) in disk.chunks(2 * MIB).enumerate() {
            for placed in hash_run(at as u64 * 32, run, |_| false) {
                tree.put(placed.height, placed.index, placed.node).unwrap();
            }
        }
        black_box(tree.root().unwrap());
    });
    let words = vec![0u64; 4 * MIB];
    rate("digest of an empty bitmap of 16 TiB at 64 KiB", words.len() * 8, || {
        black_box(bitmap_digest(65536, 1 << 28, &words).unwrap());
    });
}

/// Prints the best of many short runs, so that a busy machine shows its speed too.
fn rate(what: &str, bytes: usize, mut run: impl FnMut()) {
    let best = (0..100)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min);
    println!("{what}: {:.2} GiB/s, {:.3} ms", bytes as f64 / GIB / best, best * 1e3);
}
