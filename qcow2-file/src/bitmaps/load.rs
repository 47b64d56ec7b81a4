//! Listing and loading.

use std::ops::Range;
use std::sync::Arc;

use super::bits::{Bits, count_ones};
use super::header::extension_at;
use super::store::unusable;
use super::table::Table;
use crate::error::{Error, Result};
use crate::layout::bitmap_directory::{
    DirectoryEntry, ImageFacts, LocatedEntry, TableEntry, broken_set_rules, check_place,
    decode_directory,
};
use crate::layout::extension::BitmapsExtension;
use crate::layout::header::{Header, autoclear};
use crate::storage::{Storage, StorageExt};

/// Bytes of bitmap data that are read at a time.
const LOAD_PIECE_BYTES: u64 = 1 << 20;

/// Whether a bitmap may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its content is right.
    Consistent,
    /// It was not saved, or is being changed by whoever has the image open: its content is not to
    /// be trusted. It can only be removed.
    Inconsistent,
    /// It uses something that is not known here, as the phrase says. It is kept as it is, and can
    /// only be removed.
    Unknown(&'static str),
}

impl State {
    pub(crate) fn of(entry: &DirectoryEntry) -> Self {
        match entry.unknown_to_us() {
            Some(why) => Self::Unknown(why),
            None if entry.is_in_use() => Self::Inconsistent,
            None => Self::Consistent,
        }
    }

    /// Why the bitmap may not be used, as a phrase that follows its name.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Consistent => "may be used",
            Self::Inconsistent => "was not saved (in use), so its content is not to be trusted",
            Self::Unknown(why) => why,
        }
    }
}

/// A bitmap as the directory describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub(crate) located: LocatedEntry,
    /// Whether it may be used.
    pub state: State,
}

impl Entry {
    pub(crate) fn new(located: LocatedEntry) -> Self {
        Self { state: State::of(&located.entry), located }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.located.entry.name
    }

    /// log2 of the guest bytes per bit.
    pub fn granularity_bits(&self) -> u8 {
        self.located.entry.granularity_bits
    }

    /// Guest bytes per bit. Beyond 2 GiB only for bitmaps in [`State::Unknown`].
    pub fn granularity(&self) -> u64 {
        1u64.checked_shl(u32::from(self.granularity_bits())).unwrap_or(u64::MAX)
    }

    /// Whether it records writes (`auto` on disk).
    pub fn is_enabled(&self) -> bool {
        self.located.entry.is_auto()
    }

    /// Whether the `in_use` flag is set.
    pub fn is_in_use(&self) -> bool {
        self.located.entry.is_in_use()
    }

    /// The flags as they stand on disk.
    pub fn flags(&self) -> u32 {
        self.located.entry.flags
    }
}

/// The valid bitmaps directory of an image, and the way to the bits. Reads the file whenever asked:
/// while somebody writes to the image, what it says may be old.
#[derive(Debug, Clone)]
pub struct Bitmaps {
    file: Arc<dyn Storage>,
    image: ImageFacts,
    extension: BitmapsExtension,
    entries: Vec<Entry>,
}

/// The bitmaps extension of an image whose bitmaps were invalidated by a program that does not know
/// them: it is there, the autoclear bit is not. Its bitmaps are lost.
pub fn stale_extension(header: &Header) -> Option<BitmapsExtension> {
    header.bitmaps().filter(|_| header.autoclear_features & autoclear::BITMAPS == 0)
}

/// What the rules for bitmaps depend on.
pub(crate) fn image_facts(file: &dyn Storage, header: &Header) -> Result<ImageFacts> {
    let file_len = file.length()?;
    Ok(ImageFacts { geometry: header.geometry(), size: header.size & !511, file_len })
}

impl Bitmaps {
    /// Reads the directory of an image. `None` when it has no bitmaps, or only invalidated ones
    /// (see [`stale_extension`]). A directory that breaks the spec is [`Error::Malformed`]; the
    /// disk can be read all the same, [`check`](super::check) tells everything that is wrong.
    pub fn open(file: Arc<dyn Storage>, header: &Header) -> Result<Option<Self>> {
        let Some(extension) = header.bitmaps() else { return Ok(None) };
        if stale_extension(header).is_some() {
            return Ok(None);
        }
        let image = image_facts(&*file, header)?;
        let located = read_directory(&*file, extension, image)?;
        let broken =
            located.iter().find_map(|l| l.entry.broken_rules(l.at, image).into_iter().next());
        let broken = broken
            .or_else(|| broken_set_rules(extension, &located, image.geometry).into_iter().next());
        if let Some(what) = broken {
            return Err(file.malformed(what));
        }
        let entries = located.into_iter().map(Entry::new).collect();
        Ok(Some(Self { file, image, extension, entries }))
    }

