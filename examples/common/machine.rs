//! A QEMU that is driven over QMP.

use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bitferry::qemu::qmp;
use serde_json::{Value, json};

use crate::Result;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a state is asked for. Part of what is measured, for every contender.
const PAUSE: Duration = Duration::from_millis(2);

/// A stock QEMU, found through the environment.
#[derive(Debug, Clone)]
pub(crate) struct Program(OsString);

impl Program {
    /// The one that `variable` names, `BITFERRY_QEMU_72` or `BITFERRY_QEMU_10`.
    pub(crate) fn named_by(variable: &str) -> Option<Self> {
        std::env::var_os(variable).map(Self)
    }
}

/// A QEMU process. Dropping it kills it.
pub(crate) struct Machine {
    child: Child,
    monitor: qmp::Client,
    _dir: tempfile::TempDir,
}

#[allow(dead_code, reason = "not every example needs all of it")]
impl Machine {
    /// A stopped machine with `image` as its disk `disk0`, seen by its guest. `waits`: for a
    /// migration.
    pub(crate) fn start(
        program: &Program,
        image: &Path,
        format: &str,
        waits: bool,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("machine-").tempdir()?;
        let socket = dir.path().join("qmp");
        let mut command = Command::new(&program.0);
        command.args(["-nodefaults", "-display", "none", "-monitor", "none", "-S"]);
        command.args(["-machine", "pc", "-m", "16", "-device", "virtio-blk-pci,drive=disk0"]);
        command.arg("-drive");
        command.arg(format!("if=none,id=disk0,format={format},file={}", shown(image)));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        if waits {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let end = Instant::now() + PATIENCE;
        let monitor = loop {
            match qmp::Client::connect(&socket, PATIENCE, qmp::Hurry::default()) {
                Ok(monitor) => break monitor,
                Err(error) if Instant::now() > end || child.try_wait()?.is_some() => {
                    let _ = child.kill();
                    child.wait()?;
                    return Err(error.into());
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        Ok(Self { child, monitor, _dir: dir })
    }

    /// Runs a command.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.monitor.execute(command, arguments)?)
    }

    /// Has `qemu-io` commands done on the disk, as if the guest wrote.
    pub(crate) fn io(&mut self, command: &str) -> Result<()> {
        let line = format!("qemu-io disk0 \"{command}\"");
        self.ask("human-monitor-command", json!({ "command-line": line }))?;
        Ok(())
    }

    /// Listens for a migration at a free port, and answers where.
    pub(crate) fn listen(&mut self) -> Result<String> {
        self.ask("migrate-incoming", json!({ "uri": "tcp:127.0.0.1:0" }))?;
        let answer = self.ask("query-migrate", json!({}))?;
        match answer["socket-address"][0]["port"].as_str() {
            Some(port) => Ok(format!("tcp:127.0.0.1:{port}")),
            None => Err(format!("no port in {answer}").into()),
        }
    }

    /// Asks again and again until an answer is the one waited for.
    pub(crate) fn until(
        &mut self,
        question: &str,
        is_so: impl Fn(&Value) -> Result<bool>,
    ) -> Result<Value> {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.ask(question, json!({}))?;
            if is_so(&answer)? {
                return Ok(answer);
            }
            if Instant::now() > end {
                return Err(format!("{question}: no end: {answer}").into());
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Waits for the end of the migration, and answers what QEMU says about it.
    pub(crate) fn completes(&mut self) -> Result<Value> {
        self.until("query-migrate", |answer| match answer["status"].as_str() {
            Some("failed" | "cancelled") => Err(answer.to_string().into()),
            status => Ok(status == Some("completed")),
        })
    }

    /// Lets the other side's mirror write to the disk, and answers at which port.
    pub(crate) fn export(&mut self, name: &str) -> Result<String> {
        // The port is free when it is looked at; a collision fails the run, it does not spoil it.
        let listener = std::net::TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port().to_string();
        drop(listener);
        let address = json!({ "type": "inet", "data": { "host": "127.0.0.1", "port": port } });
        self.ask("nbd-server-start", json!({ "addr": address }))?;
        let disks = self.ask("query-block", json!({}))?;
        let node = &disks[0]["inserted"]["node-name"];
        let export = json!({
            "type": "nbd", "id": "export", "name": name, "node-name": node, "writable": true
        });
        self.ask("block-export-add", export)?;
        Ok(port)
    }

    /// Begins to mirror the disk to what is exported at a port of this host.
    pub(crate) fn mirror(&mut self, name: &str, port: &str) -> Result<()> {
        let server = json!({ "type": "inet", "host": "127.0.0.1", "port": port });
        let target =
            json!({ "driver": "nbd", "node-name": "target", "server": server, "export": name });
        self.ask("blockdev-add", target)?;
        let job = json!({ "job-id": "job", "device": "disk0", "target": "target", "sync": "full" });
        self.ask("blockdev-mirror", job)?;
        Ok(())
    }

    /// Ends the mirror, when nothing is written to the disk any more.
    pub(crate) fn end_mirror(&mut self) -> Result<()> {
        self.ask("block-job-cancel", json!({ "device": "job" }))?;
        self.until("query-block-jobs", |jobs| Ok(jobs.as_array().is_some_and(Vec::is_empty)))?;
        Ok(())
    }

    /// Ends it in an orderly way: what is to be written is.
    pub(crate) fn quit(mut self) -> Result<()> {
        self.ask("quit", json!({}))?;
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

fn shown(image: &Path) -> String {
    // A comma would end QEMU's option.
    image.display().to_string().replace(',', ",,")
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
