//! A QEMU that waits for a migration, and connections to it.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mig_core::transport::{Connection, HangUp};
use serde_json::{Value, json};

use crate::peer::Peer;
use crate::process::Output;
use crate::qmp::Qemu;
use crate::scratch::Scratch;

/// How long a connection may be silent, and a migration may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// A QEMU started with `-incoming defer -S`, listening on a Unix socket. Dropping it kills it.
#[derive(Debug)]
pub struct Destination {
    /// The QEMU.
    pub qemu: Qemu,
    dir: Scratch,
}

impl Destination {
    /// A machine without devices, with a `-drive if=none,id=ID` for each image: enough for bitmaps.
    pub fn of_bitmaps(peer: Peer, drives: &[(&str, &Path)]) -> Self {
        let mut args: Vec<String> = vec!["-machine".into(), "none".into()];
        args.extend(drives.iter().flat_map(|(id, image)| drive(id, image)));
        Self::start(peer, args)
    }

    /// A PC whose disks are the images, which block migration writes to.
    pub fn of_disks(peer: Peer, drives: &[(&str, &Path)]) -> Self {
        let mut args: Vec<String> = ["-machine", "pc", "-m", "16"].map(str::to_owned).into();
        for (id, image) in drives {
            args.extend(drive(id, image));
            args.extend(["-device".to_owned(), format!("virtio-blk-pci,drive={id}")]);
        }
        Self::start(peer, args)
    }

    /// Starts QEMU with `args`. It does not listen yet.
    pub fn start(peer: Peer, args: impl IntoIterator<Item = String>) -> Self {
        let dir = Scratch::new();
        let monitor = format!("unix:{},server=on,wait=off", dir.path("qmp").display());
        let own = ["-incoming".to_owned(), "defer".to_owned(), "-qmp".to_owned(), monitor];
        let qemu = Qemu::start(peer, args.into_iter().chain(own));
        Self { qemu, dir }
    }

    /// A second monitor, for the program under test.
    pub fn monitor(&self) -> PathBuf {
        self.dir.path("qmp")
    }

    /// Listens and connects. `extra` are further arguments of `migrate-incoming`.
    pub fn connect_with(&mut self, extra: Value) -> Connection {
        let socket = self.dir.path("mig");
        let mut arguments = json!({ "uri": format!("unix:{}", socket.display()) });
        if let (Some(arguments), Some(extra)) = (arguments.as_object_mut(), extra.as_object()) {
            arguments.extend(extra.clone());
        }
        self.qemu.ok("migrate-incoming", arguments);
        connection(UnixStream::connect(socket).expect("QEMU listens"))
    }

    /// Listens and connects.
    pub fn connect(&mut self) -> Connection {
        self.connect_with(json!({}))
    }

    /// Waits until the migration has ended, and panics unless it was a success.
    #[track_caller]
    pub fn completes(&mut self) {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.qemu.ok("query-migrate", json!({}));
            match answer["status"].as_str() {
                Some("completed") => return,
                Some("failed" | "cancelled") => panic!("{answer}"),
                _ => assert!(Instant::now() < end, "{answer}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Lets the machine run, with which a QEMU 10 takes over its disks.
    pub fn cont(&mut self) {
        self.qemu.ok("cont", json!({}));
    }

    /// Ends QEMU in an orderly way.
    pub fn quit(self) -> Output {
        self.qemu.quit()
    }
}

/// `-drive` without a device.
fn drive(id: &str, image: &Path) -> [String; 2] {
    let format = if image.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
    let image = image.display();
    ["-drive".to_owned(), format!("if=none,id={id},format={format},file={image}")]
}

/// A connected socket as a connection, with a limit on silence.
pub fn connection(stream: UnixStream) -> Connection {
    connection_with(stream, PATIENCE)
}

/// [`connection`] with a limit of one's own.
pub fn connection_with(stream: UnixStream, patience: Duration) -> Connection {
    let clone = |stream: &UnixStream| -> io::Result<UnixStream> {
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        stream.try_clone()
    };
    let (reader, writer) = (clone(&stream).expect("socket"), clone(&stream).expect("socket"));
    Connection {
        reader: Box::new(reader),
        writer: Box::new(writer),
        line: Arc::new(Line(stream)),
        peer: "unix socket".to_owned(),
    }
}

struct Line(UnixStream);

impl HangUp for Line {
    fn hang_up(&self) {
        // It may be gone already.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}
