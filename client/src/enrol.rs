//! Enrolment: a one-time token becomes this device's identity.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use adit_protocol::enrol::{Granted, MAX_MESSAGE, Outcome, Request, Response};
use adit_protocol::token::{EnrolmentToken, InvalidToken};
use adit_protocol::{DeviceId, PROTOCOL_VERSION, Role};
use prost::Message;
use rustls::pki_types::CertificateDer;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::dial::{self, DialError};
use crate::exit::{Exit, Failure};
use crate::identity::certificate::{self, CertificateError, is_name, is_tag};
use crate::identity::store::{self, StoreError};
use crate::identity::verify::VerifyError;
use crate::identity::{DeviceKey, Identity, Peer};
use crate::proxy::{Proxies, ProxyError};
use crate::tls::{self, TlsError};

/// How long the mediator may take to answer the request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What the new device wants to be.
#[derive(Debug, Clone)]
pub struct Enrolment {
    /// State directory.
    pub dir: PathBuf,
    /// Wanted name, see [`is_name`].
    pub name: String,
    /// Wanted tags, see [`is_tag`]; the token's own tags win.
    pub tags: Vec<String>,
    /// Relays only: names and addresses that clients use.
    pub hosts: Vec<String>,
    /// Whether this is a machine installed anew: gives up the identity that is there, and takes the name of
    /// a device that has it.
    pub replace: bool,
    /// The way out of this network.
    pub proxies: Proxies,
}

/// Enrols this device and stores its identity. The key is made first and kept, so that the same token
/// tried again after a lost answer gives the same identity.
///
/// # Errors
/// [`EnrolError`]; whatever was in the state directory is still there then.
pub async fn enrol(token: &EnrolmentToken, wanted: &Enrolment) -> Result<Identity, EnrolError> {
    if !is_name(&wanted.name) {
        return Err(EnrolError::Name(wanted.name.clone()));
    }
    if let Some(tag) = wanted.tags.iter().find(|tag| !is_tag(tag)) {
        return Err(EnrolError::Tag(tag.clone()));
    }
    refuse_overwriting(&wanted.dir, wanted.replace)?;
    let key = store::pending_key(&wanted.dir)?;
    let request = Request {
        protocol_version: PROTOCOL_VERSION,
        secret: token.secret.to_vec(),
        csr: certificate::request(&key)?,
        name: wanted.name.clone(),
        tags: wanted.tags.clone(),
        hosts: wanted.hosts.clone(),
        replace: wanted.replace,
    };
    let granted = ask(token, &request, &wanted.proxies).await?;
    let identity = accept(granted, token, key, wanted.hosts.clone())?;
    store::save(&wanted.dir, &identity)?;
    Ok(identity)
}

/// Writes one length-prefixed message.
///
/// # Errors
/// The stream's.
pub async fn write_message<S>(stream: &mut S, message: &impl Message) -> std::io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    let body = message.encode_to_vec();
    let mut bytes = Vec::with_capacity(4 + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&body);
    stream.write_all(&bytes).await?;
    stream.flush().await
}

