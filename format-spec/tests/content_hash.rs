//! The content hash against a naive implementation of SPEC 2 and against the vectors written there.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::single_range_in_vec_init)]

use format_spec::content_hash::*;
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;

/// SPEC 2 word by word: all leaves first, then level by level, each padded with one zero subtree.
mod naive {
    pub(crate) fn top(disk: &[u8]) -> [u8; 32] {
        let key =
            |text: &str| -> [u8; 32] { format!("{text:<32}").into_bytes().try_into().unwrap() };
        let leaf_key = key("bitferry bf1 content leaf");
        let node_key = key("bitferry bf1 content node");
        let mut level: Vec<[u8; 32]> = disk
            .chunks(65536)
            .map(|chunk| {
                let mut leaf = chunk.to_vec();
                leaf.resize(65536, 0);
                *blake3::keyed_hash(&leaf_key, &leaf).as_bytes()
            })
            .collect();
        let mut zero = *blake3::keyed_hash(&leaf_key, &[0; 65536]).as_bytes();
        for _ in 0..47 {
            let above = |pair: &[[u8; 32]]| {
                let right = pair.get(1).unwrap_or(&zero);
                *blake3::keyed_hash(&node_key, &[pair[0], *right].concat()).as_bytes()
            };
            level = level.chunks(2).map(above).collect();
            zero = above(&[zero, zero]);
        }
        level.first().copied().unwrap_or(zero)
    }

    pub(crate) fn content_hash(disk: &[u8], size: u64) -> String {
        let mut text = size.to_le_bytes().to_vec();
        text.extend(top(disk));
        named("bf1:", b"bitferry bf1 content root       ", &text)
    }

    pub(crate) fn bitmap_digest(granularity: u64, bits: u64, bytes: &[u8]) -> String {
        let mut text = granularity.to_le_bytes().to_vec();
        text.extend(bits.to_le_bytes());
        text.extend(top(bytes));
        named("bf1b:", b"bitferry bf1 bitmap digest      ", &text)
    }

    fn named(prefix: &str, key: &[u8; 32], text: &[u8]) -> String {
        format!("{prefix}{}", blake3::keyed_hash(key, text).to_hex())
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

/// Bytes that differ everywhere and are easy to make in any language: the low byte of
/// `(n * 2654435761) >> 16`.
fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|n| (n.wrapping_mul(2_654_435_761) >> 16) as u8).collect()
}

fn hash(disk: &[u8]) -> ContentHash {
    let mut tree = Tree::new(disk.len() as u64).unwrap();
    for placed in hash_run(0, disk, is_zero) {
        tree.put(placed.height, placed.index, placed.node).unwrap();
    }
    tree.root().unwrap()
}

fn zeroes(size: u64) -> ContentHash {
    let mut tree = Tree::new(size).unwrap();
    tree.put_zeroes(0..leaf_count(size)).unwrap();
    assert!(tree.fragments() <= 1, "zeroes cost {} fragments", tree.fragments());
    tree.root().unwrap()
}

fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(8).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect()
}

/// Value of the first table row of SPEC.md that has `name` in its first column.
fn vector(name: &str) -> String {
    let spec = include_str!("../SPEC.md");
    let row = spec.lines().find(|line| line.starts_with(&format!("| {name} |")));
    let row = row.unwrap_or_else(|| panic!("SPEC.md has no vector {name:?}"));
    row.split('`').nth(1).unwrap().to_owned()
}

#[test]
fn the_vectors_of_the_spec_hold() {
    let data = pattern(3 * MIB as usize + 512);
    let mut one = vec![0; MIB as usize];
    one[65536..131_072].fill(0xff);
    for (name, disk) in [
        ("empty disk", &[][..]),
        ("one sector of zeroes", &[0; 512]),
        ("one sector of 0xff", &[0xff; 512]),
        ("1 MiB, leaf 1 is 0xff", &one),
        ("pattern of 3 MiB and 512 bytes", &data),
    ] {
        assert_eq!(naive::content_hash(disk, disk.len() as u64), vector(name), "{name}");
        assert_eq!(hash(disk).to_string(), vector(name), "{name}");
    }
    // All leaves below 2^47 are zeroes either way, so the naive top of nothing is that of 16 TiB.
    assert_eq!(naive::content_hash(&[], 16 * TIB), vector("16 TiB of zeroes"));
    assert_eq!(zeroes(16 * TIB).to_string(), vector("16 TiB of zeroes"));
}

#[test]
fn the_bitmap_vectors_of_the_spec_hold() {
    let mut small = vec![0; 8];
    small[0] = 0x04;
    small[6] = 0x01;
    let mut large = pattern(200_000);
    large[70_000..140_000].fill(0);
    for (name, granularity, bits, bytes) in [
        ("bits 2 and 48 of 64, granularity 65536", 65536, 64, small),
        ("no bit of 100, granularity 512", 512, 100, vec![0; 16]),
        (
            "pattern of 1600000 bits, bytes 70000 to 139999 zero, granularity 4096",
            4096,
            1_600_000,
            large,
        ),
    ] {
        assert_eq!(naive::bitmap_digest(granularity, bits, &bytes), vector(name), "{name}");
        assert_eq!(
            bitmap_digest(granularity, bits, &words(&bytes)).unwrap().to_string(),
            vector(name)
        );
        let mut builder = DigestBuilder::new(granularity, bits).unwrap();
        for (at, leaf) in bytes.chunks(LEAF_BYTES).enumerate().rev() {
            builder.put((at * LEAF_BYTES) as u64, leaf).unwrap();
        }
        assert_eq!(builder.finish().to_string(), vector(name), "{name} from bytes");
    }
}

