//! One image of this side: what it holds before, and the content that is written into it.

use std::collections::BTreeMap;
use std::path::Path;

use block_mig::device::{EditorSink, RawSink};
use format_spec::Blame;
use format_spec::qemu::block::{CHUNK_BYTES, chunk_len};
use mig_core::block::{BlockSink, is_zero};
use qcow2_file::bitmaps::{Bits, State};
use qcow2_file::edit::Editor;
use qcow2_file::layout::header::incompatible;
use qcow2_file::{Access, Chain, HostFile, Opener};

use super::super::error::{Error, Result, Subject};
use super::bitmaps::{Holder, Taken};
use super::options::IncomingOptions;
use crate::Observer;
use crate::berth::Kept;
use crate::copy::{Format, open_editor, suspend};
use crate::disk::{Stored, check_probe};
use crate::options::DiskOption;

/// Most chunks of a disk of which it is remembered whether they came: those of 128 TiB.
const MAX_SEEN: u64 = 1 << 27;

/// One image of this side.
#[derive(Debug)]
pub(super) struct Disk<'o> {
    pub(super) place: &'o DiskOption,
    /// Where journals of devices are.
    journals: Option<&'o Path>,
    /// Holds the locks.
    pub(super) chain: Chain,
    /// Bytes of the disk.
    pub(super) size: u64,
    /// Whether it holds an in-place copy that was not finished (SPEC 3.3).
    pub(super) is_unfinished: bool,
    pub(super) body: Body,
    pub(super) counts: Counts,
    /// Which chunks have come; `None` for a disk with too many.
    seen: Option<Bits>,
}

/// How content gets into an image.
#[derive(Debug)]
pub(super) enum Body {
    /// None has come.
    Untouched,
    /// The bytes themselves.
    Raw(RawSink),
    /// Through the mapping; bitmaps follow.
    Qcow2(Box<Editor>),
}

/// What has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counts {
    /// Bytes of content, the first time.
    pub(super) data: u64,
    /// Bytes that came as zeroes, the first time.
    pub(super) zero: u64,
    /// Bytes of chunks that came again.
    pub(super) repeated: u64,
}

impl<'o> Disk<'o> {
    /// Opens and locks an image. Nothing is written.
    pub(super) fn open(
        place: &'o DiskOption,
        options: &'o IncomingOptions,
        observer: &dyn Observer,
    ) -> crate::Result<Self> {
        let path = place.path.as_path();
        let is_device = HostFile::open(path, Access::Read)?.is_device();
        let format = place.format.or(is_device.then_some(Format::Raw));
        let chain = Opener::new()
            .format(format.map(Into::into))
            .access(Access::ReadWrite)
            .allow_named_files(options.allow_backing)
            .without_named_files(!options.allow_backing)
            .accept_unfinished(true)
            .lock(true)
            .open(path)?;
        check_probe((path, "format="), &chain, observer)?;
        let size = chain.virtual_size();
        let is_unfinished = chain.top().as_qcow2().is_some_and(|image| {
            image.header().incompatible_features & incompatible::UNFINISHED_COPY != 0
        });
        let chunks = size.div_ceil(CHUNK_BYTES as u64);
        let seen = (chunks <= MAX_SEEN).then(|| Bits::new(chunks));
        let (body, counts) = (Body::Untouched, Counts::default());
        let journals = options.device_journals.as_deref();
        Ok(Self { place, journals, chain, size, is_unfinished, body, counts, seen })
    }

    /// What it can hold in the way of bitmaps.
    pub(super) fn holder(&self) -> Holder {
        let mut names = BTreeMap::new();
        let cannot = match self.chain.top().as_qcow2() {
            None => Some("a raw image has no place for bitmaps".to_owned()),
            Some(image) if image.header().version < 3 => {
                Some("a qcow2 image of version 2 has no place for bitmaps".to_owned())
            }
            Some(image) => {
                let stored = Stored::of(image);
                for entry in stored.directory().map(|d| d.list()).unwrap_or_default() {
                    let is_broken = entry.state == State::Inconsistent;
                    let taken = if is_broken { Taken::Broken } else { Taken::Usable };
                    names.insert(entry.name().to_owned(), taken);
                }
                // Bitmaps that were made stale vanish with the next change of any; a broken
                // directory must be repaired first.
                stored.unlistable().filter(|_| !matches!(stored, Stored::Stale(_)))
            }
        };
        Holder { id: self.place.id.clone(), size: self.size, cannot, names }
    }

    /// Writes a chunk that stands at byte `at` of the stream; `None` stands for zeroes. What of it
    /// lies beyond the end of the disk is padding.
    pub(super) fn write(
        &mut self,
        offset: u64,
        content: Option<&[u8; CHUNK_BYTES]>,
        (at, allow_backing): (u64, bool),
        observer: &dyn Observer,
    ) -> Result<()> {
        let len = chunk_len(offset, self.size).map_err(|problem| Error::Misfit {
            subject: Subject { disk: self.place.id.clone(), bitmap: None },
            offset: at,
            reason: format!(
                "the chunk's offset {problem}; the image has {} bytes and must be as large as the \
                 source's disk",
                self.size
            ),
            blame: Blame::Bytes,
        })?;
        if matches!(self.body, Body::Untouched) {
            self.body = self.begin(allow_backing, observer)?;
        }
        match &self.body {
            Body::Untouched => {}
            Body::Raw(sink) => put(sink, offset, len, content)?,
            Body::Qcow2(editor) => put(&EditorSink::new(editor), offset, len, content)?,
        }
        self.count(offset, len as u64, content.is_some());
        Ok(())
    }

