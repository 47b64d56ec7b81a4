//! The command line as words: verbs, help, exit status of wrong usage, completions, manual pages.

use bitferry_tests::{Exit, Output, Scratch, bitferry};

const VERBS: [&str; 12] = [
    "demo",
    "copy",
    "send",
    "receive",
    "info",
    "compare",
    "hash",
    "bitmap",
    "inspect",
    "control",
    "completions",
    "man",
];

fn run(line: &str) -> Output {
    bitferry().words(line).output().expect_no_crash()
}

#[test]
fn help_names_every_verb_and_exit_status() {
    let help = run("--help").expect_exit(Exit::Done).text();
    for verb in VERBS {
        assert!(help.contains(&format!("\n  {verb} ")), "{verb} is missing:\n{help}");
        run(&format!("{verb} --help")).expect_exit(Exit::Done);
        run(&format!("help {verb}")).expect_exit(Exit::Done);
    }
    for status in ["0", "1", "2", "3", "4", "5", "6", "7", "8", "130"] {
        assert!(help.contains(&format!("\n  {status} ")), "status {status} is missing:\n{help}");
    }
}

#[test]
fn what_does_not_exist_is_wrong_usage() {
    for line in ["", "frobnicate"] {
        run(line).expect_exit(Exit::Usage);
    }
    for line in
        ["copy a", "copy a b c", "copy --channels 2 a b", "copy -f vmdk a b", "info", "man a b"]
    {
        let output = run(line).expect_exit(Exit::Usage);
        assert!(output.complaint().starts_with("error: "), "{output}");
    }
    for line in
        ["copy --force --in-place a b", "copy --flatten --backing c a b", "copy -o size a b"]
    {
        run(line).expect_exit(Exit::Usage);
    }
}

#[test]
fn numbers_without_sense_are_refused_with_those_that_have_some() {
    for (line, word) in [
        ("copy --channels 0 a h:b", "1..=255"),
        ("send --channels 256 --disk a=b tcp:h:1", "1..=255"),
        ("receive --channels -1 --disk a=b tcp::0", "1..=255"),
        ("copy --bandwidth -5 a b", "not a size"),
        ("copy --bandwidth 99999999T a b", "not a size"),
        ("copy --reconnect 1.5 a h:b", "whole number of seconds"),
        ("send --reconnect -1 --disk a=b tcp:h:1", "whole number of seconds"),
        ("receive --reconnect 2592001 --disk a=b tcp::0", "30 days"),
        ("receive --reconnect 99999999999999999999 --disk a=b tcp::0", "30 days"),
        ("send --downtime -1 --disk a=b tcp:h:1", "0..=2000000"),
        ("receive --dialect qemu:7.1 --disk a=b tcp::0", "older than 7.2"),
        ("receive --dialect qemu:9.1 --in-place --shared-base --disk a=b tcp::0", "migrate -i"),
    ] {
        let output = run(line).expect_exit(Exit::Usage);
        let complaint = output.complaint();
        assert!(complaint.starts_with("error: ") && complaint.contains("\nhint: "), "{output}");
        assert!(complaint.contains(word), "{word}: {output}");
    }
}

#[test]
fn a_copy_is_told_that_ssh_encrypts() {
    for line in ["copy --tls-dir pki a b", "copy --tls-dir pki --tls-peer h a h:b"] {
        let output = run(line).expect_exit(Exit::Usage);
        assert!(output.complaint().contains("goes through ssh, which encrypts"), "{output}");
    }
}

#[test]
fn a_remote_operand_goes_through_ssh() {
    for (from, to) in [("host:a", "b"), ("./a", "user@host:/b")] {
        let run = bitferry().args(["copy", from, to]).env("BITFERRY_SSH", "false");
        let output = run.output().expect_no_crash();
        let complaint = output.complaint();
        assert_ne!(output.code(), Some(0), "{output}");
        assert!(complaint.starts_with("error: ") && complaint.contains("\nhint: "), "{output}");
    }
}

#[test]
fn completions_know_the_verbs() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = run(&format!("completions {shell}")).expect_exit(Exit::Done).text();
        for verb in VERBS {
            assert!(script.contains(verb), "{shell}: {verb}");
        }
    }
    run("completions cobol").expect_exit(Exit::Usage);
}

#[test]
fn manual_pages_come_one_per_verb() {
    let page = run("man").expect_exit(Exit::Done).text();
    assert!(page.contains(".SH \"EXIT STATUS\"") || page.contains(".SH EXIT STATUS"), "{page}");
    let scratch = Scratch::new();
    let directory = scratch.path("man");
    bitferry().arg("man").arg(&directory).output().expect_exit(Exit::Done);
    for verb in VERBS {
        let page = std::fs::read_to_string(directory.join(format!("bitferry-{verb}.1"))).unwrap();
        assert!(page.contains(".SH NAME"), "{page}");
    }
}

#[test]
fn a_reader_that_went_away_is_no_error() {
    // The script is larger than a pipe's buffer, so the command meets the closed pipe while it
    // writes.
    let line =
        format!("{} completions zsh | head -c 1", bitferry_tests::bitferry::binary().display());
    let shell = bitferry_tests::Run::new("bash").args(["-o", "pipefail", "-c", &line]);
    let output = shell.output();
    assert_eq!(output.code(), Some(0), "{output}");
    assert!(output.complaint().is_empty(), "{output}");
    // Errors whose reader has closed the pipe before they are said.
    for line in ["copy --frobnicate a b", "info nowhere"] {
        let binary = bitferry_tests::bitferry::binary().display();
        let line = format!("{binary} {line} 2>&1 >&3 | true; echo ${{PIPESTATUS[0]}}");
        let shell = bitferry_tests::Run::new("bash").args(["-c", &format!("exec 3>&1; {line}")]);
        assert!(["2\n", "3\n"].contains(&shell.output().text().as_str()), "{line}");
    }
}
