//! A fast hash by which one process finds out whether what it reads is what it wrote.
//!
//! The content hash names a disk for anybody, so it must resist those who choose the content; that
//! has its price, and a copy would pay it twice. Whether a disk reads back as it was written is
//! another question: only the two readings of one process are held against one another, and nobody
//! who could tamper with them knows the key, which is drawn at random for each copy. For that a
//! *universal hash* is enough, and proved to be: NH (Black, Halevi, Krawczyk, Krovetz, Rogaway,
//! "UMAC", 1999) over 64-bit words. Two leaves that differ have equal hashes under at most one in
//! 2^64 keys, whatever they are. It costs one multiplication for 16 bytes.
//!
//! Leaves are put together as in the content hash, by the same [`Tree`]. Nothing of this is ever
//! stored or sent.

use format_spec::content_hash::{
    ContentHash, LEAF_BYTES, Node, Placed, hash_run_by, parent, zero_node,
};
use mig_core::block::is_zero;

#[cfg(doc)]
use format_spec::content_hash::Tree;

/// Bytes that one run over the key covers. Key and data fit the first-level cache together, and the
/// four sums of a leaf are what one node of the tree is made of.
const BLOCK_BYTES: usize = LEAF_BYTES / 4;
/// Key words per block.
const KEY_PAIRS: usize = BLOCK_BYTES / 16;

/// What the key is made from: 16 bytes of the system's randomness.
pub type Seed = [u8; 16];

/// What a disk read as, for whoever drew the seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fingerprint {
    /// The key's seed: a reading that is to be held against this one uses the same.
    pub seed: Seed,
    /// The root of the tree.
    pub root: ContentHash,
}

/// The key of one copy.
pub struct Key {
    pairs: Vec<[u64; 2]>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl Key {
    /// The key of a seed. Both readings use the same one.
    pub fn new(seed: &Seed) -> Self {
        let padded = |bytes: &[u8]| {
            let mut node = Node::default();
            node.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
            node
        };
        let root = padded(seed);
        let node = |n: u64| parent(&root, &padded(&n.to_le_bytes()));
        let pairs = (0..).map(node).flat_map(|node| {
            let (pairs, _) = node.as_chunks::<16>();
            [pairs.first().map_or([0; 2], words), pairs.last().map_or([0; 2], words)]
        });
        Self { pairs: pairs.take(KEY_PAIRS).collect() }
    }

    /// Hashes a run of leaves as [`hash_run`](format_spec::content_hash::hash_run) does.
    pub fn hash_run<'a>(
        &'a self,
        first_leaf: u64,
        bytes: &'a [u8],
    ) -> impl Iterator<Item = Placed> + 'a {
        hash_run_by(first_leaf, bytes, |bytes| self.leaf(bytes))
    }

    fn leaf(&self, bytes: &[u8]) -> Node {
        if is_zero(bytes) {
            return zero_node(0);
        }
        if bytes.len() < LEAF_BYTES {
            let mut whole = bytes.to_vec();
            whole.resize(LEAF_BYTES, 0);
            return self.leaf(&whole);
        }
        let mut sums = [0; 64];
        let blocks = bytes.chunks_exact(BLOCK_BYTES);
        for (sum, block) in sums.chunks_exact_mut(16).zip(blocks) {
            sum.copy_from_slice(&self.sum(block).to_le_bytes());
        }
        let (halves, _) = sums.as_chunks::<32>();
        match halves {
            [left, right] => parent(left, right),
            _ => Node::default(),
        }
    }

    /// NH of one block.
    fn sum(&self, block: &[u8]) -> u128 {
        let (data, _) = block.as_chunks::<16>();
        data.iter().zip(&self.pairs).fold(0, |sum: u128, (bytes, [k0, k1])| {
            let [m0, m1] = words(bytes);
            let product =
                u128::from(m0.wrapping_add(*k0)).wrapping_mul(u128::from(m1.wrapping_add(*k1)));
            sum.wrapping_add(product)
        })
    }
}

/// Two little-endian words.
fn words(bytes: &[u8; 16]) -> [u64; 2] {
    let both = u128::from_le_bytes(*bytes);
    let (low, high) = (both & u128::from(u64::MAX), both >> 64);
    [u64::try_from(low).unwrap_or_default(), u64::try_from(high).unwrap_or_default()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(key: &Key, bytes: &[u8]) -> Node {
        let placed: Vec<_> = key.hash_run(0, bytes).collect();
        assert_eq!(placed.len(), 1);
        placed[0].node
    }

    #[test]
    fn every_single_bit_counts() {
        let key = Key::new(&[7; 16]);
        let plain: Vec<u8> = (0..LEAF_BYTES).map(|n| u8::try_from(n * 31 % 251).unwrap()).collect();
        let expected = node(&key, &plain);
        assert_eq!(node(&key, &plain.clone()), expected);
        for at in [0, 7, 8, 15, 16, BLOCK_BYTES - 1, BLOCK_BYTES, LEAF_BYTES - 1] {
            for bit in 0..8 {
                let mut other = plain.clone();
                other[at] ^= 1 << bit;
                assert_ne!(node(&key, &other), expected, "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn what_moved_does_not_hash_alike() {
        let key = Key::new(&[9; 16]);
        let plain: Vec<u8> = (0..LEAF_BYTES).map(|n| u8::try_from(n / 16 % 251).unwrap()).collect();
        for distance in [8, 16, BLOCK_BYTES, LEAF_BYTES / 2] {
            let mut turned = plain.clone();
            turned.rotate_left(distance);
            assert_ne!(node(&key, &turned), node(&key, &plain), "by {distance}");
        }
        let mut swapped = plain.clone();
        swapped.swap(0, 8 + 16 * 300);
        assert_ne!(node(&key, &swapped), node(&key, &plain));
    }

    #[test]
    fn another_key_is_another_hash() {
        let bytes = vec![1; LEAF_BYTES];
        assert_ne!(node(&Key::new(&[1; 16]), &bytes), node(&Key::new(&[2; 16]), &bytes));
    }

    #[test]
    fn zeroes_are_zeroes_and_a_short_end_is_filled_up() {
        let key = Key::new(&[3; 16]);
        assert_eq!(node(&key, &vec![0; LEAF_BYTES]), zero_node(0));
        assert_eq!(node(&key, &[0; 512]), zero_node(0));
        let mut whole = vec![0; LEAF_BYTES];
        whole[..512].fill(5);
        assert_eq!(node(&key, &[5; 512]), node(&key, &whole));
    }

    #[test]
    fn keys_do_not_repeat() {
        let mut words: Vec<u64> = Key::new(&[0; 16]).pairs.into_iter().flatten().collect();
        assert_eq!(words.len(), 2 * KEY_PAIRS);
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), 2 * KEY_PAIRS);
    }
}
