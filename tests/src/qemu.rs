//! `qemu-img`, `qemu-io` and `qemu-nbd`, with time limits. Call after [`crate::require`].

use std::io::Read;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::json;
use crate::peer::Peer;
use crate::process::{Output, Run, Running};
use crate::scratch::Scratch;

/// `qemu-img` with a subcommand.
pub fn qemu_img(subcommand: &str) -> Run {
    Run::new(path_of(Peer::QemuImg)).arg(subcommand)
}

/// Runs `qemu-io` commands on an image in one go. QEMU's tool succeeds although a command failed,
/// so what it says is looked at too.
#[track_caller]
pub fn qemu_io<C: AsRef<str>>(image: &Path, format: &str, commands: impl IntoIterator<Item = C>) {
    let mut run = Run::new(path_of(Peer::QemuIo)).args(["-f", format]);
    for command in commands {
        run = run.args(["-c", command.as_ref()]);
    }
    let output = run.arg(image).output();
    let said = output.text() + &output.complaint();
    let is_error = ["failed", "rror", "nvalid", "attern verification"];
    let failed = !output.status.success() || is_error.iter().any(|w| said.contains(w));
    assert!(!failed, "{output}");
}

/// What `qemu-img check` found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Checked {
    /// Clusters that are counted and not used.
    pub leaks: u64,
    /// Structures that are wrong.
    pub corruptions: u64,
}

/// `qemu-img check`, which must be able to read the image.
#[track_caller]
pub fn check(image: &Path) -> Checked {
    let output = qemu_img("check").args(["-f", "qcow2", "--output=json"]).arg(image).output();
    let is_answer = matches!(output.code(), Some(0 | 2 | 3));
    assert!(is_answer, "{output}");
    let document = json::document(&output.text());
    let count = |key: &str| document[key].as_u64().unwrap_or(0);
    assert_eq!(count("check-errors"), 0, "{output}");
    Checked { leaks: count("leaks"), corruptions: count("corruptions") }
}

/// Panics unless `qemu-img check` finds nothing to complain about.
#[track_caller]
pub fn check_is_clean(image: &Path) {
    let output = qemu_img("check").args(["-f", "qcow2"]).arg(image).output();
    assert!(output.status.success(), "{output}");
}

/// Panics unless `qemu-img compare` sees the same guest data.
#[track_caller]
pub fn same_content(a: (&Path, &str), b: (&Path, &str)) {
    let run = qemu_img("compare").args(["-f", a.1, "-F", b.1]).arg(a.0).arg(b.0);
    let output = run.output();
    assert!(output.status.success(), "{output}");
}

/// The same guest content in two qcow2 images, the second one clean, and the same bits in each of
/// these bitmaps, which QEMU reads.
#[track_caller]
pub fn same_disk(a: &Path, b: &Path, bitmaps: &[&str]) {
    same_content((a, "qcow2"), (b, "qcow2"));
    check_is_clean(b);
    for name in bitmaps {
        let read = |image| dirty_ranges(image, name).unwrap_or_else(|o| panic!("{o}"));
        assert_eq!(read(a), read(b), "bitmap {name}");
    }
}

/// `qemu-img info` of one file, without opening what it names.
#[track_caller]
pub fn info(image: &Path, format: &str) -> Value {
    let run = qemu_img("info").args(["-f", format, "--output=json"]).arg(image);
    json::document(&run.ok())
}

/// `qemu-img map`.
#[track_caller]
pub fn map(image: &Path, format: &str) -> Vec<Value> {
    let run = qemu_img("map").args(["-f", format, "--output=json"]).arg(image);
    json::document(&run.ok()).as_array().expect("a list").clone()
}

/// Bytes that a file takes on its file system.
pub fn allocated_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    path.metadata().unwrap_or_else(|e| panic!("{}: {e}", path.display())).blocks() * 512
}

/// A `qemu-nbd` that serves one image on a Unix socket. Dropping it kills it.
#[derive(Debug)]
pub struct Nbd {
    child: Option<Running>,
    socket: PathBuf,
    _dir: Scratch,
}

impl Nbd {
    /// Serves `image` with further options of `qemu-nbd`; answers when the server is ready.
    #[track_caller]
    pub fn serve<A: AsRef<std::ffi::OsStr>>(
        image: &Path,
        format: &str,
        options: impl IntoIterator<Item = A>,
    ) -> Self {
        Self::try_serve(image, format, options).unwrap_or_else(|o| panic!("{o}"))
    }

    /// Like [`Nbd::serve`]; where `qemu-nbd` refuses, what it said.
    pub fn try_serve<A: AsRef<std::ffi::OsStr>>(
        image: &Path,
        format: &str,
        options: impl IntoIterator<Item = A>,
    ) -> Result<Self, Box<Output>> {
        let dir = Scratch::new();
        let socket = dir.path("nbd");
        let run = Run::new(path_of(Peer::QemuNbd)).args([
            "--persistent",
            "--shared=0",
            "-f",
            format,
            "-k",
        ]);
        let run = run.arg(&socket).args(options).arg(image).patience(Duration::from_secs(600));
        let child = run.spawn();
        let end = Instant::now() + Duration::from_secs(60);
        while !greets(&socket) {
            if child.ends_within(Duration::from_millis(5)) || Instant::now() > end {
                return Err(Box::new(child.kill()));
            }
        }
        Ok(Self { child: Some(child), socket, _dir: dir })
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.as_ref().expect("running").id()
    }

    /// Ends it in an orderly way.
    pub fn quit(mut self) -> Output {
        let child = self.child.take().expect("running");
        child.signal(rustix::process::Signal::TERM);
        child.wait()
    }
}

/// The dirty ranges of a persistent bitmap as another program reads them: `qemu-nbd` serves the
/// bitmap, `qemu-img map` asks for it. `Err` where `qemu-nbd` refuses to serve it.
pub fn dirty_ranges(image: &Path, bitmap: &str) -> Result<Vec<Range<u64>>, Box<Output>> {
    let nbd = Nbd::try_serve(image, "qcow2", ["-r", "-B", bitmap])?;
    let escaped = |s: &str| s.replace(',', ",,");
    let options = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{}",
        escaped(&nbd.socket().to_string_lossy()),
        escaped(bitmap)
    );
    let run = qemu_img("map").args(["--output=json", "--image-opts"]).arg(options);
    let map = json::document(&run.ok());
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for part in map.as_array().expect("a list") {
        let number = |key: &str| part[key].as_u64().expect("a number");
        let (start, end) = (number("start"), number("start") + number("length"));
        // The bitmap comes in the place of allocation: what looks like a hole is dirty.
        if part["data"] == true {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    Ok(ranges)
}

/// Whether a server is there and ready: the socket exists before the image is open.
fn greets(socket: &Path) -> bool {
    let greeting = || {
        let mut stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(Duration::from_secs(60)))?;
        let mut magic = [0; 8];
        stream.read_exact(&mut magic).map(|()| magic)
    };
    greeting().is_ok_and(|magic| &magic == b"NBDMAGIC")
}

fn path_of(peer: Peer) -> &'static Path {
    peer.find().unwrap_or_else(|| panic!("{} is not here: the test must ask first", peer.name()))
}