    /// Gets the image ready to be written: enabled bitmaps of its own are marked, and follow.
    fn begin(&self, allow_backing: bool, observer: &dyn Observer) -> crate::Result<Body> {
        // What a bitferry that wrote here before has noted is not so any more.
        Kept::begin((&self.place.path, self.journals), None, (false, true))?;
        let name = self.place.path.display();
        let unmarked = "until the migration is complete it holds neither the old nor the new \
                        content, and nothing in it says so";
        if self.chain.top().as_qcow2().is_none() {
            observer.warning(&format!("{name} is written in place: {unmarked}"));
            return Ok(Body::Raw(RawSink::new(self.chain.top().file().clone(), self.size)));
        }
        let editor = open_editor(&self.chain, allow_backing).map_err(|error| {
            let names_files = self.chain.top().as_qcow2().is_some_and(|image| {
                image.header().backing_file.is_some() || image.header().has_data_file()
            });
            if allow_backing || !names_files {
                return error;
            }
            crate::Error::WouldLose {
                reason: format!("{name} stands on other files, which were not opened"),
                hint: "if you trust this image, use --allow-backing".to_owned(),
            }
        })?;
        if editor.header().version < 3 {
            observer.warning(&format!("{name}, of version 2, is written in place: {unmarked}"));
        }
        Ok(Body::Qcow2(Box::new(editor)))
    }

    /// The migration has failed: the image stays marked as unfinished, and its own bitmaps have
    /// recorded what was written.
    pub(super) fn leave(&mut self) {
        if let Body::Qcow2(editor) = std::mem::replace(&mut self.body, Body::Untouched) {
            suspend(*editor);
        }
    }

    fn count(&mut self, offset: u64, len: u64, has_content: bool) {
        let chunk = CHUNK_BYTES as u64;
        // A chunk that was moved to end with the disk stands for the last one.
        let last = offset.saturating_add(len).saturating_sub(1) / chunk;
        let index = if offset.is_multiple_of(chunk) { offset / chunk } else { last };
        let is_again = self.seen.as_ref().is_some_and(|seen| seen.get(index));
        let counter = match (is_again, has_content) {
            (true, _) => &mut self.counts.repeated,
            (false, true) => &mut self.counts.data,
            (false, false) => &mut self.counts.zero,
        };
        *counter = counter.saturating_add(len);
        if let Some(seen) = &mut self.seen {
            seen.set_range(index..index.saturating_add(1));
        }
    }

    /// How many chunks of how many have not come, as far as that is known.
    pub(super) fn missing_chunks(&self) -> Option<(u64, u64)> {
        let seen = self.seen.as_ref()?;
        Some((seen.len().saturating_sub(seen.count()), seen.len()))
    }
}

/// Writes the first `len` bytes of a chunk. Runs of zeroes are made to read as zero without taking
/// room.
fn put(
    sink: &dyn BlockSink,
    offset: u64,
    len: usize,
    content: Option<&[u8; CHUNK_BYTES]>,
) -> mig_core::Result<()> {
    let zeroes = |offset: u64, len: usize| {
        if sink.reads_as_zero(offset, len as u64) {
            return Ok(());
        }
        sink.write_zeroes(offset, len as u64)
    };
    let Some(content) = content else { return zeroes(offset, len) };
    let mut rest = content.get(..len).unwrap_or_default();
    let mut at = offset;
    while !rest.is_empty() {
        let (run, is_zero) = run(sink.allocation_unit(), at, rest);
        let (bytes, behind) = rest.split_at(run);
        if is_zero {
            zeroes(at, run)?
        } else {
            sink.write_at(bytes, at)?
        }
        at = at.saturating_add(run as u64);
        rest = behind;
    }
    Ok(())
}

/// Length of the run of units at the start of `bytes`, which stand at `offset`, that are all zero
/// or all not, and which.
fn run(unit: u64, offset: u64, bytes: &[u8]) -> (usize, bool) {
    let mut end = 0;
    let mut kind = None;
    while end < bytes.len() {
        let here = offset.saturating_add(end as u64);
        let to_next = usize::try_from(unit - here % unit.max(1)).unwrap_or(usize::MAX).max(1);
        let next = end.saturating_add(to_next).min(bytes.len());
        let is_zero = is_zero(bytes.get(end..next).unwrap_or_default());
        if *kind.get_or_insert(is_zero) != is_zero {
            break;
        }
        end = next;
    }
    (end, kind.unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_end_where_zero_begins_or_ends() {
        let mut bytes = vec![0; 3000];
        bytes[1024..2000].fill(7);
        // Units of 1 KiB, the first of which has begun before.
        assert_eq!(run(1024, 1024, &bytes), (1024, true));
        assert_eq!(run(1024, 2048, &bytes[1024..]), (1024, false));
        assert_eq!(run(1024, 3072, &bytes[2048..]), (952, true));
        assert_eq!(run(1024, 1000, &bytes), (24, true));
        assert_eq!(run(4096, 0, &bytes), (3000, false));
        assert_eq!(run(512, 0, &[]), (0, false));
    }
}
