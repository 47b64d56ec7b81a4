//! `--control`: an operation that `bitferry control` looks at, hurries and calls off.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args as Group;

use bitferry::control::{Metered, Server, Supervised};
use bitferry::status::Migration;
use bitferry::{Blame, Error, Observer, Result};
use mig_core::meter::Meter;

/// Where commands are taken.
#[derive(Debug, Clone, Default, Group)]
pub(crate) struct ControlArgs {
    /// Answer commands of `bitferry control` there: how it stands, another bandwidth, calling it
    /// off
    #[arg(long, value_name = "unix:PATH", value_parser = place, help_heading = "Transport")]
    control: Option<PathBuf>,
}

/// The path of `unix:PATH`.
fn place(text: &str) -> std::result::Result<PathBuf, String> {
    let path = text.strip_prefix("unix:").filter(|path| !path.is_empty());
    path.map(PathBuf::from).ok_or_else(|| "it is unix:PATH".to_owned())
}

impl ControlArgs {
    /// Runs `operation` under an observer that listens to commands too, until it has ended.
    /// Commands change `meter`, where this side has one; `downtime` is only written down.
    pub(crate) fn supervise<T>(
        &self,
        (meter, downtime): (Option<&Arc<Meter>>, Duration),
        observer: &dyn Observer,
        operation: impl FnOnce(&dyn Observer) -> Result<T>,
    ) -> Result<T> {
        let rate = meter.and_then(|meter| meter.bandwidth()).unwrap_or(0);
        let migration = Arc::new(Migration::new(rate, downtime));
        let _server = self.listen(&migration, meter)?;
        let supervised = Supervised::new(observer, migration);
        let result = operation(&supervised).map_err(|error| match error.blame() {
            // Ctrl-C reaches the ssh that carries the connection as well.
            Blame::Transport if supervised.is_cancelled() => Error::Interrupted,
            _ => error,
        });
        supervised.end(result.as_ref().err());
        result
    }

    fn listen(
        &self,
        migration: &Arc<Migration>,
        meter: Option<&Arc<Meter>>,
    ) -> Result<Option<Server>> {
        let Some(path) = &self.control else { return Ok(None) };
        let (migration, meter) = (migration.clone(), meter.cloned());
        let server = Server::start(path, Arc::new(Metered { migration, meter }));
        let failed = |source| Error::File { action: "listen at", path: path.clone(), source };
        server.map(Some).map_err(failed)
    }
}
