//! A mediator on loopback with throwaway keys, and devices that talk to it.

use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use adit_client::control::{ControlChannel, hello};
use adit_client::enrol::{EnrolError, Enrolment, enrol};
use adit_client::identity::Identity;
use adit_mediator::error::Error;
use adit_mediator::organisation::Organisation;
use adit_mediator::server::Mediator;
use adit_mediator::token::{self, Wanted};
use adit_protocol::control::{Down, LiveSession, Open};
use adit_protocol::control::{Grant, Up};
use adit_protocol::token::EnrolmentToken;
use adit_protocol::{DeviceId, Role};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

type Running = (oneshot::Sender<()>, JoinHandle<Result<(), Error>>);

pub(crate) struct Server {
    pub(crate) dir: TempDir,
    pub(crate) udp: SocketAddr,
    running: Option<Running>,
    devices: TempDir,
}

impl Server {
    pub(crate) async fn start() -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        Organisation::init(dir.path(), &["127.0.0.1".into()]).expect("init");
        let devices = tempfile::tempdir().expect("tempdir");
        let mut server = Self { dir, udp: SocketAddr::from(([0; 4], 0)), running: None, devices };
        // Between looking for free ports and binding them somebody may take one.
        for _ in 0..10 {
            server.udp = choose_ports(server.dir.path());
            match server.run().await {
                Ok(()) => return server,
                Err(Error::Listen(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        panic!("no free ports");
    }

    pub(crate) async fn run(&mut self) -> Result<(), Error> {
        let mediator = Mediator::bind(Organisation::load(self.dir.path())?, true).await?;
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(mediator.run(async move {
            let _ = stopped.await;
        }));
        self.running = Some((stop, task));
        Ok(())
    }

    pub(crate) async fn stop(&mut self) {
        let (stop, task) = self.running.take().expect("runs");
        stop.send(()).expect("runs");
        timeout(PATIENCE, task).await.expect("ends in time").expect("no panic").expect("ends cleanly");
    }

    pub(crate) async fn token(&self, role: Role, tags: &[&str], uses: u32) -> EnrolmentToken {
        self.token_with(role, tags, uses, 3600, false).await
    }

    pub(crate) async fn token_with(
        &self,
        role: Role,
        tags: &[&str],
        uses: u32,
        ttl: u64,
        all_agents: bool,
    ) -> EnrolmentToken {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        token::make(self.dir.path(), Wanted { role, ttl, uses, tags, all_agents, may_replace: false })
            .await
            .expect("token")
    }

    pub(crate) fn device_dir(&self, name: &str) -> PathBuf {
        self.devices.path().join(name)
    }

    pub(crate) async fn enrol(&self, token: &EnrolmentToken, name: &str) -> Result<Identity, EnrolError> {
        enrol(token, &wanted(self.device_dir(name), name)).await
    }

    pub(crate) async fn device(&self, role: Role, name: &str, tags: &[&str]) -> Identity {
        let token = self.token(role, tags, 1).await;
        self.enrol(&token, name).await.expect("enrols")
    }

    pub(crate) fn audit(&self) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(self.dir.path().join("audit.jsonl")).expect("reads");
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
    }
}

pub(crate) fn wanted(dir: PathBuf, name: &str) -> Enrolment {
    Enrolment {
        dir,
        name: name.to_owned(),
        tags: vec![],
        hosts: vec![],
        replace: false,
        proxies: Default::default(),
    }
}

/// Writes free ports into the configuration; gives the address of the UDP one.
fn choose_ports(dir: &Path) -> SocketAddr {
    let local = || SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let tcp = [(); 3].map(|()| TcpListener::bind(local()).expect("binds"));
    let [https, relay, diagnostics] = tcp.each_ref().map(|socket| socket.local_addr().expect("bound"));
    let udp = UdpSocket::bind(local()).expect("binds").local_addr().expect("bound");
    let config = format!(
        "hosts = [\"127.0.0.1\"]\n[listen]\nudp = \"{udp}\"\nrelay = \"{relay}\"\nhttps = \"{https}\"\n\
         diagnostics = \"{diagnostics}\"\n"
    );
    std::fs::write(dir.join("config.toml"), config).expect("writes");
    udp
}

pub(crate) async fn dial(identity: &Identity) -> ControlChannel {
    dial_with(identity, vec![]).await
}

pub(crate) async fn dial_with(identity: &Identity, sessions: Vec<LiveSession>) -> ControlChannel {
    timeout(PATIENCE, ControlChannel::dial(identity, hello(sessions))).await.expect("in time").expect("dials")
}

pub(crate) async fn recv(channel: &mut ControlChannel) -> Down {
    timeout(PATIENCE, channel.recv()).await.expect("in time").expect("a message")
}

/// What both ends get for an opened session: the technician's grant and the agent's offer.
pub(crate) async fn open(
    technician: &mut ControlChannel,
    agent: &mut ControlChannel,
    name: &str,
) -> (Grant, Grant) {
    let targets = vec!["127.0.0.1:3389".to_owned()];
    technician
        .send(Up::Open(Open {
            request: 7,
            agent: name.to_owned(),
            targets,
            via: "auto".into(),
            flight: vec![],
        }))
        .await
        .expect("sends");
    let Down::Offer(offer) = recv(agent).await else { panic!("no offer") };
    match recv(technician).await {
        Down::Granted(grant) => (grant, offer),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn live(session: &[u8], peer: DeviceId) -> LiveSession {
    LiveSession { session: session.to_vec(), peer: peer.0.to_vec() }
}
