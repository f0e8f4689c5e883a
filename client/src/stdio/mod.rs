//! Standard input and output as the local end of a stream: for the `ProxyCommand` of ssh.

#[cfg(unix)]
mod unix;
#[cfg(windows)]
mod windows;

use std::io;
use std::time::Duration;

use adit_protocol::Target;
use adit_protocol::frame::ResetCode;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
#[cfg(unix)]
use unix as system;
#[cfg(windows)]
use windows as system;

use crate::copy::{CopyError, copy_halves};
use crate::exit::{Exit, Failure};
use crate::tunnel::{StreamError, Tunnel};

/// How long the last bytes may take to reach the agent when both directions have ended here.
const LINGER: Duration = Duration::from_secs(10);

pub(crate) type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub(crate) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Connects standard input and output to `target`, byte for byte, until both directions have ended and
/// the agent has everything. At the target's end of file standard output is closed; on Windows, where that
/// cannot be, both directions end.
///
/// # Errors
/// [`StdioError`].
pub async fn run(tunnel: &Tunnel, target: &Target) -> Result<(), StdioError> {
    let (reader, writer) = system::streams();
    pass(reader, writer, tunnel, target).await
}

async fn pass(reader: Reader, writer: Writer, tunnel: &Tunnel, target: &Target) -> Result<(), StdioError> {
    let failed = |error| StdioError::Stream { target: target.clone(), error };
    let mut stream = tunnel.open(target).await.map_err(failed)?;
    match copy_halves(reader, writer, &mut stream).await {
        Ok(()) => {
            let confirmed = timeout(LINGER, stream.finished()).await;
            confirmed.unwrap_or(Err(StreamError::Unconfirmed)).map_err(failed)
        }
        Err(CopyError::Local(error)) => {
            stream.reset(ResetCode::Aborted);
            Err(StdioError::Local(error))
        }
        Err(CopyError::Stream(error)) => Err(failed(error)),
    }
}

/// Why standard input and output are not connected (any more).
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The stream.
    #[error("{target}: {error}")]
    Stream {
        /// What was asked for.
        target: Target,
        /// What became of it.
        error: StreamError,
    },
    /// Standard input or output.
    #[error("standard input or output: {0}")]
    Local(io::Error),
}

impl StdioError {
    /// Whether it is no more than the end of the session, which has a reason of its own.
    pub fn is_session_ended(&self) -> bool {
        let ended = StreamError::Reset(ResetCode::SessionEnded);
        matches!(self, Self::Stream { error, .. } if *error == ended || *error == StreamError::Closed)
    }
}

impl Failure for StdioError {
    fn exit(&self) -> Exit {
        let Self::Stream { error: StreamError::Reset(code), .. } = self else { return Exit::Failed };
        match code {
            ResetCode::NotAllowed => Exit::Refused,
            ResetCode::Refused | ResetCode::Unreachable | ResetCode::NotFound => Exit::Unreachable,
            _ => Exit::Failed,
        }
    }

    fn remedy(&self) -> Option<String> {
        let Self::Stream { target, error: StreamError::Reset(code) } = self else { return None };
        Some(match code {
            ResetCode::NotAllowed => {
                format!(
                    "whoever runs the agent can allow it: adit agent --allow {target}, beside what it allows now"
                )
            }
            ResetCode::Refused => {
                format!("check that the service at {target}, as seen from the agent, is running")
            }
            ResetCode::Unreachable => {
                "check the address, and that no firewall is between the agent and it".to_owned()
            }
            ResetCode::NotFound => "check the name, or give an address".to_owned(),
            ResetCode::Overloaded => "try again when some of them are closed".to_owned(),
            _ => return None,
        })
    }
}
