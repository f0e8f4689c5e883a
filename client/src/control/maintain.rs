//! Keeps a control channel up for ever: dials again with exponential backoff and full jitter.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::control::{Down, Hello, Up, Update, Welcome};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::{ControlChannel, ControlError, Ended, shared};
use crate::exit::{Exit, Failure};
use crate::identity::Live;

/// Bounds of the time between two attempts. Full jitter: anything between zero and the bound of the
/// moment, so that thousands of devices do not come back in step.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// A channel that lived this long was a good one: the next attempt comes quickly.
const GOOD: Duration = Duration::from_secs(30);
/// Messages that may wait in each direction.
const QUEUE: usize = 64;
/// A channel that another process keeps may be dead without anybody's knowledge: what the mediator answers by itself is
/// waited for so long.
const SHARED_ANSWER: Duration = Duration::from_secs(2);

/// Whether there is a channel now.
#[derive(Debug, Clone, PartialEq)]
pub enum State {
    /// The first attempt is under way.
    Connecting,
    /// There is, and the mediator said this.
    Connected(Arc<Welcome>),
    /// There is none; attempts go on.
    Disconnected {
        /// Why, for people.
        reason: String,
        /// What helps, for people.
        remedy: Option<String>,
        /// What a program that cannot wait would exit with.
        exit: Exit,
        /// The mediator itself, which has shown its certificate, does not accept this device.
        turned_away: bool,
    },
}

impl State {
    /// Why there is no channel, and what helps, in one line; `None` where there is one, or the first attempt is under way.
    pub fn why_offline(&self) -> Option<String> {
        let Self::Disconnected { reason, remedy, .. } = self else { return None };
        let remedy = remedy.as_ref().map_or(String::new(), |remedy| format!("; {remedy}"));
        Some(format!("{reason}{remedy}"))
    }
}

/// Handle on a maintained channel. The channel ends with [`Control::close`], or when the last clone or the
/// receiver of messages is dropped. Whoever sends must not be the only one to receive: when both queues
/// are full, [`Control::send`] waits until a message is taken out.
#[derive(Debug, Clone)]
pub struct Control {
    state: watch::Receiver<State>,
    outgoing: mpsc::Sender<Command>,
    _task: Arc<AbortOnDrop>,
}

impl Control {
    /// Whether there is a channel now; `changed()` on it waits for the next change.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Sends a message on the channel that there is now, or on the first one as soon as it is there. A message may still
    /// be lost with its channel: what matters is said again in `Hello` or asked again by its owner.
    ///
    /// # Errors
    /// [`NotConnected`] when there is no channel.
    pub async fn send(&self, message: Up) -> Result<(), NotConnected> {
        if matches!(*self.state.borrow(), State::Disconnected { .. }) {
            return Err(NotConnected);
        }
        self.outgoing.send(Command::Send(message)).await.map_err(|_| NotConnected)
    }

    /// Ends the channel for good, also for all clones of this handle. What was sent before is on its way
    /// when this returns.
    pub async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.outgoing.send(Command::Close(done)).await.is_ok() {
            let _ = closed.await;
        }
    }

    /// Waits until there is a channel.
    ///
    /// # Errors
    /// [`NotConnected`] when the task that keeps it up is gone.
    pub async fn connected(&self) -> Result<Arc<Welcome>, NotConnected> {
        let mut state = self.state.clone();
        let found = state.wait_for(|state| matches!(state, State::Connected(_))).await;
        match found.as_deref() {
            Ok(State::Connected(welcome)) => Ok(welcome.clone()),
            _ => Err(NotConnected),
        }
    }
}

impl Control {
    /// A handle on a mediator in this very process, which is always there: what is sent comes out of the receiver. For
    /// one that sends no more than its receiver takes.
    pub fn linked() -> (Self, mpsc::Receiver<Up>) {
        let (keep, state) = watch::channel(State::Connected(Arc::default()));
        let (outgoing, mut commands) = mpsc::channel(QUEUE);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let task = tokio::spawn(async move {
            let _keep = keep;
            while let Some(Command::Send(up)) = commands.recv().await {
                if sender.send(up).await.is_err() {
                    break;
                }
            }
        });
        (Self { state, outgoing, _task: Arc::new(AbortOnDrop(task)) }, receiver)
    }
}

/// There is no control channel now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no connection to the mediator now")]
pub struct NotConnected;

