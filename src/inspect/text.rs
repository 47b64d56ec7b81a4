//! A line for each record. Sections that say nothing are counted, and so are, after the first of a
//! run, records of the same kind.

use std::fmt::Write as _;
use std::io::{self, Write};

use format_spec::native::block::BlockRecord;
use format_spec::qemu::container::{Element, SectionKind};
use format_spec::qemu::stream::Item;
use format_spec::qemu::{block, dirty_bitmap, ram};

use super::decoders::Seen;
use super::native::{self, Native};
use super::{Inspection, Kind, Stop, View};

/// Shows records to people.
pub(super) struct Text<'w> {
    out: &'w mut dyn Write,
    /// Lines that may turn out to say nothing: a PART and the end of its body; or, in a run, the
    /// end of a body, its footer and the PART that comes next.
    held: Vec<(u64, String)>,
    empty: Empty,
    run: Option<Run>,
}

/// PARTs that said nothing.
#[derive(Default)]
struct Empty {
    count: u64,
    first: u64,
}

/// Records of the same kind after the first, which is shown.
struct Run {
    what: &'static str,
    /// Whose they are.
    owner: Option<String>,
    more: u64,
    /// Sections that hold nothing else, after the first.
    sections: u64,
    /// Where the last one belongs.
    last: u64,
    /// How many of which sort.
    sorts: Vec<(&'static str, u64)>,
}

/// What a record is to a run.
struct Alike<'a> {
    what: &'static str,
    /// `None`: that of the record before.
    owner: Option<&'a str>,
    /// Whether another run begins with it in any case.
    begins: bool,
    sort: &'static str,
    place: u64,
}

impl<'w> Text<'w> {
    pub(super) fn new(out: &'w mut dyn Write) -> Self {
        Self { out, held: Vec::new(), empty: Empty::default(), run: None }
    }

    fn line(&mut self, at: u64, text: &str) -> io::Result<()> {
        writeln!(self.out, "{at:>10}  {text}")
    }

    fn note(&mut self, text: &str) -> io::Result<()> {
        writeln!(self.out, "{:>10}  {text}", "")
    }

    /// Shows what is held back.
    fn flush(&mut self) -> io::Result<()> {
        self.end_run()?;
        let Empty { count, first } = std::mem::take(&mut self.empty);
        if count > 0 {
            let s = if count == 1 { "" } else { "s" };
            self.line(first, &format!("{count} empty PART section{s}"))?;
        }
        for (at, text) in std::mem::take(&mut self.held) {
            self.line(at, &text)?;
        }
        Ok(())
    }

    fn end_run(&mut self) -> io::Result<()> {
        let Some(run) = self.run.take().filter(|run| run.more > 0) else { return Ok(()) };
        let mut text = format!("  … {} more {} to {:#x}", run.more, run.what, run.last);
        if run.sections > 0 {
            let _ = write!(text, " in {} more sections", run.sections);
        }
        for (index, (sort, count)) in run.sorts.iter().enumerate() {
            let mark = if index == 0 { ":" } else { "," };
            // Writing to a string cannot fail.
            let _ = write!(text, "{mark} {count} {sort}");
        }
        self.note(&text)
    }

    /// Counts a record, if it belongs to the run; else begins one with it.
    fn joins(&mut self, alike: &Alike<'_>) -> bool {
        let Some(run) = &mut self.run else { return false };
        let is_same_owner = alike.owner.is_none() || run.owner.as_deref() == alike.owner;
        if alike.begins || run.what != alike.what || !is_same_owner {
            return false;
        }
        run.more = run.more.saturating_add(1);
        if !self.held.is_empty() {
            run.sections = run.sections.saturating_add(1);
            self.held.clear();
        }
        run.last = alike.place;
        match run.sorts.iter_mut().find(|(sort, _)| *sort == alike.sort) {
            Some((_, count)) => *count = count.saturating_add(1),
            None => run.sorts.push((alike.sort, 1)),
        }
        true
    }
}