#[test]
fn bits_beyond_the_last_granule_do_not_count() {
    let clean = bitmap_digest(512, 100, &[u64::MAX, (1 << 36) - 1]).unwrap();
    assert_eq!(bitmap_digest(512, 100, &[u64::MAX, u64::MAX, 7]).unwrap(), clean);
    let mut builder = DigestBuilder::new(512, 100).unwrap();
    builder.put(0, &[0xff; 16]).unwrap();
    assert_eq!(builder.finish(), clean);
    assert_ne!(bitmap_digest(1024, 100, &[u64::MAX, u64::MAX]).unwrap(), clean);
}

#[test]
fn names_are_read_as_they_are_written() {
    let hash = zeroes(4096);
    assert_eq!(hash.to_string().parse::<ContentHash>().unwrap(), hash);
    assert_eq!(hash.to_string().len(), 68);
    let upper = format!("bf1:{}", "A".repeat(64));
    for bad in ["", "bf1:", "bf1b:00", &hash.to_string()[..67], &upper, &format!("{hash}0")] {
        assert!(bad.parse::<ContentHash>().is_err(), "{bad:?}");
    }
    assert!(hash.to_string().parse::<BitmapDigest>().is_err());
}

#[test]
fn size_is_part_of_the_root_and_has_a_limit() {
    assert_ne!(zeroes(512), zeroes(1024));
    assert_ne!(zeroes(MAX_SIZE), zeroes(MAX_SIZE - 512));
    assert!(matches!(Tree::new(MAX_SIZE + 512), Err(HashError::TooLarge { .. })));
    let mut tree = Tree::new(MIB).unwrap();
    assert!(matches!(tree.put(0, 16, zero_node(0)), Err(HashError::Outside { leaf: 16, .. })));
    assert!(tree.put(48, 0, zero_node(0)).is_err());
    assert!(tree.put(3, u64::MAX, zero_node(3)).is_err());
    assert!(tree.put_zeroes(0..17).is_err());
}

#[test]
fn what_is_missing_is_named() {
    let mut tree = Tree::new(10 * MIB).unwrap();
    assert_eq!(tree.root().unwrap_err().leaves, 0..160);
    tree.put_zeroes(0..16).unwrap();
    tree.put(LEDGER_HEIGHT, 9, leaf(b"x")).unwrap();
    assert_eq!(tree.missing().collect::<Vec<_>>(), [16..144]);
    assert_eq!(tree.root().unwrap_err().to_string(), "no hash for leaves 16 to 143");
    tree.put_zeroes(17..144).unwrap();
    assert_eq!(tree.missing().collect::<Vec<_>>(), [16..17]);
    tree.put(0, 16, zero_node(0)).unwrap();
    assert!(tree.root().is_ok());
}

#[test]
fn a_resend_replaces_and_loses_no_more_than_its_subtree() {
    let first = pattern(4 * MIB as usize);
    let mut second = first.clone();
    second[MIB as usize..2 * MIB as usize].fill(9);
    second[3 * MIB as usize..3 * MIB as usize + 65536].fill(0);

    let mut tree = Tree::keeping(4 * MIB, LEDGER_HEIGHT).unwrap();
    for placed in hash_run(0, &first, is_zero) {
        assert_eq!(placed.height, 6);
    }
    for (unit, bytes) in first.chunks(MIB as usize).enumerate() {
        tree.put(LEDGER_HEIGHT, unit as u64, subtree(LEDGER_HEIGHT, bytes, &is_zero)).unwrap();
    }
    assert_eq!(tree.root().unwrap(), hash(&first));
    let unit = subtree(LEDGER_HEIGHT, &second[MIB as usize..2 * MIB as usize], &is_zero);
    tree.put(LEDGER_HEIGHT, 1, unit).unwrap();
    tree.put(0, 48, zero_node(0)).unwrap();
    assert_eq!(tree.missing().collect::<Vec<_>>(), [49..64]);
    for placed in hash_run(49, &second[49 * 65536..], is_zero) {
        tree.put(placed.height, placed.index, placed.node).unwrap();
    }
    assert_eq!(tree.root().unwrap(), hash(&second));
    assert_eq!(tree.get(LEDGER_HEIGHT, 1), Some(unit));
    assert_eq!(tree.fragments(), 4);
}

