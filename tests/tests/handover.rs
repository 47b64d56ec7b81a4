//! The last words of a migration are cut off: what the source cannot know it says, nothing is
//! visible by halves, and the same commands settle it.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bitferry_tests::image::make;
use bitferry_tests::middle::{Cut, Middle};
use bitferry_tests::migration::{command, listening};
use bitferry_tests::process::Running;
use bitferry_tests::qemu::{check_is_clean, dirty_ranges, same_content};
use bitferry_tests::{Exit, Output, Peer, Scratch, json, require_all};
use serde_json::Value;

const MIB: u64 = 1 << 20;
/// All of COMMIT: a part of a section, the record, END, the footer.
const WHOLE: u64 = 5 + (12 + 16 + 4) + 12 + 5;

fn has_peers() -> bool {
    require_all(&[Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd])
}

/// Two disks, with a bitmap of the same name each, and one of its own.
fn sources(scratch: &Scratch) {
    for (name, own, pattern) in [("a.qcow2", "x", 3), ("b.qcow2", "y", 5)] {
        make(scratch, name, 24 * MIB)
            .write(pattern, 0, 3 * MIB)
            .bitmap("b0", 65536)
            .write(pattern, 5 * MIB, 70_144)
            .disabled_bitmap(own, 4096)
            .done();
    }
}

/// Two commands and the link between them. The place where the source goes is part of what makes a
/// command the same, so it stays for all attempts.
struct Pair<'a> {
    scratch: &'a Scratch,
    send: String,
    receive: String,
    address: SocketAddr,
    middle: Middle,
    waiting: Option<Running>,
}

impl<'a> Pair<'a> {
    fn new(scratch: &'a Scratch, (send, receive): (&str, &str), cuts: Vec<Cut>) -> Self {
        let send = format!("send --json --disk vda=a.qcow2 --disk vdb=b.qcow2 {send}");
        let receive = format!("receive --json --disk vda=a.out --disk vdb=b.out {receive}");
        let waiting = command(scratch, &receive).arg("tcp:127.0.0.1:0").spawn();
        let uri = listening(&waiting);
        let address = uri.strip_prefix("tcp:").and_then(|a| a.parse().ok()).expect("an address");
        let (middle, waiting) = (Middle::start(address, cuts), Some(waiting));
        Self { scratch, send, receive, address, middle, waiting }
    }

    /// Runs both to their ends.
    fn run(&mut self) -> (Output, Output) {
        let receiver = self.waiting.take().unwrap_or_else(|| {
            let again = command(self.scratch, &self.receive).arg(format!("tcp:{}", self.address));
            let again = again.spawn();
            listening(&again);
            again
        });
        let sent = command(self.scratch, &self.send).arg(self.middle.uri()).output();
        (sent.expect_no_crash(), receiver.wait().expect_no_crash())
    }

    fn published(&self) -> usize {
        ["a.out", "b.out"].iter().filter(|name| self.scratch.path(name).exists()).count()
    }

    /// Forgets what a run left.
    fn clean(&self) {
        for name in self.scratch.names() {
            if name != "a.qcow2" && name != "b.qcow2" {
                std::fs::remove_file(self.scratch.path(&name)).expect("remove");
            }
        }
    }
}

/// The bytes that come back when nothing is cut.
fn all_that_comes_back(scratch: &Scratch, words: (&str, &str)) -> u64 {
    let mut pair = Pair::new(scratch, words, vec![Cut::Never]);
    let (sent, received) = pair.run();
    sent.expect_exit(Exit::Done);
    received.expect_exit(Exit::Done);
    pair.clean();
    pair.middle.bytes_back()
}

#[track_caller]
fn status(output: Output, exit: Exit) -> Value {
    json::summary(&output.expect_exit(exit))["status"].clone()
}

/// Both disks with both bitmaps, the second one under these names.
#[track_caller]
fn both_are_whole(scratch: &Scratch, names: [&str; 2]) {
    for ((a, b, own), renamed) in
        [("a.qcow2", "a.out", "x"), ("b.qcow2", "b.out", "y")].into_iter().zip(names)
    {
        let (a, b) = (scratch.path(a), scratch.path(b));
        same_content((&a, "qcow2"), (&b, "qcow2"));
        check_is_clean(&b);
        let read = |image: &Path, name| dirty_ranges(image, name).unwrap_or_else(|o| panic!("{o}"));
        assert_eq!(read(&a, "b0"), read(&b, "b0"));
        assert_eq!(read(&a, own), read(&b, renamed));
    }
}

