//! New images held against a shadow copy and against QEMU's own tools.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs, unreachable_pub)]

mod faults;
mod matrix;
mod meaning;
mod peer;
mod reopen;
mod workload;
