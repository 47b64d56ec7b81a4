//! Whoever is no migration's first connection is told why, and nobody waits for that.

use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use mig_core::stream;
use mig_core::transport::Connection;

use crate::incoming::turn_away;

/// Strangers that are told at the same time, at most; further ones are hung up without a word.
const MAX_FAREWELLS: usize = 8;

/// Connections that are being told no.
#[derive(Default)]
pub(super) struct Farewells(Arc<()>);

impl Farewells {
    /// Tells it on a thread of its own, which ends in bounded time.
    pub(super) fn say(
        &self,
        connection: Connection,
        error: &stream::Error,
    ) -> Option<JoinHandle<()>> {
        if Arc::strong_count(&self.0) > MAX_FAREWELLS {
            connection.line.hang_up();
            return None;
        }
        let one = self.0.clone();
        let (blame, text) = (error.blame(), crate::report::error_chain(error));
        let tell = move || {
            turn_away(connection, blame, text);
            drop(one);
        };
        // Where there is no thread to be had, it is dropped, which closes it.
        Builder::new().spawn(tell).ok()
    }
}
