//! What each unit of a disk hashes to: `T(4, i)` of SPEC 2 for every MiB, in memory that does not
//! grow with the disk.
//!
//! A unit is *unknown*, *zero*, or has a node. Nodes lie in pages of 1024; pages that hold nothing
//! of their own cost nothing, and those that exceed [`limits::LEDGER_PAGES`] lie in an unlinked
//! file. Each page remembers what it folds to until one of its units changes, so that the root
//! costs what changed since it was last asked for.

mod ranges;
mod shelf;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::PathBuf;

use format_spec::content_hash::{
    ContentHash, HashError, LEAF_BYTES, LEDGER_HEIGHT, MAX_SIZE, Missing, Node, Tree, leaf_count,
    parent, zero_node,
};

pub(crate) use self::ranges::RangeSet;
use self::shelf::Shelf;
use crate::error::Result;
use crate::limits;

/// Bytes of a disk below one unit.
pub const UNIT_BYTES: u64 = (LEAF_BYTES as u64) << LEDGER_HEIGHT;
/// log2 of the units in a page.
const PAGE_BITS: u8 = 10;
/// Units in a page.
const PAGE_UNITS: u64 = 1 << PAGE_BITS;
/// Height of the node above a page.
const PAGE_HEIGHT: u8 = LEDGER_HEIGHT + PAGE_BITS;
/// Stands for a unit that is unknown. No content has this hash.
const UNKNOWN: Node = [0; 32];

/// What is known of one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Nothing.
    Unknown,
    /// It reads as zero.
    Zero,
    /// Its node, which is not that of zeroes.
    Node(Node),
}

/// A run of units that are alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stretch<'a> {
    /// Nothing is known of these.
    Unknown(Range<u64>),
    /// These read as zero.
    Zeroes(Range<u64>),
    /// From this unit on, one node each; none is that of zeroes.
    Nodes(u64, &'a [Node]),
}

impl Stretch<'_> {
    /// The units.
    pub fn units(&self) -> Range<u64> {
        match self {
            Self::Unknown(units) | Self::Zeroes(units) => units.clone(),
            Self::Nodes(first, nodes) => *first..first.saturating_add(nodes.len() as u64),
        }
    }
}

/// Where pages go that memory has no room for.
#[derive(Debug, Clone)]
pub struct Room {
    /// Pages of 32 KiB that stay in memory.
    pub pages: usize,
    /// Directory of the unlinked file for the others, which is made when it is needed.
    pub directory: PathBuf,
}

impl Default for Room {
    /// [`limits::LEDGER_PAGES`], and `$TMPDIR` or `/var/tmp`: `/tmp` is memory on many hosts.
    fn default() -> Self {
        let directory = std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from);
        Self { pages: limits::LEDGER_PAGES, directory }
    }
}

/// The nodes of one disk's units. One owner; put a lock around it to share it, each call but
/// [`root`](Self::root) costs at most two transfers of 32 KiB.
#[derive(Debug)]
pub struct Ledger {
    size: u64,
    units: u64,
    /// Pages that are zero as a whole. What is neither here nor on the shelf is unknown.
    zeroes: RangeSet,
    shelf: Shelf,
}

impl Ledger {
    /// A ledger that knows nothing, for a disk of `size` bytes.
    pub fn new(size: u64) -> Result<Self> {
        Self::with_room(size, Room::default())
    }

    /// Like [`new`](Self::new), with another bound of memory.
    pub fn with_room(size: u64, room: Room) -> Result<Self> {
        if size > MAX_SIZE {
            return Err(HashError::TooLarge { size }.into());
        }
        let units = size.div_ceil(UNIT_BYTES);
        Ok(Self { size, units, zeroes: RangeSet::default(), shelf: Shelf::new(room) })
    }

    /// Size of the disk in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Units of the disk; the last one may be short.
    pub fn units(&self) -> u64 {
        self.units
    }

