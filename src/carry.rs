//! Which bitmaps of an image are carried somewhere else, and what is said of them in the end. The
//! same for a copy and for a migration.

use bitmap_mig::{Bitmap, Choice, Decision, Fate, Holder, Problem, Wanted, Wish, decide};
use mig_core::bitmap::BitmapInfo;

use crate::copy::{BitmapSelection, Rename};
use crate::disk::Stored;
use crate::report::{BitmapOutcome, BitmapReport};
use crate::{Error, Result};

/// Stands for bitmaps whose names cannot be known.
const NAMELESS: &str = "*";

/// What was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) bitmaps: BitmapSelection,
    pub(crate) renames: Vec<Rename>,
    pub(crate) skips_broken: bool,
    /// What to do where the other side cannot hold bitmaps.
    pub(crate) hint: &'static str,
}

impl Asked {
    /// What it changes of what arrives, as a phrase: who wishes otherwise gives another command.
    pub(crate) fn wishes(
        bitmaps: &BitmapSelection,
        renames: &[Rename],
        skips_broken: bool,
    ) -> String {
        let broken = if skips_broken { " without broken ones" } else { "" };
        format!("{bitmaps:?} {renames:?}{broken}")
    }
}

/// What was decided about the source's bitmaps.
#[derive(Debug)]
pub(crate) struct BitmapPlan {
    pub(crate) decision: Decision,
    /// Bitmaps that are there and cannot even be listed: why.
    pub(crate) unlistable: Option<String>,
    /// Bitmaps of a destination that is written in place. Those of the same name are replaced.
    pub(crate) found: Vec<String>,
    /// Whether any bitmap was asked for.
    pub(crate) wants_any: bool,
    /// What stands in the way.
    pub(crate) refusals: Vec<Error>,
}

/// The bitmaps that an image lists.
pub(crate) fn listed(stored: &Stored) -> Vec<BitmapInfo> {
    let directory = stored.directory();
    directory.map(|b| b.list().iter().map(bitmap_mig::summary).collect()).unwrap_or_default()
}

/// Decides about the bitmaps of an image.
pub(crate) fn plan(stored: &Stored, asked: &Asked, holder: &Holder) -> BitmapPlan {
    let decision = decide(&listed(stored), &wish(asked), holder);
    let unlistable = stored.unlistable();
    // Where they cannot be listed, one that is named may be among them.
    let is_missing = |problem: &&Problem| matches!(problem, Problem::Missing(_));
    let problems = decision.problems.iter().filter(|p| unlistable.is_none() || !is_missing(p));
    let mut refusals: Vec<Error> = problems.map(|problem| refusal(problem, asked.hint)).collect();
    let is_accepted = asked.skips_broken || asked.bitmaps == BitmapSelection::None;
    if let Some(reason) = unlistable.clone().filter(|_| !is_accepted) {
        let hint = "use --skip-broken-bitmaps to go on without them, or `bitferry bitmap repair`";
        refusals.push(Error::WouldLose { reason, hint: hint.into() });
    }
    let wants_any = asked.bitmaps != BitmapSelection::None;
    BitmapPlan { decision, unlistable, found: Vec::new(), wants_any, refusals }
}

fn wish(asked: &Asked) -> Wish {
    let rename = |r: &Rename| bitmap_mig::Rename { old: r.old.clone(), new: r.new.clone() };
    Wish {
        wanted: match &asked.bitmaps {
            BitmapSelection::All => Wanted::All,
            BitmapSelection::None => Wanted::None,
            BitmapSelection::Named(names) => Wanted::Named(names.clone()),
        },
        renames: asked.renames.iter().map(rename).collect(),
        skips_broken: asked.skips_broken,
    }
}

fn refusal(problem: &Problem, hint: &str) -> Error {
    match problem {
        Problem::Wrong(reason) => Error::Usage { reason: reason.clone() },
        Problem::Missing(name) => {
            Error::Usage { reason: format!("the source has no bitmap {name:?}") }
        }
        Problem::Loses { name, reason, is_broken } => Error::WouldLose {
            reason: format!("bitmap {name:?}: {reason}"),
            hint: if *is_broken {
                "use --skip-broken-bitmaps to go on without it".into()
            } else {
                hint.to_owned()
            },
        },
    }
}

/// Bitmaps that are carried, with their bits and under their new names.
pub(crate) fn load(stored: &Stored, plan: &BitmapPlan) -> Result<Vec<Bitmap>> {
    let Some(directory) = stored.directory() else { return Ok(Vec::new()) };
    let carried = plan.decision.choices.iter().filter_map(|c| match &c.fate {
        Fate::Carried(name) => Some((c, name)),
        Fate::Unwanted | Fate::Left(_) => None,
    });
    carried
        .map(|(choice, name)| {
            let bitmap = bitmap_mig::load(directory, &choice.bitmap.name)?;
            Ok(Bitmap { name: name.clone(), ..bitmap })
        })
        .collect()
}

/// What to say of the source's bitmaps once the carried ones are at the destination. `outcome`:
/// what is known of those.
pub(crate) fn reports(plan: &BitmapPlan, outcome: BitmapOutcome) -> Vec<BitmapReport> {
    let nameless = plan.unlistable.as_ref().map(|reason| BitmapReport {
        name: NAMELESS.into(),
        outcome: BitmapOutcome::Dropped,
        changed: Vec::new(),
        reason: Some(reason.clone()),
        is_wanted: plan.wants_any,
    });
    let choices = plan.decision.choices.iter();
    choices.map(|c| report(c, &plan.found, outcome)).chain(nameless).collect()
}

fn report(choice: &Choice, found: &[String], outcome: BitmapOutcome) -> BitmapReport {
    let name = choice.bitmap.name.clone();
    let dropped = |reason: String, is_wanted| BitmapReport {
        name: name.clone(),
        outcome: BitmapOutcome::Dropped,
        changed: Vec::new(),
        reason: Some(reason),
        is_wanted,
    };
    match &choice.fate {
        Fate::Unwanted => dropped("it was not asked for".into(), false),
        Fate::Left(reason) => dropped(reason.clone(), true),
        Fate::Carried(new) => BitmapReport {
            name: name.clone(),
            outcome,
            changed: changes(&name, new, found),
            reason: None,
            is_wanted: true,
        },
    }
}

fn changes(name: &str, new: &str, found: &[String]) -> Vec<String> {
    let renamed = (name != new).then(|| format!("name: {name} -> {new}"));
    let is_replaced = found.iter().any(|f| f == new);
    let replaced = is_replaced.then(|| "replaces the destination's bitmap of that name".to_owned());
    renamed.into_iter().chain(replaced).collect()
}
