//! What qemu-img and qemu-io say about an image, and how it is held against what we read.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::skip::skip;
use qcow2_file::chain::{Chain, ChainKind};
use qcow2_file::{GuestOffset, HostOffset, Opener};

/// Whether the tools are here; says loudly that a test is skipped where they are not.
pub(crate) fn has_qemu() -> bool {
    let found = ["qemu-img", "qemu-io"]
        .iter()
        .all(|tool| Command::new(tool).arg("--version").output().is_ok_and(|o| o.status.success()));
    if !found {
        let is_demanded = std::env::var_os("BITFERRY_DEMAND_PEERS").is_some_and(|v| v == "1");
        assert!(!is_demanded, "qemu-img and qemu-io are demanded");
        skip("qemu-img and qemu-io are not installed");
    }
    found
}

/// Runs a tool in `dir` for a minute at most.
pub(crate) fn run(dir: &Path, tool: &str, args: &[&str]) -> String {
    let output = Command::new("timeout")
        .args(["60", tool])
        .args(args)
        .current_dir(dir)
        .output()
        .unwrap_or_else(|e| panic!("{tool}: {e}"));
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{tool} {}: {complaint}", args.join(" "));
    String::from_utf8(output.stdout).unwrap()
}

/// A directory with images.
pub(crate) struct Images {
    dir: tempfile::TempDir,
}

