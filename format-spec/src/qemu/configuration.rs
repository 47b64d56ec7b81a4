//! The configuration at the start of a stream. SPEC 4.2.

use super::container::CONFIGURATION;
use crate::{Malformed, Problem, Reader, Writer};

/// Mark before a subsection.
pub const SUBSECTION: u8 = 0x05;
/// Longest machine name.
pub const MAX_MACHINE: u32 = 255;
/// Most capabilities listed.
pub const MAX_CAPABILITIES: u32 = 64;
/// Subsection: page size of the target, as a power of two.
pub const TARGET_PAGE_BITS: &str = "configuration/target-page-bits";
/// Subsection: capabilities that the destination must have set too.
pub const CAPABILITIES: &str = "configuration/capabilities";
/// Subsection: the machine's UUID.
pub const UUID: &str = "configuration/uuid";
/// Capability: memory that both sides see is not sent.
pub const IGNORE_SHARED: &str = "x-ignore-shared";
/// Capability: pages stand at fixed places of the file.
pub const MAPPED_RAM: &str = "mapped-ram";

/// One subsection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subsection<'a> {
    /// Page size of the target, as a power of two.
    TargetPageBits(u32),
    /// Capabilities that are set.
    Capabilities(Vec<&'a str>),
    /// The machine's UUID, in textual order.
    Uuid([u8; 16]),
}

/// The machine and what both sides must agree on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Configuration<'a> {
    /// Machine type. QEMU compares only as many bytes as are here: an empty name fits all.
    pub machine: &'a str,
    /// In their order, each kind once at most.
    pub subsections: Vec<Subsection<'a>>,
}

impl<'a> Configuration<'a> {
    /// Takes what follows the element type. Looks at one byte beyond itself to see whether another
    /// subsection follows; no element has that type.
    pub(super) fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        let at = reader.offset();
        let len = reader.be32("length of the machine name")?;
        if len > MAX_MACHINE {
            let problem =
                Problem::OutOfRange { value: len.into(), min: 0, max: MAX_MACHINE.into() };
            return Err(Malformed::new(at, "length of the machine name", problem));
        }
        let at = reader.offset();
        let machine = std::str::from_utf8(reader.take(len as usize, "machine name")?)
            .map_err(|_| Malformed::new(at, "machine name", Problem::BadName))?;
        let mut subsections: Vec<Subsection<'a>> = Vec::new();
        while reader.clone().u8("element type")? == SUBSECTION {
            let at = reader.offset();
            let subsection = Subsection::decode(reader)?;
            if subsections.iter().any(|other| other.name() == subsection.name()) {
                return Err(Malformed::new(at, "configuration subsection", Problem::Duplicate));
            }
            subsections.push(subsection);
        }
        Ok(Self { machine, subsections })
    }

    /// Writes the element, type included.
    pub fn encode(&self, out: &mut Writer) {
        out.u8(CONFIGURATION).be32(u32::try_from(self.machine.len()).unwrap_or(u32::MAX));
        out.bytes(self.machine.as_bytes());
        self.subsections.iter().for_each(|subsection| subsection.encode(out));
    }

    /// Whether a capability is listed.
    pub fn has_capability(&self, name: &str) -> bool {
        self.subsections.iter().any(|subsection| match subsection {
            Subsection::Capabilities(names) => names.contains(&name),
            _ => false,
        })
    }
}

impl<'a> Subsection<'a> {
    fn name(&self) -> &'static str {
        match self {
            Self::TargetPageBits(_) => TARGET_PAGE_BITS,
            Self::Capabilities(_) => CAPABILITIES,
            Self::Uuid(_) => UUID,
        }
    }

    fn decode(reader: &mut Reader<'a>) -> Result<Self, Malformed> {
        reader.u8("subsection mark")?;
        let name_at = reader.offset();
        let name = reader.name8("subsection name")?;
        let version_at = reader.offset();
        let version = reader.be32("subsection version")?;
        if version != 1 {
            let problem = Problem::Mismatch { value: version.into(), expected: 1 };
            return Err(Malformed::new(version_at, "subsection version", problem));
        }
        match name {
            TARGET_PAGE_BITS => Ok(Self::TargetPageBits(reader.be32("target page bits")?)),
            UUID => Ok(Self::Uuid(*reader.array("uuid")?)),
            CAPABILITIES => {
                let at = reader.offset();
                let count = reader.be32("number of capabilities")?;
                if count > MAX_CAPABILITIES {
                    let (value, max) = (count.into(), MAX_CAPABILITIES.into());
                    let problem = Problem::OutOfRange { value, min: 0, max };
                    return Err(Malformed::new(at, "number of capabilities", problem));
                }
                let names = (0..count).map(|_| reader.name8("capability"));
                Ok(Self::Capabilities(names.collect::<Result<_, _>>()?))
            }
            _ => Err(Malformed::new(
                name_at,
                "subsection name",
                Problem::Other("is none of the configuration's"),
            )),
        }
    }

    fn encode(&self, out: &mut Writer) {
        out.u8(SUBSECTION).text8(self.name()).be32(1);
        match self {
            Self::TargetPageBits(bits) => {
                out.be32(*bits);
            }
            Self::Uuid(uuid) => {
                out.bytes(uuid);
            }
            Self::Capabilities(names) => {
                out.be32(u32::try_from(names.len()).unwrap_or(u32::MAX));
                for name in names {
                    out.text8(name);
                }
            }
        }
    }
}
