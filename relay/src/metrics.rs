//! What a relay counts, under the names that Prometheus sees (prefix `adit_relay_`).

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Counters and gauges of one relay.
#[derive(Debug)]
pub struct Metrics {
    bytes: Family<Label, Counter>,
    refusals: Family<Label, Counter>,
    pipes: Family<Label, Gauge>,
    // Handles into the families above: the hot path looks nothing up.
    spliced: Counter,
    copied: Counter,
    pipes_lent: Gauge,
    pipes_idle: Gauge,
    pub(crate) pairs: Gauge,
    pub(crate) pairs_total: Counter,
    pub(crate) waiting: Gauge,
}

/// One label: name and value.
type Label = [(&'static str, &'static str); 1];

/// Why a leg was not taken, as the label `reason`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Had to leave for a newer connection: too many had not shown a ticket.
    Overload,
    /// No whole preamble in time, or the connection was lost before.
    Silent,
    /// Not a preamble, or not a ticket inside.
    Malformed,
    /// Not signed by the mediator.
    Signature,
    /// Not signed by the ticket's holder.
    Possession,
    /// The ticket has expired.
    Expired,
    /// The ticket is for another relay.
    OtherRelay,
    /// The ticket is from before this relay's start.
    OtherEpoch,
    /// No mediator has told this relay its ticket key yet.
    NoKey,
    /// The ticket's legs have paired before.
    Spent,
    /// The other leg did not come.
    NoPeer,
    /// A newer leg took the place.
    Replaced,
    /// The two tickets do not name each other.
    Mismatch,
    /// One of the ticket's devices was revoked.
    Revoked,
    /// The relay is full.
    Busy,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PipeState {
    Lent,
    Idle,
}

impl Reason {
    /// The label's value.
    pub fn as_str(self) -> &'static str {
        match self {
            Reason::Overload => "overload",
            Reason::Silent => "silent",
            Reason::Malformed => "malformed",
            Reason::Signature => "signature",
            Reason::Possession => "possession",
            Reason::Expired => "expired",
            Reason::OtherRelay => "other_relay",
            Reason::OtherEpoch => "other_epoch",
            Reason::NoKey => "no_key",
            Reason::Spent => "spent",
            Reason::NoPeer => "no_peer",
            Reason::Replaced => "replaced",
            Reason::Mismatch => "mismatch",
            Reason::Revoked => "revoked",
            Reason::Busy => "busy",
        }
    }
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let bytes = Family::<Label, Counter>::default();
        let pipes = Family::<Label, Gauge>::default();
        Self {
            spliced: bytes.get_or_create_owned(&[("method", "splice")]),
            copied: bytes.get_or_create_owned(&[("method", "copy")]),
            pipes_lent: pipes.get_or_create_owned(&[("state", "lent")]),
            pipes_idle: pipes.get_or_create_owned(&[("state", "idle")]),
            bytes,
            pipes,
            refusals: Family::default(),
            pairs: Gauge::default(),
            pairs_total: Counter::default(),
            waiting: Gauge::default(),
        }
    }

    pub(crate) fn register(&self, registry: &mut Registry) {
        let r = registry.sub_registry_with_prefix("adit_relay");
        r.register("forwarded_bytes", "Bytes forwarded, by splice or by copying", self.bytes.clone());
        r.register("refusals", "Legs that were not taken, by reason", self.refusals.clone());
        r.register("pipes", "Pipes: lent to bytes in transit, or kept for later", self.pipes.clone());
        r.register("pairs", "Pairs that are being forwarded", self.pairs.clone());
        r.register("paired", "Pairs since the start", self.pairs_total.clone());
        r.register("legs_waiting", "Legs whose other leg has not come yet", self.waiting.clone());
    }

    /// Bytes that went from socket to socket inside the kernel.
    pub fn spliced_bytes(&self) -> u64 {
        self.spliced.get()
    }

    /// Bytes that went through this process's memory.
    pub fn copied_bytes(&self) -> u64 {
        self.copied.get()
    }

    /// Pairs that are being forwarded now.
    pub fn pairs(&self) -> u64 {
        unsigned(&self.pairs)
    }

    /// Pairs since the start.
    pub fn pairs_total(&self) -> u64 {
        self.pairs_total.get()
    }

    /// Legs that wait for their other leg now.
    pub fn legs_waiting(&self) -> u64 {
        unsigned(&self.waiting)
    }

    /// Pipes that carry bytes now.
    pub fn pipes_lent(&self) -> u64 {
        unsigned(&self.pipes_lent)
    }

    /// Pipes kept for the next bytes.
    pub fn pipes_idle(&self) -> u64 {
        unsigned(&self.pipes_idle)
    }

    /// Legs not taken for `reason`.
    pub fn refusals(&self, reason: Reason) -> u64 {
        self.refusals.get_or_create(&[("reason", reason.as_str())]).get()
    }

    pub(crate) fn refused(&self, reason: Reason) {
        self.refusals.get_or_create(&[("reason", reason.as_str())]).inc();
    }

    pub(crate) fn forwarded(&self, spliced: bool, bytes: usize) {
        if spliced { &self.spliced } else { &self.copied }.inc_by(bytes as u64);
    }

    pub(crate) fn set_pipes(&self, state: PipeState, count: usize) {
        let gauge = match state {
            PipeState::Lent => &self.pipes_lent,
            PipeState::Idle => &self.pipes_idle,
        };
        gauge.set(count as i64);
    }
}

/// Counts one up in a gauge for as long as it lives.
#[derive(Debug)]
pub(crate) struct Counted(Gauge);

impl Counted {
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

fn unsigned(gauge: &Gauge) -> u64 {
    u64::try_from(gauge.get()).unwrap_or(0)
}
