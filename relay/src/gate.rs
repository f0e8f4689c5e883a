//! The bounded number of connections that have not shown a ticket yet.

use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::oneshot;

/// Everybody comes in; when it is full, a random one of those inside has to leave for it. A flood of
/// silent connections mostly drives out its own; who shows a ticket at once is hardly ever hit.
pub(crate) struct Gate {
    inside: Mutex<Inside>,
    limit: usize,
    gauge: Gauge,
}

#[derive(Default)]
struct Inside {
    next: u64,
    visitors: Vec<(u64, oneshot::Sender<()>)>,
}

/// A connection's stay. Dropped, it leaves.
pub(crate) struct Visit {
    gate: Arc<Gate>,
    number: u64,
    driven_out: oneshot::Receiver<()>,
}

impl Gate {
    pub(crate) fn new(limit: usize, gauge: Gauge) -> Arc<Self> {
        Arc::new(Self { inside: Mutex::default(), limit: limit.max(1), gauge })
    }

    pub(crate) fn enter(self: &Arc<Self>) -> Visit {
        let (driver, driven_out) = oneshot::channel();
        let number = self.with_inside(|inside| {
            if inside.visitors.len() >= self.limit {
                inside.visitors.swap_remove(rand::random_range(0..inside.visitors.len()));
            }
            inside.next += 1;
            inside.visitors.push((inside.next, driver));
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

impl Visit {
    /// Resolves when this connection has to leave. Cancel safe.
    pub(crate) async fn driven_out(&mut self) {
        // The sender is never used: it is dropped.
        let _ = (&mut self.driven_out).await;
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.gate.with_inside(|inside| {
            if let Some(at) = inside.visitors.iter().position(|(number, _)| *number == self.number) {
                inside.visitors.swap_remove(at);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_gate_drives_one_out_for_each_newcomer() {
        let gauge = Gauge::default();
        let gate = Gate::new(3, gauge.clone());
        let mut visits = [gate.enter(), gate.enter(), gate.enter()];
        assert_eq!(gauge.get(), 3);
        let newcomer = gate.enter();
        assert_eq!(gauge.get(), 3);
        let mut left = 0;
        for visit in &mut visits {
            tokio::select! {
                biased;
                () = visit.driven_out() => left += 1,
                () = std::future::ready(()) => {}
            }
        }
        assert_eq!(left, 1);
        drop(visits);
        assert_eq!(gauge.get(), 1);
        drop(newcomer);
        assert_eq!(gauge.get(), 0);
    }
}
