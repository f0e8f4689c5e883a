//! `adit rdp`.

use std::ffi::OsString;
use std::net::{Ipv4Addr, SocketAddr};

use adit_protocol::{Protocol, Target};
use clap::Args;

use super::forward::serve;
use super::launch::Launch;
use super::technician::SessionArgs;
use super::{CliError, Failed};
use crate::forward::{ForwardSpec, Listener};

/// Clients that take FreeRDP's arguments, the newest first.
const FREERDP: [&str; 4] = ["xfreerdp3", "xfreerdp", "sdl-freerdp3", "wlfreerdp"];

/// Open a remote desktop on, or beside, an agent.
///
/// It forwards a local port, the same one each time where it is free, and starts the RDP client of this system (Windows:
/// mstsc, macOS: the one that opens rdp://, elsewhere FreeRDP or Remmina). It ends with the client.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  adit rdp office-pc\n  adit rdp office-pc 192.168.1.7:3389 -- /u:anna /f\n  \
    adit rdp office-pc --print                              then connect your own client to that address"
)]
pub(super) struct Rdp {
    #[command(flatten)]
    session: SessionArgs,
    /// The desktop, as seen from the agent.
    #[arg(value_name = "HOST:PORT", default_value = "127.0.0.1:3389")]
    target: Target,
    /// Start no client, only say where it could connect to.
    #[arg(long)]
    print: bool,
    /// Start this client, which takes FreeRDP's arguments.
    #[arg(long, value_name = "PROGRAM")]
    client: Option<OsString>,
    /// Events as JSON, one object a line.
    #[arg(long)]
    json: bool,
    /// More arguments for the client.
    #[arg(last = true, value_name = "ARGUMENT")]
    arguments: Vec<OsString>,
}

impl Rdp {
    pub(super) async fn run(self) -> Result<(), Failed> {
        if self.target.protocol == Protocol::Udp {
            return Err(CliError::TcpOnly(self.target).into());
        }
        self.session.check()?;
        let spec = ForwardSpec { bind: Ipv4Addr::LOCALHOST.into(), port: 0, target: self.target };
        let listener = Listener::bind(&spec, &self.session.agent).await?;
        let launch = match self.print {
            true => Launch::Nothing,
            false => client(listener.local(), self.client, &self.arguments),
        };
        serve(&self.session, "rdp", vec![listener], self.json, launch).await
    }
}

fn client(at: SocketAddr, named: Option<OsString>, arguments: &[OsString]) -> Launch {
    let with = |first: String| [OsString::from(first)].into_iter().chain(arguments.iter().cloned()).collect();
    let candidates = match named {
        Some(program) => vec![(program, with(format!("/v:{at}")))],
        None if cfg!(windows) => vec![("mstsc".into(), with(format!("/v:{at}")))],
        None if cfg!(target_os = "macos") => {
            // Waits until that program ends.
            vec![("open".into(), vec!["-W".into(), format!("rdp://full%20address=s:{at}").into()])]
        }
        None => {
            let freerdp = FREERDP.iter().map(|name| (OsString::from(name), with(format!("/v:{at}"))));
            let remmina = ("remmina".into(), vec!["-c".into(), format!("rdp://{at}").into()]);
            freerdp.chain([remmina]).collect()
        }
    };
    Launch::Program { what: "RDP client", candidates }
}
