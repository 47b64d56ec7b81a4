//! The same between two QEMUs. The guest's writes are made through the monitor.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::machine::{Machine, Program};
use crate::{Places, Result, Taken, WRITE_BYTES, wait_for_turn};

/// How long a part of a move may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// The pause that is allowed.
const LIMIT: Duration = Duration::from_millis(300);

/// A source whose guest writes.
struct Source {
    machine: Machine,
    places: Places,
    due: Instant,
    writes: u64,
}

impl Source {
    fn new(mut machine: Machine, mib: u64) -> Result<Self> {
        machine.ask("cont", json!({}))?;
        Ok(Self { machine, places: Places::new(mib), due: Instant::now(), writes: 0 })
    }

    /// Writes on until an answer is the one waited for.
    fn write_until(
        &mut self,
        question: &str,
        is_so: impl Fn(&Value) -> Result<bool>,
    ) -> Result<()> {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            let answer = self.machine.ask(question, json!({}))?;
            if is_so(&answer)? {
                return Ok(());
            }
            wait_for_turn(&mut self.due);
            self.writes += 1;
            let (value, at) = (self.writes % 256, self.places.next());
            self.machine.io(&format!("write -P {value} {at} {WRITE_BYTES}"))?;
        }
        let last = self.machine.ask(question, json!({}))?;
        Err(format!("{question}: no end: {last}").into())
    }

    /// Migrates until the guest stands and its disks can still be written.
    fn migrate(&mut self, arguments: Value, first_limit: Duration) -> Result<()> {
        // What libvirt has it do, so that nothing writes to a disk that was handed over.
        capability(&mut self.machine, "pause-before-switchover")?;
        self.limit(first_limit)?;
        self.machine.ask("migrate", arguments)?;
        self.write_until("query-migrate", |answer| {
            let count = |name: &str| answer["disk"][name].as_u64();
            let stands = answer["status"] == "pre-switchover";
            Ok(match (count("transferred"), count("total")) {
                _ if stands => true,
                (Some(transferred), Some(total)) => transferred >= total && total > 0,
                _ => first_limit == LIMIT,
            })
        })?;
        self.limit(LIMIT)?;
        self.write_until("query-migrate", |answer| match answer["status"].as_str() {
            Some("failed" | "cancelled" | "completed") => Err(answer.to_string().into()),
            status => Ok(status == Some("pre-switchover")),
        })
    }

    fn limit(&mut self, downtime: Duration) -> Result<()> {
        let downtime = u64::try_from(downtime.as_millis())?;
        let limits = json!({ "max-bandwidth": 16_000_000_000u64, "downtime-limit": downtime });
        self.machine.ask("migrate-set-parameters", limits)?;
        Ok(())
    }

    /// Lets it switch over, and answers what it says about its pause.
    fn switch_over(&mut self) -> Result<Duration> {
        self.machine.ask("migrate-continue", json!({ "state": "pre-switchover" }))?;
        let end = self.machine.completes()?;
        Ok(Duration::from_millis(end["downtime"].as_u64().ok_or("no downtime")?))
    }
}

pub(crate) fn mirror(program: &Program, source: &Path, target: &Path, mib: u64) -> Result<Taken> {
    let mut to = destination(program, target, mib)?;
    let mut from = Source::new(Machine::start(program, source, "qcow2", false)?, mib)?;
    let port = to.export("disk0")?;
    let uri = to.listen()?;
    let begun = Instant::now();
    from.machine.mirror("disk0", &port)?;
    from.write_until("query-block-jobs", |jobs| match jobs[0]["ready"].as_bool() {
        Some(is_ready) => Ok(is_ready),
        None => Err(format!("the mirror failed: {jobs}").into()),
    })?;
    capability(&mut from.machine, "dirty-bitmaps")?;
    capability(&mut to, "dirty-bitmaps")?;
    from.migrate(json!({ "uri": uri }), LIMIT)?;
    from.machine.end_mirror()?;
    to.ask("nbd-server-stop", json!({}))?;
    ended(from, to, begun)
}

pub(crate) fn blk(program: &Program, source: &Path, target: &Path, mib: u64) -> Result<Taken> {
    let mut to = destination(program, target, mib)?;
    let mut from = Source::new(Machine::start(program, source, "qcow2", false)?, mib)?;
    let uri = to.listen()?;
    let begun = Instant::now();
    // Version 7.2 switches over before all is sent where the limit lets a whole block through.
    from.migrate(json!({ "uri": uri, "blk": true }), Duration::ZERO)?;
    ended(from, to, begun)
}

/// Lets the source switch over, and waits until the destination has it.
fn ended(mut from: Source, mut to: Machine, begun: Instant) -> Result<Taken> {
    let pause = from.switch_over()?;
    to.completes()?;
    let total = begun.elapsed();
    to.quit()?;
    let writes = from.writes;
    from.machine.quit()?;
    Ok(Taken { pause, total, writes })
}

fn destination(program: &Program, target: &Path, mib: u64) -> Result<Machine> {
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]).arg(target).arg(format!("{mib}M"));
    if !create.status()?.success() {
        return Err("qemu-img create failed".into());
    }
    Machine::start(program, target, "qcow2", true)
}

fn capability(machine: &mut Machine, name: &str) -> Result<()> {
    let capability = json!({ "capability": name, "state": true });
    machine.ask("migrate-set-capabilities", json!({ "capabilities": [capability] }))?;
    Ok(())
}
