//! What a long-running command says on standard output: JSON objects, one a line, for scripts, or lines
//! for people. Logs and complaints go to standard error.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use adit_protocol::Wanted;
use serde_json::{Value, json};

use crate::session::SessionEvent;

/// Something that scripts may wait for.
#[derive(Debug, Clone)]
pub enum Event<'a> {
    /// A local port takes connections or datagrams.
    Listening {
        /// The local address.
        local: SocketAddr,
        /// Where they go.
        target: &'a Wanted,
    },
    /// Agent: the allow list in force.
    Allowing {
        /// As [`crate::allow::AllowList`] writes it.
        entries: &'a [String],
    },
    /// Agent: the control channel is up.
    Online,
    /// Agent: it is down; the agent goes on trying.
    Offline {
        /// Why.
        reason: &'a str,
    },
    /// A port of the redirector is used in the place of a tunnel.
    Redirected {
        /// `HOST:PORT`.
        remote: &'a str,
        /// Why.
        reason: &'a str,
        /// Since it was asked for.
        since_start: Duration,
    },
    /// What was served is over.
    Closed {
        /// Why.
        reason: &'a str,
    },
    /// A session moved to a carrier, or ended.
    Session {
        /// Agent: which session and technician; there may be many.
        whose: Option<(&'a str, &'a str)>,
        /// What happened.
        event: &'a SessionEvent,
    },
}

/// Writes events.
#[derive(Debug, Clone, Copy)]
pub struct Events {
    json: bool,
}

impl Events {
    /// For scripts (`json`) or for people.
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Writes one event. A reader that is gone is no reason to stop.
    pub fn emit(&self, event: &Event<'_>) {
        let line = if self.json { to_json(event).map(|value| value.to_string()) } else { to_text(event) };
        if let Some(line) = line {
            print_line(&line);
        }
    }
}

/// Writes a line to standard output; a reader that is gone is no reason to panic.
pub fn print_line(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

/// Writes a line to standard error, as [`print_line`] does.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Text from elsewhere such as a terminal may show it: control characters, and those that reorder or hide
/// text, are spelled out; at most `max` characters.
pub fn printable(text: &str, max: usize) -> String {
    let mut shown = String::new();
    for c in text.chars().take(max) {
        let hides = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if c.is_control() || hides { shown.extend(c.escape_unicode()) } else { shown.push(c) }
    }
    if text.chars().nth(max).is_some() {
        shown.push('…');
    }
    shown
}

/// Longest reason that is shown.
const MAX_REASON: usize = 300;

/// Milliseconds with one decimal.
pub fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 10_000.0).round() / 10.0
}

fn to_json(event: &Event<'_>) -> Option<Value> {
    Some(match event {
        Event::Listening { local, target } => {
            json!({"event": "listening", "local": local.to_string(), "target": target.to_string()})
        }
        Event::Allowing { entries } => json!({"event": "allowing", "allow": entries}),
        Event::Online => json!({"event": "online"}),
        Event::Offline { reason } => json!({"event": "offline", "reason": printable(reason, MAX_REASON)}),
        Event::Redirected { remote, reason, since_start } => json!({
            "event": "tier",
            "tier": "redirector",
            "carrier": "redirector",
            "local": null,
            "remote": printable(remote, MAX_REASON),
            "rtt_ms": null,
            "reason": printable(reason, MAX_REASON),
            "since_start_ms": since_start.as_millis() as u64,
        }),
        Event::Closed { reason } => json!({"event": "closed", "reason": printable(reason, MAX_REASON)}),
        Event::Session { whose, event } => {
            let mut value = match event {
                SessionEvent::Tier { tier, carrier, reason, since_start } => json!({
                    "event": "tier",
                    "tier": tier,
                    "carrier": carrier.kind.as_str(),
                    "local": carrier.local.map(|address| address.to_string()),
                    "remote": carrier.remote.map(|address| address.to_string()),
                    "rtt_ms": carrier.rtt.map(millis),
                    "reason": printable(reason, MAX_REASON),
                    "since_start_ms": since_start.as_millis() as u64,
                }),
                SessionEvent::Closed { reason } => {
                    json!({"event": "closed", "reason": printable(reason, MAX_REASON)})
                }
                SessionEvent::Incoming(..) | SessionEvent::IncomingFlow(..) => return None,
            };
            if let Some((session, peer)) = whose {
                value["session"] = Value::from(*session);
                value["peer"] = Value::from(printable(peer, MAX_REASON));
            }
            value
        }
    })
}

