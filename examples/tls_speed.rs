//! How fast is a connection, and what does its encryption cost?
//!
//! ```text
//! cargo run --release --example tls_speed -- [--mib N] [--rounds N]
//! ```
//!
//! Two threads of this process are connected over loopback: one writes 512 KiB at a time from warm
//! memory, one reads into warm memory. It prints medians: in clear, with TLS, and the limit: what
//! one core seals with the same cipher in records of the same size and another opens, without any
//! socket, and what remains of it when the bytes have to pass through a socket too.

use std::io::{Read, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use bitferry::connect::{Connection, Dial as _, Listen as _, Options, Tls, Uri, dial, listen};

#[path = "common/certificates.rs"]
mod certificates;
#[path = "common/cipher.rs"]
mod cipher;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Written or read at once.
const UNIT: usize = 512 << 10;

struct Asked {
    mib: usize,
    rounds: usize,
}

fn asked(mut arguments: impl Iterator<Item = String>) -> Result<Asked> {
    let mut asked = Asked { mib: 1024, rounds: 5 };
    while let Some(argument) = arguments.next() {
        let value = arguments.next().ok_or(format!("{argument} needs a value"))?;
        match argument.as_str() {
            "--mib" => asked.mib = value.parse()?,
            "--rounds" => asked.rounds = value.parse()?,
            _ => return Err(format!("{argument} is not known").into()),
        }
    }
    Ok(asked)
}

fn main() -> ExitCode {
    match asked(std::env::args().skip(1)).and_then(|asked| measure(&asked)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

fn measure(asked: &Asked) -> Result<()> {
    let directory = tempfile::tempdir()?;
    certificates::make(directory.path())?;
    let plain = Options::default();
    let encrypted = Options { tls: Some(Tls::new(directory.path(), None)), ..Options::default() };
    let mut rows: [Vec<f64>; 4] = Default::default();
    for _ in 0..asked.rounds {
        let (seal, open) = cipher::times(asked.mib)?;
        let (seal, open) = (rate(asked.mib, seal), rate(asked.mib, open));
        let clear = through(&plain, asked.mib)?;
        let tls = through(&encrypted, asked.mib)?;
        for (row, rate) in rows.iter_mut().zip([seal, open, clear, tls]) {
            row.push(rate);
        }
    }
    let [seal, open, clear, tls] = rows.map(median);
    let limit = seal.min(open);
    let behind_socket = 1.0 / (1.0 / limit + 1.0 / clear);
    println!("GiB/s, medians of {} rounds of {} MiB", asked.rounds, asked.mib);
    println!("  AES-256-GCM, one core seals        {seal:6.2}");
    println!("  AES-256-GCM, one core opens        {open:6.2}");
    println!("  connection in the clear            {clear:6.2}");
    println!("  connection with TLS                {tls:6.2}");
    println!("  of the cipher                      {:6.2}", tls / limit);
    println!("  of the cipher behind a socket      {:6.2}", tls / behind_socket);
    Ok(())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates.get(rates.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rate(mib: usize, took: Duration) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
    let mib = mib as f64;
    mib / 1024.0 / took.as_secs_f64()
}

/// Rate of a connection that is already there and warm.
fn through(options: &Options, mib: usize) -> Result<f64> {
    let listener = listen(&"tcp:127.0.0.1:0".parse()?, options)?;
    let uri = listener.uri().clone();
    std::thread::scope(|scope| {
        let writing = scope.spawn(|| write(&uri, options, mib));
        let connection = listener.accept(Some(Duration::from_secs(30)))?;
        let rate = read(connection, mib)?;
        writing.join().map_err(|_| "the writer panicked")??;
        Ok(rate)
    })
}

fn write(uri: &Uri, options: &Options, mib: usize) -> Result<()> {
    let mut connection = dial(uri, options)?.dial()?;
    let unit = vec![0x5a; UNIT];
    for _ in 0..(mib << 20) / UNIT + 1 {
        connection.writer.write_all(&unit)?;
    }
    connection.writer.flush()?;
    // Until the other side has read all of it.
    connection.reader.read_exact(&mut [0])?;
    Ok(())
}

fn read(mut connection: Connection, mib: usize) -> Result<f64> {
    let mut unit = vec![0; UNIT];
    // The first one warms both sides up.
    connection.reader.read_exact(&mut unit)?;
    let begun = Instant::now();
    for _ in 0..(mib << 20) / UNIT {
        connection.reader.read_exact(&mut unit)?;
    }
    let took = begun.elapsed();
    connection.writer.write_all(b"!")?;
    connection.writer.flush()?;
    Ok(rate(mib, took))
}
