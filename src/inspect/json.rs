//! One document with every record, written as it is read.

use std::io::{self, Write};

use format_spec::qemu::command::Command;
use format_spec::qemu::configuration::{Configuration, Subsection};
use format_spec::qemu::container::{Element, Section, SectionKind};
use format_spec::qemu::reply::Reply;
use format_spec::qemu::stream::Item;
use format_spec::qemu::{block, dirty_bitmap, multifd, ram};
use serde_json::{Value, json};

use super::decoders::Seen;
use super::native::{Native, hex};
use super::{Inspection, Kind, Stop, View};

/// Shows records to programs.
pub(super) struct Json<'w> {
    out: &'w mut dyn Write,
    has_records: bool,
}

impl<'w> Json<'w> {
    pub(super) fn new(out: &'w mut dyn Write) -> Self {
        Self { out, has_records: false }
    }
}

impl View for Json<'_> {
    fn begin(&mut self, kind: Option<Kind>) -> io::Result<()> {
        write!(self.out, "{{\"kind\":{},\"records\":[", json!(kind))
    }

    fn record(&mut self, at: u64, seen: &Seen<'_>) -> io::Result<()> {
        let mut value = value(seen);
        if let Some(map) = value.as_object_mut() {
            map.insert("offset".to_owned(), at.into());
        }
        let comma = if std::mem::replace(&mut self.has_records, true) { "," } else { "" };
        write!(self.out, "{comma}{value}")
    }

    fn end(&mut self, inspection: &Inspection) -> io::Result<()> {
        write!(self.out, "],\"bytes\":{}", inspection.bytes)?;
        let error = match &inspection.stopped {
            None => None,
            Some(Stop::Malformed(error)) => Some(json!({
                "offset": error.offset, "field": error.field, "problem": error.problem.to_string(),
            })),
            Some(Stop::Input(error)) => {
                Some(json!({ "offset": inspection.bytes, "problem": error.to_string() }))
            }
        };
        if let Some(error) = error {
            write!(self.out, ",\"error\":{error}")?;
        }
        writeln!(self.out, "}}")
    }
}

fn value(seen: &Seen<'_>) -> Value {
    match seen {
        Seen::Main(item) => main(item),
        Seen::Native(native) => native.value(),
        Seen::Channel(item) => channel(item),
        Seen::Preempt(record) => ram_record(record),
        Seen::Reply(reply) => reply_value(reply),
        Seen::Raw { len, .. } => json!({ "type": "bytes", "length": len }),
    }
}

fn main(item: &Item<'_>) -> Value {
    match item {
        Item::NativeStart => json!({ "type": "native-magic", "version": 1 }),
        Item::Start => json!({ "type": "magic", "version": 3 }),
        Item::Element(element) => element_value(element),
        Item::Footer(id) => json!({ "type": "footer", "id": id }),
        Item::PackageEnd => json!({ "type": "package-end" }),
        Item::Ram(record) => ram_record(record),
        Item::Block(record) => block_record(record),
        Item::DirtyBitmap(record) => dirty_bitmap_record(record),
        // Told apart by the decoders.
        Item::Native(record) => Native::Other(*record).value(),
        Item::Bytes(bytes) => json!({ "type": "bytes", "length": bytes.len() }),
    }
}

fn element_value(element: &Element<'_>) -> Value {
    match element {
        Element::Section(section) => section_value(section),
        Element::Command(command) => command_value(command),
        Element::Configuration(configuration) => configuration_value(configuration),
        Element::Eof => json!({ "type": "eof" }),
        Element::VmDescription(len) => json!({ "type": "vm-description", "length": len }),
    }
}

fn section_value(section: &Section<'_>) -> Value {
    let kind = match section.kind {
        SectionKind::Start => "start",
        SectionKind::Part => "part",
        SectionKind::End => "end",
        SectionKind::Full => "full",
    };
    let mut value = json!({ "type": "section", "section": kind, "id": section.id });
    if let Some(name) = section.name {
        value["name"] = name.name.into();
        value["instance"] = name.instance.into();
        value["version"] = name.version.into();
    }
    value
}

fn command_value(command: &Command<'_>) -> Value {
    let named = |name: &str| json!({ "type": "command", "command": name });
    let with = |name: &str, key: &str, value: Value| {
        let mut command = named(name);
        command[key] = value;
        command
    };
    match command {
        Command::OpenReturnPath => named("open-return-path"),
        Command::Ping(value) => with("ping", "value", (*value).into()),
        Command::PostcopyAdvise(None) => named("postcopy-advise"),
        Command::PostcopyAdvise(Some((blocks, target))) => {
            let mut advise = with("postcopy-advise", "page-sizes", (*blocks).into());
            advise["target-page-size"] = (*target).into();
            advise
        }
        Command::PostcopyListen => named("postcopy-listen"),
        Command::PostcopyRun => named("postcopy-run"),
        Command::PostcopyRamDiscard { block, ranges } => {
            let mut discard = with("postcopy-ram-discard", "block", (*block).into());
            discard["ranges"] = ranges.len().into();
            discard
        }
        Command::Packaged(size) => with("packaged", "length", (*size).into()),
        Command::EnableColo => named("enable-colo"),
        Command::PostcopyResume => named("postcopy-resume"),
        Command::RecvBitmap(block) => with("recv-bitmap", "block", (*block).into()),
        Command::SwitchoverStart => named("switchover-start"),
    }
}

