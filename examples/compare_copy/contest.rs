//! The same image, copied by everybody.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use bitferry::Silent;
use bitferry::copy::{self, CopyOptions};

use crate::peak::{self, Taken};
use crate::{Result, image};

/// Bytes that the bare loop moves at a time, as our engine does.
const LOOP_BYTES: u64 = 1 << 20;

/// Makes the commands that copy from one path to another.
type Commands = Box<dyn Fn(&Path, &Path) -> Result<Vec<Command>>>;

/// Who copies. Commands of one contender run one after the other.
struct Contender {
    name: &'static str,
    commands: Commands,
    is_qemu_convert: bool,
    is_bare_loop: bool,
    taken: Vec<Taken>,
}

impl Contender {
    fn new(
        name: &'static str,
        commands: impl Fn(&Path, &Path) -> Result<Vec<Command>> + 'static,
    ) -> Self {
        let commands = Box::new(commands);
        Self { name, commands, is_qemu_convert: false, is_bare_loop: false, taken: Vec::new() }
    }

    fn milliseconds(&self) -> Vec<f64> {
        self.taken.iter().map(|t| t.time.as_secs_f64() * 1e3).collect()
    }
}

fn ours(kind: &'static str) -> impl Fn(&Path, &Path) -> Result<Vec<Command>> {
    move |source, destination| Ok(vec![peak::child(&[kind], &[source, destination])?])
}

fn convert(source: &Path, destination: &Path, further: &[&str]) -> Command {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "--bitmaps", "-O", "qcow2"]).args(further);
    command.args([source, destination]);
    command
}

fn contenders() -> Vec<Contender> {
    let mut all = vec![
        Contender::new("bitferry copy", ours("proof")),
        Contender::new("bitferry copy --no-verify", ours("no-proof")),
    ];
    if Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success()) {
        let plain = |s: &Path, d: &Path| Ok(vec![convert(s, d, &[])]);
        let wide = |s: &Path, d: &Path| Ok(vec![convert(s, d, &["-m", "8", "-W"])]);
        let compared = |s: &Path, d: &Path| {
            let mut compare = Command::new("qemu-img");
            compare.arg("compare").args([s, d]);
            Ok(vec![convert(s, d, &["-m", "8", "-W"]), compare])
        };
        let is_qemu_convert = true;
        let name = "qemu-img convert --bitmaps";
        all.push(Contender { is_qemu_convert, ..Contender::new(name, plain) });
        let name = "qemu-img convert --bitmaps -m 8 -W";
        all.push(Contender { is_qemu_convert, ..Contender::new(name, wide) });
        all.push(Contender::new("the same, then qemu-img compare", compared));
    } else {
        println!("qemu-img is not here: left out");
    }
    all.push(Contender::new("cp (no bitmap is looked at)", |source, destination| {
        let mut command = Command::new("cp");
        command.arg("--reflink=never").args([source, destination]);
        Ok(vec![command])
    }));
    let bare = Contender::new("bare loop: read and write, 2 threads", ours("bare"));
    all.push(Contender { is_bare_loop: true, ..bare });
    all
}

/// Copies in turn and prints the table.
pub(crate) fn run(scratch: &Path, mib: u64, rounds: usize) -> Result<()> {
    let (source, destination) = (scratch.join("source.qcow2"), scratch.join("destination.qcow2"));
    image::make(&source, mib << 20, mib)?;
    let mut contenders = contenders();
    println!("{mib} MiB of noise in a qcow2 image with three bitmaps, {rounds} rounds, warm\n");
    for round in 0..=rounds {
        let count = contenders.len();
        for position in 0..count {
            let Some(contender) = contenders.get_mut((position + round) % count) else { continue };
            let mut taken = Taken { time: std::time::Duration::ZERO, peak_kib: None };
            for mut command in (contender.commands)(&source, &destination)? {
                let one = peak::run(&mut command)?;
                taken.time += one.time;
                taken.peak_kib = taken.peak_kib.max(one.peak_kib);
            }
            fs::remove_file(&destination)?;
            // The first round warms memory and caches.
            if round > 0 {
                contender.taken.push(taken);
            }
        }
    }
    print_table(&contenders);
    fs::remove_file(&source)?;
    Ok(())
}

fn print_table(contenders: &[Contender]) {
    let best = per_round(contenders, |c| c.is_qemu_convert);
    let bare = per_round(contenders, |c| c.is_bare_loop);
    println!("{:38} {:>7} {:>14} {:>12} {:>9}", "", "ms", "x best qemu", "x bare loop", "peak MiB");
    for contender in contenders {
        let times = contender.milliseconds();
        let peak = contender.taken.iter().filter_map(|t| t.peak_kib).max();
        let peak = peak.map_or(String::new(), |kib| format!("{:.1}", kib as f64 / 1024.0));
        println!(
            "{:38} {:7.0} {:>14} {:>12} {:>9}",
            contender.name,
            median(&times),
            ratio(&times, &best),
            ratio(&times, &bare),
            peak
        );
    }
    println!("\nratios are medians of the ratios within each round\n");
}

/// The fastest of the chosen contenders, round by round.
fn per_round(contenders: &[Contender], chosen: impl Fn(&Contender) -> bool) -> Vec<f64> {
    let mut best: Vec<f64> = Vec::new();
    for contender in contenders.iter().filter(|c| chosen(c)) {
        let times = contender.milliseconds();
        best.resize(times.len(), f64::INFINITY);
        best.iter_mut().zip(times).for_each(|(b, t)| *b = b.min(t));
    }
    best
}

fn ratio(times: &[f64], others: &[f64]) -> String {
    if others.is_empty() {
        return "-".into();
    }
    let ratios: Vec<f64> = times.iter().zip(others).map(|(t, o)| t / o).collect();
    format!("{:.2}", median(&ratios))
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// One of our own contenders, in its own process.
pub(crate) fn child(kind: &str, source: &Path, destination: &Path) -> Result<()> {
    match kind {
        "bare" => bare_loop(source, destination)?,
        _ => {
            let options = CopyOptions {
                source: source.to_owned(),
                destination: destination.to_owned(),
                no_verify: kind == "no-proof",
                ..CopyOptions::default()
            };
            let report = copy::run(&options, &Silent)?;
            if bitferry::exit_status(&report) != 0 {
                return Err(format!("{report:?}").into());
            }
        }
    }
    peak::tell()
}

/// What the machine gives to two threads that read and write and do nothing else.
fn bare_loop(source: &Path, destination: &Path) -> Result<()> {
    let (source, destination) = (File::open(source)?, File::create_new(destination)?);
    let len = source.metadata()?.len();
    destination.set_len(len)?;
    let next = AtomicU64::new(0);
    let work = || -> std::io::Result<()> {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let at = next.fetch_add(LOOP_BYTES, Ordering::Relaxed);
            if at >= len {
                return Ok(());
            }
            let piece = usize::try_from(LOOP_BYTES.min(len - at)).unwrap_or(buffer.len());
            let buffer = buffer.get_mut(..piece).unwrap_or_default();
            source.read_exact_at(buffer, at)?;
            destination.write_all_at(buffer, at)?;
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        let mine = work();
        other.join().unwrap_or(Ok(())).and(mine)
    })?;
    Ok(())
}
