//! Our source under a test: what it sends to a QEMU.

use std::io::Write;
use std::path::Path;

use bitferry::copy::Format;
use bitferry::qemu::Version;
use bitferry::qemu::outgoing::{self, Options, SourceDisk};
use bitferry::{Report, Silent};

use crate::destination::Destination;

/// The bitmaps of these disks, by name and image; what ends in `.raw` is raw.
pub fn bitmaps_of(disks: &[(&str, &Path)]) -> Options {
    let disk = |(id, path): &(&str, &Path)| SourceDisk {
        id: (*id).to_owned(),
        path: path.to_path_buf(),
        format: path.extension().filter(|e| *e == "raw").map(|_| Format::Raw),
    };
    Options { disks: disks.iter().map(disk).collect(), ..Options::default() }
}

/// Their contents as well, as QEMU 7.2 takes them.
pub fn contents_of(disks: &[(&str, &Path)]) -> Options {
    Options { blocks: true, version: Version::new(7, 2), ..bitmaps_of(disks) }
}

/// Sends them, which does not fail.
#[track_caller]
pub fn send(destination: &mut Destination, options: &Options) -> Report {
    let connection = destination.connect();
    outgoing::run(connection, options, &Silent).unwrap_or_else(|e| panic!("{e:?}"))
}

/// Answers the PING behind which our source waits, where a stream so far ends with one.
pub fn pong(stream: &[u8], answers: &mut impl Write) {
    const PING: &[u8] = b"\x08\0\x02\0\x04";
    let head = stream.len().checked_sub(PING.len() + 4);
    let Some((head, value)) = head.and_then(|at| stream[at..].split_at_checked(PING.len())) else {
        return;
    };
    if head == PING {
        // Who asked may be gone.
        let _ = answers.write_all(&[b"\0\x02\0\x04", value].concat());
    }
}
