//! The zero test of this crate.

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Wide strides let the compiler use vector loads; an early exit per stride keeps data cheap.
    let (chunks, tail) = bytes.as_chunks::<256>();
    chunks.iter().all(|c| c.iter().fold(0, |acc, b| acc | b) == 0)
        && tail.iter().fold(0, |acc, b| acc | b) == 0
}
