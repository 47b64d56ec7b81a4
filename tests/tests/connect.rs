//! Every transport, both ways, and how each ends: in order, by a hang-up, by silence.

use std::io::{IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{IntoRawFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bitferry::connect::{
    Connection, Dial as _, Error, Listen as _, Listener, Options, Refused, Uri, dial, limits,
    listen,
};
use bitferry_tests::Scratch;

/// More than sockets and pipes buffer.
const MUCH: usize = 16 << 20;
/// Far beyond what anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);

fn uri(text: &str) -> Uri {
    text.parse().unwrap()
}

fn options() -> Options {
    Options { allows_exec: true, idle: PATIENCE, ..Options::default() }
}

fn impatient() -> Options {
    Options { idle: Duration::from_millis(150), ..options() }
}

/// A listener at `text`, and both ends of a connection to it.
fn connected(text: &str, options: &Options) -> (Listener, Connection, Connection) {
    let listener = listen(&uri(text), options).unwrap();
    let dialer = dial(listener.uri(), options).unwrap();
    let mut source = dialer.dial().unwrap();
    // Whoever connects speaks first.
    source.writer.write_all(b"!").unwrap();
    let mut destination = listener.accept(Some(PATIENCE)).unwrap();
    let mut first = [0];
    destination.reader.read_exact(&mut first).unwrap();
    (listener, source, destination)
}

fn places(scratch: &Scratch) -> [String; 3] {
    let socket = format!("unix:{}", scratch.path("socket").display());
    ["tcp:127.0.0.1:0".to_owned(), "tcp:localhost:0".to_owned(), socket]
}

/// Bytes that are not the same everywhere.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| ((i * 31) >> 7) as u8).collect()
}

/// Writes with vectors of odd lengths.
fn write_in_pieces(writer: &mut dyn Write, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let (a, rest) = bytes.split_at(bytes.len().min(100_003));
        let (b, _) = rest.split_at(rest.len().min(7));
        let written = writer.write_vectored(&[IoSlice::new(a), IoSlice::new(b)]).unwrap();
        assert!(written > 0);
        bytes = &bytes[written..];
    }
    writer.flush().unwrap();
}

/// Both directions at once, more than is buffered, then the end.
fn exchange(source: Connection, destination: Connection) {
    let bytes = pattern(MUCH);
    std::thread::scope(|scope| {
        for (mut writer, mut reader) in
            [(source.writer, destination.reader), (destination.writer, source.reader)]
        {
            let bytes = &bytes;
            scope.spawn(move || write_in_pieces(&mut *writer, bytes));
            scope.spawn(move || {
                let mut got = Vec::new();
                reader.read_to_end(&mut got).unwrap();
                assert!(got == *bytes, "{} of {} bytes", got.len(), bytes.len());
            });
        }
    });
}

#[track_caller]
fn reason(error: &std::io::Error) -> &Error {
    Error::find(error).unwrap_or_else(|| panic!("{error:?}"))
}

/// What a thread makes of a call that blocks, once `wake` has been called.
fn woken<T: Send + 'static>(
    call: impl FnOnce() -> T + Send + 'static,
    wake: impl FnOnce(),
) -> (T, Duration) {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || tell.send(call()));
    // Long enough to be waiting; that it is not woken before is what the assertion is about.
    assert!(told.recv_timeout(Duration::from_millis(100)).is_err(), "it did not wait");
    let begun = Instant::now();
    wake();
    (told.recv_timeout(PATIENCE).expect("woken"), begun.elapsed())
}

#[test]
fn sockets_carry_both_directions() {
    let scratch = Scratch::new();
    for place in places(&scratch) {
        let (listener, source, destination) = connected(&place, &options());
        exchange(source, destination);
        assert!(!listener.nature().is_one_way);
        assert_eq!(listener.nature().max_connections, limits::MAX_CONNECTIONS);
    }
    assert_eq!(scratch.names(), [""; 0], "a socket stays behind");
}

