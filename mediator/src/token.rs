//! `adit-mediator token`: makes an enrolment token, also while the mediator runs.

use std::path::Path;

use adit_client::identity::certificate::{MAX_TAGS, is_tag};
use adit_protocol::Role;
use adit_protocol::token::EnrolmentToken;

use crate::enrolment::secret_hash;
use crate::error::Error;
use crate::organisation::{DATABASE, Organisation, unix_now};
use crate::store::{Store, Token};

/// What a new token enrols.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Agent, technician or relay.
    pub role: Role,
    /// How long it can be used, in seconds.
    pub ttl: u64,
    /// How many devices it enrols.
    pub uses: u32,
    /// Tags of the device; of a technician: which agents it reaches.
    pub tags: Vec<String>,
    /// Technicians only: reaches every agent.
    pub all_agents: bool,
    /// A device may take the name of another although the token has several uses.
    pub may_replace: bool,
}

/// Makes a token of the organisation in `dir`.
///
/// # Errors
/// [`Error`].
pub async fn make(dir: &Path, wanted: Wanted) -> Result<EnrolmentToken, Error> {
    check_tags(&wanted.tags)?;
    if wanted.role == Role::Mediator {
        return Err(Error::TokenRole(wanted.role.to_string()));
    }
    let organisation = Organisation::load(dir)?;
    let secret: [u8; 16] = rand::random();
    let store = Store::open(&dir.join(DATABASE)).await?;
    let token = Token {
        hash: secret_hash(&secret),
        role: wanted.role,
        tags: wanted.tags,
        all_agents: wanted.all_agents,
        // Who holds a token for a whole rollout must not be able to pose as a device that is there.
        may_replace: wanted.may_replace || wanted.uses == 1,
        uses: wanted.uses,
        expires: unix_now().saturating_add(wanted.ttl),
    };
    let added = store.add_token(&token).await;
    added.map_err(|error| Error::Database { path: dir.join(DATABASE), error })?;
    store.close().await;
    Ok(EnrolmentToken {
        role: wanted.role,
        fingerprint: organisation.fingerprint()?,
        secret,
        servers: organisation.identity.servers,
    })
}

/// Whether a device can have these tags.
///
/// # Errors
/// [`Error::Tag`], [`Error::Tags`].
pub(crate) fn check_tags(tags: &[String]) -> Result<(), Error> {
    match tags.iter().find(|tag| !is_tag(tag)) {
        Some(tag) => Err(Error::Tag(tag.clone())),
        None if tags.len() > MAX_TAGS => Err(Error::Tags(tags.len())),
        None => Ok(()),
    }
}

/// Reads a duration such as `90s`, `30m`, `1h` or `7d`; gives seconds.
///
/// # Errors
/// [`Error::Ttl`].
pub fn parse_ttl(text: &str) -> Result<u64, Error> {
    let bad = || Error::Ttl(text.to_owned());
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "s" | "" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 604_800,
        _ => return Err(bad()),
    };
    let seconds = digits.parse::<u64>().ok().and_then(|count| count.checked_mul(unit)).ok_or_else(bad)?;
    // Ten years: beyond that it is a mistake, and it must fit the database's integers.
    if seconds == 0 || seconds > 10 * 365 * 86_400 { Err(bad()) } else { Ok(seconds) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, seconds) in [("90s", 90), ("5", 5), ("30m", 1800), ("1h", 3600), ("7d", 604_800)] {
            assert_eq!(parse_ttl(text).ok(), Some(seconds), "{text}");
        }
        for text in ["", "h", "0s", "1y", "-1h", "99999999999999999999s", "1h30m", "ü"] {
            assert!(parse_ttl(text).is_err(), "{text}");
        }
    }
}
