//! A QEMU of our own, driven over QMP.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use serde_json::{Value, json};

use crate::peer::Peer;
use crate::process::{Output, Run, Running};
use crate::scratch::Scratch;

const PATIENCE: Duration = Duration::from_secs(60);

/// A QEMU process with its QMP connection. Dropping it kills it.
#[derive(Debug)]
pub struct Qemu {
    child: Option<Running>,
    qmp: BufReader<UnixStream>,
    events: Vec<Value>,
    _dir: Scratch,
}

impl Qemu {
    /// Starts `peer` with no devices and no guest running, plus `args`. Call after
    /// [`crate::require`].
    pub fn start<A: AsRef<std::ffi::OsStr>>(peer: Peer, args: impl IntoIterator<Item = A>) -> Self {
        let program = peer.find().unwrap_or_else(|| panic!("{} is not here", peer.name()));
        let run = Run::new(program).words("-nodefaults -display none -monitor none -S");
        Self::launch(run.args(args))
    }

    /// Like [`Qemu::start`], on the machine `none`: for block nodes only.
    pub fn block_only(peer: Peer) -> Self {
        Self::start(peer, ["-machine", "none"])
    }

    fn launch(run: Run) -> Self {
        let dir = Scratch::new();
        let socket = dir.path("qmp");
        // We listen and QEMU connects, so that there is nothing to wait for by guessing.
        let listener = UnixListener::bind(&socket).expect("socket");
        let chardev = format!("socket,id=qmp,path={}", socket.display());
        let run = run.arg("-chardev").arg(chardev).words("-mon chardev=qmp,mode=control");
        let child = run.patience(Duration::from_secs(600)).spawn();
        let timeout = rustix::event::Timespec::try_from(PATIENCE).expect("a short time");
        let ready = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&timeout));
        if ready.expect("poll") == 0 || child.ends_within(Duration::ZERO) {
            panic!("QEMU did not connect\n{}", child.kill());
        }
        let (stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let qmp = BufReader::new(stream);
        let mut qemu = Self { child: Some(child), qmp, events: Vec::new(), _dir: dir };
        qemu.next();
        qemu.ok("qmp_capabilities", json!({}));
        qemu
    }

    /// Runs a command. `Err` is QEMU's own error object.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, Value> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        self.qmp.get_mut().write_all(line.as_bytes()).expect("QMP");
        loop {
            let mut answer = self.next();
            if let Some(error) = answer.get_mut("error") {
                return Err(error.take());
            }
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
            self.events.push(answer);
        }
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&mut self, command: &str, arguments: Value) -> Value {
        let result = self.execute(command, arguments.clone());
        result.unwrap_or_else(|e| panic!("QMP {command} {arguments}: {e}"))
    }

    /// Waits for an event of this name and answers it with its data.
    #[track_caller]
    pub fn event(&mut self, name: &str) -> Value {
        if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
            return self.events.remove(at);
        }
        loop {
            let event = self.next();
            if event["event"] == name {
                return event;
            }
            self.events.push(event);
        }
    }

    /// Opens an image as the node `node`, read-only unless `is_writable`.
    pub fn open(
        &mut self,
        node: &str,
        path: &std::path::Path,
        is_writable: bool,
    ) -> Result<(), Value> {
        let file = json!({ "driver": "file", "filename": path });
        let node = json!({
            "driver": "qcow2", "node-name": node, "read-only": !is_writable, "file": file,
        });
        self.execute("blockdev-add", node).map(drop)
    }

    /// Closes a node.
    pub fn close(&mut self, node: &str) {
        self.ok("blockdev-del", json!({ "node-name": node }));
    }

    /// The bitmaps of a node as QEMU describes them.
    pub fn bitmaps(&mut self, node: &str) -> Vec<Value> {
        let nodes = self.ok("query-named-block-nodes", json!({ "flat": true }));
        let nodes = nodes.as_array().expect("a list");
        let found = nodes.iter().find(|n| n["node-name"] == node).expect("the node");
        found["dirty-bitmaps"].as_array().cloned().unwrap_or_default()
    }

    /// QEMU's own hash of a bitmap's bits.
    #[track_caller]
    pub fn bitmap_hash(&mut self, node: &str, name: &str) -> String {
        let arguments = json!({ "node": node, "name": name });
        let answer = self.ok("x-debug-block-dirty-bitmap-sha256", arguments);
        answer["sha256"].as_str().expect("a hash").to_owned()
    }

    /// Runs a `qemu-io` command on a node; panics if it says anything but success.
    #[track_caller]
    pub fn io(&mut self, node: &str, command: &str) {
        let line = format!("qemu-io {node} \"{command}\"");
        let said = self.ok("human-monitor-command", json!({ "command-line": line }));
        let said = said.as_str().unwrap_or_default();
        let is_error = ["failed", "rror", "nvalid", "not found"].iter().any(|w| said.contains(w));
        assert!(!is_error, "{line}: {said}");
    }

    /// Ends QEMU in an orderly way: images are closed, bitmaps stored.
    pub fn quit(mut self) -> Output {
        self.ok("quit", json!({}));
        let child = self.child.take().expect("running");
        if child.ends_within(PATIENCE) { child.wait() } else { child.kill() }
    }

    /// Kills QEMU as a crash would.
    pub fn kill(mut self) -> Output {
        self.child.take().expect("running").kill()
    }

    fn next(&mut self) -> Value {
        let mut line = String::new();
        let read = self.qmp.read_line(&mut line);
        if !matches!(read, Ok(1..)) {
            let end = self.child.take().map(|c| c.kill().to_string()).unwrap_or_default();
            panic!("QMP went away ({read:?})\n{end}");
        }
        crate::json::document(&line)
    }
}
