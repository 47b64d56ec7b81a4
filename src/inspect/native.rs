//! What the records of a native stream say, by the sections that they stand in.

use std::collections::BTreeMap;
use std::fmt;

use format_spec::Malformed;
use format_spec::native::block::{self, BlockRecord, Content, Run};
use format_spec::native::control::{self, Control};
use format_spec::native::frame::Record;
use format_spec::native::hello::Hello;
use format_spec::qemu::container::{Element, Section};
use format_spec::qemu::stream::Item;
use serde_json::{Value, json};

/// A record of a native stream.
#[derive(Debug)]
pub(super) enum Native<'a> {
    /// How a connection begins.
    Hello(Hello),
    /// Of the section that drives the others.
    Control(Control),
    /// Of disks and bitmaps.
    Block(BlockRecord<'a>),
    /// Compressed, or of a section that is not known here.
    Other(Record<'a>),
}

/// What the sections of a stream are.
#[derive(Debug, Default)]
pub(super) struct Sections {
    /// Until the stream starts, records are hellos.
    has_started: bool,
    known: BTreeMap<u32, Kind>,
    open: Kind,
}

#[derive(Debug, Clone, Copy, Default)]
enum Kind {
    Control,
    Block,
    #[default]
    Unknown,
}

impl Sections {
    /// Follows an item of the container.
    pub(super) fn follow(&mut self, item: &Item<'_>) {
        match item {
            Item::Start => self.has_started = true,
            Item::Element(Element::Section(section)) => self.enter(section),
            _ => {}
        }
    }

    fn enter(&mut self, section: &Section<'_>) {
        if let Some(name) = section.name {
            let kind = match (name.name, name.version) {
                (control::SECTION, control::SECTION_VERSION) => Kind::Control,
                (block::SECTION, block::SECTION_VERSION) => Kind::Block,
                _ => Kind::Unknown,
            };
            self.known.insert(section.id, kind);
        }
        // A data connection starts no sections: its first one is known all the same.
        let unnamed = if section.id == 1 { Kind::Control } else { Kind::Unknown };
        self.open = self.known.get(&section.id).copied().unwrap_or(unnamed);
    }

    /// What a record says here.
    pub(super) fn read<'a>(&self, record: Record<'a>) -> Result<Native<'a>, Malformed> {
        if !self.has_started {
            return Hello::of_record(&record).map(Native::Hello);
        }
        let is_plain = !record.header.is_compressed();
        let read = match self.open {
            Kind::Control if is_plain => Control::decode(&record)?.map(Native::Control),
            Kind::Block if is_plain => BlockRecord::decode(&record)?.map(Native::Block),
            _ => None,
        };
        Ok(read.unwrap_or(Native::Other(record)))
    }
}

impl Native<'_> {
    /// Whether it is the end of a section's body.
    pub(super) fn is_end(&self) -> bool {
        match self {
            Self::Hello(_) => false,
            Self::Control(control) => matches!(control, Control::End),
            Self::Block(record) => matches!(record, BlockRecord::End),
            Self::Other(record) => record.header.is_end(),
        }
    }

    /// For programs.
    pub(super) fn value(&self) -> Value {
        match self {
            Self::Hello(hello) => hello_value(hello),
            Self::Control(control) => control_value(control),
            Self::Block(record) => block_value(record),
            Self::Other(record) => json!({
                "type": "native", "record": record.header.kind, "length": record.body.len(),
                "compressed": record.header.is_compressed(), "eos": record.header.is_end(),
            }),
        }
    }
}

fn hello_value(hello: &Hello) -> Value {
    match hello {
        Hello::Offer(offer) => json!({
            "type": "offer", "session": hex(&offer.session), "one-way": offer.is_one_way,
            "features": offer.features, "channels": offer.channels, "program": offer.program,
        }),
        Hello::Choice(choice) => json!({
            "type": "choice", "session": hex(&choice.session), "features": choice.features,
            "state": format!("{:?}", choice.state).to_lowercase(), "channels": choice.channels,
            "program": choice.program,
        }),
        Hello::Refusal(refusal) => json!({ "type": "refusal", "text": refusal.text }),
        Hello::Join(join) => {
            json!({ "type": "join", "session": hex(&join.session), "channel": join.channel })
        }
    }
}

fn control_value(control: &Control) -> Value {
    match control {
        Control::End => json!({ "type": "eos" }),
        Control::Barrier { number, is_durable } => {
            json!({ "type": "barrier", "number": number, "durable": is_durable })
        }
        Control::Prepare(session) => json!({ "type": "prepare", "session": hex(session) }),
        Control::Commit(session) => json!({ "type": "commit", "session": hex(session) }),
        Control::Abort { text, .. } => json!({ "type": "abort", "text": text }),
        Control::Keepalive => json!({ "type": "keepalive" }),
    }
}