fn to_text(event: &Event<'_>) -> Option<String> {
    Some(match event {
        Event::Listening { local, target: Wanted::Any } => {
            format!("listening on {local} for SOCKS5 and HTTP CONNECT to everything that the agent allows")
        }
        Event::Listening { local, target } => format!("listening on {local} for {target}"),
        Event::Allowing { entries: [] } => "allowing nothing".to_owned(),
        Event::Allowing { entries } => format!("allowing {}", entries.join(" ")),
        Event::Online => "online".to_owned(),
        Event::Offline { reason } => format!("offline, trying again: {}", printable(reason, MAX_REASON)),
        Event::Redirected { remote, reason, .. } => {
            format!("redirector ({}): {}", printable(remote, MAX_REASON), printable(reason, MAX_REASON))
        }
        Event::Closed { reason } => format!("closed: {}", printable(reason, MAX_REASON)),
        Event::Session { whose, event } => {
            let mut line = whose.map(|(_, peer)| format!("{}: ", printable(peer, 100))).unwrap_or_default();
            match event {
                SessionEvent::Tier { tier, carrier, reason, .. } => {
                    let _ = write!(line, "{tier} ({}", carrier.kind.as_str());
                    if let Some(remote) = carrier.remote {
                        let _ = write!(line, " {remote}");
                    }
                    if let Some(rtt) = carrier.rtt {
                        let _ = write!(line, ", {} ms", millis(rtt));
                    }
                    let _ = write!(line, "): {}", printable(reason, MAX_REASON));
                }
                SessionEvent::Closed { reason } => {
                    let _ = write!(line, "closed: {}", printable(reason, MAX_REASON));
                }
                SessionEvent::Incoming(..) | SessionEvent::IncomingFlow(..) => return None,
            }
            line
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::CarrierInfo;
    use adit_tunnel::session::CarrierKind;

    fn tier() -> SessionEvent {
        SessionEvent::Tier {
            tier: "direct",
            carrier: CarrierInfo {
                kind: CarrierKind::Quic,
                local: Some(([10, 0, 0, 1], 40_000).into()),
                remote: Some(([192, 0, 2, 7], 40_001).into()),
                rtt: Some(Duration::from_micros(1_940)),
                bytes: (0, 0),
                active: true,
                ready: true,
                silent: false,
            },
            reason: "direct path confirmed".to_owned(),
            since_start: Duration::from_millis(41),
        }
    }

    #[test]
    fn scripts_get_the_fixed_names() {
        let target = "127.0.0.1:3389".parse().expect("a target");
        let listening = Event::Listening { local: ([127, 0, 0, 1], 13_389).into(), target: &target };
        assert_eq!(
            to_json(&listening),
            Some(json!({"event": "listening", "local": "127.0.0.1:13389", "target": "127.0.0.1:3389"}))
        );
        let wanted = json!({
            "event": "tier", "tier": "direct", "carrier": "quic", "local": "10.0.0.1:40000",
            "remote": "192.0.2.7:40001", "rtt_ms": 1.9, "reason": "direct path confirmed", "since_start_ms": 41
        });
        assert_eq!(to_json(&Event::Session { whose: None, event: &tier() }), Some(wanted));
        let closed = SessionEvent::Closed { reason: "done".to_owned() };
        assert_eq!(
            to_json(&Event::Session { whose: Some(("5e", "anna")), event: &closed }),
            Some(json!({"event": "closed", "reason": "done", "session": "5e", "peer": "anna"}))
        );
    }

    #[test]
    fn people_get_a_line() {
        let text = to_text(&Event::Session { whose: None, event: &tier() });
        assert_eq!(text.as_deref(), Some("direct (quic 192.0.2.7:40001, 1.9 ms): direct path confirmed"));
    }

    #[test]
    fn hostile_text_cannot_steer_a_terminal() {
        let shown = printable("a\u{1b}[2J\r\nb\u{202e}c\u{9b}31m", 100);
        assert_eq!(shown, "a\\u{1b}[2J\\u{d}\\u{a}b\\u{202e}c\\u{9b}31m");
        assert_eq!(printable(&"x".repeat(1000), 5), "xxxxx…");
    }
}