/// Keeps a channel up with `identity`'s servers, and `identity` as the mediator says. `hello` is asked for at every attempt, so that it names
/// the sessions that live then. Messages of all channels come out of the one receiver. `shared`: the state directory of
/// which another process may keep a channel that serves for the first one.
pub fn maintain(
    identity: Arc<Live>,
    hello: impl Fn() -> Hello + Send + 'static,
    shared: Option<PathBuf>,
) -> (Control, mpsc::Receiver<Down>) {
    let (state_sender, state) = watch::channel(State::Connecting);
    let (outgoing, out_receiver) = mpsc::channel(QUEUE);
    let (down, down_receiver) = mpsc::channel(QUEUE);
    let keeper = Keeper {
        identity,
        hello,
        shared,
        unanswered: vec![],
        state: state_sender,
        outgoing: out_receiver,
        down,
    };
    let task = Arc::new(AbortOnDrop(tokio::spawn(keeper.run())));
    (Control { state, outgoing, _task: task }, down_receiver)
}

enum Command {
    Send(Up),
    /// Dropped when it is done.
    Close(oneshot::Sender<()>),
}

/// Why a channel is no longer served.
enum Served {
    /// It broke: there will be another.
    Lost(Ended),
    /// Nobody wants one any more.
    Unwanted,
}

struct Keeper<H> {
    identity: Arc<Live>,
    hello: H,
    shared: Option<PathBuf>,
    /// What was asked on another process's channel, and when.
    unanswered: Vec<(Instant, Up)>,
    state: watch::Sender<State>,
    outgoing: mpsc::Receiver<Command>,
    down: mpsc::Sender<Down>,
}

impl<H: Fn() -> Hello + Send + 'static> Keeper<H> {
    async fn run(mut self) {
        let mut attempt = 0;
        while !self.down.is_closed() {
            let is_first = matches!(*self.state.borrow(), State::Connecting);
            let (queue, unanswered) = (&mut self.outgoing, &mut self.unanswered);
            let mut close = None;
            let mut more = || {
                while let Some(command) = is_first.then(|| queue.try_recv().ok()).flatten() {
                    match command {
                        Command::Send(message) => unanswered.push((Instant::now(), message)),
                        Command::Close(done) => close = Some(done),
                    }
                }
                unanswered.iter().map(|(_, message)| message.clone()).collect()
            };
            // Once: whoever has had a channel and lost it does not depend on another process any more.
            let identity = self.identity.get();
            let found = match self.shared.take() {
                Some(dir) => shared::dial(&dir, identity.device_id, (self.hello)(), &mut more).await,
                None => None,
            };
            let is_shared = found.is_some();
            let dialled = match found {
                Some(channel) => Ok(channel),
                None => ControlChannel::dial_saying(&identity, (self.hello)(), more).await,
            };
            if close.is_some() {
                if let Ok(channel) = dialled {
                    channel.close().await;
                }
                return;
            }
            if !is_shared {
                // From here on, who asked asks again.
                self.unanswered.clear();
            }
            let state = match dialled {
                Ok(channel) => {
                    info!(server = channel.server, name = channel.welcome.name, "control channel is up");
                    let since = Instant::now();
                    // What was said to an earlier channel is stale: this one began with a new `Hello`.
                    while let Some(command) = (!is_first).then(|| self.outgoing.try_recv().ok()).flatten() {
                        if let Command::Close(_) = command {
                            return;
                        }
                    }
                    let servers = channel.welcome.servers.clone();
                    self.identity.take_update(Update { certificate: vec![], servers });
                    self.state.send_replace(State::Connected(Arc::new(channel.welcome.clone())));
                    let Served::Lost(ended) = self.serve(channel, is_shared).await else { return };
                    if is_shared {
                        // At once, and with what was asked there.
                        debug!(reason = %ended, "the other process's channel is down");
                        self.state.send_replace(State::Connecting);
                        continue;
                    }
                    if since.elapsed() >= GOOD {
                        attempt = 0;
                    }
                    warn!(reason = %ended, "control channel is down");
                    State::Disconnected {
                        reason: ended.to_string(),
                        remedy: None,
                        exit: Exit::Unreachable,
                        turned_away: false,
                    }
                }
                Err(error) => {
                    // Said once; the attempts that follow are routine.
                    if attempt == 0 {
                        warn!(reason = %error, "no control channel");
                    } else {
                        debug!(reason = %error, attempt, "no control channel");
                    }
                    State::Disconnected {
                        reason: error.to_string(),
                        remedy: error.remedy(),
                        exit: error.exit(),
                        turned_away: matches!(error, ControlError::TurnedAway(_)),
                    }
                }
            };
            self.state.send_replace(state);
            if self.rest(backoff(attempt, rand::random())).await {
                return;
            }
            attempt = attempt.saturating_add(1);
        }
    }

    /// Passes messages on until the channel ends.
    async fn serve(&mut self, mut channel: ControlChannel, is_shared: bool) -> Served {
        loop {
            let waited = self.unanswered.iter().filter(|(_, message)| is_soon_answered(message));
            let overdue = waited.map(|(at, _)| *at + SHARED_ANSWER).min();
            let overdue = async {
                match overdue {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = overdue => return Served::Lost(Ended::Silent),
                command = self.outgoing.recv() => match command {
                    // Where that fails, what came before the end is still read, and says why.
                    Some(Command::Send(message)) => {
                        if is_shared && request_of(&message).is_some() {
                            self.unanswered.push((Instant::now(), message.clone()));
                        }
                        let _ = channel.send(message).await;
                    }
                    Some(Command::Close(_done)) => {
                        channel.close().await;
                        return Served::Unwanted;
                    }
                    None => return Served::Unwanted,
                },
                message = channel.recv() => match message.inspect(|down| note_answer(&mut self.unanswered, down)) {
                    Ok(Down::Update(update)) => {
                        self.identity.take_update(update.clone());
                        if self.down.send(Down::Update(update)).await.is_err() {
                            return Served::Unwanted;
                        }
                    }
                    // News only when it is newer.
                    Ok(Down::Revocations(list)) if !self.identity.take_list(&list.list) => {}
                    Ok(message) => if self.down.send(message).await.is_err() {
                        return Served::Unwanted;
                    },
                    Err(ended) => return Served::Lost(ended),
                },
                () = self.down.closed() => return Served::Unwanted,
            }
        }
    }

    /// Waits; says whether nobody wants a channel any more.
    async fn rest(&mut self, time: Duration) -> bool {
        let until = Instant::now() + time;
        loop {
            tokio::select! {
                () = sleep_until(until) => return false,
                () = self.down.closed() => return true,
                command = self.outgoing.recv() => match command {
                    // Sent in the moment between two states; its sender finds out by the state.
                    Some(Command::Send(_)) => {}
                    Some(Command::Close(_)) | None => return true,
                }
            }
        }
    }
}

