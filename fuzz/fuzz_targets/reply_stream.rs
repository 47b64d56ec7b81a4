//! See `bitferry_tests::fuzz`.
#![no_main]

use bitferry_tests::fuzz;

libfuzzer_sys::fuzz_target!(
    init: fuzz::seed_corpus("reply_stream"),
    |data: &[u8]| fuzz::reply_stream(data)
);
