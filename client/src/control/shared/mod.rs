//! One control channel for all commands of a technician: `adit up` keeps it, the others find it in `DIR/run` and
//! save themselves the connection to the mediator.
//!
//! They speak with `adit up` as with a mediator, in the same messages, on a local socket that only the directory's
//! owner can use. [`Switchboard`] passes on what they ask, with numbers of its own, and to each of them what concerns
//! it. Where the channel breaks they are on their own: each dials the mediator itself.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use adit_protocol::DeviceId;
use adit_protocol::control::{Closed, Down, Hello, ToDevice, ToMediator, Up, Welcome};
use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::Role;
#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;

use super::ControlChannel;
use super::maintain::{Control, State};
use super::wire::{self, Heartbeat, Incoming, Outgoing};

pub use system::Listener;

/// Where a process leaves what leads to it, below its state directory.
const RUN: &str = "run";
/// How long `adit up` may take to greet a command, and a command to say what it is.
const GREETING: Duration = Duration::from_secs(1);
/// Commands at once: less than the channels that a mediator keeps for a technician, which each of them may need.
const MAX_COMMANDS: usize = 48;
/// Messages of all commands that may wait.
const QUEUE: usize = 64;
/// A local socket ends with its process, but a process may be stopped.
const HEARTBEAT: Heartbeat = Heartbeat { every: Duration::from_secs(10), deadline: Duration::from_secs(5) };

/// Listens for the commands that use the state directory `dir`.
///
/// # Errors
/// The system's; `AddrInUse` where another process does already.
pub async fn listen(dir: &Path, device: DeviceId) -> io::Result<Listener> {
    Listener::bind(&dir.join(RUN), &name(device)).await
}

/// The channel that `adit up` keeps for `dir`; `None`: there is none, or it is not connected.
pub async fn dial(
    dir: &Path,
    device: DeviceId,
    hello: Hello,
    mut more: impl FnMut() -> Vec<Up>,
) -> Option<ControlChannel> {
    let stream = timeout(GREETING, system::connect(&dir.join(RUN), &name(device))).await.ok()??;
    let socket = WebSocketStream::from_raw_socket(stream, Role::Client, Some(wire::websocket_config())).await;
    let (outgoing, incoming) = wire::pump(socket, HEARTBEAT);
    let server = "adit up".to_owned();
    let mut channel = ControlChannel { welcome: Welcome::default(), server, outgoing, incoming };
    channel.send(Up::Hello(hello)).await.ok()?;
    for message in more() {
        channel.send(message).await.ok()?;
    }
    match timeout(GREETING, channel.recv()).await.ok()?.ok()? {
        Down::Welcome(welcome) => channel.welcome = welcome,
        _ => return None,
    }
    Some(channel)
}

/// Where they meet: only those of the same device and the same version, who mean the same.
fn name(device: DeviceId) -> String {
    let digest = digest(&SHA256, format!("{} {device}", super::software()).as_bytes());
    format!("up-{}", HEXLOWER.encode(&digest.as_ref()[..6]))
}

/// A command that has come.
struct Joined {
    outgoing: Outgoing<ToDevice>,
    incoming: Incoming<ToMediator>,
}

/// Passes messages between commands and the mediator.
pub struct Switchboard {
    control: Control,
    commands: HashMap<u64, Outgoing<ToDevice>>,
    next: u64,
    requests: HashMap<u64, Asked>,
    /// Whose session that is.
    sessions: HashMap<Vec<u8>, Owner>,
    /// To the mediator. It has a task of its own: who waits here cannot take what comes in.
    sending: mpsc::Sender<Up>,
}

/// A request on its way.
#[derive(Clone, Copy)]
struct Asked {
    command: u64,
    /// The command's own number for it.
    number: u64,
    /// Of a session: the mediator's answer and the agent's, which come in this order or the other.
    is_granted: bool,
    is_answered: bool,
}

/// Whose session it is.
#[derive(Clone, Copy)]
struct Owner {
    command: u64,
    /// It ends with the command. One through a redirector has its own time.
    ends_with_it: bool,
}

