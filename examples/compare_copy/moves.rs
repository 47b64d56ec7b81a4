//! The same image, moved over TCP on the loopback interface by everybody, from one process to
//! another. Receivers and servers are up before the clock starts; it stops when the destination is
//! written and its process has ended.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bitferry::Silent;
use bitferry::connect::{self, Options, Tls};
use bitferry::options::DiskOption;
use bitferry::receive::{self, Arrivals, ReceiveOptions};
use bitferry::send::{self, SendOptions};

use mig_core::stream::{Compression, Method};

use crate::contest::{Contender, Role};
use crate::image::Noise;
use crate::peak::Taken;
use crate::{Result, bare, certificates, cipher, contest, image, peak, qemus};

const ZSTD: Compression = Compression { method: Method::Zstd, level: None };
/// Longest time for a server to come up.
const PATIENCE: Duration = Duration::from_secs(30);

/// How `send` is called.
#[derive(Debug, Clone, Copy)]
struct How {
    channels: &'static str,
    /// `proof` or `no-proof`.
    mode: &'static str,
    /// `plain`, `tls` or `zstd`.
    line: &'static str,
}

/// Moves in turn and prints the tables.
pub(crate) fn run(scratch: &Path, mib: u64, rounds: usize) -> Result<()> {
    let paths = (&*scratch.join("source.qcow2"), &*scratch.join("destination.qcow2"));
    let certificates = scratch.join("tls");
    std::fs::create_dir(&certificates)?;
    certificates::make(&certificates)?;

    image::make(paths.0, mib << 20, mib, Noise::Pure)?;
    println!(
        "{mib} MiB of noise in a qcow2 image with three bitmaps over TCP, {rounds} rounds, warm"
    );
    println!("(nbdcopy and blk carry no bitmaps, and no peer proves anything)\n");
    contest::run(&mut contenders(mib), paths, rounds)?;
    std::fs::remove_file(paths.0)?;

    image::make(paths.0, mib << 20, mib, Noise::Half)?;
    println!("The same, of content that compresses to a half\n");
    let ways = ["plain", "zstd"].map(|line| How { channels: "2", mode: "proof", line });
    contest::run(&mut ways.map(us), paths, rounds)?;
    Ok(std::fs::remove_file(paths.0)?)
}

fn contenders(mib: u64) -> Vec<Contender> {
    let mut all = Vec::new();
    for mode in ["proof", "no-proof"] {
        for (channels, line) in
            [("1", "plain"), ("2", "plain"), ("4", "plain"), ("1", "tls"), ("2", "tls")]
        {
            all.push(us(How { channels, mode, line }));
        }
    }
    if peak::is_here("nbdcopy") && peak::is_here("qemu-nbd") && peak::is_here("qemu-img") {
        let name = "nbdcopy between two qemu-nbd";
        all.push(Contender::new(name, Role::Peer("nbdcopy"), move |s, d| nbdcopy(s, d, mib)));
    }
    all.extend(qemus::contenders(mib));
    for connections in ["1", "2"] {
        let name = format!("bare loop: memory to memory, {connections} connections");
        let role = if connections == "2" { Role::Limit("bare loop") } else { Role::Runner };
        all.push(Contender::new(name, role, move |_, _| bare(mib, connections)));
    }
    let name = "AES-256-GCM alone, one core, the slower end";
    all.push(Contender::new(name, Role::Runner, move |_, _| cipher(mib)));
    all
}

fn us(how: How) -> Contender {
    let mut name = format!("bitferry send --channels {}", how.channels);
    match how.line {
        "tls" => name.push_str(" --tls-dir …"),
        "zstd" => name.push_str(" --compress zstd"),
        _ => {}
    }
    if how.mode == "no-proof" {
        name.push_str(" --no-verify");
    }
    Contender::new(name, Role::Runner, move |s, d| ours(s, d, how))
}

/// `send` in one process to `receive` in another.
fn ours(source: &Path, destination: &Path, how: How) -> Result<Taken> {
    let certificates = match how.line {
        "tls" => source.with_file_name("tls"),
        _ => "-".into(),
    };
    let certificates = certificates.to_string_lossy();
    let (receiver, port) =
        server(&[Path::new("receive"), destination], &[how.mode, &certificates])?;
    let begun = Instant::now();
    let port = port.to_string();
    let asked = [how.mode, how.channels, how.line, &certificates, &port];
    let sent = peak::run(&mut this(&[Path::new("send"), source], &asked)?)?;
    ended(receiver)?;
    Ok(Taken { time: begun.elapsed(), peak_kib: sent.peak_kib })
}

fn cipher(mib: u64) -> Result<Taken> {
    let (sealing, opening) = cipher::times(usize::try_from(mib)?)?;
    Ok(Taken { time: sealing.max(opening), peak_kib: None })
}