    /// All bitmaps in directory order.
    pub fn list(&self) -> &[Entry] {
        &self.entries
    }

    /// The entry of that name.
    pub fn find(&self, name: &str) -> Result<&Entry> {
        let found = self.entries.iter().find(|e| e.name() == name);
        found.ok_or_else(|| Error::NoBitmap { file: self.file.name(), name: name.into() })
    }

    /// Loads the bits of a consistent bitmap.
    pub fn load(&self, name: &str) -> Result<Bits> {
        let table = self.usable(name)?;
        load_bits(&table)
    }

    /// Fills `buf` with the little-endian bytes of a consistent bitmap from byte `offset` on,
    /// without loading it; zeroes behind its end.
    pub fn read_bits(&self, name: &str, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.usable(name)?.read_bits(offset, buf)
    }

    /// Number of dirty granules of a consistent bitmap, found piece by piece.
    pub fn count_dirty(&self, name: &str) -> Result<u64> {
        let table = self.usable(name)?;
        let mut count = 0;
        for_pieces(&table, |_, bytes| {
            let words: Vec<u64> = to_words(bytes).collect();
            count += count_ones(&words);
        })?;
        Ok(count)
    }

    /// Bytes that a bitmap takes in the file: its table and its data clusters.
    pub fn stored_bytes(&self, name: &str) -> Result<u64> {
        let entry = self.find(name)?;
        let table = self.table(entry);
        let g = self.image.geometry;
        let mut clusters = g.clusters_for(u64::from(entry.located.entry.table_entries) * 8);
        table.raw_entries(0..u64::from(u32::MAX), |_, _, raw| {
            clusters += u64::from(raw > 1);
            Ok(())
        })?;
        Ok(clusters.saturating_mul(g.cluster_size()))
    }

    /// Where the directory is.
    pub fn extension(&self) -> BitmapsExtension {
        self.extension
    }

    pub(crate) fn table<'a>(&'a self, entry: &'a Entry) -> Table<'a> {
        Table { file: &*self.file, image: self.image, entry: &entry.located.entry }
    }

    fn usable(&self, name: &str) -> Result<Table<'_>> {
        let entry = self.find(name)?;
        match entry.state {
            State::Consistent => Ok(self.table(entry)),
            state => Err(unusable(&*self.file, name, state)),
        }
    }
}

/// Reads the directory and cuts it into entries, judging only its place and structure.
pub(crate) fn read_directory(
    file: &dyn Storage,
    extension: BitmapsExtension,
    image: ImageFacts,
) -> Result<Vec<LocatedEntry>> {
    let at = extension_at(file, image.geometry)?;
    check_place(extension, at, image).map_err(|m| file.malformed(m))?;
    let mut bytes = vec![0; usize::try_from(extension.directory_size).unwrap_or(0)];
    file.read(&mut bytes, extension.directory_offset)?;
    decode_directory(&bytes, extension.directory_offset, extension.count)
        .map_err(|m| file.malformed(m))
}

/// Loads all bits behind a table.
pub(crate) fn load_bits(table: &Table<'_>) -> Result<Bits> {
    let mut bits = Bits::new(table.shape().bits);
    for_pieces(table, |offset, bytes| bits.write_bytes(offset, bytes))?;
    Ok(bits)
}

/// Calls `each` with offset and bytes of the parts of the bitmap that are not known to be zero, in
/// order, at most [`LOAD_PIECE_BYTES`] at a time.
fn for_pieces(table: &Table<'_>, mut each: impl FnMut(u64, &[u8])) -> Result<()> {
    let total = table.shape().bytes;
    let size = table.image.geometry.cluster_size();
    let mut buf = Vec::new();
    let mut read = |run: &Range<u64>| {
        let start = run.start * size;
        let len = (run.end * size).min(total).saturating_sub(start);
        buf.resize(usize::try_from(len).unwrap_or(0), 0);
        table.read_bits(start, &mut buf)?;
        each(start, &buf);
        Ok(())
    };
    let mut run = 0..0;
    table.entries(0..total.div_ceil(size), |index, entry| {
        if entry == TableEntry::Zeroes {
            return Ok(());
        }
        if run.end != index || (run.end - run.start) * size >= LOAD_PIECE_BYTES {
            read(&run)?;
            run = index..index;
        }
        run.end = index + 1;
        Ok(())
    })?;
    read(&run)
}

fn to_words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.chunks_exact(8).map(|b| b.try_into().map(u64::from_le_bytes).unwrap_or_default())
}
