//! TLS: who is let in, what who is not let in is told, and that nobody is held up by anybody.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bitferry::connect::{
    Connection, Dial as _, Error, Listen as _, Listener, Options, Refused, Tls, TlsError, Uri,
    dial, listen,
};
use bitferry_tests::Scratch;
use bitferry_tests::pki::{Authority, Certificate};

const PATIENCE: Duration = Duration::from_secs(60);
const GOOD: Certificate<'_> = Certificate { name: "127.0.0.1", is_expired: false };

fn options(directory: Option<&Path>) -> Options {
    Options {
        tls: directory.map(|d| Tls::new(d, None)),
        idle: PATIENCE,
        introduction: Duration::from_secs(20),
        ..Options::default()
    }
}

/// A listener, and why it turns connections away.
fn listening(options: Options) -> (Listener, mpsc::Receiver<Error>) {
    let (tell, told) = mpsc::channel();
    let tell = move |error: &Error| {
        let Error::Tls { peer, fault } = error else { panic!("{error:?}") };
        let _ = tell.send(Error::Tls { peer: peer.clone(), fault: fault.clone() });
    };
    let options = Options { refused: Refused::new(tell), ..options };
    (listen(&"tcp:127.0.0.1:0".parse().unwrap(), &options).unwrap(), told)
}

fn fault(error: &Error) -> TlsError {
    let Error::Tls { fault, .. } = error else { panic!("{error:?}") };
    assert!(fault.to_string().len() > 10);
    fault.clone()
}

fn fault_of(error: &std::io::Error) -> TlsError {
    fault(Error::find(error).unwrap_or_else(|| panic!("{error:?}")))
}

/// What a source learns: at once, or when it first hears from the destination.
fn source_learns(uri: &Uri, options: &Options) -> Result<Connection, std::io::Error> {
    let mut connection = dial(uri, options).unwrap().dial()?;
    connection.reader.read_exact(&mut [0])?;
    Ok(connection)
}

/// What a source and a destination each learn from one another.
fn meet(destination: Option<&Path>, source: Option<&Path>) -> (Option<TlsError>, Option<TlsError>) {
    let (listener, refused) = listening(options(destination));
    let uri = listener.uri().clone();
    std::thread::scope(|scope| {
        let learned = scope.spawn(move || source_learns(&uri, &options(source)).err());
        let accepted = listener.accept(Some(Duration::from_secs(2)));
        if let Ok(connection) = accepted {
            let mut connection = connection;
            connection.writer.write_all(b"!").unwrap();
            let mut rest = Vec::new();
            connection.reader.read_to_end(&mut rest).unwrap();
        }
        let source = learned.join().unwrap().map(|e| fault_of(&e));
        (refused.try_recv().ok().map(|e| fault(&e)), source)
    })
}

#[test]
fn who_fits_is_let_in_and_who_does_not_is_told() {
    let scratch = Scratch::new();
    let authority = Authority::new("ours");
    let good = authority.directory(&scratch, "good", GOOD);
    assert_eq!(meet(Some(&good), Some(&good)), (None, None));

    let other = Certificate { name: "other.example", ..GOOD };
    let wrong_name = authority.directory(&scratch, "wrong-name", other);
    let (at_destination, at_source) = meet(Some(&wrong_name), Some(&good));
    assert_eq!(at_source, Some(TlsError::WrongName { expected: "127.0.0.1".into() }));
    assert!(matches!(at_destination, Some(TlsError::Refused(_))), "{at_destination:?}");

    let old = Certificate { is_expired: true, ..GOOD };
    let expired = authority.directory(&scratch, "expired", old);
    let (at_destination, at_source) = meet(Some(&expired), Some(&good));
    assert_eq!(at_source, Some(TlsError::OutOfTime("expired")));
    assert!(matches!(at_destination, Some(TlsError::Refused(_))), "{at_destination:?}");
    let (at_destination, at_source) = meet(Some(&good), Some(&expired));
    assert_eq!(at_destination, Some(TlsError::OutOfTime("expired")));
    assert!(matches!(at_source, Some(TlsError::Refused(_))), "{at_source:?}");

    let foreign = Authority::new("theirs").directory(&scratch, "foreign", GOOD);
    let (at_destination, at_source) = meet(Some(&foreign), Some(&good));
    assert_eq!(at_source, Some(TlsError::Foreign));
    assert!(matches!(at_destination, Some(TlsError::Refused(_))), "{at_destination:?}");
    // It believes us, and we do not believe it.
    authority.trust(&foreign);
    let (at_destination, at_source) = meet(Some(&good), Some(&foreign));
    assert_eq!(at_destination, Some(TlsError::Foreign));
    assert!(matches!(at_source, Some(TlsError::Refused(_))), "{at_source:?}");
}

