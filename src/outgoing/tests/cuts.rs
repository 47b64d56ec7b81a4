//! Connections that are cut or flip a bit, at every place.

use std::sync::atomic::Ordering;

use super::net::Acks;
use super::*;

/// What an attempt with a fault must keep to, and a second one without must bring about.
fn survive(cargo: &Cargo, fault: Fault, way: Way) -> bool {
    let shelf = Arc::new(Shelf::default());
    let (sent, received) = attempt(cargo, &shelf, &Net::new(Some(fault)), way);
    let committed = shelf.0.lock().unwrap().is_committed;
    match &sent {
        Ok(Sent { outcome: Outcome::Completed | Outcome::AlreadyComplete(_), .. }) => {
            assert!(committed, "{fault:?}: the source believes in success");
        }
        // COMMIT had begun to go out: the destination may have published.
        Ok(Sent { outcome: Outcome::Unknown(_), .. }) => {}
        Ok(other) => panic!("{fault:?}: {other:?}"),
        Err(_) => assert!(!committed, "{fault:?}: the source rolled back, the other side did not"),
    }
    assert_eq!(received.is_ok(), committed, "{fault:?}: {received:?}");
    assert!(!committed || cargo.is_on(&shelf), "{fault:?}: something else was published");
    // The same command again.
    let (again, received) = attempt(cargo, &shelf, &Net::new(None), way);
    let again = again.unwrap_or_else(|error| {
        panic!("{fault:?}: the second attempt fails: {error}, {received:?}")
    });
    let is_known = matches!(again.outcome, Outcome::AlreadyComplete(_));
    assert_eq!(is_known, committed, "{fault:?}: {:?}", again.outcome);
    assert!(is_known || matches!(again.outcome, Outcome::Completed), "{fault:?}");
    assert!(cargo.is_on(&shelf), "{fault:?}");
    assert_eq!(shelf.0.lock().unwrap().commits, 1, "{fault:?}");
    sent.is_ok_and(|sent| matches!(sent.outcome, Outcome::Completed))
}

/// Bytes that pass in each direction of each connection, and a little more.
const MAIN_BYTES: u64 = 270_000;
const BACK_BYTES: u64 = 900;

#[test]
fn a_cut_of_the_only_connection_at_any_byte() {
    let cargo = Cargo::small();
    let from_source = (0..500).chain((500..MAIN_BYTES).step_by(7_013));
    let from_destination = (0..BACK_BYTES).step_by(3);
    let mut completed = [0; 2];
    for (is_source, at) in
        from_source.map(|at| (true, at)).chain(from_destination.map(|at| (false, at)))
    {
        let fault = Fault { connection: 0, from_source: is_source, at, is_flip: false };
        completed[usize::from(is_source)] += usize::from(survive(&cargo, fault, PLAIN));
    }
    assert!(completed.iter().all(|n| *n > 0), "the cuts do not reach the end: {completed:?}");
}

#[test]
fn a_cut_around_the_handover_at_any_byte() {
    // The last bytes before the end: seals, PREPARE, COMMIT, END elements, EOF.
    let cargo =
        Cargo { disks: vec![("vda".into(), MemoryDisk::new(vec![0; 512]))], bitmaps: vec![] };
    let total = attempt(&cargo, &Arc::default(), &Net::new(None), PLAIN).0.unwrap().wire_bytes;
    let mut unknown = 0;
    for at in 0..total {
        let fault = Fault { connection: 0, from_source: true, at, is_flip: false };
        unknown += usize::from(!survive(&cargo, fault, PLAIN));
    }
    assert!(unknown > 100);
}

#[test]
fn a_cut_of_any_of_three_connections() {
    let cargo = Cargo::small();
    let way = Way { channels: 3, ..PLAIN };
    for connection in 0..3 {
        for at in (0..400).step_by(11).chain((400..60_000).step_by(9_001)) {
            let fault = Fault { connection, from_source: true, at, is_flip: false };
            survive(&cargo, fault, way);
        }
    }
}

#[test]
fn a_flipped_bit_is_seen() {
    let cargo = Cargo::small();
    for at in (0..700).chain((700..200_000).step_by(5_007)) {
        let fault = Fault { connection: 0, from_source: true, at, is_flip: true };
        let shelf = Arc::new(Shelf::default());
        let (sent, received) = attempt(&cargo, &shelf, &Net::new(Some(fault)), PLAIN);
        // The program's name in the hello has a checksum too.
        assert!(sent.is_err() && received.is_err(), "bit flipped at {at}: {sent:?}");
        assert!(!shelf.0.lock().unwrap().is_committed);
    }
}

/// A big bitmap of two leaves: what of it had arrived is not sent again.
#[test]
fn bitmaps_that_arrived_are_not_sent_again() {
    const GRANULES: u64 = 600_000;
    let disk = MemoryDisk::new(vec![0; 512 * usize::try_from(GRANULES).unwrap()]);
    let mut bits = Bits::for_disk(512 * GRANULES, 9);
    (0..GRANULES).filter(|n| n * n % 7 < 3).for_each(|n| bits.set_range(n..n + 1));
    let bitmap = |bits: &Bits| Bitmap {
        name: "big".to_owned(),
        granularity_bits: 9,
        is_enabled: true,
        bits: bits.clone(),
    };
    let mut cargo =
        Cargo { disks: vec![("vda".to_owned(), disk)], bitmaps: vec![(0, bitmap(&bits))] };
    let net = Net::new(None);
    let whole = attempt(&cargo, &Arc::default(), &net, PLAIN).0.unwrap().wire_bytes;
    assert!(whole > 74_000, "{whole}");
    // The last barrier stands behind all pieces and before PREPARE. Where it cannot be answered,
    // all before it has arrived.
    let (shelf, mut cut) = (Arc::new(Shelf::default()), Net::new(None));
    let cut_at = Some(net.acks.said.load(Ordering::Relaxed));
    cut.acks = Arc::new(Acks { cut_at, ..Acks::default() });
    attempt(&cargo, &shelf, &cut, PLAIN).0.unwrap_err();
    let place = shelf.0.lock().unwrap().places.get("vda").cloned().unwrap();
    assert!(place.prepared.lock().unwrap().is_none());
    // It has changed a little since: bits that were set are not, in its second leaf.
    let mut changed = bits.clone();
    changed.clear_range(550_000..599_990);
    cargo.bitmaps = vec![(0, bitmap(&changed))];
    let (sent, received) = attempt(&cargo, &shelf, &Net::new(None), PLAIN);
    let sent = sent.unwrap();
    assert!(matches!(sent.outcome, Outcome::Completed) && received.unwrap().resumed);
    assert!(cargo.is_on(&shelf));
    assert!(sent.wire_bytes < 16_000, "what has arrived is sent again: {}", sent.wire_bytes);
}