impl Switchboard {
    /// Serves commands until the control channel is closed for good.
    pub async fn run(control: Control, mut downs: mpsc::Receiver<Down>, mut listener: Listener) {
        let mut state = control.state();
        let (sending, mut to_send) = mpsc::channel(QUEUE);
        let sender = control.clone();
        tokio::spawn(async move {
            while let Some(message) = to_send.recv().await {
                let _ = sender.send(message).await;
            }
        });
        let mut board = Self {
            control,
            sending,
            commands: HashMap::new(),
            next: 0,
            requests: HashMap::new(),
            sessions: HashMap::new(),
        };
        let (joining, mut joined) = mpsc::channel(QUEUE);
        let (saying, mut said) = mpsc::channel(QUEUE);
        loop {
            tokio::select! {
                stream = listener.accept() => {
                    if board.commands.len() < MAX_COMMANDS {
                        tokio::spawn(greet(stream, joining.clone()));
                    }
                }
                Some(Joined { outgoing, incoming }) = joined.recv() => {
                    if let Some(id) = board.join(outgoing) {
                        tokio::spawn(listen_to(id, incoming, saying.clone()));
                    }
                }
                Some((id, message)) = said.recv() => match message {
                    Some(message) => board.on_up(id, message),
                    None => board.leave(id),
                },
                down = downs.recv() => match down {
                    Some(down) => board.on_down(down),
                    None => return,
                },
                changed = state.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if !matches!(*state.borrow_and_update(), State::Connected(_)) {
                        // Each dials the mediator itself, and names its sessions there.
                        board.commands.clear();
                        board.requests.clear();
                        board.sessions.clear();
                    }
                }
            }
        }
    }

    /// Greets a command in the mediator's place. `None`: there is no channel.
    fn join(&mut self, outgoing: Outgoing<ToDevice>) -> Option<u64> {
        let state = self.control.state();
        let State::Connected(welcome) = &*state.borrow() else { return None };
        let welcome = Welcome::clone(welcome);
        outgoing.try_send(ToDevice { message: Some(Down::Welcome(welcome)) }).ok()?;
        self.next += 1;
        self.commands.insert(self.next, outgoing);
        Some(self.next)
    }

    /// A command has ended. What it left open is over: it would have said so itself, had it been asked to end.
    fn leave(&mut self, id: u64) {
        if self.commands.remove(&id).is_none() {
            return;
        }
        self.requests.retain(|_, asked| asked.command != id);
        let left: Vec<Vec<u8>> = self
            .sessions
            .extract_if(|_, owner| owner.command == id)
            .filter(|(_, owner)| owner.ends_with_it)
            .map(|(session, _)| session)
            .collect();
        left.into_iter().for_each(|session| self.end(session, "the technician's program has ended"));
    }

    fn end(&self, session: Vec<u8>, reason: &str) {
        let closed = Closed { session, reason: reason.to_owned(), bytes_sent: 0, bytes_received: 0 };
        let _ = self.sending.try_send(Up::Closed(closed));
    }

    fn on_up(&mut self, id: u64, mut message: Up) {
        if !self.commands.contains_key(&id) {
            return;
        }
        match &mut message {
            Up::List(list) => list.request = self.number(id, list.request),
            Up::Open(open) => open.request = self.number(id, open.request),
            Up::Redirect(redirect) => redirect.request = self.number(id, redirect.request),
            Up::Examine(examine) => examine.request = self.number(id, examine.request),
            Up::Closed(closed) => drop(self.sessions.remove(&closed.session)),
            Up::Candidates(_) | Up::Renew(_) => {}
            // What agents and relays say.
            Up::Hello(_) | Up::Answer(_) | Up::RelayUp(_) | Up::Tier(_) | Up::Probed(_) | Up::Served(_) => {
                return;
            }
        }
        // More than the mediator takes: better a channel of its own.
        if self.sending.try_send(message).is_err() {
            self.cut_off(id);
        }
    }

    /// A number of our own in place of a command's.
    fn number(&mut self, command: u64, number: u64) -> u64 {
        self.next += 1;
        self.requests.insert(self.next, Asked { command, number, is_granted: false, is_answered: false });
        self.next
    }

    fn on_down(&mut self, mut down: Down) {
        let to = match &mut down {
            Down::Agents(agents) => self.answer(&mut agents.request),
            Down::Refused(refused) => self.answer(&mut refused.request),
            Down::Examined(examined) => self.answer(&mut examined.request),
            Down::Granted(grant) => {
                let both = grant.flight_passed;
                let to = self.half_answer(&mut grant.request, |asked| {
                    asked.is_granted = true;
                    !both || asked.is_answered
                });
                self.note(to, &grant.session, true)
            }
            Down::Answered(answered) => self.half_answer(&mut answered.request, |asked| {
                asked.is_answered = true;
                asked.is_granted
            }),
            Down::Redirected(redirected) => {
                let to = self.answer(&mut redirected.request);
                self.note(to, &redirected.session, false)
            }
            Down::Candidates(candidates) => self.owner(&candidates.session),
            Down::Tickets(tickets) => self.owner(&tickets.session),
            Down::Closed(closed) => self.sessions.remove(&closed.session).map(|owner| owner.command),
            Down::Update(_) | Down::Revocations(_) => {
                let everyone: Vec<u64> = self.commands.keys().copied().collect();
                return everyone.into_iter().for_each(|id| self.tell(id, down.clone()));
            }
            // For agents and relays, or for this channel alone.
            Down::Welcome(_) | Down::Offer(_) | Down::Probe(_) | Down::Serve(_) => None,
        };
        if let Some(id) = to {
            self.tell(id, down);
        }
    }

    /// Who asked what has this number, which becomes the command's own again.
    fn answer(&mut self, request: &mut u64) -> Option<u64> {
        self.half_answer(request, |_| true)
    }

    /// The same where there is another answer to come, unless `note` says that it has.
    fn half_answer(&mut self, request: &mut u64, note: impl FnOnce(&mut Asked) -> bool) -> Option<u64> {
        let asked = self.requests.get_mut(request)?;
        let (is_done, Asked { command, number, .. }) = (note(asked), *asked);
        if is_done {
            self.requests.remove(request);
        }
        *request = number;
        Some(command)
    }

    /// Whose this session is. One that nobody waits for any more is over.
    fn note(&mut self, command: Option<u64>, session: &[u8], ends_with_it: bool) -> Option<u64> {
        match command {
            Some(command) => drop(self.sessions.insert(session.to_vec(), Owner { command, ends_with_it })),
            None => self.end(session.to_vec(), "nobody waits for it"),
        }
        command
    }

    fn owner(&self, session: &[u8]) -> Option<u64> {
        self.sessions.get(session).map(|owner| owner.command)
    }

    /// A command that does not read what it is told is on its own.
    fn tell(&mut self, id: u64, down: Down) {
        let told = self.commands.get(&id).map(|out| out.try_send(ToDevice { message: Some(down) }).is_ok());
        if told == Some(false) {
            self.cut_off(id);
        }
    }

    /// It dials the mediator itself, and names its sessions there.
    fn cut_off(&mut self, id: u64) {
        self.commands.remove(&id);
        self.requests.retain(|_, asked| asked.command != id);
        self.sessions.retain(|_, owner| owner.command != id);
    }
}