#[test]
fn a_source_without_a_certificate_is_refused_on_this_side_first() {
    let scratch = Scratch::new();
    let authority = Authority::new("ours");
    let good = authority.directory(&scratch, "good", GOOD);
    std::fs::remove_file(good.join("client-key.pem")).unwrap();
    let (listener, _refused) = listening(options(Some(&good)));
    let error = dial(listener.uri(), &options(Some(&good))).err().unwrap();
    assert!(matches!(&error, Error::TlsFiles { .. }), "{error:?}");
    assert!(error.to_string().contains("client-key.pem"), "{error}");
}

/// A TLS client that is not ours, since ours always shows a certificate.
#[test]
fn a_client_without_a_certificate_is_refused_by_the_destination() {
    let scratch = Scratch::new();
    let authority = Authority::new("ours");
    let good = authority.directory(&scratch, "good", GOOD);
    let (listener, refused) = listening(options(Some(&good)));
    let Uri::Tcp { port, .. } = *listener.uri() else { panic!() };
    let openssl = bitferry_tests::Run::new("openssl")
        .args(["s_client", "-tls1_3", "-quiet", "-connect", &format!("127.0.0.1:{port}")])
        .arg("-CAfile")
        .arg(good.join("ca-cert.pem"));
    if !bitferry_tests::Run::new("sh").args(["-c", "command -v openssl"]).works() {
        return bitferry_tests::peer::cannot("openssl is not here");
    }
    let running = openssl.spawn();
    assert!(listener.accept(Some(Duration::from_secs(5))).is_err());
    assert_eq!(fault(&refused.try_recv().unwrap()), TlsError::NoCertificate);
    let output = running.wait();
    assert!(output.complaint().contains("certificate required"), "{output}");
}

#[test]
fn a_name_may_be_said() {
    let scratch = Scratch::new();
    let authority = Authority::new("ours");
    let named = Certificate { name: "vault.example", ..GOOD };
    let directory = authority.directory(&scratch, "named", named);
    let socket = Uri::Unix(scratch.path("socket"));
    for place in [socket, "tcp:127.0.0.1:0".parse().unwrap()] {
        let tls = Tls::new(&directory, Some("vault.example".into()));
        let options = Options { tls: Some(tls), ..options(None) };
        let listener = listen(&place, &options).unwrap();
        let uri = listener.uri().clone();
        std::thread::scope(|scope| {
            scope.spawn(|| source_learns(&uri, &options).unwrap());
            listener.accept(Some(PATIENCE)).unwrap().writer.write_all(b"!").unwrap();
        });
    }
    // Who connects has to prove the name too, where it was said here, and is told if it is another.
    for (name, fits) in [("vault.example", true), ("other.example", false)] {
        let tls = Some(Tls::new(&directory, Some(name.into())));
        let (listener, refused) = listening(Options { tls, ..options(None) });
        let uri = listener.uri().clone();
        let tls = Some(Tls::new(&directory, Some("vault.example".into())));
        let source = Options { tls, ..options(None) };
        std::thread::scope(|scope| {
            let learned = scope.spawn(|| source_learns(&uri, &source).err());
            if let Ok(mut connection) = listener.accept(Some(Duration::from_secs(2))) {
                assert!(fits);
                connection.writer.write_all(b"!").unwrap();
            }
            let learned = learned.join().unwrap().map(|error| fault_of(&error));
            let told = refused.try_recv().ok().map(|error| fault(&error));
            let expected = (!fits).then(|| TlsError::WrongName { expected: name.into() });
            assert_eq!(told, expected);
            assert_eq!(learned.is_none(), fits, "{learned:?}");
            assert!(learned.is_none_or(|fault| matches!(fault, TlsError::Refused(_))));
        });
    }
    // A Unix socket has no name, and somebody has to say one.
    let unnamed = dial(&Uri::Unix(scratch.path("x")), &self::options(Some(&directory)));
    assert!(unnamed.err().unwrap().to_string().contains("--tls-peer"));
}

