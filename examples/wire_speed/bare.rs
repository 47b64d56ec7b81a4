//! The limit: sockets and memory, and nothing else.

use std::io::{Read as _, Write as _};
use std::time::{Duration, Instant};

use super::Anything;
use super::tcp::Loopback;

/// Bytes of one system call.
const CALL_BYTES: usize = 512 << 10;

/// Moves `bytes` over so many connections, from and to warm memory of the same size.
pub(crate) fn run(connections: u16, bytes: u64) -> Result<Duration, Anything> {
    let share = usize::try_from(bytes / u64::from(connections))?;
    let net = Loopback::new()?;
    let mut pairs = Vec::new();
    for _ in 0..connections {
        pairs.push((net.pair()?, vec![1u8; share], vec![2u8; share]));
    }
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for ((ours, theirs), from, to) in &mut pairs {
            scope.spawn(|| from.chunks(CALL_BYTES).try_for_each(|part| ours.write_all(part)));
            scope.spawn(|| to.chunks_mut(CALL_BYTES).try_for_each(|part| theirs.read_exact(part)));
        }
    });
    Ok(begun.elapsed())
}
