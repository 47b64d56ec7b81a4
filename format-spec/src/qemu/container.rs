//! The elements of the main stream. SPEC 4.2.

use super::command::Command;
use super::configuration::Configuration;
use crate::{Malformed, Problem, Reader, Writer};

/// First four bytes of a stream.
pub const MAGIC: &[u8; 4] = b"QEVM";
/// The one version.
pub const VERSION: u32 = 3;
/// Element: the stream ends.
pub const EOF: u8 = 0x00;
/// Element: first part of a live section.
pub const START: u8 = 0x01;
/// Element: middle part of a live section.
pub const PART: u8 = 0x02;
/// Element: last part of a live section.
pub const END: u8 = 0x03;
/// Element: a whole section.
pub const FULL: u8 = 0x04;
/// Element: description of device state, after [`EOF`].
pub const VMDESCRIPTION: u8 = 0x06;
/// Element: configuration, once, at the start.
pub const CONFIGURATION: u8 = 0x07;
/// Element: a command.
pub const COMMAND: u8 = 0x08;
/// Mark before a section's id, after its body.
pub const FOOTER: u8 = 0x7e;
/// Largest description of device state: one of a large machine takes some hundred KiB.
pub const MAX_VMDESCRIPTION: u32 = 16 << 20;

/// How a section element stands in the life of its section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectionKind {
    /// First part of a live section; names it.
    Start,
    /// Middle part.
    Part,
    /// Last part.
    End,
    /// A whole section; names it.
    Full,
}

/// Who a section belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionName<'a> {
    /// "ram", "block", "dirty-bitmap" or a device.
    pub name: &'a str,
    /// Which of several of that name.
    pub instance: u32,
    /// Version of the body.
    pub version: u32,
}

/// What stands before a section's body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section<'a> {
    /// Number by which later parts refer to it. A QEMU destination takes 0 for another section:
    /// writers use 1 and up.
    pub id: u32,
    /// Which part this is.
    pub kind: SectionKind,
    /// Present with [`SectionKind::Start`] and [`SectionKind::Full`].
    pub name: Option<SectionName<'a>>,
}

/// An element, up to its body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Element<'a> {
    /// A section begins; its body and footer follow.
    Section(Section<'a>),
    /// A command. After PACKAGED so many bytes of nested elements follow.
    Command(Command<'a>),
    /// The machine and what both sides must agree on.
    Configuration(Configuration<'a>),
    /// The stream ends, except for the description.
    Eof,
    /// So many bytes of JSON follow.
    VmDescription(u32),
}

/// Takes magic and version.
pub fn decode_start(reader: &mut Reader<'_>) -> Result<(), Malformed> {
    let expected = [("stream magic", *MAGIC), ("stream version", VERSION.to_be_bytes())];
    for (field, expected) in expected {
        let at = reader.offset();
        let found: &[u8; 4] = reader.array(field)?;
        if *found != expected {
            let number = |bytes| u64::from(u32::from_be_bytes(bytes));
            let problem = Problem::Mismatch { value: number(*found), expected: number(expected) };
            return Err(Malformed::new(at, field, problem));
        }
    }
    Ok(())
}

/// Writes magic and version.
pub fn encode_start(out: &mut Writer) {
    out.bytes(MAGIC).be32(VERSION);
}

/// Takes the mark after a section's body.
pub fn decode_footer(reader: &mut Reader<'_>, id: u32) -> Result<(), Malformed> {
    let at = reader.offset();
    let mark = reader.u8("section footer")?;
    if mark != FOOTER {
        let problem = Problem::Mismatch { value: mark.into(), expected: FOOTER.into() };
        return Err(Malformed::new(at, "section footer", problem));
    }
    let at = reader.offset();
    let found = reader.be32("section id in the footer")?;
    if found != id {
        let problem = Problem::Mismatch { value: found.into(), expected: id.into() };
        return Err(Malformed::new(at, "section id in the footer", problem));
    }
    Ok(())
}

/// Writes the mark after a section's body.
pub fn encode_footer(id: u32, out: &mut Writer) {
    out.u8(FOOTER).be32(id);
}

impl<'a> Element<'a> {
    /// Takes the next element, up to its body. It never reads into what follows, with one
    /// exception: a configuration looks at the next byte.
    pub fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let at = reader.offset();
        Ok(match reader.u8("element type")? {
            EOF => Self::Eof,
            START => Self::Section(named(reader, SectionKind::Start)?),
            FULL => Self::Section(named(reader, SectionKind::Full)?),
            PART => Self::Section(unnamed(reader, SectionKind::Part)?),
            END => Self::Section(unnamed(reader, SectionKind::End)?),
            COMMAND => Self::Command(Command::decode(reader)?),
            CONFIGURATION => Self::Configuration(Configuration::decode(reader)?),
            VMDESCRIPTION => {
                let at = reader.offset();
                let len = reader.be32("length of the VM description")?;
                if len > MAX_VMDESCRIPTION {
                    let (value, max) = (len.into(), MAX_VMDESCRIPTION.into());
                    let problem = Problem::OutOfRange { value, min: 0, max };
                    return Err(Malformed::new(at, "length of the VM description", problem));
                }
                Self::VmDescription(len)
            }
            kind => {
                let problem = Problem::Unknown { value: kind.into() };
                return Err(Malformed::new(at, "element type", problem));
            }
        })
    }

    /// Writes the element, up to its body.
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::Eof => {
                out.u8(EOF);
            }
            Self::Section(section) => section.encode(out),
            Self::Command(command) => command.encode(out),
            Self::Configuration(configuration) => configuration.encode(out),
            Self::VmDescription(len) => {
                out.u8(VMDESCRIPTION).be32(*len);
            }
        }
    }
}

impl Section<'_> {
    /// Writes what stands before the body.
    pub fn encode(&self, out: &mut Writer) {
        out.u8(match self.kind {
            SectionKind::Start => START,
            SectionKind::Part => PART,
            SectionKind::End => END,
            SectionKind::Full => FULL,
        });
        out.be32(self.id);
        if let Some(SectionName { name, instance, version }) = self.name {
            out.text8(name).be32(instance).be32(version);
        }
    }
}

fn named<'a>(reader: &mut Reader<'a>, kind: SectionKind) -> Result<Section<'a>, Malformed> {
    let id = reader.be32("section id")?;
    let name = reader.name8("section name")?;
    let instance = reader.be32("section instance")?;
    let version = reader.be32("section version")?;
    Ok(Section { id, kind, name: Some(SectionName { name, instance, version }) })
}

fn unnamed<'a>(reader: &mut Reader<'a>, kind: SectionKind) -> Result<Section<'a>, Malformed> {
    Ok(Section { id: reader.be32("section id")?, kind, name: None })
}
