//! Refcounts packed into a block. qcow2 spec, "Host cluster management".

/// The refcount at `index` of a block whose refcounts are `1 << order` bits wide; `None` beyond the
/// block. Widths below a byte are packed from the least significant bit; wider ones are big-endian.
pub fn refcount_at(block: &[u8], index: u64, order: u32) -> Option<u64> {
    let index = usize::try_from(index).ok()?;
    if order < 3 {
        let per_byte = 8usize >> order;
        let byte = *block.get(index.checked_div(per_byte)?)?;
        let shift = index.checked_rem(per_byte)? << order;
        let mask = u8::MAX >> 8u32.checked_sub(1 << order)?;
        return Some(u64::from((byte >> shift) & mask));
    }
    let width = 1usize << order.checked_sub(3)?;
    let start = index.checked_mul(width)?;
    let bytes = block.get(start..start.checked_add(width)?)?;
    Some(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Sets the refcount at `index`; `None` when the block or the width cannot hold it.
pub fn set_refcount(block: &mut [u8], index: u64, order: u32, value: u64) -> Option<()> {
    let index = usize::try_from(index).ok()?;
    let bits = 1u32 << order;
    if bits < 64 && value >> bits != 0 {
        return None;
    }
    if order < 3 {
        let per_byte = 8usize >> order;
        let byte = block.get_mut(index.checked_div(per_byte)?)?;
        let shift = index.checked_rem(per_byte)? << order;
        let mask = (u8::MAX >> 8u32.checked_sub(bits)?) << shift;
        *byte = (*byte & !mask) | (u8::try_from(value).ok()? << shift);
        return Some(());
    }
    let width = 1usize << order.checked_sub(3)?;
    let start = index.checked_mul(width)?;
    let bytes = block.get_mut(start..start.checked_add(width)?)?;
    let be = value.to_be_bytes();
    bytes.copy_from_slice(be.get(8usize.checked_sub(width)?..)?);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_holds_what_was_set() {
        for order in 0..=6u32 {
            let mut block = vec![0u8; 64];
            let count = (512 >> order) as u64;
            let max = if order == 6 { u64::MAX } else { (1 << (1u32 << order)) - 1 };
            for i in 0..count {
                set_refcount(&mut block, i, order, (i * 7 + 1) & max).unwrap();
            }
            for i in 0..count {
                assert_eq!(refcount_at(&block, i, order), Some((i * 7 + 1) & max));
            }
            assert_eq!(refcount_at(&block, count, order), None);
            if order < 6 {
                assert_eq!(set_refcount(&mut block, 0, order, max + 1), None);
            }
        }
    }
}
