//! The fuzz bodies as plain tests: over their corpus and mutations of it, with a fixed seed and
//! with the run's. Memory is limited, so that an allocation by a length from the input shows.

use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use bitferry_tests::fuzz::{TARGETS, mutate};
use bitferry_tests::random::{Random, seed};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Address space of this process. A check of an image counts references in 132 MiB; no input may
/// cost more than such bounds.
const MEMORY_BYTES: u64 = 3 << 30;
/// Longest time for one input, with room for a busy machine.
const ONE_INPUT: Duration = Duration::from_secs(20);

fn run(name: &str) {
    let limit = Rlimit { current: Some(MEMORY_BYTES), maximum: Some(MEMORY_BYTES) };
    setrlimit(Resource::As, limit).expect("a lower limit");
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    let corpus = (target.corpus)();
    let try_one = |input: &[u8], what: &str| {
        let begun = Instant::now();
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| (target.run)(input)));
        let taken = begun.elapsed();
        if result.is_err() || taken > ONE_INPUT {
            let path = std::env::temp_dir().join(format!("bitferry-fuzz-{name}"));
            std::fs::write(&path, input).expect("the input is kept");
            panic!("{name}: {what} in {taken:?}; the input is in {}", path.display());
        }
    };
    for (n, input) in corpus.iter().enumerate() {
        try_one(input, &format!("corpus {n}"));
    }
    for seed in [1, seed()] {
        let mut random = Random::new(seed, name);
        for n in 0..target.tries {
            let input = mutate(random.pick::<Vec<u8>>(&corpus), &mut random);
            try_one(&input, &format!("BITFERRY_SEED={seed}, try {n}"));
        }
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn every_body_is_run_here_and_by_libfuzzer() {
            let here = [$(stringify!($name)),*];
            let known: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(known, here);
            let fuzz = bitferry_tests::bitferry::workspace().join("fuzz");
            let manifest = std::fs::read_to_string(fuzz.join("Cargo.toml")).expect("a manifest");
            for name in here {
                let wrapper = fuzz.join("fuzz_targets").join(format!("{name}.rs"));
                let text = std::fs::read_to_string(&wrapper).expect("a wrapper");
                assert!(text.contains(&format!("fuzz::{name}(")), "{}", wrapper.display());
                assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
            }
        }
    };
}

targets! {
    qcow2_image qcow2_bitmaps qcow2_check qcow2_edit qemu_stream load_script reply_stream
    native_hello native_records native_body
}
