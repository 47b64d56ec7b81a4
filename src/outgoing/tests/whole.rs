//! Migrations that arrive.

use mig_core::stream::Method;

use super::*;

fn ways() -> Vec<Way> {
    let methods = [None, Some(Method::Zstd), Some(Method::Zlib)];
    let compressions =
        methods.map(|method| method.map(|method| Compression { method, level: None }));
    let of = |channels: u16| compressions.map(|compression| Way { channels, compression, ..PLAIN });
    [1, 2, 4].into_iter().flat_map(of).collect()
}

#[test]
fn disks_and_bitmaps_arrive_equal() {
    let cargo = Cargo::small();
    for way in ways() {
        let shelf = Arc::new(Shelf::default());
        let (sent, received) = attempt(&cargo, &shelf, &Net::new(None), way);
        let (sent, received) = (sent.unwrap(), received.unwrap());
        assert!(matches!(sent.outcome, Outcome::Completed), "{:?}", sent.outcome);
        assert!(cargo.is_on(&shelf));
        let confirmed = sent.confirmed.unwrap();
        assert_eq!(confirmed.disks[0], (DiskId(0), cargo.disks[0].1.hash()));
        assert_eq!((confirmed.disks.len(), confirmed.bitmaps.len()), (2, 4));
        assert_eq!(received.disks[0].proof.as_ref().unwrap().content, Some(confirmed.disks[0].1));
        assert_eq!(received.wire_bytes, sent.wire_bytes, "{} channels", way.channels);
        assert!(!sent.resumed && !received.already_complete);
        // Zeroes cost next to nothing, and compressible content less than its size.
        let limit = if way.compression.is_some() { 40_000 } else { 400_000 };
        assert!(sent.wire_bytes < limit, "{}", sent.wire_bytes);
        assert_eq!(shelf.0.lock().unwrap().commits, 1);
    }
}

#[test]
fn asking_again_sends_nothing() {
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    attempt(&cargo, &shelf, &Net::new(None), PLAIN).0.unwrap();
    let (sent, received) = attempt(&cargo, &shelf, &Net::new(None), PLAIN);
    let sent = sent.unwrap();
    assert!(matches!(sent.outcome, Outcome::AlreadyComplete(_)));
    assert!(received.unwrap().already_complete && sent.wire_bytes < 200);
    assert_eq!(shelf.0.lock().unwrap().commits, 1);
}

#[test]
fn something_else_that_was_published_is_an_error() {
    let is_found = |words: &str, change: &dyn Fn(&ShelfPlace)| {
        let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
        attempt(&cargo, &shelf, &Net::new(None), PLAIN).0.unwrap();
        change(&shelf.0.lock().unwrap().places["vda"]);
        let error = attempt(&cargo, &shelf, &Net::new(None), PLAIN).0.unwrap_err();
        assert!(matches!(&error, Error::Mismatch { reason } if reason.contains(words)), "{error}");
    };
    is_found("published as", &|place| place.disk.with(7, 1, |bytes| bytes[0] ^= 1));
    is_found("bytes there", &|place| place.disk.0.lock().unwrap().truncate(512));
    is_found("lacks bitmap", &|place| drop(place.bitmaps.lock().unwrap().pop()));
    is_found("not sent", &|place| place.bitmaps.lock().unwrap()[0].name.push('x'));
    is_found("bitmap \"fine\" as", &|place| {
        place.bitmaps.lock().unwrap()[0].bits.set_range(9..10);
    });
}

#[test]
fn a_finished_session_that_is_not_heard_to_its_end_is_unknown() {
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    attempt(&cargo, &shelf, &Net::new(None), PLAIN).0.unwrap();
    let mut heard = 0;
    for at in 0..700 {
        let fault = Fault { connection: 0, from_source: false, at, is_flip: false };
        match attempt(&cargo, &shelf, &Net::new(Some(fault)), PLAIN).0 {
            // Not even that it had finished.
            Err(error) => assert!(error.is_secondary() && at < 100, "{at}: {error}"),
            Ok(Sent { outcome: Outcome::Unknown(_), .. }) => {}
            Ok(sent) => {
                heard += 1;
                assert!(matches!(sent.outcome, Outcome::AlreadyComplete(_)), "{at}: {sent:?}");
            }
        }
    }
    assert!((1..500).contains(&heard), "{heard}");
}

