//! Takes the stream apart and hands each item to whoever keeps the rules about it.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::time::Instant;

use format_spec::Writer;
use format_spec::qemu::block::{self, CHUNK_BYTES};
use format_spec::qemu::configuration::{Configuration, Subsection};
use format_spec::qemu::container::{Element, SectionName};
use format_spec::qemu::reply::Reply;
use format_spec::qemu::stream::{Decoder, Item};
use format_spec::qemu::{Step, dirty_bitmap, ram};
use format_spec::{Blame, Malformed};
use mig_core::transport::HangUp;

use super::super::buffer::Buffer;
use super::super::error::{Error, Result, Subject};
use super::super::version::Version;
use super::bitmaps::{Bitmaps, Fate};
use super::bulk::Bulk;
use super::course::{Course, Reaction};
use super::disk::{Body, Counts, Disk};
use super::limits::{MAX_DEVICES, MAX_LISTED, TAIL_LIMIT};
use super::options::IncomingOptions;
use crate::Observer;
use crate::observe::interruptible;

/// What a stream brought.
pub(super) struct Received<'o> {
    pub(super) disks: Vec<Disk<'o>>,
    /// Bitmaps, by disk and name on the wire.
    pub(super) bitmaps: BTreeMap<String, BTreeMap<String, Fate>>,
    pub(super) wire_bytes: u64,
}

/// A migration while it arrives.
pub(super) struct Session<'w, 'o, R> {
    buffer: Buffer<R>,
    decoder: Decoder,
    state: State<'w, 'o>,
}

/// What the items act on.
struct State<'w, 'o> {
    writer: &'w mut dyn Write,
    options: &'o IncomingOptions,
    course: Course,
    disks: Vec<Disk<'o>>,
    bitmaps: Bitmaps<'o>,
    bulk: Bulk,
    dropped: Dropped,
    has_content: bool,
    has_ended: bool,
    /// Numbers of the sections of devices, as far as those are kept.
    device_ids: BTreeSet<u32>,
    is_in_device: bool,
}

/// What is not kept.
#[derive(Default)]
struct Dropped {
    /// Bytes of guest memory that the source has.
    memory: u64,
    /// Devices whose state came.
    devices: Vec<String>,
    /// The device whose state came last, and where it began.
    last: Option<(String, u64)>,
}

impl<'w, 'o, R: Read> Session<'w, 'o, R> {
    /// Before the first byte. Answers go to `writer`.
    pub(super) fn new(
        reader: R,
        writer: &'w mut dyn Write,
        options: &'o IncomingOptions,
        disks: Vec<Disk<'o>>,
    ) -> Self {
        let bitmaps = Bitmaps::new(options, disks.iter().map(Disk::holder).collect());
        let (course, dropped) = (Course::default(), Dropped::default());
        let state = State {
            writer,
            options,
            course,
            disks,
            bitmaps,
            bulk: Bulk::default(),
            dropped,
            has_content: false,
            has_ended: false,
            device_ids: BTreeSet::new(),
            is_in_device: false,
        };
        Self { buffer: Buffer::new(reader), decoder: Decoder::new(), state }
    }

