//! A whole connection, taken apart item by item: QEMU's dialect and ours. SPEC 4 to 7.

use std::collections::BTreeMap;

use super::command::Command;
use super::configuration::{Configuration, IGNORE_SHARED, MAPPED_RAM, Subsection};
use super::container::{self, Element, Section, SectionKind, SectionName};
use super::scan::{Context, Scan, scan};
use super::{Step, attempt, block, dirty_bitmap, ram};
use crate::native::{self, frame, hello};
use crate::{Malformed, Problem, Reader, Writer};

/// Most sections of one stream; QEMU has one per device.
pub const MAX_SECTIONS: usize = 4096;

/// One item of a connection. Each encodes to the bytes it was decoded from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<'a> {
    /// Magic and version of the native dialect. A hello record follows.
    NativeStart,
    /// Magic and version of the container.
    Start,
    /// An element, up to its body.
    Element(Element<'a>),
    /// The footer of the section with this id.
    Footer(u32),
    /// The nested elements of a package end. No bytes.
    PackageEnd,
    /// A record of a `ram` section.
    Ram(ram::Record<'a>),
    /// A record of a `block` section, version 1.
    Block(block::Record<'a>),
    /// A record of a `dirty-bitmap` section.
    DirtyBitmap(dirty_bitmap::Record<'a>),
    /// A hello, or a record of a section of the native dialect.
    Native(frame::Record<'a>),
    /// Bytes of something that has no inner form here: device state, the VM description, the pages
    /// of a mapped-ram file. One such thing may come in several parts.
    Bytes(&'a [u8]),
}

impl Item<'_> {
    /// Writes the item.
    pub fn encode(&self, out: &mut Writer) {
        match self {
            Self::NativeStart => {
                out.bytes(hello::MAGIC).be32(hello::VERSION);
            }
            Self::Start => container::encode_start(out),
            Self::Element(element) => element.encode(out),
            Self::Footer(id) => container::encode_footer(*id, out),
            Self::PackageEnd => {}
            Self::Ram(record) => record.encode(out),
            Self::Block(record) => record.encode(out),
            Self::DirtyBitmap(record) => record.encode(out),
            Self::Native(record) => {
                out.bytes(&record.header.encode()).bytes(record.body);
                if record.header.has_checksum() {
                    out.be32(frame::checksum(&[record.body]));
                }
            }
            Self::Bytes(bytes) => {
                out.bytes(bytes);
            }
        }
    }
}

/// Whose bodies a section has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owner {
    Ram,
    Block,
    DirtyBitmap,
    Native,
    Device,
}

/// What comes next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Start,
    Hello,
    FirstElement,
    Element,
    Body(u32, Owner),
    Footer(u32),
    /// So many bytes without inner form, then records of this `ram` section or, without one, the
    /// next element.
    Bytes(u64, Option<u32>),
    /// The end, or a VM description.
    AfterEof,
    Nothing,
}

/// Takes a connection apart.
#[derive(Debug, Clone)]
pub struct Decoder {
    offset: u64,
    expected: Expected,
    sections: BTreeMap<u32, Owner>,
    ram: ram::Decoder,
    dirty_bitmap: dirty_bitmap::Decoder,
    /// Where the package ends that is open.
    package_end: Option<u64>,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            offset: 0,
            expected: Expected::Start,
            sections: BTreeMap::new(),
            ram: ram::Decoder::default(),
            dirty_bitmap: dirty_bitmap::Decoder::default(),
            package_end: None,
        }
    }
}

impl Decoder {
    /// For a connection or a file, from its first byte.
    pub fn new() -> Self {
        Self::default()
    }

    /// For the connection that goes on after a cut in postcopy: it has neither magic nor
    /// configuration, and its section ids and names are those of the first.
    #[must_use]
    pub fn recovered(self) -> Self {
        Self { offset: 0, expected: Expected::Element, package_end: None, ..self }
    }

    /// Bytes taken so far.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// Whether the stream may end here: after its EOF, or after the VM description.
    pub fn may_end(&self) -> bool {
        matches!(self.expected, Expected::AfterEof | Expected::Nothing)
    }

