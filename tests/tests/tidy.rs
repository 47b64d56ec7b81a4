//! House rules that a compiler does not hold: who may import whom, how long things may get, which
//! words may not stay. Each rule collects all its offences before it fails.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bitferry_tests::bitferry::workspace;

/// Which members each member may depend on; dev-dependencies obey the same picture.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("format-spec", &[]),
    ("mig-core", &["format-spec"]),
    ("qcow2-file", &["format-spec"]),
    ("block-mig", &["format-spec", "mig-core", "qcow2-file"]),
    ("bitmap-mig", &["format-spec", "mig-core", "qcow2-file"]),
    ("ram-mig", &["format-spec", "mig-core", "qcow2-file"]),
    (".", &["format-spec", "mig-core", "qcow2-file", "block-mig", "bitmap-mig", "ram-mig"]),
];

const MEMBERS: &[&str] =
    &["format-spec", "mig-core", "qcow2-file", "block-mig", "bitmap-mig", "ram-mig"];

const MAX_FILE_LINES: usize = 500;
const MAX_FUNCTION_LINES: usize = 70;
const MAX_COLUMNS: usize = 100;

/// The only files with unsafe code: each a small module that says `SAFETY:` at every use.
const MAY_BE_UNSAFE: &[&str] = &["qcow2-file/src/lock/ofd.rs", "src/connect/inherited.rs"];

/// The only files of `qcow2-file` that open a file by its name. Everything else is handed an open
/// one, so that a name found in an image cannot become a path (invariant 5).
const MAY_OPEN_FILES: &[&str] = &["qcow2-file/src/storage", "qcow2-file/src/chain"];

/// Words that a change may not leave behind. Split, so that this file does not offend itself.
const BANNED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
    concat!("to", "do!("),
    concat!("unimpl", "emented!("),
    concat!("db", "g!("),
    concat!("/wo", "rk/"),
];

/// What code without I/O, clocks and threads does not say.
const IMPURE: &[&str] =
    &["std::fs", "std::net", "std::thread", "std::time", "std::process", "tokio"];

/// Files that are pure: bytes and numbers in, values out.
const PURE: &[&str] = &["format-spec/src", "qcow2-file/src/layout"];

struct Source {
    /// Relative to the workspace.
    name: String,
    text: String,
}

impl Source {
    /// The lines before the tests at the end of the file.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self.text.lines().position(|l| l == "#[cfg(test)]").unwrap_or(usize::MAX);
        self.text.lines().take(end).enumerate().map(|(i, l)| (i + 1, l))
    }

    fn is_test(&self) -> bool {
        let in_tests = |p: &str| self.name.starts_with(p) || self.name.contains(&format!("/{p}"));
        in_tests("tests/") || in_tests("fuzz/") || self.name.ends_with("/tests.rs")
    }

    fn is_under(&self, places: &[&str]) -> bool {
        places.iter().any(|p| self.name.starts_with(p))
    }
}

fn files(dir: &Path, wanted: &dyn Fn(&Path) -> bool, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            let is_ours = !name.starts_with('.') || name == ".ci" || name == ".github";
            if is_ours && name != "target" && name != "corpus" && name != "artifacts" {
                files(&path, wanted, found);
            }
        } else if wanted(&path) {
            found.push(path);
        }
    }
}

fn sources() -> Vec<Source> {
    let mut paths = Vec::new();
    files(workspace(), &|p| p.extension().is_some_and(|e| e == "rs"), &mut paths);
    paths.sort();
    assert!(paths.len() > 20, "the workspace was not found");
    let read = |path: PathBuf| Source {
        name: path.strip_prefix(workspace()).unwrap().to_string_lossy().into_owned(),
        text: std::fs::read_to_string(&path).unwrap(),
    };
    paths.into_iter().map(read).collect()
}

fn read(name: &str) -> String {
    let path = workspace().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

#[track_caller]
fn none(offences: &[String], rule: &str) {
    assert!(offences.is_empty(), "{rule}:\n  {}", offences.join("\n  "));
}

/// Names in the dependency tables of a manifest: `[dependencies]`, `[dev-dependencies]`, also with
/// a target before them.
fn dependencies(manifest: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_inside = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            is_inside = line.ends_with("dependencies]");
        } else if is_inside && !line.starts_with('#') {
            let end = line.find(['.', ' ', '=']).unwrap_or(line.len());
            if let Some(name) = line.get(..end).filter(|n| !n.is_empty()) {
                names.push(name.to_owned());
            }
        }
    }
    names
}

/// A manifest without its `[workspace…]` tables.
fn own_tables(manifest: &str) -> String {
    let mut is_own = true;
    let mut own = String::new();
    for line in manifest.lines() {
        if line.starts_with('[') {
            is_own = !line.starts_with("[workspace");
        }
        if is_own {
            own += line;
            own.push('\n');
        }
    }
    own
}

#[test]
fn imports_follow_the_picture() {
    let mut offences = Vec::new();
    for (member, allowed) in MAY_IMPORT {
        let manifest = own_tables(&read(&format!("{member}/Cargo.toml")));
        for name in dependencies(&manifest) {
            let is_member = MEMBERS.contains(&name.as_str()) || name.starts_with("bitferry");
            if is_member && !allowed.contains(&name.as_str()) {
                offences.push(format!("{member} depends on {name}"));
            }
        }
    }
    none(&offences, "only these may import one another (ARCHITECTURE.md, \"The crates\")");
}

