//! The verbs that only look.

use std::path::{Path, PathBuf};

use serde::ser::SerializeSeq as _;
use serde::{Serialize, Serializer};

use bitferry::bitmap::{self, Dump};
use bitferry::info::{BitmapSummary, InfoOptions};
use qcow2_file::bitmaps::{BitmapCheck, Severity};

use super::super::{info, table};
use super::{Outcome, Output};

/// The document of `list`.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct List<'a> {
    filename: &'a str,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    in_use: bool,
    bitmaps: &'a [BitmapSummary],
}

pub(super) fn list(image: PathBuf, output: &Output) -> Outcome {
    let found = bitferry::info::run(&InfoOptions { image, ..InfoOptions::default() })?;
    info::warn_of_users(&found, output);
    let document =
        List { filename: &found.filename, in_use: found.in_use, bitmaps: &found.bitmaps };
    output.answer(&document, || {
        if found.bitmaps.is_empty() {
            return "no bitmaps\n".to_owned();
        }
        info::bitmap_table(&found)
    })?;
    Ok(0)
}

/// The document of `dump`.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct DumpDocument<'a> {
    name: &'a str,
    granularity: u64,
    virtual_size: u64,
    dirty_bytes: u64,
    ranges: Ranges<'a>,
}

/// Dirty ranges, written as they are found: there may be millions.
struct Ranges<'a>(&'a Dump);

#[derive(Serialize)]
struct Range {
    start: u64,
    length: u64,
}

impl Serialize for Ranges<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(None)?;
        for (start, length) in self.0.ranges() {
            list.serialize_element(&Range { start, length })?;
        }
        list.end()
    }
}

pub(super) fn dump(image: &Path, name: &str, output: &Output) -> Outcome {
    let dump = bitmap::dump(image, name)?;
    let dirty_bytes = dump.ranges().map(|(_, length)| length).sum();
    let (granularity, virtual_size) = (dump.granularity, dump.virtual_size);
    let ranges = Ranges(&dump);
    let document = DumpDocument { name, granularity, virtual_size, dirty_bytes, ranges };
    output.stream(|out| {
        if output.is_json {
            serde_json::to_writer(&mut *out, &document)?;
            return writeln!(out);
        }
        dump.ranges().try_for_each(|(start, length)| writeln!(out, "{start} {length}"))
    })?;
    Ok(0)
}

/// What a check found, for people and programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Judged {
    pub(super) findings: Vec<JudgedFinding>,
    /// Findings beyond those listed.
    omitted: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct JudgedFinding {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmap: Option<String>,
    severity: &'static str,
    what: String,
}

impl Judged {
    pub(super) fn new(report: &BitmapCheck) -> Self {
        let findings = report.findings.iter().map(|finding| JudgedFinding {
            bitmap: finding.bitmap.clone(),
            severity: match finding.defect.severity() {
                Severity::Harmless => "harmless",
                Severity::Lost => "lost",
                Severity::Corrupt => "corrupt",
            },
            what: finding.defect.to_string(),
        });
        Self { findings: findings.collect(), omitted: report.omitted }
    }
}

impl JudgedFinding {
    pub(super) fn line(&self) -> String {
        let whose = self.bitmap.as_ref().map(|name| format!("bitmap {}: ", table::name(name)));
        format!("{}{} ({})", whose.unwrap_or_default(), self.what, self.severity)
    }
}

pub(super) fn check(image: &Path, output: &Output) -> Outcome {
    let report = bitmap::check(image)?;
    let judged = Judged::new(&report);
    output.answer(&judged, || {
        let mut text: String = judged.findings.iter().map(|f| f.line() + "\n").collect();
        if judged.omitted > 0 {
            text.push_str(&format!("and {} more\n", judged.omitted));
        }
        if judged.findings.is_empty() {
            text.push_str("nothing is wrong with the bitmaps\n");
        } else {
            text.push_str("`bitferry bitmap repair` may help\n");
        }
        text
    })?;
    Ok(check_status(&report))
}

/// 0: nothing that matters, 1: a bitmap cannot be used, 5: the format is broken.
pub(super) fn check_status(report: &BitmapCheck) -> u8 {
    match report.worst() {
        None | Some(Severity::Harmless) => 0,
        Some(Severity::Lost) => 1,
        Some(Severity::Corrupt) => 5,
    }
}