    /// What is known of a unit. Beyond the end everything is zero.
    pub fn get(&mut self, unit: u64) -> Result<Entry> {
        let page = unit >> PAGE_BITS;
        if unit >= self.units || self.zeroes.contains(page) {
            return Ok(Entry::Zero);
        }
        if !self.shelf.has(page) {
            return Ok(Entry::Unknown);
        }
        let nodes = self.shelf.nodes(page)?;
        let node = nodes.get(in_page(unit)).copied().unwrap_or(UNKNOWN);
        Ok(match node {
            UNKNOWN => Entry::Unknown,
            node if node == zero_node(LEDGER_HEIGHT) => Entry::Zero,
            node => Entry::Node(node),
        })
    }

    /// Sets a unit's node, that of zeroes included. 32 zero bytes, which no content has, make it
    /// unknown.
    pub fn set(&mut self, unit: u64, node: Node) -> Result<()> {
        self.check(unit.saturating_add(1))?;
        self.fill(unit..unit.saturating_add(1), node)
    }

    /// Makes units zero. Costs nothing for whole pages.
    pub fn set_zeroes(&mut self, units: Range<u64>) -> Result<()> {
        self.check(units.end)?;
        self.fill(units, zero_node(LEDGER_HEIGHT))
    }

    /// Makes units unknown.
    pub fn forget(&mut self, units: Range<u64>) -> Result<()> {
        self.check(units.end)?;
        self.fill(units, UNKNOWN)
    }

    /// The run of units of one kind that starts at `from`, or a part of it; `None` at the end.
    pub fn stretch(&mut self, from: u64) -> Result<Option<Stretch<'_>>> {
        if from >= self.units {
            return Ok(None);
        }
        let page = from >> PAGE_BITS;
        let stop = |page: u64| (page.saturating_mul(PAGE_UNITS)).min(self.units);
        if let Some(end) = self.zeroes.end_of_run(page) {
            return Ok(Some(Stretch::Zeroes(from..stop(end))));
        }
        if !self.shelf.has(page) {
            let end = [self.zeroes.next_start(page), self.shelf.next(page)];
            let end = end.into_iter().flatten().min().unwrap_or(u64::MAX >> PAGE_BITS);
            return Ok(Some(Stretch::Unknown(from..stop(end))));
        }
        let end = stop(page.saturating_add(1));
        let len = usize::try_from(end - from).unwrap_or(usize::MAX);
        let nodes = self.shelf.nodes(page)?;
        let nodes = nodes.get(in_page(from)..).unwrap_or_default();
        Ok(Some(first_stretch(from, nodes.get(..len).unwrap_or(nodes))))
    }

    /// The first run of units that are unknown.
    pub fn first_unknown(&mut self) -> Result<Option<Range<u64>>> {
        let mut at = 0;
        while let Some(stretch) = self.stretch(at)? {
            if let Stretch::Unknown(units) = stretch {
                return Ok(Some(units));
            }
            at = stretch.units().end;
        }
        Ok(None)
    }

    /// The content hash of the disk, once no unit is unknown.
    pub fn root(&mut self) -> Result<ContentHash> {
        let mut tree = Tree::new(self.size)?;
        let leaves = leaf_count(self.size);
        for pages in self.zeroes.iter() {
            let start = pages.start << PAGE_HEIGHT;
            let end = pages.end.saturating_mul(1 << PAGE_HEIGHT);
            tree.put_zeroes(start..end.min(leaves))?;
        }
        let mut next = self.shelf.next(0);
        while let Some(page) = next {
            let node = self.folded(page)?;
            tree.put(PAGE_HEIGHT, page, node)?;
            next = self.shelf.next(page.saturating_add(1));
        }
        Ok(tree.root()?)
    }

    /// The node above a page that is on the shelf.
    fn folded(&mut self, page: u64) -> Result<Node> {
        if let Some(node) = self.shelf.folded(page) {
            return Ok(node);
        }
        let nodes = self.shelf.nodes(page)?;
        if let Some(at) = nodes.iter().position(|node| *node == UNKNOWN) {
            let first = (page << PAGE_BITS).saturating_add(at as u64);
            let end = first.saturating_add(1) << LEDGER_HEIGHT;
            let leaves = first << LEDGER_HEIGHT..end.min(leaf_count(self.size));
            return Err(Missing { leaves }.into());
        }
        let node = fold(nodes);
        self.shelf.set_folded(page, node);
        Ok(node)
    }

    fn check(&self, end: u64) -> Result<()> {
        if end <= self.units {
            return Ok(());
        }
        let (leaf, leaves) = (end.saturating_mul(1 << LEDGER_HEIGHT), leaf_count(self.size));
        Err(HashError::Outside { height: LEDGER_HEIGHT, leaf, leaves }.into())
    }

    /// Sets all of `units`, which lie inside, to the same.
    fn fill(&mut self, units: Range<u64>, node: Node) -> Result<()> {
        let is_uniform = node == UNKNOWN || node == zero_node(LEDGER_HEIGHT);
        let mut at = units.start;
        while at < units.end {
            let page = at >> PAGE_BITS;
            let page_end = (page.saturating_add(1) << PAGE_BITS).min(self.units);
            let is_whole = at == page << PAGE_BITS && units.end >= page_end;
            if is_whole && is_uniform {
                let last = units.end == self.units;
                let end =
                    if last { self.units.div_ceil(PAGE_UNITS) } else { units.end >> PAGE_BITS };
                self.clear_pages(page..end, node);
                at = (end << PAGE_BITS).min(units.end);
                continue;
            }
            let end = units.end.min(page_end);
            self.fill_in_page(at..end, node)?;
            at = end;
        }
        Ok(())
    }

    fn clear_pages(&mut self, pages: Range<u64>, node: Node) {
        self.shelf.remove(pages.clone());
        if node == UNKNOWN {
            self.zeroes.remove(pages);
        } else {
            self.zeroes.insert(pages);
        }
    }

    fn fill_in_page(&mut self, units: Range<u64>, node: Node) -> Result<()> {
        let page = units.start >> PAGE_BITS;
        let is_zero = self.zeroes.contains(page);
        let is_as_it_was = if is_zero { node == zero_node(LEDGER_HEIGHT) } else { node == UNKNOWN };
        if is_as_it_was && !self.shelf.has(page) {
            return Ok(());
        }
        if !self.shelf.has(page) {
            let start = if is_zero { zero_node(LEDGER_HEIGHT) } else { UNKNOWN };
            let mut nodes = vec![start; in_page(PAGE_UNITS - 1) + 1];
            // Beyond the end of the disk all is zero.
            let inside = self.units.saturating_sub(page << PAGE_BITS).min(PAGE_UNITS);
            let beyond = nodes.iter_mut().skip(usize::try_from(inside).unwrap_or(usize::MAX));
            beyond.for_each(|node| *node = zero_node(LEDGER_HEIGHT));
            self.zeroes.remove(page..page.saturating_add(1));
            self.shelf.put(page, nodes.into_boxed_slice())?;
        }
        let nodes = self.shelf.nodes_mut(page)?;
        let range = in_page(units.start)..=in_page(units.end.saturating_sub(1));
        nodes.get_mut(range).unwrap_or_default().fill(node);
        Ok(())
    }
}

