//! Runs every verb over a broken image and holds the result against the verdict.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitferry_tests::image::Bytes;
use bitferry_tests::qemu::{check_is_clean, qemu_img};
use qcow2_file::bitmaps::Bitmaps;
use qcow2_file::chain::{Chain, ChainKind, Format, Opener};
use qcow2_file::{GuestOffset, image::Image};

use bitferry_tests::{Output, Run, Scratch, bitferry};

use crate::bases::duplicate;
use crate::recipes::{Recipe, Verdict};

/// No hostile image of a few MiB may take longer than this, on a busy machine too.
const PATIENCE: Duration = Duration::from_secs(40);

/// The file that is broken: the name must be in every message.
const NAME: &str = "hostile.qcow2";

struct Case<'a> {
    recipe: &'a Recipe,
    scratch: Scratch,
    image: PathBuf,
    before: Vec<u8>,
}

/// Judges one recipe. Panics with the command that misbehaved.
pub(crate) fn judge(recipe: &Recipe) {
    let scratch = Scratch::new();
    let image = scratch.path(NAME);
    duplicate(recipe.base.path(), &image);
    (recipe.patch)(&Bytes::of(&image));
    let before = std::fs::read(&image).expect("the image");
    let case = Case { recipe, scratch, image, before };
    case.library();
    case.looks();
    case.copies();
    case.writes();
}