    /// Receives everything.
    pub(super) fn receive(&mut self, line: &dyn HangUp, observer: &dyn Observer) -> Result<()> {
        loop {
            let at = self.decoder.offset();
            let step = self.decoder.next(self.buffer.bytes(), self.buffer.is_whole());
            match step.map_err(|error| self.state.explain(error))? {
                Step::Item(item, len) => {
                    self.state.item(&item, &self.decoder, at, observer)?;
                    self.state.keep(&item, self.buffer.bytes().get(..len).unwrap_or_default())?;
                    self.buffer.consume(len);
                    if observer.is_cancelled() {
                        return Err(Error::Interrupted);
                    }
                }
                Step::Need(_) if self.buffer.is_whole() => {
                    if self.buffer.bytes().is_empty() && self.decoder.may_end() {
                        break;
                    }
                    return Err(self.lost(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the source closed it before the stream was complete",
                    )));
                }
                Step::Need(needed) => {
                    self.fill(needed, line, observer)?;
                }
            }
            if self.decoder.has_ended() || (self.state.has_ended && self.state.course.is_postcopy())
            {
                break;
            }
        }
        self.state.dropped.tell(observer, self.state.options.devices.is_some());
        let at = self.decoder.offset();
        self.state.check_content(at).and_then(|()| self.state.check_arrived(at))
    }

    /// Waits for more. A source that waits for the outcome, and is not to send the description of
    /// its machine, says nothing more: the end could be in doubt, since a device's is not told.
    fn fill(&mut self, needed: usize, line: &dyn HangUp, observer: &dyn Observer) -> Result<()> {
        let is_last = self.state.has_ended && self.awaits_outcome();
        if !is_last {
            return self.buffer.fill(needed).map_err(|error| self.lost(error));
        }
        let (buffer, begun) = (&mut self.buffer, Instant::now());
        let filled = interruptible(observer, line, Some(TAIL_LIMIT), || buffer.fill(needed));
        let is_over = begun.elapsed() >= TAIL_LIMIT;
        if is_over && (filled.is_err() || self.buffer.is_whole()) {
            let reason = "no description of the machine follows the end of the stream; without \
                          suppress-vmdesc=on at the source, or without return-path, it ends";
            return Err(self.lost(io::Error::new(io::ErrorKind::TimedOut, reason)));
        }
        filled.map_err(|error| self.lost(error))
    }

    /// Whether the source listens.
    pub(super) fn has_return_path(&self) -> bool {
        self.state.course.has_return_path()
    }

    /// Whether the source waits to be told how it went.
    pub(super) fn awaits_outcome(&self) -> bool {
        self.state.course.has_return_path() && !self.state.options.is_one_way
    }

    /// All that came, which is complete if [`receive`](Self::receive) has ended well, and what it
    /// came from.
    pub(super) fn into_received(self) -> (Received<'o>, R) {
        let State { disks, bitmaps, .. } = self.state;
        let wire_bytes = self.decoder.offset();
        let received = Received { disks, bitmaps: bitmaps.into_fates(), wire_bytes };
        (received, self.buffer.into_reader())
    }

    fn lost(&self, source: io::Error) -> Error {
        Error::Connection { action: "read from", offset: self.decoder.offset(), source }
    }
}

impl State<'_, '_> {
    fn item(
        &mut self,
        item: &Item<'_>,
        decoder: &Decoder,
        at: u64,
        observer: &dyn Observer,
    ) -> Result<()> {
        match item {
            Item::Element(element) => self.element(element, at),
            Item::Block(record) => self.block(record, at, observer),
            Item::DirtyBitmap(record) => self.dirty_bitmap(record, decoder, at),
            Item::Ram(ram::Record::MemSize(bytes)) => {
                self.dropped.memory = self.dropped.memory.max(*bytes);
                Ok(())
            }
            Item::Ram(ram::Record::Page { .. }) => {
                self.bulk.page();
                Ok(())
            }
            Item::Ram(ram::Record::MultifdFlush) => Err(Error::Unsupported {
                offset: at,
                reason: "the source sends its memory over other connections, and nothing is taken \
                         from those here: switch the capability multifd off at the source"
                    .to_owned(),
            }),
            Item::NativeStart | Item::Native(_) => Err(Error::Unsupported {
                offset: at,
                reason: "this is our own dialect and not QEMU's; leave --dialect out".to_owned(),
            }),
            Item::Ram(_) | Item::Start | Item::Footer(_) | Item::PackageEnd | Item::Bytes(_) => {
                Ok(())
            }
        }
    }

    /// Keeps what belongs to a device's section.
    fn keep(&mut self, item: &Item<'_>, bytes: &[u8]) -> Result<()> {
        let Some(devices) = &self.options.devices else { return Ok(()) };
        if let Item::Element(Element::Section(section)) = item {
            let is_new = section.name.map(|name| is_device(name.name));
            if is_new == Some(true) {
                self.device_ids.insert(section.id);
            } else if is_new == Some(false) {
                self.device_ids.remove(&section.id);
            }
            self.is_in_device = self.device_ids.contains(&section.id);
        }
        if self.is_in_device {
            let kept = devices.write(bytes);
            kept.map_err(|source| crate::Error::File {
                action: "write to",
                path: "the file of device states".into(),
                source,
            })?;
        }
        if matches!(item, Item::Footer(_)) {
            self.is_in_device = false;
        }
        Ok(())
    }

    fn element(&mut self, element: &Element<'_>, at: u64) -> Result<()> {
        match element {
            Element::Command(command) => match self.course.command(command, at)? {
                Reaction::None => {}
                Reaction::Pong(value) => self.answer(&Reply::Pong(value))?,
                Reaction::SwitchoverAck => self.answer(&Reply::SwitchoverAck)?,
            },
            Element::Section(section) => {
                self.has_content |= section.name.is_some_and(|s| s.name == block::SECTION);
                self.bitmaps.has_section |=
                    section.name.is_some_and(|s| s.name == dirty_bitmap::SECTION);
                self.bulk.section(section.kind);
                if section.name.is_some_and(|s| s.name == ram::SECTION) {
                    self.bulk.memory();
                }
                self.dropped.section(section.name, at);
            }
            Element::Eof => self.has_ended = true,
            Element::Configuration(configuration) => self.configuration(configuration, at)?,
            Element::VmDescription(_) => {}
        }
        Ok(())
    }

