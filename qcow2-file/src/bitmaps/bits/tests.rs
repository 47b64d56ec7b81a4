#![allow(clippy::cast_possible_truncation)]

use proptest::prelude::*;

use super::*;

/// The same operations on one `bool` per bit.
fn model(len: u64, ranges: &[(u64, u64, bool)]) -> (Bits, Vec<bool>) {
    let mut bits = Bits::new(len);
    let mut plain = vec![false; len as usize];
    for &(start, size, set) in ranges {
        let range = start..start + size;
        if set {
            bits.set_range(range.clone());
        } else {
            bits.clear_range(range.clone());
        }
        for i in range {
            if let Some(p) = plain.get_mut(i as usize) {
                *p = set;
            }
        }
    }
    (bits, plain)
}

fn ranges() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
    proptest::collection::vec((0u64..2000, 0u64..300, any::<bool>()), 0..12)
}

proptest! {
    #[test]
    fn agrees_with_one_bool_per_bit(len in 0u64..1500, ops in ranges()) {
        let (bits, plain) = model(len, &ops);
        prop_assert_eq!(bits.count(), plain.iter().filter(|p| **p).count() as u64);
        for i in 0..len + 70 {
            let expected = plain.get(i as usize).copied().unwrap_or(false);
            prop_assert_eq!(bits.get(i), expected);
            let find = |wanted| plain.iter().skip(i as usize).position(|p| *p == wanted)
                .map(|n| n as u64 + i);
            prop_assert_eq!(bits.next_set(i), find(true));
            prop_assert_eq!(bits.next_clear(i), find(false));
        }
        let mut from_runs = vec![false; len as usize];
        bits.runs().for_each(|r| from_runs[r.start as usize..r.end as usize].fill(true));
        prop_assert_eq!(&from_runs, &plain);
        let mut from_parts = vec![false; len as usize];
        for (first, part) in bits.parts() {
            part.iter_ones().for_each(|n| from_parts[first as usize + n] = true);
        }
        prop_assert_eq!(&from_parts, &plain);
    }

    #[test]
    fn bytes_go_in_and_out_by_any_piece(
        len in 0u64..1500, ops in ranges(), piece in 1usize..40,
    ) {
        let (bits, plain) = model(len, &ops);
        let total = bits.byte_len() as usize;
        let mut all = vec![0xaa; total + 9];
        bits.read_bytes(0, &mut all);
        for i in 0..(total + 9) * 8 {
            let bit = all[i / 8] >> (i % 8) & 1 != 0;
            prop_assert_eq!(bit, plain.get(i).copied().unwrap_or(false));
        }
        let mut copy = Bits::new(len);
        for (n, chunk) in all.chunks(piece).enumerate() {
            let mut again = vec![0x55; chunk.len()];
            bits.read_bytes((n * piece) as u64, &mut again);
            prop_assert_eq!(&again, chunk);
            copy.write_bytes((n * piece) as u64, chunk);
        }
        prop_assert_eq!(copy, bits);
    }

    #[test]
    fn merging_covers_what_either_covers(
        size in 1u64..(1 << 20), ours in 9u8..16, theirs in 9u8..16, ops in ranges(),
    ) {
        let (other, _) = model(granules(size, theirs), &ops);
        let mut mine = Bits::for_disk(size, ours);
        prop_assert!(mine.merge_scaled(ours, &other, theirs, size));
        for i in 0..mine.len() {
            let bytes = (i << ours)..((i + 1) << ours).min(size);
            let last = (bytes.end - 1) >> theirs;
            let expected = (bytes.start >> theirs..=last).any(|g| other.get(g));
            prop_assert_eq!(mine.get(i), expected);
        }
    }
}

/// Ranges over a few pages, some of them whole ones.
fn wide_ranges() -> impl Strategy<Value = Vec<(u64, u64, bool)>> {
    let start = prop_oneof![0u64..200_000, (0u64..6).prop_map(|page| page * PAGE_BITS)];
    let size = prop_oneof![0u64..300, Just(PAGE_BITS), 0u64..100_000];
    proptest::collection::vec((start, size, any::<bool>()), 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn pages_come_and_go_unseen(
        len in 1u64..200_000, ops in wide_ranges(), more in wide_ranges(), block in 1u64..70_000,
    ) {
        let (bits, plain) = model(len, &ops);
        let mut found = vec![false; len as usize];
        bits.runs().for_each(|r| found[r.start as usize..r.end as usize].fill(true));
        prop_assert_eq!(&found, &plain);
        prop_assert_eq!(bits.count(), plain.iter().filter(|p| **p).count() as u64);
        let expected: Vec<_> = (0u64..).zip(plain.chunks(block as usize))
            .filter(|(_, bits)| bits.contains(&true)).map(|(at, _)| at).collect();
        prop_assert_eq!(bits.blocks(block).collect::<Vec<_>>(), expected);

        // Through bytes, and with pages of zeroes.
        let mut bytes = vec![0; bits.byte_len() as usize];
        bits.read_bytes(0, &mut bytes);
        let mut copy = Bits::new(len);
        copy.write_bytes(0, &bytes);
        prop_assert_eq!(&copy, &bits);
        prop_assert!(copy.held_bytes() <= bits.held_bytes());
        copy.set_range(0..len);
        copy.write_bytes(0, &bytes);
        prop_assert_eq!(&copy, &bits);
        prop_assert_eq!(copy.held_bytes(), len.div_ceil(PAGE_BITS) * PAGE_BYTES as u64);

        // A copy stays as it is, and merging is what both have.
        let (other, other_plain) = model(len, &more);
        let mut merged = bits.clone();
        prop_assert!(merged.merge(&other));
        for (at, (mine, theirs)) in (0..).zip(plain.iter().zip(&other_plain)) {
            prop_assert_eq!(merged.get(at), *mine || *theirs);
            prop_assert_eq!(bits.get(at), *mine);
        }
    }
}

#[test]
fn an_empty_giant_takes_no_memory_and_is_searched_at_once() {
    let mut bits = Bits::new(1 << 32);
    assert_eq!((bits.next_set(0), bits.next_clear(7), bits.held_bytes()), (None, Some(7), 0));
    bits.write_bytes(1 << 20, &[0; 9000]);
    bits.clear_range(0..1 << 32);
    assert_eq!(bits.held_bytes(), 0);
    bits.set_range((1 << 31) - 1..(1 << 31) + 1);
    let copy = bits.clone();
    assert_eq!((bits.held_bytes(), copy.count()), (2 * PAGE_BYTES as u64, 2));
    assert!(bits.runs().eq(std::iter::once((1 << 31) - 1..(1 << 31) + 1)));
    bits.clear_all();
    assert_eq!((bits.held_bytes(), copy.count()), (0, 2));
}

#[test]
fn stray_tail_bits_are_dropped() {
    let mut bits = Bits::new(70);
    bits.write_bytes(8, &[0xff; 8]);
    assert_eq!(bits.count(), 6);
    assert_eq!(bits.next_clear(64), None);
    bits.clear_all();
    bits.write_bytes(8, &[0xff]);
    assert!(bits.runs().eq(std::iter::once(64..70)));
    let mut other = Bits::new(71);
    assert!(!other.merge(&bits));
}