#[test]
fn a_chosen_port_is_told() {
    let (listener, source, _destination) = connected("tcp:127.0.0.1:0", &options());
    let Uri::Tcp { host, port } = listener.uri() else { panic!("{}", listener.uri()) };
    assert!(host == "127.0.0.1" && *port != 0);
    assert_eq!(source.peer, format!("tcp:127.0.0.1:{port}"));
    let taken = listen(listener.uri(), &options()).err().unwrap();
    assert!(matches!(taken, Error::Listen { .. }) && taken.hint().is_some(), "{taken}");
}

#[test]
fn every_address_of_this_host_is_listened_at() {
    let listener = listen(&uri("tcp::0"), &options()).unwrap();
    let Uri::Tcp { port, .. } = listener.uri() else { panic!("{}", listener.uri()) };
    let dialer = dial(&Uri::Tcp { host: "127.0.0.1".into(), port: *port }, &options()).unwrap();
    dialer.dial().unwrap().writer.write_all(b"!").unwrap();
    listener.accept(Some(PATIENCE)).unwrap();
}

#[test]
fn a_hang_up_wakes_reads_and_writes() {
    let scratch = Scratch::new();
    for place in places(&scratch) {
        let (listener, mut source, destination) = connected(&place, &options());
        let line = source.line.clone();
        let mut reader = source.reader;
        let read = move || reader.read(&mut [0; 10]).unwrap_err();
        let (error, took) = woken(read, || line.hang_up());
        assert!(matches!(reason(&error), Error::HungUp), "{error:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(matches!(reason(&source.writer.write(b"x").unwrap_err()), Error::HungUp));
        line.hang_up();
        drop((destination, listener));

        let (_other, mut source, _destination) = connected(&place, &options());
        let line = source.line.clone();
        let write = move || source.writer.write_all(&pattern(4 * MUCH)).unwrap_err();
        let (error, _) = woken(write, || line.hang_up());
        assert!(matches!(reason(&error), Error::HungUp), "{error:?}");
    }
}

#[test]
fn silence_is_limited_in_both_directions() {
    let scratch = Scratch::new();
    for place in places(&scratch) {
        let (_listener, mut source, _destination) = connected(&place, &impatient());
        let begun = Instant::now();
        let error = source.reader.read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
        assert!(begun.elapsed() >= Duration::from_millis(150));
        let error = source.writer.write_all(&pattern(4 * MUCH)).unwrap_err();
        assert!(matches!(reason(&error), Error::Idle { .. }), "{error:?}");
    }
}

#[test]
fn slow_is_not_silent() {
    let (_listener, mut source, mut destination) = connected("tcp:127.0.0.1:0", &impatient());
    let drip = std::thread::spawn(move || {
        for _ in 0..8 {
            std::thread::sleep(Duration::from_millis(50));
            destination.writer.write_all(b"x").unwrap();
        }
        destination
    });
    source.reader.read_exact(&mut [0; 8]).unwrap();
    drip.join().unwrap();
}

#[test]
fn a_half_that_is_dropped_ends_its_direction() {
    let (_listener, source, mut destination) = connected("tcp:127.0.0.1:0", &options());
    let Connection { mut reader, writer, .. } = source;
    drop(writer);
    assert_eq!(destination.reader.read(&mut [0; 10]).unwrap(), 0);
    destination.writer.write_all(b"still").unwrap();
    reader.read_exact(&mut [0; 5]).unwrap();
}

#[test]
fn descriptors_are_what_they_are() {
    let inherited = |fd: OwnedFd| rustix::io::dup(&fd).unwrap().into_raw_fd();
    // A socket goes both ways.
    let (a, b) = UnixStream::pair().unwrap();
    let dialer = dial(&Uri::Fd(inherited(a.into())), &options()).unwrap();
    let listener = listen(&Uri::Fd(inherited(b.into())), &options()).unwrap();
    assert!(!dialer.nature().is_one_way && dialer.nature().max_connections == 1);
    exchange(dialer.dial().unwrap(), listener.accept(None).unwrap());
    let error = dialer.dial().unwrap_err();
    assert!(matches!(reason(&error), Error::OnlyOnce { .. }), "{error:?}");
    // A pipe one way.
    let (reader, writer) = std::io::pipe().unwrap();
    let dialer = dial(&Uri::Fd(inherited(writer.into())), &options()).unwrap();
    let listener = listen(&Uri::Fd(inherited(reader.into())), &options()).unwrap();
    assert!(dialer.nature().is_one_way && listener.nature().is_one_way);
    let (mut source, mut destination) = (dialer.dial().unwrap(), listener.accept(None).unwrap());
    assert_eq!(source.reader.read(&mut [0; 10]).unwrap(), 0);
    let error = destination.writer.write(b"x").unwrap_err();
    assert!(matches!(reason(&error), Error::OneWay { .. }), "{error:?}");
    let bytes = pattern(MUCH);
    let expected = bytes.clone();
    let writing = std::thread::spawn(move || write_in_pieces(&mut *source.writer, &bytes));
    let mut got = vec![0; expected.len()];
    destination.reader.read_exact(&mut got).unwrap();
    assert!(got == expected);
    writing.join().unwrap();
    // The wrong end of one, and nothing at all.
    let (reader, _writer) = std::io::pipe().unwrap();
    let wrong = dial(&Uri::Fd(inherited(reader.into())), &options()).unwrap();
    let error = wrong.dial().unwrap_err();
    assert!(matches!(reason(&error), Error::Descriptor { .. }), "{error:?}");
    assert!(matches!(dial(&uri("fd:1000"), &options()), Err(Error::Descriptor { .. })));
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let number = inherited(listener.into());
    let refused = listen(&uri(&format!("fd:{number}")), &options()).err().unwrap();
    assert!(refused.to_string().contains("is a listening socket"), "{refused}");
}

#[test]
fn a_pipe_is_woken_and_limited() {
    let inherited = |fd: OwnedFd| rustix::io::dup(&fd).unwrap().into_raw_fd();
    let (reader, writer) = std::io::pipe().unwrap();
    let listener = listen(&Uri::Fd(inherited(reader.into())), &options()).unwrap();
    let destination = listener.accept(None).unwrap();
    let (mut stream, line) = (destination.reader, destination.line);
    let read = move || stream.read(&mut [0; 10]).unwrap_err();
    let (error, _) = woken(read, || line.hang_up());
    assert!(matches!(reason(&error), Error::HungUp), "{error:?}");
    drop(writer);

    let (_reader, writer) = std::io::pipe().unwrap();
    let dialer = dial(&Uri::Fd(inherited(writer.into())), &options()).unwrap();
    let source = dialer.dial().unwrap();
    let (mut stream, line) = (source.writer, source.line);
    let write = move || stream.write_all(&[0; 1 << 20]).unwrap_err();
    let (error, _) = woken(write, || line.hang_up());
    assert!(matches!(reason(&error), Error::HungUp), "{error:?}");

    let (reader, writer) = std::io::pipe().unwrap();
    let listener = listen(&Uri::Fd(inherited(reader.into())), &impatient()).unwrap();
    let error = listener.accept(None).unwrap().reader.read(&mut [0; 10]).unwrap_err();
    assert!(matches!(reason(&error), Error::Idle { .. }), "{error:?}");
    drop(writer);
}

#[test]
fn a_file_keeps_what_stands_before_the_offset() {
    let scratch = Scratch::new();
    let path = scratch.path("stream");
    std::fs::write(&path, [7; 5000]).unwrap();
    let place = Uri::File { path: path.clone(), offset: 4096 };
    let dialer = dial(&place, &options()).unwrap();
    assert!(dialer.nature().is_one_way);
    let mut source = dialer.dial().unwrap();
    let bytes = pattern(300_000);
    write_in_pieces(&mut *source.writer, &bytes);
    assert_eq!(source.reader.read(&mut [0; 10]).unwrap(), 0);
    drop(source);
    let mut got = Vec::new();
    let mut destination = listen(&place, &options()).unwrap().accept(None).unwrap();
    destination.reader.read_to_end(&mut got).unwrap();
    assert!(got == bytes && destination.writer.write(b"x").is_err());
    let file = std::fs::read(&path).unwrap();
    assert!(file[..4096] == [7; 4096] && file.len() == 4096 + bytes.len());
    let missing = Uri::File { path: scratch.path("missing"), offset: 0 };
    let error = listen(&missing, &options()).unwrap().accept(None).unwrap_err();
    assert!(matches!(reason(&error), Error::File { .. }), "{error:?}");
}

#[test]
fn a_command_is_written_to_and_has_to_succeed() {
    let scratch = Scratch::new();
    let path = scratch.path("out");
    let dialer = dial(&uri(&format!("exec:cat > {}", path.display())), &options()).unwrap();
    assert!(dialer.nature().is_one_way);
    let mut source = dialer.dial().unwrap();
    let bytes = pattern(MUCH);
    write_in_pieces(&mut *source.writer, &bytes);
    drop(source);
    dialer.end().unwrap();
    assert!(std::fs::read(&path).unwrap() == bytes);

    let dialer = dial(&uri("exec:head -c 10 >/dev/null; exit 3"), &options()).unwrap();
    let mut source = dialer.dial().unwrap();
    let error = source.writer.write_all(&bytes).unwrap_err();
    assert!(error.to_string().contains("exit status: 3"), "{error}");
    drop(source);
    assert!(matches!(dialer.end(), Err(Error::Ended { .. })));
}

#[test]
fn a_command_is_read_and_answered() {
    let listener = listen(&uri("exec:cat"), &options()).unwrap();
    let mut destination = listener.accept(None).unwrap();
    destination.writer.write_all(b"there and back").unwrap();
    let mut got = [0; 14];
    destination.reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"there and back");
    drop(destination);
    listener.end().unwrap();

    let listener = listen(&uri("exec:echo x; exit 127"), &options()).unwrap();
    let mut destination = listener.accept(None).unwrap();
    let error = destination.reader.read_to_end(&mut Vec::new()).unwrap_err();
    let error = reason(&error);
    assert!(matches!(error, Error::Ended { .. }) && error.hint().is_some(), "{error}");

    let two_way = Options { is_two_way: true, ..options() };
    let dialer = dial(&uri("exec:cat"), &two_way).unwrap();
    assert!(!dialer.nature().is_one_way);
    let mut source = dialer.dial().unwrap();
    source.writer.write_all(b"x").unwrap();
    source.reader.read_exact(&mut [0]).unwrap();
}