/// Threads that read into warm memory, and threads that write from it.
fn bare(mib: u64, connections: &str) -> Result<Taken> {
    let (receiver, port) = server(&[Path::new("sink"), Path::new(connections)], &[])?;
    let (port, mib) = (port.to_string(), mib.to_string());
    let arguments = [connections, &port, &mib];
    let output = this(&[Path::new("pump"), Path::new("-")], &arguments)?.output()?;
    ended(receiver)?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let micros = said.trim().parse().map_err(|_| format!("the bare loop said {said:?}"))?;
    Ok(Taken { time: Duration::from_micros(micros), peak_kib: None })
}

fn nbdcopy(source: &Path, destination: &Path, mib: u64) -> Result<Taken> {
    let size = format!("{mib}M");
    let create = ["create", "-q", "-f", "qcow2"];
    peak::run(Command::new("qemu-img").args(create).arg(destination).arg(size))?;
    let from = nbd(&["-r", "-f", "qcow2"], source)?;
    let to = nbd(&["-f", "qcow2", "--discard=unmap"], destination)?;
    let begun = Instant::now();
    let uri = |port: u16| format!("nbd://127.0.0.1:{port}");
    peak::run(Command::new("nbdcopy").arg("--flush").args([uri(from.1), uri(to.1)]))?;
    terminate(to.0)?;
    let time = begun.elapsed();
    terminate(from.0)?;
    Ok(Taken { time, peak_kib: None })
}

/// A `qemu-nbd` that listens.
fn nbd(options: &[&str], image: &Path) -> Result<(Child, u16)> {
    // The port is free when it is looked at; a collision fails the run, it does not spoil it.
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=16", "-b", "127.0.0.1", "-p", &port.to_string()]);
    let child = command.args(options).arg(image).stdin(Stdio::null()).spawn()?;
    let begun = Instant::now();
    while TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_err() {
        if begun.elapsed() > PATIENCE {
            terminate(child)?;
            return Err("qemu-nbd does not listen".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok((child, port))
}

fn terminate(mut child: Child) -> Result<()> {
    let id = child.id().to_string();
    peak::run(Command::new("kill").args(["-TERM", &id]))?;
    child.wait()?;
    Ok(())
}

/// This program again, with the part that it plays.
fn this(part: &[&Path], arguments: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("move").args(part).args(arguments);
    Ok(command)
}

/// A part that tells the port on which it listens.
fn server(part: &[&Path], arguments: &[&str]) -> Result<(Child, u16)> {
    let mut child = this(part, arguments)?.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().ok_or("no output")?;
    let mut line = String::new();
    BufReader::new(stdout).read_line(&mut line)?;
    match line.trim().parse() {
        Ok(port) => Ok((child, port)),
        Err(_) => Err(format!("a server that does not start: {:?}", child.wait()?).into()),
    }
}

fn ended(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("the destination: {status}").into()) }
}

/// One part, in its own process.
pub(crate) fn child(part: &str, place: &Path, arguments: &[String]) -> Result<()> {
    match (part, arguments) {
        ("receive", [mode, certificates]) => be_destination(place, mode, certificates),
        ("send", arguments) => be_source(place, arguments),
        ("sink", []) => bare::be_sink(place.to_string_lossy().parse()?),
        ("pump", [connections, port, mib]) => {
            bare::be_pump(connections.parse()?, port.parse()?, mib.parse()?)
        }
        _ => Err(format!("{part} is no part").into()),
    }
}

fn disk(path: &Path) -> DiskOption {
    DiskOption { id: "disk".into(), path: path.to_owned(), format: None, is_readonly: false }
}

/// What a connection needs. `-`: it is not encrypted.
fn line(certificates: &str) -> Options {
    let tls = (certificates != "-").then(|| Tls::new(certificates.as_ref(), None));
    Options { tls, ..Options::default() }
}

fn be_destination(path: &Path, mode: &str, certificates: &str) -> Result<()> {
    let listener = connect::listen(&"tcp:127.0.0.1:0".parse()?, &line(certificates))?;
    let uri = listener.uri().to_string();
    println!("{}", uri.rsplit(':').next().unwrap_or_default());
    let (_tell, told) = mpsc::channel();
    let arrivals = Arrivals::new(&listener, &Silent, told);
    // Otherwise it reads back what the source leaves unproved.
    let no_verify = mode == "no-proof";
    let options = ReceiveOptions { disks: vec![disk(path)], no_verify, ..Default::default() };
    let report = receive::run(&options, &arrivals, &Silent)?;
    if bitferry::exit_status(&report) == 0 { Ok(()) } else { Err(format!("{report:?}").into()) }
}

fn be_source(path: &Path, arguments: &[String]) -> Result<()> {
    let [mode, channels, kind, certificates, port] = arguments else {
        return Err(format!("{arguments:?} are not how to send").into());
    };
    let dialer = connect::dial(&format!("tcp:127.0.0.1:{port}").parse()?, &line(certificates))?;
    let options = SendOptions {
        disks: vec![disk(path)],
        channels: channels.parse()?,
        no_verify: mode == "no-proof",
        compression: (kind == "zstd").then_some(ZSTD),
        ..SendOptions::default()
    };
    let report = send::run(&options, &dialer, &Silent)?;
    if bitferry::exit_status(&report) != 0 {
        return Err(format!("{report:?}").into());
    }
    peak::tell()
}
