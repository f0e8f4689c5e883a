//! The mediator's side of one enrolment.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use adit_client::enrol::write_message;
use adit_client::identity::certificate::{MAX_TAGS, is_name, is_tag, request_key};
use adit_protocol::Role;
use adit_protocol::enrol::{Granted, Outcome, Refused, Request, Response};
use aws_lc_rs::digest::{SHA256, digest};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tracing::{info, warn};

use crate::audit::{NotWritten, Record};
use crate::broker::{Broker, UNRECORDED, party};
use crate::organisation::unix_now;
use crate::store::{Candidate, Device, EnrolError, Enrolled, Pending};

/// Hosts that a relay may name.
const MAX_HOSTS: usize = 8;

/// What enrolments need.
pub struct Enroller {
    /// Tokens, devices, the enrolment key.
    pub broker: Arc<Broker>,
}

/// What came of an enrolment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// A device was enrolled, or would have been if the mediator could.
    Enrolled,
    /// A name that is taken, or a token that is used up: whoever shows one has had it from the operator.
    Refused,
    /// A token that does not exist.
    WrongToken,
}

/// Why a device was not enrolled.
enum Failed {
    /// For good, with this token or these wishes.
    Refused(String),
    /// There is no such token.
    WrongToken(String),
    /// This time: the token is as good as before.
    Unavailable(String),
}

impl Enroller {
    /// Answers one request. The caller sets the deadline.
    ///
    /// # Errors
    /// The stream's.
    pub async fn serve<S: AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        request: &Request,
        from: SocketAddr,
    ) -> io::Result<Verdict> {
        let (outcome, verdict) = match self.enrol(request, from).await {
            Ok(granted) => (Outcome::Granted(granted), Verdict::Enrolled),
            Err(Failed::Refused(message)) => {
                info!(message, "enrolment refused");
                (Outcome::Refused(Refused { message, unavailable: false }), Verdict::Refused)
            }
            // Its line in the log is the door's, which counts them.
            Err(Failed::WrongToken(message)) => {
                (Outcome::Refused(Refused { message, unavailable: false }), Verdict::WrongToken)
            }
            Err(Failed::Unavailable(message)) => {
                (Outcome::Refused(Refused { message, unavailable: true }), Verdict::Enrolled)
            }
        };
        write_message(stream, &Response { outcome: Some(outcome) }).await?;
        stream.shutdown().await?;
        Ok(verdict)
    }

    async fn enrol(&self, request: &Request, from: SocketAddr) -> Result<Granted, Failed> {
        let broker = &self.broker;
        let Some(authority) = broker.keyring.authority() else {
            let message = "the enrolment key is offline: the operator puts root-key.pem back";
            return Err(Failed::Unavailable(message.into()));
        };
        let public_key = request_key(&request.csr).map_err(|error| Failed::Refused(error.to_string()))?;
        let sane_host = |host: &String| (1..=253).contains(&host.len()) && host.bytes().all(is_host_byte);
        if !is_name(&request.name)
            || request.tags.len() > MAX_TAGS
            || !request.tags.iter().all(|tag| is_tag(tag))
            || request.hosts.len() > MAX_HOSTS
            || !request.hosts.iter().all(sane_host)
        {
            return Err(Failed::Refused("name, tags or hosts are not acceptable".into()));
        }
        let sign = |device: &Device| {
            let made = authority.sign_key(&public_key, &device.subject(), unix_now());
            made.ok().map(|der| der.to_vec())
        };
        let candidate = Candidate {
            token: secret_hash(&request.secret),
            public_key,
            name: &request.name,
            tags: &request.tags,
            hosts: &request.hosts,
            replace: request.replace,
            sign: &sign,
        };
        let pending = broker.store.prepare_enrolment(&candidate, unix_now()).await.map_err(failed)?;
        // It, and a technician's first grant with it, counts only with its record. A record may be of an enrolment
        // that the database refuses in the end; that is tried again with a record of its own.
        let Enrolled { device, again, replaced } = &pending.enrolled;
        if !again {
            self.write_down("enrolled", device, from).await?;
        }
        if let Some(old) = replaced {
            self.write_down("replaced", old, from).await?;
        }
        // It is brought to its end, also when whoever asked is gone meanwhile.
        let admitting = tokio::spawn(admit(broker.clone(), pending));
        let done = admitting.await.map_err(|error| Failed::Unavailable(error.to_string()))?;
        let device = done.map_err(|error| failed(error.into()))?;
        let greeting = broker.greeting();
        Ok(Granted {
            device_id: device.id.0.to_vec(),
            certificate: device.certificate,
            root: authority.certificate().to_vec(),
            role: device.role.to_string(),
            name: device.name,
            servers: greeting.servers.clone(),
            tags: device.tags,
            ticket_key: if device.role == Role::Relay { greeting.ticket_key.to_vec() } else { vec![] },
        })
    }

    async fn write_down(&self, event: &str, device: &Device, from: SocketAddr) -> Result<(), Failed> {
        let (from, tags) = (from.to_string(), device.tags.join(" "));
        let record = Record {
            device: Some(party(device)),
            from: &from,
            reason: &tags,
            ..Record::new(event, unix_now())
        };
        let written = self.broker.audit.write(&record).await;
        written.map_err(|NotWritten| Failed::Unavailable(UNRECORDED.into()))
    }
}

/// Makes the enrolment count: in the database, and for this mediator.
async fn admit(broker: Arc<Broker>, pending: Pending) -> Result<Device, sqlx::Error> {
    let Enrolled { device, again, replaced } = pending.commit().await?;
    if !again {
        info!(device = %device.id, role = %device.role, name = device.name, "enrolled");
    }
    if let Some(old) = &replaced {
        info!(device = %old.id, name = old.name, "replaced: the old identity is revoked");
    }
    // An earlier try may have been cut off before this, by a restart or a database that failed.
    let unknown = broker.directory.get(device.id).is_none();
    if replaced.is_some() || (again && unknown) {
        broker.reload().await?;
    } else if unknown {
        broker.directory.add(device.id).await?;
    }
    Ok(device)
}

fn failed(error: EnrolError) -> Failed {
    match &error {
        EnrolError::Database(cause) => {
            warn!(%cause, "the database failed");
            Failed::Unavailable(error.to_string())
        }
        EnrolError::NotSigned => Failed::Unavailable(error.to_string()),
        EnrolError::UnknownToken => Failed::WrongToken(error.to_string()),
        _ => Failed::Refused(error.to_string()),
    }
}

/// What is kept of a token's secret. It has 128 random bits: a plain hash is enough.
///
/// Tokens are looked up by this hash, in an index whose comparisons take as long as the bytes agree. That
/// tells a guesser nothing: to make a hash that begins like a stored one he has to try secrets until one
/// fits, and what he learns of the hash says nothing of the secret behind it.
pub fn secret_hash(secret: &[u8]) -> [u8; 32] {
    digest(&SHA256, secret).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':')
}
