//! Connect and negotiate: hello, answer, further connections.

use std::io::{self, Read};
use std::sync::Arc;

use block_mig::Monitor;
use format_spec::Blame;
use format_spec::native::hello::{
    Choice, Hello, Join, MAX_CHANNELS, MULTI_CHANNEL, Offer, RESUME, Refusal, SessionState,
};
use mig_core::channels::Channels;
use mig_core::stream::{Breaker, Error, Method, Result, StreamReader, StreamWriter};
use mig_core::transport::{Connection, Dial, HangUp};

use super::OutgoingOptions;

/// All connections, hellos said.
pub(super) struct Connected {
    pub(super) channels: Channels,
    pub(super) breaker: Arc<Breaker>,
    /// Where answers come from; `None` on a one-way stream.
    pub(super) answers: Option<StreamReader>,
    /// What the destination chose; on a one-way stream the least.
    pub(super) choice: Choice,
    /// Reverse directions that stay silent. Dropping one may end its connection.
    pub(super) silent: Vec<Box<dyn Read + Send>>,
}

/// Makes all connections to a destination that agrees.
pub(super) fn connect(
    dial: &dyn Dial,
    options: &OutgoingOptions<'_>,
    breaker: &Arc<Breaker>,
) -> Result<Connected> {
    let nature = dial.nature();
    let offer = offer(options, nature.is_one_way, nature.max_connections);
    let main = dial_one(dial, breaker, options.monitor)?;
    let mut writers = vec![StreamWriter::new(main.writer, 0)];
    say(&mut writers, &Hello::Offer(offer.clone()))?;
    let mut silent = Vec::new();
    let (answers, choice) = if nature.is_one_way {
        silent.push(main.reader);
        (None, unanswered(&offer))
    } else {
        let mut reader = StreamReader::new(main.reader, 0);
        let choice = hear(&mut reader, &offer, &*main.line, options)?;
        (Some(reader), choice)
    };
    let joins = if choice.state == SessionState::Committed { 1 } else { choice.channels };
    for channel in 1..joins {
        let connection = dial_one(dial, breaker, options.monitor)?;
        silent.push(connection.reader);
        writers.push(StreamWriter::new(connection.writer, channel));
        let (session, ticket) = (choice.session, choice.ticket);
        say(&mut writers, &Hello::Join(Join { session, ticket, channel }))?;
    }
    let channels = Channels::new(writers, options.meter.clone(), breaker.clone());
    let chosen = Method::chosen(choice.features);
    if let Some(compression) = options.compression.filter(|c| Some(c.method) == chosen) {
        channels.compress(compression)?;
    }
    Ok(Connected { channels, breaker: breaker.clone(), answers, choice, silent })
}

fn offer(options: &OutgoingOptions<'_>, is_one_way: bool, max_connections: u16) -> Offer {
    let channels = options.channels.clamp(1, MAX_CHANNELS).min(max_connections.max(1));
    let mut features = options.compression.map_or(0, |c| c.method.feature());
    features |= if channels > 1 { MULTI_CHANNEL } else { 0 };
    features |= if options.resumes { RESUME } else { 0 };
    Offer {
        session: options.session,
        is_one_way,
        features: if is_one_way { 0 } else { features },
        required: 0,
        channels: if is_one_way { 1 } else { channels },
        program: crate::session::program(),
    }
}

/// What goes without saying on a stream that nobody answers on.
fn unanswered(offer: &Offer) -> Choice {
    Choice {
        session: offer.session,
        ticket: [0; 16],
        state: SessionState::Fresh,
        features: 0,
        channels: 1,
        program: String::new(),
    }
}

fn dial_one(dial: &dyn Dial, breaker: &Breaker, monitor: &dyn Monitor) -> Result<Connection> {
    if monitor.is_cancelled() {
        return Err(Error::Interrupted);
    }
    let connection = dial.dial().map_err(Error::Connect)?;
    breaker.add(connection.line.clone());
    Ok(connection)
}

fn say(writers: &mut [StreamWriter], hello: &Hello) -> Result<()> {
    writers.last_mut().map_or(Ok(()), |writer| writer.hello(hello))
}

/// Hears the answer to an offer, in bounded time.
fn hear(
    reader: &mut StreamReader,
    offer: &Offer,
    line: &dyn HangUp,
    options: &OutgoingOptions<'_>,
) -> Result<Choice> {
    match reader.hello_within(options.timing.hello, line)? {
        Hello::Choice(choice) => {
            let accepted = offer.accepts(&choice);
            accepted.map_err(|source| Error::Malformed { channel: 0, source })?;
            Ok(choice)
        }
        // Somebody else has the connection that would be ours: it may be over soon.
        Hello::Refusal(Refusal { blame: Blame::Transport, text }) => {
            let busy =
                io::Error::new(io::ErrorKind::ResourceBusy, format!("the peer says: {text}"));
            Err(Error::Connect(busy))
        }
        Hello::Refusal(refusal) => Err(Error::Peer { blame: refusal.blame, text: refusal.text }),
        Hello::Offer(_) | Hello::Join(_) => {
            Err(Error::protocol(0, 0, "it answered the hello with a hello of its own"))
        }
    }
}
