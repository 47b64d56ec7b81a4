//! A file in memory, for tests and fuzzing: sparse, with faults on demand and a log of what was
//! done.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::{Run, Storage};

const PAGE_BYTES: usize = 4096;
const PAGE: u64 = PAGE_BYTES as u64;

/// What an operation was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OperationKind {
    /// [`Storage::read_at`].
    Read,
    /// [`Storage::write_at`].
    Write,
    /// [`Storage::write_zeroes`].
    WriteZeroes,
    /// [`Storage::discard`].
    Discard,
    /// [`Storage::set_len`].
    SetLen,
    /// [`Storage::sync`].
    Sync,
}

/// One operation that was asked for, in the order in which they came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operation {
    /// What it was.
    pub kind: OperationKind,
    /// Byte offset; the new length for [`OperationKind::SetLen`]; 0 for a sync.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// What was written; empty for everything but [`OperationKind::Write`].
    pub data: Vec<u8>,
}

/// Makes one operation fail.
#[derive(Debug, Clone, Copy)]
pub struct Fault {
    /// Which kind of operation fails.
    pub kind: OperationKind,
    /// How many operations of that kind still succeed before.
    pub after: u64,
    /// The system error, for example 28 (ENOSPC) or 5 (EIO).
    pub errno: i32,
    /// Bytes of a write that reach the storage before it fails: a torn write.
    pub torn_bytes: usize,
    /// Whether everything of that kind fails from then on, or only one operation.
    pub is_lasting: bool,
}

impl Fault {
    /// The operation of that kind after `after` successful ones fails, and all later ones.
    pub fn new(kind: OperationKind, after: u64, errno: i32) -> Self {
        Self { kind, after, errno, torn_bytes: 0, is_lasting: true }
    }
}

/// A file in memory. Pages that hold only zeroes cost nothing, so it may be exabytes long.
#[derive(Debug)]
pub struct Memory {
    name: Arc<str>,
    len: AtomicU64,
    pages: RwLock<BTreeMap<u64, Box<[u8; PAGE_BYTES]>>>,
    faults: Mutex<Vec<Fault>>,
    /// `None` while nothing is recorded.
    log: Mutex<Option<Vec<Operation>>>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new()
    }
}

impl Memory {
    /// An empty file.
    pub fn new() -> Self {
        Self::named("memory")
    }

    /// An empty file whose errors bear `name`.
    pub fn named(name: &str) -> Self {
        Self {
            name: name.into(),
            len: AtomicU64::new(0),
            pages: RwLock::default(),
            faults: Mutex::default(),
            log: Mutex::default(),
        }
    }

    /// A file with this content.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let memory = Self::new();
        memory.put(bytes, 0);
        memory
    }

    /// The whole content. For files that are known to be small.
    pub fn to_bytes(&self) -> Vec<u8> {
        let len = usize::try_from(self.len.load(Ordering::Relaxed)).unwrap_or(usize::MAX);
        let mut bytes = vec![0; len];
        self.fetch(&mut bytes, 0);
        bytes
    }

    /// A copy of the content as it is now, without faults and log: what another process would find.
    pub fn snapshot(&self) -> Self {
        let copy = Self::named(&self.name);
        copy.len.store(self.len.load(Ordering::Relaxed), Ordering::Relaxed);
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner).clone();
        *copy.pages.write().unwrap_or_else(PoisonError::into_inner) = pages;
        copy
    }

    /// Plans a fault. Several may wait at the same time.
    pub fn inject(&self, fault: Fault) {
        lock(&self.faults).push(fault);
    }

    /// Forgets all planned faults.
    pub fn clear_faults(&self) {
        lock(&self.faults).clear();
    }

    /// Starts recording operations from an empty log.
    pub fn start_log(&self) {
        *lock(&self.log) = Some(Vec::new());
    }

    /// Ends recording and hands out the log.
    pub fn take_log(&self) -> Vec<Operation> {
        lock(&self.log).take().unwrap_or_default()
    }

    /// Does again what a log says, for tests that replay a part of it.
    pub fn apply(&self, operation: &Operation) {
        match operation.kind {
            OperationKind::Write => self.put(&operation.data, operation.offset),
            OperationKind::WriteZeroes => self.clear(operation.offset, operation.len, true),
            OperationKind::SetLen => self.resize(operation.offset),
            OperationKind::Read | OperationKind::Discard | OperationKind::Sync => {}
        }
    }

    /// Bytes that are really held.
    pub fn held_bytes(&self) -> u64 {
        self.pages.read().unwrap_or_else(PoisonError::into_inner).len() as u64 * PAGE
    }

    fn begin(&self, kind: OperationKind, offset: u64, len: u64, data: &[u8]) -> io::Result<()> {
        if let Some(log) = lock(&self.log).as_mut() {
            log.push(Operation { kind, offset, len, data: data.to_vec() });
        }
        let mut faults = lock(&self.faults);
        let mut struck = None;
        for (index, fault) in faults.iter_mut().enumerate().filter(|(_, f)| f.kind == kind) {
            match fault.after.checked_sub(1) {
                Some(left) => fault.after = left,
                None => struck = struck.or(Some((index, *fault))),
            }
        }
        let Some((index, fault)) = struck else { return Ok(()) };
        if !fault.is_lasting {
            faults.remove(index);
        }
        drop(faults);
        if let Some(torn) = data.get(..fault.torn_bytes.min(data.len())) {
            self.put(torn, offset);
        }
        Err(io::Error::from_raw_os_error(fault.errno))
    }

    fn fetch(&self, buf: &mut [u8], offset: u64) {
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        for (page, in_page, range) in pieces(offset, buf.len()) {
            let Some(piece) = buf.get_mut(range) else { continue };
            let held = pages.get(&page).and_then(|p| p.get(in_page..in_page + piece.len()));
            match held {
                Some(bytes) => piece.copy_from_slice(bytes),
                None => piece.fill(0),
            }
        }
    }

    fn put(&self, buf: &[u8], offset: u64) {
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        for (page, in_page, range) in pieces(offset, buf.len()) {
            let Some(piece) = buf.get(range) else { continue };
            let held = pages.entry(page).or_insert_with(|| Box::new([0; PAGE_BYTES]));
            if let Some(bytes) = held.get_mut(in_page..in_page + piece.len()) {
                bytes.copy_from_slice(piece);
            }
        }
        self.len.fetch_max(offset.saturating_add(buf.len() as u64), Ordering::Relaxed);
    }

    fn clear(&self, offset: u64, len: u64, may_grow: bool) {
        let end = offset.saturating_add(len);
        let mut pages = self.pages.write().unwrap_or_else(PoisonError::into_inner);
        let touched: Vec<u64> =
            pages.range(offset / PAGE..end.div_ceil(PAGE)).map(|(page, _)| *page).collect();
        for page in touched {
            let (start, stop) = (page.saturating_mul(PAGE), (page + 1).saturating_mul(PAGE));
            if start >= offset && stop <= end {
                pages.remove(&page);
            } else if let Some(held) = pages.get_mut(&page) {
                let in_page = |at: u64| small(at.clamp(start, stop) - start);
                if let Some(bytes) = held.get_mut(in_page(offset)..in_page(end)) {
                    bytes.fill(0);
                }
            }
        }
        if may_grow {
            self.len.fetch_max(end, Ordering::Relaxed);
        }
    }

    fn resize(&self, len: u64) {
        self.clear(len, u64::MAX - len, false);
        self.len.store(len, Ordering::Relaxed);
    }
}