fn block_value(record: &BlockRecord<'_>) -> Value {
    match record {
        BlockRecord::End => json!({ "type": "eos" }),
        BlockRecord::Disk(disk) => json!({
            "type": "disk", "disk": disk.disk.0, "name": disk.name, "size": disk.size,
            "keeps-rest": disk.keeps_rest,
        }),
        BlockRecord::Run(run) => run_value(run),
        BlockRecord::DiskSeal(seal) => json!({
            "type": "disk-seal", "disk": seal.disk.0,
            "hash": seal.hash.map(|hash| hash.to_string()),
        }),
        BlockRecord::BitmapCreate(create) => json!({
            "type": "bitmap-create", "bitmap": create.version.bitmap,
            "generation": create.version.generation, "disk": create.disk.0, "name": create.name,
            "granularity": create.shape.granularity, "bits": create.shape.bits,
            "enabled": create.is_enabled, "persistent": create.is_persistent,
        }),
        BlockRecord::BitmapUpdate(update) => json!({
            "type": "bitmap-update", "bitmap": update.version.bitmap,
            "generation": update.version.generation, "enabled": update.is_enabled,
            "persistent": update.is_persistent,
        }),
        BlockRecord::BitmapRemove(version) => json!({
            "type": "bitmap-remove", "bitmap": version.bitmap, "generation": version.generation,
        }),
        BlockRecord::BitmapSeal(seal) => json!({
            "type": "bitmap-seal", "bitmap": seal.version.bitmap,
            "generation": seal.version.generation,
            "digest": seal.digest.map(|digest| digest.to_string()),
        }),
        BlockRecord::DiskContent(content) => json!({
            "type": "disk-content", "disk": content.disk.0, "bytes": content.bytes,
        }),
    }
}

fn run_value(run: &Run<'_>) -> Value {
    let (offset, len) = run.content.range();
    json!({
        "type": "run", "disk": run.disk.0, "content": sort(run), "disk-offset": offset,
        "length": len, "pieces": run.pieces.iter().count(),
    })
}

/// What a run carries.
pub(super) fn sort(run: &Run<'_>) -> &'static str {
    match run.content {
        Content::Data { .. } => "data",
        Content::Zeroes { .. } => "zeroes",
        Content::None => "bitmaps",
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// In words. Names found in a stream cannot drive a terminal: they are escaped.
impl fmt::Display for Native<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("  ")?;
        match self {
            Self::Hello(Hello::Offer(offer)) => {
                let way = if offer.is_one_way { ", nobody answers" } else { "" };
                let (session, program) = (hex(&offer.session), &offer.program);
                let (channels, features) = (offer.channels, offer.features);
                write!(f, "OFFER of {program:?}: session {session}, {channels} connections")?;
                write!(f, ", features {features:#x}{way}")
            }
            Self::Hello(Hello::Choice(choice)) => {
                let (state, program, channels) = (choice.state, &choice.program, choice.channels);
                write!(f, "CHOICE of {program:?}: {state:?}, {channels} connections")
            }
            Self::Hello(Hello::Refusal(refusal)) => write!(f, "REFUSAL {:?}", refusal.text),
            Self::Hello(Hello::Join(join)) => write!(f, "JOIN as connection {}", join.channel),
            Self::Control(control) => write_control(f, control),
            Self::Block(record) => write_block(f, record),
            Self::Other(record) => write!(f, "{record}"),
        }
    }
}

fn write_control(f: &mut fmt::Formatter<'_>, control: &Control) -> fmt::Result {
    match control {
        Control::End => f.write_str("END"),
        Control::Barrier { number, is_durable } => {
            write!(f, "BARRIER {number}{}", if *is_durable { ", durable" } else { "" })
        }
        Control::Prepare(session) => write!(f, "PREPARE {}", hex(session)),
        Control::Commit(session) => write!(f, "COMMIT {}", hex(session)),
        Control::Abort { text, .. } => write!(f, "ABORT {text:?}"),
        Control::Keepalive => f.write_str("KEEPALIVE"),
    }
}

fn write_block(f: &mut fmt::Formatter<'_>, record: &BlockRecord<'_>) -> fmt::Result {
    match record {
        BlockRecord::End => f.write_str("END"),
        BlockRecord::Disk(disk) => {
            let keeps = if disk.keeps_rest { ", what is not sent stays" } else { "" };
            write!(f, "disk {} {:?} of {:#x} bytes{keeps}", disk.disk.0, disk.name, disk.size)
        }
        BlockRecord::Run(run) => {
            let (offset, len) = run.content.range();
            match run.content {
                Content::None => write!(f, "run of disk {}", run.disk.0)?,
                _ => write!(f, "run of disk {}: {offset:#x} + {len:#x} {}", run.disk.0, sort(run))?,
            }
            match run.pieces.iter().count() {
                0 => Ok(()),
                pieces => write!(f, ", {pieces} pieces of bitmaps"),
            }
        }
        BlockRecord::DiskSeal(seal) => {
            write!(f, "disk {} sealed", seal.disk.0)?;
            seal.hash.map_or(Ok(()), |hash| write!(f, ": {hash}"))
        }
        BlockRecord::BitmapCreate(create) => {
            let (version, shape) = (create.version, create.shape);
            let state = if create.is_enabled { "enabled" } else { "disabled" };
            let kept = if create.is_persistent { "" } else { ", transient" };
            write!(f, "bitmap {} {:?} of disk {}", version.bitmap, create.name, create.disk.0)?;
            write!(f, ", generation {}", version.generation)?;
            write!(f, ", granularity {}, {} bits, {state}{kept}", shape.granularity, shape.bits)
        }
        BlockRecord::BitmapUpdate(update) => {
            let state = if update.is_enabled { "enabled" } else { "disabled" };
            write!(f, "bitmap {} is {state}", update.version.bitmap)
        }
        BlockRecord::BitmapRemove(version) => write!(f, "bitmap {} removed", version.bitmap),
        BlockRecord::BitmapSeal(seal) => {
            write!(f, "bitmap {} sealed", seal.version.bitmap)?;
            seal.digest.map_or(Ok(()), |digest| write!(f, ": {digest}"))
        }
        BlockRecord::DiskContent(content) => {
            write!(f, "disk {}: {:#x} bytes of content to come", content.disk.0, content.bytes)
        }
    }
}