#[test]
fn plaintext_and_tls_do_not_mix() {
    let scratch = Scratch::new();
    let good = Authority::new("ours").directory(&scratch, "good", GOOD);
    // A destination that wants TLS, and a source that does not know.
    let (listener, refused) = listening(options(Some(&good)));
    let uri = listener.uri().clone();
    let source = std::thread::spawn(move || {
        let mut connection = dial(&uri, &options(None)).unwrap().dial().unwrap();
        connection.writer.write_all(b"BFRY\0\0\0\x01 and so on").unwrap();
        connection.reader.read(&mut [0; 100]).unwrap_err()
    });
    assert!(listener.accept(Some(Duration::from_secs(2))).is_err());
    assert_eq!(fault(&refused.try_recv().unwrap()), TlsError::NotTls);
    let error = source.join().unwrap();
    let learned = Error::find(&error);
    assert!(matches!(learned, Some(Error::PeerSpeaksTls { .. })), "{error:?}");

    // And the other way round.
    let listener = listen(&"tcp:127.0.0.1:0".parse().unwrap(), &options(None)).unwrap();
    let uri = listener.uri().clone();
    let source = std::thread::spawn({
        let good = good.clone();
        move || dial(&uri, &options(Some(&good))).unwrap().dial().unwrap_err()
    });
    let mut connection = listener.accept(Some(PATIENCE)).unwrap();
    let error = connection.reader.read(&mut [0; 100]).unwrap_err();
    assert!(matches!(Error::find(&error), Some(Error::PeerSpeaksTls { .. })), "{error:?}");
    drop(connection);
    let error = source.join().unwrap();
    assert_eq!(fault_of(&error), TlsError::HungUp);
    assert!(Error::find(&error).unwrap().hint().unwrap().contains("--tls-dir"));
}

#[test]
fn stuck_handshakes_hold_nobody_up() {
    let scratch = Scratch::new();
    let good = Authority::new("ours").directory(&scratch, "good", GOOD);
    let (listener, _refused) = listening(options(Some(&good)));
    let Uri::Tcp { port, .. } = *listener.uri() else { panic!() };
    let mut stuck: Vec<_> =
        (0..20).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
    // Some of them in the middle of a record.
    stuck.iter_mut().step_by(2).for_each(|s| s.write_all(&[0x16, 3, 1, 2, 0, 1]).unwrap());
    let uri = listener.uri().clone();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| source_learns(&uri, &options(Some(&good))).unwrap());
        listener.accept(Some(PATIENCE)).unwrap().writer.write_all(b"!").unwrap();
    });
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

/// Both ends of an encrypted connection.
fn pair(directory: &Path, options: &Options) -> (Listener, Connection, Connection) {
    let listener = listen(&"tcp:127.0.0.1:0".parse().unwrap(), options).unwrap();
    let uri = listener.uri().clone();
    let (source, destination) = std::thread::scope(|scope| {
        let options = Options { tls: Some(Tls::new(directory, None)), ..options.clone() };
        let source = scope.spawn(move || dial(&uri, &options).unwrap().dial().unwrap());
        let destination = listener.accept(Some(PATIENCE)).unwrap();
        (source.join().unwrap(), destination)
    });
    (listener, source, destination)
}

