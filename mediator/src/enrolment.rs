//! The mediator's side of one enrolment.

use std::io;

use adit_client::enrol::{read_message, write_message};
use adit_client::identity::certificate::{Authority, MAX_TAGS, Subject, is_name, is_tag, request_key};
use adit_protocol::Role;
use adit_protocol::enrol::{Granted, Outcome, Refused, Request, Response};
use aws_lc_rs::digest::{SHA256, digest};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tracing::{info, warn};

use crate::organisation::unix_now;
use crate::store::{Candidate, Device, EnrolError, Store};

/// Hosts that a relay may name.
const MAX_HOSTS: usize = 8;

/// What enrolments need.
pub struct Enroller {
    /// Tokens and devices.
    pub store: Store,
    /// The enrolment key; `None` while it is offline.
    pub authority: Option<Authority>,
    /// Where devices reach the control channel: `HOST:PORT` each.
    pub servers: Vec<String>,
    /// Relays are told the key that signs tickets.
    pub ticket_key: [u8; 32],
}

impl Enroller {
    /// Serves one connection. The caller sets the deadline.
    ///
    /// # Errors
    /// The stream's.
    pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(&self, stream: &mut S) -> io::Result<()> {
        let request: Request = read_message(stream).await?;
        let outcome = match self.enrol(&request).await {
            Ok(granted) => Outcome::Granted(granted),
            Err(message) => {
                info!(message, "enrolment refused");
                Outcome::Refused(Refused { message })
            }
        };
        write_message(stream, &Response { outcome: Some(outcome) }).await?;
        stream.shutdown().await
    }

    async fn enrol(&self, request: &Request) -> Result<Granted, String> {
        let Some(authority) = &self.authority else {
            return Err(
                "the enrolment key is offline: the operator puts root-key.pem back and restarts".into()
            );
        };
        let public_key = request_key(&request.csr).map_err(|error| error.to_string())?;
        let sane_host = |host: &String| (1..=253).contains(&host.len()) && host.bytes().all(is_host_byte);
        if !is_name(&request.name)
            || request.tags.len() > MAX_TAGS
            || !request.tags.iter().all(|tag| is_tag(tag))
            || request.hosts.len() > MAX_HOSTS
            || !request.hosts.iter().all(sane_host)
        {
            return Err("name, tags or hosts are not acceptable".into());
        }
        let sign = |device: &Device| {
            let subject = Subject {
                device_id: device.id,
                role: device.role,
                name: device.name.clone(),
                tags: device.tags.clone(),
            };
            authority.sign_request(&request.csr, &subject, unix_now()).ok().map(|der| der.to_vec())
        };
        let candidate = Candidate {
            token: secret_hash(&request.secret),
            public_key,
            name: &request.name,
            tags: &request.tags,
            hosts: &request.hosts,
            sign: &sign,
        };
        let device = self.store.enrol(&candidate, unix_now()).await.map_err(|error| {
            if let EnrolError::Database(error) = &error {
                warn!(%error, "the database failed");
            }
            error.to_string()
        })?;
        info!(device = %device.id, role = %device.role, name = device.name, "enrolled");
        Ok(Granted {
            device_id: device.id.0.to_vec(),
            certificate: device.certificate,
            root: authority.certificate().to_vec(),
            role: device.role.to_string(),
            name: device.name,
            servers: self.servers.clone(),
            tags: device.tags,
            ticket_key: if device.role == Role::Relay { self.ticket_key.to_vec() } else { vec![] },
        })
    }
}

/// What is kept of a token's secret. It has 128 random bits: a plain hash is enough.
pub fn secret_hash(secret: &[u8]) -> [u8; 32] {
    digest(&SHA256, secret).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn is_host_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':')
}