/// Waits for a command's first word. One that has sessions already belongs to the mediator: only a first word on a channel
/// names them.
async fn greet(arrived: system::Arrived, joining: mpsc::Sender<Joined>) {
    let Ok(Some(stream)) = timeout(GREETING, arrived.stream()).await else { return };
    let socket = WebSocketStream::from_raw_socket(stream, Role::Server, Some(wire::websocket_config())).await;
    let (outgoing, mut incoming) = wire::pump::<_, ToDevice, ToMediator>(socket, HEARTBEAT);
    let first = timeout(GREETING, incoming.recv()).await;
    if let Ok(Some(Ok(ToMediator { message: Some(Up::Hello(hello)) }))) = first
        && hello.sessions.is_empty()
    {
        let _ = joining.send(Joined { outgoing, incoming }).await;
    }
}

/// Hands on what a command says; `None` at its end.
async fn listen_to(id: u64, mut incoming: Incoming<ToMediator>, saying: mpsc::Sender<(u64, Option<Up>)>) {
    while let Some(Ok(ToMediator { message })) = incoming.recv().await {
        if let Some(message) = message
            && saying.send((id, Some(message))).await.is_err()
        {
            return;
        }
    }
    let _ = saying.send((id, None)).await;
}

#[cfg(test)]
mod tests {
    use adit_protocol::control::{Agents, Answered, Candidates, Grant, List, Open};

