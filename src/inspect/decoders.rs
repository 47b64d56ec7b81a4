//! The decoders of all kinds of streams as one.

use format_spec::Malformed;
use format_spec::qemu::stream::{Decoder, Item};
use format_spec::qemu::{Step, multifd, ram, reply};

use super::Kind;
use super::native::{Native, Sections};

/// A record of any stream.
#[derive(Debug)]
pub(super) enum Seen<'a> {
    /// Of a main connection.
    Main(Item<'a>),
    /// Of a connection between two of ours.
    Native(Native<'a>),
    /// Of a multifd channel.
    Channel(multifd::Item<'a>),
    /// Of a preempt channel.
    Preempt(ram::Record<'a>),
    /// Of a return path.
    Reply(reply::Reply<'a>),
    /// So many bytes without inner form, and the first of them.
    Raw { len: u64, first: &'a [u8] },
}

impl<'a> Seen<'a> {
    /// The bytes of what has no inner form.
    pub(super) fn raw(&self) -> Option<&'a [u8]> {
        match self {
            Self::Main(Item::Bytes(bytes))
            | Self::Channel(multifd::Item::Payload(bytes))
            | Self::Reply(reply::Reply::Bits(bytes)) => Some(bytes),
            _ => None,
        }
    }
}

/// A decoder for one kind of stream.
#[derive(Debug)]
pub(super) enum Decoders {
    Main(Box<Decoder>, Sections),
    Channel(multifd::Decoder),
    Preempt(ram::Decoder, u64),
    Reply(reply::Decoder),
}

impl Decoders {
    /// For a stream that begins with `first`.
    pub(super) fn new(kind: Kind, first: &[u8]) -> Self {
        match kind {
            // Neither magic nor configuration: it goes on after a cut.
            Kind::Main if first.starts_with(&[8]) => {
                Self::Main(Box::new(Decoder::new().recovered()), Sections::default())
            }
            Kind::Main => Self::Main(Box::default(), Sections::default()),
            Kind::Channel => Self::Channel(multifd::Decoder::default()),
            Kind::Preempt => Self::Preempt(ram::Decoder::default(), 0),
            Kind::ReturnPath => Self::Reply(reply::Decoder::default()),
        }
    }

    /// Bytes taken so far.
    pub(super) fn offset(&self) -> u64 {
        match self {
            Self::Main(decoder, _) => decoder.offset(),
            Self::Channel(decoder) => decoder.offset(),
            Self::Preempt(_, offset) => *offset,
            Self::Reply(decoder) => decoder.offset(),
        }
    }

    /// Whether the stream may end here.
    pub(super) fn may_end(&self) -> bool {
        match self {
            Self::Main(decoder, _) => decoder.may_end(),
            Self::Channel(decoder) => decoder.may_end(),
            Self::Preempt(..) => true,
            Self::Reply(decoder) => decoder.may_end(),
        }
    }

    /// Takes the next record.
    pub(super) fn next<'a>(
        &mut self,
        input: &'a [u8],
        is_whole: bool,
    ) -> Result<Step<Seen<'a>>, Malformed> {
        Ok(match self {
            Self::Main(decoder, sections) => match decoder.next(input, is_whole)? {
                Step::Item(Item::Native(record), len) => {
                    Step::Item(Seen::Native(sections.read(record)?), len)
                }
                step => wrap(step, |item| {
                    sections.follow(&item);
                    Seen::Main(item)
                }),
            },
            Self::Channel(decoder) => wrap(decoder.next(input)?, Seen::Channel),
            Self::Preempt(decoder, offset) => {
                let step = wrap(decoder.next(input, *offset)?, Seen::Preempt);
                if let Step::Item(_, len) = &step {
                    *offset = offset.saturating_add(*len as u64);
                }
                step
            }
            Self::Reply(decoder) => wrap(decoder.next(input)?, Seen::Reply),
        })
    }
}

fn wrap<'a, T>(step: Step<T>, seen: impl FnOnce(T) -> Seen<'a>) -> Step<Seen<'a>> {
    match step {
        Step::Item(item, len) => Step::Item(seen(item), len),
        Step::Need(needed) => Step::Need(needed),
    }
}
