//! The guest-visible content hash and the bitmap digest. SPEC chapter 2.
//!
//! A hash tree over fixed leaves in which a subtree of zeroes has the same hash wherever it stands:
//! a sparse disk costs what its data costs. The functions here are pure and may run on any thread;
//! workers hash what they moved and hand the nodes to the one owner of a [`Tree`], in any order.

mod digest;
mod name;
mod patched;
mod tree;

use std::sync::LazyLock;

pub use digest::{DigestBuilder, bitmap_digest};
pub use name::{BitmapDigest, ContentHash, NameError};
pub use patched::{PATCH_BYTES, PatchedDigest};
pub use tree::{HashError, MAX_FRAGMENTS, Missing, Tree};

/// Bytes of guest content below one leaf.
pub const LEAF_BYTES: usize = 65536;
/// Height of the top; the tree always spans 2^47 leaves, whatever the disk's size.
pub const TREE_HEIGHT: u8 = 47;
/// Height of the unit that journals keep: one node per MiB.
pub const LEDGER_HEIGHT: u8 = 4;
/// Largest disk that has a content hash.
pub const MAX_SIZE: u64 = 1 << 63;
/// Key of leaves.
pub const LEAF_KEY: &[u8; 32] = b"bitferry bf1 content leaf       ";
/// Key of inner nodes.
pub const NODE_KEY: &[u8; 32] = b"bitferry bf1 content node       ";
/// Key of the root, which binds the size.
pub const ROOT_KEY: &[u8; 32] = b"bitferry bf1 content root       ";
/// Key of the bitmap digest.
pub const DIGEST_KEY: &[u8; 32] = b"bitferry bf1 bitmap digest      ";
/// What a written content hash begins with.
pub const CONTENT_PREFIX: &str = "bf1:";
/// What a written bitmap digest begins with.
pub const DIGEST_PREFIX: &str = "bf1b:";

/// The hash of a leaf or of a subtree.
pub type Node = [u8; 32];

static ZERO_BYTES: [u8; LEAF_BYTES] = [0; LEAF_BYTES];

static ZERO_NODES: LazyLock<Vec<Node>> = LazyLock::new(|| {
    let leaf = *blake3::keyed_hash(LEAF_KEY, &ZERO_BYTES).as_bytes();
    std::iter::successors(Some(leaf), |below| Some(parent(below, below)))
        .take(usize::from(TREE_HEIGHT).saturating_add(1))
        .collect()
});

/// The node of a leaf. Less than [`LEAF_BYTES`] is filled up with zeroes: only the end of a disk is
/// that short. The whole of a zero leaf is hashed too; [`zero_node`] is the constant.
pub fn leaf(bytes: &[u8]) -> Node {
    debug_assert!(bytes.len() <= LEAF_BYTES, "a leaf of {} bytes", bytes.len());
    if bytes.len() == LEAF_BYTES {
        return *blake3::keyed_hash(LEAF_KEY, bytes).as_bytes();
    }
    let mut hasher = blake3::Hasher::new_keyed(LEAF_KEY);
    hasher.update(bytes);
    hasher.update(ZERO_BYTES.get(bytes.len()..).unwrap_or_default());
    *hasher.finalize().as_bytes()
}

/// The node above two neighbours.
pub fn parent(left: &Node, right: &Node) -> Node {
    *blake3::keyed_hash(NODE_KEY, [*left, *right].as_flattened()).as_bytes()
}

/// The node of a subtree of zeroes. Heights above [`TREE_HEIGHT`] do not exist and count as it.
pub fn zero_node(height: u8) -> Node {
    let at = usize::from(height.min(TREE_HEIGHT));
    ZERO_NODES.get(at).copied().unwrap_or_default()
}