#[test]
fn without_proof_nothing_is_hashed_and_all_arrives() {
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    let way = Way { hashes: false, channels: 2, ..PLAIN };
    let (sent, received) = attempt(&cargo, &shelf, &Net::new(None), way);
    let confirmed = sent.unwrap().confirmed.unwrap();
    assert!(confirmed.disks.is_empty() && confirmed.bitmaps.is_empty());
    assert_eq!(received.unwrap().disks[0].proof, None);
    assert!(cargo.is_on(&shelf));
}

#[test]
fn a_one_way_stream_is_proved_by_the_destination_alone() {
    let one_way =
        || Net { nature: Nature { is_one_way: true, max_connections: 1 }, ..Net::new(None) };
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    let way = Way { channels: 4, ..PLAIN };
    let (sent, received) = attempt(&cargo, &shelf, &one_way(), way);
    assert!(matches!(sent.unwrap().outcome, Outcome::Unconfirmed));
    assert!(received.unwrap().disks[0].proof.is_some() && cargo.is_on(&shelf));
    // Without hashes nobody could know.
    let shelf = Arc::new(Shelf::default());
    let (_, received) = attempt(&cargo, &shelf, &one_way(), Way { hashes: false, ..way });
    let error = received.unwrap_err().to_string();
    assert!(error.contains("no hash"), "{error}");
    assert!(!shelf.0.lock().unwrap().is_committed);
}

#[test]
fn storage_that_lies_is_found_out() {
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    shelf.0.lock().unwrap().is_rotten = true;
    let (sent, received) = attempt(&cargo, &shelf, &Net::new(None), PLAIN);
    assert!(matches!(received.unwrap_err(), Error::Mismatch { .. }));
    let error = sent.unwrap_err().to_string();
    assert!(error.contains("the peer says") && error.contains("reads as bf1:"), "{error}");
    assert!(!shelf.0.lock().unwrap().is_committed);
}

#[test]
fn a_place_that_is_not_there_is_said_to_the_source() {
    let mut cargo = Cargo::small();
    cargo.disks[1].0 = "nowhere".to_owned();
    let shelf = Arc::new(Shelf::default());
    for channels in [1, 3] {
        let way = Way { channels, resumes: false, ..PLAIN };
        let (sent, received) = attempt(&cargo, &shelf, &Net::new(None), way);
        let sent = sent.unwrap_err().to_string();
        assert!(sent.contains("no such place"), "{sent}");
        let received = received.unwrap_err();
        assert_eq!(received.blame(), format_spec::Blame::Caller);
        assert!(matches!(crate::Error::from(received), crate::Error::Usage { .. }));
        assert!(shelf.0.lock().unwrap().places.is_empty());
    }
}

#[test]
fn a_guest_goes_on_after_a_failure_and_not_after_the_handover() {
    struct Guest(i32);
    impl mig_core::guest::Guest for Guest {
        fn pause(&mut self) -> std::result::Result<(), mig_core::guest::GuestError> {
            self.0 += 1;
            Ok(())
        }
        fn resume(&mut self) -> std::result::Result<(), mig_core::guest::GuestError> {
            self.0 += 10;
            Ok(())
        }
    }
    for (is_rotten, calls) in [(false, 1), (true, 11)] {
        let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
        shelf.0.lock().unwrap().is_rotten = is_rotten;
        let net = Net::new(None);
        let mut guest = Guest(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let main = net.accept(None).unwrap();
                let options = IncomingOptions::new(&Unwatched);
                let _ = receive(main, &net, shelf.clone(), Registry::new(), &options);
            });
            let options = OutgoingOptions::new(SESSION, &Unwatched);
            let sent = send(&net, cargo.handlers(true), &mut guest, &mut AtRest, &options);
            assert_eq!(sent.is_err(), is_rotten);
        });
        assert_eq!(guest.0, calls);
    }
}

