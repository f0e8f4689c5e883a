//! `adit forward`.

use std::net::SocketAddr;

use adit_protocol::Wanted;
use clap::Args;
use tokio::task::JoinSet;

use super::launch::{self, Launch};
use super::technician::{Connected, SessionArgs};
use super::{CliError, Failed, redirected, signals};
use crate::events::{Event, Events};
use crate::exit::Exit;
use crate::forward::{ForwardSpec, Listener, ProxySpec};
use crate::session::SessionEvent;
use crate::via::Via;

/// Make targets beside an agent reachable on local ports.
///
/// Port 0 chooses a port, the same one each time where it is free, and says which. It runs until Ctrl-C,
/// which closes all connections and the session (exit code 0), or until the session ends (1).
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    adit forward office-pc -L 13389:127.0.0.1:3389          then: xfreerdp /v:127.0.0.1:13389\n  \
    adit forward office-pc -L 0:intranet:80 -L 5353:10.0.0.53:53/udp\n  \
    adit forward office-pc -D 1080                          then: curl -x socks5h://127.0.0.1:1080 http://intranet/")]
pub(super) struct Forward {
    #[command(flatten)]
    session: SessionArgs,
    /// A local port and the target that it leads to, as seen from the agent. Can be given several times.
    #[arg(short = 'L', value_name = "[BIND:]PORT:HOST:PORT[/udp]", required_unless_present = "dynamic")]
    local: Vec<ForwardSpec>,
    /// A local port for a proxy, SOCKS5 and HTTP CONNECT, to every target that the agent allows; it resolves the names.
    #[arg(id = "dynamic", short = 'D', value_name = "[BIND:]PORT")]
    dynamic: Vec<ProxySpec>,
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
        for ProxySpec(address) in &self.dynamic {
            listeners.push(Listener::bind_proxy(*address, &self.session.agent).await?);
        }
        serve(&self.session, "forward", listeners, self.json, Launch::Nothing).await
    }
}

/// Opens a session and serves `listeners` in it until Ctrl-C, until the session ends, or until the program that is
/// launched when it is open has ended.
pub(super) async fn serve(
    session: &SessionArgs,
    command: &'static str,
    listeners: Vec<Listener>,
    json: bool,
    launch: Launch,
) -> Result<(), Failed> {
    let events = Events::new(json);
    let (_, _, via) = session.check()?;
    if via == Via::Redirector {
        let technician = session.connect()?;
        let reason = "asked for with --via";
        return redirected::serve(&technician, session, command, listeners, events, reason, launch).await;
    }
    let wanted: Vec<Wanted> = listeners.iter().map(|listener| listener.wanted().clone()).collect();
    let specs: Vec<_> =
        listeners.iter().map(|listener| (listener.local(), listener.wanted().clone())).collect();
    let mut connected = session.open(command, &wanted).await?;
    let mut serving = JoinSet::new();
    for listener in listeners {
        events.emit(&Event::Listening { local: listener.local(), target: listener.wanted() });
        serving.spawn(listener.serve(connected.session.tunnel.clone()));
    }
    let (mut launch, mut program) = (Some(launch), None);
    let stop = signals::stop();
    tokio::pin!(stop);
    loop {
        tokio::select! {
            event = connected.next() => match event {
                Ok(Some(event)) => {
                    events.emit(&Event::Session { whose: None, event: &event });
                    match event {
                        SessionEvent::Closed { reason } => return Err(CliError::Ended(reason).into()),
                        SessionEvent::Tier { .. } => {
                            program = program.or(launch.take().and_then(Launch::start));
                        }
                        _ => {}
                    }
                }
                Ok(None) => return Err(CliError::Ended("its task has ended".to_owned()).into()),
                // Neither tier above has come about.
                Err(not_opened) if connected.via == Via::Auto && connected.is_over() => {
                    serving.shutdown().await;
                    let launch = launch.unwrap_or(Launch::Nothing);
                    return third_tier(connected, session, command, specs, events, not_opened, launch).await;
                }
                Err(error) => return Err(error),
            },
            _ = launch::ended(&mut program) => break,
            () = &mut stop => break,
        }
    }
    // Streams first, so that local connections see a reset and not an end of file.
    serving.shutdown().await;
    let closed = connected.close("closed by the technician").await;
    events.emit(&Event::Session { whose: None, event: &closed });
    Ok(())
}

/// The redirector, where operator and agent permit it; else what was wrong before, and which permission is missing.
async fn third_tier(
    mut connected: Connected,
    session: &SessionArgs,
    command: &'static str,
    specs: Vec<(SocketAddr, Wanted)>,
    events: Events,
    before: Failed,
    launch: Launch,
) -> Result<(), Failed> {
    let Failed(before) = before;
    let reason = format!("{before}");
    let mut listeners = Vec::new();
    for (local, wanted) in specs {
        listeners.push(Listener::bind_again(local, wanted).await?);
    }
    // Another one takes its place.
    connected.status.take();
    match redirected::serve(&connected.technician, session, command, listeners, events, &reason, launch).await
    {
        Err(Failed(error)) if error.exit() == Exit::Refused || error.exit() == Exit::Usage => {
            Err(CliError::NoTier { before: reason, exit: before.exit(), redirector: error.to_string() }
                .into())
        }
        done => done,
    }
}
