//! The bare loop: what this machine gives to bytes between two processes over loopback when
//! nothing is done with them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::Instant;

use crate::Result;

/// Bytes that are written at a time.
const LOOP_BYTES: usize = 512 << 10;

/// Reads each connection twice into the same memory: the first time warms it.
pub(crate) fn be_sink(connections: usize) -> Result<()> {
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
pub(crate) fn be_pump(connections: usize, port: u16, mib: usize) -> Result<()> {
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