/// The node at `height` over `bytes`, at most `LEAF_BYTES << height` of them; what is missing
/// counts as zeroes. Leaves for which `is_zero` says yes are not hashed: pass a zero test, or
/// `|_| false` where zeroes are known to be rare. Allocates nothing.
///
/// ```
/// use format_spec::content_hash::{leaf, parent, subtree};
/// let bytes = vec![7; 3 << 15]; // a leaf and a half
/// let (first, second) = bytes.split_at(65536);
/// assert_eq!(subtree(1, &bytes, &|_| false), parent(&leaf(first), &leaf(second)));
/// ```
pub fn subtree(height: u8, bytes: &[u8], is_zero: &impl Fn(&[u8]) -> bool) -> Node {
    subtree_by(height, bytes, &|bytes| if is_zero(bytes) { zero_node(0) } else { leaf(bytes) })
}

fn subtree_by(height: u8, bytes: &[u8], leaf: &impl Fn(&[u8]) -> Node) -> Node {
    if bytes.is_empty() {
        return zero_node(height);
    }
    let Some(below) = height.checked_sub(1) else { return leaf(bytes) };
    let half = usize::try_from(span(below)).unwrap_or(usize::MAX).saturating_mul(LEAF_BYTES);
    let (left, right) = bytes.split_at_checked(half).unwrap_or((bytes, &[]));
    let (left, right) = (subtree_by(below, left, leaf), subtree_by(below, right, leaf));
    let zero = zero_node(below);
    if left == zero && right == zero { zero_node(height) } else { parent(&left, &right) }
}

/// A node and where it stands: `T(height, index)` of SPEC 2.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Height above the leaves.
    pub height: u8,
    /// Position among the nodes of that height.
    pub index: u64,
    /// The hash.
    pub node: Node,
}

/// Hashes a run of leaves that starts at leaf `first_leaf`: cuts it into the largest aligned
/// subtrees and yields the node of each. Only the last leaf of a disk may be short.
pub fn hash_run<'a, Z>(
    first_leaf: u64,
    bytes: &'a [u8],
    is_zero: Z,
) -> impl Iterator<Item = Placed> + 'a
where
    Z: Fn(&[u8]) -> bool + 'a,
{
    hash_run_by(
        first_leaf,
        bytes,
        move |bytes| {
            if is_zero(bytes) { zero_node(0) } else { leaf(bytes) }
        },
    )
}

/// [`hash_run`] with another function in place of [`leaf`], for trees that stay inside one process.
/// It must answer `zero_node(0)` for zeroes, or runs of them would not hash alike everywhere.
pub fn hash_run_by<'a, L>(
    first_leaf: u64,
    bytes: &'a [u8],
    leaf: L,
) -> impl Iterator<Item = Placed> + 'a
where
    L: Fn(&[u8]) -> Node + 'a,
{
    let mut at = first_leaf;
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let leaves = rest.len().div_ceil(LEAF_BYTES) as u64;
        let height = largest_aligned(at, leaves)?;
        let len = usize::try_from(span(height)).ok()?.saturating_mul(LEAF_BYTES);
        let (head, tail) = rest.split_at_checked(len).unwrap_or((rest, &[]));
        let placed =
            Placed { height, index: index_of(at, height), node: subtree_by(height, head, &leaf) };
        at = at.saturating_add(span(height));
        rest = tail;
        Some(placed)
    })
}

/// Leaves of a disk of `size` bytes.
pub fn leaf_count(size: u64) -> u64 {
    size.div_ceil(LEAF_BYTES as u64)
}

/// Leaves below a node.
fn span(height: u8) -> u64 {
    1u64.checked_shl(u32::from(height)).unwrap_or(u64::MAX)
}

/// Index of the node at `height` over `leaf`.
fn index_of(leaf: u64, height: u8) -> u64 {
    leaf.checked_shr(u32::from(height)).unwrap_or(0)
}

/// Height of the largest subtree that starts at leaf `at` and spans at most `leaves`.
fn largest_aligned(at: u64, leaves: u64) -> Option<u8> {
    let by_length = leaves.checked_ilog2()?;
    let height = at.trailing_zeros().min(by_length).min(u32::from(TREE_HEIGHT));
    u8::try_from(height).ok()
}

/// The root over a top node.
fn root(size: u64, top: &Node) -> Node {
    let mut hasher = blake3::Hasher::new_keyed(ROOT_KEY);
    hasher.update(&size.to_le_bytes()).update(top);
    *hasher.finalize().as_bytes()
}
