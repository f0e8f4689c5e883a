//! Which tiers a technician wants.

use std::fmt;
use std::str::FromStr;

use adit_tunnel::session::CarrierKind;

/// `--via`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Via {
    /// The relay at once, the direct path as soon as there is one.
    #[default]
    Auto,
    /// The direct path or nothing.
    Direct,
    /// The relay only.
    Relay,
    /// A session of which a redirector is the technician's end.
    Redirector,
}

impl Via {
    /// The name on the command line and on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Via::Auto => "auto",
            Via::Direct => "direct",
            Via::Relay => "relay",
            Via::Redirector => "redirector",
        }
    }

    /// The tier that people are told of a session on this carrier.
    pub fn tier(self, carrier: CarrierKind) -> &'static str {
        if self == Via::Redirector { "redirector" } else { carrier.tier() }
    }

    /// Whether a direct path is sought.
    pub fn wants_direct(self) -> bool {
        !matches!(self, Via::Relay | Via::Redirector)
    }

    /// Whether a relay is dialled.
    pub fn wants_relay(self) -> bool {
        self != Via::Direct
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Via {
    type Err = UnknownVia;
    fn from_str(text: &str) -> Result<Self, UnknownVia> {
        [Via::Auto, Via::Direct, Via::Relay, Via::Redirector]
            .into_iter()
            .find(|via| via.as_str() == text)
            .ok_or(UnknownVia)
    }
}

/// A tier that this version does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected auto, direct, relay or redirector")]
pub struct UnknownVia;
