//! Enrolment tokens: the one text that a new device needs to trust its organisation and be trusted.
//!
//! `adit1.` followed by the base64url (no padding) of: the role that it enrols (1 byte: `a`gent,
//! `t`echnician, `r`elay), fingerprint of the enrolment key (32 bytes, SHA-256 of its
//! SubjectPublicKeyInfo), secret (16 bytes), and the mediator's addresses as `HOST:PORT`, comma separated.

use std::fmt;
use std::str::FromStr;

use data_encoding::BASE64URL_NOPAD;

use crate::id::Role;

const PREFIX: &str = "adit1.";
const FINGERPRINT: usize = 32;
const SECRET: usize = 16;
/// Those that tokens enrol.
const ROLES: [Role; 3] = [Role::Agent, Role::Technician, Role::Relay];
/// More than any sensible list of addresses needs.
const MAX_TEXT: usize = 4096;

/// A parsed token. [`fmt::Display`] gives the text; [`fmt::Debug`] hides the secret.
#[derive(Clone, PartialEq, Eq)]
pub struct EnrolmentToken {
    /// What it enrols, so that a device knows before it spends the token. The mediator's word counts.
    pub role: Role,
    /// SHA-256 over the SubjectPublicKeyInfo of the organisation's enrolment key.
    pub fingerprint: [u8; FINGERPRINT],
    /// 128 random bits; the mediator keeps only their SHA-256.
    pub secret: [u8; SECRET],
    /// Where the mediator is reached: `HOST:PORT` each, tried in turn. At least one.
    pub servers: Vec<String>,
}

impl fmt::Display for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = Vec::with_capacity(FINGERPRINT + SECRET + 64);
        bytes.push(self.role.as_str().as_bytes()[0]);
        bytes.extend_from_slice(&self.fingerprint);
        bytes.extend_from_slice(&self.secret);
        bytes.extend_from_slice(self.servers.join(",").as_bytes());
        write!(f, "{PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl fmt::Debug for EnrolmentToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EnrolmentToken")
            .field("role", &self.role)
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

impl FromStr for EnrolmentToken {
    type Err = InvalidToken;
    fn from_str(text: &str) -> Result<Self, InvalidToken> {
        let text = text.trim();
        if text.len() > MAX_TEXT {
            return Err(InvalidToken);
        }
        let encoded = text.strip_prefix(PREFIX).ok_or(InvalidToken)?;
        let bytes = BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| InvalidToken)?;
        let (&initial, rest) = bytes.split_first().ok_or(InvalidToken)?;
        let role =
            ROLES.into_iter().find(|role| role.as_str().as_bytes()[0] == initial).ok_or(InvalidToken)?;
        let (fingerprint, rest) = rest.split_first_chunk::<FINGERPRINT>().ok_or(InvalidToken)?;
        let (secret, servers) = rest.split_first_chunk::<SECRET>().ok_or(InvalidToken)?;
        let servers = std::str::from_utf8(servers).map_err(|_| InvalidToken)?;
        let servers: Vec<String> = servers.split(',').map(str::to_owned).collect();
        let is_address = |s: &String| {
            s.rsplit_once(':')
                .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|p| p > 0))
                && s.bytes().all(|b| b.is_ascii_graphic())
        };
        if !servers.iter().all(is_address) {
            return Err(InvalidToken);
        }
        Ok(Self { role, fingerprint: *fingerprint, secret: *secret, servers })
    }
}

/// A text that is not an enrolment token, or not a whole one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed token: expected one whole line that starts with \"adit1.\"")]
pub struct InvalidToken;

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> EnrolmentToken {
        EnrolmentToken {
            role: Role::Agent,
            fingerprint: [0x11; 32],
            secret: [0x22; 16],
            servers: vec!["adit.example.org:443".into(), "[2001:db8::1]:443".into()],
        }
    }

    #[test]
    fn text_is_locked() {
        let text = sample().to_string();
        assert_eq!(
            text,
            "adit1.YRERERERERERERERERERERERERERERERERERERERERERIiIiIiIiIiIiIiIiIiIiImFkaXQuZXhhbXBsZS5vcmc6NDQzLFsyMDAxOmRiODo6MV06NDQz"
        );
        assert_eq!(text.parse(), Ok(sample()));
        assert_eq!(format!("  {text}\n").parse(), Ok(sample()));
    }

    #[test]
    fn every_prefix_is_refused_or_whole() {
        let text = sample().to_string();
        for end in 0..text.len() {
            if let Ok(token) = text[..end].parse::<EnrolmentToken>() {
                // A cut inside the list of servers can still read as a list; the key and secret are whole.
                assert_eq!((token.fingerprint, token.secret), (sample().fingerprint, sample().secret));
            }
        }
        assert_eq!("adit1.".parse::<EnrolmentToken>(), Err(InvalidToken));
        assert_eq!("hunter2".parse::<EnrolmentToken>(), Err(InvalidToken));
    }

    #[test]
    fn debug_hides_the_secret() {
        assert!(!format!("{:?}", sample()).contains("34"));
    }
}
