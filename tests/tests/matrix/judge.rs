//! Copies the source of a case as asked, and holds the result against QEMU's tools and two QEMUs.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bitferry_tests::image::make;
use bitferry_tests::qemu::{
    allocated_bytes, check_is_clean, dirty_ranges, info, qemu_img, same_content,
};
use bitferry_tests::qmp::Qemu;
use bitferry_tests::random::Random;
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry, json, require};
use serde_json::Value;

use crate::case::{Below, Case, Layout, Target};
use crate::source::{Source, build, to_raw, writes};

/// One case in its directory.
struct World {
    case: Case,
    scratch: Scratch,
    source: Source,
    copy: PathBuf,
    copy_format: &'static str,
}

/// Judges one case. Panics with the command that misbehaved.
pub(crate) fn judge(case: &Case, random: &mut Random) {
    let scratch = Scratch::new();
    let source = build(case, &scratch, random);
    let is_raw = matches!(case.target, Target::Raw | Target::InPlaceRaw)
        || case.layout == Layout::Raw && matches!(case.target, Target::Same | Target::Force);
    let copy = scratch.path("copy");
    let copy_format = if is_raw { "raw" } else { "qcow2" };
    let world = World { case: case.clone(), scratch, source, copy, copy_format };
    world.is_refused_where_bitmaps_would_be_lost();
    world.prepare(random);
    let output = world.command().output();
    world.is_reported(output.expect_exit(Exit::Done));
    world.reads_the_same();
    world.is_no_bigger();
    world.compares_equal();
    world.has_the_same_bitmaps(Peer::Qemu10);
    world.has_the_same_bitmaps(Peer::Qemu72);
    world.next_backup_is_incremental(random);
}

impl World {
    fn is_in_place(&self) -> bool {
        matches!(self.case.target, Target::InPlace | Target::InPlaceRaw)
    }

    /// The command without anything about bitmaps.
    fn bare_command(&self) -> Run {
        let run = bitferry().args(["copy", "--json", "-f", self.source.format]);
        let run = match self.case.target {
            Target::Same => run,
            Target::Shape(options) => run.args(["-O", "qcow2", "-o", options]),
            Target::Old => run.args(["-O", "qcow2", "-o", "compat=0.10"]),
            Target::Raw => run.args(["-O", "raw"]),
            Target::RawDataFile => {
                let data = format!("data_file={}", self.scratch.path("copy.data").display());
                run.args(["-O", "qcow2", "-o", &data, "-o", "data_file_raw=on"])
            }
            Target::InPlace => run.args(["-O", "qcow2", "--in-place"]),
            Target::InPlaceRaw => run.args(["-O", "raw", "--in-place"]),
            Target::Force => run.arg("--force"),
            Target::Backing => {
                let (path, _) = self.source.backing.as_ref().expect("a backing file");
                run.arg("--backing").arg(path)
            }
        };
        let run = match (self.case.target, self.case.below) {
            (Target::Backing, _) | (_, Below::Nothing) => run,
            _ => run.arg("--flatten"),
        };
        let names_data = matches!(self.case.layout, Layout::RawDataFile | Layout::DataFile);
        let needs_permission = names_data || self.case.target == Target::Backing;
        if needs_permission { run.arg("--allow-backing") } else { run }
    }

    fn command(&self) -> Run {
        let run = self.bare_command();
        let run = if self.case.keeps_bitmaps() { run } else { run.arg("--bitmaps=none") };
        run.arg(&self.source.path).arg(&self.copy).dir(self.scratch.dir())
    }

    /// A destination that holds no bitmaps: exit 7, and nothing was written.
    fn is_refused_where_bitmaps_would_be_lost(&self) {
        if self.case.keeps_bitmaps() || self.source.bitmaps.is_empty() || self.is_in_place() {
            return;
        }
        let before = self.scratch.names();
        let run = self.bare_command().arg(&self.source.path).arg(&self.copy);
        let output = run.output().expect_exit(Exit::Refused);
        assert_eq!(self.scratch.names(), before, "{output}");
    }

    /// What stands at the destination before.
    fn prepare(&self, random: &mut Random) {
        match self.case.target {
            Target::Force => std::fs::write(&self.copy, b"old").expect("write"),
            Target::InPlace => {
                let image = make(&self.scratch, "copy", self.case.size).bitmap("old", 65536);
                let writes = writes(self.case.size, random, 8);
                writes.into_iter().fold(image, |i, w| i.io(w)).bitmap("b0", 4096).done();
            }
            Target::InPlaceRaw => {
                let image = make(&self.scratch, "copy", self.case.size).format("raw");
                let writes = writes(self.case.size, random, 8);
                writes.into_iter().fold(image, |i, w| i.io(w)).done();
            }
            _ => {}
        }
    }