fn configuration_value(configuration: &Configuration<'_>) -> Value {
    let mut value = json!({ "type": "configuration", "machine": configuration.machine });
    for subsection in &configuration.subsections {
        match subsection {
            Subsection::TargetPageBits(bits) => value["target-page-bits"] = (*bits).into(),
            Subsection::Capabilities(names) => value["capabilities"] = json!(names),
            Subsection::Uuid(uuid) => value["uuid"] = hex(&uuid[..]).into(),
        }
    }
    value
}

fn ram_record(record: &ram::Record<'_>) -> Value {
    match record {
        ram::Record::MemSize(bytes) => json!({ "type": "ram-size", "bytes": bytes }),
        ram::Record::Block { name, used_length, address, mapped } => {
            let mut value = json!({ "type": "ram-block", "block": name, "bytes": used_length });
            if let Some(address) = address {
                value["address"] = (*address).into();
            }
            if let Some(mapped) = mapped {
                value["bitmap-offset"] = mapped.bitmap_offset.into();
                value["pages-offset"] = mapped.pages_offset.into();
            }
            value
        }
        ram::Record::Page { block, offset, content } => {
            let (kind, len) = match content {
                ram::Content::Fill(_) => ("fill", 1),
                ram::Content::Plain(page) => ("plain", page.len()),
                ram::Content::Xbzrle(bytes) => ("xbzrle", bytes.len()),
                ram::Content::Zlib(bytes) => ("zlib", bytes.len()),
            };
            let mut value = json!({ "type": "page", "page-offset": offset, "content": kind });
            match content {
                ram::Content::Fill(byte) => value["fill"] = (*byte).into(),
                _ => value["length"] = len.into(),
            }
            if let Some(block) = block {
                value["block"] = (*block).into();
            }
            value
        }
        ram::Record::MultifdFlush => json!({ "type": "multifd-flush" }),
        ram::Record::End => json!({ "type": "eos" }),
    }
}

fn block_record(record: &block::Record<'_>) -> Value {
    let chunk = |device: &str, content: &str| {
        let disk_offset = record.offset();
        let (kind, eos) = ("chunk", record.ends_body());
        json!({
            "type": kind, "device": device, "disk-offset": disk_offset, "content": content,
            "eos": eos,
        })
    };
    match record.body {
        block::Body::Data { device, .. } => chunk(device, "data"),
        block::Body::Zeroes { device } => chunk(device, "zeroes"),
        block::Body::Progress => json!({ "type": "progress", "percent": record.percent() }),
        block::Body::None => json!({ "type": "eos" }),
    }
}

fn dirty_bitmap_record(record: &dirty_bitmap::Record<'_>) -> Value {
    let mut value = match record.body {
        dirty_bitmap::Body::None if record.ends_body() => json!({ "type": "eos" }),
        dirty_bitmap::Body::None => json!({ "type": "nothing" }),
        dirty_bitmap::Body::Complete => json!({ "type": "bitmap-complete" }),
        dirty_bitmap::Body::Start { granularity, flags } => json!({
            "type": "bitmap-start", "granularity": granularity,
            "enabled": flags & dirty_bitmap::ENABLED != 0,
            "persistent": flags & dirty_bitmap::PERSISTENT != 0,
        }),
        dirty_bitmap::Body::Bits { first_sector, sectors, buffer } => json!({
            "type": "bitmap-bits", "first-sector": first_sector, "sectors": sectors,
            "length": buffer.map_or(0, <[u8]>::len), "zeroes": buffer.is_none(),
        }),
    };
    value["eos"] = record.ends_body().into();
    for (key, name) in [("device", record.device), ("bitmap", record.bitmap)] {
        if let Some(name) = name {
            value[key] = name.into();
        }
    }
    value
}

fn channel(item: &multifd::Item<'_>) -> Value {
    match item {
        multifd::Item::Hello(hello) => {
            json!({ "type": "hello", "channel": hello.channel, "uuid": hex(&hello.uuid[..]) })
        }
        multifd::Item::Packet(packet) => json!({
            "type": "packet", "flags": packet.flags, "sync": packet.flags & multifd::SYNC != 0,
            "packet-num": packet.packet_num, "pages-alloc": packet.pages_alloc,
            "normal-pages": packet.normal_pages, "zero-pages": packet.zero_pages,
            "next-packet-size": packet.next_packet_size, "length": packet.payload_len(),
            "block": packet.block_name(), "offsets": packet.page_offsets().collect::<Vec<_>>(),
        }),
        multifd::Item::Device { name, instance, len, .. } => {
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            let name = String::from_utf8_lossy(name);
            json!({ "type": "device", "name": name, "instance": instance, "length": len })
        }
        multifd::Item::Payload(bytes) => json!({ "type": "bytes", "length": bytes.len() }),
    }
}

fn reply_value(reply: &Reply<'_>) -> Value {
    match reply {
        Reply::Shut(status) => json!({ "type": "shut", "status": status }),
        Reply::Pong(value) => json!({ "type": "pong", "value": value }),
        Reply::ReqPages { block, offset, len } => {
            let mut value = json!({ "type": "req-pages", "page-offset": offset, "length": len });
            if let Some(block) = block {
                value["block"] = (*block).into();
            }
            value
        }
        Reply::RecvBitmap { block, len } => {
            json!({ "type": "recv-bitmap", "block": block, "length": len })
        }
        Reply::Bits(bits) => json!({ "type": "bytes", "length": bits.len() }),
        Reply::BitsEnd => json!({ "type": "recv-bitmap-end" }),
        Reply::ResumeAck => json!({ "type": "resume-ack" }),
        Reply::SwitchoverAck => json!({ "type": "switchover-ack" }),
    }
}