    use super::*;

    async fn next(channel: &mut ControlChannel) -> Down {
        timeout(Duration::from_secs(5), channel.recv()).await.expect("in time").expect("no end")
    }

    fn open(request: u64) -> Up {
        Up::Open(Open { request, flight: vec![1], ..Open::default() })
    }

    #[tokio::test]
    async fn each_command_hears_what_concerns_it() {
        let dir = tempfile::tempdir().expect("a directory");
        const DEVICE: DeviceId = DeviceId([1; 16]);
        assert!(dial(dir.path(), DEVICE, Hello::default(), Vec::new).await.is_none(), "nobody serves it");
        let listener = listen(dir.path(), DEVICE).await.expect("listens");
        let other = DeviceId([2; 16]);
        assert!(dial(dir.path(), other, Hello::default(), Vec::new).await.is_none(), "another device's");
        let twice = listen(dir.path(), DEVICE).await.expect_err("is taken");
        assert_eq!(twice.kind(), io::ErrorKind::AddrInUse);

        let (control, mut ups) = Control::linked();
        let (mediator, downs) = mpsc::channel(8);
        let board = tokio::spawn(Switchboard::run(control, downs, listener));
        let one = dial(dir.path(), DEVICE, Hello::default(), || vec![open(1)]).await;
        let Some(Up::Open(first)) = ups.recv().await else { panic!("the first word is passed on") };
        let two = dial(dir.path(), DEVICE, Hello::default(), || vec![open(1)]).await;
        let Some(Up::Open(second)) = ups.recv().await else { panic!("the first word is passed on") };
        let (mut one, mut two) = (one.expect("a channel"), two.expect("a channel"));
        assert_ne!(first.request, second.request);

        let granted = |request, session| {
            Down::Granted(Grant {
                request,
                session: vec![session; 16],
                flight_passed: true,
                ..Grant::default()
            })
        };
        let answered = |request| Down::Answered(Answered { request, flight: vec![2] });
        // The other way round.
        for down in [granted(second.request, 2), granted(first.request, 1)] {
            mediator.send(down).await.expect("sends");
        }
        mediator.send(answered(first.request)).await.expect("sends");
        assert_eq!(next(&mut one).await, granted(1, 1));
        assert_eq!(next(&mut one).await, answered(1));
        assert_eq!(next(&mut two).await, granted(1, 2));

        let candidates = Down::Candidates(Candidates { session: vec![2; 16], ..Candidates::default() });
        mediator.send(candidates.clone()).await.expect("sends");
        assert_eq!(next(&mut two).await, candidates);

        // What nobody asked for is told to nobody; a command that is killed leaves nothing behind.
        mediator.send(Down::Agents(Agents { request: 99, agents: vec![] })).await.expect("sends");
        drop(two);
        let Some(Up::Closed(closed)) = ups.recv().await else { panic!("its session is over") };
        assert_eq!(closed.session, [2; 16]);
        one.send(Up::List(List { request: 5 })).await.expect("sends");
        let Some(Up::List(list)) = ups.recv().await else { panic!("the other one goes on") };
        mediator.send(Down::Agents(Agents { request: list.request, agents: vec![] })).await.expect("sends");
        assert_eq!(next(&mut one).await, Down::Agents(Agents { request: 5, agents: vec![] }));

        // Its sessions belong to another channel.
        let named =
            Hello { sessions: vec![adit_protocol::control::LiveSession::default()], ..Hello::default() };
        assert!(dial(dir.path(), DEVICE, named, Vec::new).await.is_none());
        // With the channel's end, every command is on its own.
        drop(mediator);
        board.await.expect("ends");
        assert!(one.recv().await.is_err());
        assert!(dial(dir.path(), DEVICE, Hello::default(), Vec::new).await.is_none());
    }
}
