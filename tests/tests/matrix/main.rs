//! Images of every kind, made by QEMU's tools, copied in every direction, each result held against
//! QEMU: content, structure, bitmaps as two QEMUs load them, and whether the next backup is still
//! incremental. The full product would take days: each commit draws its own sample, in which every
//! pair of choices is met as far as possible.

mod case;
mod judge;
mod source;

use std::process::ExitCode;

use bitferry_tests::random::{Random, seed};
use libtest_mimic::{Arguments, Failed, Trial};

/// Cases per run; `BITFERRY_MATRIX` asks for more.
const CASES: usize = 80;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let asked = std::env::var("BITFERRY_MATRIX").ok().and_then(|n| n.parse().ok());
    let is_skipped = !judge::has_peers();
    let seed = seed();
    if !arguments.list {
        println!(
            "matrix: repeat with BITFERRY_SEED={seed} cargo test -p bitferry-tests --test matrix"
        );
    }
    let mut random = Random::new(seed, "matrix");
    let cases = case::sample(&mut random, asked.unwrap_or(CASES));
    let trials = cases.into_iter().enumerate().map(|(n, case)| {
        let name = format!("{n:03} {}", case.name());
        let mut random = Random::new(seed, &name);
        let trial = Trial::test(name, move || -> Result<(), Failed> {
            judge::judge(&case, &mut random);
            Ok(())
        });
        trial.with_ignored_flag(is_skipped)
    });
    libtest_mimic::run(&arguments, trials.collect()).exit_code()
}
