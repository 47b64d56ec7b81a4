//! Where nodes are put together.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{
    ContentHash, MAX_SIZE, Node, TREE_HEIGHT, index_of, largest_aligned, leaf_count, parent, root,
    span, zero_node,
};

/// Most fragments a [`Tree`] holds: about 64 MiB of them.
pub const MAX_FRAGMENTS: usize = 1 << 20;

/// A wrong use of a [`Tree`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HashError {
    /// The disk is too large to have a content hash.
    #[error("a size of {size} bytes exceeds the limit of {MAX_SIZE}")]
    TooLarge {
        /// The size asked for.
        size: u64,
    },
    /// A node or range that does not lie in the disk.
    #[error("the node at height {height} over leaf {leaf} is outside the disk's {leaves} leaves")]
    Outside {
        /// Height of the node.
        height: u8,
        /// First leaf below it.
        leaf: u64,
        /// Leaves the disk has.
        leaves: u64,
    },
    /// Nodes arrived in too wild an order.
    #[error("more than {MAX_FRAGMENTS} separate pieces of the hash tree")]
    TooManyFragments,
    /// Some leaves were never put.
    #[error(transparent)]
    Missing(#[from] Missing),
}

/// The first run of leaves without a hash.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no hash for leaves {} to {}", .leaves.start, .leaves.end.saturating_sub(1))]
pub struct Missing {
    /// The leaves, counted from the start of the disk.
    pub leaves: Range<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Fragment {
    height: u8,
    node: Node,
}

impl Fragment {
    fn is_zero(&self) -> bool {
        self.node == zero_node(self.height)
    }
}

/// Collects the nodes of one disk, in any order and from any number of workers (by way of the one
/// owner or a lock around it: putting a node costs far less than making it).
///
/// It holds *fragments*: complete aligned subtrees that do not overlap. Neighbours are folded at
/// once up to the height that [`Tree::keeping`] sets, zeroes above it too, so memory follows the
/// number of gaps, not the disk. What is put again replaces what was there. A piece of a fragment
/// cannot be taken back out of its hash: where a smaller node replaces part of a folded one, the
/// rest of that one is missing again, and the caller hashes it anew. (A subtree of zeroes splits
/// without loss.)
#[derive(Debug, Clone)]
pub struct Tree {
    size: u64,
    leaves: u64,
    keep: u8,
    /// By first leaf.
    fragments: BTreeMap<u64, Fragment>,
}

impl Tree {
    /// A tree without nodes for a disk of `size` bytes. Everything that can be folded is.
    pub fn new(size: u64) -> Result<Self, HashError> {
        Self::keeping(size, TREE_HEIGHT)
    }

