//! See `bitferry_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| bitferry_tests::fuzz::native_body(data));
