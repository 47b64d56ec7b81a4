//! Random chains of sound images against a model of what a guest reads.

use std::sync::Arc;

use qcow2_file::chain::RawLayer;
use qcow2_file::layout::header::{CompressionType, incompatible};
use qcow2_file::{Chain, ChainKind, GuestOffset, Image, Layer, Memory, Storage};

use crate::campaign::Random;
use crate::hand::Hand;

const ZERO: u64 = 1;

/// A layer, and what it holds of each byte: `None` is what shows the layer below.
struct Modelled {
    layer: Layer,
    bytes: Vec<Option<u8>>,
}

fn image(random: &mut Random) -> Modelled {
    let bits = [9, 10, 12, 14, 16][random.below(5) as usize];
    let is_extended = bits >= 14 && random.below(2) == 0;
    let cluster = 1u64 << bits;
    let size = (random.below(40) + 1) * cluster / 2 / 512 * 512 + 512;
    let mut hand =
        if is_extended { Hand::with_subclusters(bits, size) } else { Hand::new(bits, size) };
    if random.below(2) == 0 {
        hand.header.compression_type = CompressionType::Zstd;
        hand.header.incompatible_features |= incompatible::COMPRESSION_TYPE;
    }
    let mut bytes = vec![None; size.next_multiple_of(cluster) as usize];
    for guest in (0..size).step_by(1 << bits) {
        let covered = &mut bytes[guest as usize..(guest + cluster) as usize];
        let fill = random.below(250) as u8 + 1;
        match random.below(5) {
            0 => {}
            1 => {
                let content: Vec<u8> = (0..cluster).map(|n| (n / 9) as u8 ^ fill).collect();
                hand.compressed(guest, &content);
                covered.iter_mut().zip(content).for_each(|(to, from)| *to = Some(from));
            }
            2 if !is_extended => {
                let host = if random.below(2) == 0 { 0 } else { hand.allocate() };
                let entry = hand.l2_at(guest);
                hand.word(entry, host | ZERO);
                covered.fill(Some(0));
            }
            _ => {
                hand.data(guest, fill);
                covered.fill(Some(fill));
                if is_extended {
                    subclusters(&mut hand, guest, covered, random.next());
                }
            }
        }
    }
    bytes.truncate(size as usize);
    let image = Image::open(hand.finish(), None).unwrap();
    Modelled { layer: Layer::Qcow2(Box::new(image)), bytes }
}

/// Gives each subcluster of a data cluster a state of its own.
fn subclusters(hand: &mut Hand, guest: u64, covered: &mut [Option<u8>], dice: u64) {
    let entry = hand.l2_at(guest);
    let allocated = dice & 0xffff_ffff;
    let zero = (dice >> 32) & !allocated;
    hand.word(entry + 8, zero << 32 | allocated);
    let len = covered.len() / 32;
    for (n, part) in covered.chunks_mut(len).enumerate() {
        if zero >> n & 1 == 1 {
            part.fill(Some(0));
        } else if allocated >> n & 1 == 0 {
            part.fill(None);
        }
    }
}

fn raw(random: &mut Random) -> Modelled {
    let file = Memory::new();
    let size = random.below(600 << 10) + 1;
    file.set_len(size).unwrap();
    let mut bytes = vec![Some(0); size.next_multiple_of(512) as usize];
    for _ in 0..random.below(6) {
        let at = random.below(size);
        let len = random.below(size - at) + 1;
        let fill = random.below(256) as u8;
        file.write_at(&vec![fill; len as usize], at).unwrap();
        bytes[at as usize..(at + len) as usize].fill(Some(fill));
    }
    Modelled { layer: Layer::Raw(RawLayer::open(Arc::new(file)).unwrap()), bytes }
}

/// What the guest reads.
fn expected(layers: &[Modelled]) -> Vec<u8> {
    let see = |at: usize| {
        let mut held = layers.iter().map(|l| l.bytes.get(at));
        // The first layer that is too short ends the search, the first that holds it answers.
        held.find_map(|b| b.map_or(Some(0), |b| *b)).unwrap_or(0)
    };
    (0..layers[0].bytes.len()).map(see).collect()
}

fn check(chain: &Chain, want: &[u8], random: &mut Random, what: &str) {
    let size = want.len() as u64;
    assert_eq!(chain.virtual_size(), size, "{what}");
    for _ in 0..60 {
        let at = random.below(size) as usize;
        let len = (random.below(size) as usize >> random.below(12)).min(want.len() - at);
        let mut buf = vec![0xee; len];
        chain.read_at(&mut buf, GuestOffset(at as u64)).unwrap();
        assert!(buf == want[at..at + len], "{what}: {len} bytes at {at}");
    }
    let mut at = 0;
    while at < size {
        let max_len = random.below(size) + 1;
        let found = chain.extent(GuestOffset(at), max_len).unwrap();
        assert!(found.len >= 1 && found.len <= max_len.min(size - at), "{what}: {found:?} at {at}");
        let part = &want[at as usize..(at + found.len) as usize];
        match (found.kind, found.host) {
            (ChainKind::Zero | ChainKind::Hole, _) => {
                assert!(part.iter().all(|b| *b == 0), "{what}: {found:?} at {at}");
            }
            (ChainKind::Data, Some(host)) => {
                let mut stored = vec![0; part.len()];
                let file = chain.layers()[found.depth].data().unwrap();
                file.read_at(&mut stored, host.0).unwrap();
                assert!(stored == part, "{what}: {found:?} at {at}");
            }
            (ChainKind::Compressed, None) => {}
            _ => panic!("{what}: {found:?} at {at}"),
        }
        at += found.len;
    }
}

#[test]
fn random_chains_read_as_their_model() {
    let mut random = Random::new(0x5eed_0001_5eed_0001);
    for round in 0..150 {
        let mut layers: Vec<_> = (0..=random.below(3)).map(|_| image(&mut random)).collect();
        if random.below(2) == 0 {
            layers.push(raw(&mut random));
        }
        let want = expected(&layers);
        let chain = Chain::from_layers(layers.into_iter().map(|l| l.layer).collect()).unwrap();
        check(&chain, &want, &mut random, &format!("round {round}"));
    }
}
