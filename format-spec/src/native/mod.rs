//! The native dialect: hello, record framing and the records of its sections. SPEC 4.1, 5 and 6.

pub mod block;
pub mod frame;
pub mod hello;
