//! See `bitferry_tests::fuzz`.
#![no_main]

use bitferry_tests::fuzz;

libfuzzer_sys::fuzz_target!(
    init: fuzz::seed_corpus("qcow2_image"),
    |data: &[u8]| fuzz::qcow2_image(data)
);
