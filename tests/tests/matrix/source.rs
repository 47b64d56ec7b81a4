//! Makes the source of a case with QEMU's tools, of random content and bitmaps, and keeps what the
//! disk held when each bitmap began to record.

use std::path::{Path, PathBuf};

use bitferry_tests::Scratch;
use bitferry_tests::image::make;
use bitferry_tests::qemu::{qemu_img, qemu_io};
use bitferry_tests::random::Random;

use crate::case::{Below, Case, Layout};

/// A bitmap of the source.
#[derive(Debug, Clone)]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    pub(crate) granularity: u64,
    pub(crate) is_enabled: bool,
    /// The disk when the bitmap was made, as a raw file: a full backup.
    pub(crate) backup: PathBuf,
}

/// A source.
#[derive(Debug)]
pub(crate) struct Source {
    pub(crate) path: PathBuf,
    pub(crate) format: &'static str,
    /// The backing file, if any, and its format.
    pub(crate) backing: Option<(PathBuf, &'static str)>,
    pub(crate) bitmaps: Vec<Bitmap>,
}

pub(crate) fn build(case: &Case, scratch: &Scratch, random: &mut Random) -> Source {
    let backing = backing(case, scratch, random);
    let mut source = Source {
        path: top(case, scratch, &backing, random),
        format: "qcow2",
        backing,
        bitmaps: Vec::new(),
    };
    if case.layout == Layout::Raw {
        source.format = "raw";
    }
    scribble(&source.path, source.format, case.size, random, 6);
    if case.has_snapshot {
        qemu_img("snapshot").args(["-c", "s1"]).arg(&source.path).ok();
        scribble(&source.path, source.format, case.size, random, 3);
    }
    for n in 0..case.bitmaps {
        add_bitmap(case, scratch, &mut source, n);
        scribble(&source.path, source.format, case.size, random, 3);
    }
    source
}

fn backing(case: &Case, scratch: &Scratch, random: &mut Random) -> Option<(PathBuf, &'static str)> {
    let size = match case.below {
        Below::Nothing => return None,
        Below::Raw | Below::Deep => case.size,
        Below::Longer => case.size + (1 << 20),
        Below::Shorter => (case.size / 2).next_multiple_of(512),
    };
    let format = if case.below == Below::Raw { "raw" } else { "qcow2" };
    let mut path = make(scratch, "below", size).format(format).done();
    scribble(&path, format, size, random, 6);
    if case.below == Below::Deep {
        path = make(scratch, "middle", size).backing("below", "qcow2").done();
        scribble(&path, format, size, random, 4);
    }
    Some((path, format))
}

fn top(
    case: &Case,
    scratch: &Scratch,
    backing: &Option<(PathBuf, &'static str)>,
    random: &mut Random,
) -> PathBuf {
    if case.layout == Layout::Raw {
        return make(scratch, "source", case.size).format("raw").done();
    }
    let mut options = vec![format!("cluster_size={}", case.cluster)];
    if case.version == 2 {
        options.push("compat=0.10".to_owned());
    } else {
        options.push(format!("refcount_bits={}", case.refcount_bits));
        options.push(format!("extended_l2={}", if case.is_extended { "on" } else { "off" }));
        options.push(format!("compression_type={}", case.compression.unwrap_or("zlib")));
    }
    if matches!(case.layout, Layout::RawDataFile | Layout::DataFile) {
        options.push(format!("data_file={}", scratch.path("source.data").display()));
        let is_raw = if case.layout == Layout::RawDataFile { "on" } else { "off" };
        options.push(format!("data_file_raw={is_raw}"));
    }
    if case.compression.is_some() {
        return convert(case, scratch, backing, random, &options);
    }
    options.push(format!("preallocation={}", case.preallocation));
    let mut image = make(scratch, "source", case.size).option(options.join(","));
    if let Some((path, format)) = backing {
        image = image.backing(path.file_name().expect("a name").to_string_lossy(), format);
    }
    image.done()
}

/// A compressed image is made by converting another.
fn convert(
    case: &Case,
    scratch: &Scratch,
    backing: &Option<(PathBuf, &'static str)>,
    random: &mut Random,
    options: &[String],
) -> PathBuf {
    let text = make(scratch, "text", case.size);
    let text = match backing {
        None => text.done(),
        Some((path, format)) => {
            text.backing(path.file_name().expect("a name").to_string_lossy(), format).done()
        }
    };
    scribble(&text, "qcow2", case.size, random, 6);
    let path = scratch.path("source");
    let mut run = qemu_img("convert").words("-c -f qcow2 -O qcow2 -o").arg(options.join(","));
    if let Some((path, format)) = backing {
        run = run.arg("-B").arg(path.file_name().expect("a name")).args(["-F", format]);
    }
    run.arg(&text).arg(&path).dir(scratch.dir()).ok();
    path
}

fn add_bitmap(case: &Case, scratch: &Scratch, source: &mut Source, n: usize) {
    // The second does not record; the third has a granularity of its own.
    let is_enabled = n != 1;
    let granularity = if n == 2 { 65536 } else { case.granularity };
    let name = ["b0", "a bitmap with spaces, and a comma", "b2"][n].to_owned();
    let run = qemu_img("bitmap").args(["--add", "-f", "qcow2", "-g", &granularity.to_string()]);
    let run = run.arg(if is_enabled { "--enable" } else { "--disable" });
    run.arg(&source.path).arg(&name).ok();
    let backup = scratch.path(&format!("backup{n}"));
    to_raw(&source.path, &backup);
    source.bitmaps.push(Bitmap { name, granularity, is_enabled, backup });
}

/// What a guest reads, as a raw file, by QEMU.
pub(crate) fn to_raw(image: &Path, raw: &Path) {
    qemu_img("convert").words("-f qcow2 -O raw").arg(image).arg(raw).ok();
}

/// Random writes: data of many lengths and alignments, zeroes, discards.
pub(crate) fn scribble(path: &Path, format: &str, size: u64, random: &mut Random, count: u64) {
    qemu_io(path, format, writes(size, random, count));
}

/// `qemu-io` commands for [`scribble`].
pub(crate) fn writes(size: u64, random: &mut Random, count: u64) -> Vec<String> {
    let one = |_| {
        let sectors = size / 512;
        let longest = *random.pick(&[1, 8, 128, 1024, 4096]);
        let len = 1 + random.below(longest.min(sectors));
        // The end of the disk is where mistakes live.
        let last = sectors - len;
        let mut at = if random.one_in(4) { last } else { random.below(last + 1) };
        if random.one_in(2) {
            at = at / 128 * 128;
        }
        let (at, len) = (at * 512, len * 512);
        match random.below(8) {
            0 => format!("write -z {at} {len}"),
            1 => format!("write -z -u {at} {len}"),
            2 => format!("discard {at} {len}"),
            _ => format!("write -P {} {at} {len}", 1 + random.below(255)),
        }
    };
    (0..count).map(one).collect()
}
