//! See `bitferry_tests::fuzz`.
#![no_main]

use bitferry_tests::fuzz;

libfuzzer_sys::fuzz_target!(
    init: fuzz::seed_corpus("qcow2_edit"),
    |data: &[u8]| fuzz::qcow2_edit(data)
);