#[test]
fn a_command_that_is_not_wanted_any_more_is_killed() {
    let scratch = Scratch::new();
    let pid = scratch.path("pid");
    let command = format!("exec:echo $$ > {}; exec sleep 1000", pid.display());
    let listener = listen(&uri(&command), &options()).unwrap();
    let destination = listener.accept(None).unwrap();
    let (mut reader, line) = (destination.reader, destination.line);
    let (error, _) = woken(move || reader.read(&mut [0; 10]).unwrap_err(), || line.hang_up());
    assert!(matches!(reason(&error), Error::HungUp), "{error:?}");
    drop((destination.writer, listener));
    let pid = std::fs::read_to_string(&pid).unwrap();
    assert!(!std::path::Path::new(&format!("/proc/{}", pid.trim())).exists(), "it still runs");
}

#[test]
fn commands_run_only_where_they_may() {
    for made in [
        dial(&uri("exec:true"), &Options::default()).err(),
        listen(&uri("exec:true"), &Options::default()).err(),
    ] {
        let error = made.expect("refused");
        assert!(error.hint().unwrap().contains("--allow-exec"), "{error}");
    }
}

#[test]
fn nobody_there_is_said_and_soon() {
    let scratch = Scratch::new();
    let free = {
        let listener = listen(&uri("tcp:127.0.0.1:0"), &options()).unwrap();
        listener.uri().clone()
    };
    for place in [free, Uri::Unix(scratch.path("nobody"))] {
        let error = dial(&place, &options()).unwrap().dial().unwrap_err();
        assert!(matches!(reason(&error), Error::Connect { .. }), "{error:?}");
        assert!(reason(&error).hint().is_some());
    }
    let error = dial(&uri("tcp:no-such-host.invalid:1"), &options()).unwrap().dial().unwrap_err();
    assert!(matches!(reason(&error), Error::Resolve { .. }), "{error:?}");
    for nonsense in ["tcp:host:0", "tcp::5"] {
        assert!(matches!(dial(&uri(nonsense), &options()), Err(Error::Usage { .. })));
    }
    let listener = listen(&uri("tcp:127.0.0.1:0"), &options()).unwrap();
    let error = listener.accept(Some(Duration::from_millis(50))).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
}

