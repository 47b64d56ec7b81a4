//! JSON as tests use it.

use serde_json::Value;

use crate::process::Output;

/// Parses one document; panics with the text if it is none.
#[track_caller]
pub fn document(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|e| panic!("not one JSON document ({e}):\n{text}"))
}

/// Parses newline-delimited documents.
#[track_caller]
pub fn lines(text: &str) -> Vec<Value> {
    text.lines().map(document).collect()
}

/// The last line of an event stream: the summary.
#[track_caller]
pub fn summary(output: &Output) -> Value {
    lines(&output.text()).pop().unwrap_or_else(|| panic!("no summary\n{output}"))
}