impl Case<'_> {
    fn run(&self, verb: &str, rest: &[&str]) -> Run {
        bitferry().patience(PATIENCE).args(verb.split(' ')).args(rest).dir(self.scratch.dir())
    }

    /// The library itself, without a command line around it: every extent, every byte, every bit.
    fn library(&self) {
        let header = self
            .verdict_of(Need::Header, Opener::new().format(Some(Format::Qcow2)).open(&self.image));
        let Some(chain) = header else { return };
        self.verdict_of(Need::Content, read_all(&chain));
        let Some(top) = chain.top().as_qcow2() else { panic!("not qcow2") };
        self.verdict_of(Need::Bitmaps, load_all(top));
        assert!(std::fs::read(&self.image).expect("the image") == self.before, "it was changed");
    }

    /// Holds a result of the library against the verdict; answers what there is.
    #[track_caller]
    fn verdict_of<T>(&self, need: Need, result: qcow2_file::Result<T>) -> Option<T> {
        let (may_succeed, may_fail, field) = match (self.recipe.verdict, need) {
            (Verdict::Any, _) => (true, true, ""),
            (Verdict::Sound, _) => (true, false, ""),
            (Verdict::Header(field) | Verdict::Unsupported(field), _) => (false, true, field),
            (Verdict::Content(field), Need::Content) => (false, true, field),
            (Verdict::Content(field), _) => (true, true, field),
            (Verdict::Bitmaps(field), Need::Bitmaps) => (true, true, field),
            // A broken header extension may make the header unreadable, as QEMU takes it.
            (Verdict::Bitmaps(field), Need::Header) => (true, true, field),
            (Verdict::Bitmaps(_), _) => (true, false, ""),
        };
        match result {
            Ok(value) => {
                assert!(may_succeed, "{need:?}: the library took it");
                Some(value)
            }
            Err(error) => {
                let text = ::bitferry::report::error_chain(&error);
                assert!(may_fail, "{need:?}: the library refused it: {text}");
                assert!(text.contains(NAME), "{need:?}: no file name in {text:?}");
                assert!(text.contains(field), "{need:?}: no {field:?} in {text:?}");
                None
            }
        }
    }

    /// `info`, `hash`, `compare`, `bitmap list`, `bitmap check`: nothing may change.
    fn looks(&self) {
        let good = self.recipe.base.path().to_string_lossy();
        let verbs: [(&str, &[&str], Need); 6] = [
            ("info", &["-f", "qcow2", NAME], Need::Header),
            ("info", &["-f", "qcow2", "--json", NAME], Need::Header),
            ("hash", &["-f", "qcow2", NAME], Need::Content),
            ("compare", &["-f", "qcow2", "--bitmaps=none", NAME, &good], Need::Content),
            ("bitmap list", &[NAME], Need::Bitmaps),
            ("bitmap check", &[NAME], Need::Bitmaps),
        ];
        for (verb, rest, need) in verbs {
            let output = self.run(verb, rest).output().expect_no_crash();
            self.hold(&output, need);
            self.is_unchanged(&output);
            self.leaves(&output, &[NAME]);
        }
    }

    /// Copies with and without bitmaps, into qcow2 and raw.
    fn copies(&self) {
        let dry = self.run("copy", &["--dry-run", "-f", "qcow2", NAME, "new"]).output();
        self.is_unchanged(&dry.clone().expect_no_crash());
        self.leaves(&dry, &[NAME]);
        let ways: [(&[&str], &str, Need); 2] = [
            (&["-O", "qcow2"], "new.qcow2", Need::ContentAndBitmaps),
            (&["-O", "raw", "--bitmaps", "none"], "new.raw", Need::Content),
        ];
        for (options, name, need) in ways {
            let run = self.run("copy", &["-f", "qcow2"]).args(options).args([NAME, name]);
            let output = run.output().expect_no_crash();
            self.hold(&output, need);
            self.is_unchanged(&output);
            if matches!(output.code(), Some(0 | 6)) {
                let receipt = format!(".{name}.bitferry-receipt");
                self.leaves(&output, &[&receipt, NAME, name]);
                std::fs::remove_file(self.scratch.path(&receipt)).expect("remove");
                self.is_what_qemu_reads(&output, &self.scratch.path(name));
                std::fs::remove_file(self.scratch.path(name)).expect("remove");
            } else {
                self.leaves(&output, &[NAME]);
            }
        }
    }

    /// Verbs that would write to the broken image.
    fn writes(&self) {
        let good = self.recipe.base.path().to_string_lossy();
        let verbs: [(&str, &[&str]); 4] = [
            ("bitmap add", &[NAME, "another"]),
            ("bitmap remove", &[NAME, "b0"]),
            ("bitmap clear", &[NAME, "b0"]),
            ("copy", &["--in-place", "-f", "qcow2", "-O", "qcow2", "--bitmaps=none", &good, NAME]),
        ];
        for (verb, rest) in verbs {
            let was = corruptions(&self.image);
            let output = self.run(verb, rest).output().expect_no_crash();
            let is_done = output.status.success() || output.code() == Some(6);
            let must_refuse = self.recipe.is_untouchable;
            assert!(!(is_done && must_refuse), "wrote to a corrupt image\n{output}");
            if !is_done {
                self.is_unchanged(&output);
                continue;
            }
            if let (Some(was), Some(now)) = (was, corruptions(&self.image)) {
                assert!(now <= was, "{was} corruptions became {now}\n{output}");
            }
            std::fs::write(&self.image, &self.before).expect("restore");
        }
    }

    #[track_caller]
    fn is_unchanged(&self, output: &Output) {
        let now = std::fs::read(&self.image).expect("the image");
        assert!(now == self.before, "the image was changed\n{output}");
    }

    #[track_caller]
    fn leaves(&self, output: &Output, expected: &[&str]) {
        assert_eq!(self.scratch.names(), expected, "left behind\n{output}");
    }

    /// What was copied is what QEMU reads, where QEMU reads it at all.
    #[track_caller]
    fn is_what_qemu_reads(&self, output: &Output, copy: &Path) {
        let format = if copy.extension().is_some_and(|e| e == "raw") { "raw" } else { "qcow2" };
        if format == "qcow2" {
            check_is_clean(copy);
        }
        let run = qemu_img("compare").args(["-f", "qcow2", "-F", format]).arg(&self.image);
        let compared = run.arg(copy).patience(PATIENCE).output();
        assert_ne!(compared.code(), Some(1), "{output}\n{compared}");
    }

    /// Holds an exit status and a message against the verdict.
    #[track_caller]
    fn hold(&self, output: &Output, need: Need) {
        let code = output.code().unwrap_or(-1);
        let (allowed, field): (&[i32], &str) = match (self.recipe.verdict, need) {
            (Verdict::Any, _) => (&[0, 1, 2, 3, 5, 6, 7], ""),
            (Verdict::Sound, Need::Content) => (&[0, 1], ""),
            (Verdict::Sound, _) => (&[0], ""),
            (Verdict::Header(field), _) => (&[5], field),
            (Verdict::Unsupported(what), _) => (&[3], what),
            (Verdict::Content(field), Need::Content | Need::ContentAndBitmaps) => (&[5], field),
            (Verdict::Content(_), Need::Header | Need::Bitmaps) => (&[0, 5], ""),
            (Verdict::Bitmaps(field), Need::ContentAndBitmaps) => (&[5, 7], field),
            (Verdict::Bitmaps(field), Need::Bitmaps) => (&[0, 1, 5, 7], field),
            (Verdict::Bitmaps(field), Need::Header | Need::Content) => (&[0, 1, 5], field),
        };
        assert!(allowed.contains(&code), "expected one of {allowed:?}\n{output}");
        let said = output.complaint();
        // What a check finds is its result, not a failure of its own.
        if matches!(code, 0 | 1 | 6) || output.command.contains("bitmap check") {
            return;
        }
        assert!(said.contains("error: "), "no error line\n{output}");
        // What is refused is refused for its sake: there the bitmap is named.
        let is_named = said.contains(NAME) || code == 7 && said.contains("bitmap");
        assert!(is_named, "the message does not name the file\n{output}");
        assert!(code == 7 || said.contains(field), "the message does not name {field:?}\n{output}");
        assert!(code != 5 || said.contains("offset"), "the message names no offset\n{output}");
    }
}

