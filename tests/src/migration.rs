//! A migration between two processes of ours.

use serde_json::Value;

use crate::process::{Output, Running};
use crate::{Exit, Run, Scratch, bitferry, json};

/// A command of ours, by its words, in the test's directory.
pub fn command(scratch: &Scratch, words: &str) -> Run {
    bitferry().dir(scratch.dir()).words(words)
}

/// Where a `receive --json` says that it listens.
#[track_caller]
pub fn listening(receiver: &Running) -> String {
    receiver.wait_for(false, |line| {
        let event: Value = serde_json::from_str(line).ok()?;
        (event["event"] == "listening").then(|| event["uri"].as_str().expect("text").to_owned())
    })
}

/// Runs `send` and `receive` with these options to their ends. The URI is the receiver's: the
/// source connects where that says it listens.
#[track_caller]
pub fn both(scratch: &Scratch, send: &str, receive: &str) -> (Output, Output) {
    let receiver = command(scratch, &format!("receive --json {receive}")).spawn();
    let uri = listening(&receiver);
    let sent = command(scratch, &format!("send --json {send}")).arg(uri).output();
    (sent.expect_no_crash(), receiver.wait().expect_no_crash())
}

/// [`both`], which have to succeed: the source's summary and the destination's.
#[track_caller]
pub fn done(scratch: &Scratch, send: &str, receive: &str) -> (Value, Value) {
    let (sent, received) = both(scratch, send, receive);
    let sent = json::summary(&sent.expect_exit(Exit::Done));
    (sent, json::summary(&received.expect_exit(Exit::Done)))
}
