//! `adit stdio`.

use adit_protocol::{Protocol, Target, Wanted};
use clap::Args;

use super::technician::SessionArgs;
use super::{CliError, Failed, signals};
use crate::session::SessionEvent;
use crate::stdio;

/// Connect standard input and output to a target beside an agent: for ssh's ProxyCommand.
///
/// It ends when both directions have ended.
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  ssh -o ProxyCommand='adit stdio office-pc 127.0.0.1:22' user@office-pc\n  \
    or in ~/.ssh/config: Host office-pc, ProxyCommand adit stdio %h 127.0.0.1:%p"
)]
pub(super) struct Stdio {
    #[command(flatten)]
    session: SessionArgs,
    /// The target, as seen from the agent.
    #[arg(value_name = "HOST:PORT")]
    target: Target,
}

impl Stdio {
    pub(super) async fn run(self) -> Result<(), Failed> {
        if self.target.protocol == Protocol::Udp {
            return Err(CliError::TcpOnly(self.target).into());
        }
        let mut connected = self.session.open("stdio", &[Wanted::One(self.target.clone())]).await?;
        let tunnel = connected.session.tunnel.clone();
        let mut over = None;
        let done = {
            let copying = stdio::run(&tunnel, &self.target);
            let stop = signals::stop();
            tokio::pin!(copying, stop);
            loop {
                tokio::select! {
                    // First: a target that refuses says more than a session that ends thereafter.
                    biased;
                    done = &mut copying => break done,
                    () = &mut stop => break Ok(()),
                    event = connected.next(), if over.is_none() => match event? {
                        Some(SessionEvent::Closed { reason }) => over = Some(reason),
                        Some(_) => {}
                        None => over = Some("its task has ended".to_owned()),
                    },
                }
            }
        };
        // The session's own end says why.
        let cut_off = matches!(&done, Err(error) if error.is_session_ended());
        let ended = connected.close("closed by the technician").await;
        if let SessionEvent::Closed { reason } = ended
            && (cut_off || done.is_err() && over.is_some())
        {
            return Err(CliError::Ended(over.unwrap_or(reason)).into());
        }
        done.map_err(Failed::from)
    }
}
