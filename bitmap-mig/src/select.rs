//! Which bitmaps are carried, under which name, and what stands in the way. Pure.

use std::collections::BTreeSet;

use mig_core::bitmap::{BitmapInfo, granules};

/// Which bitmaps are wanted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Wanted {
    /// Every one.
    #[default]
    All,
    /// None.
    None,
    /// These.
    Named(Vec<String>),
}

/// A new name for a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rename {
    /// Name at the source.
    pub old: String,
    /// Name at the destination.
    pub new: String,
}

/// What the user asked for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wish {
    /// Which bitmaps.
    pub wanted: Wanted,
    /// New names.
    pub renames: Vec<Rename>,
    /// Go on without those that cannot be trusted.
    pub skips_broken: bool,
}

/// What a destination can hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Why it can hold no bitmaps at all, if so: "a raw image has no place for bitmaps".
    pub cannot: Option<String>,
    /// Guest bytes of the disk.
    pub size: u64,
    /// Largest bitmap it takes, in bytes.
    pub max_bytes: u64,
}

/// What is to become of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It is carried under this name.
    Carried(String),
    /// It was not asked for.
    Unwanted,
    /// It is left behind for this reason, which the user accepted.
    Left(String),
}

/// A bitmap of the source and its fate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// What the source says of it.
    pub bitmap: BitmapInfo,
    /// What is to become of it.
    pub fate: Fate,
}

/// Why a wish is not carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// The wish contradicts itself or what is there: the user's mistake.
    Wrong(String),
    /// The source lists no bitmap of this name: the user's mistake, where it lists all it has.
    Missing(String),
    /// Going on would lose a bitmap that is wanted.
    Loses {
        /// The bitmap.
        name: String,
        /// Why it would be lost.
        reason: String,
        /// Whether skipping broken bitmaps would help.
        is_broken: bool,
    },
}

/// The fate of every bitmap, and what stands in the way of going on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Decision {
    /// Every bitmap of the source, in its order.
    pub choices: Vec<Choice>,
    /// Empty if the wish can be carried out.
    pub problems: Vec<Problem>,
}

/// Decides the fate of a source's bitmaps.
pub fn decide(bitmaps: &[BitmapInfo], wish: &Wish, holder: &Holder) -> Decision {
    let mut decision = Decision::default();
    for name in named(wish) {
        if !bitmaps.iter().any(|b| b.name == name) {
            decision.problems.push(Problem::Missing(name.to_owned()));
        }
    }
    let mut taken = BTreeSet::new();
    for bitmap in bitmaps {
        let fate = fate_of(bitmap, wish, holder, &mut decision.problems);
        decision.choices.push(Choice { bitmap: bitmap.clone(), fate });
    }
    for choice in &decision.choices {
        if let Fate::Carried(name) = &choice.fate {
            let problem = bad_name(name).map(str::to_owned).or_else(|| {
                (!taken.insert(name.as_str())).then(|| "is taken by another bitmap".to_owned())
            });
            if let Some(problem) = problem {
                let text = format!("the bitmap name {name:?} {problem}");
                decision.problems.push(Problem::Wrong(text));
            }
        }
    }
    decision
}

/// All names that a wish mentions.
fn named(wish: &Wish) -> impl Iterator<Item = &str> {
    let wanted = match &wish.wanted {
        Wanted::Named(names) => names.as_slice(),
        Wanted::All | Wanted::None => &[],
    };
    let mut seen = BTreeSet::new();
    let names = wanted.iter().chain(wish.renames.iter().map(|r| &r.old));
    names.map(String::as_str).filter(move |name| seen.insert(*name))
}

fn fate_of(bitmap: &BitmapInfo, wish: &Wish, holder: &Holder, problems: &mut Vec<Problem>) -> Fate {
    let is_wanted = match &wish.wanted {
        Wanted::All => true,
        Wanted::None => false,
        Wanted::Named(names) => names.contains(&bitmap.name),
    };
    if !is_wanted {
        return Fate::Unwanted;
    }
    if bitmap.is_inconsistent && wish.skips_broken {
        return Fate::Left("it is inconsistent at the source".to_owned());
    }
    if let Some((reason, is_broken)) = obstacle(bitmap, holder) {
        problems.push(Problem::Loses {
            name: bitmap.name.clone(),
            reason: reason.clone(),
            is_broken,
        });
        return Fate::Left(reason);
    }
    let rename = wish.renames.iter().find(|r| r.old == bitmap.name);
    Fate::Carried(rename.map_or(&bitmap.name, |r| &r.new).clone())
}