#[test]
fn an_impatient_user_stops_either_side() {
    struct Stop;
    impl Monitor for Stop {
        fn is_cancelled(&self) -> bool {
            true
        }
    }
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    let net = Net::new(None);
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None).unwrap();
            receive(main, &net, shelf.clone(), Registry::new(), &IncomingOptions::new(&Stop))
        });
        // A source that says hello and then nothing.
        let connection = net.dial().unwrap();
        let mut writer = stream::StreamWriter::new(connection.writer, 0);
        let offer = lies::offer(1, 0);
        writer.hello(&format_spec::native::hello::Hello::Offer(offer)).unwrap();
        assert!(matches!(destination.join().unwrap(), Err(Error::Interrupted)));
        let sent = send(
            &net,
            cargo.handlers(true),
            &mut (),
            &mut AtRest,
            &OutgoingOptions::new(SESSION, &Stop),
        );
        assert!(matches!(sent, Err(Error::Interrupted)));
    });
}

#[test]
fn a_silent_destination_is_given_up_and_a_slow_one_is_not() {
    let (cargo, shelf) = (Cargo::small(), Arc::new(Shelf::default()));
    // Silent: connected, never answered.
    let net = Net { patience: Duration::from_millis(100), ..Net::new(None) };
    let options = OutgoingOptions::new(SESSION, &Unwatched);
    let sent = send(&net, cargo.handlers(true), &mut (), &mut AtRest, &options);
    assert_eq!(sent.unwrap_err().blame(), format_spec::Blame::Transport);
    // Slow: proving takes far longer than the idle limit, but both sides say that they live.
    struct Slow(Shelf);
    impl Destination for Slow {
        fn begin(&self, session: SessionId) -> stream::Result<SessionState> {
            self.0.begin(session)
        }
        fn place(&self, wanted: &Wanted<'_>) -> stream::Result<Arc<dyn Place>> {
            self.0.place(wanted)
        }
        fn commit(&self) -> stream::Result<()> {
            std::thread::sleep(Duration::from_millis(1500));
            self.0.commit()
        }
        fn abort(&self, fate: Fate) {
            self.0.abort(fate);
        }
    }
    drop(shelf);
    let slow = Arc::new(Slow(Shelf::default()));
    let net = Net { patience: Duration::from_millis(500), ..Net::new(None) };
    std::thread::scope(|scope| {
        let destination = scope.spawn(|| {
            let main = net.accept(None).unwrap();
            let options = IncomingOptions { timing: timing(), ..IncomingOptions::new(&Unwatched) };
            receive(main, &net, slow.clone(), Registry::new(), &options)
        });
        let options = OutgoingOptions {
            timing: timing(),
            channels: 2,
            ..OutgoingOptions::new(SESSION, &Unwatched)
        };
        let sent = send(&net, cargo.handlers(true), &mut (), &mut AtRest, &options).unwrap();
        assert!(matches!(sent.outcome, Outcome::Completed), "{:?}", sent.outcome);
        destination.join().unwrap().unwrap();
    });
}

#[test]
fn what_arrived_is_not_sent_again() {
    let cargo = Cargo::small();
    for channels in [1, 3] {
        let (shelf, way) = (Arc::new(Shelf::default()), Way { channels, ..PLAIN });
        let go = || attempt(&cargo, &shelf, &Net::new(None), way);
        // As if an attempt had been cut before the handover.
        let forget = || {
            let mut state = shelf.0.lock().unwrap();
            state.is_committed = false;
            state.places.values().for_each(|place| *place.prepared.lock().unwrap() = None);
        };
        let whole = go().0.unwrap().wire_bytes;
        forget();
        let (sent, received) = go();
        let sent = sent.unwrap();
        assert!(sent.resumed && received.unwrap().resumed && cargo.is_on(&shelf));
        assert!(sent.wire_bytes < whole / 10, "{} of {whole}", sent.wire_bytes);
        // What is different there is sent again, the rest is not.
        forget();
        let place = shelf.0.lock().unwrap().places["vda"].clone();
        place.disk.with(UNIT, 1, |bytes| bytes[0] ^= 1);
        let sent = go().0.unwrap();
        assert!(cargo.is_on(&shelf));
        assert!((100_000..whole - 60_000).contains(&sent.wire_bytes), "{}", sent.wire_bytes);
    }
}
