//! Reading a journal back. A torn or wrong record ends it; only the file itself can fail.

use format_spec::native::frame::{HEADER_BYTES, Header, Record};
use format_spec::native::journal::{JOURNAL_MAGIC, JournalRecord, decode_start};
use format_spec::{Malformed, Reader};
use qcow2_file::Storage;

use super::{Identity, NOT_PREPARED, Prepared, failed};
use crate::error::Result;
use crate::ledger::Ledger;

/// Bytes of magic and version.
const START_BYTES: usize = 8;

/// What a file that should be a journal turned out to be.
#[derive(Debug)]
pub enum Found {
    /// Nothing that can be gone on with.
    Nothing,
    /// A journal of something else.
    Other(Identity),
    /// The journal that was looked for.
    Journal(Box<Replayed>),
}

/// What a journal says.
#[derive(Debug)]
pub struct Replayed {
    /// What it is of.
    pub identity: Identity,
    /// What it claims of the disk's units.
    pub claims: Ledger,
    /// What was prepared, if that was the last word.
    pub prepared: Option<Prepared>,
    /// Whether the source had said COMMIT.
    pub is_committing: bool,
    /// Byte behind the last good record.
    pub end: u64,
}

/// Reads a journal that should be of `wanted`.
pub fn replay(file: &dyn Storage, wanted: &Identity) -> Result<Found> {
    let mut records = Records::new(file)?;
    match records.identity()? {
        Some(found) if found == *wanted => {}
        Some(found) => return Ok(Found::Other(found)),
        None => return Ok(Found::Nothing),
    }
    finish(records, wanted.clone())
}

/// Reads a journal of anything.
pub fn peek(file: &dyn Storage) -> Result<Found> {
    let mut records = Records::new(file)?;
    match records.identity()? {
        Some(found) => finish(records, found),
        None => Ok(Found::Nothing),
    }
}

fn finish(mut records: Records<'_>, identity: Identity) -> Result<Found> {
    let Ok(claims) = Ledger::new(identity.size) else { return Ok(Found::Nothing) };
    let mut state =
        Replayed { identity, claims, prepared: None, is_committing: false, end: records.at };
    while let Some(record) = records.next()? {
        if !state.apply(&record)? {
            break;
        }
        state.end = records.at;
    }
    Ok(Found::Journal(Box::new(state)))
}

impl Replayed {
    /// Takes one record. `false` where it makes no sense in a journal of this disk.
    fn apply(&mut self, record: &Record<'_>) -> Result<bool> {
        let Ok(decoded) = JournalRecord::decode(record) else { return Ok(false) };
        let units = self.claims.units();
        let fits = |first: u64, count: u64| first.checked_add(count).is_some_and(|e| e <= units);
        match decoded {
            Some(JournalRecord::Units(run)) if fits(run.first, run.nodes.len() as u64) => {
                (self.prepared, self.is_committing) = (None, false);
                for (unit, node) in (run.first..).zip(run.nodes) {
                    self.claims.set(unit, *node)?;
                }
            }
            Some(JournalRecord::Zeroes(run)) if fits(run.first, run.count) => {
                (self.prepared, self.is_committing) = (None, false);
                self.claims.set_zeroes(run.first..run.first.saturating_add(run.count))?;
            }
            Some(JournalRecord::Prepared { root, stamps }) => {
                let is_prepared = root != NOT_PREPARED;
                self.prepared = is_prepared.then_some(Prepared { root, stamps });
                self.is_committing = false;
            }
            Some(JournalRecord::Commit(session)) if session == self.identity.session => {
                self.is_committing = self.prepared.is_some();
            }
            // What this version has no use for.
            Some(JournalRecord::Image(_) | JournalRecord::Bitmap(_)) | None => {}
            Some(_) => return Ok(false),
        }
        Ok(true)
    }
}

/// The records of a file, one at a time.
struct Records<'a> {
    file: &'a dyn Storage,
    len: u64,
    /// Where the next record starts.
    at: u64,
    buffer: Vec<u8>,
}

impl<'a> Records<'a> {
    fn new(file: &'a dyn Storage) -> Result<Self> {
        let len = file.len().map_err(failed("find the length of"))?;
        Ok(Self { file, len, at: 0, buffer: Vec::new() })
    }

    /// Takes the start of the file and the record that says what it is of.
    fn identity(&mut self) -> Result<Option<Identity>> {
        let mut start = [0; START_BYTES];
        if self.len < START_BYTES as u64 {
            return Ok(None);
        }
        self.file.read_at(&mut start, 0).map_err(failed("read"))?;
        if decode_start(&mut Reader::new(&start, 0), JOURNAL_MAGIC).is_err() {
            return Ok(None);
        }
        self.at = START_BYTES as u64;
        let Some(record) = self.next()? else { return Ok(None) };
        Ok(match JournalRecord::decode(&record) {
            Ok(Some(JournalRecord::Session { session, size, target })) => {
                Some(Identity { session, size, target })
            }
            _ => None,
        })
    }

    /// The next record; `None` at the end, wherever that is.
    fn next(&mut self) -> Result<Option<Record<'_>>> {
        let mut bytes = [0; HEADER_BYTES];
        let left = self.len.saturating_sub(self.at);
        if left < HEADER_BYTES as u64 {
            return Ok(None);
        }
        self.file.read_at(&mut bytes, self.at).map_err(failed("read"))?;
        let Ok(header) = Header::decode(&bytes, self.at) else { return Ok(None) };
        let body_at = self.at.saturating_add(HEADER_BYTES as u64);
        let len = header.rest_len();
        if left < (HEADER_BYTES as u64).saturating_add(len as u64) {
            return Ok(None);
        }
        // At most `MAX_BODY` and a checksum: the header was checked.
        self.buffer.resize(len, 0);
        self.file.read_at(&mut self.buffer, body_at).map_err(failed("read"))?;
        let record: Result<Record<'_>, Malformed> =
            Record::from_parts(header, &self.buffer, body_at);
        let Ok(record) = record else { return Ok(None) };
        if !record.header.has_checksum() {
            return Ok(None);
        }
        self.at = body_at.saturating_add(len as u64);
        Ok(Some(record))
    }
}