#[test]
fn both_directions_at_once_and_an_orderly_end() {
    let scratch = Scratch::new();
    let good = Authority::new("ours").directory(&scratch, "good", GOOD);
    let (_listener, source, destination) = pair(&good, &options(Some(&good)));
    let bytes: Vec<u8> = (0..16 << 20).map(|i| ((i * 31) >> 7) as u8).collect();
    std::thread::scope(|scope| {
        for (mut writer, mut reader) in
            [(source.writer, destination.reader), (destination.writer, source.reader)]
        {
            let bytes = &bytes;
            scope.spawn(move || {
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let (a, b) = rest.split_at(rest.len().min(100_003));
                    let slices = [a, &b[..b.len().min(9)]].map(std::io::IoSlice::new);
                    let len = writer.write_vectored(&slices).unwrap();
                    rest = &rest[len..];
                }
            });
            scope.spawn(move || {
                let mut got = Vec::new();
                reader.read_to_end(&mut got).unwrap();
                assert!(got == *bytes);
            });
        }
    });
}

#[test]
fn hang_ups_and_silence_end_it_too() {
    let scratch = Scratch::new();
    let good = Authority::new("ours").directory(&scratch, "good", GOOD);
    let (_listener, source, _destination) = pair(&good, &options(Some(&good)));
    let (mut reader, mut writer, line) = (source.reader, source.writer, source.line);
    let read = std::thread::spawn(move || reader.read(&mut [0; 10]).unwrap_err());
    let write = std::thread::spawn(move || writer.write_all(&vec![0; 64 << 20]).unwrap_err());
    std::thread::sleep(Duration::from_millis(100));
    assert!(!read.is_finished() && !write.is_finished());
    line.hang_up();
    for error in [read.join().unwrap(), write.join().unwrap()] {
        assert!(matches!(Error::find(&error), Some(Error::HungUp)), "{error:?}");
    }
    let impatient = Options { idle: Duration::from_millis(200), ..options(Some(&good)) };
    let (_listener, mut source, _destination) = pair(&good, &impatient);
    assert_eq!(source.reader.read(&mut [0; 9]).unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    let error = source.writer.write_all(&vec![0; 64 << 20]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
}

/// Sits between both ends and changes one byte of what the source sends.
#[test]
fn a_changed_byte_is_noticed() {
    let scratch = Scratch::new();
    let good = Authority::new("ours").directory(&scratch, "good", GOOD);
    let (listener, _refused) = listening(options(Some(&good)));
    let Uri::Tcp { port, .. } = *listener.uri() else { panic!() };
    let middle = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let through = middle.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let (mut source, _) = middle.accept().unwrap();
        let mut destination = TcpStream::connect(("127.0.0.1", port)).unwrap();
        let (mut back, mut to) = (destination.try_clone().unwrap(), source.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut back, &mut to));
        let mut buf = vec![0; 1 << 16];
        let mut seen = 0;
        while let Ok(len @ 1..) = source.read(&mut buf) {
            let target = 200_000usize;
            if (seen..seen + len).contains(&target) {
                buf[target - seen] ^= 1;
            }
            seen += len;
            if destination.write_all(&buf[..len]).is_err() {
                break;
            }
        }
    });
    let place = Uri::Tcp { host: "127.0.0.1".into(), port: through };
    let source = std::thread::spawn(move || {
        let mut connection = dial(&place, &options(Some(&good))).unwrap().dial().unwrap();
        let write = connection.writer.write_all(&vec![5; 1 << 20]);
        let read = connection.reader.read(&mut [0; 10]);
        write.err().or(read.err())
    });
    let mut connection = listener.accept(Some(PATIENCE)).unwrap();
    let error = std::io::copy(&mut connection.reader, &mut std::io::sink()).unwrap_err();
    assert!(matches!(fault_of(&error), TlsError::Damaged(_)), "{error:?}");
    drop(connection);
    source.join().unwrap().expect("the source is told, or cut off");
}
