//! One line of text per item, for people. Contents are shown by their length and first bytes.

use std::fmt;

use super::command::Command;
use super::configuration::Subsection;
use super::container::{Element, Section, SectionKind};
use super::reply::Reply;
use super::stream::Item;
use super::{block, dirty_bitmap, multifd, ram};
use crate::native::frame;

/// Length and first bytes of a content.
struct Content<'a>(&'a [u8]);

impl fmt::Display for Content<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())?;
        if self.0.is_empty() {
            return Ok(());
        }
        f.write_str(" ")?;
        self.0.iter().take(8).try_for_each(|byte| write!(f, "{byte:02x}"))?;
        f.write_str(if self.0.len() > 8 { "…" } else { "" })
    }
}

impl fmt::Display for Item<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NativeStart => write!(f, "native hello, version 1"),
            Self::Start => write!(f, "stream, version 3"),
            Self::Element(element) => write!(f, "{element}"),
            Self::Footer(id) => write!(f, "footer of section {id}"),
            Self::PackageEnd => write!(f, "end of the package"),
            Self::Ram(record) => write!(f, "  {record}"),
            Self::Block(record) => write!(f, "  {record}"),
            Self::DirtyBitmap(record) => write!(f, "  {record}"),
            Self::Native(record) => write!(f, "  {record}"),
            Self::Bytes(bytes) => write!(f, "  {}", Content(bytes)),
        }
    }
}

impl fmt::Display for Element<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Section(section) => write!(f, "{section}"),
            Self::Command(command) => write!(f, "COMMAND {command}"),
            Self::Eof => write!(f, "EOF"),
            Self::VmDescription(len) => write!(f, "VM description of {len} bytes"),
            Self::Configuration(configuration) => {
                write!(f, "configuration of machine {:?}", configuration.machine)?;
                configuration.subsections.iter().try_for_each(|subsection| match subsection {
                    Subsection::TargetPageBits(bits) => write!(f, ", target page bits {bits}"),
                    Subsection::Capabilities(names) => write!(f, ", capabilities {names:?}"),
                    Subsection::Uuid(uuid) => write!(f, ", uuid {}", Hex(uuid)),
                })
            }
        }
    }
}

struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for Section<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            SectionKind::Start => "START",
            SectionKind::Part => "PART",
            SectionKind::End => "END",
            SectionKind::Full => "FULL",
        };
        write!(f, "{kind} {}", self.id)?;
        match self.name {
            Some(n) => write!(f, " {:?} instance {} version {}", n.name, n.instance, n.version),
            None => Ok(()),
        }
    }
}

impl fmt::Display for Command<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OpenReturnPath => write!(f, "OPEN_RETURN_PATH"),
            Self::Ping(value) => write!(f, "PING {value}"),
            Self::PostcopyAdvise(None) => write!(f, "POSTCOPY_ADVISE"),
            Self::PostcopyAdvise(Some((blocks, target))) => {
                write!(f, "POSTCOPY_ADVISE page sizes {blocks:#x}, target page size {target}")
            }
            Self::PostcopyListen => write!(f, "POSTCOPY_LISTEN"),
            Self::PostcopyRun => write!(f, "POSTCOPY_RUN"),
            Self::PostcopyRamDiscard { block, ranges } => {
                write!(f, "POSTCOPY_RAM_DISCARD {block:?} {} ranges", ranges.len())
            }
            Self::Packaged(size) => write!(f, "PACKAGED {size} bytes"),
            Self::EnableColo => write!(f, "ENABLE_COLO"),
            Self::PostcopyResume => write!(f, "POSTCOPY_RESUME"),
            Self::RecvBitmap(block) => write!(f, "RECV_BITMAP {block:?}"),
            Self::SwitchoverStart => write!(f, "SWITCHOVER_START"),
        }
    }
}

impl fmt::Display for ram::Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::MemSize(total) => write!(f, "MEM_SIZE {total:#x}"),
            Self::Block { name, used_length, address, mapped } => {
                write!(f, "RAM block {name:?} of {used_length:#x} bytes")?;
                if let Some(address) = address {
                    write!(f, " at {address:#x}")?;
                }
                if let Some(mapped) = mapped {
                    let (bitmap, pages) = (mapped.bitmap_offset, mapped.pages_offset);
                    write!(f, ", bitmap at {bitmap:#x}, pages at {pages:#x}")?;
                }
                Ok(())
            }
            Self::Page { block, offset, content } => {
                write!(f, "page {offset:#x}")?;
                if let Some(block) = block {
                    write!(f, " of {block:?}")?;
                }
                match content {
                    ram::Content::Fill(byte) => write!(f, " all {byte}"),
                    ram::Content::Plain(page) => write!(f, " {}", Content(*page)),
                    ram::Content::Xbzrle(bytes) => write!(f, " xbzrle {}", Content(bytes)),
                    ram::Content::Zlib(bytes) => write!(f, " zlib {}", Content(bytes)),
                }
            }
            Self::MultifdFlush => write!(f, "MULTIFD_FLUSH"),
            Self::End => write!(f, "EOS"),
        }
    }
}

