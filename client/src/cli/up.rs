//! `adit up`.

use std::time::Duration;

use adit_protocol::Role;
use clap::Args;
use tokio::time::timeout;

use super::data::Data;
use super::{CliError, Failed, signals};
use crate::control::hello;
use crate::control::maintain::{State, maintain};
use crate::control::shared::{self, Switchboard};
use crate::events::{Event, Events};
use crate::status;

/// How long the mediator may take to hear that this ends.
const GOODBYE: Duration = Duration::from_secs(2);

/// Keep the connection to the mediator up for the other commands of this technician.
///
/// While it runs, forward, stdio, ls, rdp, ssh, http and redirect use its connection and open their sessions sooner. It
/// runs until Ctrl-C and reconnects for ever; commands that are under way when it ends go on without it.
#[derive(Debug, Args)]
#[command(after_help = "Example: adit up &")]
pub(super) struct UpCommand {
    #[command(flatten)]
    data: Data,
    /// Events as JSON, one object a line.
    #[arg(long)]
    json: bool,
}

impl UpCommand {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let (dir, identity) = self.data.identity(Role::Technician)?;
        let listener = shared::listen(&dir, identity.get().device_id)
            .await
            .map_err(|error| CliError::Share { dir: dir.clone(), error })?;
        let process = status::Process { command: "up", device: identity.get().name.clone() };
        let _status = status::serve(&dir, process, Vec::new);
        let (control, downs) = maintain(identity, || hello(vec![]), None);
        let events = Events::new(self.json);
        let mut state = control.state();
        let board = Switchboard::run(control.clone(), downs, listener);
        let stop = signals::stop();
        tokio::pin!(board, stop);
        let mut offline = None;
        loop {
            tokio::select! {
                () = &mut board => break,
                () = &mut stop => break,
                changed = state.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    // Said once, and not at every attempt.
                    match &*state.borrow_and_update() {
                        State::Connected(_) => {
                            offline = None;
                            events.emit(&Event::Online);
                        }
                        state => {
                            let news = state.why_offline().filter(|why| offline.replace(why.clone()).as_ref() != Some(why));
                            news.iter().for_each(|reason| events.emit(&Event::Offline { reason }));
                        }
                    }
                }
            }
        }
        // A channel that is not there yet may take its time.
        let _ = timeout(GOODBYE, control.close()).await;
        Ok(())
    }
}
