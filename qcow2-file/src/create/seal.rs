//! Finishing: tables, refcounts, and the header last.

use std::io::ErrorKind;

use super::refcounts::{Placement, Refcounts, write_words};
use super::space::Recorder;
use super::step::mapped;
use super::{NewImage, lengthen};
use crate::bitmaps::{self, PersistentBitmap};
use crate::error::Result;
use crate::in_memory;
use crate::layout::entry::Subclusters;
use crate::layout::extension::BitmapsExtension;
use crate::layout::header::autoclear;
use crate::layout::units::HostOffset;
use crate::storage::StorageExt;

/// The header is written in pieces of this size; what follows it in its cluster stays a hole.
const HEADER_ALIGN: usize = 4096;

impl NewImage {
    /// [`NewImage::finish`] without its gate. Nobody else may be writing.
    pub(super) fn seal(&self, bitmaps: &[PersistentBitmap]) -> Result<()> {
        self.map.flush()?;
        self.map.forget();
        self.space.trim();
        self.finish_data_file()?;
        if self.is_one_to_one {
            self.write_one_to_one()?;
        }
        let g = self.geometry;
        let mut recorder = Recorder::new(&self.space);
        let file = self.file.as_ref();
        let bitmaps = bitmaps::write(file, g, bitmaps, self.header.size, &mut recorder)?;
        let at = Placement::behind(self.space.clusters(), g);
        let mut taken = recorder.into_taken();
        taken.push(0..self.first_cluster());
        Refcounts::new(file, (g, self.data.is_some()), &self.map, taken).write(at)?;
        self.map.write_homes()?;
        self.set_length(at.end << g.cluster_bits())?;
        file.make_durable()?;
        self.write_header(at, bitmaps)
    }

    /// Ends the file behind its last cluster. A device that is overwritten keeps its length.
    fn set_length(&self, end: u64) -> Result<()> {
        let file = self.file.as_ref();
        let is_kept = !self.map.is_fresh() && file.length()? >= end;
        match file.set_len(end) {
            Err(e) if is_kept && e.kind() == ErrorKind::Unsupported => Ok(()),
            set => set.map_err(|e| file.io_error("set the length to", end, e)),
        }
    }

    /// A data file is as long as the disk, so that it can be used by itself.
    fn finish_data_file(&self) -> Result<()> {
        let Some(data) = &self.data else {
            return Ok(());
        };
        lengthen(data.as_ref(), self.header.size)?;
        data.make_durable()
    }

    /// The tables of a raw data file: each guest cluster at its own offset.
    fn write_one_to_one(&self) -> Result<()> {
        let g = self.geometry;
        let words = if g.has_subclusters() { 2 } else { 1 };
        let entry = |cluster: u64| {
            let host = HostOffset(cluster << g.cluster_bits());
            let (raw, bitmap) = mapped(host, Subclusters::DATA).encode(g);
            [raw, bitmap].into_iter().take(words)
        };
        let clusters = g.clusters_for(self.header.size);
        let beyond = (self.map.l1_len() * g.l2_entries() - clusters) * words as u64;
        let padding = std::iter::repeat_n(0, in_memory(beyond));
        let entries = (0..clusters).flat_map(entry).chain(padding);
        write_words(self.file.as_ref(), self.map.table(0), entries)
    }

    /// Makes the image valid. Where that cannot be made sure of, it is made invalid again as far as
    /// the file allows.
    fn write_header(&self, at: Placement, bitmaps: Option<BitmapsExtension>) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let mut header = self.header.clone();
        header.l1_size = u32::try_from(self.map.l1_len()).unwrap_or(u32::MAX);
        header.l1_table_offset = self.map.l1_at();
        header.refcount_table_offset = at.table << bits;
        header.refcount_table_clusters = u32::try_from(at.table_clusters).unwrap_or(u32::MAX);
        header.set_bitmaps(bitmaps);
        if bitmaps.is_some() {
            header.autoclear_features |= autoclear::BITMAPS;
        }
        let mut bytes = header.encode().unwrap_or_default();
        let used = bytes.iter().rposition(|b| *b != 0).map_or(0, |last| last + 1);
        bytes.truncate(used.next_multiple_of(HEADER_ALIGN));
        let written = self.file.write(&bytes, 0).and_then(|()| self.file.make_durable());
        if written.is_err() {
            bytes.fill(0);
            let undone = self.file.write(&bytes, 0).and_then(|()| self.file.make_durable());
            if let Err(error) = undone {
                tracing::warn!(%error, "an image that could not be finished may look valid");
            }
        }
        written
    }
}
