//! Blocking shells around the codecs of the native dialect: hello, container, records, compression
//! (SPEC 4 and 5). What is decided is decided in `format-spec`; here are buffers and system calls.

mod arrival;
mod breaker;
mod compress;
mod error;
mod reader;
mod writer;

pub use arrival::{Arrival, Buffer, Buffers};
pub use breaker::Breaker;
pub use compress::{Compression, Method, Packer, Unpacker};
pub use error::{Error, HandlerError, Result};
pub use reader::{Element, StreamReader};
pub use writer::StreamWriter;