#[test]
fn a_commit_that_does_not_arrive_publishes_nothing() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    // Before its first byte, in its element, in its record.
    for cut in [0, 3, 20] {
        let mut pair = Pair::new(&scratch, ("", ""), vec![Cut::Commit(cut), Cut::Never]);
        let (sent, received) = pair.run();
        assert_eq!(status(sent, Exit::Unknown), "unknown");
        received.expect_exit(Exit::Transport);
        assert_eq!(pair.published(), 0, "{cut}");
        let before = pair.middle.bytes();
        let (sent, received) = pair.run();
        assert_eq!(status(sent, Exit::Done), "completed");
        assert_eq!(status(received, Exit::Done), "completed");
        // All but content.
        assert!(pair.middle.bytes() - before < MIB, "{}", pair.middle.bytes() - before);
        both_are_whole(&scratch, ["x", "y"]);
        pair.clean();
    }
}

/// The same images, each in the other's place: sizes and names are right.
fn swapped(scratch: &Scratch, receive: &str) -> (Output, Output) {
    let receive = format!("receive --json --disk vda=a.out --disk vdb=b.out {receive}");
    let waiting = command(scratch, &receive).arg("unix:other").spawn();
    let uri = listening(&waiting);
    let send = "send --disk vda=b.qcow2 --disk vdb=a.qcow2";
    let sent = command(scratch, send).arg(uri).output();
    (sent.expect_no_crash(), waiting.wait().expect_no_crash())
}

#[test]
fn what_another_source_began_is_not_thrown_away_without_a_word() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    let mut pair = Pair::new(&scratch, ("", ""), vec![Cut::Forth(2 * MIB)]);
    let (sent, received) = pair.run();
    for output in [sent, received] {
        let summary = json::summary(&output.expect_exit(Exit::Transport));
        // What failed was on the wire all the same.
        let bytes = summary["wire-bytes"].as_u64().expect("bytes");
        assert!((MIB..64 * MIB).contains(&bytes), "{summary}");
    }
    assert!(scratch.path(".a.out.bitferry-part").exists(), "{:?}", scratch.names());
    let (sent, received) = swapped(&scratch, "");
    sent.expect_exit(Exit::Done);
    let said = received.expect_exit(Exit::Done).text();
    assert!(said.contains("another migration had left"), "{said}");
    assert!(said.contains("sent to the same address"), "{said}");
}

/// Its source may wait for it with a paused guest: another one does not decide about that.
#[test]
fn what_was_proved_waits_for_its_own_source() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    let mut pair = Pair::new(&scratch, ("", ""), vec![Cut::Commit(0), Cut::Never]);
    assert_eq!(status(pair.run().0, Exit::Unknown), "unknown");
    let left = scratch.names();
    let (sent, received) = swapped(&scratch, "");
    let said = sent.expect_exit(Exit::Transport).complaint();
    assert!(said.contains("was proved for another migration"), "{said}");
    let said = received.expect_exit(Exit::Device).complaint();
    assert!(said.contains("hint: the commands of that migration, given again"), "{said}");
    assert_eq!(scratch.names(), left);
    let before = pair.middle.bytes();
    let (sent, received) = pair.run();
    assert_eq!(status(sent, Exit::Done), "completed");
    assert_eq!(status(received, Exit::Done), "completed");
    assert!(pair.middle.bytes() - before < MIB, "{}", pair.middle.bytes() - before);
    both_are_whole(&scratch, ["x", "y"]);
    pair.clean();
    // Given up by who may.
    let mut pair = Pair::new(&scratch, ("", ""), vec![Cut::Commit(0)]);
    assert_eq!(status(pair.run().0, Exit::Unknown), "unknown");
    let (sent, received) = swapped(&scratch, "--fresh");
    sent.expect_exit(Exit::Done);
    received.expect_exit(Exit::Done);
    same_content((&scratch.path("b.qcow2"), "qcow2"), (&scratch.path("a.out"), "qcow2"));
}