    /// Whether nothing more may come, not even a VM description.
    pub fn has_ended(&self) -> bool {
        self.expected == Expected::Nothing
    }

    /// The names that `dirty-bitmap` records leave out.
    pub fn dirty_bitmap(&self) -> &dirty_bitmap::Decoder {
        &self.dirty_bitmap
    }

    /// The RAM blocks listed so far.
    pub fn ram(&self) -> &ram::Decoder {
        &self.ram
    }

    /// Takes the next item from what has arrived. `is_whole` says that nothing comes after `input`.
    pub fn next<'a>(
        &mut self,
        input: &'a [u8],
        is_whole: bool,
    ) -> Result<Step<Item<'a>>, Malformed> {
        let Some(end) = self.package_end else {
            return self.step(input, is_whole);
        };
        let left = end.saturating_sub(self.offset);
        if left == 0 && self.expected == Expected::Element {
            self.package_end = None;
            return Ok(Step::Item(Item::PackageEnd, 0));
        }
        let left_len = usize::try_from(left).unwrap_or(usize::MAX);
        let inside = input.get(..left_len).unwrap_or(input);
        let reaches_end = inside.len() == left_len;
        match self.step(inside, reaches_end || is_whole)? {
            // What the last bytes of a package are is told when all of them are there.
            Step::Need(needed) if needed > left_len && !reaches_end => Ok(Step::Need(left_len)),
            Step::Need(needed) if needed > left_len => {
                let problem = Problem::PastEnd { len: left };
                Err(Malformed::new(self.offset, "element of a package", problem))
            }
            step => Ok(step),
        }
    }

    fn step<'a>(&mut self, input: &'a [u8], is_whole: bool) -> Result<Step<Item<'a>>, Malformed> {
        let at = self.offset;
        let step = match self.expected {
            Expected::Start => attempt(input, at, decode_start)?,
            Expected::Hello => native_record(input, at)?,
            Expected::FirstElement | Expected::Element | Expected::AfterEof => {
                attempt(input, at, Element::decode)?.map(Item::Element)
            }
            Expected::Footer(id) => {
                attempt(input, at, |reader| container::decode_footer(reader, id))?
                    .map(|()| Item::Footer(id))
            }
            Expected::Bytes(left, _) => some_bytes(input, left),
            Expected::Body(_, Owner::Native) => native_record(input, at)?,
            Expected::Body(id, Owner::Device) => self.device_state(id, input, is_whole)?,
            Expected::Body(_, Owner::Block) => {
                attempt(input, at, block::Record::decode)?.map(Item::Block)
            }
            Expected::Body(_, Owner::Ram) => {
                let ram = &mut self.ram;
                attempt(input, at, |reader| ram.decode(reader))?.map(Item::Ram)
            }
            Expected::Body(_, Owner::DirtyBitmap) => {
                let bitmaps = &mut self.dirty_bitmap;
                attempt(input, at, |reader| bitmaps.decode(reader))?.map(Item::DirtyBitmap)
            }
            Expected::Nothing if input.is_empty() => Step::Need(1),
            Expected::Nothing => {
                let problem = Problem::Other("is followed by unexpected bytes");
                return Err(Malformed::new(at, "end of the stream", problem));
            }
        };
        if let Step::Item(item, len) = &step {
            let end = at.saturating_add(*len as u64);
            self.expected = self.after(item, end)?;
            self.offset = end;
        }
        Ok(step)
    }

    /// What comes after `item`, which ends at byte `end`.
    fn after(&mut self, item: &Item<'_>, end: u64) -> Result<Expected, Malformed> {
        let ended = |ends: bool, expected: Expected| match expected {
            Expected::Body(id, _) if ends => Expected::Footer(id),
            same => same,
        };
        Ok(match item {
            Item::NativeStart => Expected::Hello,
            Item::Start => Expected::FirstElement,
            Item::Native(_) if self.expected == Expected::Hello => Expected::Start,
            Item::Native(record) => ended(record.header.is_end(), self.expected),
            Item::Element(element) => self.after_element(element, end)?,
            Item::Block(record) => ended(record.ends_body(), self.expected),
            Item::DirtyBitmap(record) => ended(record.ends_body(), self.expected),
            Item::Ram(record) => self.after_ram(record, end)?,
            Item::Footer(_) | Item::PackageEnd => Expected::Element,
            Item::Bytes(bytes) => match self.expected {
                Expected::Bytes(left, then) => match left.saturating_sub(bytes.len() as u64) {
                    0 => then.map_or(Expected::Nothing, |id| Expected::Body(id, Owner::Ram)),
                    left => Expected::Bytes(left, then),
                },
                same => same,
            },
        })
    }

    fn after_element(&mut self, element: &Element<'_>, end: u64) -> Result<Expected, Malformed> {
        let misplaced =
            |field| Err(Malformed::new(self.offset, field, Problem::Other("has no place here")));
        let is_first = self.expected == Expected::FirstElement;
        let is_after_eof = self.expected == Expected::AfterEof;
        match element {
            Element::VmDescription(0) if is_after_eof => Ok(Expected::Nothing),
            Element::VmDescription(len) if is_after_eof => Ok(Expected::Bytes((*len).into(), None)),
            _ if is_after_eof => misplaced("element after the end of the stream"),
            Element::VmDescription(_) => misplaced("VM description"),
            Element::Configuration(configuration) if is_first => self.configure(configuration),
            Element::Configuration(_) => misplaced("configuration"),
            Element::Eof if self.package_end.is_some() => misplaced("end of the stream"),
            Element::Eof => Ok(Expected::AfterEof),
            Element::Section(section) => self.open(section),
            Element::Command(Command::Packaged(_)) if self.package_end.is_some() => {
                misplaced("package inside a package")
            }
            Element::Command(Command::Packaged(size)) => {
                self.package_end = Some(end.saturating_add((*size).into()));
                Ok(Expected::Element)
            }
            Element::Command(_) => Ok(Expected::Element),
        }
    }

    fn configure(&mut self, configuration: &Configuration<'_>) -> Result<Expected, Malformed> {
        let page_bits = configuration.subsections.iter().find_map(|subsection| match subsection {
            Subsection::TargetPageBits(bits) => Some(*bits),
            _ => None,
        });
        if let Some(bits) = page_bits.filter(|bits| *bits != ram::PAGE_BYTES.ilog2()) {
            let problem = Problem::Mismatch { value: bits.into(), expected: 12 };
            return Err(Malformed::new(self.offset, "target page bits", problem));
        }
        self.ram = ram::Decoder::new(ram::Options {
            has_addresses: configuration.has_capability(IGNORE_SHARED),
            is_mapped: configuration.has_capability(MAPPED_RAM),
        });
        Ok(Expected::Element)
    }

    fn open(&mut self, section: &Section<'_>) -> Result<Expected, Malformed> {
        let Some(name) = section.name else {
            return match self.sections.get(&section.id) {
                Some(owner) => Ok(Expected::Body(section.id, *owner)),
                None => {
                    let problem = Problem::Unknown { value: section.id.into() };
                    Err(Malformed::new(self.offset, "section id", problem))
                }
            };
        };
        let owner = owner(&name, self.offset)?;
        if self.sections.len() >= MAX_SECTIONS && !self.sections.contains_key(&section.id) {
            let problem = Problem::Other("is one more than the limit of 4096 sections");
            return Err(Malformed::new(self.offset, "section", problem));
        }
        // What is sent whole has no later parts; it must not be taken for a live section either.
        if section.kind == SectionKind::Start || owner != Owner::Device {
            self.sections.insert(section.id, owner);
        }
        Ok(Expected::Body(section.id, owner))
    }

    fn after_ram(&mut self, record: &ram::Record<'_>, end: u64) -> Result<Expected, Malformed> {
        let Expected::Body(id, _) = self.expected else { return Ok(self.expected) };
        match record {
            ram::Record::End => Ok(Expected::Footer(id)),
            ram::Record::Block { used_length, mapped: Some(mapped), .. } => {
                let pages_end = mapped.pages_offset.saturating_add(*used_length);
                match pages_end.checked_sub(end) {
                    Some(0) => Ok(self.expected),
                    Some(left) if mapped.pages_offset >= end => Ok(Expected::Bytes(left, Some(id))),
                    _ => {
                        let (value, max) = (mapped.pages_offset, u64::MAX);
                        let problem = Problem::OutOfRange { value, min: end, max };
                        Err(Malformed::new(self.offset, "mapped-ram pages offset", problem))
                    }
                }
            }
            _ => Ok(self.expected),
        }
    }

    fn device_state<'a>(
        &self,
        id: u32,
        input: &'a [u8],
        is_whole: bool,
    ) -> Result<Step<Item<'a>>, Malformed> {
        let is_live = |id| self.sections.contains_key(&id);
        let in_package = self.package_end.is_some();
        match scan(input, Context { id, is_whole, in_package, is_live: &is_live }) {
            Scan::State(len) => {
                let state = input.get(..len).unwrap_or(input);
                Ok(Step::Item(Item::Bytes(state), state.len()))
            }
            Scan::Need(len) => Ok(Step::Need(len)),
            Scan::Footer => {
                attempt(input, self.offset, |reader| container::decode_footer(reader, id))
                    .map(|step| step.map(|()| Item::Footer(id)))
            }
        }
    }
}