impl Storage for Memory {
    fn name(&self) -> Arc<str> {
        self.name.clone()
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.len.load(Ordering::Relaxed))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.begin(OperationKind::Read, offset, buf.len() as u64, &[])?;
        self.fetch(buf, offset);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.begin(OperationKind::Write, offset, buf.len() as u64, buf)?;
        self.put(buf, offset);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.begin(OperationKind::WriteZeroes, offset, len, &[])?;
        self.clear(offset, len, true);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.begin(OperationKind::Discard, offset, len, &[])
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.begin(OperationKind::SetLen, len, 0, &[])?;
        self.resize(len);
        Ok(())
    }

    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<Run> {
        let len = self.len.load(Ordering::Relaxed);
        if offset >= len {
            return Ok(Run { len: max_len, is_hole: true });
        }
        let pages = self.pages.read().unwrap_or_else(PoisonError::into_inner);
        let first = offset / PAGE;
        let is_hole = !pages.contains_key(&first);
        let last = if is_hole {
            pages.range(first..).next().map_or(u64::MAX / PAGE, |(page, _)| *page)
        } else {
            let wanted = first..=offset.saturating_add(max_len) / PAGE;
            let run = pages.range(wanted).zip(first..).take_while(|((page, _), n)| *page == n);
            run.last().map_or(first, |((page, _), _)| *page) + 1
        };
        let end =
            if is_hole { last.saturating_mul(PAGE) } else { last.saturating_mul(PAGE).min(len) };
        Ok(Run { len: end.saturating_sub(offset).clamp(1, max_len.max(1)), is_hole })
    }

    fn sync(&self) -> io::Result<()> {
        self.begin(OperationKind::Sync, 0, 0, &[])
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A number that is known to be at most a page.
fn small(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

/// Cuts `len` bytes at `offset` on page borders: page number, offset in the page, range in the
/// buffer.
fn pieces(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = offset.checked_add(done as u64).filter(|_| done < len)?;
        let in_page = small(at % PAGE);
        let count = (PAGE_BYTES - in_page).min(len - done);
        let range = done..done + count;
        done += count;
        Some((at / PAGE, in_page, range))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_cost_nothing_and_read_as_zero() {
        let m = Memory::new();
        m.set_len(1 << 60).unwrap();
        m.write_at(b"abc", (1 << 59) - 1).unwrap();
        let mut buf = [9; 5];
        m.read_at(&mut buf, (1 << 59) - 2).unwrap();
        assert_eq!(&buf, b"\0abc\0");
        assert_eq!(m.held_bytes(), 2 * PAGE);
        assert_eq!(m.run_at(0, u64::MAX).unwrap(), Run { len: (1 << 59) - PAGE, is_hole: true });
        let data = m.run_at((1 << 59) - 1, u64::MAX).unwrap();
        assert_eq!(data, Run { len: PAGE + 1, is_hole: false });
        m.write_zeroes((1 << 59) - PAGE, PAGE + 1).unwrap();
        m.read_at(&mut buf, (1 << 59) - 2).unwrap();
        assert_eq!(&buf, b"\0\0\0c\0");
        m.set_len(1 << 59).unwrap();
        assert_eq!(m.held_bytes(), 0);
    }

    #[test]
    fn faults_strike_when_planned() {
        let m = Memory::new();
        let torn =
            Fault { torn_bytes: 2, is_lasting: false, ..Fault::new(OperationKind::Write, 1, 28) };
        m.inject(torn);
        m.start_log();
        m.write_at(b"aaaa", 0).unwrap();
        assert_eq!(m.write_at(b"bbbb", 0).unwrap_err().raw_os_error(), Some(28));
        m.sync().unwrap();
        assert_eq!(m.to_bytes(), b"bbaa");
        let log = m.take_log();
        assert_eq!(log.len(), 3);
        assert_eq!(
            (log[1].kind, log[1].data.as_slice()),
            (OperationKind::Write, b"bbbb".as_slice())
        );
    }
}
