//! The qcow2 structures as bytes: decode, encode, and the arithmetic between offsets and tables.
//! Pure; whoever calls has read the bytes and has bounded them.
#![cfg_attr(not(test), deny(clippy::arithmetic_side_effects))]

pub mod bitmap_directory;
pub mod entry;
pub mod extension;
pub mod geometry;
pub mod header;
pub mod refcount;
pub mod snapshot;
pub mod units;
