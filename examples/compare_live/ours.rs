//! A guest of this process, moved to another process.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Instant;

use bitferry::Silent;
use bitferry::connect::{self, Options};
use bitferry::live::{LiveImage, Outgoing};
use bitferry::options::DiskOption;
use bitferry::outgoing::Outcome;
use bitferry::receive::{self, Arrivals, ReceiveOptions};
use mig_core::guest::{Guest, GuestError};

use crate::{Places, Result, Taken, WRITE_BYTES, wait_for_turn};

/// Whether the guest runs. It holds the lock while it writes.
#[derive(Default)]
struct Power(Mutex<bool>);

impl Power {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Guest for &Power {
    fn pause(&mut self) -> std::result::Result<(), GuestError> {
        *self.lock() = false;
        Ok(())
    }

    fn resume(&mut self) -> std::result::Result<(), GuestError> {
        *self.lock() = true;
        Ok(())
    }
}

pub(crate) fn run(source: &Path, target: &Path, mib: u64) -> Result<Taken> {
    let image = LiveImage::open(source)?;
    let (receiver, uri) = receiver(target)?;
    let dialer = connect::dial(&uri.parse()?, &Options::default())?;
    let (power, is_over) = (Power(Mutex::new(true)), AtomicBool::new(false));
    let begun = Instant::now();
    let (report, writes) = std::thread::scope(|scope| {
        let guest = scope.spawn(|| write(&image, &power, &is_over, mib));
        let report = Outgoing::builder()
            .disk("disk", image.disk().clone(), image.bitmaps().clone())
            .build()
            .and_then(|outgoing| outgoing.run(&dialer, &mut &power));
        is_over.store(true, Ordering::Relaxed);
        let writes = guest.join().map_err(|_| "the guest panicked")??;
        Result::Ok((report?, writes))
    })?;
    let total = begun.elapsed();
    ended(receiver)?;
    if !matches!(report.sent.outcome, Outcome::Completed) {
        return Err(format!("{report:?}").into());
    }
    image.close()?;
    Ok(Taken { pause: report.downtime, total, writes })
}

/// What the guest does. It answers how often it wrote.
fn write(image: &LiveImage, power: &Power, is_over: &AtomicBool, mib: u64) -> Result<u64> {
    let (mut places, mut due, mut writes) = (Places::new(mib), Instant::now(), 0u64);
    while !is_over.load(Ordering::Relaxed) {
        wait_for_turn(&mut due);
        let is_running = power.lock();
        if *is_running {
            writes += 1;
            let bytes = vec![writes.to_le_bytes()[0]; usize::try_from(WRITE_BYTES)?];
            image.disk().write(&bytes, places.next())?;
        }
    }
    Ok(writes)
}

fn receiver(target: &Path) -> Result<(Child, String)> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("receive").arg(target).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn()?;
    let mut uri = String::new();
    BufReader::new(child.stdout.take().ok_or("no output")?).read_line(&mut uri)?;
    Ok((child, uri.trim().to_owned()))
}

fn ended(mut child: Child) -> Result<()> {
    let status = child.wait()?;
    if status.success() { Ok(()) } else { Err(format!("the destination: {status}").into()) }
}

/// The other process.
pub(crate) fn be_destination(target: &Path) -> Result<()> {
    let listener = connect::listen(&"tcp:127.0.0.1:0".parse()?, &Options::default())?;
    println!("{}", listener.uri());
    let (_tell, told) = mpsc::channel();
    let arrivals = Arrivals::new(&listener, &Silent, told);
    let disk =
        DiskOption { id: "disk".into(), path: target.into(), format: None, is_readonly: false };
    let options = ReceiveOptions { disks: vec![disk], ..ReceiveOptions::default() };
    let report = receive::run(&options, &arrivals, &Silent)?;
    if bitferry::exit_status(&report) == 0 { Ok(()) } else { Err(format!("{report:?}").into()) }
}
