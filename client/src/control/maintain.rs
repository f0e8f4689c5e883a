//! Keeps a control channel up for ever: dials again with exponential backoff and full jitter.

use std::sync::Arc;
use std::time::Duration;

use adit_protocol::control::{Down, Hello, Up, Welcome};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::{ControlChannel, Ended};
use crate::exit::{Exit, Failure};
use crate::identity::Identity;

/// Bounds of the time between two attempts. Full jitter: anything between zero and the bound of the
/// moment, so that thousands of devices do not come back in step.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(30));
/// A channel that lived this long was a good one: the next attempt comes quickly.
const GOOD: Duration = Duration::from_secs(30);
/// Messages that may wait in each direction.
const QUEUE: usize = 64;

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
        /// What a program that cannot wait would exit with.
        exit: Exit,
    },
}

/// Handle on a maintained channel. The channel ends when the last clone, or the receiver of messages,
/// is dropped.
#[derive(Debug, Clone)]
pub struct Control {
    state: watch::Receiver<State>,
    outgoing: mpsc::Sender<Up>,
    _task: Arc<AbortOnDrop>,
}

impl Control {
    /// Whether there is a channel now; `changed()` on it waits for the next change.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.clone()
    }

    /// Sends a message on the channel that there is now. A message may still be lost with its channel:
    /// what matters is said again in `Hello` or asked again by its owner.
    ///
    /// # Errors
    /// [`NotConnected`] when there is no channel.
    pub async fn send(&self, message: Up) -> Result<(), NotConnected> {
        if !matches!(*self.state.borrow(), State::Connected(_)) {
            return Err(NotConnected);
        }
        self.outgoing.send(message).await.map_err(|_| NotConnected)
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

/// There is no control channel now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there is no connection to the mediator now")]
pub struct NotConnected;

/// Keeps a channel up with `identity`'s servers. `hello` is asked for at every attempt, so that it names
/// the sessions that live then. Messages of all channels come out of the one receiver.
pub fn maintain(
    identity: Arc<Identity>,
    hello: impl Fn() -> Hello + Send + 'static,
) -> (Control, mpsc::Receiver<Down>) {
    let (state_sender, state) = watch::channel(State::Connecting);
    let (outgoing, out_receiver) = mpsc::channel(QUEUE);
    let (down, down_receiver) = mpsc::channel(QUEUE);
    let keeper = Keeper { identity, hello, state: state_sender, outgoing: out_receiver, down };
    let task = Arc::new(AbortOnDrop(tokio::spawn(keeper.run())));
    (Control { state, outgoing, _task: task }, down_receiver)
}

struct Keeper<H> {
    identity: Arc<Identity>,
    hello: H,
    state: watch::Sender<State>,
    outgoing: mpsc::Receiver<Up>,
    down: mpsc::Sender<Down>,
}

impl<H: Fn() -> Hello + Send + 'static> Keeper<H> {
    async fn run(mut self) {
        let mut attempt = 0;
        while !self.down.is_closed() {
            let (reason, exit) = match ControlChannel::dial(&self.identity, (self.hello)()).await {
                Ok(channel) => {
                    info!(server = channel.server, name = channel.welcome.name, "control channel is up");
                    let since = Instant::now();
                    // What was said to an earlier channel is stale: this one began with a new `Hello`.
                    while self.outgoing.try_recv().is_ok() {}
                    self.state.send_replace(State::Connected(Arc::new(channel.welcome.clone())));
                    let ended = self.serve(channel).await;
                    if since.elapsed() >= GOOD {
                        attempt = 0;
                    }
                    if matches!(ended, Ended::Closed) {
                        return;
                    }
                    warn!(reason = %ended, "control channel is down");
                    (ended.to_string(), Exit::Unreachable)
                }
                Err(error) => {
                    // Said once; the attempts that follow are routine.
                    if attempt == 0 {
                        warn!(reason = %error, "no control channel");
                    } else {
                        debug!(reason = %error, attempt, "no control channel");
                    }
                    (error.to_string(), error.exit())
                }
            };
            self.state.send_replace(State::Disconnected { reason, exit });
            tokio::select! {
                () = sleep(backoff(attempt, rand::random())) => {}
                () = self.down.closed() => return,
            }
            attempt = attempt.saturating_add(1);
        }
    }

    /// Passes messages on until the channel ends. `Ended::Closed`: our owner is gone.
    async fn serve(&mut self, mut channel: ControlChannel) -> Ended {
        loop {
            tokio::select! {
                message = self.outgoing.recv() => {
                    let Some(message) = message else { return Ended::Closed };
                    if channel.send(message).await.is_err() {
                        return channel.recv().await.err().unwrap_or(Ended::Silent);
                    }
                }
                message = channel.recv() => match message {
                    Ok(message) => if self.down.send(message).await.is_err() {
                        return Ended::Closed;
                    },
                    // The pump is gone without a word: our queue was full.
                    Err(Ended::Closed) => return Ended::Silent,
                    Err(ended) => return ended,
                },
                () = self.down.closed() => return Ended::Closed,
            }
        }
    }
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
