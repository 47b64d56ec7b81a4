//! See `bitferry_tests::fuzz`.
#![no_main]

use bitferry_tests::fuzz;

libfuzzer_sys::fuzz_target!(
    init: fuzz::seed_corpus("native_hello"),
    |data: &[u8]| fuzz::native_hello(data)
);
