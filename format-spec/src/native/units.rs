//! Runs of units: what journals keep and resumed transfers compare. SPEC 10.

use crate::content_hash::Node;
use crate::{Malformed, Problem, Reader, Writer};

/// The nodes of neighbouring units, `T(4, first)` and on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnitNodes<'a> {
    /// The first unit.
    pub first: u64,
    /// One node per unit, at least one. All bytes zero: the unit is taken back.
    pub nodes: &'a [Node],
}

impl<'a> UnitNodes<'a> {
    pub(super) fn decode(body: &mut Reader<'a>) -> Result<Self, Malformed> {
        let at = body.offset();
        let first = body.be64("first unit")?;
        let nodes_at = body.offset();
        let (nodes, rest) = body.take_rest().as_chunks();
        if nodes.is_empty() || !rest.is_empty() {
            let problem = Problem::Other("are not whole, or there is none");
            return Err(Malformed::new(nodes_at, "unit nodes", problem));
        }
        check_end(first, nodes.len() as u64, at)?;
        Ok(Self { first, nodes })
    }

    pub(super) fn encode(&self, body: &mut Writer) {
        body.be64(self.first).bytes(self.nodes.as_flattened());
    }
}

/// A run of units that are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroUnits {
    /// The first unit.
    pub first: u64,
    /// How many, at least 1.
    pub count: u64,
}

impl ZeroUnits {
    pub(super) fn decode(body: &mut Reader<'_>) -> Result<Self, Malformed> {
        let at = body.offset();
        let first = body.be64("first unit")?;
        let count_at = body.offset();
        let count = body.be64("number of units")?;
        if count == 0 {
            let problem = Problem::OutOfRange { value: 0, min: 1, max: UNIT_LIMIT };
            return Err(Malformed::new(count_at, "number of units", problem));
        }
        check_end(first, count, at)?;
        Ok(Self { first, count })
    }

    pub(super) fn encode(self, body: &mut Writer) {
        body.be64(self.first).be64(self.count);
    }
}

/// Units of the largest disk.
const UNIT_LIMIT: u64 = 1 << 43;

fn check_end(first: u64, count: u64, at: u64) -> Result<(), Malformed> {
    let end = first.saturating_add(count);
    if end <= UNIT_LIMIT {
        return Ok(());
    }
    Err(Malformed::new(
        at,
        "last unit",
        Problem::OutOfRange { value: end, min: 1, max: UNIT_LIMIT },
    ))
}