    /// What the source says of its machine.
    fn configuration(&mut self, configuration: &Configuration<'_>, at: u64) -> Result<()> {
        // Neither is newer than the source's QEMU.
        let version = Version::of_machine(configuration.machine).max(self.options.version);
        self.course.takes_switchover_ack = version.is_some_and(Version::has_switchover_ack);
        let uuid = configuration.subsections.iter().find_map(|subsection| match subsection {
            Subsection::Uuid(uuid) => Some(*uuid),
            _ => None,
        });
        let differs = |reason| Err(Error::Unsupported { offset: at, reason });
        match (&self.options.machine, self.options.uuid) {
            (Some(wanted), _) if wanted != configuration.machine => differs(format!(
                "the source's machine is {:?}, and {wanted:?} was asked for",
                configuration.machine
            )),
            (_, Some(_)) if uuid.is_none() => differs(
                "the source does not say the UUID of its machine: it needs -uuid and the \
                 capability validate-uuid"
                    .to_owned(),
            ),
            (_, Some(wanted)) if uuid != Some(wanted) => {
                differs("the UUID of the source's machine is another one than --uuid".to_owned())
            }
            _ => Ok(()),
        }
    }

    fn answer(&mut self, reply: &Reply<'_>) -> Result<()> {
        if self.options.is_one_way {
            return Ok(());
        }
        let mut out = Writer::new();
        reply.encode(&mut out);
        let written = self.writer.write_all(&out.into_bytes()).and_then(|()| self.writer.flush());
        written.map_err(|source| Error::Connection { action: "write to", offset: 0, source })
    }

    fn block(
        &mut self,
        record: &block::Record<'_>,
        at: u64,
        observer: &dyn Observer,
    ) -> Result<()> {
        let (device, content): (&str, Option<&[u8; CHUNK_BYTES]>) = match record.body {
            block::Body::Data { device, content } => (device, Some(content)),
            block::Body::Zeroes { device } => (device, None),
            block::Body::Progress => {
                self.bulk.progress(record.percent());
                return Ok(());
            }
            block::Body::None => return Ok(()),
        };
        let disk = self.disks.iter_mut().find(|disk| disk.place.id == device);
        let Some(disk) = disk else { return Err(self.no_place(device, at)) };
        let is_again =
            disk.write(record.offset(), content, (at, self.options.allow_backing), observer)?;
        self.bulk.chunk(is_again, disk.is_last(record.offset()));
        let sum = |bytes: &dyn Fn(&Disk<'_>) -> u64| {
            self.disks.iter().fold(0u64, |sum, disk| sum.saturating_add(bytes(disk)))
        };
        let total = sum(&|disk| disk.size);
        let done = sum(&|disk| disk.counts.data.saturating_add(disk.counts.zero));
        observer.progress(done.min(total), total);
        Ok(())
    }

