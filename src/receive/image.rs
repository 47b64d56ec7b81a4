//! One new image, in one attempt.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use mig_core::section::Registry;
use mig_core::stream;
use mig_core::transport::Listen;

use crate::Result;
use crate::berth::{DiskPlace, FileOptions, Files};
use crate::copy::{Format, TargetOptions};
use crate::incoming::{IncomingOptions, Received, receive};
use crate::renames::Renames;

/// A place for a new qcow2 image at `path`, for the disk that is called `name` on the wire. Nothing
/// outlives an attempt that fails.
pub fn new_image(name: &str, path: PathBuf) -> Files {
    let place = DiskPlace {
        name: name.to_owned(),
        path,
        format: Format::Qcow2,
        target: TargetOptions::default(),
        base: None,
        renames: Renames::default(),
    };
    Files::new(vec![place], FileOptions { keeps_nothing: true, ..FileOptions::default() })
}

/// Receives one image that [`send_image`](crate::outgoing::send_image) sends, and publishes it at
/// `target`, which must not exist, as qcow2. Until the source has agreed to the proof the image has
/// a temporary name.
pub fn receive_image(listen: &dyn Listen, target: &Path) -> Result<Received> {
    let main = listen.accept(None).map_err(stream::Error::Connect)?;
    let destination = Arc::new(new_image("disk0", target.to_owned()));
    let options = IncomingOptions { resumes: false, ..IncomingOptions::new(&block_mig::Unwatched) };
    Ok(receive(main, listen, destination, Registry::new(), &options)?)
}
