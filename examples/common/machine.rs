//! A QEMU 7.2 with one disk, driven over QMP.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bitferry::qemu::qmp;
use serde_json::{Value, json};

use crate::Result;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often a state is asked for. Part of what is measured, for both contenders.
const PAUSE: Duration = Duration::from_millis(2);

/// A QEMU process. Dropping it kills it.
pub(crate) struct Machine {
    child: Child,
    monitor: qmp::Client,
    dir: tempfile::TempDir,
}

impl Machine {
    /// A machine that does not run, with `image` as its raw disk `disk0`.
    pub(crate) fn start(image: &Path, waits: bool) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("compare_blk-").tempdir()?;
        let socket = dir.path().join("qmp");
        let program = std::env::var_os("BITFERRY_QEMU_72")
            .ok_or("BITFERRY_QEMU_72 must name a qemu-system-x86_64 of version 7.2")?;
        let mut command = Command::new(program);
        command.args(["-nodefaults", "-display", "none", "-monitor", "none", "-S"]);
        command.args(["-machine", "pc", "-m", "16", "-device", "virtio-blk-pci,drive=disk0"]);
        command.arg("-drive");
        command.arg(format!("if=none,id=disk0,format=raw,file={}", image.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        if waits {
            command.args(["-incoming", "defer"]);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn()?;
        let end = Instant::now() + PATIENCE;
        let monitor = loop {
            match qmp::Client::connect(&socket, PATIENCE) {
                Ok(monitor) => break monitor,
                Err(error) if Instant::now() > end || child.try_wait()?.is_some() => {
                    let _ = child.kill();
                    child.wait()?;
                    return Err(error.into());
                }
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        Ok(Self { child, monitor, dir })
    }

    /// Runs a command.
    pub(crate) fn ask(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.monitor.execute(command, arguments)?)
    }

    /// Listens for a migration, and answers where.
    pub(crate) fn listen(&mut self) -> Result<PathBuf> {
        let socket = self.dir.path().join("mig");
        self.ask("migrate-incoming", json!({ "uri": format!("unix:{}", socket.display()) }))?;
        Ok(socket)
    }

    /// Waits for the end of the migration.
    pub(crate) fn completes(&mut self) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.ask("query-migrate", json!({}))?;
            match answer["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => return Err(answer.to_string().into()),
                _ if Instant::now() > end => return Err(format!("no end: {answer}").into()),
                _ => std::thread::sleep(PAUSE),
            }
        }
    }

    /// Ends it in an orderly way.
    pub(crate) fn quit(mut self) -> Result<()> {
        self.ask("quit", json!({}))?;
        let end = Instant::now() + PATIENCE;
        while self.child.try_wait()?.is_none() && Instant::now() < end {
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
