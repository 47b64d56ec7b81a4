//! The native dialect: hello, record framing, the records of its sections, of its return path and
//! of the files beside a destination. SPEC 4.1, 5, 6 and 8 to 10.

pub mod answer;
pub mod block;
pub mod control;
pub mod frame;
pub mod hello;
pub mod journal;
pub mod session;
pub mod units;
