//! The digest of a bitmap that changes: it costs what changed since it was last made.
//!
//! A leaf is hashed by BLAKE3, which cuts it into chunks of 1 KiB and joins their chaining values
//! two by two. Those values are kept, so that a leaf costs the chunks that changed and the path
//! above them, not its 64 KiB. Of a leaf of which much changed at a time, those of groups of eight
//! chunks are kept instead: such a group is hashed side by side, in about the time of two of its
//! chunks, and its values take a hundredth of the leaf. The same holds for leaves below the top.

use std::sync::LazyLock;

use blake3::hazmat::{HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root};

use super::tree::join;
use super::{
    BitmapDigest, DIGEST_KEY, HashError, LEAF_BYTES, LEAF_KEY, MAX_SIZE, Node, TREE_HEIGHT,
    leaf_count, zero_node,
};

/// Bytes that a bit of [`PatchedDigest::patch`] stands for: a chunk of BLAKE3, and a piece of a
/// bitmap on the wire.
pub const PATCH_BYTES: usize = blake3::CHUNK_LEN;
/// Chunks of a leaf.
const CHUNKS: usize = LEAF_BYTES / PATCH_BYTES;
/// So many that change in a leaf at a time are hashed one by one.
const FEW_CHUNKS: u32 = 32;
/// Chunks of a group.
const GROUP_CHUNKS: usize = 8;
const GROUP_BYTES: usize = PATCH_BYTES * GROUP_CHUNKS;
/// Groups of a leaf.
const GROUPS: usize = LEAF_BYTES / GROUP_BYTES;

/// The digest of a bitmap of which parts are put again and again. SPEC 2.
#[derive(Debug)]
pub struct PatchedDigest {
    granularity: u64,
    bits: u64,
    leaves: u64,
    /// The nodes of each height, up to the one above all leaves. Empty where all are those of
    /// zeroes.
    levels: Vec<Vec<Node>>,
    /// What leaves are made of, where it was ever looked at. Empty where none was.
    inner: Vec<Option<Inner>>,
    /// Leaves that changed since the nodes above them were made.
    changed: Vec<u64>,
    digest: Option<BitmapDigest>,
}

impl PatchedDigest {
    /// Of a bitmap of `bits` granules of `granularity` bytes, none of which is set.
    pub fn new(granularity: u64, bits: u64) -> Result<Self, HashError> {
        let size = bits.div_ceil(64).saturating_mul(8);
        if size > MAX_SIZE {
            return Err(HashError::TooLarge { size });
        }
        let leaves = leaf_count(size);
        let height = leaves.max(1).next_power_of_two().trailing_zeros();
        let levels = (0..=height).map(|_| Vec::new()).collect();
        let (inner, changed, digest) = (Vec::new(), Vec::new(), None);
        Ok(Self { granularity, bits, leaves, levels, inner, changed, digest })
    }

    /// Chunks of a leaf have changed, those whose bits are set in `chunks`: chunk `n` is the
    /// [`PATCH_BYTES`] at `n × PATCH_BYTES` of it. `read` fills a buffer with the bitmap's bytes
    /// from an offset on, zeroes behind the end; bits behind the last granule are clear.
    pub fn patch(
        &mut self,
        leaf_index: u64,
        chunks: u64,
        mut read: impl FnMut(u64, &mut [u8]),
    ) -> Result<(), HashError> {
        if leaf_index >= self.leaves {
            return Err(HashError::Outside { height: 0, leaf: leaf_index, leaves: self.leaves });
        }
        if self.inner.is_empty() {
            self.inner.resize_with(in_memory(self.leaves), || None);
        }
        let Some(place) = self.inner.get_mut(in_memory(leaf_index)) else { return Ok(()) };
        let is_few = chunks.count_ones() <= FEW_CHUNKS;
        let mut chunks = chunks;
        let mut inner = match place.take() {
            Some(inner) if inner.parts() == CHUNKS && !is_few => {
                chunks = u64::MAX;
                ZERO_GROUPS.clone()
            }
            Some(inner) => inner,
            // What was never looked at was never anything but zero.
            None if is_few => ZERO_CHUNKS.clone(),
            None => ZERO_GROUPS.clone(),
        };
        let start = leaf_index.saturating_mul(LEAF_BYTES as u64);
        inner.patch(chunks, |at, bytes| read(start.saturating_add(at), bytes));
        let node = inner.node();
        *place = Some(inner);
        self.put(0, leaf_index, node);
        self.changed.push(leaf_index);
        self.digest = None;
        Ok(())
    }

