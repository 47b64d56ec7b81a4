//! A journal while a disk arrives over a connection.

use std::ops::Range;

use format_spec::content_hash::Node;
use mig_core::section::Have;
use mig_core::stream;

use super::Keeper;
use crate::error::{Error, Result};
use crate::ledger::{Entry, Stretch, UNIT_BYTES};

/// Most units that are told at once.
const HAVE_UNITS: usize = 4096;

impl Keeper {
    /// Tells all that the journal claims, in rising order. It was read again before.
    pub fn tell(&self, tell: &mut dyn FnMut(Have) -> stream::Result<()>) -> stream::Result<()> {
        let mut at = 0;
        loop {
            let next = self.with_claims(|claims| {
                Ok::<_, Error>(claims.stretch(at)?.map(|stretch| match stretch {
                    Stretch::Unknown(units) => (units.end, None),
                    Stretch::Zeroes(units) => {
                        (units.end, Some(Have::Zeroes(units.start, units.end - units.start)))
                    }
                    Stretch::Nodes(first, nodes) => {
                        let nodes = nodes.get(..HAVE_UNITS).unwrap_or(nodes);
                        let end = first.saturating_add(nodes.len() as u64);
                        (end, Some(Have::Units(first, nodes.to_vec())))
                    }
                }))
            })?;
            let Some((end, have)) = next else { return Ok(()) };
            at = end;
            have.map_or(Ok(()), &mut *tell)?;
        }
    }

    /// Zeroes arrived. Units that they cover only in part were told with their nodes where they are
    /// whole with them.
    pub fn zeroes_landed(&self, range: Range<u64>) -> Result<()> {
        let size = self.with_claims(|claims| claims.size());
        let start = range.start.next_multiple_of(UNIT_BYTES);
        let end = if range.end >= size { size } else { range.end & !(UNIT_BYTES - 1) };
        if start < end { self.arrived_zeroes(start..end) } else { Ok(()) }
    }

    /// A unit was read back, and this is its node. Nothing to do where it is claimed as such.
    pub fn unit_read(&self, unit: u64, node: Node) -> Result<()> {
        match self.with_claims(|claims| claims.get(unit))? {
            Entry::Node(known) if known == node => Ok(()),
            _ => self.arrived_units(unit, &[node]),
        }
    }

    /// Whole units arrived, and these are their nodes. Whether a checkpoint is due.
    pub fn units_landed(&self, first: u64, nodes: &[Node]) -> Result<bool> {
        self.arrived_units(first, nodes)?;
        Ok(self.is_due())
    }
}