    fn is_reported(&self, output: Output) {
        let summary = json::summary(&output);
        assert_eq!(summary["status"], "completed", "{output}");
        let disk = &summary["disks"][0];
        assert_eq!(disk["verified"], "yes", "{output}");
        let hash = disk["content-hash"].as_str().unwrap_or_default();
        assert!(hash.starts_with("bf1:") && hash.len() == 68, "{output}");
        let bitmaps = disk["bitmaps"].as_array().expect("bitmaps");
        for bitmap in &self.source.bitmaps {
            let found = bitmaps.iter().find(|b| b["name"] == bitmap.name.as_str());
            let found =
                found.unwrap_or_else(|| panic!("{} is not reported\n{output}", bitmap.name));
            let expected = if self.case.keeps_bitmaps() { "preserved" } else { "dropped" };
            assert_eq!(found["outcome"], expected, "{output}");
        }
        assert_eq!(self.scratch.names().iter().find(|n| n.contains("bitferry-part")), None);
        if self.case.has_snapshot {
            let lost = disk["not-carried"].to_string();
            assert!(lost.contains("snapshot"), "the snapshot's loss is not reported\n{output}");
        }
    }

    fn reads_the_same(&self) {
        if self.copy_format == "qcow2" {
            check_is_clean(&self.copy);
        }
        same_content((&self.source.path, self.source.format), (&self.copy, self.copy_format));
        let size = info(&self.copy, self.copy_format)["virtual-size"].as_u64();
        assert_eq!(size, Some(self.case.size), "virtual size");
        let document = info(&self.copy, self.copy_format);
        let data = &document["format-specific"]["data"];
        let is = |key: &str, value: Value| assert_eq!(data[key], value, "{key}: {document}");
        match self.case.target {
            Target::Shape("extended_l2=on,cluster_size=128k") => is("extended-l2", true.into()),
            Target::Shape("compression_type=zstd,cluster_size=64k") => {
                is("compression-type", "zstd".into());
            }
            Target::Shape("cluster_size=2M,refcount_bits=1") => is("refcount-bits", 1.into()),
            Target::Old => is("compat", "0.10".into()),
            Target::RawDataFile => {
                is("data-file-raw", true.into());
                let data = self.scratch.path("copy.data");
                same_content((&self.source.path, self.source.format), (&data, "raw"));
            }
            Target::Backing => {
                let (path, _) = self.source.backing.as_ref().expect("a backing file");
                let named = document["full-backing-filename"].as_str().unwrap_or_default();
                assert_eq!(Path::new(named).file_name(), path.file_name(), "{document}");
            }
            _ => {}
        }
    }

    /// Sparse stays sparse: no more is allocated than the source has and metadata needs.
    fn is_no_bigger(&self) {
        // Decompressing and writing into what exists allocate what they must; other cluster sizes
        // round every piece of data up.
        let is_same_shape = matches!(
            self.case.target,
            Target::Same | Target::Force | Target::Backing | Target::RawDataFile
        );
        if self.case.compression.is_some() || !is_same_shape {
            return;
        }
        let mut allowed = allocated_bytes(&self.source.path);
        for name in ["source.data", "below", "middle"] {
            let path = self.scratch.path(name);
            allowed += if path.exists() { allocated_bytes(&path) } else { 0 };
        }
        // Header, L1, refcounts, directory and tables, and an L2 table for each span.
        let cluster = if self.source.format == "raw" { 4096 } else { self.case.cluster };
        let bits: u64 =
            self.source.bitmaps.iter().map(|b| self.case.size / b.granularity / 8 + cluster).sum();
        let l2 = self.case.size.div_ceil(cluster * cluster / 16).min(64) * cluster;
        allowed += 10 * cluster + l2 + bits + self.case.size / 64;
        let mut found = allocated_bytes(&self.copy);
        if self.case.target == Target::RawDataFile {
            // Tables for the whole disk, and an image beside them where the source is none.
            found += allocated_bytes(&self.scratch.path("copy.data"));
            allowed += (10 << 16) + self.case.size.div_ceil(512 << 20) * (64 << 10);
        }
        assert!(found <= allowed, "{found} bytes allocated where {allowed} should do");
    }

    /// Our own eyes agree with QEMU's.
    fn compares_equal(&self) {
        let run = bitferry().args(["compare", "--json", "-f", self.source.format]);
        let run = run.args(["-F", self.copy_format, "--allow-backing"]);
        let is_content_only = self.is_in_place() || !self.case.keeps_bitmaps();
        let run = if is_content_only { run.arg("--bitmaps=none") } else { run };
        let output = run.arg(&self.source.path).arg(&self.copy).output().expect_exit(Exit::Done);
        assert_eq!(json::document(&output.text())["equal"], true, "{output}");
        let hash = |path: &Path, format: &str| {
            let run =
                bitferry().args(["hash", "--json", "--allow-backing", "-f", format]).arg(path);
            json::document(&run.output().expect_exit(Exit::Done).text())["content-hash"].clone()
        };
        let of_source = hash(&self.source.path, self.source.format);
        assert_eq!(of_source, hash(&self.copy, self.copy_format), "content hash");
    }

