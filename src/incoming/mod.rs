//! The destination's side of a migration in the native dialect.

mod place;

pub use place::{Destination, Place, Sealed, SessionId, Wanted};