#[test]
fn the_last_leaf_of_a_disk_may_be_replaced_alone() {
    let mut tree = Tree::keeping(5 * 65536, 0).unwrap();
    tree.put_zeroes(0..5).unwrap();
    tree.put(0, 4, leaf(b"old")).unwrap();
    tree.put(0, 4, leaf(b"new")).unwrap();
    let mut disk = vec![0; 5 * 65536];
    disk[4 * 65536..4 * 65536 + 3].copy_from_slice(b"new");
    assert_eq!(tree.root().unwrap(), hash(&disk));
}

#[test]
fn sixteen_tebibytes_keep_no_nodes() {
    // Full, in order, by MiB: what is folded is gone. Nodes of one value make the check cheap.
    let mut tree = Tree::new(TIB).unwrap();
    let node = leaf(b"data");
    let mut most = 0;
    for unit in 0..TIB / MIB {
        tree.put(LEDGER_HEIGHT, unit, node).unwrap();
        most = most.max(tree.fragments());
    }
    assert!(most <= 21, "{most} fragments");
    assert!(tree.root().is_ok());
    // One leaf at every 4 GiB of 16 TiB, the rest zero.
    let mut tree = Tree::new(16 * TIB).unwrap();
    for at in (0..16 * TIB).step_by(1 << 32) {
        let first = at / 65536;
        tree.put_zeroes(first..first + (1 << 16)).unwrap();
        tree.put(0, first, node).unwrap();
    }
    assert!(tree.fragments() < 1 << 17);
}

#[test]
fn too_many_fragments_are_refused() {
    let mut tree = Tree::new(MAX_SIZE).unwrap();
    let node = leaf(b"data");
    let refused = (0..).map(|n| tree.put(0, 2 * n, node)).position(|r| r.is_err());
    assert_eq!(refused, Some(MAX_FRAGMENTS));
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn order_and_cuts_do_not_matter(
        len in 1usize..2_600_000,
        holes in proptest::collection::vec((0usize..2_600_000, 1usize..400_000), 0..4),
        cuts in proptest::collection::vec(1u64..40, 0..8),
        keep in 0u8..48,
        reverse: bool,
    ) {
        let mut disk = pattern(len);
        for (at, count) in holes {
            let at = at.min(len);
            disk[at..(at + count).min(len)].fill(0);
        }
        let mut bounds: Vec<usize> = cuts.iter().map(|c| (*c as usize * 65536).min(len)).collect();
        bounds.extend([0, len]);
        bounds.sort_unstable();
        let mut runs: Vec<_> = bounds.windows(2).map(|w| (w[0], &disk[w[0]..w[1]])).collect();
        if reverse {
            runs.reverse();
        }
        let mut tree = Tree::keeping(len as u64, keep).unwrap();
        for (start, bytes) in runs {
            let first = (start / 65536) as u64;
            if is_zero(bytes) {
                tree.put_zeroes(first..first + leaf_count(bytes.len() as u64)).unwrap();
            } else {
                for placed in hash_run(first, bytes, is_zero) {
                    tree.put(placed.height, placed.index, placed.node).unwrap();
                }
            }
        }
        prop_assert_eq!(tree.root().unwrap().to_string(), naive::content_hash(&disk, len as u64));
    }

    #[test]
    fn any_sequence_of_puts_ends_as_the_last_ones_say(
        puts in proptest::collection::vec((0u8..5, 0u64..40, 0u8..3), 1..60),
    ) {
        // A model that keeps each of 40 leaves apart; a subtree put whole has leaves of one value.
        const LEAVES: u64 = 40;
        let mut tree = Tree::keeping(LEAVES * 65536, 2).unwrap();
        let value = |v: u8| if v == 0 { zero_node(0) } else { leaf(&[v]) };
        let mut model = vec![None; LEAVES as usize];
        let node_over = |leaves: &[Option<u8>], height: u8| {
            let mut level: Vec<Node> = leaves.iter().map(|v| value(v.unwrap_or(0))).collect();
            level.resize(1 << height, zero_node(0));
            while level.len() > 1 {
                level = level.chunks(2).map(|p| parent(&p[0], &p[1])).collect();
            }
            level[0]
        };
        for (height, leaf, v) in puts {
            let first = leaf >> height << height;
            let span = (first as usize)..((first as usize + (1 << height)).min(LEAVES as usize));
            model[span.clone()].fill(Some(v));
            tree.put(height, first >> height, node_over(&model[span], height)).unwrap();
            // Leaves may go missing when part of a folded subtree is replaced; never the reverse.
            for gap in tree.missing() {
                for leaf in gap {
                    prop_assert!(!(first..first + (1 << height)).contains(&leaf));
                }
            }
        }
        let missing: Vec<u64> = tree.missing().flatten().collect();
        for leaf in missing {
            let v = model[leaf as usize].get_or_insert(0);
            tree.put(0, leaf, value(*v)).unwrap();
        }
        let mut level = node_over(&model, 6);
        for height in 6..TREE_HEIGHT {
            level = parent(&level, &zero_node(height));
        }
        let mut text = (LEAVES * 65536).to_le_bytes().to_vec();
        text.extend(level);
        prop_assert_eq!(tree.root().unwrap().0, *blake3::keyed_hash(ROOT_KEY, &text).as_bytes());
    }
}
