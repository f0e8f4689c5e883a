//! `adit-mediator doctor`.

use adit_client::doctor;
use clap::Args;

use super::Data;
use crate::doctor::examine;
use crate::error::Error;

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct Doctor {
    #[command(flatten)]
    data: Data,
    /// Let this agent, which must be online, try from where it is.
    #[arg(long, value_name = "AGENT")]
    from: Option<String>,
    /// One JSON object a line.
    #[arg(long)]
    json: bool,
}

impl Doctor {
    /// Looks at everything and says what it found.
    ///
    /// # Errors
    /// [`Error::Faults`] when something does not work.
    pub(super) async fn run(self) -> Result<(), Error> {
        let findings = examine(self.data.owned()?, self.from.as_deref()).await?;
        match doctor::print(&findings, self.json) {
            0 => Ok(()),
            faults => Err(Error::Faults(faults)),
        }
    }
}
