//! Writes to a qcow2 image in place, at random and from several threads, until it is killed.
//!
//! usage: scribble IMAGE SEED. Says "ready" when it starts writing.

use std::path::Path;
use std::sync::Arc;

use bitferry_tests::random::Random;
use qcow2_file::edit::{Editor, EditorOptions, ZeroMode};
use qcow2_file::{Access, GuestOffset, HostFile};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let image = args.next().ok_or("which image?")?;
    let seed: u64 = args.next().ok_or("which seed?")?.parse()?;
    let file = Arc::new(HostFile::open(Path::new(&image), Access::ReadWrite)?);
    let editor = Editor::open(file, EditorOptions::default())?;
    println!("ready");
    std::thread::scope(|scope| {
        for number in 0..3 {
            let random = Random::new(seed, &format!("scribble {number}"));
            let editor = &editor;
            scope.spawn(move || scribble(editor, random));
        }
    });
    Ok(())
}

/// Never returns, unless the disk fails.
fn scribble(editor: &Editor, mut random: Random) {
    let size = editor.virtual_size();
    let data: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 512).to_le_bytes()[0] | 1).collect();
    loop {
        let at = random.below(size);
        let most = *random.pick(&[600, 70_000, 1 << 20]);
        let len = 1 + random.below(most.min(size - at));
        let bytes = &data[..usize::try_from(len).unwrap_or(0)];
        let result = match random.below(12) {
            0..=6 => editor.write_at(bytes, GuestOffset(at)),
            7 => editor.write_zeroes(GuestOffset(at), len, ZeroMode::Free),
            8 => editor.write_zeroes(GuestOffset(at), len, ZeroMode::Keep),
            9 | 10 => editor.discard(GuestOffset(at), len),
            _ => editor.sync(),
        };
        if let Err(error) = result {
            eprintln!("{error}");
            return;
        }
    }
}
