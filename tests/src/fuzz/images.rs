//! qcow2 files.

use std::sync::Arc;

use qcow2_file::bitmaps::{self, Bitmaps, Bits, PersistentBitmap};
use qcow2_file::create::{CreateOptions, NewImage};
use qcow2_file::layout::header::Header;
use qcow2_file::{GuestOffset, Image, LayerKind, Memory, Storage};

/// Extents that one run looks at: a disk may have exabytes of holes.
const MAX_STEPS: u32 = 64;
/// Bytes that one run reads of each extent.
const READ_BYTES: u64 = 16 << 10;
/// Bits that one run loads; larger bitmaps are listed only.
const MAX_BITS: u64 = 1 << 26;

/// Opens any bytes as a layer, asks for its extents and reads from each.
pub fn qcow2_image(bytes: &[u8]) {
    let file = Arc::new(Memory::from_bytes(bytes));
    let data: Arc<dyn Storage> = Arc::new(Memory::from_bytes(&[5; 70_000]));
    let Ok(image) = Image::open(file, Some(data)) else { return };
    let size = image.virtual_size();
    let mut at = 0;
    let mut buf = Vec::new();
    for _ in 0..MAX_STEPS {
        if at >= size {
            break;
        }
        let Ok(extent) = image.extent(GuestOffset(at), size - at) else {
            // What cannot be mapped is one cluster at least; look behind it.
            at = at.saturating_add(image.geometry().cluster_size());
            continue;
        };
        assert!(extent.len > 0, "an empty extent at {at}");
        assert!(extent.len <= size - at, "an extent beyond the end at {at}");
        let len = extent.len.min(READ_BYTES);
        buf.clear();
        buf.resize(usize::try_from(len).expect("a small length"), 0xaa);
        let read = image.read_at(&mut buf, GuestOffset(at));
        if read.is_ok() && matches!(extent.kind, LayerKind::Zero) {
            assert!(buf.iter().all(|byte| *byte == 0), "a zero extent at {at} reads otherwise");
        }
        buf.clear();
        let _ = image.read_compressed(GuestOffset(at), &mut buf);
        at += extent.len;
    }
    buf.resize(4096, 0);
    let _ = image.read_at(&mut buf[..512], GuestOffset(size.saturating_sub(512)));
}

/// Lists, checks and loads the bitmaps of any bytes.
pub fn qcow2_bitmaps(bytes: &[u8]) {
    let file: Arc<dyn Storage> = Arc::new(Memory::from_bytes(bytes));
    let Ok(header) = Header::decode(bytes) else { return };
    let _ = bitmaps::check(&file, &header);
    let Ok(Some(bitmaps)) = Bitmaps::open(file, &header) else { return };
    for entry in bitmaps.list() {
        let size = header.size - header.size % 512;
        let bits = size.div_ceil(entry.granularity().max(1));
        if bits > MAX_BITS {
            continue;
        }
        if let Ok(loaded) = bitmaps.load(entry.name()) {
            assert_eq!(loaded.len(), bits, "bits of {:?}", entry.name());
            assert!(loaded.count() <= bits);
        }
        let mut buf = [0; 100];
        let _ = bitmaps.read_bits(entry.name(), 0, &mut buf);
    }
}

/// Walks all metadata of any bytes, twice: nothing may have changed.
pub fn qcow2_check(bytes: &[u8]) {
    let memory = Arc::new(Memory::from_bytes(bytes));
    let Ok(header) = Header::decode(bytes) else { return };
    let file: Arc<dyn Storage> = memory.clone();
    let _ = qcow2_file::check::check(&file, &header);
    assert!(memory.to_bytes() == bytes, "a check wrote to the image");
}

/// Small images of many kinds.
pub(super) fn corpus() -> Vec<Vec<u8>> {
    let base = CreateOptions::new(300 << 10);
    let small = CreateOptions { cluster_bits: 9, size: 80 << 10, ..base.clone() };
    vec![
        image(&small, true),
        image(&CreateOptions { refcount_bits: 1, ..small.clone() }, true),
        image(&CreateOptions { refcount_bits: 64, cluster_bits: 12, ..base.clone() }, true),
        image(&CreateOptions { version: 2, cluster_bits: 10, ..small.clone() }, false),
        image(&CreateOptions { extended_l2: true, cluster_bits: 14, ..base.clone() }, true),
        image(&CreateOptions { size: 1 << 44, cluster_bits: 16, ..base.clone() }, false),
        image(&base, true),
    ]
}

fn image(options: &CreateOptions, has_bitmaps: bool) -> Vec<u8> {
    let memory = Arc::new(Memory::new());
    let image = NewImage::create(memory.clone(), options).expect("options of the corpus");
    let cluster = 1 << options.cluster_bits;
    let content: Vec<u8> = (1..=250).cycle().take(3 * cluster).collect();
    let write = |at| image.write_at(&content, GuestOffset(at)).expect("a write to memory");
    write(0);
    write(20 << 10);
    image.write_zeroes(GuestOffset(8 << 10), 4 << 10).expect("zeroes in memory");
    let bitmap = |name: &str, granularity_bits, is_enabled| {
        let mut bits = Bits::for_disk(options.size, granularity_bits);
        bits.set_range(1..3);
        PersistentBitmap { name: name.into(), granularity_bits, is_enabled, bits }
    };
    let mut bitmaps = Vec::new();
    if has_bitmaps {
        bitmaps = vec![bitmap("nightly", 9, true), bitmap("b", 16, false)];
    }
    image.finish(&bitmaps).expect("an image in memory");
    memory.to_bytes()
}
