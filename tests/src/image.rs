//! Images made by `qemu-img` and `qemu-io`, and bytes of theirs changed by hand.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::qemu::{qemu_img, qemu_io};
use crate::scratch::Scratch;

/// A description of an image to make.
#[derive(Debug, Clone)]
pub struct Maker {
    path: PathBuf,
    format: String,
    size: u64,
    options: Vec<String>,
    backing: Option<(String, String)>,
    steps: Vec<Step>,
}

#[derive(Debug, Clone)]
enum Step {
    Io(String),
    Bitmap { name: String, granularity: u64, is_enabled: bool },
    Snapshot(String),
}

/// Starts the description of an image in `scratch`; the format is qcow2 unless said.
pub fn make(scratch: &Scratch, name: &str, size: u64) -> Maker {
    Maker {
        path: scratch.path(name),
        format: "qcow2".to_owned(),
        size,
        options: Vec::new(),
        backing: None,
        steps: Vec::new(),
    }
}

impl Maker {
    /// Sets the format.
    pub fn format(mut self, format: &str) -> Self {
        format.clone_into(&mut self.format);
        self
    }

    /// Adds a creation option, `key=value`.
    pub fn option(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }

    /// Names a backing file, as it shall stand in the image.
    pub fn backing(mut self, name: impl Into<String>, format: &str) -> Self {
        self.backing = Some((name.into(), format.to_owned()));
        self
    }

    /// Then: a `qemu-io` command.
    pub fn io(mut self, command: impl Into<String>) -> Self {
        self.steps.push(Step::Io(command.into()));
        self
    }

    /// Then: writes `len` bytes of `pattern` at `offset`.
    pub fn write(self, pattern: u8, offset: u64, len: u64) -> Self {
        self.io(format!("write -P {pattern} {offset} {len}"))
    }

    /// Then: a persistent bitmap that records.
    pub fn bitmap(mut self, name: &str, granularity: u64) -> Self {
        self.steps.push(Step::Bitmap { name: name.to_owned(), granularity, is_enabled: true });
        self
    }

    /// Then: a persistent bitmap that does not record.
    pub fn disabled_bitmap(mut self, name: &str, granularity: u64) -> Self {
        self.steps.push(Step::Bitmap { name: name.to_owned(), granularity, is_enabled: false });
        self
    }

    /// Then: an internal snapshot.
    pub fn snapshot(mut self, name: &str) -> Self {
        self.steps.push(Step::Snapshot(name.to_owned()));
        self
    }

    /// Makes it and answers its path.
    #[track_caller]
    pub fn done(self) -> PathBuf {
        let mut create = qemu_img("create").args(["-q", "-f", &self.format]);
        if let Some((name, format)) = &self.backing {
            create = create.args(["-b", name, "-F", format]);
        }
        if !self.options.is_empty() {
            create = create.arg("-o").arg(self.options.join(","));
        }
        create.arg(&self.path).arg(self.size.to_string()).ok();
        // Neighbouring writes go to one process: starting it costs more than they do.
        let mut pending: Vec<&str> = Vec::new();
        for step in &self.steps {
            if let Step::Io(command) = step {
                pending.push(command);
                continue;
            }
            flush(&self.path, &self.format, &mut pending);
            self.apply(step);
        }
        flush(&self.path, &self.format, &mut pending);
        self.path
    }

    fn apply(&self, step: &Step) {
        match step {
            Step::Io(_) => {}
            Step::Bitmap { name, granularity, is_enabled } => {
                let state = if *is_enabled { "--enable" } else { "--disable" };
                let run = qemu_img("bitmap").args(["--add", "-g", &granularity.to_string(), state]);
                run.arg(&self.path).arg(name).ok();
            }
            Step::Snapshot(name) => {
                qemu_img("snapshot").args(["-c", name]).arg(&self.path).ok();
            }
        }
    }
}

fn flush(path: &Path, format: &str, pending: &mut Vec<&str>) {
    if !pending.is_empty() {
        qemu_io(path, format, pending.drain(..));
    }
}

/// The bytes of an image, to look at and to change by hand.
#[derive(Debug)]
pub struct Bytes {
    file: std::fs::File,
}

impl Bytes {
    /// Opens `path` for reading and writing.
    pub fn of(path: &Path) -> Self {
        let file = std::fs::File::options().read(true).write(true).open(path);
        Self { file: file.unwrap_or_else(|e| panic!("{}: {e}", path.display())) }
    }

    /// `N` bytes at `offset`.
    pub fn get<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.file.read_exact_at(&mut bytes, offset).expect("bytes of the image");
        bytes
    }

    /// A big-endian 32-bit number.
    pub fn be32(&self, offset: u64) -> u32 {
        u32::from_be_bytes(self.get(offset))
    }

    /// A big-endian 64-bit number.
    pub fn be64(&self, offset: u64) -> u64 {
        u64::from_be_bytes(self.get(offset))
    }

    /// Replaces bytes.
    pub fn put(&self, offset: u64, bytes: &[u8]) -> &Self {
        self.file.write_all_at(bytes, offset).expect("write the image");
        self
    }

    /// Replaces a big-endian 16-bit number.
    pub fn put16(&self, offset: u64, value: u16) -> &Self {
        self.put(offset, &value.to_be_bytes())
    }

    /// Replaces a big-endian 32-bit number.
    pub fn put32(&self, offset: u64, value: u32) -> &Self {
        self.put(offset, &value.to_be_bytes())
    }

    /// Replaces a big-endian 64-bit number.
    pub fn put64(&self, offset: u64, value: u64) -> &Self {
        self.put(offset, &value.to_be_bytes())
    }

    /// Cuts or extends the file.
    pub fn set_len(&self, len: u64) -> &Self {
        self.file.set_len(len).expect("set the length");
        self
    }

    /// Length of the file.
    pub fn len(&self) -> u64 {
        self.file.metadata().expect("metadata").len()
    }

    /// Whether the file is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Where the data of the header extension `kind` begins, and its length.
    pub fn extension(&self, kind: u32) -> Option<(u64, u32)> {
        let mut at = if self.be32(4) == 2 { 72 } else { u64::from(self.be32(100)) };
        loop {
            match (self.be32(at), self.be32(at + 4)) {
                (0, _) => return None,
                (found, len) if found == kind => return Some((at + 8, len)),
                (_, len) => at += 8 + u64::from(len).next_multiple_of(8),
            }
        }
    }
}