impl fmt::Display for block::Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.body {
            block::Body::Data { device, content } => {
                write!(f, "chunk {:#x} of {device:?} {}", self.offset(), Content(content))
            }
            block::Body::Zeroes { device } => {
                write!(f, "chunk {:#x} of {device:?} zeroes", self.offset())
            }
            block::Body::Progress => write!(f, "PROGRESS {}", self.percent()),
            block::Body::None => write!(f, "EOS"),
        }
    }
}

impl fmt::Display for dirty_bitmap::Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut words = Vec::new();
        for (what, name) in [("device", self.device), ("bitmap", self.bitmap)] {
            words.extend(name.map(|name| format!("{what} {name:?}")));
        }
        match self.body {
            dirty_bitmap::Body::None => {}
            dirty_bitmap::Body::Start { granularity, flags } => {
                words.push(format!("START granularity {granularity} flags {flags:#x}"));
            }
            dirty_bitmap::Body::Complete => words.push("COMPLETE".to_owned()),
            dirty_bitmap::Body::Bits { first_sector, sectors, buffer } => {
                let bits = buffer.map_or("zeroes".to_owned(), |bits| Content(bits).to_string());
                words.push(format!("BITS sectors {first_sector} + {sectors} {bits}"));
            }
        }
        if self.ends_body() {
            words.push("EOS".to_owned());
        }
        f.write_str(&words.join(" "))
    }
}

impl fmt::Display for frame::Record<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.header.is_end() {
            return write!(f, "END");
        }
        write!(f, "record of type {:#x} {}", self.header.kind, Content(self.body))
    }
}

impl fmt::Display for Reply<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shut(status) => write!(f, "SHUT {status}"),
            Self::Pong(value) => write!(f, "PONG {value}"),
            Self::ReqPages { block, offset, len } => {
                write!(f, "REQ_PAGES {offset:#x} + {len}")?;
                block.map_or(Ok(()), |block| write!(f, " of {block:?}"))
            }
            Self::RecvBitmap { block, len } => write!(f, "RECV_BITMAP {block:?} {len} bytes"),
            Self::Bits(bits) => write!(f, "  {}", Content(bits)),
            Self::BitsEnd => write!(f, "  end of the bitmap"),
            Self::ResumeAck => write!(f, "RESUME_ACK"),
            Self::SwitchoverAck => write!(f, "SWITCHOVER_ACK"),
        }
    }
}

impl fmt::Display for multifd::Item<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello(hello) => {
                write!(f, "hello of channel {}, uuid {}", hello.channel, Hex(hello.uuid))
            }
            Self::Packet(packet) => write!(f, "{packet}"),
            Self::Device { name, instance, len, .. } => {
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                let name = String::from_utf8_lossy(name);
                write!(f, "state of device {name:?} instance {instance}, {len} bytes")
            }
            Self::Payload(bytes) => write!(f, "  {}", Content(bytes)),
        }
    }
}

impl fmt::Display for multifd::Packet<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "packet {}", self.packet_num)?;
        if self.flags & multifd::SYNC != 0 {
            f.write_str(" SYNC")?;
        }
        match self.flags & multifd::COMPRESSION {
            0 => {}
            multifd::ZLIB => f.write_str(" zlib")?,
            multifd::ZSTD => f.write_str(" zstd")?,
            other => write!(f, " compression {other:#x}")?,
        }
        if self.normal_pages == 0 && self.zero_pages == 0 {
            return Ok(());
        }
        write!(f, ", {} pages and {} of zeroes", self.normal_pages, self.zero_pages)?;
        match self.block_name() {
            Some(name) => write!(f, " of {name:?}")?,
            None => f.write_str(" of a block without name")?,
        }
        match (self.page_offsets().min(), self.page_offsets().max()) {
            (Some(first), Some(last)) => write!(f, " from {first:#x} to {last:#x}"),
            _ => Ok(()),
        }
    }
}
