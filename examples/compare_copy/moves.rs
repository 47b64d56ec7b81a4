//! The same image, moved over TCP on the loopback interface by everybody, from one process to
//! another. Receivers and servers are up before the clock starts; it stops when the destination is
//! written and its process has ended.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bitferry::Silent;
use bitferry::connect::{self, Options};
use bitferry::options::DiskOption;
use bitferry::receive::{self, Arrivals, ReceiveOptions};
use bitferry::send::{self, SendOptions};

use crate::contest::{Contender, Role};
use crate::peak::Taken;
use crate::{Result, contest, image, peak};

/// Bytes that the bare loop writes at a time.
const LOOP_BYTES: usize = 512 << 10;
/// Longest time for a server to come up.
const PATIENCE: Duration = Duration::from_secs(30);

/// Moves in turn and prints the table.
pub(crate) fn run(scratch: &Path, mib: u64, rounds: usize) -> Result<()> {
    let (source, destination) = (scratch.join("source.qcow2"), scratch.join("destination.qcow2"));
    image::make(&source, mib << 20, mib)?;
    println!(
        "{mib} MiB of noise in a qcow2 image with three bitmaps over TCP, {rounds} rounds, warm"
    );
    println!("(nbdcopy carries no bitmaps and proves nothing)\n");
    contest::run(&mut contenders(mib), (&source, &destination), rounds)?;
    Ok(std::fs::remove_file(&source)?)
}

fn contenders(mib: u64) -> Vec<Contender> {
    let mut all = Vec::new();
    for (mode, further) in [("proof", ""), ("no-proof", " --no-verify")] {
        for channels in ["1", "2", "4"] {
            let name = format!("bitferry send --channels {channels}{further}");
            all.push(Contender::new(name, Role::Runner, move |s, d| ours(s, d, mode, channels)));
        }
    }
    if peak::is_here("nbdcopy") && peak::is_here("qemu-nbd") && peak::is_here("qemu-img") {
        let name = "nbdcopy between two qemu-nbd";
        all.push(Contender::new(name, Role::Peer, move |s, d| nbdcopy(s, d, mib)));
    }
    for connections in ["1", "2"] {
        let name = format!("bare loop: memory to memory, {connections} connections");
        let role = if connections == "2" { Role::Limit } else { Role::Runner };
        all.push(Contender::new(name, role, move |_, _| bare(mib, connections)));
    }
    all
}

/// `send` in one process to `receive` in another.
fn ours(source: &Path, destination: &Path, mode: &str, channels: &str) -> Result<Taken> {
    let (receiver, port) = server(&[Path::new("receive"), destination])?;
    let begun = Instant::now();
    let port = port.to_string();
    let sent = peak::run(&mut this(&[Path::new("send"), source], &[mode, channels, &port])?)?;
    ended(receiver)?;
    Ok(Taken { time: begun.elapsed(), peak_kib: sent.peak_kib })
}

/// Threads that read into warm memory, and threads that write from it.
fn bare(mib: u64, connections: &str) -> Result<Taken> {
    let (receiver, port) = server(&[Path::new("sink"), Path::new(connections)])?;
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
fn server(part: &[&Path]) -> Result<(Child, u16)> {
    let mut child = this(part, &[])?.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
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
        ("receive", []) => be_destination(place),
        ("send", [mode, channels, port]) => be_source(place, mode, channels.parse()?, port),
        ("sink", []) => be_sink(place.to_string_lossy().parse()?),
        ("pump", [connections, port, mib]) => {
            be_pump(connections.parse()?, port.parse()?, mib.parse()?)
        }
        _ => Err(format!("{part} is no part").into()),
    }
}

fn disk(path: &Path) -> DiskOption {
    DiskOption { id: "disk".into(), path: path.to_owned(), format: None, is_readonly: false }
}

fn be_destination(path: &Path) -> Result<()> {
    let listener = connect::listen(&"tcp:127.0.0.1:0".parse()?, &Options::default())?;
    let uri = listener.uri().to_string();
    println!("{}", uri.rsplit(':').next().unwrap_or_default());
    let (_tell, told) = mpsc::channel();
    let arrivals = Arrivals::new(&listener, &Silent, told);
    let options = ReceiveOptions { disks: vec![disk(path)], ..ReceiveOptions::default() };
    let report = receive::run(&options, &arrivals, &Silent)?;
    if bitferry::exit_status(&report) == 0 { Ok(()) } else { Err(format!("{report:?}").into()) }
}

fn be_source(path: &Path, mode: &str, channels: u16, port: &str) -> Result<()> {
    let dialer = connect::dial(&format!("tcp:127.0.0.1:{port}").parse()?, &Options::default())?;
    let no_verify = mode == "no-proof";
    let options =
        SendOptions { disks: vec![disk(path)], channels, no_verify, ..SendOptions::default() };
    let report = send::run(&options, &dialer, &Silent)?;
    if bitferry::exit_status(&report) != 0 {
        return Err(format!("{report:?}").into());
    }
    peak::tell()
}

/// Reads each connection twice into the same memory: the first time warms it.
fn be_sink(connections: usize) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    println!("{}", listener.local_addr()?.port());
    let mut threads = Vec::new();
    for _ in 0..connections {
        let (mut stream, _) = listener.accept()?;
        threads.push(std::thread::spawn(move || -> std::io::Result<()> {
            let mut len = [0; 8];
            stream.read_exact(&mut len)?;
            let len = usize::try_from(u64::from_be_bytes(len)).unwrap_or(0);
            let mut memory = vec![0u8; len];
            for _ in 0..2 {
                stream.read_exact(&mut memory)?;
                stream.write_all(b"!")?;
            }
            Ok(())
        }));
    }
    for thread in threads {
        thread.join().map_err(|_| "a thread of the sink panicked")??;
    }
    Ok(())
}

/// Writes the same memory twice and tells how many microseconds the second time took.
fn be_pump(connections: usize, port: u16, mib: usize) -> Result<()> {
    let len = (mib << 20) / connections.max(1);
    let lines = (0..connections).map(|_| TcpStream::connect((Ipv4Addr::LOCALHOST, port)));
    let mut pumps = Vec::new();
    for line in lines {
        let mut line = line?;
        line.set_nodelay(true)?;
        line.write_all(&(len as u64).to_be_bytes())?;
        pumps.push((line, vec![1u8; len]));
    }
    let mut micros = 0;
    for _ in 0..2 {
        let begun = Instant::now();
        std::thread::scope(|scope| {
            let pump = |(line, memory): &mut (TcpStream, Vec<u8>)| -> std::io::Result<()> {
                memory.chunks(LOOP_BYTES).try_for_each(|chunk| line.write_all(chunk))?;
                line.read_exact(&mut [0])
            };
            let threads: Vec<_> = pumps.iter_mut().map(|p| scope.spawn(move || pump(p))).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or(Ok(())))
        })?;
        micros = begun.elapsed().as_micros();
    }
    println!("{micros}");
    Ok(())
}
