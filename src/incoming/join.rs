//! Further connections of the source.

use std::collections::VecDeque;
use std::io::{self, Cursor, Read as _};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Scope;
use std::time::{Duration, Instant};

use format_spec::Blame;
use format_spec::native::hello::{Choice, Hello, Join, Refusal};
use mig_core::limits::MAX_WAITING_JOINS;
use mig_core::stream::{Error, Result, StreamReader};
use mig_core::transport::{Connection, HangUp, Listen};

use super::accept::refuse_and_linger;
use super::read::Session;
use crate::Timing;

/// How often it is looked whether the session has ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// The same once nobody is waited for: what comes then is told no, and the end waits for nothing.
const BUSY_INTERVAL: Duration = Duration::from_millis(50);
/// What another source is told.
const BUSY: &str = "a migration is being received here: try again when it is over";
/// How long the newest of too many connections waits for one of the others to say its hello.
const GRACE: Duration = Duration::from_millis(50);

/// Accepts connections until all that were granted have joined, and reads them on threads of their
/// own. Strangers are closed; they cost a thread for as long as a hello may take, and no more than
/// a few at a time: the oldest makes room for the newest. Where there may be strangers, other
/// sources are told no until the session is over; the same one, which lost its connections before
/// this side noticed, waits until then. Where there are none, a connection that does not join is
/// one of those that were granted, and no other will come for it.
pub(super) fn accept_all<'s>(
    scope: &'s Scope<'s, '_>,
    session: &'s Session,
    listen: &'s dyn Listen,
    choice: &'s Choice,
    timing: &'s Timing,
) {
    let waiting: Arc<Waiting> = Arc::default();
    let begun = Instant::now();
    while !session.is_over() {
        let has_all = session.has_all();
        if has_all && !listen.has_strangers() {
            break;
        }
        let left = timing.join.saturating_sub(begun.elapsed());
        // Strangers do not make it longer.
        if left.is_zero() && !has_all {
            waiting.hang_up();
            session.fail(Error::Connect(io::ErrorKind::TimedOut.into()));
            return;
        }
        // In slices, so that an end of the session is seen.
        let slice = if has_all { BUSY_INTERVAL } else { left.min(LOOK_INTERVAL) };
        match listen.accept(Some(slice)) {
            Ok(connection) => {
                waiting.enter(connection.line.clone(), listen.has_strangers());
                let waiting = waiting.clone();
                scope.spawn(move || {
                    let said = (session, choice, timing);
                    match greet(connection, said, &waiting) {
                        Ok(Some(mut reader)) => session.read_data(&mut reader),
                        Err(error) if !listen.has_strangers() => session.fail_before_commit(error),
                        Ok(None) | Err(_) => {}
                    }
                });
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {}
            // Nobody else can come; who is here goes on.
            Err(_) if session.has_all() || session.is_over() => break,
            Err(e) => {
                waiting.hang_up();
                session.fail(Error::Connect(e));
                return;
            }
        }
        if listen.has_strangers() {
            waiting.expire(timing.hello);
        }
    }
    if let Some(again) = waiting.end() {
        listen.put_back(again);
    }
}

/// Hears the hello of a connection; `None` for another source's, and an error for what is no
/// source's at all.
fn greet(
    connection: Connection,
    (session, choice, timing): (&Session, &Choice, &Timing),
    waiting: &Waiting,
) -> Result<Option<StreamReader>> {
    let Connection { reader, writer, line, peer } = connection;
    let mut reader = StreamReader::new(reader, 0);
    let hello = reader.hello();
    if let Ok(Hello::Offer(offer)) = hello {
        if offer.session == choice.session {
            let hello = Cursor::new(Hello::Offer(offer).encode());
            let reader = Box::new(hello.chain(reader.into_rest()));
            waiting.keep(Connection { reader, writer, line, peer });
            return Ok(None);
        }
        tracing::warn!("{peer} offers another migration, and was refused");
        let refusal = Refusal { blame: Blame::Transport, text: BUSY.to_owned() };
        refuse_and_linger((&mut reader, writer), &*line, refusal, timing.linger);
        waiting.leave(&line);
        return Ok(None);
    }
    waiting.leave(&line);
    match admit(hello, session, choice, &line) {
        Ok(join) => {
            // Its reverse direction stays silent, and open.
            session.keep(writer);
            reader.set_channel(join.channel);
            Ok(Some(reader))
        }
        Err(error) => {
            tracing::warn!(%error, "a connection from {peer} was closed");
            line.hang_up();
            Err(error)
        }
    }
}

fn admit(
    hello: Result<Hello>,
    session: &Session,
    choice: &Choice,
    line: &Arc<dyn HangUp>,
) -> Result<Join> {
    let Hello::Join(join) = hello? else {
        return Err(Error::protocol(0, 0, "a further connection opens with JOIN"));
    };
    if join.session != choice.session || join.ticket != choice.ticket {
        return Err(Error::protocol(0, 0, "JOIN of another session"));
    }
    session.join(join.channel, line)?;
    Ok(join)
}

/// Connections whose hello is awaited, oldest first.
#[derive(Default)]
struct Waiting {
    lines: Mutex<VecDeque<(Instant, Arc<dyn HangUp>)>>,
    left: Condvar,
    /// The last one of the same session, which is for the next attempt.
    again: Mutex<Option<Connection>>,
}

impl Waiting {
    /// Adds a connection. Where there are too many, the oldest has to go, unless one says its hello
    /// at once: a source that was overtaken by many strangers gets through.
    fn enter(&self, line: Arc<dyn HangUp>, has_strangers: bool) {
        let full = |lines: &mut VecDeque<_>| has_strangers && lines.len() >= MAX_WAITING_JOINS;
        let waited = self.left.wait_timeout_while(self.lock(), GRACE, full);
        let mut lines = waited.unwrap_or_else(PoisonError::into_inner).0;
        if full(&mut lines)
            && let Some((_, oldest)) = lines.pop_front()
        {
            oldest.hang_up();
        }
        lines.push_back((Instant::now(), line));
    }

    fn leave(&self, line: &Arc<dyn HangUp>) {
        self.lock().retain(|(_, waiting)| !Arc::ptr_eq(waiting, line));
        self.left.notify_all();
    }

    /// Ends those that were silent for too long.
    fn expire(&self, limit: Duration) {
        self.lock().retain(|(since, line)| {
            let is_patient = since.elapsed() < limit;
            if !is_patient {
                line.hang_up();
            }
            is_patient
        });
    }

    /// Keeps a connection for the next attempt, in the place of an older one.
    fn keep(&self, connection: Connection) {
        let line = connection.line.clone();
        let older = self.again().replace(connection);
        if let Some(older) = older {
            older.line.hang_up();
        }
        self.leave(&line);
    }

    /// Nobody is waited for any more. Answers what was kept; who has just come may still say that
    /// it is that.
    fn end(&self) -> Option<Connection> {
        let is_waited_for = |lines: &mut VecDeque<_>| !lines.is_empty();
        drop(self.left.wait_timeout_while(self.lock(), GRACE, is_waited_for));
        self.hang_up();
        self.again().take()
    }

    fn again(&self) -> MutexGuard<'_, Option<Connection>> {
        self.again.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hang_up(&self) {
        self.lock().drain(..).for_each(|(_, line)| line.hang_up());
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(Instant, Arc<dyn HangUp>)>> {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
