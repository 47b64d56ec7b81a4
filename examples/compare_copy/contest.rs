//! Contenders that do the same work in turn, and the table of what they took.

use std::fs;
use std::path::Path;

use crate::Result;
use crate::peak::Taken;

/// Does the work once: from a source path to a destination path that does not exist.
type Work = Box<dyn Fn(&Path, &Path) -> Result<Taken>>;

/// What a contender is to the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// One of us, or somebody for scale.
    Runner,
    /// Ratios are taken of it, or of the fastest where several have the same heading.
    Peer(&'static str),
    /// What the machine gives to a loop that does nothing else.
    Limit(&'static str),
}

impl Role {
    fn heading(self) -> Option<&'static str> {
        match self {
            Self::Runner => None,
            Self::Peer(heading) | Self::Limit(heading) => Some(heading),
        }
    }
}

/// Who does the work.
pub(crate) struct Contender {
    name: String,
    role: Role,
    work: Work,
    taken: Vec<Taken>,
}

impl Contender {
    pub(crate) fn new(
        name: impl Into<String>,
        role: Role,
        work: impl Fn(&Path, &Path) -> Result<Taken> + 'static,
    ) -> Self {
        Self { name: name.into(), role, work: Box::new(work), taken: Vec::new() }
    }

    fn milliseconds(&self) -> Vec<f64> {
        self.taken.iter().map(|t| t.time.as_secs_f64() * 1e3).collect()
    }
}

/// Lets everybody work in each round, the order turning, and prints the table.
pub(crate) fn run(
    contenders: &mut [Contender],
    (source, destination): (&Path, &Path),
    rounds: usize,
) -> Result<()> {
    let count = contenders.len();
    for round in 0..=rounds {
        for position in 0..count {
            let Some(contender) = contenders.get_mut((position + round) % count) else { continue };
            let taken = (contender.work)(source, destination)
                .map_err(|error| format!("{}: {error}", contender.name))?;
            if destination.exists() {
                fs::remove_file(destination)?;
            }
            // The first round warms memory and caches.
            if round > 0 {
                contender.taken.push(taken);
            }
        }
    }
    print_table(contenders);
    Ok(())
}

fn print_table(contenders: &[Contender]) {
    let mut headings: Vec<_> = contenders.iter().filter_map(|c| c.role.heading()).collect();
    headings.dedup();
    print!("{:52} {:>7} {:>9}", "", "ms", "peak MiB");
    headings.iter().for_each(|heading| print!(" {:>12}", format!("x {heading}")));
    println!();
    for contender in contenders {
        let times = contender.milliseconds();
        let peak = contender.taken.iter().filter_map(|t| t.peak_kib).max();
        let peak = peak.map_or(String::new(), |kib| format!("{:.1}", kib as f64 / 1024.0));
        print!("{:52} {:7.0} {peak:>9}", contender.name, median(&times));
        for heading in &headings {
            print!(" {:>12}", ratio(&times, &per_round(contenders, heading)));
        }
        println!();
    }
    println!("\nratios are medians of the ratios within each round\n");
}

/// The fastest under a heading, round by round.
fn per_round(contenders: &[Contender], heading: &str) -> Vec<f64> {
    let mut best: Vec<f64> = Vec::new();
    for contender in contenders.iter().filter(|c| c.role.heading() == Some(heading)) {
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
