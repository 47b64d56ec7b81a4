//! The other end of the socket: one command, one answer.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use mig_core::stream::Error as Stream;
use serde_json::{Map, Value, json};

use crate::{Error, Result};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest answer, in bytes.
const MAX_ANSWER: u64 = 1 << 20;

/// Asks whoever listens at `socket`, ours or a QEMU, and hears its answer. What it answers with an
/// error is an error here, in its own words.
pub fn ask(socket: &Path, command: &str, arguments: Map<String, Value>) -> Result<Value> {
    let failed =
        |action| move |source: io::Error| Error::File { action, path: socket.to_owned(), source };
    let stream = UnixStream::connect(socket).map_err(failed("connect to"))?;
    let set = stream.set_read_timeout(Some(PATIENCE));
    set.and_then(|()| stream.set_write_timeout(Some(PATIENCE))).map_err(failed("use"))?;
    let request = json!({ "execute": command, "arguments": arguments, "id": "bitferry" });
    (&stream).write_all(format!("{request}\n").as_bytes()).map_err(failed("write to"))?;
    let mut answers = BufReader::new(&stream).take(MAX_ANSWER);
    loop {
        let mut line = String::new();
        if answers.read_line(&mut line).map_err(failed("read from"))? == 0 {
            let gone = io::Error::new(io::ErrorKind::UnexpectedEof, "it closed without an answer");
            return Err(failed("read from")(gone));
        }
        let Ok(Value::Object(mut answer)) = serde_json::from_str(&line) else {
            let reason = "its answer is not a JSON object".to_owned();
            return Err(Stream::protocol(0, 0, reason).into());
        };
        if let Some(value) = answer.remove("return") {
            return Ok(value);
        }
        if let Some(error) = answer.get("error") {
            let of = |key| error.get(key).and_then(Value::as_str);
            return Err(Error::Control {
                command: command.to_owned(),
                is_unknown: of("class") == Some("CommandNotFound"),
                text: of("desc").unwrap_or("no reason given").to_owned(),
            });
        }
        // A greeting or an event.
    }
}

/// An argument's value as the command line has it: JSON where it is JSON, else a string.
pub fn value_of(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned()))
}
