//! Names found in images: what they make us open, and what they must not.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bitferry_tests::image::{Bytes, make};
use bitferry_tests::qemu::{qemu_img, same_content};
use bitferry_tests::{Exit, Output, Peer, Run, Scratch, bitferry};

use crate::bases::MIB;

const PATIENCE: Duration = Duration::from_secs(40);
const SECRET: &str = "secret.raw";

type Test = (&'static str, fn(&World));

pub(crate) const ALL: &[Test] = &[
    ("an absolute backing name", absolute),
    ("a backing name that climbs", climbing),
    ("names that are not paths", not_paths),
    ("a named pipe as backing file", pipe),
    ("places that are no images", no_images),
    ("a backing file that is its own", own_backing),
    ("two images that back one another", two_cycle),
    ("a cycle through a symbolic link", link_cycle),
    ("a chain of 300 layers", depth_bomb),
    ("a backing file without a format", no_format),
    ("a raw disk that a guest made look like qcow2", guest_header),
    ("a lower layer that is broken", broken_below),
    ("a backing file that is missing", missing_below),
    ("backing files longer and shorter than the overlay", sizes),
    ("a data file that the user did not name", data_file),
    ("a data file that is the image itself", own_data_file),
    ("a data file that is too short", short_data_file),
    ("a data file and a backing file", data_file_and_backing),
];

/// A directory with a file that no command may open unless it is told to.
pub(crate) struct World {
    scratch: Scratch,
    secret: PathBuf,
    outside: Scratch,
}

impl World {
    pub(crate) fn new() -> Self {
        let (scratch, outside) = (Scratch::new(), Scratch::new());
        let secret = outside.path(SECRET);
        std::fs::write(&secret, vec![0x5a; MIB as usize]).expect("write");
        Self { scratch, secret, outside }
    }

    /// An overlay whose header names `backing` in the format `format`; QEMU does not look at it.
    fn overlay(&self, name: &str, backing: &str, format: &str) -> PathBuf {
        let path = self.scratch.path(name);
        let run = qemu_img("create").args(["-q", "-u", "-f", "qcow2", "-b", backing, "-F", format]);
        run.arg(&path).arg(MIB.to_string()).ok();
        path
    }

    /// Every verb that reads content, with `options`.
    fn readers(&self, image: &Path, options: &[&str]) -> Vec<Watched> {
        let image = image.to_string_lossy().into_owned();
        let copy = self.scratch.path("copied").to_string_lossy().into_owned();
        let lines: [Vec<&str>; 4] = [
            vec!["info", &image],
            vec!["hash", &image],
            vec!["compare", &image, &image],
            vec!["copy", "-O", "raw", "--bitmaps=none", &image, &copy],
        ];
        let watched = lines.iter().map(|line| {
            let options = if line[0] == "info" { &[][..] } else { options };
            let _ = std::fs::remove_file(self.scratch.path("copied"));
            watch(&[line.as_slice(), options].concat())
        });
        watched.collect()
    }

    /// Without permission: `info` shows the name, everything else refuses, nothing is opened.
    fn refuses(&self, image: &Path, forbidden: &str) {
        for watched in self.readers(image, &[]) {
            watched.did_not_open(forbidden);
            let code = watched.output.code();
            if watched.verb == "info" {
                assert_eq!(code, Some(0), "{}", watched.output);
            } else {
                assert!(matches!(code, Some(2 | 7)), "{}", watched.output);
            }
            assert!(!self.scratch.path("copied").exists(), "{}", watched.output);
        }
    }

    /// With permission too: everything but `info` fails, soon, and says `text`.
    fn fails(&self, image: &Path, options: &[&str], text: &str) {
        for watched in self.readers(image, options) {
            if watched.verb == "info" {
                continue;
            }
            let output = watched.output;
            assert!(matches!(output.code(), Some(2 | 3 | 5 | 7)), "{output}");
            assert!(output.complaint().contains(text), "no word of {text:?}\n{output}");
            assert!(!self.scratch.path("copied").exists(), "{output}");
        }
    }
}

/// A command and the files it touched.
struct Watched {
    verb: String,
    output: Output,
    /// Lines of the trace; `None` where tracing is not possible.
    trace: Option<String>,
}

fn watch(arguments: &[&str]) -> Watched {
    let dir = Scratch::new();
    let trace = dir.path("trace");
    let plain = bitferry().args(arguments).patience(PATIENCE);
    let run = match Peer::Strace.find() {
        None => plain,
        Some(strace) => {
            let calls = "trace=open,openat,openat2,creat,connect,execve,stat,newfstatat";
            let run = Run::new(strace).args(["-f", "-qq", "-e", calls, "-o"]).arg(&trace);
            run.arg(bitferry_tests::bitferry::binary()).args(arguments).patience(PATIENCE)
        }
    };
    let output = run.output().expect_no_crash();
    let trace = std::fs::read_to_string(&trace).ok();
    Watched { verb: arguments[0].to_owned(), output, trace }
}

impl Watched {
    #[track_caller]
    fn did_not_open(&self, forbidden: &str) {
        let Some(trace) = &self.trace else { return };
        let is_opening = |l: &&str| l.contains("open") || l.contains("creat(");
        let opened = trace.lines().filter(is_opening).find(|l| l.contains(forbidden));
        assert_eq!(opened, None, "{}", self.output);
        let connected = trace.lines().find(|l| l.contains("connect("));
        assert_eq!(connected, None, "{}", self.output);
    }
}

fn absolute(world: &World) {
    let secret = world.secret.to_string_lossy();
    let image = world.overlay("a.qcow2", &secret, "raw");
    world.refuses(&image, SECRET);
    // With permission it is read, as QEMU reads it.
    let copy = world.scratch.path("copy.raw");
    let run = bitferry().args(["copy", "--allow-backing", "-O", "raw"]).arg(&image).arg(&copy);
    run.output().expect_exit(Exit::Done);
    same_content((&image, "qcow2"), (&copy, "raw"));
}

fn climbing(world: &World) {
    let outside = world.outside.dir().file_name().expect("a name").to_string_lossy();
    let image = world.overlay("a.qcow2", &format!("../{outside}/{SECRET}"), "raw");
    world.refuses(&image, SECRET);
}

fn not_paths(world: &World) {
    let secret = world.secret.display();
    let names = [
        format!("json:{{\"driver\":\"file\",\"filename\":\"{secret}\"}}"),
        "nbd:unix:/nowhere/socket".to_owned(),
        "nbd://127.0.0.1:1/x".to_owned(),
        "https://127.0.0.1:1/x".to_owned(),
        "ssh://127.0.0.1:1/x".to_owned(),
        format!("fat:rw:{}", world.outside.dir().display()),
    ];
    for name in names {
        let image = world.overlay("a.qcow2", &name, "raw");
        world.refuses(&image, SECRET);
        for watched in world.readers(&image, &["--allow-backing"]) {
            watched.did_not_open(SECRET);
            let code = watched.output.code();
            assert!(watched.verb == "info" || code != Some(0), "{}", watched.output);
        }
    }
}

fn pipe(world: &World) {
    let fifo = world.scratch.path("fifo");
    Run::new("mkfifo").arg(&fifo).ok();
    let image = world.overlay("a.qcow2", "fifo", "raw");
    world.refuses(&image, "fifo");
    // Opening a pipe that nobody writes to would wait for ever.
    world.fails(&image, &["--allow-backing"], "fifo");
    let run = bitferry().arg("hash").arg(&fifo).patience(PATIENCE);
    let output = run.output().expect_no_crash();
    assert!(matches!(output.code(), Some(2 | 3)), "{output}");
}

fn no_images(world: &World) {
    for place in ["/dev/zero", "/dev/tty", "/", "/dev/stdin", "/dev/fd/0"] {
        let image = world.overlay("a.qcow2", place, "raw");
        world.refuses(&image, &format!("\"{place}\""));
        world.fails(&image, &["--allow-backing"], place);
    }
}

fn own_backing(world: &World) {
    let image = world.overlay("a.qcow2", "a.qcow2", "qcow2");
    world.fails(&image, &["--allow-backing"], "a.qcow2");
}

fn two_cycle(world: &World) {
    let image = world.overlay("a.qcow2", "b.qcow2", "qcow2");
    world.overlay("b.qcow2", "a.qcow2", "qcow2");
    world.fails(&image, &["--allow-backing"], "qcow2");
}

fn link_cycle(world: &World) {
    let image = world.overlay("a.qcow2", "link", "qcow2");
    std::os::unix::fs::symlink("a.qcow2", world.scratch.path("link")).expect("link");
    world.fails(&image, &["--allow-backing"], "link");
}

fn depth_bomb(world: &World) {
    let first = world.overlay("l000.qcow2", "l001.qcow2", "qcow2");
    let bytes = std::fs::read(&first).expect("read");
    let at = Bytes::of(&first).be64(8) as usize;
    for n in 1..300 {
        let mut layer = bytes.clone();
        layer[at..at + 10].copy_from_slice(format!("l{:03}.qcow2", n + 1).as_bytes());
        std::fs::write(world.scratch.path(&format!("l{n:03}.qcow2")), layer).expect("write");
    }
    make(&world.scratch, "l300.qcow2", MIB).done();
    world.fails(&first, &["--allow-backing"], "qcow2");
}

fn no_format(world: &World) {
    let backing = make(&world.scratch, "b.raw", MIB).format("raw").write(7, 0, 65536).done();
    let image = world.overlay("a.qcow2", "b.raw", "raw");
    erase_backing_format(&image);
    // The guest of the raw disk makes it look like an overlay over the secret.
    let trap = world.overlay("trap.qcow2", &world.secret.to_string_lossy(), "raw");
    let bytes = std::fs::read(&trap).expect("read");
    Bytes::of(&backing).put(0, &bytes[..65536]);
    for watched in world.readers(&image, &["--allow-backing"]) {
        watched.did_not_open(SECRET);
    }
}

/// Makes the backing-format extension an unknown one.
fn erase_backing_format(image: &Path) {
    let bytes = Bytes::of(image);
    let (at, _) = bytes.extension(0xe279_2aca).expect("a backing format");
    bytes.put32(at - 8, 0x7777_7777);
}

fn guest_header(world: &World) {
    let trap = world.overlay("trap.qcow2", &world.secret.to_string_lossy(), "raw");
    let disk = world.scratch.path("disk.raw");
    std::fs::copy(&trap, &disk).expect("copy");
    Bytes::of(&disk).set_len(4 * MIB);
    for watched in world.readers(&disk, &[]) {
        watched.did_not_open(SECRET);
    }
    // Named as raw it is raw, header and all.
    let copy = world.scratch.path("copy.raw");
    let run = bitferry().args(["copy", "-f", "raw", "-O", "raw"]).arg(&disk).arg(&copy);
    run.output().expect_exit(Exit::Done);
    assert!(std::fs::read(&disk).expect("read") == std::fs::read(&copy).expect("read"));
}

fn broken_below(world: &World) {
    let below = make(&world.scratch, "below.qcow2", MIB).write(1, 0, 65536).done();
    let bytes = Bytes::of(&below);
    bytes.put64(bytes.be64(40), u64::MAX);
    let image = world.overlay("a.qcow2", "below.qcow2", "qcow2");
    world.fails(&image, &["--allow-backing"], "below.qcow2");
}

fn missing_below(world: &World) {
    let image = world.overlay("a.qcow2", "nowhere.qcow2", "qcow2");
    world.fails(&image, &["--allow-backing"], "nowhere.qcow2");
}

fn sizes(world: &World) {
    for size in [512, MIB / 2 + 512, 3 * MIB] {
        let name = format!("b{size}.raw");
        make(&world.scratch, &name, size).format("raw").write(7, 0, size.min(MIB / 2)).done();
        let image = world.overlay("a.qcow2", &name, "raw");
        let copy = world.scratch.path("copy.raw");
        let run = bitferry().args(["copy", "--flatten", "-O", "raw"]).arg(&image).arg(&copy);
        run.output().expect_exit(Exit::Done);
        same_content((&image, "qcow2"), (&copy, "raw"));
        std::fs::remove_file(&copy).expect("remove");
    }
}

/// An image with an external data file that is then called `name`.
fn with_data_file(world: &World, name: &str, is_raw: bool) -> PathBuf {
    let data = world.scratch.path("0123456789012345678901234567890123456789.data");
    let image = make(&world.scratch, "a.qcow2", MIB);
    let image = image.option(format!("data_file={}", data.display()));
    let image = image.option(if is_raw { "data_file_raw=on" } else { "data_file_raw=off" });
    let image = image.write(1, 0, 65536).done();
    let bytes = Bytes::of(&image);
    let (at, len) = bytes.extension(0x4441_5441).expect("a data file");
    assert!(name.len() <= len as usize, "{name} is too long");
    // A shorter name, and what is left of the old one as an unknown extension.
    let mut text = name.as_bytes().to_vec();
    text.resize(name.len().next_multiple_of(8), 0);
    bytes.put32(at - 4, name.len() as u32).put(at, &text);
    let left = u64::from(len).next_multiple_of(8) - text.len() as u64;
    if left >= 8 {
        let rest = at + text.len() as u64;
        bytes.put32(rest, 0x7777_7777).put32(rest + 4, (left - 8) as u32);
    }
    image
}

fn data_file(world: &World) {
    for is_raw in [false, true] {
        let image = with_data_file(world, &world.secret.to_string_lossy(), is_raw);
        world.refuses(&image, SECRET);
    }
    let image = with_data_file(world, "json:{\"driver\":\"null-co\"}", false);
    world.refuses(&image, "null-co");
    world.fails(&image, &["--allow-backing"], "json");
    Run::new("mkfifo").arg(world.scratch.path("fifo")).ok();
    let image = with_data_file(world, "fifo", false);
    world.fails(&image, &["--allow-backing"], "fifo");
}

fn own_data_file(world: &World) {
    let image = with_data_file(world, "a.qcow2", false);
    world.fails(&image, &["--allow-backing"], "a.qcow2");
}

fn short_data_file(world: &World) {
    let short = world.scratch.path("short");
    let image = with_data_file(world, &short.to_string_lossy(), false);
    std::fs::write(&short, [1; 512]).expect("write");
    for watched in world.readers(&image, &["--allow-backing"]) {
        // QEMU reads zeroes behind the end; a refusal is better, another content is not.
        if watched.verb == "copy" && watched.output.status.success() {
            same_content((&image, "qcow2"), (&world.scratch.path("copied"), "raw"));
        }
    }
}

fn data_file_and_backing(world: &World) {
    make(&world.scratch, "b.raw", MIB).format("raw").write(7, 0, MIB).done();
    let image = make(&world.scratch, "a.qcow2", MIB).backing("b.raw", "raw");
    let data = format!("data_file={}", world.scratch.path("a.data").display());
    let image = image.option(data).write(1, 65536, 65536).done();
    world.refuses(&image, "b.raw");
    let copy = world.scratch.path("copy.raw");
    let run = bitferry().args(["copy", "--flatten", "-O", "raw"]).arg(&image).arg(&copy);
    run.output().expect_exit(Exit::Done);
    same_content((&image, "qcow2"), (&copy, "raw"));
}
