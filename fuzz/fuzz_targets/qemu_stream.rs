//! See `bitferry_tests::fuzz`.
#![no_main]

use bitferry_tests::fuzz;

libfuzzer_sys::fuzz_target!(
    init: fuzz::seed_corpus("qemu_stream"),
    |data: &[u8]| fuzz::qemu_stream(data)
);