    /// Every bitmap has the name, granularity, state and bits of the source's, as QEMU loads them.
    fn has_the_same_bitmaps(&self, which: Peer) {
        if !self.case.keeps_bitmaps() || self.source.bitmaps.is_empty() || which.find().is_none() {
            return;
        }
        let mut qemu = Qemu::block_only(which);
        let mut of = |path: &Path| {
            qemu.open("n", path, false).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let mut found = Vec::new();
            for bitmap in qemu.bitmaps("n") {
                let name = bitmap["name"].as_str().expect("a name").to_owned();
                let hash = qemu.bitmap_hash("n", &name);
                let facts = ["granularity", "recording", "persistent", "inconsistent", "count"];
                let facts: Vec<_> = facts.iter().map(|f| bitmap[*f].clone()).collect();
                found.push((name, hash, facts));
            }
            qemu.close("n");
            found.sort_by(|a, b| a.0.cmp(&b.0));
            found
        };
        let (expected, mut found) = (of(&self.source.path), of(&self.copy));
        assert_eq!(expected.len(), self.source.bitmaps.len());
        // What the destination had of its own is not the source's.
        found.retain(|f| !self.is_in_place() || f.0 != "old");
        assert_eq!(found, expected, "bitmaps as {} loads them", which.name());
        assert!(qemu.quit().status.success());
    }

    /// A guest writes to the copy; then what each bitmap names, put over the full backup that was
    /// made with it, is the disk.
    fn next_backup_is_incremental(&self, random: &mut Random) {
        if !self.case.keeps_bitmaps() || self.source.bitmaps.is_empty() {
            return;
        }
        // The same writes to a twin of the source are what the bits must look like.
        let twin = self.twin();
        let peers = [Peer::Qemu10, Peer::Qemu72];
        let peers: Vec<Peer> = peers.into_iter().filter(|p| p.find().is_some()).collect();
        let mut qemu = Qemu::block_only(*random.pick(&peers));
        qemu.open("copy", &self.copy, true).expect("opens for writing");
        qemu.open("twin", &twin, true).expect("opens for writing");
        for write in writes(self.case.size, random, 4) {
            qemu.io("copy", &write);
            qemu.io("twin", &write);
        }
        for bitmap in &self.source.bitmaps {
            let (copy, twin) =
                (qemu.bitmap_hash("copy", &bitmap.name), qemu.bitmap_hash("twin", &bitmap.name));
            assert_eq!(copy, twin, "{} after a guest wrote", bitmap.name);
        }
        assert!(qemu.quit().status.success());
        check_is_clean(&self.copy);
        let now = self.scratch.path("now.raw");
        to_raw(&self.copy, &now);
        for bitmap in &self.source.bitmaps {
            let ranges = dirty_ranges(&self.copy, &bitmap.name).unwrap_or_else(|o| panic!("{o}"));
            let of_twin = dirty_ranges(&twin, &bitmap.name).unwrap_or_else(|o| panic!("{o}"));
            assert_eq!(ranges, of_twin, "{} at rest", bitmap.name);
            if !bitmap.is_enabled {
                continue;
            }
            let backup = std::fs::File::options().write(true).open(&bitmap.backup).expect("open");
            let disk = std::fs::File::open(&now).expect("open");
            for range in ranges {
                let end = range.end.min(self.case.size);
                let mut bytes = vec![0; usize::try_from(end - range.start).expect("small")];
                disk.read_exact_at(&mut bytes, range.start).expect("read");
                backup.write_all_at(&bytes, range.start).expect("write");
            }
            same_content((&bitmap.backup, "raw"), (&now, "raw"));
        }
    }

    /// A copy of the source's file, not by us: `cp`, with its data file beside it.
    fn twin(&self) -> PathBuf {
        let twin = self.scratch.path("twin");
        Run::new("cp").arg("--sparse=always").arg(&self.source.path).arg(&twin).ok();
        let data = self.scratch.path("source.data");
        if data.exists() {
            // The name in the image is as long as the other.
            let other = self.scratch.path("twin12.data");
            Run::new("cp").arg("--sparse=always").arg(&data).arg(&other).ok();
            let run = qemu_img("amend")
                .words("-f qcow2 -o")
                .arg(format!("data_file={}", other.display()));
            run.arg(&twin).ok();
        }
        twin
    }
}

/// Whether every peer of the matrix is here.
pub(crate) fn has_peers() -> bool {
    let needed = [Peer::QemuImg, Peer::QemuIo, Peer::QemuNbd, Peer::Qemu10];
    needed.iter().all(|p| require(*p).is_some())
}
