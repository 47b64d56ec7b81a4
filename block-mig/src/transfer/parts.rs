//! A transfer that keeps a journal: what an earlier try left is passed over, and what is moved is
//! noted.

use std::ops::Range;

use format_spec::content_hash::{LEDGER_HEIGHT, Placed};
use mig_core::block::{BlockSink, BlockSource};

use crate::error::{Error, Result};
use crate::journal::Keeper;
use crate::ledger::{Entry, Stretch, UNIT_BYTES};
use crate::load::{Loader, SharedTree};
use crate::plan::{Content, Unit};
use crate::store::{Chunk, Storer};

/// Work for a mover.
pub(super) enum Part {
    /// To be moved.
    Unit(Unit),
    /// Bytes of which the destination's units are known.
    Known(Range<u64>, Entry),
}

/// Cuts units where what the journal claims begins or ends.
pub(super) struct Parts<'a, U> {
    units: U,
    keeper: Option<&'a Keeper>,
    rest: Option<Unit>,
}

impl<'a, U: Iterator<Item = Result<Unit>>> Parts<'a, U> {
    pub(super) fn new(units: U, keeper: Option<&'a Keeper>) -> Self {
        Self { units, keeper, rest: None }
    }

    fn cut(&mut self, keeper: &Keeper, unit: Unit) -> Result<Part> {
        let first = unit.offset / UNIT_BYTES;
        let (entry, end) = keeper.with_claims(|claims| {
            let (mut entry, mut end) = (Entry::Unknown, claims.units());
            if let Some(stretch) = claims.stretch(first)? {
                end = stretch.units().end;
                entry = match stretch {
                    Stretch::Unknown(_) => Entry::Unknown,
                    Stretch::Zeroes(_) => Entry::Zero,
                    Stretch::Nodes(_, nodes) => {
                        end = first + 1;
                        nodes.first().map_or(Entry::Unknown, |node| Entry::Node(*node))
                    }
                };
            }
            Ok::<_, Error>((entry, end))
        })?;
        let stop = end.saturating_mul(UNIT_BYTES).min(unit.end());
        if stop < unit.end() {
            self.rest = Some(Unit { offset: stop, len: unit.end() - stop, ..unit });
        }
        Ok(match entry {
            Entry::Unknown => Part::Unit(Unit { len: stop - unit.offset, ..unit }),
            entry => Part::Known(unit.offset..stop, entry),
        })
    }
}

impl<U: Iterator<Item = Result<Unit>>> Iterator for Parts<'_, U> {
    type Item = Result<Part>;

    fn next(&mut self) -> Option<Self::Item> {
        let unit = match self.rest.take() {
            Some(unit) => unit,
            None => match self.units.next()? {
                Ok(unit) => unit,
                Err(error) => return Some(Err(error)),
            },
        };
        match self.keeper {
            Some(keeper) => Some(self.cut(keeper, unit)),
            None => Some(Ok(Part::Unit(unit))),
        }
    }
}

/// Moves units of one disk.
pub(super) struct Mover<'a> {
    pub(super) source: &'a dyn BlockSource,
    pub(super) sink: &'a dyn BlockSink,
    pub(super) loader: Loader<'a>,
    pub(super) storer: &'a Storer<'a>,
    pub(super) tree: Option<&'a SharedTree>,
    pub(super) keeper: Option<&'a Keeper>,
}

impl Mover<'_> {
    /// Reads, hashes and writes a unit, and notes that it is there.
    pub(super) fn move_unit(
        &self,
        unit: Unit,
        buffer: &mut Vec<u8>,
        packed: &mut Vec<u8>,
    ) -> Result<()> {
        let bytes = self.loader.load(&unit, buffer)?;
        let range = unit.offset..unit.end();
        if let Some(keeper) = self.keeper {
            keeper.begin(range.clone())?;
        }
        self.storer.store(Chunk { unit: &unit, bytes, source: self.source }, packed)?;
        let Some(keeper) = self.keeper else { return Ok(()) };
        if matches!(unit.content, Content::Bytes { .. }) {
            let nodes = keeper.arrived(unit.offset, bytes)?;
            self.tree.map_or(Ok(()), |tree| tree.put_nodes(&nodes, unit.offset, bytes))?;
        } else {
            keeper.arrived_zeroes(range)?;
            self.tree.map_or(Ok(()), |tree| tree.put_zeroes(unit.offset, unit.len))?;
        }
        if keeper.is_due() {
            self.checkpoint(keeper)?;
        }
        Ok(())
    }

    /// Passes over bytes that are known to be equal; how many.
    pub(super) fn skip(&self, range: Range<u64>, entry: Entry) -> Result<u64> {
        let len = range.end - range.start;
        match (self.tree, entry) {
            // Once for all parts of the unit: the first one starts where it does.
            (Some(tree), Entry::Node(node)) if range.start.is_multiple_of(UNIT_BYTES) => {
                let index = range.start / UNIT_BYTES;
                tree.put_nodes(&[Placed { height: LEDGER_HEIGHT, index, node }], range.start, &[])?;
            }
            (Some(tree), Entry::Zero) => tree.put_zeroes(range.start, len)?,
            _ => {}
        }
        Ok(len)
    }

    /// The end, good or bad: what was written until then is worth keeping.
    pub(super) fn save(&self, moved: Result<()>) -> Result<()> {
        if let (Err(_), Some(keeper)) = (&moved, self.keeper)
            && let Err(error) = self.checkpoint(keeper)
        {
            tracing::debug!(%error, "what was copied last will be copied again");
        }
        moved
    }

    fn checkpoint(&self, keeper: &Keeper) -> Result<()> {
        keeper.checkpoint(|| self.sink.sync().map_err(Error::Sink))
    }
}
