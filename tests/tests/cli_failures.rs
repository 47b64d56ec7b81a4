//! What a user and a program read where something failed: the lines on stderr, and with `--json` a
//! last word on stdout, whoever found out, the parser of the arguments included.

use std::time::{Duration, Instant};

use bitferry_tests::{Exit, Output, Run, Scratch, bitferry, json};
use rustix::process::Signal;

fn run(scratch: &Scratch, line: &str) -> Run {
    bitferry().dir(scratch.dir()).words(line)
}

/// One line says what is wrong, the next one what to do.
#[track_caller]
fn has_error_and_hint(output: &Output) {
    let complaint = output.complaint();
    let mut lines = complaint.lines();
    assert!(lines.next().is_some_and(|line| line.starts_with("error: ")), "{output}");
    assert!(lines.next().is_some_and(|line| line.starts_with("hint: ")), "{output}");
}

/// What the first line on stderr says.
fn error_line(output: &Output) -> String {
    let complaint = output.complaint();
    complaint.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned()
}

#[test]
fn wrong_usage_ends_with_a_summary_too() {
    let scratch = Scratch::new();
    for line in [
        "copy --json a",
        "--json copy --frobnicate a b",
        "-p never --json send tcp:localhost:1",
        "send --disk a=b nowhere --json",
        "receive --json --channels 0 --disk a=b tcp:localhost:0",
        "copy --json --channels 2 a b",
        "demo --json --frobnicate",
    ] {
        let output = run(&scratch, line).output().expect_no_crash().expect_exit(Exit::Usage);
        has_error_and_hint(&output);
        let summary = json::summary(&output);
        assert_eq!((&summary["event"], &summary["status"]), (&"summary".into(), &"failed".into()));
        assert_eq!(summary["error"], error_line(&output), "{output}");
        assert!(summary["disks"].is_array() && summary["total-time-ms"].is_u64(), "{output}");
    }
    // Standard output belongs to the stream: nothing may stand there.
    let output = run(&scratch, "send --json --frobnicate -").output().expect_exit(Exit::Usage);
    assert!(output.stdout.is_empty(), "{output}");
    let complaint = output.complaint();
    assert_eq!(json::document(complaint.lines().next().unwrap())["status"], "failed");
    // Not asked for, not told.
    let output = run(&scratch, "copy a -- --json b").output().expect_exit(Exit::Usage);
    assert!(output.stdout.is_empty(), "{output}");
    has_error_and_hint(&output);
}

#[test]
fn a_slip_of_the_pen_is_told_with_what_was_meant() {
    let output = bitferry().words("copy --bandwidt 3 a b").output().expect_exit(Exit::Usage);
    has_error_and_hint(&output);
    assert!(output.complaint().contains("--bandwidth'"), "{output}");
    assert!(output.complaint().contains("`bitferry copy --help`"), "{output}");
}

#[test]
fn a_verb_with_one_document_prints_it_when_it_fails() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("broken.qcow2"), b"QFI\xfb and no more").unwrap();
    for (line, exit) in [
        ("info --json nowhere", Exit::Device),
        ("info --json broken.qcow2", Exit::Malformed),
        ("compare --json nowhere broken.qcow2", Exit::Device),
        ("hash --json nowhere", Exit::Device),
        ("bitmap list --json nowhere", Exit::Device),
        ("bitmap --json dump broken.qcow2 a", Exit::Malformed),
        ("bitmap --json check nowhere", Exit::Device),
        ("bitmap --json add nowhere a", Exit::Device),
        ("inspect --json nowhere", Exit::Device),
        ("control --json nowhere query-migrate", Exit::Device),
        ("control --json nowhere query-migrate x", Exit::Usage),
        ("info --json", Exit::Usage),
        ("hash --json --frobnicate a", Exit::Usage),
        ("bitmap --json frobnicate", Exit::Usage),
    ] {
        let output = run(&scratch, line).output().expect_no_crash().expect_exit(exit);
        has_error_and_hint(&output);
        let document = json::document(output.text().trim_end());
        assert_eq!(document["error"], error_line(&output), "{output}");
        assert_eq!(document.as_object().unwrap().len(), 1, "{output}");
        let output = run(&scratch, &line.replace("--json", "-q")).output().expect_exit(exit);
        assert!(output.stdout.is_empty(), "{output}");
    }
    // What was shown of a damaged stream is a document already, and says where it ends.
    let output = run(&scratch, "inspect --json broken.qcow2").output();
    let document = json::document(output.expect_exit(Exit::Malformed).text().trim_end());
    assert!(document["error"].is_object(), "{document}");
}

#[test]
fn a_second_signal_ends_it_at_once_with_a_summary() {
    let scratch = Scratch::new();
    std::fs::write(scratch.path("a.raw"), vec![7; 1 << 20]).expect("disk");
    // It takes connections, and never says a word.
    let silent = std::os::unix::net::UnixListener::bind(scratch.path("s")).expect("a socket");
    for options in ["--json", ""] {
        let line = format!("send {options} --disk vda=a.raw,format=raw unix:s");
        let running = run(&scratch, &line).spawn();
        let _held = silent.accept().expect("it comes");
        running.signal(Signal::TERM);
        std::thread::sleep(Duration::from_millis(100));
        let begun = Instant::now();
        running.signal(Signal::TERM);
        let output = running.wait();
        assert!(begun.elapsed() < Duration::from_secs(3), "{output}");
        assert_eq!(output.code(), Some(130), "{output}");
        has_error_and_hint(&output);
        assert!(output.complaint().starts_with("error: interrupted again"), "{output}");
        if options == "--json" {
            let events = json::lines(&output.text());
            let summaries = events.iter().filter(|event| event["event"] == "summary").count();
            let summary = json::summary(&output);
            assert_eq!((summaries, &summary["status"]), (1, &"interrupted".into()), "{output}");
            assert_eq!(summary["disks"][0]["id"], "vda", "{output}");
        }
    }
}