    /// The digest as of the last patch.
    pub fn digest(&mut self) -> BitmapDigest {
        if let Some(digest) = self.digest {
            return digest;
        }
        let mut at = std::mem::take(&mut self.changed);
        at.sort_unstable();
        let top = self.levels.len().saturating_sub(1);
        for height in 0..top {
            at.iter_mut().for_each(|index| *index = index.checked_shr(1).unwrap_or(0));
            at.dedup();
            for index in &at {
                let left = self.get(height, index.saturating_mul(2));
                let right = self.get(height, index.saturating_mul(2).saturating_add(1));
                let node = join(in_tree(height), &left, &right);
                self.put(height.saturating_add(1), *index, node);
            }
        }
        let heights = in_tree(top)..TREE_HEIGHT;
        let start = self.get(top, 0);
        let top = heights.fold(start, |node, height| join(height, &node, &zero_node(height)));
        let mut hasher = blake3::Hasher::new_keyed(DIGEST_KEY);
        hasher.update(&self.granularity.to_le_bytes()).update(&self.bits.to_le_bytes());
        let digest = BitmapDigest(*hasher.update(&top).finalize().as_bytes());
        self.digest = Some(digest);
        digest
    }

    /// The leaves that are not zero with their nodes, in rising order.
    pub fn leaves(&self) -> impl Iterator<Item = (u64, Node)> + '_ {
        let nodes = self.levels.first().into_iter().flatten();
        (0..).zip(nodes.copied()).filter(|(_, node)| *node != zero_node(0))
    }

    fn get(&self, height: usize, index: u64) -> Node {
        let node = self.levels.get(height).and_then(|level| level.get(in_memory(index)));
        node.copied().unwrap_or_else(|| zero_node(in_tree(height)))
    }

    fn put(&mut self, height: usize, index: u64, node: Node) {
        let Some(level) = self.levels.get_mut(height) else { return };
        let zero = zero_node(in_tree(height));
        if level.is_empty() && node != zero {
            let shift = u32::try_from(height).unwrap_or(u32::MAX);
            let nodes = self.leaves.div_ceil(1u64.checked_shl(shift).unwrap_or(u64::MAX));
            level.resize(in_memory(nodes), zero);
        }
        let place = level.get_mut(in_memory(index));
        place.into_iter().for_each(|place| *place = node);
    }
}

fn in_memory(count: u64) -> usize {
    usize::try_from(count).unwrap_or(usize::MAX)
}

fn in_tree(height: usize) -> u8 {
    u8::try_from(height).unwrap_or(TREE_HEIGHT).min(TREE_HEIGHT)
}

/// The chaining values inside of one leaf: those of its parts, [`CHUNKS`] or [`GROUPS`] of them,
/// then those above, level by level, up to the two that its node is made of.
#[derive(Debug, Clone)]
struct Inner(Box<[Node]>);

/// Of leaves of zeroes.
static ZERO_CHUNKS: LazyLock<Inner> = LazyLock::new(|| Inner::of_zeroes(CHUNKS));
static ZERO_GROUPS: LazyLock<Inner> = LazyLock::new(|| Inner::of_zeroes(GROUPS));

impl Inner {
    fn of_zeroes(parts: usize) -> Self {
        let nodes = vec![Node::default(); parts.saturating_mul(2).saturating_sub(2)];
        let mut inner = Self(nodes.into_boxed_slice());
        let part = vec![0; LEAF_BYTES.checked_div(parts).unwrap_or_default()];
        for at in 0..parts {
            inner.set(at, value(at.saturating_mul(part.len()) as u64, &part));
        }
        inner
    }

    fn parts(&self) -> usize {
        (self.0.len() / 2).saturating_add(1)
    }

    /// Makes the values of these chunks, or of the groups that they are in, and those above. `read`
    /// fills a buffer with what stands at a byte of the leaf.
    fn patch(&mut self, chunks: u64, mut read: impl FnMut(u64, &mut [u8])) {
        let mut bytes = [0; GROUP_BYTES];
        let (per_part, parts) = match self.parts() {
            CHUNKS => (1, CHUNKS),
            _ => (GROUP_CHUNKS, GROUPS),
        };
        let len = PATCH_BYTES.saturating_mul(per_part);
        let bytes = bytes.get_mut(..len).unwrap_or_default();
        for part in 0..parts {
            let shift = u32::try_from(part.saturating_mul(per_part)).unwrap_or(u32::MAX);
            let mask = if per_part == 1 { 1 } else { 0xff };
            if chunks.checked_shr(shift).unwrap_or(0) & mask != 0 {
                let at = part.saturating_mul(len) as u64;
                read(at, bytes);
                self.set(part, value(at, bytes));
            }
        }
    }

