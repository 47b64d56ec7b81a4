use super::*;
use crate::ledger::{Entry, UNIT_BYTES};
use format_spec::content_hash::leaf;
use proptest::prelude::*;
use qcow2_file::Memory;
use qcow2_file::storage::{Fault, OperationKind};
use std::time::Duration;

const UNITS: u64 = 3000;

fn identity() -> Identity {
    Identity { session: [7; 16], size: UNITS * UNIT_BYTES - 512, target: "qcow2".into() }
}

fn prepared(byte: u8) -> Prepared {
    Prepared { root: ContentHash([byte; 32]), stamps: vec![[byte; 16], [byte + 1; 16]] }
}

fn node(number: u64) -> Node {
    leaf(&number.to_le_bytes())
}

fn storage(file: &Arc<Memory>) -> Arc<dyn Storage> {
    file.clone()
}

fn replayed(file: &Memory) -> Replayed {
    match replay(file, &identity()).unwrap() {
        Found::Journal(found) => *found,
        other => panic!("{other:?}"),
    }
}

fn entries(ledger: &mut Ledger) -> Vec<Entry> {
    (0..UNITS).map(|unit| ledger.get(unit).unwrap()).collect()
}

#[derive(Debug, Clone)]
enum Step {
    Units(u64, u64, u64),
    Zeroes(u64, u64),
    TakeBack(u64, u64),
    Prepare,
    Unprepare,
    Rewrite,
}

fn step() -> impl Strategy<Value = Step> {
    let run = || (0..UNITS, 1..400u64).prop_map(|(first, n)| (first, n.min(UNITS - first)));
    prop_oneof![
        6 => (run(), 0..3u64).prop_map(|((first, n), kind)| Step::Units(first, n, kind)),
        2 => run().prop_map(|(first, n)| Step::Zeroes(first, n)),
        2 => run().prop_map(|(first, n)| Step::TakeBack(first, n)),
        1 => Just(Step::Prepare),
        1 => Just(Step::Unprepare),
        1 => Just(Step::Rewrite),
    ]
}

