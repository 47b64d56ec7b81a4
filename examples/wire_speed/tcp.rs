//! TCP connections to this host.

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mig_core::transport::{Connection, Dial, HangUp, Listen, Nature};

const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// Both ends of TCP connections over the loopback interface.
pub(crate) struct Loopback(TcpListener);

impl Loopback {
    pub(crate) fn new() -> io::Result<Self> {
        TcpListener::bind(("127.0.0.1", 0)).map(Self)
    }

    /// A connected pair.
    pub(crate) fn pair(&self) -> io::Result<(TcpStream, TcpStream)> {
        let ours = TcpStream::connect(self.0.local_addr()?)?;
        Ok((ours, self.0.accept()?.0))
    }
}

struct Line(TcpStream);

impl HangUp for Line {
    fn hang_up(&self) {
        // It may have ended already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

fn connection(stream: TcpStream) -> io::Result<Connection> {
    stream.set_nodelay(true)?;
    Ok(Connection {
        reader: Box::new(stream.try_clone()?),
        writer: Box::new(stream.try_clone()?),
        peer: stream.peer_addr()?.to_string(),
        line: Arc::new(Line(stream)),
    })
}

const NATURE: Nature = Nature { is_one_way: false, max_connections: 16 };

impl Dial for Loopback {
    fn nature(&self) -> Nature {
        NATURE
    }

    fn dial(&self) -> io::Result<Connection> {
        connection(TcpStream::connect(self.0.local_addr()?)?)
    }
}

impl Listen for Loopback {
    fn nature(&self) -> Nature {
        NATURE
    }

    fn accept(&self, limit: Option<Duration>) -> io::Result<Connection> {
        let begun = Instant::now();
        self.0.set_nonblocking(true)?;
        loop {
            match self.0.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return connection(stream);
                }
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(e),
                Err(_) if limit.is_some_and(|limit| begun.elapsed() >= limit) => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(_) => std::thread::sleep(POLL_INTERVAL),
            }
        }
    }

    fn close(&self) {}
}