/// The number of a request.
fn request_of(message: &Up) -> Option<u64> {
    match message {
        Up::List(list) => Some(list.request),
        Up::Open(open) => Some(open.request),
        Up::Redirect(redirect) => Some(redirect.request),
        Up::Examine(examine) => Some(examine.request),
        _ => None,
    }
}

/// The mediator answers it without asking others.
fn is_soon_answered(message: &Up) -> bool {
    matches!(message, Up::List(_) | Up::Open(_))
}

/// Strikes out what was asked.
fn note_answer(unanswered: &mut Vec<(Instant, Up)>, down: &Down) {
    let answered = match down {
        Down::Agents(agents) => agents.request,
        Down::Granted(grant) => grant.request,
        Down::Redirected(redirected) => redirected.request,
        Down::Examined(examined) => examined.request,
        Down::Refused(refused) => refused.request,
        _ => return,
    };
    unanswered.retain(|(_, message)| request_of(message) != Some(answered));
}

/// Time before the next attempt: full jitter below a bound that doubles. `random` is uniform.
fn backoff(attempt: u32, random: u32) -> Duration {
    let (first, most) = BACKOFF;
    let bound = first.saturating_mul(1 << attempt.min(16)).min(most);
    bound.mul_f64(f64::from(random) / f64::from(u32::MAX))
}

#[derive(Debug)]
struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_up_to_its_bound_and_uses_all_of_it() {
        assert_eq!(backoff(0, u32::MAX), Duration::from_millis(200));
        assert_eq!(backoff(3, u32::MAX), Duration::from_millis(1600));
        assert_eq!(backoff(u32::MAX, u32::MAX), Duration::from_secs(30));
        assert_eq!(backoff(9, 0), Duration::ZERO);
        assert!(backoff(0, u32::MAX / 2) < Duration::from_millis(101));
    }
}