/// Reads every byte that some layer holds. The map may claim an exbibyte, so extents are counted.
fn read_all(chain: &Chain) -> qcow2_file::Result<()> {
    let mut buf = vec![0; 1 << 20];
    let (mut at, mut extents) = (0, 0);
    while at < chain.virtual_size() && extents < 10_000 {
        let extent = chain.extent(GuestOffset(at), u64::MAX)?;
        assert!(extent.len > 0 && extent.len <= chain.virtual_size() - at, "{extent:?}");
        if matches!(extent.kind, ChainKind::Data | ChainKind::Compressed) {
            let mut part = 0;
            while part < extent.len.min(64 << 20) {
                let len = (extent.len - part).min(buf.len() as u64) as usize;
                chain.read_at(&mut buf[..len], GuestOffset(at + part))?;
                part += len as u64;
            }
        }
        at += extent.len;
        extents += 1;
    }
    Ok(())
}

fn load_all(image: &Image) -> qcow2_file::Result<()> {
    let Some(bitmaps) = Bitmaps::open(image.file().clone(), image.header())? else { return Ok(()) };
    for entry in bitmaps.list() {
        bitmaps.load(entry.name())?;
        bitmaps.count_dirty(entry.name())?;
    }
    Ok(())
}

/// What a verb must understand to do its work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    Header,
    Content,
    Bitmaps,
    ContentAndBitmaps,
}

/// Corruptions that `qemu-img check` counts; `None` where it cannot check the image.
fn corruptions(image: &Path) -> Option<u64> {
    let run = qemu_img("check").args(["-f", "qcow2", "--output=json"]).arg(image);
    let output = run.patience(PATIENCE).output();
    let is_answer = matches!(output.code(), Some(0 | 2 | 3));
    let document = is_answer.then(|| bitferry_tests::json::document(&output.text()))?;
    Some(document["corruptions"].as_u64().unwrap_or(0))
}
