//! A file system that is full, at any moment.
#![allow(clippy::cast_possible_truncation)]

use std::io;
use std::sync::Arc;

use super::{Editor, EditorOptions, ZeroMode};
use crate::create::{CreateOptions, NewImage};
use crate::layout::units::GuestOffset;
use crate::storage::{Run, Storage};
use crate::{Memory, check, preflight};

const SIZE: u64 = 4 << 20;

/// A file that cannot grow beyond `room` bytes.
#[derive(Debug)]
struct Full {
    file: Arc<Memory>,
    room: u64,
}

impl Full {
    fn fits(&self, end: u64) -> io::Result<()> {
        if end > self.room { Err(io::Error::from(io::ErrorKind::StorageFull)) } else { Ok(()) }
    }
}

impl Storage for Full {
    fn name(&self) -> Arc<str> {
        self.file.name()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.fits(offset + buf.len() as u64)?;
        self.file.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.fits(offset + len)?;
        self.file.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.fits(len)?;
        self.file.set_len(len)
    }

    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<Run> {
        self.file.run_at(offset, max_len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

fn empty_image() -> Arc<Memory> {
    let memory = Arc::new(Memory::new());
    let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(SIZE) };
    NewImage::create(memory.clone(), &options).unwrap().finish(&[]).unwrap();
    memory
}

/// Writes that found room stay, others did not happen; nothing is leaked, and the editor is as good
/// as before: what had no room was data, or metadata that nothing pointed at yet.
#[test]
fn a_full_file_costs_the_writes_that_have_no_room_alone() {
    let start = empty_image().len().unwrap();
    let mut failed = 0;
    for more in 0..400 {
        let memory = empty_image();
        let file = Arc::new(Full { file: memory.clone(), room: start + more * 512 });
        let editor = Editor::open(file, EditorOptions::default()).unwrap();
        let mut model = vec![0; usize::try_from(SIZE).unwrap()];
        // Across refcount blocks and L2 tables: from front and end, as if by two writers.
        for n in 0..60u64 {
            let at = if n % 2 == 0 { n * 1300 } else { SIZE - n * 35_000 };
            let data = vec![n as u8 + 1; 700 + 400 * (n as usize % 5)];
            if editor.write_at(&data, GuestOffset(at)).is_err() {
                failed += 1;
                // It may have happened in part.
                editor.read_at(&mut model[at as usize..][..data.len()], GuestOffset(at)).unwrap();
            } else {
                model[at as usize..][..data.len()].copy_from_slice(&data);
            }
            if n % 16 == 15 {
                editor.sync().unwrap();
                editor.write_zeroes(GuestOffset(n * 1000), 2048, ZeroMode::Free).unwrap_or(());
                let range = n as usize * 1000..n as usize * 1000 + 2048;
                editor.read_at(&mut model[range], GuestOffset(n * 1000)).unwrap();
            }
        }
        editor.close().unwrap();
        let file: Arc<dyn Storage> = Arc::new(memory.snapshot());
        let header = preflight::read_header(&*file).unwrap();
        let found = check::check(&file, &header).unwrap();
        assert!(found.is_clean(), "{more}: {:?}", found.findings.first());
        let editor = Editor::open(file, EditorOptions::default()).unwrap();
        let mut bytes = vec![0; model.len()];
        editor.read_at(&mut bytes, GuestOffset(0)).unwrap();
        assert!(bytes == model, "{more}");
    }
    assert!(failed > 400);
}
