use super::*;
use format_spec::content_hash::leaf;
use proptest::prelude::*;

const ZERO_UNITS: Range<u64> = 0..0;

/// Room for so few pages that every test spills.
fn small() -> Room {
    Room { pages: 2, directory: std::env::temp_dir() }
}

fn node(number: u64) -> Node {
    leaf(&number.to_le_bytes())
}

#[derive(Debug, Clone)]
enum Step {
    Set(u64, u64),
    Zeroes(Range<u64>),
    Forget(Range<u64>),
    Root,
}

/// Units of the tested disk: some pages and a part of one.
const UNITS: u64 = 5 * PAGE_UNITS + 17;

fn range() -> impl Strategy<Value = Range<u64>> {
    (0..UNITS, 0..UNITS).prop_map(|(a, b)| a.min(b)..a.max(b) + 1)
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (0..UNITS, 0..5u64).prop_map(|(unit, number)| Step::Set(unit, number)),
        2 => range().prop_map(Step::Zeroes),
        1 => range().prop_map(Step::Forget),
        1 => Just(Step::Root),
    ]
}

/// What a plain list of entries hashes to, by way of the tree of the specification.
fn expected(size: u64, model: &[Entry]) -> Option<ContentHash> {
    let mut tree = Tree::new(size).unwrap();
    for (unit, entry) in (0..).zip(model) {
        match entry {
            Entry::Unknown => return None,
            Entry::Zero => tree.put(LEDGER_HEIGHT, unit, zero_node(LEDGER_HEIGHT)).unwrap(),
            Entry::Node(node) => tree.put(LEDGER_HEIGHT, unit, *node).unwrap(),
        }
    }
    tree.root().ok()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn it_is_a_list_of_entries_and_hashes_as_the_tree_does(
        steps in proptest::collection::vec(step(), 0..80),
        tail in 1..UNIT_BYTES / 512,
    ) {
        let size = (UNITS - 1) * UNIT_BYTES + tail * 512;
        let mut ledger = Ledger::with_room(size, small()).unwrap();
        let mut model = vec![Entry::Unknown; usize::try_from(UNITS).unwrap()];
        let index = |units: &Range<u64>| {
            usize::try_from(units.start).unwrap()..usize::try_from(units.end).unwrap()
        };
        for step in steps {
            match step {
                Step::Set(unit, 0) => {
                    ledger.set(unit, zero_node(LEDGER_HEIGHT)).unwrap();
                    model[index(&(unit..unit + 1))].fill(Entry::Zero);
                }
                Step::Set(unit, number) => {
                    ledger.set(unit, node(number)).unwrap();
                    model[index(&(unit..unit + 1))].fill(Entry::Node(node(number)));
                }
                Step::Zeroes(units) => {
                    ledger.set_zeroes(units.clone()).unwrap();
                    model[index(&units)].fill(Entry::Zero);
                }
                Step::Forget(units) => {
                    ledger.forget(units.clone()).unwrap();
                    model[index(&units)].fill(Entry::Unknown);
                }
                Step::Root => prop_assert_eq!(ledger.root().ok(), expected(size, &model)),
            }
        }
        prop_assert_eq!(ledger.root().ok(), expected(size, &model));
        let unknown = model.iter().position(|e| *e == Entry::Unknown).map(|at| at as u64);
        prop_assert_eq!(ledger.first_unknown().unwrap().map(|units| units.start), unknown);
        let mut found = Vec::new();
        while let Some(stretch) = ledger.stretch(found.len() as u64).unwrap() {
            prop_assert!(!stretch.units().is_empty());
            match stretch {
                Stretch::Unknown(units) => found.extend(units.map(|_| Entry::Unknown)),
                Stretch::Zeroes(units) => found.extend(units.map(|_| Entry::Zero)),
                Stretch::Nodes(_, nodes) => found.extend(nodes.iter().map(|n| Entry::Node(*n))),
            }
        }
        prop_assert_eq!(&found, &model);
        for unit in [0, PAGE_UNITS, UNITS - 1] {
            prop_assert_eq!(ledger.get(unit).unwrap(), model[usize::try_from(unit).unwrap()]);
        }
    }
}

#[test]
fn zeroes_cost_nothing_whatever_the_size() {
    let size = MAX_SIZE;
    let mut ledger = Ledger::with_room(size, small()).unwrap();
    assert!(ledger.root().is_err());
    ledger.set_zeroes(0..ledger.units()).unwrap();
    let mut tree = Tree::new(size).unwrap();
    tree.put_zeroes(0..leaf_count(size)).unwrap();
    assert_eq!(ledger.root().unwrap(), tree.root().unwrap());
    ledger.set(ledger.units() / 2, node(1)).unwrap();
    tree.put(LEDGER_HEIGHT, ledger.units() / 2, node(1)).unwrap();
    assert_eq!(ledger.root().unwrap(), tree.root().unwrap());
    assert_eq!(ledger.stretch(5).unwrap().unwrap().units().start, 5);
}

#[test]
fn a_full_disk_spills_and_its_root_is_cheap_the_second_time() {
    let pages = 40;
    let units = pages * PAGE_UNITS;
    let mut ledger = Ledger::with_room(units * UNIT_BYTES, small()).unwrap();
    let mut tree = Tree::new(units * UNIT_BYTES).unwrap();
    for unit in 0..units {
        ledger.set(unit, node(unit)).unwrap();
        tree.put(LEDGER_HEIGHT, unit, node(unit)).unwrap();
    }
    assert_eq!(ledger.root().unwrap(), tree.root().unwrap());
    ledger.set(units / 2, node(7)).unwrap();
    let changed = (0..pages).filter(|page| ledger.shelf.folded(*page).is_none()).count();
    assert_eq!(changed, 1);
    assert_eq!(ledger.get(3 * PAGE_UNITS + 5).unwrap(), Entry::Node(node(3 * PAGE_UNITS + 5)));
}

#[test]
fn what_is_outside_is_refused() {
    let mut ledger = Ledger::new(3 * UNIT_BYTES).unwrap();
    assert!(ledger.set(3, node(1)).is_err());
    assert!(ledger.set_zeroes(0..4).is_err());
    ledger.set_zeroes(ZERO_UNITS).unwrap();
    assert_eq!(ledger.first_unknown().unwrap(), Some(0..3));
    assert!(Ledger::new(MAX_SIZE + 1).is_err());
    let mut empty = Ledger::new(0).unwrap();
    assert_eq!(empty.root().unwrap(), Tree::new(0).unwrap().root().unwrap());
}
