//! The bounded number of connections that have not shown who they are yet.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::oneshot;

/// Everybody comes in; when it is full, a random one of those inside has to leave for it (when the
/// newcomer's own source is full: one of that source). A flood of silent connections mostly drives out its
/// own; who shows a ticket, token or certificate at once is hardly ever hit.
pub(crate) struct Gate {
    inside: Mutex<Inside>,
    limit: usize,
    per_source: usize,
    gauge: Gauge,
}

#[derive(Default)]
struct Inside {
    next: u64,
    visitors: Vec<Visitor>,
    sources: HashMap<IpAddr, usize>,
}

struct Visitor {
    number: u64,
    source: IpAddr,
    // Dropped, it drives the connection out.
    _stays: oneshot::Sender<()>,
}

/// A connection's stay. Dropped, it leaves.
pub struct Visit {
    gate: Arc<Gate>,
    number: u64,
    driven_out: oneshot::Receiver<()>,
}

impl Gate {
    pub(crate) fn new(limit: usize, per_source: usize, gauge: Gauge) -> Arc<Self> {
        let (limit, per_source) = (limit.max(1), per_source.max(1));
        Arc::new(Self { inside: Mutex::default(), limit, per_source, gauge })
    }

    /// `capped`: whether the limit for each source goes for this one.
    pub(crate) fn enter(self: &Arc<Self>, source: IpAddr, capped: bool) -> Visit {
        let (driver, driven_out) = oneshot::channel();
        let number = self.with_inside(|inside| {
            let theirs = inside.sources.get(&source).copied().unwrap_or(0);
            if capped && theirs >= self.per_source {
                inside.drive_out_one_of(source, rand::random_range(0..theirs));
            } else if inside.visitors.len() >= self.limit {
                inside.remove(rand::random_range(0..inside.visitors.len()));
            }
            inside.next += 1;
            inside.visitors.push(Visitor { number: inside.next, source, _stays: driver });
            *inside.sources.entry(source).or_default() += 1;
            inside.next
        });
        Visit { gate: self.clone(), number, driven_out }
    }

    fn with_inside<T>(&self, change: impl FnOnce(&mut Inside) -> T) -> T {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = change(&mut inside);
        self.gauge.set(inside.visitors.len() as i64);
        outcome
    }
}

impl Inside {
    fn drive_out_one_of(&mut self, source: IpAddr, nth: usize) {
        let theirs = self.visitors.iter().enumerate().filter(|(_, visitor)| visitor.source == source);
        if let Some((at, _)) = { theirs }.nth(nth) {
            self.remove(at);
        }
    }

    fn remove(&mut self, at: usize) {
        let source = self.visitors.swap_remove(at).source;
        if let Some(count) = self.sources.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.sources.remove(&source);
            }
        }
    }
}

impl Visit {
    /// Resolves when this connection has to leave. Cancel safe.
    pub async fn driven_out(&mut self) {
        // The sender is never used: it is dropped.
        let _ = (&mut self.driven_out).await;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.gate.with_inside(|inside| {
            if let Some(at) = inside.visitors.iter().position(|visitor| visitor.number == self.number) {
                inside.remove(at);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(visits: &mut [Visit]) -> usize {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        let mut is_out = |visit: &mut Visit| {
            let mut out = std::pin::pin!(visit.driven_out());
            std::future::Future::poll(out.as_mut(), &mut context).is_ready()
        };
        visits.iter_mut().filter_map(|visit| is_out(visit).then_some(())).count()
    }

    fn host(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    #[test]
    fn a_full_gate_drives_one_out_for_each_newcomer() {
        let gauge = Gauge::default();
        let gate = Gate::new(3, 3, gauge.clone());
        let mut visits = [1, 2, 3].map(|last| gate.enter(host(last), true));
        assert_eq!(gauge.get(), 3);
        let newcomer = gate.enter(host(4), true);
        assert_eq!((gauge.get(), left(&mut visits)), (3, 1));
        drop(visits);
        assert_eq!(gauge.get(), 1);
        drop(newcomer);
        assert_eq!(gauge.get(), 0);
        assert!(gate.with_inside(|inside| inside.sources.is_empty()));
    }

    #[test]
    fn a_source_that_has_its_share_drives_out_its_own() {
        let gate = Gate::new(10, 2, Gauge::default());
        let mut others = [gate.enter(host(1), true), gate.enter(host(2), true)];
        let mut greedy: Vec<Visit> = (0..50).map(|_| gate.enter(host(9), true)).collect();
        assert_eq!((left(&mut others), left(&mut greedy)), (0, 48));
        let mut exempt: Vec<Visit> = (0..5).map(|_| gate.enter(host(8), false)).collect();
        assert_eq!((left(&mut others), left(&mut exempt)), (0, 0));
    }
}
