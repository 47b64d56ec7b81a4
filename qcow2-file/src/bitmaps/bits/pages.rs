//! Memory of bits: pages that exist only where a bit was set, and are shared until one is changed.

use std::sync::Arc;

use crate::in_memory;

/// Words of a page.
const PAGE_WORDS: usize = 512;
/// Bytes of a page: what the system gives out.
pub(super) const PAGE_BYTES: usize = PAGE_WORDS * 8;
/// Bits of a page.
pub(super) const PAGE_BITS: u64 = PAGE_BYTES as u64 * 8;

/// Some bits.
pub(super) type Page = [u64; PAGE_WORDS];

/// All pages; those that are not there are clear.
#[derive(Debug, Clone, Default)]
pub(super) struct Pages {
    pages: Vec<Option<Arc<Page>>>,
    /// How many are there.
    held: u64,
}

impl Pages {
    pub(super) fn new(count: u64) -> Self {
        let pages = vec![None; usize::try_from(count).unwrap_or(usize::MAX)];
        Self { pages, held: 0 }
    }

    /// How many are there.
    pub(super) fn held(&self) -> u64 {
        self.held
    }

    pub(super) fn get(&self, index: u64) -> Option<&Page> {
        self.pages.get(usize::try_from(index).ok()?)?.as_deref()
    }

    /// The first page that is there at or behind `index`.
    pub(super) fn next(&self, index: u64) -> Option<(u64, &Page)> {
        let behind = self.pages.get(usize::try_from(index).ok()?..)?;
        let found = (index..).zip(behind).find(|(_, page)| page.is_some());
        found.and_then(|(index, page)| Some((index, page.as_deref()?)))
    }

    /// Those that are there, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Page)> {
        (0..).zip(&self.pages).filter_map(|(index, page)| Some((index, page.as_deref()?)))
    }

    /// A page to be changed, which is there from now on; `None` behind the end.
    pub(super) fn make(&mut self, index: u64) -> Option<&mut Page> {
        let slot = self.pages.get_mut(usize::try_from(index).ok()?)?;
        self.held += u64::from(slot.is_none());
        Some(Arc::make_mut(slot.get_or_insert_with(|| Arc::new([0; PAGE_WORDS]))))
    }

    /// Takes a page away.
    pub(super) fn drop(&mut self, index: u64) {
        let slot = usize::try_from(index).ok().and_then(|index| self.pages.get_mut(index));
        let was_there = slot.and_then(Option::take).is_some();
        self.held -= u64::from(was_there);
    }

    /// Adds the bits of others.
    pub(super) fn merge(&mut self, other: &Self) {
        for (mine, theirs) in self.pages.iter_mut().zip(&other.pages) {
            match (&mut *mine, theirs) {
                (_, None) => {}
                (None, Some(theirs)) => {
                    *mine = Some(Arc::clone(theirs));
                    self.held += 1;
                }
                (Some(mine), Some(theirs)) => {
                    let words = Arc::make_mut(mine).iter_mut().zip(&**theirs);
                    words.for_each(|(mine, theirs)| *mine |= theirs);
                }
            }
        }
    }

    pub(super) fn word(&self, index: u64) -> u64 {
        let page = self.get(index / PAGE_WORDS as u64);
        let word = page.and_then(|page| page.get(in_memory(index % PAGE_WORDS as u64)));
        word.copied().unwrap_or(0)
    }
}

impl PartialEq for Pages {
    /// A page that is not there is one without bits.
    fn eq(&self, other: &Self) -> bool {
        let is_equal = |pair: (&Option<Arc<Page>>, &Option<Arc<Page>>)| match pair {
            (None, None) => true,
            (Some(mine), Some(theirs)) => Arc::ptr_eq(mine, theirs) || mine == theirs,
            (Some(page), None) | (None, Some(page)) => page.iter().all(|word| *word == 0),
        };
        self.pages.len() == other.pages.len() && self.pages.iter().zip(&other.pages).all(is_equal)
    }
}

impl Eq for Pages {}

/// Fills `buf` with the bytes of a page from `within` on.
pub(super) fn read(page: &Page, within: usize, buf: &mut [u8]) {
    let (head, first, whole) = {
        let head_len = (within.wrapping_neg() % 8).min(buf.len());
        let (head, whole) = buf.split_at_mut(head_len);
        (head, within.div_ceil(8), whole)
    };
    let word = |index: usize| page.get(index).copied().unwrap_or(0).to_le_bytes();
    head.iter_mut()
        .zip(word(within / 8).iter().skip(within % 8))
        .for_each(|(to, from)| *to = *from);
    let (middle, tail) = whole.as_chunks_mut::<8>();
    let count = middle.len();
    for (bytes, word) in middle.iter_mut().zip(page.get(first..).unwrap_or_default()) {
        *bytes = word.to_le_bytes();
    }
    tail.iter_mut().zip(word(first + count)).for_each(|(to, from)| *to = from);
}

/// Replaces the bytes of a page from `within` on.
pub(super) fn write(page: &mut Page, within: usize, bytes: &[u8]) {
    let (head, whole) = bytes.split_at((within.wrapping_neg() % 8).min(bytes.len()));
    write_in_word(page.get_mut(within / 8), within % 8, head);
    let first = within.div_ceil(8);
    let (middle, tail) = whole.as_chunks::<8>();
    for (word, bytes) in page.get_mut(first..).unwrap_or_default().iter_mut().zip(middle) {
        *word = u64::from_le_bytes(*bytes);
    }
    write_in_word(page.get_mut(first + middle.len()), 0, tail);
}

fn write_in_word(word: Option<&mut u64>, skip: usize, bytes: &[u8]) {
    let Some(word) = word.filter(|_| !bytes.is_empty()) else { return };
    let mut value = word.to_le_bytes();
    value.iter_mut().skip(skip).zip(bytes).for_each(|(to, from)| *to = *from);
    *word = u64::from_le_bytes(value);
}