impl View for Text<'_> {
    fn begin(&mut self, kind: Option<Kind>) -> io::Result<()> {
        let text = match kind {
            Some(Kind::Main) => "main connection",
            Some(Kind::Channel) => "multifd channel",
            Some(Kind::Preempt) => "postcopy-preempt channel",
            Some(Kind::ReturnPath) => "return path",
            None => return Ok(()),
        };
        writeln!(self.out, "{text}")
    }

    fn record(&mut self, at: u64, seen: &Seen<'_>) -> io::Result<()> {
        let text = words(seen);
        if let Some(alike) = alike(seen) {
            let is_next = self.held.is_empty() || self.held.len() == IN_RUN.len();
            if is_next && self.joins(&alike) {
                return Ok(());
            }
            self.flush()?;
            self.line(at, &text)?;
            let owner = alike.owner.map(str::to_owned);
            let (more, sections, last, sorts) = (0, 0, 0, Vec::new());
            self.run = Some(Run { what: alike.what, owner, more, sections, last, sorts });
            return Ok(());
        }
        let role = role(seen);
        if self.run.is_some() {
            if IN_RUN.get(self.held.len()) == Some(&role) {
                self.held.push((at, text));
                return Ok(());
            }
            let part = self.held.pop_if(|_| role == Role::Nothing);
            self.flush()?;
            self.held.extend(part);
        }
        match (self.held.len(), role) {
            (_, Role::Part) => {
                if !self.held.is_empty() {
                    self.flush()?;
                }
                self.held.push((at, text));
                Ok(())
            }
            (1, Role::Nothing) => {
                self.held.push((at, text));
                Ok(())
            }
            (2, Role::Footer) => {
                let first = self.held.first().map_or(at, |(at, _)| *at);
                self.held.clear();
                if self.empty.count == 0 {
                    self.empty.first = first;
                }
                self.empty.count = self.empty.count.saturating_add(1);
                Ok(())
            }
            _ => {
                self.flush()?;
                self.line(at, &text)
            }
        }
    }

    fn end(&mut self, inspection: &Inspection) -> io::Result<()> {
        self.flush()?;
        let bytes = inspection.bytes;
        match &inspection.stopped {
            None => self.line(bytes, "end"),
            Some(Stop::Malformed(error)) => self.line(error.offset, &format!("stopped: {error}")),
            Some(Stop::Input(error)) => self.line(bytes, &format!("stopped: {error}")),
        }
    }
}

/// What may stand between the records of a run: one section ends, the next begins.
const IN_RUN: [Role; 3] = [Role::Nothing, Role::Footer, Role::Part];

/// What a record is to sections that say nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    Part,
    Nothing,
    Footer,
    Other,
}

fn role(seen: &Seen<'_>) -> Role {
    match seen {
        Seen::Main(Item::Element(Element::Section(section)))
            if section.kind == SectionKind::Part =>
        {
            Role::Part
        }
        Seen::Main(Item::Footer(_)) => Role::Footer,
        Seen::Native(native) if native.is_end() => Role::Nothing,
        Seen::Main(Item::Ram(ram::Record::End)) => Role::Nothing,
        Seen::Main(Item::Block(block::Record { body: block::Body::None, .. })) => Role::Nothing,
        Seen::Main(Item::DirtyBitmap(record)) => match record.body {
            dirty_bitmap::Body::None if record.device.or(record.bitmap).is_none() => Role::Nothing,
            _ => Role::Other,
        },
        _ => Role::Other,
    }
}

fn alike<'a>(seen: &Seen<'a>) -> Option<Alike<'a>> {
    match seen {
        Seen::Main(Item::Ram(ram::Record::Page { block, offset, content }))
        | Seen::Preempt(ram::Record::Page { block, offset, content }) => {
            let sort = match content {
                ram::Content::Fill(0) => "zero",
                ram::Content::Fill(_) => "filled",
                ram::Content::Plain(_) => "plain",
                ram::Content::Xbzrle(_) => "xbzrle",
                ram::Content::Zlib(_) => "zlib",
            };
            Some(Alike { what: "pages", owner: *block, begins: false, sort, place: *offset })
        }
        Seen::Main(Item::Block(record)) => {
            let (device, sort) = match record.body {
                block::Body::Data { device, .. } => (device, "with content"),
                block::Body::Zeroes { device } => (device, "of zeroes"),
                _ => return None,
            };
            let is_plain = !record.ends_body();
            let (owner, place) = (Some(device), record.offset());
            is_plain.then_some(Alike { what: "chunks", owner, begins: false, sort, place })
        }
        Seen::Main(Item::DirtyBitmap(record)) => {
            let dirty_bitmap::Body::Bits { first_sector, buffer, .. } = record.body else {
                return None;
            };
            let sort = if buffer.is_some() { "with bits" } else { "clear" };
            // A name is given where the bitmap is another one than before.
            let begins = record.device.or(record.bitmap).is_some() || record.ends_body();
            let (what, place) = ("ranges of sectors", first_sector);
            Some(Alike { what, owner: None, begins, sort, place })
        }
        Seen::Native(Native::Block(BlockRecord::Run(run))) => {
            let (place, _) = run.content.range();
            let sort = match native::sort(run) {
                "data" => "with content",
                "zeroes" => "of zeroes",
                _ => "of bitmaps",
            };
            Some(Alike { what: "runs", owner: None, begins: false, sort, place })
        }
        Seen::Native(Native::Other(record)) if !record.header.is_end() => {
            let place = u64::from(record.header.kind);
            let (what, sort) = ("native records", "of any type");
            Some(Alike { what, owner: None, begins: false, sort, place })
        }
        _ => None,
    }
}

/// The record in words. Names found in a stream cannot drive a terminal: they are escaped.
fn words(seen: &Seen<'_>) -> String {
    match seen {
        Seen::Main(item) => item.to_string(),
        Seen::Native(native) => native.to_string(),
        Seen::Channel(item) => item.to_string(),
        Seen::Preempt(record) => record.to_string(),
        Seen::Reply(reply) => reply.to_string(),
        Seen::Raw { len, first } => {
            let mut text = format!("  {len} bytes ");
            first.iter().for_each(|byte| {
                let _ = write!(text, "{byte:02x}");
            });
            if *len > first.len() as u64 {
                text.push('…');
            }
            text
        }
    }
}
