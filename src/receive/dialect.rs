//! The first bytes of the first connection say which dialect it speaks (SPEC 4.1).

use std::io::{Cursor, Read as _};

use format_spec::native::hello;
use format_spec::qemu::{container, multifd};
use mig_core::limits::HELLO_LIMIT;
use mig_core::stream::Error as Stream;
use mig_core::transport::Connection;

use crate::observe::interruptible;
use crate::{Error, Observer, Result};

/// How a data connection of a QEMU begins.
const MULTIFD: [u8; 4] = multifd::MAGIC.to_be_bytes();

/// What a source speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// bitferry's own.
    Native,
    /// QEMU's.
    Qemu,
}

impl std::fmt::Display for Dialect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Native => "native",
            Self::Qemu => "qemu",
        })
    }
}

/// Reads the first four bytes, in bounded time, and puts them back.
pub(super) fn recognise(
    connection: Connection,
    observer: &dyn Observer,
) -> Result<(Dialect, Connection)> {
    let Connection { mut reader, writer, line, peer } = connection;
    let mut magic = [0; 4];
    let read = interruptible(observer, &*line, Some(HELLO_LIMIT), || reader.read_exact(&mut magic));
    if read.is_err() && observer.is_cancelled() {
        return Err(Error::Interrupted);
    }
    let failed = |source| Stream::Connection { action: "read from", channel: 0, offset: 0, source };
    read.map_err(failed)?;
    let dialect = match magic {
        magic if magic == *hello::MAGIC => Dialect::Native,
        magic if magic == *container::MAGIC => Dialect::Qemu,
        MULTIFD => {
            let reason = "it is a data connection of a QEMU with the capability multifd, which \
                          must be off at the source: everything comes on one connection here";
            return Err(Stream::protocol(0, 0, reason.to_owned()).into());
        }
        other => {
            let reason = format!("it begins with {other:02x?}, as no migration does");
            return Err(Stream::protocol(0, 0, reason).into());
        }
    };
    let reader = Box::new(Cursor::new(magic).chain(reader));
    Ok((dialect, Connection { reader, writer, line, peer }))
}
