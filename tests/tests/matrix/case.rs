//! What a source may look like and what may be asked for, and a sample that meets each pair of
//! choices.

use std::collections::HashSet;

use bitferry_tests::random::Random;

/// How the source is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Qcow2,
    Raw,
    /// A qcow2 with bitmaps over a raw data file.
    RawDataFile,
    /// A qcow2 over a data file that is no image by itself.
    DataFile,
}

/// What lies below the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Below {
    Nothing,
    Raw,
    Longer,
    Shorter,
    /// Three layers.
    Deep,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// The source's format and shape.
    Same,
    /// qcow2 with other options.
    Shape(&'static str),
    /// Version 2, which holds no bitmaps.
    Old,
    Raw,
    /// Overlay with a raw data file.
    RawDataFile,
    /// Into an existing qcow2 with other content and bitmaps.
    InPlace,
    /// Into an existing raw file.
    InPlaceRaw,
    /// In the place of an existing file.
    Force,
    /// Above the source's own backing file.
    Backing,
}

/// One case: a source and what is asked for.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) layout: Layout,
    pub(crate) version: u32,
    pub(crate) cluster: u64,
    pub(crate) compression: Option<&'static str>,
    pub(crate) is_extended: bool,
    pub(crate) refcount_bits: u32,
    pub(crate) below: Below,
    pub(crate) preallocation: &'static str,
    pub(crate) has_snapshot: bool,
    pub(crate) bitmaps: usize,
    pub(crate) granularity: u64,
    pub(crate) size: u64,
    pub(crate) target: Target,
}

const LAYOUTS: &[Layout] =
    &[Layout::Qcow2, Layout::Qcow2, Layout::Raw, Layout::RawDataFile, Layout::DataFile];
const VERSIONS: &[u32] = &[3, 3, 2];
const CLUSTERS: &[u64] = &[512, 4096, 16384, 65536, 1 << 20, 2 << 20];
const COMPRESSIONS: &[Option<&str>] = &[None, None, Some("zlib"), Some("zstd")];
const EXTENDED: &[bool] = &[false, true];
const REFCOUNT_BITS: &[u32] = &[16, 1, 2, 4, 8, 32, 64];
const BELOWS: &[Below] =
    &[Below::Nothing, Below::Nothing, Below::Raw, Below::Longer, Below::Shorter, Below::Deep];
const PREALLOCATIONS: &[&str] = &["off", "metadata", "falloc"];
const SNAPSHOTS: &[bool] = &[false, true];
const BITMAPS: &[usize] = &[0, 1, 3];
const GRANULARITIES: &[u64] = &[512, 4096, 65536, 1 << 20, 1 << 31];
const SIZES: &[u64] =
    &[8 << 20, (8 << 20) - 512, (3 << 20) + 512, 5_244_416, (16 << 20) + 1536, 512];
const TARGETS: &[Target] = &[
    Target::Same,
    Target::Shape("cluster_size=4k"),
    Target::Shape("cluster_size=1M,refcount_bits=64"),
    Target::Shape("extended_l2=on,cluster_size=128k"),
    Target::Shape("compression_type=zstd,cluster_size=64k"),
    Target::Shape("cluster_size=2M,refcount_bits=1"),
    Target::Old,
    Target::Raw,
    Target::RawDataFile,
    Target::InPlace,
    Target::InPlaceRaw,
    Target::Force,
    Target::Backing,
];

const DIMENSIONS: &[usize] = &[
    LAYOUTS.len(),
    VERSIONS.len(),
    CLUSTERS.len(),
    COMPRESSIONS.len(),
    EXTENDED.len(),
    REFCOUNT_BITS.len(),
    BELOWS.len(),
    PREALLOCATIONS.len(),
    SNAPSHOTS.len(),
    BITMAPS.len(),
    GRANULARITIES.len(),
    SIZES.len(),
    TARGETS.len(),
];

impl Case {
    fn of(choice: &[usize]) -> Self {
        Self {
            layout: LAYOUTS[choice[0]],
            version: VERSIONS[choice[1]],
            cluster: CLUSTERS[choice[2]],
            compression: COMPRESSIONS[choice[3]],
            is_extended: EXTENDED[choice[4]],
            refcount_bits: REFCOUNT_BITS[choice[5]],
            below: BELOWS[choice[6]],
            preallocation: PREALLOCATIONS[choice[7]],
            has_snapshot: SNAPSHOTS[choice[8]],
            bitmaps: BITMAPS[choice[9]],
            granularity: GRANULARITIES[choice[10]],
            size: SIZES[choice[11]],
            target: TARGETS[choice[12]],
        }
    }

