//! Makes other inputs of good ones.

use crate::random::Random;

/// Values that parsers get wrong: ends of ranges, signs, counts that multiply beyond a word.
const NUMBERS: &[u64] = &[
    0,
    1,
    2,
    7,
    8,
    9,
    31,
    63,
    64,
    255,
    511,
    512,
    513,
    4095,
    4096,
    65535,
    65536,
    65537,
    1 << 20,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 32,
    1 << 55,
    1 << 56,
    1 << 61,
    1 << 62,
    (1 << 63) - 1,
    1 << 63,
    u64::MAX - 511,
    u64::MAX,
];

/// Changes `input` in one to eight places. Half of the changes are near the start, where headers
/// are.
pub fn mutate(input: &[u8], random: &mut Random) -> Vec<u8> {
    let mut bytes = input.to_vec();
    for _ in 0..=random.below(8) {
        change(&mut bytes, random);
    }
    bytes
}

fn index(random: &mut Random, len: usize) -> usize {
    let near = if random.one_in(2) { len.min(512) } else { len };
    usize::try_from(random.below(near.max(1) as u64)).expect("an index")
}

fn change(bytes: &mut Vec<u8>, random: &mut Random) {
    let at = index(random, bytes.len());
    let number = if random.one_in(8) { random.next() } else { *random.pick(NUMBERS) };
    match random.below(16) {
        0..=3 => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
        4 | 5 => put(bytes, at, &number.to_be_bytes()[7..]),
        6 => put(bytes, at & !1, &number.to_be_bytes()[6..]),
        7 => put(bytes, at & !3, &number.to_be_bytes()[4..]),
        8 | 9 => put(bytes, at & !7, &number.to_be_bytes()),
        10 => put(bytes, at, &number.to_be_bytes()[4..]),
        11 => put(bytes, at & !7, &number.to_le_bytes()),
        12 => {
            // A stretch of it stands in another place too.
            let from = index(random, bytes.len());
            let len = index(random, bytes.len().min(64)).min(bytes.len() - from.min(bytes.len()));
            let stretch = bytes[from..from + len].to_vec();
            put(bytes, at, &stretch);
        }
        13 => bytes.truncate(at),
        14 => {
            let byte = random.next().to_be_bytes()[0];
            bytes.insert(at.min(bytes.len()), byte);
        }
        _ => {
            let len = index(random, bytes.len().min(64));
            let end = (at + len).min(bytes.len());
            bytes.drain(at.min(end)..end);
        }
    }
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    for (byte, new) in bytes.iter_mut().skip(at).zip(new) {
        *byte = *new;
    }
}