fn act(journal: &mut Journal, file: &mut Arc<Memory>, step: &Step) {
    match *step {
        Step::Units(first, n, kind) => {
            let nodes: Vec<_> = (0..n).map(|i| node(i % 5 + kind * 100)).collect();
            journal.units(first, &nodes).unwrap();
        }
        Step::Zeroes(first, n) => journal.zeroes(first..first + n).unwrap(),
        Step::TakeBack(first, n) => journal.take_back(first..first + n).unwrap(),
        Step::Prepare => journal.prepare(prepared(9)).unwrap(),
        Step::Unprepare => journal.unprepare().unwrap(),
        Step::Rewrite => {
            let anew = Arc::new(Memory::new());
            journal.rewrite(storage(&anew)).unwrap();
            *file = anew;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn what_is_read_back_is_what_was_claimed(
        steps in proptest::collection::vec(step(), 0..30),
        garbage in proptest::collection::vec(any::<u8>(), 0..40),
    ) {
        let mut file = Arc::new(Memory::new());
        let mut journal = Journal::start(storage(&file), identity()).unwrap();
        for step in &steps {
            act(&mut journal, &mut file, step);
        }
        let end = file.len().unwrap();
        file.write_at(&garbage, end).unwrap();
        let mut found = replayed(&file);
        prop_assert_eq!(found.end, end);
        prop_assert_eq!(entries(&mut found.claims), entries(journal.claims()));
        if found.prepared.is_some() {
            prop_assert_eq!(found.prepared.as_ref(), journal.prepared());
        }
        let mut again = Journal::resume(storage(&file), found).unwrap();
        again.units(5, &[node(77)]).unwrap();
        prop_assert_eq!(replayed(&file).claims.get(5).unwrap(), Entry::Node(node(77)));
    }

    /// Any flipped bit, any cut: what is left is the claims of some earlier moment, or nothing.
    #[test]
    fn damage_leaves_an_earlier_state(
        steps in proptest::collection::vec(step(), 1..12),
        at in any::<prop::sample::Index>(),
        bit in 0..9u32,
    ) {
        let mut file = Arc::new(Memory::new());
        let mut journal = Journal::start(storage(&file), identity()).unwrap();
        let mut states = vec![entries(journal.claims())];
        for step in &steps {
            // One claim is one record, so that states are those between records.
            if matches!(step, Step::Units(..) | Step::Zeroes(..)) {
                act(&mut journal, &mut file, step);
                states.push(entries(journal.claims()));
            }
        }
        let mut bytes = file.to_bytes();
        let at = at.index(bytes.len());
        match bit {
            8 => bytes.truncate(at),
            bit => bytes[at] ^= 1 << bit,
        }
        match replay(&Memory::from_bytes(&bytes), &identity()).unwrap() {
            Found::Journal(mut found) => prop_assert!(states.contains(&entries(&mut found.claims))),
            Found::Nothing | Found::Other(_) => prop_assert!(at < 100, "{at}"),
        }
    }

    #[test]
    fn noise_is_no_journal_and_costs_little(
        bytes in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        let mut file = Vec::new();
        encode_start(JOURNAL_MAGIC, &mut file);
        file.extend(bytes);
        prop_assert!(!matches!(
            replay(&Memory::from_bytes(&file), &identity()).unwrap(),
            Found::Journal(_)
        ));
    }
}

#[test]
fn a_journal_of_something_else_is_told_apart() {
    let file = Arc::new(Memory::new());
    Journal::start(storage(&file), identity()).unwrap();
    for change in [
        |i: &mut Identity| i.session = [8; 16],
        |i: &mut Identity| i.size += 512,
        |i: &mut Identity| i.target.push('x'),
    ] {
        let mut other = identity();
        change(&mut other);
        assert!(matches!(replay(&*file, &other).unwrap(), Found::Other(i) if i == identity()));
    }
    assert!(matches!(peek(&*file).unwrap(), Found::Journal(_)));
    assert!(matches!(replay(&Memory::new(), &identity()).unwrap(), Found::Nothing));
}

#[test]
fn claims_beyond_the_disk_end_the_journal() {
    let file = Arc::new(Memory::new());
    let mut journal = Journal::start(storage(&file), identity()).unwrap();
    journal.units(1, &[node(1)]).unwrap();
    let mut bytes = file.to_bytes();
    let end = bytes.len() as u64;
    let nodes = [node(2)];
    JournalRecord::Units(UnitNodes { first: UNITS, nodes: &nodes }).encode(&mut bytes);
    JournalRecord::Units(UnitNodes { first: 2, nodes: &nodes }).encode(&mut bytes);
    let mut found = replayed(&Memory::from_bytes(&bytes));
    assert_eq!((found.end, found.claims.get(2).unwrap()), (end, Entry::Unknown));
}

#[test]
fn prepared_and_committed_are_the_last_word_or_nothing() {
    let file = Arc::new(Memory::new());
    let mut journal = Journal::start(storage(&file), identity()).unwrap();
    journal.commit().unwrap();
    assert!(!replayed(&file).is_committing, "nothing was prepared");
    journal.prepare(prepared(3)).unwrap();
    assert_eq!(replayed(&file).prepared, Some(prepared(3)));
    journal.commit().unwrap();
    assert!(replayed(&file).is_committing);
    journal.unprepare().unwrap();
    assert_eq!(replayed(&file).prepared, None);
    journal.prepare(prepared(3)).unwrap();
    journal.zeroes(0..1).unwrap();
    assert_eq!(replayed(&file).prepared, None, "what was written since is not proved");
}

#[test]
fn it_does_not_grow_without_bound() {
    let mut file = Arc::new(Memory::new());
    let mut journal = Journal::start(storage(&file), identity()).unwrap();
    let nodes: Vec<_> = (0..1000).map(node).collect();
    let mut rewrites = 0;
    for round in 0..200 {
        journal.take_back(0..1000).unwrap();
        journal.units(round, &nodes).unwrap();
        if journal.is_bloated().unwrap() {
            act(&mut journal, &mut file, &Step::Rewrite);
            rewrites += 1;
        }
    }
    assert!(rewrites > 0);
    assert!(file.len().unwrap() < 3 * JOURNAL_SLACK_BYTES + 4 * 32 * UNITS);
    assert_eq!(entries(&mut replayed(&file).claims), entries(journal.claims()));
}

/// What a full file system takes: as much as it has given before.
#[derive(Debug)]
struct Full {
    file: Memory,
    /// What room was taken for.
    taken: std::sync::atomic::AtomicU64,
    is_full: std::sync::atomic::AtomicBool,
}

impl Full {
    fn take(&self, end: u64) -> io::Result<()> {
        use std::sync::atomic::Ordering::Relaxed;
        if self.is_full.load(Relaxed) && end > self.taken.load(Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.taken.fetch_max(end, Relaxed);
        Ok(())
    }
}

impl Storage for Full {
    fn name(&self) -> Arc<str> {
        "full".into()
    }

    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.take(offset + buf.len() as u64)?;
        self.file.write_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.write_zeroes(offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.take(offset + len)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.taken.store(len, std::sync::atomic::Ordering::Relaxed);
        self.file.set_len(len)
    }

    fn run_at(&self, offset: u64, max_len: u64) -> io::Result<qcow2_file::storage::Run> {
        self.file.run_at(offset, max_len)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

#[test]
fn there_is_room_for_the_last_words_where_nothing_else_has_any() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    let file = Full { file: Memory::new(), taken: AtomicU64::new(0), is_full: false.into() };
    let file = Arc::new(file);
    let set_full = |is_full: bool| {
        let flag: &AtomicBool = &file.is_full;
        flag.store(is_full, Ordering::Relaxed);
    };
    let nodes: Vec<_> = (0..300).map(node).collect();
    let mut journal = Journal::start(file.clone(), identity()).unwrap();
    for round in 0..5 {
        set_full(false);
        journal.units(round * 300, &nodes).unwrap();
        set_full(true);
        journal.units(round * 300 + 7, &nodes).unwrap();
        journal.prepare(prepared(1)).unwrap();
        // Who goes on while it is still full can speak as well.
        drop(journal);
        let found = replayed(&file.file);
        assert_eq!(found.prepared, Some(prepared(1)));
        journal = Journal::resume(file.clone(), found).unwrap();
        journal.unprepare().unwrap();
    }
    let far: Vec<_> = (0..2000).map(node).collect();
    assert!(journal.units(0, &far).is_err(), "its room is bounded");
}

#[test]
fn a_checkpoint_is_due_by_the_clock() {
    let file = Arc::new(Memory::new());
    let journal = Journal::start(storage(&file), identity()).unwrap();
    let keeper = Keeper::new(journal).unwrap().within(Duration::from_millis(40));
    assert!(!keeper.is_due() && !keeper.is_late());
    std::thread::sleep(Duration::from_millis(60));
    // Told to one, and to nobody while it is made.
    assert!(keeper.is_due() && !keeper.is_due() && !keeper.is_late());
    std::thread::sleep(Duration::from_millis(60));
    let sync = || {
        std::thread::sleep(Duration::from_millis(60));
        assert!(!keeper.is_late());
        Ok::<(), Error>(())
    };
    keeper.checkpoint(sync).unwrap();
}

#[test]
fn a_failing_file_is_an_error_that_names_it() {
    let file = Arc::new(Memory::new());
    let mut journal = Journal::start(storage(&file), identity()).unwrap();
    file.inject(Fault { torn_bytes: 7, ..Fault::new(OperationKind::Write, 0, 28) });
    let error = journal.units(0, &[node(0)]).unwrap_err();
    assert!(matches!(error, Error::Journal { action: "write", .. }), "{error:?}");
    file.clear_faults();
    assert_eq!(replayed(&file).claims.get(0).unwrap(), Entry::Unknown);
}
