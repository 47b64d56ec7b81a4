//! Who connects to a destination and is no source: told why and turned away, and nobody waits for
//! it.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use bitferry_tests::migration::{command, listening};
use bitferry_tests::process::Running;
use bitferry_tests::{Exit, Scratch, json};
use format_spec::native::hello::{Choice, Hello, Join, Offer, SessionState};
use rustix::process::Signal;

/// Far less than a stranger may take for its hello, and much for a disk of a MiB.
const SOON: Duration = Duration::from_secs(6);

fn offer() -> Vec<u8> {
    let (features, required) = (0, 0);
    let (session, is_one_way, channels) = ([7; 16], false, 1);
    let program = "a stranger".to_owned();
    Hello::Offer(Offer { session, is_one_way, features, required, channels, program }).encode()
}

fn changed(at: usize, to: u8) -> Vec<u8> {
    let mut offer = offer();
    offer[at] = to;
    offer
}

fn choice() -> Vec<u8> {
    let (session, ticket, features, channels) = ([7; 16], [8; 16], 0, 1);
    let (state, program) = (SessionState::Fresh, "a stranger".to_owned());
    Hello::Choice(Choice { session, ticket, state, features, channels, program }).encode()
}

/// A destination with these words, for the disk `a.raw` that is made here too.
fn destination(scratch: &Scratch, words: &str) -> (Running, String) {
    let bytes: Vec<u8> = (0..1 << 20).map(|at: usize| (at / 4096 % 251 + 1) as u8).collect();
    std::fs::write(scratch.path("a.raw"), bytes).expect("disk");
    let place = "--disk vda=out.raw,format=raw tcp:127.0.0.1:0";
    let running = command(scratch, &format!("receive --json {words} {place}")).spawn();
    let uri = listening(&running);
    (running, uri)
}

/// The source that is waited for comes, and is through soon.
#[track_caller]
fn is_served(scratch: &Scratch, (destination, uri): (Running, String)) -> String {
    let begun = Instant::now();
    let send = "send --json --disk vda=a.raw,format=raw";
    command(scratch, send).arg(uri).output().expect_exit(Exit::Done);
    let received = destination.wait().expect_exit(Exit::Done);
    assert!(begun.elapsed() < SOON, "{:?}: {received}", begun.elapsed());
    let read = |name| std::fs::read(scratch.path(name)).expect("disk");
    assert!(read("a.raw") == read("out.raw"));
    let events = json::lines(&received.text());
    let warnings = events.iter().filter(|event| event["event"] == "warning");
    warnings.map(|event| format!("{event}\n")).collect()
}

fn says(uri: &str, words: &[u8]) -> TcpStream {
    let address = uri.strip_prefix("tcp:").expect("tcp");
    let mut stranger = TcpStream::connect(address).expect("connect");
    stranger.write_all(words).expect("write");
    stranger
}

#[test]
fn what_is_no_whole_offer_ends_nothing() {
    let qemu = b"QEVM\0\0\0\x03".as_slice();
    let noise = [&b"BFRY\0\0\0\x01"[..], &[0xff; 40]].concat();
    let join = Hello::Join(Join { session: [7; 16], ticket: [8; 16], channel: 1 }).encode();
    let checksum = changed(offer().len() - 1, 0x55);
    let strangers = [
        (&b"BFRY"[..], ""),
        (&b"BFRY\0\0\0\x01"[..], ""),
        (&offer()[..30], ""),
        (&noise, "malformed"),
        (&changed(7, 2), "version"),
        (&b"BFRY\0\0\0\x02"[..], "version"),
        (&checksum, "malformed"),
        (&choice(), "opens with an offer"),
        (&join, ""),
        (&qemu[..4], ""),
        (qemu, ""),
        (&[qemu, b"\x08\0\0"].concat(), ""),
        (&[qemu, b"\xff"].concat(), ""),
        (b"QEVM\0\0\0\x02", ""),
        (b"BFRX", ""),
    ];
    for words in ["", "--reconnect 30"] {
        let scratch = Scratch::new();
        let (running, uri) = destination(&scratch, words);
        for (said, told) in &strangers {
            let mut stranger = says(&uri, said);
            stranger.shutdown(Shutdown::Write).expect("no more");
            stranger.set_read_timeout(Some(SOON)).expect("limit");
            let mut answer = Vec::new();
            // One that is hung up with words unread is reset.
            let _ = stranger.read_to_end(&mut answer);
            let answer = String::from_utf8_lossy(&answer);
            assert!(answer.contains(told), "{said:02x?}: {answer:?}, not {told:?}");
            assert_eq!(answer.is_empty(), told.is_empty(), "{said:02x?}: {answer:?}");
        }
        let warnings = is_served(&scratch, (running, uri));
        assert_eq!(warnings.matches("turned away").count(), strangers.len(), "{warnings}");
        for reason in ["version", "opens with an offer", "hung up before", "no migration does"] {
            assert!(warnings.contains(reason), "{reason}: {warnings}");
        }
    }
}

#[test]
fn half_a_word_holds_nobody_up() {
    let scratch = Scratch::new();
    let (running, uri) = destination(&scratch, "");
    let words = [&b"B"[..], b"BFRY", b"BFRY\0\0\0\x01", &offer()[..30], b"QEVM", b"QEVM\0\0\0\x03"];
    let _waiting: Vec<_> = words.iter().cycle().take(18).map(|said| says(&uri, said)).collect();
    is_served(&scratch, (running, uri));
}

#[test]
fn an_offer_may_come_byte_by_byte() {
    let scratch = Scratch::new();
    let (running, uri) = destination(&scratch, "");
    let mut slow = says(&uri, b"");
    slow.set_nodelay(true).expect("at once");
    slow.set_read_timeout(Some(SOON)).expect("limit");
    for byte in changed(7, 1) {
        slow.write_all(&[byte]).expect("write");
        std::thread::sleep(Duration::from_millis(10));
    }
    let mut answer = [0; 4];
    slow.read_exact(&mut answer).expect("an answer");
    assert_eq!(&answer, b"BFRY");
    running.signal(Signal::INT);
    running.wait().expect_exit(Exit::Interrupted);
}

#[test]
fn ctrl_c_ends_it_among_strangers() {
    let scratch = Scratch::new();
    let (running, uri) = destination(&scratch, "");
    let _waiting: Vec<_> = (0..6).map(|_| says(&uri, b"B")).collect();
    // Whole, and one after the other.
    let _told: Vec<_> = (0..30).map(|_| says(&uri, b"GET / HTTP/1.0\r\n\r\n")).collect();
    std::thread::sleep(Duration::from_millis(300));
    let begun = Instant::now();
    running.signal(Signal::INT);
    running.wait().expect_exit(Exit::Interrupted);
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
}

#[test]
fn who_was_asked_for_and_is_no_source_is_an_error() {
    let scratch = Scratch::new();
    let late = [(b"BFRY\0\0\0\x02".to_vec(), Exit::Malformed), (choice(), Exit::Transport)];
    for (said, exit) in late {
        std::fs::write(scratch.path("said"), &said).expect("stream");
        let receive = command(&scratch, "receive --disk vda=out.raw,format=raw file:said");
        receive.output().expect_no_crash().expect_exit(exit);
        let receive = command(&scratch, "receive --disk vda=out.raw,format=raw -").stdin(said);
        receive.output().expect_no_crash().expect_exit(exit);
    }
}
