//! Which bitmaps of the disks go to QEMU, under which names, and what stands in the way.

use bitmap_mig::{Decision, Fate, Holder, Problem, Wanted, Wish, decide};
use mig_core::bitmap::BitmapInfo;
use qcow2_file::limits::MAX_BITMAP_BYTES;

use super::options::Options;
use crate::Error;
use crate::copy::{BitmapSelection, Rename};

/// Longest name on the wire.
pub(super) const MAX_NAME: usize = 255;

/// Decides about the bitmaps of one disk. What stands in the way is added to `refusals`.
pub(super) fn select(
    (id, size): (&str, u64),
    listed: &[BitmapInfo],
    options: &Options,
    refusals: &mut Vec<Error>,
) -> Decision {
    let has = |name: &str| listed.iter().any(|bitmap| bitmap.name == name);
    let renames = options.renames.iter().filter(|rename| applies(rename, id) && has(&rename.old));
    let mut renames: Vec<_> = renames.collect();
    // The first one counts: what is said of this disk before what is said of all.
    renames.sort_by_key(|rename| rename.node.is_none());
    let wish = Wish {
        wanted: match &options.bitmaps {
            BitmapSelection::All => Wanted::All,
            BitmapSelection::None => Wanted::None,
            BitmapSelection::Named(names) => {
                Wanted::Named(names.iter().filter(|name| has(name)).cloned().collect())
            }
        },
        renames: renames
            .into_iter()
            .map(|r| bitmap_mig::Rename { old: r.old.clone(), new: r.new.clone() })
            .collect(),
        skips_broken: options.skip_broken_bitmaps,
    };
    let holder = Holder { cannot: None, size, max_bytes: MAX_BITMAP_BYTES };
    let decision = decide(listed, &wish, &holder);
    refusals.extend(decision.problems.iter().map(|problem| refusal(id, problem)));
    for choice in &decision.choices {
        if let Fate::Carried(name) = &choice.fate
            && name.len() > MAX_NAME
        {
            refusals.push(Error::WouldLose {
                reason: format!(
                    "bitmap {name:?} of disk {id:?}: its name has {} bytes, and QEMU's stream has \
                     room for {MAX_NAME}",
                    name.len()
                ),
                hint: "give it a shorter one there: --rename-bitmap [NODE/]OLD=NEW".to_owned(),
            });
        }
    }
    decision
}

/// Refuses names that no disk has: `names` are those of each disk, `None` where they cannot be
/// known, so that any name may be among them.
pub(super) fn check_mentions(options: &Options, names: &[(&str, Option<Vec<&str>>)]) -> Vec<Error> {
    let known = |node: Option<&str>, name: &str| {
        let mut disks = names.iter().filter(|(id, _)| node.is_none_or(|node| node == *id));
        disks.any(|(_, names)| names.as_ref().is_none_or(|names| names.contains(&name)))
    };
    let wanted = match &options.bitmaps {
        BitmapSelection::Named(wanted) => wanted.as_slice(),
        BitmapSelection::All | BitmapSelection::None => &[],
    };
    let missing = wanted.iter().filter(|name| !known(None, name));
    let missing = missing.map(|name| format!("no disk has a bitmap {name:?}"));
    let renames = options.renames.iter().filter(|r| !known(r.node.as_deref(), &r.old));
    let renames = renames.map(|r| match &r.node {
        Some(node) => format!("there is no disk {node:?} with a bitmap {:?} to rename", r.old),
        None => format!("no disk has a bitmap {:?} to rename", r.old),
    });
    missing.chain(renames).map(|reason| Error::Usage { reason }).collect()
}

fn applies(rename: &Rename, id: &str) -> bool {
    rename.node.as_deref().is_none_or(|node| node == id)
}

fn refusal(id: &str, problem: &Problem) -> Error {
    match problem {
        Problem::Wrong(reason) => Error::Usage { reason: format!("disk {id:?}: {reason}") },
        Problem::Missing(name) => {
            Error::Usage { reason: format!("disk {id:?} has no bitmap {name:?}") }
        }
        Problem::Loses { name, reason, is_broken } => Error::WouldLose {
            reason: format!("bitmap {name:?} of disk {id:?}: {reason}"),
            hint: if *is_broken {
                "use --skip-broken-bitmaps to go on without it".to_owned()
            } else {
                "use --bitmaps to name those to carry".to_owned()
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: &str) -> BitmapInfo {
        BitmapInfo {
            name: name.to_owned(),
            granularity: 65536,
            is_enabled: true,
            is_persistent: true,
            is_inconsistent: false,
        }
    }

    fn carried(listed: &[&str], id: &str, options: &Options) -> (Vec<Option<String>>, usize) {
        let listed: Vec<_> = listed.iter().map(|name| bitmap(name)).collect();
        let mut refusals = Vec::new();
        let decision = select((id, 1 << 30), &listed, options, &mut refusals);
        let names = decision.choices.into_iter().map(|choice| match choice.fate {
            Fate::Carried(name) => Some(name),
            _ => None,
        });
        (names.collect(), refusals.len())
    }

    fn rename(text: &str) -> Rename {
        text.parse().unwrap()
    }

    #[test]
    fn a_rename_may_be_of_one_disk() {
        let renames = vec![rename("a=z"), rename("d1/a=x"), rename("b=y")];
        let options = Options { renames, ..Options::default() };
        let names = |names: [&str; 2]| names.map(|name| Some(name.to_owned())).to_vec();
        assert_eq!(carried(&["a", "b"], "d1", &options), (names(["x", "y"]), 0));
        assert_eq!(carried(&["a", "b"], "d2", &options), (names(["z", "y"]), 0));
    }

    #[test]
    fn a_name_must_be_known_somewhere() {
        let bitmaps = BitmapSelection::Named(vec!["a".to_owned(), "z".to_owned()]);
        let renames = vec![rename("d1/b=x"), rename("d2/a=x"), rename("q=x"), rename("a=n")];
        let options = Options { bitmaps, renames, ..Options::default() };
        let names = [("d1", Some(vec!["a"])), ("d2", Some(vec!["b"]))];
        let said: Vec<_> = check_mentions(&options, &names).iter().map(|e| e.to_string()).collect();
        assert_eq!(said.len(), 4, "{said:?}");
        assert!(said[0].contains("\"z\"") && said[1].contains("\"d1\""));
        assert_eq!(carried(&["b"], "d2", &options).0, [None]);
        let names = [("d1", Some(vec!["a"])), ("d2", None)];
        assert_eq!(check_mentions(&options, &names).len(), 1, "whatever d2 has, d1 has no b");
    }

    #[test]
    fn a_name_that_is_too_long_needs_another() {
        let long = "n".repeat(256);
        assert_eq!(carried(&[&long], "d", &Options::default()).1, 1);
        assert_eq!(carried(&[&long[1..]], "d", &Options::default()).1, 0);
        let renames = vec![Rename { node: None, old: long.clone(), new: "n".to_owned() }];
        assert_eq!(carried(&[&long], "d", &Options { renames, ..Options::default() }).1, 0);
        let bitmaps = BitmapSelection::None;
        assert_eq!(carried(&[&long], "d", &Options { bitmaps, ..Options::default() }).1, 0);
    }
}
