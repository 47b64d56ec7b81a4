//! See `bitferry_tests::fuzz`.
#![no_main]

use bitferry_tests::fuzz;

libfuzzer_sys::fuzz_target!(
    init: fuzz::seed_corpus("load_script"),
    |data: &[u8]| fuzz::load_script(data)
);
