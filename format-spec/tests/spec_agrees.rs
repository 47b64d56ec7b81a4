//! The tables of SPEC.md whose first heading names a module are the constants of that module.
#![allow(clippy::unwrap_used, clippy::as_conversions)]

use std::collections::BTreeMap;

use format_spec::content_hash;
use format_spec::native::{answer, block, control, frame, hello, journal, session};
use format_spec::qemu::{
    block as qemu_block, command, configuration, container, dirty_bitmap, multifd, ram, reply,
};

const SPEC: &str = include_str!("../SPEC.md");

/// Value of a constant as a table writes it.
trait Written {
    fn is_written(&self, text: &str) -> bool;
}

macro_rules! numbers {
    ($($type:ty),*) => {$(
        impl Written for $type {
            fn is_written(&self, text: &str) -> bool {
                let number = match text.strip_prefix("0x") {
                    Some(hex) => u128::from_str_radix(hex, 16).ok(),
                    None => text.parse().ok(),
                };
                number == Some(*self as u128)
            }
        }
    )*};
}
numbers!(u8, u16, u32, u64, usize);

impl Written for &str {
    fn is_written(&self, text: &str) -> bool {
        text.trim_matches('`') == *self
    }
}

impl<const N: usize> Written for &[u8; N] {
    fn is_written(&self, text: &str) -> bool {
        text.trim_matches('`').as_bytes() == *self
    }
}

type Constants = BTreeMap<&'static str, Box<dyn Written>>;

macro_rules! constants {
    ($module:ident: $($name:ident)*) => {{
        let mut map = Constants::new();
        $(map.insert(stringify!($name), Box::new($module::$name));)*
        map
    }};
}

