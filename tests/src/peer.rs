//! The programs that results are held against: which are here, and what happens when one is not.
//!
//! A test asks for its peer with [`require`]. A missing peer makes the test say "skipped" on
//! standard error (past the test runner's capture) and in the file that `BITFERRY_SKIP_LOG` names,
//! which `tests/run` counts. With `BITFERRY_DEMAND_PEERS=1` it fails instead.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use crate::process::Run;

/// A program that results are held against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Peer {
    /// `qemu-system-x86_64`, 10 or later.
    Qemu10,
    /// `qemu-system-x86_64`, 7.2.
    Qemu72,
    /// `qemu-img`.
    QemuImg,
    /// `qemu-io`.
    QemuIo,
    /// `qemu-nbd`.
    QemuNbd,
    /// `nbdcopy`.
    NbdCopy,
    /// `strace`, able to trace here.
    Strace,
    /// `ssh`, with `ssh-keygen` beside it.
    Ssh,
    /// `sshd`, to be started by a test for one connection.
    Sshd,
}

impl Peer {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu10 => "QEMU 10",
            Self::Qemu72 => "QEMU 7.2",
            Self::QemuImg => "qemu-img",
            Self::QemuIo => "qemu-io",
            Self::QemuNbd => "qemu-nbd",
            Self::NbdCopy => "nbdcopy",
            Self::Strace => "strace",
            Self::Ssh => "ssh",
            Self::Sshd => "sshd",
        }
    }

    /// Where it is; `None` when it is not here.
    pub fn find(self) -> Option<&'static Path> {
        static QEMU_10: OnceLock<Option<PathBuf>> = OnceLock::new();
        static QEMU_72: OnceLock<Option<PathBuf>> = OnceLock::new();
        static QEMU_IMG: OnceLock<Option<PathBuf>> = OnceLock::new();
        static QEMU_IO: OnceLock<Option<PathBuf>> = OnceLock::new();
        static QEMU_NBD: OnceLock<Option<PathBuf>> = OnceLock::new();
        static NBDCOPY: OnceLock<Option<PathBuf>> = OnceLock::new();
        static STRACE: OnceLock<Option<PathBuf>> = OnceLock::new();
        static SSH: OnceLock<Option<PathBuf>> = OnceLock::new();
        static SSHD: OnceLock<Option<PathBuf>> = OnceLock::new();
        let found = match self {
            Self::Qemu10 => QEMU_10.get_or_init(|| {
                let path = named("BITFERRY_QEMU_10").or_else(|| on_path("qemu-system-x86_64"))?;
                (version(&path)?.0 >= 10).then_some(path)
            }),
            Self::Qemu72 => QEMU_72.get_or_init(|| {
                let path = named("BITFERRY_QEMU_72").unwrap_or_else(unpacked);
                (version(&path)? == (7, 2)).then_some(path)
            }),
            Self::QemuImg => QEMU_IMG.get_or_init(|| on_path("qemu-img")),
            Self::QemuIo => QEMU_IO.get_or_init(|| on_path("qemu-io")),
            Self::QemuNbd => QEMU_NBD.get_or_init(|| on_path("qemu-nbd")),
            Self::NbdCopy => NBDCOPY.get_or_init(|| on_path("nbdcopy")),
            Self::Ssh => SSH.get_or_init(|| on_path("ssh-keygen").and_then(|_| on_path("ssh"))),
            Self::Sshd => SSHD.get_or_init(|| {
                let installed = || Some(PathBuf::from("/usr/sbin/sshd")).filter(|p| p.is_file());
                let unpacked = || Some(peers().join("sshd/sshd")).filter(|p| p.is_file());
                named("BITFERRY_SSHD").or_else(installed).or_else(unpacked)
            }),
            Self::Strace => STRACE.get_or_init(|| {
                let path = on_path("strace")?;
                Run::new(&path).args(["-o", "/dev/null", "true"]).works().then_some(path)
            }),
        };
        found.as_deref()
    }
}

/// The peer's path. Without it the calling test is skipped: said aloud and counted, never passed
/// quietly; where peers are demanded it fails.
pub fn require(peer: Peer) -> Option<&'static Path> {
    let found = peer.find();
    if found.is_none() {
        skip(&format!("{} is not here", peer.name()));
    }
    found
}

/// [`require`] for several: true when all are here.
pub fn require_all(peers: &[Peer]) -> bool {
    peers.iter().all(|p| require(*p).is_some())
}

/// Says that the calling test is skipped, and why. Panics where peers are demanded.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("unnamed").to_owned();
    assert!(!is_demanded(), "{test}: {reason}, and peers are demanded");
    cannot(reason);
}

/// Says that the calling test is skipped as this machine does not let it run: said and counted,
/// and no failure anywhere.
pub fn cannot(reason: &str) {
    let test = std::thread::current().name().unwrap_or("unnamed").to_owned();
    let program = std::env::current_exe().unwrap_or_default();
    let program = program.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let line = format!("{program}::{test}: {reason}\n");
    // Not `eprintln!`: the test runner would swallow it.
    let _ = std::io::stderr().write_all(format!("skipped: {line}").as_bytes());
    if let Some(log) = std::env::var_os("BITFERRY_SKIP_LOG") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(&log);
        file.and_then(|mut f| f.write_all(line.as_bytes())).expect("skip log");
    }
}

/// Whether a missing peer is a failure.
pub fn is_demanded() -> bool {
    std::env::var_os("BITFERRY_DEMAND_PEERS").is_some_and(|v| v == "1")
}

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|v| !v.is_empty()).map(PathBuf::from)
}

fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|p| p.is_file())
}

/// Where `tests/peers` unpacks what is not installed.
fn peers() -> PathBuf {
    crate::bitferry::target_dir().join("peers")
}

fn unpacked() -> PathBuf {
    peers().join("qemu-7.2/qemu-system-x86_64")
}

/// Major and minor version of a QEMU program.
fn version(program: &Path) -> Option<(u32, u32)> {
    program.is_file().then_some(())?;
    let output = Run::new(program).arg("--version").output();
    let text = output.text();
    let (_, rest) = text.split_once("version ")?;
    let mut parts = rest.split(['.', ' ', '\n']).map_while(|p| p.parse().ok());
    Some((parts.next()?, parts.next()?))
}
