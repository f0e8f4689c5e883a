//! `adit forward`.

use adit_protocol::Target;
use clap::Args;
use tokio::task::JoinSet;

use super::technician::SessionArgs;
use super::{CliError, Failed, signals};
use crate::events::{Event, Events};
use crate::forward::{ForwardSpec, Listener};
use crate::session::SessionEvent;

/// Make targets beside an agent reachable on local ports.
///
/// Port 0 chooses a port, the same one each time where it is free, and says which. It runs until Ctrl-C,
/// which closes all connections and the session (exit code 0), or until the session ends (1).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    adit forward office-pc -L 13389:127.0.0.1:3389          then: xfreerdp /v:127.0.0.1:13389\n  \
    adit forward office-pc -L 0:intranet:80 -L 5353:10.0.0.53:53/udp")]
pub(super) struct Forward {
    #[command(flatten)]
    session: SessionArgs,
    /// A local port and the target that it leads to, as seen from the agent. Can be given several times.
    #[arg(short = 'L', value_name = "[BIND:]PORT:HOST:PORT[/udp]", required = true)]
    local: Vec<ForwardSpec>,
    /// Events as JSON, one object a line.
    #[arg(long)]
    json: bool,
}

impl Forward {
    pub(super) async fn run(self) -> Result<(), Failed> {
        // Before anyone is asked for anything.
        self.session.check()?;
        let mut listeners = Vec::new();
        for spec in &self.local {
            listeners.push(Listener::bind(spec, &self.session.agent).await?);
        }
        let targets: Vec<Target> = self.local.iter().map(|spec| spec.target.clone()).collect();
        let mut connected = self.session.open("forward", &targets).await?;
        let events = Events::new(self.json);
        let mut serving = JoinSet::new();
        for listener in listeners {
            events.emit(&Event::Listening { local: listener.local(), target: listener.target() });
            serving.spawn(listener.serve(connected.session.tunnel.clone()));
        }
        let stop = signals::stop();
        tokio::pin!(stop);
        loop {
            tokio::select! {
                event = connected.next() => match event? {
                    Some(event) => {
                        events.emit(&Event::Session { whose: None, event: &event });
                        if let SessionEvent::Closed { reason } = event {
                            return Err(CliError::Ended(reason).into());
                        }
                    }
                    None => return Err(CliError::Ended("its task has ended".to_owned()).into()),
                },
                () = &mut stop => break,
            }
        }
        // Streams first, so that local connections see a reset and not an end of file.
        serving.shutdown().await;
        let closed = connected.close("closed by the technician").await;
        events.emit(&Event::Session { whose: None, event: &closed });
        Ok(())
    }
}
