//! `adit-mediator doctor`.

use adit_client::events::{print_line, printable};
use clap::Args;
use serde_json::json;

use super::Data;
use crate::doctor::{Finding, Level, examine};
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
        for Finding { level, text, remedy } in &findings {
            let name = match level {
                Level::Fine => "ok",
                Level::Note => "note",
                Level::Fault => "FAULT",
            };
            if self.json {
                print_line(
                    &json!({"level": name.to_lowercase(), "text": text, "remedy": remedy}).to_string(),
                );
                continue;
            }
            print_line(&format!("{name:5} {}", printable(text, 400)));
            if let Some(remedy) = remedy {
                print_line(&format!("      {}", printable(remedy, 400)));
            }
        }
        match findings.iter().filter(|finding| finding.level == Level::Fault).count() {
            0 => Ok(()),
            faults => Err(Error::Faults(faults)),
        }
    }
}