/// Why a wanted bitmap cannot be carried, and whether that is its own fault.
fn obstacle(bitmap: &BitmapInfo, holder: &Holder) -> Option<(String, bool)> {
    if bitmap.is_inconsistent {
        return Some(("it is inconsistent at the source".to_owned(), true));
    }
    if let Some(why) = &holder.cannot {
        return Some((why.clone(), false));
    }
    let bytes = granules(holder.size, bitmap.granularity).div_ceil(64).saturating_mul(8);
    (bytes > holder.max_bytes).then(|| {
        let reason = format!(
            "at a granularity of {} it takes {bytes} bytes, the destination holds at most {}",
            bitmap.granularity, holder.max_bytes
        );
        (reason, false)
    })
}

/// What is wrong with a name, as a phrase behind it.
fn bad_name(name: &str) -> Option<&'static str> {
    match name.len() {
        0 => Some("is empty"),
        1..=1023 if name.contains('\0') => Some("contains a zero byte"),
        1..=1023 => None,
        _ => Some("is longer than 1023 bytes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: &str, is_inconsistent: bool) -> BitmapInfo {
        BitmapInfo {
            name: name.into(),
            granularity: 65536,
            is_enabled: true,
            is_persistent: true,
            is_inconsistent,
        }
    }

    fn holder() -> Holder {
        Holder { cannot: None, size: 1 << 30, max_bytes: 512 << 20 }
    }

    fn rename(old: &str, new: &str) -> Rename {
        Rename { old: old.into(), new: new.into() }
    }

    fn carried(decision: &Decision) -> Vec<Option<&str>> {
        decision
            .choices
            .iter()
            .map(|c| match &c.fate {
                Fate::Carried(n) => Some(n.as_str()),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn all_none_and_some() {
        let list = [bitmap("a", false), bitmap("b", false)];
        let wish = |wanted| Wish { wanted, ..Wish::default() };
        assert_eq!(carried(&decide(&list, &wish(Wanted::All), &holder())), [Some("a"), Some("b")]);
        assert_eq!(carried(&decide(&list, &wish(Wanted::None), &holder())), [None, None]);
        let some = wish(Wanted::Named(vec!["b".into()]));
        assert_eq!(carried(&decide(&list, &some, &holder())), [None, Some("b")]);
        let missing = wish(Wanted::Named(vec!["c".into()]));
        assert!(matches!(decide(&list, &missing, &holder()).problems[..], [Problem::Missing(_)]));
    }

    #[test]
    fn names_may_be_swapped_but_not_doubled() {
        let list = [bitmap("a", false), bitmap("b", false)];
        let swap = Wish { renames: vec![rename("a", "b"), rename("b", "a")], ..Wish::default() };
        let decision = decide(&list, &swap, &holder());
        assert_eq!(carried(&decision), [Some("b"), Some("a")]);
        assert!(decision.problems.is_empty());
        let double = Wish { renames: vec![rename("a", "b")], ..Wish::default() };
        assert!(matches!(decide(&list, &double, &holder()).problems[..], [Problem::Wrong(_)]));
        for bad in ["", "x\0y", &"n".repeat(1024)] {
            let wish = Wish { renames: vec![rename("a", bad)], ..Wish::default() };
            assert_eq!(decide(&list, &wish, &holder()).problems.len(), 1, "{bad:?}");
        }
    }

    #[test]
    fn a_broken_bitmap_blocks_unless_skipped_or_unwanted() {
        let list = [bitmap("a", true), bitmap("b", false)];
        let decision = decide(&list, &Wish::default(), &holder());
        assert!(matches!(decision.problems[..], [Problem::Loses { is_broken: true, .. }]));
        let skip = Wish { skips_broken: true, ..Wish::default() };
        let decision = decide(&list, &skip, &holder());
        assert!(decision.problems.is_empty());
        assert_eq!(carried(&decision), [None, Some("b")]);
        let none = Wish { wanted: Wanted::None, ..Wish::default() };
        assert!(decide(&list, &none, &holder()).problems.is_empty());
    }

    #[test]
    fn a_destination_that_cannot_hold_it_blocks() {
        let raw = Holder { cannot: Some("raw".into()), ..holder() };
        let list = [bitmap("a", false)];
        assert!(matches!(
            decide(&list, &Wish::default(), &raw).problems[..],
            [Problem::Loses { is_broken: false, .. }]
        ));
        let huge = Holder { size: 1 << 50, max_bytes: 512 << 20, ..holder() };
        assert_eq!(decide(&list, &Wish::default(), &huge).problems.len(), 1);
    }
}