/// Reads one length-prefixed message of at most [`MAX_MESSAGE`] bytes.
///
/// # Errors
/// The stream's; `InvalidData` when it is too long or no such message.
pub async fn read_message<S, M>(stream: &mut S) -> std::io::Result<M>
where
    S: AsyncRead + Unpin,
    M: Message + Default,
{
    let invalid = || std::io::Error::from(std::io::ErrorKind::InvalidData);
    let length = stream.read_u32().await? as usize;
    if length > MAX_MESSAGE {
        return Err(invalid());
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    M::decode(body.as_slice()).map_err(|_| invalid())
}

fn refuse_overwriting(dir: &Path, replace: bool) -> Result<(), EnrolError> {
    match store::load(dir) {
        _ if replace => Ok(()),
        Ok(_) => Err(EnrolError::AlreadyEnrolled(dir.to_owned())),
        Err(StoreError::NotEnrolled { .. }) => Ok(()),
        // The last enrolment was cut off while it stored its identity.
        Err(_) if store::is_pending(dir) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Asks all servers of the token in turn; the first that answers decides.
async fn ask(token: &EnrolmentToken, request: &Request, proxies: &Proxies) -> Result<Granted, EnrolError> {
    let config = Arc::new(tls::enrol_client(token.fingerprint)?);
    let mut last = EnrolError::NoAnswer;
    for server in &token.servers {
        let mut stream = match dial::tls(server, config.clone(), proxies).await {
            Ok(stream) => stream,
            Err(error) => {
                last = EnrolError::from_dial(server, error);
                if last.exit() == Exit::Refused {
                    return Err(last);
                }
                continue;
            }
        };
        let answer = async {
            write_message(&mut stream, request).await?;
            read_message::<_, Response>(&mut stream).await
        };
        match timeout(ANSWER_TIMEOUT, answer).await {
            Ok(Ok(Response { outcome: Some(Outcome::Granted(granted)) })) => return Ok(granted),
            Ok(Ok(Response { outcome: Some(Outcome::Refused(refused)) })) => {
                return Err(match refused.unavailable {
                    true => EnrolError::Unavailable(refused.message),
                    false => EnrolError::Refused(refused.message),
                });
            }
            Ok(Ok(Response { outcome: None })) => last = EnrolError::NoAnswer,
            Ok(Err(error)) => last = EnrolError::from_dial(server, DialError::from_tls(error)),
            Err(_) => last = EnrolError::TimedOut { server: server.clone() },
        }
    }
    Err(last)
}

/// Takes nothing on trust: the root is the pinned one, the certificate is for our key.
fn accept(
    granted: Granted,
    token: &EnrolmentToken,
    key: DeviceKey,
    hosts: Vec<String>,
) -> Result<Identity, EnrolError> {
    if certificate::fingerprint(&granted.root)? != token.fingerprint {
        return Err(EnrolError::WrongFingerprint);
    }
    let peer = Peer::from_certificate(&granted.certificate)?;
    let role: Role = granted.role.parse().map_err(|_| EnrolError::NoAnswer)?;
    let device_id = DeviceId::try_from(granted.device_id.as_slice()).map_err(|_| EnrolError::NoAnswer)?;
    if peer.public_key != key.public_key()
        || (peer.device_id, peer.role) != (device_id, role)
        || role != token.role
    {
        return Err(EnrolError::NoAnswer);
    }
    let ticket_key = match role {
        Role::Relay => Some(granted.ticket_key.try_into().map_err(|_| EnrolError::NoAnswer)?),
        _ => None,
    };
    Ok(Identity {
        device_id,
        role,
        name: granted.name,
        tags: granted.tags,
        servers: if granted.servers.is_empty() { token.servers.clone() } else { granted.servers },
        hosts,
        ticket_key,
        certificate: CertificateDer::from(granted.certificate),
        root: CertificateDer::from(granted.root),
        key: Arc::new(key),
        revoked: Arc::default(),
        proxies: Proxies::default(),
        p2p: Default::default(),
    })
}

/// Why this device was not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The text is no token.
    #[error(transparent)]
    Token(#[from] InvalidToken),
    /// The name has other characters, or too many.
    #[error("{0:?} cannot be a device's name: 1 to 63 of A-Z a-z 0-9 . _ -")]
    Name(String),
    /// The tag has another form.
    #[error("{0:?} cannot be a tag: KEY=VALUE of A-Z a-z 0-9 . _ - (and : / @ + in the value), at most 128")]
    Tag(String),
    /// There is an identity already.
    #[error("{} holds an identity already", .0.display())]
    AlreadyEnrolled(PathBuf),
    /// The mediator said no.
    #[error("the mediator refused this enrolment: {0}")]
    Refused(String),
    /// The mediator could not, this time.
    #[error("the mediator cannot enrol now: {0}")]
    Unavailable(String),
    /// The server is not the one that the token names.
    #[error("the server's root key is not the one that the token names: wrong fingerprint")]
    WrongFingerprint,
    /// The server's certificate is not acceptable for another reason.
    #[error("the server cannot be trusted: {0}")]
    Untrusted(VerifyError),
    /// Something in between answers in the mediator's place.
    #[error("{server}: {why}")]
    Intercepted {
        /// `HOST:PORT`.
        server: String,
        /// What gave it away.
        why: String,
    },
    /// Nobody answers there.
    #[error("the mediator at {server} cannot be reached: {why}")]
    Unreachable {
        /// The last server tried.
        server: String,
        /// What the system said.
        why: String,
    },
    /// No way through the proxy.
    #[error("the mediator at {server} cannot be reached: the proxy at {proxy} {error}")]
    Proxy {
        /// The last server tried.
        server: String,
        /// `HOST:PORT`.
        proxy: String,
        /// Why.
        error: ProxyError,
    },
    /// No answer in time.
    #[error("the mediator at {server} did not answer in time")]
    TimedOut {
        /// The last server tried.
        server: String,
    },
    /// An answer that makes no sense.
    #[error("the mediator's answer could not be understood")]
    NoAnswer,
    /// The state directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A certificate could not be made or read.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// TLS could not be set up.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl EnrolError {
    fn from_dial(server: &str, error: DialError) -> Self {
        match error {
            DialError::Verify(VerifyError::WrongFingerprint) => Self::WrongFingerprint,
            DialError::Foreign(why) => Self::Intercepted { server: server.to_owned(), why },
            DialError::Verify(error @ VerifyError::Intercepted { .. }) => {
                Self::Intercepted { server: server.to_owned(), why: error.to_string() }
            }
            DialError::Verify(verdict) => Self::Untrusted(verdict),
            DialError::TimedOut => Self::TimedOut { server: server.to_owned() },
            DialError::Proxy { proxy, error } => Self::Proxy { server: server.to_owned(), proxy, error },
            other => Self::Unreachable { server: server.to_owned(), why: other.to_string() },
        }
    }
}

impl Failure for EnrolError {
    fn exit(&self) -> Exit {
        match self {
            Self::Token(_) | Self::Name(_) | Self::Tag(_) | Self::AlreadyEnrolled(_) => Exit::Usage,
            Self::Refused(_) | Self::WrongFingerprint | Self::Untrusted(_) => Exit::Refused,
            Self::Unreachable { .. } | Self::Proxy { .. } | Self::Intercepted { .. } => Exit::Unreachable,
            Self::TimedOut { .. } => Exit::TimedOut,
            Self::Store(error) => error.exit(),
            Self::Unavailable(_) | Self::NoAnswer | Self::Certificate(_) | Self::Tls(_) => Exit::Failed,
        }
    }

    fn remedy(&self) -> Option<String> {
        Some(match self {
            Self::Token(_) => "copy the whole token that `adit-mediator token` printed".into(),
            Self::Name(_) => "choose another one with --name".into(),
            Self::Tag(_) => "for example --tag site=berlin".into(),
            Self::AlreadyEnrolled(_) => {
                "give another directory with --data, or add --replace to give up that identity".into()
            }
            Self::Refused(_) => "ask the operator for a new token (adit-mediator token)".into(),
            Self::WrongFingerprint => {
                "ask the operator for a new token; if it fails again, someone may sit in between".into()
            }
            Self::Intercepted { .. } => crate::control::INTERCEPTED.into(),
            Self::Proxy { error, .. } => error.remedy().into(),
            Self::Untrusted(_) => "check this machine's clock; else ask the operator for a new token".into(),
            Self::Unreachable { .. } | Self::TimedOut { .. } => {
                "check that the mediator runs and no firewall is in the way; then try the same token again"
                    .into()
            }
            Self::Unavailable(_) => {
                "try the same token again; the operator finds the cause in the mediator's log".into()
            }
            Self::NoAnswer => "check that device and mediator run fitting versions".into(),
            Self::Store(error) => return error.remedy(),
            Self::Certificate(_) | Self::Tls(_) => return None,
        })
    }
}