    fn set(&mut self, part: usize, mut value: Node) {
        let (mut at, mut width) = (part, self.parts());
        let mut rest = &mut *self.0;
        while let Some((level, above)) = rest.split_at_mut_checked(width) {
            if let Some(place) = level.get_mut(at) {
                *place = value;
            }
            if above.is_empty() {
                return;
            }
            let sibling = level.get(at ^ 1).copied().unwrap_or_default();
            let (left, right) = if at & 1 == 0 { (&value, &sibling) } else { (&sibling, &value) };
            value = merge_subtrees_non_root(left, right, Mode::KeyedHash(LEAF_KEY));
            (at, rest, width) = (at / 2, above, width / 2);
        }
    }

    fn node(&self) -> Node {
        match self.0.last_chunk::<2>() {
            Some([left, right]) => {
                *merge_subtrees_root(left, right, Mode::KeyedHash(LEAF_KEY)).as_bytes()
            }
            None => Node::default(),
        }
    }
}

/// The chaining value of a part at a byte of its leaf.
fn value(at: u64, bytes: &[u8]) -> Node {
    let mut hasher = blake3::Hasher::new_keyed(LEAF_KEY);
    hasher.set_input_offset(at).update(bytes);
    hasher.finalize_non_root()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::super::bitmap_digest;
    use super::*;

    /// A bitmap in words, and its patched digest.
    struct Both {
        words: Vec<u64>,
        patched: PatchedDigest,
    }

    impl Both {
        fn new(bits: u64) -> Self {
            let words = vec![0; usize::try_from(bits.div_ceil(64)).unwrap()];
            Self { words, patched: PatchedDigest::new(512, bits).unwrap() }
        }

        fn change(&mut self, at: usize, word: u64) {
            self.words[at] = word;
        }

        fn patch(&mut self, leaf: u64, chunks: u64) {
            let words = &self.words;
            self.patched
                .patch(leaf, chunks, |offset, bytes| {
                    let first = usize::try_from(offset / 8).unwrap();
                    for (bytes, at) in bytes.chunks_mut(8).zip(first..) {
                        bytes.copy_from_slice(&words.get(at).unwrap_or(&0).to_le_bytes());
                    }
                })
                .unwrap();
        }

        fn check(&mut self) {
            let expected = bitmap_digest(512, self.patched.bits, &self.words).unwrap();
            assert_eq!(self.patched.digest(), expected);
        }
    }

    proptest! {
        #[test]
        fn it_is_the_digest_of_what_is_there(
            words in 1u64..40_000,
            passes in proptest::collection::vec(
                (proptest::collection::vec((0usize..40_000, any::<bool>()), 0..40), any::<bool>()),
                1..6,
            ),
        ) {
            let mut both = Both::new(words * 64);
            both.check();
            for (changes, is_dense) in passes {
                let mut stale = BTreeMap::<u64, u64>::new();
                for (at, is_set) in changes {
                    let at = at % both.words.len();
                    // Dense: neighbours, so that many chunks of a leaf change.
                    let last = if is_dense { at + 5000 } else { at + 1 };
                    for at in at..last.min(both.words.len()) {
                        both.change(at, if is_set { at as u64 | 1 } else { 0 });
                        *stale.entry(at as u64 / 8192).or_default() |= 1 << (at / 128 % 64);
                    }
                }
                for (leaf, chunks) in stale {
                    both.patch(leaf, chunks);
                }
                both.check();
            }
        }
    }

    #[test]
    fn what_was_cleared_is_zero_again_and_what_is_outside_is_refused() {
        let mut both = Both::new(1 << 20);
        let empty = both.patched.digest();
        both.change(9000, 5);
        both.patch(1, 1 << 6);
        assert_ne!(both.patched.digest(), empty);
        both.change(9000, 0);
        both.patch(1, 1 << 6);
        assert_eq!(both.patched.digest(), empty);
        assert_eq!(both.patched.leaves().count(), 0);
        assert!(both.patched.patch(2, 1, |_, _| {}).is_err());
        let empty = PatchedDigest::new(512, 0).unwrap().digest();
        assert_eq!(empty, bitmap_digest(512, 0, &[]).unwrap());
        assert!(PatchedDigest::new(512, u64::MAX).is_ok());
    }
}