#[test]
fn what_was_written_to_since_it_was_proved_is_not_published() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    let mut pair = Pair::new(&scratch, ("", ""), vec![Cut::Commit(0), Cut::Never]);
    assert_eq!(status(pair.run().0, Exit::Unknown), "unknown");
    // Somebody who asks no lock.
    let part = scratch.path(".b.out.bitferry-part");
    let part = std::fs::File::options().write(true).open(part).expect("part");
    part.write_all_at(&[9; 4096], 2 * MIB).expect("write");
    let (sent, received) = pair.run();
    for output in [sent, received] {
        let summary = json::summary(&output.expect_exit(Exit::Done));
        assert_eq!((&summary["status"], &summary["resumed"]), (&"completed".into(), &true.into()));
    }
    both_are_whole(&scratch, ["x", "y"]);
}

#[test]
fn what_was_published_unheard_is_settled_by_the_same_commands() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    let back = all_that_comes_back(&scratch, ("", ""));
    // All of COMMIT arrives. COMMITTED does not: none of it, or not the last byte.
    for cut in [Cut::Commit(WHOLE), Cut::Back(back - 24), Cut::Back(back - 1)] {
        let mut pair = Pair::new(&scratch, ("", ""), vec![cut, Cut::Never]);
        let (sent, received) = pair.run();
        assert_eq!(status(sent, Exit::Unknown), "unknown");
        assert_eq!(status(received, Exit::Done), "completed");
        assert_eq!(pair.published(), 2);
        // As often as it is asked.
        for _ in 0..2 {
            let (sent, received) = pair.run();
            assert_eq!(status(sent, Exit::Done), "already-complete");
            assert_eq!(status(received, Exit::Done), "already-complete");
        }
        both_are_whole(&scratch, ["x", "y"]);
        pair.clean();
    }
}

#[test]
fn an_answer_to_the_question_may_be_lost_too() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    // The second time it is cut in the hello, then in what is said of the first disk.
    let cuts = [Cut::Commit(WHOLE), Cut::Back(10), Cut::Back(150), Cut::Never];
    let mut pair = Pair::new(&scratch, ("", ""), cuts.to_vec());
    assert_eq!(status(pair.run().0, Exit::Unknown), "unknown");
    pair.run().0.expect_exit(Exit::Transport);
    assert_eq!(status(pair.run().0, Exit::Unknown), "unknown");
    let (sent, received) = pair.run();
    assert_eq!(status(sent, Exit::Done), "already-complete");
    assert_eq!(status(received, Exit::Done), "already-complete");
    both_are_whole(&scratch, ["x", "y"]);
}

#[test]
fn bitmaps_of_other_names_are_what_was_sent() {
    let scratch = Scratch::new();
    if !has_peers() {
        return;
    }
    sources(&scratch);
    for (send, receive, names) in [
        ("--rename-bitmap vda/x=z", "", ["z", "y"]),
        ("", "--rename-bitmap x=z --rename-bitmap vdb/y=x", ["z", "x"]),
        ("--rename-bitmap x=q --rename-bitmap y=x", "--rename-bitmap vdb/x=z", ["q", "z"]),
        // One takes the name that another had.
        ("--rename-bitmap vda/x=w", "--rename-bitmap vda/w=x", ["x", "y"]),
    ] {
        let said = format!("{send} | {receive}");
        let mut pair = Pair::new(&scratch, (send, receive), vec![Cut::Commit(WHOLE), Cut::Never]);
        let (sent, received) = pair.run();
        assert_eq!(status(sent, Exit::Unknown), "unknown", "{said}");
        assert_eq!(status(received, Exit::Done), "completed", "{said}");
        let (sent, received) = pair.run();
        assert_eq!(status(sent, Exit::Done), "already-complete", "{said}");
        assert_eq!(status(received, Exit::Done), "already-complete", "{said}");
        both_are_whole(&scratch, names);
        pair.clean();
        // The same within one command.
        let both = (&*format!("{send} --reconnect 30"), &*format!("{receive} --reconnect 30"));
        let mut pair = Pair::new(&scratch, both, vec![Cut::Commit(WHOLE), Cut::Never]);
        let (sent, received) = pair.run();
        assert_eq!(status(sent, Exit::Done), "completed", "{said}");
        assert_eq!(status(received, Exit::Done), "completed", "{said}");
        both_are_whole(&scratch, names);
        pair.clean();
    }
}
