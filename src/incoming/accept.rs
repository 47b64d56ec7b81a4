//! The first connection: hear the offer, answer it.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use format_spec::Blame;
use format_spec::native::hello::{
    Choice, Hello, MULTI_CHANNEL, Offer, RESUME, Refusal, SessionState, ZLIB, ZSTD,
};
use mig_core::heart::within;
use mig_core::section::Fate;
use mig_core::stream::{Error, Method, Result, StreamReader, StreamWriter};
use mig_core::transport::{Connection, HangUp, Nature};

use super::back::Back;
use super::{Destination, IncomingOptions};
use crate::Timing;

/// A source that was answered.
pub(super) struct Accepted {
    pub(super) reader: StreamReader,
    pub(super) line: Arc<dyn HangUp>,
    pub(super) back: Back,
    pub(super) offer: Offer,
    pub(super) choice: Choice,
}

/// Hears the hello on a fresh connection and agrees to it, or refuses and says why.
pub(super) fn accept(
    main: Connection,
    nature: Nature,
    destination: &dyn Destination,
    options: &IncomingOptions<'_>,
) -> Result<Accepted> {
    let line = main.line;
    let mut reader = StreamReader::new(main.reader, 0);
    let mut writer = StreamWriter::new(main.writer, 0);
    let offered = reader.hello_within(options.timing.hello, &*line);
    let answered = offered.and_then(|hello| choose(hello, nature, destination, options));
    let (offer, choice) = match answered {
        Ok(answered) => answered,
        Err(error) => {
            if is_worth_an_answer(&error) {
                let text = crate::report::error_chain(&error);
                refuse(Refusal { blame: error.blame(), text }, &mut writer);
                within(options.timing.linger, &*line, || reader.drain(u64::MAX));
            }
            line.hang_up();
            return Err(error);
        }
    };
    let back = if offer.is_one_way {
        Back::new(None)
    } else {
        let said = writer.hello(&Hello::Choice(choice.clone()));
        said.inspect_err(|_| destination.abort(Fate::Kept))?;
        Back::new(Some(writer))
    };
    if let Some(method) = Method::chosen(choice.features) {
        reader.decompress(method);
    }
    Ok(Accepted { reader, line, back, offer, choice })
}

/// Ends a connection that nothing will come of, before its hello was heard, and tells why.
pub(crate) fn turn_away(main: Connection, blame: Blame, text: String) {
    let Connection { reader, writer, line, .. } = main;
    let mut reader = StreamReader::new(reader, 0);
    let linger = Timing::default().linger;
    refuse_and_linger((&mut reader, writer), &*line, Refusal { blame, text }, linger);
}

/// Says why nothing will come of a connection, stays until that was read, and ends it.
pub(super) fn refuse_and_linger(
    (reader, writer): (&mut StreamReader, Box<dyn Write + Send>),
    line: &dyn HangUp,
    refusal: Refusal,
    linger: Duration,
) {
    refuse(refusal, &mut StreamWriter::new(writer, 0));
    within(linger, line, || reader.drain(u64::MAX));
    line.hang_up();
}

/// Whatever comes of it: the first error is the one to report.
fn refuse(refusal: Refusal, writer: &mut StreamWriter) {
    if let Err(error) = writer.hello(&Hello::Refusal(refusal)) {
        tracing::debug!(%error, "the source cannot be told");
    }
}

/// A peer that speaks another version is told ours; one that speaks something else would not
/// understand.
pub(crate) fn is_worth_an_answer(error: &Error) -> bool {
    match error {
        Error::Malformed { source, .. } => source.field != "hello magic",
        // A further connection is not answered on.
        Error::Connection { .. } | Error::Stray => false,
        _ => true,
    }
}

fn choose(
    hello: Hello,
    nature: Nature,
    destination: &dyn Destination,
    options: &IncomingOptions<'_>,
) -> Result<(Offer, Choice)> {
    let offer = match hello {
        Hello::Offer(offer) => offer,
        Hello::Join(_) => return Err(Error::Stray),
        _ => return Err(Error::protocol(0, 0, "a migration opens with an offer")),
    };
    if nature.is_one_way && !offer.is_one_way {
        let reason = "the source waits for answers, and there is no way back to it";
        return Err(Error::protocol(0, 0, reason));
    }
    let (features, channels) = agree(&offer, nature, options);
    let missing = offer.required & !features;
    if missing != 0 {
        let reason = format!("the source requires features {missing:#x}, which are not here");
        return Err(Error::handler(Blame::PeerFeatures, reason));
    }
    let mut state = destination.begin(offer.session)?;
    if offer.is_one_way && matches!(state, SessionState::Resumable | SessionState::Ready) {
        // It cannot be told what is there, and sends everything.
        destination.forget()?;
        state = SessionState::Fresh;
    }
    let random = crate::random_id();
    let ticket = random.map_err(|e| Error::handler(Blame::Device, e))?;
    let (session, program) = (offer.session, crate::session::program());
    Ok((offer, Choice { session, ticket, state, features, channels, program }))
}

/// Features and connections that both sides have.
fn agree(offer: &Offer, nature: Nature, options: &IncomingOptions<'_>) -> (u64, u16) {
    let mut supported = ZSTD | ZLIB;
    let max = nature.max_connections.min(options.max_channels).max(1);
    if max > 1 {
        supported |= MULTI_CHANNEL;
    }
    if options.resumes {
        supported |= RESUME;
    }
    let mut features = offer.features & supported;
    // One connection has one compression stream.
    if features & ZSTD != 0 {
        features &= !ZLIB;
    }
    let channels = if features & MULTI_CHANNEL == 0 { 1 } else { offer.channels.min(max) };
    (features, channels)
}
