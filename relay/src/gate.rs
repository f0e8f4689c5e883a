//! The bounded number of connections that have not shown who they are yet.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::oneshot;

/// Everybody comes in; when it is full, of two random ones inside the older has to leave for it (when the
/// newcomer's own source is full: two of that source). A flood of silent connections drives out its own: who
/// shows a ticket, token or certificate at once is gone from here before it is likely to be the older one.
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
                let all = inside.visitors.iter().enumerate();
                let of_source: Vec<usize> =
                    all.filter(|(_, visitor)| visitor.source == source).map(|(at, _)| at).collect();
                inside.drive_out_one_of(of_source.len(), |nth| of_source[nth]);
            } else if inside.visitors.len() >= self.limit {
                inside.drive_out_one_of(inside.visitors.len(), |nth| nth);
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
    /// The older of two random ones of `count`, which must not be 0.
    fn drive_out_one_of(&mut self, count: usize, position: impl Fn(usize) -> usize) {
        let [one, other] = std::array::from_fn(|_| position(rand::random_range(0..count)));
        let older = if self.visitors[one].number < self.visitors[other].number { one } else { other };
        self.remove(older);
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
    fn it_is_the_older_of_two_that_leaves() {
        let gate = Gate::new(2, 2, Gauge::default());
        let older_left = (0..10_000).filter(|_| {
            let mut older = [gate.enter(host(1), true)];
            let _newer = gate.enter(host(2), true);
            let _newcomer = gate.enter(host(3), true);
            left(&mut older) == 1
        });
        // Three of four pairs of random choices have it; 500 are eleven standard deviations.
        let count = older_left.count();
        assert!((7000..8000).contains(&count), "{count}");
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
