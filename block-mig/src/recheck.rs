//! Going on with an unfinished destination: what its journal claims is read again, and only what
//! hashes as claimed is believed. SPEC 10.

use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use format_spec::content_hash::{LEDGER_HEIGHT, Node, subtree};
use mig_core::block::{BlockSink, BlockSource, Extent, ExtentKind, is_zero};

use crate::error::{Error, Result};
use crate::ledger::{Ledger, Stretch, UNIT_BYTES};
use crate::limits::RECHECKED_ZEROES;
use crate::monitor::Monitor;
use crate::pool::Pool;

/// A destination that can read what was written to it.
pub trait ReadBack: BlockSink {
    /// Fills `buf` with what the disk reads at `offset` now. The range lies inside the disk.
    fn read_back(&self, buf: &mut [u8], offset: u64) -> mig_core::Result<()>;

    /// Where the content at `offset` stands in the file that holds it, by the tables alone, at most
    /// `max_len` bytes of it. Content without a place: that cannot be told.
    fn placed(&self, _offset: u64, max_len: u64) -> mig_core::Result<Extent> {
        Ok(Extent { len: max_len, kind: ExtentKind::Data, host: None })
    }
}

/// What was claimed and what of it was true.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rechecked {
    /// Units that are as claimed, zeroes included.
    pub believed: u64,
    /// Units that are not.
    pub lost: u64,
}

/// Units of one check: with their node, or zeroes.
enum Claim {
    Node(u64, Node),
    Zeroes(Range<u64>),
}

/// Where an unfinished destination stands, and what it should become.
#[derive(Clone, Copy)]
pub struct Recheck<'a> {
    /// The destination.
    pub disk: &'a dyn ReadBack,
    /// The source, where it is at hand: what differs from it is not believed either.
    pub source: Option<&'a dyn BlockSource>,
    /// Worker threads.
    pub workers: usize,
    /// Told of bytes of the disk that were looked at.
    pub monitor: &'a dyn Monitor,
}

/// Reads all that `claims` knows and makes unknown what is not so. A unit that cannot be read is
/// not so either: it will be written again.
pub fn recheck(request: Recheck<'_>, claims: &mut Ledger) -> Result<Rechecked> {
    let Recheck { disk, source, workers, monitor } = request;
    let size = claims.size();
    let shared = Mutex::new((claims, Rechecked::default()));
    let lock = || shared.lock().unwrap_or_else(PoisonError::into_inner);
    let mut at = 0;
    let mut waiting = Vec::new().into_iter();
    let units = std::iter::from_fn(|| {
        loop {
            if let Some(claim) = waiting.next() {
                return Some(Ok(claim));
            }
            match next_claims(lock().0, &mut at) {
                Ok(Some(claims)) => waiting = claims.into_iter(),
                Ok(None) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
    });
    let work = |buffer: &mut Vec<u8>, claim: Claim| {
        let (units, is_so) = match claim {
            Claim::Node(unit, node) => {
                let found = node_of(disk, unit, size, buffer);
                monitor.advance(UNIT_BYTES.min(size - unit * UNIT_BYTES));
                let is_there = found.is_some_and(|found| found == node);
                let is_so = is_there && is_in_source(source, unit, node, size, buffer)?;
                (unit..unit + 1, is_so)
            }
            Claim::Zeroes(units) => {
                let is_so = reads_as_zero(disk, &units, size, buffer)
                    && is_zero_in_source(source, &units, size)?;
                (units, is_so)
            }
        };
        let (claims, counts) = &mut *lock();
        let count = units.end - units.start;
        if is_so {
            counts.believed += count;
            return Ok(());
        }
        counts.lost += count;
        claims.forget(units)
    };
    Pool { workers, monitor }.run(units, Vec::new, work)?;
    let (_, counts) = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
    Ok(counts)
}

/// The claims from unit `at` on, some at a time.
fn next_claims(claims: &mut Ledger, at: &mut u64) -> Result<Option<Vec<Claim>>> {
    while let Some(stretch) = claims.stretch(*at)? {
        *at = stretch.units().end;
        match stretch {
            Stretch::Unknown(_) => {}
            Stretch::Zeroes(units) => {
                *at = units.end.min(units.start.saturating_add(RECHECKED_ZEROES));
                return Ok(Some(vec![Claim::Zeroes(units.start..*at)]));
            }
            Stretch::Nodes(first, nodes) => {
                let claims = (first..).zip(nodes).map(|(unit, node)| Claim::Node(unit, *node));
                return Ok(Some(claims.collect()));
            }
        }
    }
    Ok(None)
}

fn node_of(disk: &dyn ReadBack, unit: u64, size: u64, buffer: &mut Vec<u8>) -> Option<Node> {
    let offset = unit * UNIT_BYTES;
    buffer.resize(usize::try_from(UNIT_BYTES.min(size - offset)).unwrap_or(0), 0);
    match disk.read_back(buffer, offset) {
        Ok(()) => Some(subtree(LEDGER_HEIGHT, buffer, &is_zero)),
        Err(error) => {
            tracing::warn!(%error, "what an earlier try left cannot be read");
            None
        }
    }
}

/// Whether the source has this node at this unit, as far as there is a source.
fn is_in_source(
    source: Option<&dyn BlockSource>,
    unit: u64,
    node: Node,
    size: u64,
    buffer: &mut Vec<u8>,
) -> Result<bool> {
    let Some(source) = source else { return Ok(true) };
    let offset = unit * UNIT_BYTES;
    buffer.resize(usize::try_from(UNIT_BYTES.min(size - offset)).unwrap_or(0), 0);
    source.read_at(buffer, offset).map_err(Error::Source)?;
    Ok(subtree(LEDGER_HEIGHT, buffer, &is_zero) == node)
}

/// Whether the source says that all of these units read as zero; content is not looked at.
fn is_zero_in_source(
    source: Option<&dyn BlockSource>,
    units: &Range<u64>,
    size: u64,
) -> Result<bool> {
    let Some(source) = source else { return Ok(true) };
    let (mut at, end) = (units.start * UNIT_BYTES, units.end.saturating_mul(UNIT_BYTES).min(size));
    while at < end {
        let extent = source.extent(at, end - at).map_err(Error::Source)?;
        if !extent.kind.reads_as_zero() {
            return Ok(false);
        }
        at = at.saturating_add(extent.len.max(1));
    }
    Ok(true)
}

fn reads_as_zero(disk: &dyn ReadBack, units: &Range<u64>, size: u64, buffer: &mut Vec<u8>) -> bool {
    let offset = units.start * UNIT_BYTES;
    let end = units.end.saturating_mul(UNIT_BYTES).min(size);
    if disk.reads_as_zero(offset, end - offset) {
        return true;
    }
    let zero = subtree(LEDGER_HEIGHT, &[], &is_zero);
    units.clone().all(|unit| node_of(disk, unit, size, buffer) == Some(zero))
}

/// Makes all read as zero that `known` does not know: what is written later then finds the disk as
/// a new one is, whatever a crash left half written there.
pub fn clear_unknown(disk: &dyn BlockSink, known: &mut Ledger) -> Result<()> {
    let (size, mut at) = (known.size(), 0);
    while let Some(stretch) = known.stretch(at)? {
        at = stretch.units().end;
        if let Stretch::Unknown(units) = stretch {
            let offset = units.start * UNIT_BYTES;
            let len = units.end.saturating_mul(UNIT_BYTES).min(size) - offset;
            if !disk.reads_as_zero(offset, len) {
                disk.write_zeroes(offset, len).map_err(Error::Sink)?;
            }
        }
    }
    Ok(())
}