impl Images {
    pub(crate) fn new() -> Self {
        let shm = Path::new("/dev/shm");
        let dir = if shm.is_dir() { tempfile::tempdir_in(shm) } else { tempfile::tempdir() };
        Self { dir: dir.unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `qemu-img create -f qcow2 -o OPTIONS NAME SIZE`.
    pub(crate) fn create(&self, name: &str, options: &str, size: u64) {
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([name, size.as_str()]);
        self.img(&args);
    }

    pub(crate) fn img(&self, args: &[&str]) -> String {
        run(self.dir.path(), "qemu-img", args)
    }

    /// Commands for qemu-io. Some may fail (a compressed write needs an unallocated cluster): what
    /// is compared is what both sides read afterwards.
    pub(crate) fn io(&self, name: &str, format: &str, commands: &[String]) {
        let mut tool = Command::new("timeout");
        tool.args(["60", "qemu-io", "-f", format]).current_dir(self.dir.path());
        for command in commands {
            tool.args(["-c", command.as_str()]);
        }
        let said = String::from_utf8_lossy(&tool.arg(name).output().unwrap().stdout).into_owned();
        assert!(said.contains("wrote ") || said.contains("discard "), "{commands:?}: {said}");
    }

    /// Opens with everything allowed.
    pub(crate) fn open(&self, name: &str) -> Chain {
        Opener::new().allow_named_files(true).open(&self.path(name)).unwrap()
    }

    /// What qemu-img reads.
    pub(crate) fn content(&self, name: &str, format: &str) -> Vec<u8> {
        let out = format!("{name}.content");
        self.img(&["convert", "-f", format, "-O", "raw", name, &out]);
        let content = std::fs::read(self.path(&out)).unwrap();
        std::fs::remove_file(self.path(&out)).unwrap();
        content
    }

    /// Holds content and extents of an image against qemu-img.
    pub(crate) fn compare(&self, name: &str, format: &str) {
        let opener = Opener::new().format(Some(format.parse().unwrap())).allow_named_files(true);
        let chain = opener.open(&self.path(name)).unwrap();
        let expected = self.content(name, format);
        assert_eq!(chain.virtual_size(), expected.len() as u64, "{name}: size");
        for piece in [3 << 20, 65536, 4096 + 512] {
            same_content(&chain, &expected, piece, name);
        }
        same_anywhere(&chain, &expected, name);
        let map = self.img(&["map", "-f", format, "--output=json", name]);
        same_extents(&chain, &expected, &parse_map(&map), name);
        same_compressed(&chain, &expected, name);
    }
}

/// Reads of odd lengths at odd offsets.
fn same_anywhere(chain: &Chain, expected: &[u8], name: &str) {
    let mut buf = vec![0xee; 100_003];
    for n in 0..200usize {
        let at = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % expected.len();
        let len = (n * 7919 % buf.len() + 1).min(expected.len() - at);
        let got = &mut buf[..len];
        chain.read_at(got, GuestOffset(at as u64)).unwrap();
        assert!(*got == expected[at..at + len], "{name}: {len} bytes at {at}");
    }
}

fn same_content(chain: &Chain, expected: &[u8], piece: usize, name: &str) {
    let mut buf = vec![0xee; piece];
    for (n, want) in expected.chunks(piece).enumerate() {
        let at = GuestOffset((n * piece) as u64);
        let got = &mut buf[..want.len()];
        got.fill(0xee);
        chain.read_at(got, at).unwrap();
        if got != want {
            let first = got.iter().zip(want).position(|(a, b)| a != b).unwrap();
            panic!("{name}: differs at {:#x}", at.0 + first as u64);
        }
    }
}

/// One line of `qemu-img map --output=json`.
#[derive(Debug, Clone)]
struct Mapped {
    start: u64,
    len: u64,
    depth: usize,
    is_zero: bool,
    is_data: bool,
    is_present: bool,
    is_compressed: bool,
    offset: Option<u64>,
}

fn parse_map(json: &str) -> Vec<Mapped> {
    let field = |line: &str, name: &str| {
        let rest = line.split_once(&format!("\"{name}\": "))?.1;
        Some(rest.split([',', '}']).next()?.to_owned())
    };
    let number = |line: &str, name: &str| field(line, name).map(|v| v.parse::<u64>().unwrap());
    let flag = |line: &str, name: &str| field(line, name).as_deref() == Some("true");
    let lines = json.lines().filter(|line| line.contains("\"start\""));
    lines
        .map(|line| Mapped {
            start: number(line, "start").unwrap(),
            len: number(line, "length").unwrap(),
            depth: number(line, "depth").unwrap() as usize,
            is_zero: flag(line, "zero"),
            is_data: flag(line, "data"),
            is_present: flag(line, "present"),
            is_compressed: flag(line, "compressed"),
            offset: number(line, "offset"),
        })
        .collect()
}

fn same_extents(chain: &Chain, expected: &[u8], map: &[Mapped], name: &str) {
    let (mut at, mut last) = (0, None);
    let size = chain.virtual_size();
    while at < size {
        let found = chain.extent(GuestOffset(at), size - at).unwrap();
        assert!(found.len >= 1 && at + found.len <= size, "{name}: {found:?} at {at}");
        if chain.layers().len() == 1 && found.kind != ChainKind::Zero {
            assert_ne!(last, Some((found.kind, found.host)), "{name}: not merged at {at}");
        }
        last = Some((found.kind, found.host.map(|h| HostOffset(h.0 + found.len))));
        for m in map.iter().filter(|m| m.start < at + found.len && m.start + m.len > at) {
            let (from, to) = (m.start.max(at), (m.start + m.len).min(at + found.len));
            let what = format!("{name}: {found:?} at {at:#x} against {m:?}");
            let host = found.host.map(|h| h.0 + from - at);
            let offset = m.offset.map(|o| o + from - m.start);
            match found.kind {
                ChainKind::Data => {
                    assert!(m.is_data && !m.is_zero && !m.is_compressed, "{what}");
                    assert_eq!((found.depth, host), (m.depth, offset), "{what}");
                }
                ChainKind::Compressed => {
                    assert!(m.is_data && m.is_compressed && found.depth == m.depth, "{what}");
                }
                ChainKind::Zero | ChainKind::Hole if m.is_data => {
                    let bytes = &expected[from as usize..to as usize];
                    assert!(bytes.iter().all(|b| *b == 0), "{what}");
                    assert_eq!(host, offset, "{what}");
                }
                ChainKind::Zero => assert!(m.is_zero && m.is_present, "{what}"),
                ChainKind::Hole => assert!(m.is_zero, "{what}"),
            }
        }
        at += found.len;
    }
}

/// Every compressed cluster is handed out whole, and its exact bytes decode to its content.
fn same_compressed(chain: &Chain, expected: &[u8], name: &str) {
    use qcow2_file::layout::header::CompressionType;
    let (mut at, size) = (0, chain.virtual_size());
    while at < size {
        let found = chain.extent(GuestOffset(at), size - at).unwrap();
        let end = at + found.len;
        while found.kind == ChainKind::Compressed && at < end {
            let mut stored = b"kept".to_vec();
            let unit = chain.read_compressed(GuestOffset(at), &mut stored).unwrap();
            let Some(unit) = unit else {
                assert!(found.depth > 0, "{name}: no unit at {at:#x}");
                break;
            };
            assert!(stored.starts_with(b"kept"));
            let stored = &stored[4..];
            let len = unit.cluster_size as usize;
            let content = match unit.compression {
                CompressionType::Zlib => {
                    let mut content = Vec::with_capacity(len);
                    let mut inflate = flate2::Decompress::new(false);
                    let finish = flate2::FlushDecompress::Finish;
                    let status = inflate.decompress_vec(stored, &mut content, finish).unwrap();
                    assert_eq!(status, flate2::Status::StreamEnd, "{name}");
                    assert_eq!(inflate.total_in(), stored.len() as u64, "{name}: slack");
                    content
                }
                CompressionType::Zstd => zstd::bulk::decompress(stored, len).unwrap(),
            };
            assert_eq!(content.len(), len);
            let visible = len.min(expected.len() - at as usize);
            assert_eq!(content[..visible], expected[at as usize..][..visible], "{name}: {at:#x}");
            at += unit.cluster_size;
        }
        at = end;
    }
}
