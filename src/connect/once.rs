//! Transports that carry a single connection.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use mig_core::transport::{Connection, Dial, Listen, Nature};

use super::error::{Error, Result};

type Make = Box<dyn FnOnce() -> Result<Connection> + Send>;

/// A connection that is made when it is first asked for.
pub(super) struct Once {
    uri: String,
    is_one_way: bool,
    make: Mutex<Option<Make>>,
}

impl Once {
    pub(super) fn new(
        uri: String,
        is_one_way: bool,
        make: impl FnOnce() -> Result<Connection> + Send + 'static,
    ) -> Self {
        Self { uri, is_one_way, make: Mutex::new(Some(Box::new(make))) }
    }

    fn take(&self) -> io::Result<Connection> {
        let make = self.make.lock().unwrap_or_else(PoisonError::into_inner).take();
        let make = make.ok_or_else(|| Error::OnlyOnce { uri: self.uri.clone() })?;
        Ok(make()?)
    }
}

impl Dial for Once {
    fn nature(&self) -> Nature {
        Nature { is_one_way: self.is_one_way, max_connections: 1 }
    }

    fn dial(&self) -> io::Result<Connection> {
        self.take()
    }
}

impl Listen for Once {
    fn nature(&self) -> Nature {
        Dial::nature(self)
    }

    fn accept(&self, _: Option<Duration>) -> io::Result<Connection> {
        self.take()
    }

    fn close(&self) {
        drop(self.make.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}
