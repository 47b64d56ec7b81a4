//! What the command says of itself, what its manual says and what README says must agree; and what
//! the specification says of this program's limits.

use std::collections::BTreeSet;
use std::time::Duration;

use ::bitferry::connect::limits as connect;
use bitferry_tests::bitferry::workspace;
use bitferry_tests::{Exit, Scratch, bitferry};
use mig_core::limits as stream;

/// The verbs and options that `--help` shows for `path`.
fn help(path: &[&str]) -> (Vec<String>, BTreeSet<String>) {
    let text = bitferry().args(path).arg("--help").output().expect_exit(Exit::Done).text();
    let verbs = text.split("Commands:\n").nth(1).unwrap_or_default();
    let verbs = verbs.lines().take_while(|l| l.starts_with("  "));
    let verbs = verbs.filter_map(|l| l.strip_prefix("  ")?.split(' ').next().map(str::to_owned));
    let verbs = verbs.filter(|v| !v.is_empty() && v != "help").collect();
    (verbs, options_in(text.lines().filter(|l| l.trim_start().starts_with('-'))))
}

fn options_in<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-';
    let words = lines.flat_map(|l| l.split(move |c| !is_word(c)));
    words.filter(|w| w.starts_with("--") && w.len() > 2).map(str::to_owned).collect()
}

/// Every verb with its subcommands, as words.
fn verbs() -> Vec<Vec<String>> {
    let (top, _) = help(&[]);
    let mut all = Vec::new();
    for verb in top {
        let (below, _) = help(&[&verb]);
        all.extend(below.into_iter().map(|b| vec![verb.clone(), b]));
        all.push(vec![verb]);
    }
    all
}

#[test]
fn each_verb_has_a_manual_page_with_its_options() {
    let scratch = Scratch::new();
    bitferry().arg("man").arg(scratch.dir()).output().expect_exit(Exit::Done);
    for verb in verbs() {
        let name = format!("bitferry-{}.1", verb.join("-"));
        let page = std::fs::read_to_string(scratch.path(&name))
            .unwrap_or_else(|e| panic!("{name}: {e}"))
            .replace('\\', "");
        let words: Vec<&str> = verb.iter().map(String::as_str).collect();
        for option in help(&words).1 {
            assert!(page.contains(&option), "{name} does not know {option}");
        }
    }
}

#[test]
fn readme_names_each_verb_and_no_option_that_is_not() {
    let readme = std::fs::read_to_string(workspace().join("README.md")).expect("README.md");
    let mut known = BTreeSet::new();
    for verb in verbs() {
        let words: Vec<&str> = verb.iter().map(String::as_str).collect();
        known.extend(help(&words).1);
        let named = format!("bitferry {}", verb[0]);
        let is_there = readme.contains(&named) || readme.contains(&format!("`{}`", verb[0]));
        assert!(is_there, "README.md does not name `{named}`");
    }
    let shown = readme.lines().filter(|l| l.contains("bitferry ") && !l.contains("cargo "));
    let shown = shown.filter(|l| !l.contains("qemu-img"));
    let unknown: Vec<_> = options_in(shown).difference(&known).cloned().collect();
    assert!(unknown.is_empty(), "README.md shows options that do not exist: {unknown:?}");
}

#[test]
fn completions_know_each_verb() {
    for shell in ["bash", "zsh", "fish"] {
        let script = bitferry().args(["completions", shell]).output().expect_exit(Exit::Done);
        for verb in verbs() {
            assert!(script.text().contains(&verb[0]), "{shell} does not complete {}", verb[0]);
        }
    }
}

#[test]
fn the_specification_names_the_limits_that_hold() {
    let path = workspace().join("format-spec/SPEC.md");
    let spec = std::fs::read_to_string(path).expect("SPEC.md");
    let seconds = |limit: Duration| limit.as_secs();
    let hello = [
        ("HELLO_LIMIT", seconds(stream::HELLO_LIMIT)),
        ("JOIN_LIMIT", seconds(stream::JOIN_LIMIT)),
        ("MAX_WAITING_JOINS", stream::MAX_WAITING_JOINS as u64),
        ("KEEPALIVE_INTERVAL", seconds(stream::KEEPALIVE_INTERVAL)),
        ("LINGER", seconds(stream::LINGER)),
    ];
    let connections = [
        ("INTRODUCTION", seconds(connect::INTRODUCTION)),
        ("MAX_INTRODUCTIONS", connect::MAX_INTRODUCTIONS as u64),
        ("MAX_CONNECTIONS", connect::MAX_CONNECTIONS.into()),
        ("CONNECT", seconds(connect::CONNECT)),
        ("IDLE", seconds(connect::IDLE)),
    ];
    for (module, limits) in [("mig_core::limits", hello), ("connect::limits", connections)] {
        let table = spec.split(&format!("| limit (`{module}`) |")).nth(1).expect("a table");
        let rows = table.lines().skip(2).take_while(|line| line.starts_with('|'));
        let cells =
            |row: &str| row.split('|').skip(1).take(2).map(|c| c.trim().to_owned()).collect();
        let written: Vec<Vec<String>> = rows.map(cells).collect();
        let held = limits.map(|(name, value)| vec![name.to_owned(), value.to_string()]);
        assert_eq!(written, held, "{module}");
    }
}

#[test]
fn how_long_a_silent_peer_is_borne_with_is_said_where_it_is_looked_for() {
    let limit = format!("{} seconds", connect::IDLE.as_secs());
    for verb in ["send", "receive", "copy"] {
        let text = bitferry().args([verb, "--help"]).output().expect_exit(Exit::Done).text();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(&format!("no byte moves for {limit}")), "{verb}: {text}");
    }
    let readme = std::fs::read_to_string(workspace().join("README.md")).expect("README.md");
    assert!(readme.contains(&format!("no byte moves for {limit}")));
}