    /// Like [`new`](Tree::new), but nodes up to `height` stay replaceable: data is not folded above
    /// it. Costs about 64 bytes per node of that height that is not zero.
    pub fn keeping(size: u64, height: u8) -> Result<Self, HashError> {
        if size > MAX_SIZE {
            return Err(HashError::TooLarge { size });
        }
        Ok(Self { size, leaves: leaf_count(size), keep: height, fragments: BTreeMap::new() })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fragments held now; what memory is spent on.
    pub fn fragments(&self) -> usize {
        self.fragments.len()
    }

    /// Sets `T(height, index)`. It must begin inside the disk; leaves below it that lie beyond the
    /// end are zeroes by definition.
    pub fn put(&mut self, height: u8, index: u64, node: Node) -> Result<(), HashError> {
        let first = index.saturating_mul(span(height));
        if height > TREE_HEIGHT || first >= self.leaves {
            return Err(HashError::Outside { height, leaf: first, leaves: self.leaves });
        }
        self.place(first, Fragment { height, node })
    }

    /// Sets a run of leaves to zeroes, at the cost of its two ends.
    pub fn put_zeroes(&mut self, leaves: Range<u64>) -> Result<(), HashError> {
        if leaves.end > self.leaves {
            return Err(HashError::Outside { height: 0, leaf: leaves.end, leaves: self.leaves });
        }
        // Beyond the end all is zero, so that the last piece may be as large as its alignment
        // allows.
        let end = if leaves.end == self.leaves { span(TREE_HEIGHT) } else { leaves.end };
        let mut at = leaves.start;
        while at < leaves.end {
            let Some(height) = largest_aligned(at, end.saturating_sub(at)) else { break };
            self.place(at, Fragment { height, node: zero_node(height) })?;
            at = at.saturating_add(span(height));
        }
        Ok(())
    }

    /// The node at this place, if it is held just so or follows from zeroes.
    pub fn get(&self, height: u8, index: u64) -> Option<Node> {
        let first = index.checked_mul(span(height))?;
        let (start, found) = self.covering(first)?;
        if start == first && found.height == height {
            Some(found.node)
        } else if found.height > height && found.is_zero() {
            Some(zero_node(height))
        } else {
            None
        }
    }

    /// Runs of leaves that have no hash yet, in order.
    pub fn missing(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let ends = std::iter::once((self.leaves, self.leaves));
        let held =
            self.fragments.iter().map(|(start, f)| (*start, start.saturating_add(span(f.height))));
        held.chain(ends)
            .scan(0u64, |end, (start, next)| {
                let gap = *end..start.min(self.leaves);
                *end = next;
                Some(gap)
            })
            .filter(|gap| gap.start < gap.end)
    }

    /// The content hash, once no leaf is missing.
    pub fn root(&self) -> Result<ContentHash, Missing> {
        match self.missing().next() {
            Some(leaves) => Err(Missing { leaves }),
            None => Ok(ContentHash(root(self.size, &self.top()))),
        }
    }

    /// `T(47, 0)`, with zeroes for what is missing.
    pub(super) fn top(&self) -> Node {
        self.fold(TREE_HEIGHT, 0)
    }

    fn fold(&self, height: u8, first: u64) -> Node {
        let end = first.saturating_add(span(height));
        match self.fragments.range(first..end).next() {
            None => return zero_node(height),
            Some((start, f)) if *start == first && f.height == height => return f.node,
            Some(_) => {}
        }
        let Some(below) = height.checked_sub(1) else { return zero_node(height) };
        let left = self.fold(below, first);
        let right = self.fold(below, first.saturating_add(span(below)));
        join(below, &left, &right)
    }

    fn covering(&self, leaf: u64) -> Option<(u64, Fragment)> {
        let (start, f) = self.fragments.range(..=leaf).next_back()?;
        (leaf < start.saturating_add(span(f.height))).then_some((*start, *f))
    }

    fn place(&mut self, first: u64, new: Fragment) -> Result<(), HashError> {
        match self.covering(first) {
            Some((_, old)) if old.height > new.height && old.is_zero() && new.is_zero() => {
                return Ok(());
            }
            Some((start, old)) if old.height > new.height => {
                self.fragments.remove(&start);
                if old.is_zero() {
                    self.keep_zeroes_around(first, new.height, old.height);
                }
            }
            _ => self.clear(first..first.saturating_add(span(new.height))),
        }
        self.fold_in(first, new);
        if self.fragments.len() > MAX_FRAGMENTS { Err(HashError::TooManyFragments) } else { Ok(()) }
    }

    fn clear(&mut self, leaves: Range<u64>) {
        while let Some(start) = self.fragments.range(leaves.clone()).next().map(|(start, _)| *start)
        {
            self.fragments.remove(&start);
        }
    }

    /// Puts back what stays zero of a zero subtree of height `top` when the node at `height` over
    /// leaf `first` is taken out of it.
    fn keep_zeroes_around(&mut self, first: u64, height: u8, top: u8) {
        for height in height..top {
            let sibling = (index_of(first, height) ^ 1).saturating_mul(span(height));
            if sibling >= self.leaves {
                continue; // zero without being held
            }
            self.fragments.insert(sibling, Fragment { height, node: zero_node(height) });
        }
    }

    /// Inserts a fragment where nothing stands, joined with its siblings as far as they are there.
    fn fold_in(&mut self, mut first: u64, mut new: Fragment) {
        while new.height < TREE_HEIGHT {
            let index = index_of(first, new.height);
            let other = (index ^ 1).saturating_mul(span(new.height));
            let sibling = match self.fragments.get(&other) {
                Some(f) if f.height == new.height => f.node,
                None if other >= self.leaves => zero_node(new.height),
                _ => break,
            };
            let both_zero = new.is_zero() && sibling == zero_node(new.height);
            if new.height >= self.keep && !both_zero {
                break;
            }
            self.fragments.remove(&other);
            let (left, right) =
                if first < other { (&new.node, &sibling) } else { (&sibling, &new.node) };
            let node = join(new.height, left, right);
            first = first.min(other);
            new = Fragment { height: new.height.saturating_add(1), node };
        }
        self.fragments.insert(first, new);
    }
}

/// The node above two nodes of `height`; zeroes by constant.
pub(super) fn join(height: u8, left: &Node, right: &Node) -> Node {
    let zero = zero_node(height);
    if *left == zero && *right == zero {
        zero_node(height.saturating_add(1))
    } else {
        parent(left, right)
    }
}