/// Where a unit lies in its page.
fn in_page(unit: u64) -> usize {
    usize::try_from(unit % PAGE_UNITS).unwrap_or_default()
}

/// The node above the nodes of a page.
fn fold(nodes: &[Node]) -> Node {
    let mut level = nodes.to_vec();
    for height in LEDGER_HEIGHT..PAGE_HEIGHT {
        let (zero, above) = (zero_node(height), zero_node(height.saturating_add(1)));
        let pairs = level.as_chunks::<2>().0.iter();
        let folded =
            pairs.map(|[l, r]| if *l == zero && *r == zero { above } else { parent(l, r) });
        level = folded.collect();
    }
    level.first().copied().unwrap_or(UNKNOWN)
}

/// The run of one kind at the start of `nodes`, which are those from unit `from` on.
fn first_stretch(from: u64, nodes: &[Node]) -> Stretch<'_> {
    let zero = zero_node(LEDGER_HEIGHT);
    let kind = |node: &Node| (*node == UNKNOWN, *node == zero);
    let first = nodes.first().map(kind);
    let len = nodes.iter().take_while(|node| Some(kind(node)) == first).count();
    let units = from..from.saturating_add(len as u64);
    match first {
        Some((true, _)) => Stretch::Unknown(units),
        Some((_, true)) => Stretch::Zeroes(units),
        _ => Stretch::Nodes(from, nodes.get(..len).unwrap_or_default()),
    }
}