fn modules() -> BTreeMap<&'static str, Constants> {
    BTreeMap::from([
        (
            "content_hash",
            constants!(content_hash: LEAF_BYTES TREE_HEIGHT LEAF_KEY NODE_KEY ROOT_KEY
                DIGEST_KEY CONTENT_PREFIX DIGEST_PREFIX),
        ),
        (
            "native::hello",
            constants!(hello: MAGIC VERSION MAX_HELLO OFFER CHOICE REFUSAL JOIN ONE_WAY
                MULTI_CHANNEL ZSTD ZLIB RESUME MAX_CHANNELS MAX_REFUSAL_TEXT),
        ),
        (
            "native::frame",
            constants!(frame: HEADER_BYTES MAX_BODY MAX_PAYLOAD END OPTIONAL CHECKSUM
                COMPRESSED),
        ),
        (
            "native::block",
            constants!(block: DISK RUN DISK_SEAL BITMAP_CREATE BITMAP_UPDATE BITMAP_REMOVE
                BITMAP_SEAL DISK_CONTENT KEEPS_REST HAS_BLOCK HAS_BITMAPS ZERO_BLOCK HAS_HASH
                ENABLED PERSISTENT PIECE_BYTES RUN_HEAD_BYTES PIECE_HEAD_BYTES MAX_DISK_NAME
                MAX_BITMAP_NAME MIN_GRANULARITY MAX_GRANULARITY),
        ),
        ("native::control", constants!(control: BARRIER PREPARE COMMIT ABORT KEEPALIVE DURABLE)),
        (
            "native::answer",
            constants!(answer: ACK HAVE HAVE_ZEROES HAVE_DONE READY COMMITTED FAILED HAVE_BITMAP
                PUBLISHED KEEPALIVE UNKNOWN_OFFSET UNCHANGED BITMAPS_ALONE),
        ),
        (
            "native::journal",
            constants!(journal: JOURNAL_MAGIC RECEIPT_MAGIC VERSION SESSION UNITS ZEROES
                IMAGE PREPARED RECEIPT RECEIPT_BITMAP COMMIT UNIT_BYTES MAX_TARGET),
        ),
        ("native::session", constants!(session: SESSION_KEY)),
        (
            "qemu::container",
            constants!(container: MAGIC VERSION EOF START PART END FULL VMDESCRIPTION
                CONFIGURATION COMMAND FOOTER MAX_VMDESCRIPTION),
        ),
        (
            "qemu::configuration",
            constants!(configuration: SUBSECTION MAX_MACHINE MAX_CAPABILITIES
                TARGET_PAGE_BITS CAPABILITIES UUID IGNORE_SHARED MAPPED_RAM),
        ),
        (
            "qemu::command",
            constants!(command: OPEN_RETURN_PATH PING POSTCOPY_ADVISE POSTCOPY_LISTEN
                POSTCOPY_RUN POSTCOPY_RAM_DISCARD PACKAGED ENABLE_COLO POSTCOPY_RESUME
                RECV_BITMAP SWITCHOVER_START),
        ),
        (
            "qemu::reply",
            constants!(reply: SHUT PONG REQ_PAGES_ID REQ_PAGES RECV_BITMAP RESUME_ACK
                SWITCHOVER_ACK MAX_MESSAGE RESUME_VALUE BITMAP_END MAX_BITMAP),
        ),
        (
            "qemu::block",
            constants!(qemu_block: SECTION SECTION_VERSION CHUNK_BYTES DEVICE_BLOCK EOS
                PROGRESS ZERO_BLOCK),
        ),
        (
            "qemu::dirty_bitmap",
            constants!(dirty_bitmap: SECTION SECTION_VERSION EOS ZEROES BITMAP_NAME
                DEVICE_NAME START COMPLETE BITS EXTRA_FLAGS ENABLED PERSISTENT AUTOLOAD
                MIN_GRANULARITY MAX_GRANULARITY MAX_BUFFER CHUNK_BITS BUFFER_ALIGN
                SECTOR_BYTES),
        ),
        (
            "qemu::multifd",
            constants!(multifd: MAGIC VERSION HELLO_BYTES HEADER_BYTES DEVICE_HEADER_BYTES
                MAX_PAGES MAX_PAYLOAD BLOCK_NAME_BYTES SYNC COMPRESSION ZLIB ZSTD DEVICE_STATE),
        ),
        (
            "qemu::ram",
            constants!(ram: SECTION SECTION_VERSION PAGE_BYTES ZERO MEM_SIZE PAGE EOS
                CONTINUE XBZRLE COMPRESS_PAGE MULTIFD_FLUSH XBZRLE_ENCODING MAX_COMPRESSED
                MAX_BLOCKS MAPPED_VERSION),
        ),
    ])
}

/// Tables by module: names and values as written.
fn tables() -> BTreeMap<String, Vec<(String, String)>> {
    let mut tables: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    let mut module: Option<String> = None;
    for line in SPEC.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        if cells.len() < 4 {
            module = None;
            continue;
        }
        if let Some(name) = cells[1].strip_prefix("constant (`").and_then(|c| c.strip_suffix("`)"))
        {
            module = Some(name.to_owned());
        } else if let (Some(module), false) = (&module, cells[1].starts_with("---")) {
            // A value may hold spaces that count, inside its quotes.
            let value = line.split('|').nth(2).unwrap().trim().to_owned();
            tables.entry(module.clone()).or_default().push((cells[1].to_owned(), value));
        }
    }
    tables
}

#[test]
fn every_constant_is_as_the_spec_says() {
    let tables = tables();
    let modules = modules();
    assert_eq!(tables.keys().collect::<Vec<_>>(), modules.keys().collect::<Vec<_>>());
    for (module, rows) in &tables {
        let constants = &modules[module.as_str()];
        let names: Vec<&str> = rows.iter().map(|(name, _)| name.as_str()).collect();
        for name in constants.keys() {
            assert!(names.contains(name), "{module}::{name} is not in SPEC.md");
        }
        for (name, value) in rows {
            let Some(constant) = constants.get(name.as_str()) else {
                panic!("SPEC.md has {module}::{name}, the test does not")
            };
            assert!(constant.is_written(value), "{module}::{name} is not {value}");
        }
    }
}