#[test]
fn each_dependency_has_its_reason() {
    let architecture = read("ARCHITECTURE.md");
    let (_, reasons) = architecture.split_once("## Dependencies").expect("the chapter");
    let mut offences = BTreeSet::new();
    let members = MEMBERS.iter().chain(&["tests", "."]);
    for manifest in members.map(|m| read(&format!("{m}/Cargo.toml"))) {
        for name in dependencies(&manifest) {
            let is_own = MEMBERS.contains(&name.as_str()) || name == "bitferry";
            if !is_own && !reasons.contains(&format!("`{name}`")) {
                offences.insert(name);
            }
        }
    }
    let offences: Vec<_> = offences.into_iter().collect();
    none(&offences, "no line in ARCHITECTURE.md, \"Dependencies\", says why");
}

#[test]
fn files_functions_and_lines_stay_short() {
    let mut offences = Vec::new();
    for source in sources() {
        let name = &source.name;
        for (at, line) in source.text.lines().enumerate() {
            let columns = line.chars().count();
            // A string or an address cannot always be broken.
            if columns > MAX_COLUMNS && !line.contains("://") {
                offences.push(format!("{name}:{} has {columns} columns", at + 1));
            }
        }
        if source.is_test() {
            continue;
        }
        let lines = source.code().count();
        if lines > MAX_FILE_LINES {
            offences.push(format!("{name} has {lines} lines"));
        }
        offences.extend(long_functions(&source));
    }
    none(&offences, "too long");
}

/// rustfmt closes a function in the column where it began.
fn long_functions(source: &Source) -> Vec<String> {
    let mut offences = Vec::new();
    let mut open: Option<(usize, String, usize)> = None;
    for (at, line) in source.code() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        if let Some((begun, title, column)) = &open {
            if indent == *column && trimmed.starts_with('}') {
                let lines = at - begun + 1;
                if lines > MAX_FUNCTION_LINES {
                    offences.push(format!("{}:{begun} has {lines} lines: {title}", source.name));
                }
                open = None;
            }
        } else if is_function(trimmed) && !line.ends_with('}') && !line.ends_with(';') {
            open = Some((at, trimmed.to_owned(), indent));
        }
    }
    offences
}

fn is_function(line: &str) -> bool {
    let words = ["pub", "const", "async", "unsafe", "extern"];
    let mut rest = line.split_whitespace();
    rest.find(|w| !words.iter().any(|k| w.starts_with(k))).is_some_and(|w| w == "fn")
}

#[test]
fn nothing_is_left_behind() {
    let mut paths = Vec::new();
    let is_text = |p: &Path| {
        let name = p.file_name().unwrap_or_default().to_string_lossy();
        let ending = p.extension().unwrap_or_default().to_string_lossy();
        let ours = ["rs", "md", "toml", "sh", "yml", "txt", ""];
        ours.contains(&ending.as_ref()) && !name.starts_with("LICENSE") && !name.starts_with('.')
    };
    files(workspace(), &is_text, &mut paths);
    let mut offences = Vec::new();
    for path in paths {
        let Ok(text) = std::fs::read_to_string(&path) else { continue };
        for (at, line) in text.lines().enumerate() {
            for word in BANNED.iter().filter(|w| line.contains(**w)) {
                offences.push(format!("{}:{} says {word}", path.display(), at + 1));
            }
        }
    }
    none(&offences, "finish it, or write it down elsewhere");
}

#[test]
fn libraries_do_not_print() {
    let mut offences = Vec::new();
    let may_print = ["src/cli", "src/main.rs", "benches", "examples"];
    for source in sources() {
        let is_free = source.is_test() || source.is_under(&may_print);
        if is_free || source.name.contains("/benches/") || source.name.contains("/examples/") {
            continue;
        }
        for (at, line) in source.code() {
            let prints = ["print!(", "println!("].iter().any(|w| line.contains(w));
            if prints && !line.trim_start().starts_with("//") {
                offences.push(format!("{}:{at}", source.name));
            }
        }
    }
    none(&offences, "only the command line prints");
}

#[test]
fn unsafe_code_stays_in_its_modules() {
    let word = concat!("uns", "afe");
    let mut offences = Vec::new();
    for source in sources() {
        if source.name == "tests/tests/tidy.rs" {
            continue;
        }
        let lines: Vec<_> = source.text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let code = line.split("//").next().unwrap_or_default();
            let is_used = code.split(|c: char| !c.is_alphanumeric() && c != '_').any(|w| w == word);
            if !is_used {
                continue;
            }
            let reason = lines[at.saturating_sub(4)..at].iter().any(|l| l.contains("SAFETY:"));
            let is_listed = source.is_under(MAY_BE_UNSAFE);
            if !is_listed || !reason {
                offences.push(format!("{}:{}", source.name, at + 1));
            }
        }
    }
    none(&offences, "unsafe outside its listed modules, or without a SAFETY reason");
}

#[test]
fn pure_code_stays_pure() {
    let mut offences = Vec::new();
    for source in sources().iter().filter(|s| s.is_under(PURE)) {
        for (at, line) in source.code() {
            let code = line.split("//").next().unwrap_or_default();
            for word in IMPURE.iter().filter(|w| code.contains(**w)) {
                offences.push(format!("{}:{at} says {word}", source.name));
            }
        }
    }
    none(&offences, "no I/O, clock or thread here");
}

#[test]
fn only_listed_modules_of_qcow2_file_open_files() {
    let mut offences = Vec::new();
    for source in sources() {
        if !source.name.starts_with("qcow2-file/src") || source.is_under(MAY_OPEN_FILES) {
            continue;
        }
        for (at, line) in source.code() {
            let code = line.split("//").next().unwrap_or_default();
            let opens = ["File::open", "File::create", "OpenOptions", "HostFile::", "fs::open"];
            if opens.iter().any(|w| code.contains(w)) {
                offences.push(format!("{}:{at}: {}", source.name, line.trim()));
            }
        }
    }
    none(&offences, "only storage and chain open files by name (invariant 5)");
}