    /// QEMU 7.2 goes over to its end when little is left to send, and does not count what it has
    /// not read yet: it may leave out most of a disk and call that completed.
    fn check_content(&self, at: u64) -> Result<()> {
        let is_all_seen = self.bulk.is_over(self.disks.len());
        if !self.has_content || (self.options.shared_base && is_all_seen) {
            return Ok(());
        }
        let missing = |disk: &&Disk<'_>| match disk.missing_chunks() {
            Some((missing, _)) => missing > 0,
            None => !is_all_seen,
        };
        let Some(disk) = self.disks.iter().find(missing) else { return self.check_size(at) };
        let (missing, all) = disk.missing_chunks().unwrap_or((0, disk.size.div_ceil(1 << 20)));
        let why = if self.options.shared_base {
            "and nothing shows that QEMU had looked through all of its disks by then"
        } else {
            "with `migrate -i` say --shared-base: that what is not allocated is there already"
        };
        Err(Error::Misfit {
            subject: Subject { disk: disk.place.id.clone(), bitmap: None },
            offset: at,
            reason: format!(
                "the stream ends, and {missing} of {all} MiB did not come. QEMU 7.2 ends too early \
                 where its bandwidth times downtime-limit is more than 1 MiB: set downtime-limit \
                 to 0 until `info migrate` shows at most 1 MiB of each disk as remaining; {why}"
            ),
            blame: Blame::PeerBehaviour,
        })
    }

    /// All chunks came, of which the last may have been cut.
    fn check_size(&self, at: u64) -> Result<()> {
        let [disk] = self.disks.as_slice() else { return Ok(()) };
        if self.bulk.fits(disk.size) {
            return Ok(());
        }
        Err(Error::Misfit {
            subject: Subject { disk: disk.place.id.clone(), bitmap: None },
            offset: at,
            reason: format!(
                "the image has {} bytes, and the source's disk another size, as what it told of \
                 its progress shows (unless it migrates with -i: then say --shared-base)",
                disk.size
            ),
            blame: Blame::Bytes,
        })
    }

    /// A disk that was named gets something: its content, its bitmaps, or, above a base, the word
    /// that nothing is missing.
    fn check_arrived(&self, at: u64) -> Result<()> {
        let is_named_only = |disk: &&Disk<'_>| {
            disk.counts == Counts::default() && !self.bitmaps.has_any(&disk.place.id)
        };
        let disk = self.disks.iter().find(is_named_only);
        let Some(disk) = disk.filter(|_| !self.has_content) else { return Ok(()) };
        let hint = if self.bitmaps.has_section {
            "the source has no bitmap of a disk of this name, and sends no contents"
        } else {
            "switch on the capability dirty-bitmaps at the source for its bitmaps; QEMU up to 9.0 \
             sends its content with `migrate -b`"
        };
        Err(Error::Misfit {
            subject: Subject { disk: disk.place.id.clone(), bitmap: None },
            offset: at,
            reason: format!("the stream ends, and nothing came for this disk: {hint}"),
            blame: Blame::PeerBehaviour,
        })
    }

    fn no_place(&self, device: &str, at: u64) -> Error {
        let known: Vec<_> = self.disks.iter().map(|disk| format!("{:?}", disk.place.id)).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        let what = if device.is_empty() {
            "the source's disk has no name (-blockdev alone gives none; -drive id=NAME does)"
        } else {
            "its content has no place"
        };
        let is_untouched = self.is_untouched();
        Error::Misfit {
            subject: Subject { disk: device.to_owned(), bitmap: None },
            offset: at,
            reason: format!("{what}; the disks named with --disk are {known}"),
            blame: if is_untouched { Blame::WouldLose } else { Blame::Device },
        }
    }

    fn dirty_bitmap(
        &mut self,
        record: &dirty_bitmap::Record<'_>,
        decoder: &Decoder,
        at: u64,
    ) -> Result<()> {
        let names = decoder.dirty_bitmap();
        let is_untouched = self.is_untouched();
        self.bitmaps.record(record, (names.device(), names.bitmap()), at, is_untouched)
    }

    fn is_untouched(&self) -> bool {
        self.disks.iter().all(|disk| matches!(disk.body, Body::Untouched))
    }

    /// A device's state says nowhere how long it is. Where what comes after one makes no sense, its
    /// end is what is in doubt.
    fn explain(&self, error: Malformed) -> Error {
        match &self.dropped.last {
            Some((name, begun)) => Error::Unsupported {
                offset: error.offset,
                reason: format!(
                    "where the state of section {name:?}, which began at offset {begun}, ends \
                     cannot be told: {error}"
                ),
            },
            None => error.into(),
        }
    }
}

/// Whether a section of this name is one that is not understood here.
fn is_device(name: &str) -> bool {
    ![ram::SECTION, block::SECTION, dirty_bitmap::SECTION].contains(&name)
}

impl Dropped {
    fn section(&mut self, name: Option<SectionName<'_>>, at: u64) {
        let device = name.filter(|section| is_device(section.name));
        if let Some(SectionName { name, .. }) = device
            && self.devices.len() < MAX_DEVICES
        {
            self.devices.push(name.to_owned());
        }
        self.last = device.map(|section| (section.name.to_owned(), at));
    }

    fn tell(&self, observer: &dyn Observer, is_kept: bool) {
        if self.memory > 0 {
            let bytes = self.memory;
            observer.warning(&format!("{bytes} bytes of guest memory were received and dropped"));
        }
        if !self.devices.is_empty() && !is_kept {
            let listed: Vec<_> = self.devices.iter().take(MAX_LISTED).cloned().collect();
            let more = if self.devices.len() > MAX_LISTED { ", …" } else { "" };
            observer.warning(&format!(
                "the state of {} devices was received and dropped: {}{more}",
                self.devices.len(),
                listed.join(", ")
            ));
        }
    }
}
