//! Fuzz bodies: any bytes are a value or an error, in bounded time and memory.
//!
//! Each body takes bytes and panics when a promise is broken. They run in two ways: `fuzz/` wraps
//! them for libFuzzer, and `tests/tests/fuzz.rs` runs them as plain tests over mutations of the
//! [`corpus`](Target::corpus), with a fixed seed and with the commit's.

mod edits;
mod images;
mod mutate;
mod streams;

pub use edits::qcow2_edit;
pub use images::{qcow2_bitmaps, qcow2_check, qcow2_image};
pub use mutate::mutate;
pub use streams::{
    load_script, native_body, native_hello, native_records, qemu_stream, reply_stream,
};

/// A body and inputs that it takes as well formed, to start from.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// Its name, that of the body and of the file in `fuzz/fuzz_targets`.
    pub name: &'static str,
    /// The body.
    pub run: fn(&[u8]),
    /// Well-formed inputs.
    pub corpus: fn() -> Vec<Vec<u8>>,
    /// How many inputs a plain run tries for each of the two seeds.
    pub tries: u32,
}

/// All bodies.
pub const TARGETS: &[Target] = &[
    Target { name: "qcow2_image", run: qcow2_image, corpus: images::corpus, tries: 15_000 },
    Target { name: "qcow2_bitmaps", run: qcow2_bitmaps, corpus: images::corpus, tries: 15_000 },
    Target { name: "qcow2_check", run: qcow2_check, corpus: images::corpus, tries: 2000 },
    Target { name: "qcow2_edit", run: qcow2_edit, corpus: edits::corpus, tries: 10_000 },
    Target { name: "qemu_stream", run: qemu_stream, corpus: streams::streams, tries: 50_000 },
    Target { name: "load_script", run: load_script, corpus: streams::scripts, tries: 30_000 },
    Target { name: "reply_stream", run: reply_stream, corpus: streams::replies, tries: 50_000 },
    Target { name: "native_hello", run: native_hello, corpus: streams::hellos, tries: 50_000 },
    Target { name: "native_records", run: native_records, corpus: streams::records, tries: 50_000 },
    Target { name: "native_body", run: native_body, corpus: streams::bodies, tries: 100_000 },
];

/// Puts the corpus of a body where libFuzzer keeps inputs, if that directory is there: a fuzzer
/// that starts from nothing finds no checksum.
pub fn seed_corpus(name: &str) {
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else { return };
    for directory in ["corpus", "fuzz/corpus"].map(|d| std::path::Path::new(d).join(name)) {
        for (n, input) in (target.corpus)().iter().enumerate().filter(|_| directory.is_dir()) {
            std::fs::write(directory.join(format!("seed-{n}")), input).expect("a seed is written");
        }
    }
}