    /// Makes a choice one that `qemu-img` can create: gives up what the layout has no place for.
    fn mend(choice: &mut [usize]) {
        let case = Self::of(choice);
        if case.layout == Layout::Raw {
            choice[1..=9].fill(0);
            choice[10] = 0;
        } else if case.layout != Layout::Qcow2 {
            // A data file: version 3, nothing compressed, no snapshots.
            (choice[1], choice[3], choice[8]) = (0, 0, 0);
            if case.layout == Layout::RawDataFile {
                choice[6] = 0;
            }
        }
        let case = Self::of(choice);
        if case.version == 2 {
            choice[4] = 0;
            choice[5] = 0;
            choice[9] = 0;
            if case.compression == Some("zstd") {
                choice[3] = 2;
            }
        }
        if Self::of(choice).bitmaps == 0 {
            choice[10] = 0;
        }
        let case = Self::of(choice);
        if case.is_extended && case.cluster < 16384 {
            choice[4] = 0;
        }
        if case.below != Below::Nothing || case.compression.is_some() || case.is_extended {
            choice[7] = 0;
        }
        // Compressed clusters share host clusters, and a snapshot doubles their counts.
        if case.refcount_bits == 1 || case.refcount_bits < 16 && case.compression.is_some() {
            choice[8] = 0;
        }
        if case.target == Target::Backing && case.below == Below::Nothing {
            choice[6] = if case.layout == Layout::RawDataFile || case.layout == Layout::Raw {
                choice[12] = 0;
                0
            } else {
                choice[7] = 0;
                2
            };
        }
    }

    /// Whether the destination can hold bitmaps.
    pub(crate) fn keeps_bitmaps(&self) -> bool {
        let is_raw = self.layout == Layout::Raw && self.target == Target::Same;
        !is_raw && !matches!(self.target, Target::Raw | Target::InPlaceRaw | Target::Old)
    }

    /// Names the case, and is enough to see what is special about it.
    pub(crate) fn name(&self) -> String {
        let mut name = format!("{:?}", self.layout);
        if self.layout != Layout::Raw {
            name += &format!(" v{} {}", self.version, self.cluster);
            name += if self.is_extended { " extended" } else { "" };
            name += &format!(" refcount{}", self.refcount_bits);
        }
        if let Some(method) = self.compression {
            name += &format!(" {method}");
        }
        if self.below != Below::Nothing {
            name += &format!(" on {:?}", self.below);
        }
        if self.preallocation != "off" {
            name += &format!(" {}", self.preallocation);
        }
        name += if self.has_snapshot { " snapshot" } else { "" };
        if self.bitmaps > 0 {
            name += &format!(" {}x{}", self.bitmaps, self.granularity);
        }
        name + &format!(" {} to {:?}", self.size, self.target)
    }
}

/// `count` cases that meet as many pairs of choices as so many can: each is the best of some random
/// ones at meeting pairs that none before it met.
pub(crate) fn sample(random: &mut Random, count: usize) -> Vec<Case> {
    let mut met: HashSet<[usize; 4]> = HashSet::new();
    let mut cases = Vec::new();
    while cases.len() < count {
        let candidates = (0..30).map(|_| {
            let mut choice: Vec<usize> =
                DIMENSIONS.iter().map(|n| random.below(*n as u64) as usize).collect();
            Case::mend(&mut choice);
            choice
        });
        let best = candidates.max_by_key(|c| pairs(c).filter(|p| !met.contains(p)).count());
        let best = best.expect("candidates");
        met.extend(pairs(&best));
        cases.push(Case::of(&best));
    }
    cases
}

fn pairs(choice: &[usize]) -> impl Iterator<Item = [usize; 4]> + '_ {
    let pairs = (0..choice.len()).flat_map(|a| (0..a).map(move |b| (a, b)));
    pairs.map(|(a, b)| [a, choice[a], b, choice[b]])
}