#[test]
fn closing_wakes_who_accepts_and_refuses_who_comes() {
    let scratch = Scratch::new();
    for place in places(&scratch) {
        let listener = std::sync::Arc::new(listen(&uri(&place), &options()).unwrap());
        let waiting = listener.clone();
        let (error, _) = woken(move || waiting.accept(None).unwrap_err(), || listener.close());
        assert!(matches!(reason(&error), Error::Closed { .. }), "{error:?}");
        assert!(listener.accept(None).is_err());
        assert!(dial(listener.uri(), &options()).unwrap().dial().is_err());
    }
}

#[test]
fn who_says_nothing_holds_nobody_up() {
    let (tell, told) = mpsc::channel();
    let options = Options {
        introduction: Duration::from_millis(200),
        refused: Refused::new(move |error| drop(tell.send(error.to_string()))),
        ..options()
    };
    let listener = listen(&uri("tcp:127.0.0.1:0"), &options).unwrap();
    let Uri::Tcp { port, .. } = *listener.uri() else { panic!() };
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    let (mut silent, gone) = (connect(), connect());
    drop(gone);
    let mut honest = connect();
    honest.write_all(b"!").unwrap();
    let mut accepted = listener.accept(Some(PATIENCE)).unwrap();
    accepted.reader.read_exact(&mut [0]).unwrap();
    // The silent one is shown the door.
    assert!(listener.accept(Some(Duration::from_secs(1))).is_err());
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    let reasons: Vec<String> = told.try_iter().collect();
    assert!(reasons.iter().any(|r| r.ends_with("said nothing")), "{reasons:?}");
    assert!(reasons.iter().any(|r| r.ends_with("hung up without a word")), "{reasons:?}");
    // Unless silence is expected.
    listener.expect_silence();
    let _silent = connect();
    listener.accept(Some(PATIENCE)).unwrap();
}

