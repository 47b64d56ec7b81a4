//! The verbs that change bitmaps. Silent on success, as `qemu-img bitmap` is, but for `repair`.

use std::path::Path;

use serde::Serialize;

use bitferry::bitmap::{self, Edit, Repair};
use qcow2_file::bitmaps::Repaired;

use super::look::{Judged, check_status};
use super::{Outcome, Output};

/// The document of a verb that has nothing to say.
#[derive(Debug, Serialize)]
struct Done {
    status: &'static str,
}

pub(super) fn edit(image: &Path, edits: &[Edit], output: &Output) -> Outcome {
    bitmap::edit(image, edits)?;
    bitmap::doubt(image).iter().for_each(|doubt| output.warn(doubt));
    output.answer(&Done { status: "completed" }, String::new)?;
    Ok(0)
}

/// The document of `repair`: what was done and what is left.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct RepairDocument {
    done: Vec<String>,
    left: Judged,
}

pub(super) fn repair(image: &Path, repair: Repair, output: &Output) -> Outcome {
    let repaired = bitmap::repair(image, repair)?;
    bitmap::doubt(image).iter().for_each(|doubt| output.warn(doubt));
    let report = bitmap::check(image)?;
    let mut done = sentences(&repaired);
    match repair {
        Repair::Strip => done.insert(0, "all bitmaps are removed".to_owned()),
        Repair::ClearUnfinished => {
            done.insert(0, "the mark of an unfinished copy is cleared".to_owned());
        }
        Repair::Mend(_) => {}
    }
    let document = RepairDocument { done, left: Judged::new(&report) };
    output.answer(&document, || {
        let mut text = String::new();
        if document.done.is_empty() {
            text.push_str("nothing was repaired\n");
        }
        for sentence in &document.done {
            text.push_str(&format!("{sentence}\n"));
        }
        for finding in &document.left.findings {
            text.push_str(&format!("left: {}\n", finding.line()));
        }
        if !document.left.findings.is_empty() {
            text.push_str("`bitferry help bitmap repair` says what may be given up for it\n");
        }
        text
    })?;
    Ok(check_status(&report))
}

fn sentences(repaired: &Repaired) -> Vec<String> {
    let mut sentences = Vec::new();
    if repaired.stale_dropped > 0 {
        let count = repaired.stale_dropped;
        sentences.push(format!("{count} invalidated bitmaps are dropped"));
    }
    let named = [
        (&repaired.tails_cleared, "cleared behind the end of the disk"),
        (&repaired.removed, "removed, it was inconsistent"),
        (&repaired.broken_dropped, "dropped, it broke the format"),
    ];
    for (names, what) in named {
        sentences.extend(names.iter().map(|name| format!("bitmap {name:?}: {what}")));
    }
    if repaired.is_directory_dropped {
        sentences.push("the bitmap directory could not be read and is dropped".to_owned());
    }
    if repaired.has_leaked {
        sentences.push("clusters are leaked; `qemu-img check -r leaks` takes them back".to_owned());
    }
    sentences
}
