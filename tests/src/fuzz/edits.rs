//! Writing into qcow2 files that may be corrupt.

use std::ops::Range;
use std::sync::Arc;

use qcow2_file::bitmaps::Bitmaps;
use qcow2_file::check::FindingKind;
use qcow2_file::edit::{Editor, EditorOptions, ZeroMode};
use qcow2_file::layout::header::Header;
use qcow2_file::{GuestOffset, Image, Memory, Storage};

/// Bytes of the input that say what is written.
const SCRIPT_BYTES: usize = 33;
/// Largest disk whose content is held against a copy.
const MAX_SHADOW: u64 = 1 << 20;
/// Unit in which the content is read: what cannot be read is not compared.
const UNIT: usize = 512;

/// Opens any bytes for writing and writes what the first of them say. What cannot be opened is not
/// changed; what can stays whole, reads as it was written, and no bitmap is valid and stale.
pub fn qcow2_edit(bytes: &[u8]) {
    let Some((script, image)) = bytes.split_at_checked(SCRIPT_BYTES) else { return };
    let memory = Arc::new(Memory::from_bytes(image));
    let file: Arc<dyn Storage> = memory.clone();
    let Ok(editor) = Editor::open(file.clone(), EditorOptions::default()) else {
        assert!(memory.to_bytes() == image, "an image that was refused was written to");
        return;
    };
    let size = editor.virtual_size();
    if size > MAX_SHADOW {
        return;
    }
    let read = |buf: &mut [u8], at| editor.read_at(buf, GuestOffset(at)).is_ok();
    let mut disk = Shadow::of(size, read);
    let mut written = Vec::new();
    let (last, operations) = script.split_last().expect("a script");
    for operation in operations.as_chunks::<4>().0 {
        written.extend(operate(&editor, &mut disk, *operation));
    }
    disk.compare(read, "while it is open");
    let is_closed = last % 2 == 0 && editor.close().is_ok();
    still_whole(&file, &written);
    let reopened = Image::open(file, None).expect("it was open before");
    if is_closed {
        disk.compare(|buf, at| reopened.read_at(buf, GuestOffset(at)).is_ok(), "opened again");
    }
}

/// What the disk reads as, as far as that is known.
struct Shadow {
    content: Vec<u8>,
    is_known: Vec<bool>,
}

impl Shadow {
    fn of(size: u64, read: impl Fn(&mut [u8], u64) -> bool) -> Self {
        let mut content = vec![0; usize::try_from(size).expect("a small disk")];
        let units = content.chunks_mut(UNIT).enumerate();
        let is_known = units.map(|(n, unit)| read(unit, (n * UNIT) as u64)).collect();
        Self { content, is_known }
    }

    /// What an operation that was refused leaves is not known.
    fn forget(&mut self, range: Range<usize>) {
        self.is_known[range.start / UNIT..range.end.div_ceil(UNIT)].fill(false);
    }

    fn compare(&self, read: impl Fn(&mut [u8], u64) -> bool, when: &str) {
        let mut unit = [0; UNIT];
        for (n, expected) in self.content.chunks(UNIT).enumerate() {
            if self.is_known[n] {
                let found = &mut unit[..expected.len()];
                assert!(read(found, (n * UNIT) as u64), "unit {n} cannot be read {when}");
                assert!(found == expected, "unit {n} differs {when}");
            }
        }
    }
}

/// One operation: kind, place and length, to the byte for writes. Returns what may have changed.
fn operate(
    editor: &Editor,
    disk: &mut Shadow,
    [kind, high, low, len]: [u8; 4],
) -> Option<Range<u64>> {
    let size = disk.content.len();
    if size == 0 {
        return None;
    }
    let start = usize::from(u16::from_be_bytes([high, low])) * size / 65536;
    let end = (start + usize::from(len) * usize::from(len) / 8 + 1).min(size);
    let at = GuestOffset(start as u64);
    let bytes = (end - start) as u64;
    let zeroes = |mode| editor.write_zeroes(at, bytes, mode).map(|()| 0);
    let result = match kind % 8 {
        0..=3 => editor.write_at(&vec![kind | 1; end - start], at).map(|()| kind | 1),
        4 => zeroes(ZeroMode::Free),
        5 => zeroes(ZeroMode::Keep),
        6 => editor.discard(at, bytes).map(|()| 0),
        _ => {
            let _ = editor.flush();
            return None;
        }
    };
    match result {
        Ok(byte) if kind % 8 != 6 => disk.content[start..end].fill(byte),
        // A discarded range reads as anything.
        _ => disk.forget(start..end),
    }
    Some(at.0..at.0 + bytes)
}

/// The image has no corruption, and its valid bitmaps know of all that was written.
fn still_whole(file: &Arc<dyn Storage>, written: &[Range<u64>]) {
    let mut bytes = vec![0; usize::try_from(file.len().expect("a length")).expect("a small file")];
    file.read_at(&mut bytes, 0).expect("a read from memory");
    let header = Header::decode(&bytes).expect("it was open before");
    let report = qcow2_file::check::check(file, &header).expect("it was checked before");
    // A bitmap that was broken may stay so: it costs only itself.
    let mut findings = report.findings.iter();
    let harmless = [FindingKind::Leak, FindingKind::Bitmaps];
    let broken = findings.find(|finding| !harmless.contains(&finding.kind));
    assert!(broken.is_none(), "{broken:?}");
    let Ok(Some(bitmaps)) = Bitmaps::open(file.clone(), &header) else { return };
    for entry in bitmaps.list().iter().filter(|entry| entry.is_enabled() && !entry.is_in_use()) {
        let Ok(bits) = bitmaps.load(entry.name()) else { continue };
        for range in written {
            for granule in
                range.start / entry.granularity()..range.end.div_ceil(entry.granularity())
            {
                assert!(bits.get(granule), "{:?} is stale at {range:?}", entry.name());
            }
        }
    }
}

/// Images behind scripts.
pub(super) fn corpus() -> Vec<Vec<u8>> {
    // Kind, place in 65536ths of the disk, length; last, whether it is closed.
    let mixed: [[u8; 4]; 8] = [
        [1, 0x00, 0x00, 0x50],
        [2, 0x40, 0x01, 0x60],
        [4, 0x20, 0x00, 0x40],
        [3, 0xf0, 0x00, 0xff],
        [5, 0x10, 0x00, 0x60],
        [6, 0x00, 0x00, 0x60],
        [7, 0x00, 0x00, 0x00],
        [1, 0x00, 0x10, 0x20],
    ];
    let large: [[u8; 4]; 8] = [
        [1, 0x00, 0x00, 0xff],
        [1, 0x40, 0x00, 0xff],
        [1, 0x80, 0x00, 0xff],
        [4, 0x00, 0x00, 0xff],
        [7, 0x00, 0x00, 0x00],
        [1, 0x00, 0x00, 0xff],
        [1, 0xc0, 0x00, 0xff],
        [6, 0x80, 0x00, 0xff],
    ];
    let scripts = [(mixed, 0), (large, 1), ([[9; 4]; 8], 0)];
    let scripts = scripts.map(|(operations, last)| [operations.as_flattened(), &[last]].concat());
    let images = super::images::corpus();
    images.iter().flat_map(|image| scripts.iter().map(|s| [&s[..], image].concat())).collect()
}