fn owner(section: &SectionName<'_>, at: u64) -> Result<Owner, Malformed> {
    let SectionName { name, instance, version } = *section;
    let (owner, min, max) = match (name, version) {
        (native::block::SECTION, native::block::SECTION_VERSION) => {
            (Owner::Native, version, version)
        }
        (native::control::SECTION, _) => {
            let version = native::control::SECTION_VERSION;
            (Owner::Native, version, version)
        }
        (ram::SECTION, _) => (Owner::Ram, ram::SECTION_VERSION, ram::SECTION_VERSION),
        (block::SECTION, _) => (Owner::Block, 0, block::SECTION_VERSION),
        (dirty_bitmap::SECTION, _) => {
            let version = dirty_bitmap::SECTION_VERSION;
            (Owner::DirtyBitmap, version, version)
        }
        _ => return Ok(Owner::Device),
    };
    if !(min..=max).contains(&version) {
        let problem =
            Problem::OutOfRange { value: version.into(), min: min.into(), max: max.into() };
        return Err(Malformed::new(at, "section version", problem));
    }
    if instance != 0 {
        let problem = Problem::Mismatch { value: instance.into(), expected: 0 };
        return Err(Malformed::new(at, "section instance", problem));
    }
    Ok(owner)
}

fn decode_start<'a>(reader: &mut Reader<'a>) -> Result<Item<'a>, Malformed> {
    if reader.clone().array("stream magic")? != hello::MAGIC {
        return container::decode_start(reader).map(|()| Item::Start);
    }
    reader.take(hello::MAGIC.len(), "hello magic")?;
    let at = reader.offset();
    match reader.be32("hello version")? {
        hello::VERSION => Ok(Item::NativeStart),
        version => {
            let (value, expected) = (version.into(), hello::VERSION.into());
            Err(Malformed::new(at, "hello version", Problem::Mismatch { value, expected }))
        }
    }
}

fn native_record(input: &[u8], at: u64) -> Result<Step<Item<'_>>, Malformed> {
    attempt(input, at, |reader| frame::Record::decode(reader).map(Item::Native))
}

/// As much as is there of `left` bytes.
fn some_bytes(input: &[u8], left: u64) -> Step<Item<'_>> {
    let len = usize::try_from(left).unwrap_or(usize::MAX).min(input.len());
    match input.get(..len) {
        Some(bytes) if len > 0 => Step::Item(Item::Bytes(bytes), len),
        _ => Step::Need(1),
    }
}