#[test]
fn a_flood_is_bounded_and_lets_an_honest_one_through() {
    let listener = listen(&uri("tcp:127.0.0.1:0"), &options()).unwrap();
    let Uri::Tcp { port, .. } = *listener.uri() else { panic!() };
    let before = open_descriptors();
    let honest = std::thread::spawn(move || {
        // The kernel's queue is bounded too: some of these wait, none of them for ever.
        let flood: Vec<_> =
            (0..500).filter_map(|_| TcpStream::connect(("127.0.0.1", port)).ok()).collect();
        let mut honest = TcpStream::connect(("127.0.0.1", port)).unwrap();
        honest.write_all(b"!").unwrap();
        (flood, honest)
    });
    listener.accept(Some(PATIENCE)).unwrap();
    let (flood, _honest) = honest.join().unwrap();
    let ours = open_descriptors() - before - flood.len();
    assert!(ours < limits::MAX_INTRODUCTIONS + 16, "{ours} connections are held");
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn only_a_dead_socket_is_replaced() {
    let scratch = Scratch::new();
    let path = scratch.path("socket");
    let place = Uri::Unix(path.clone());
    drop(UnixListener::bind(&path).unwrap());
    let listener = listen(&place, &options()).unwrap();
    let taken = listen(&place, &options()).err().unwrap();
    assert!(matches!(taken, Error::Listen { .. }), "{taken}");
    drop(listener);
    assert!(!path.exists());
    std::fs::write(&path, "mine").unwrap();
    assert!(listen(&place, &options()).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"mine");
}
