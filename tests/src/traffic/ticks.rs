//! A stream that ticks: each side sends a number every 10 ms and notes when the other's arrive.

use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::lab::Host;
use crate::within;

/// How often each side ticks.
const PERIOD: Duration = Duration::from_millis(10);
/// From when on a gap is noted as a stall.
pub const STALL: Duration = Duration::from_millis(40);
/// Said instead of the next number: there is no further one.
const LAST: u64 = u64::MAX;
/// How long the last ticks may take to arrive.
const TAIL: Duration = Duration::from_secs(15);

/// Ticks with whoever connects. It ends with the lab.
pub struct TickServer {
    /// The port, on all of the host's addresses.
    pub port: u16,
    lap: Lap,
}

/// Counts up when gaps are to be measured anew.
type Lap = Arc<AtomicU64>;

/// What arrived on one side.
#[derive(Debug, Clone)]
pub struct TickReport {
    /// How many; all that were sent, in order.
    pub ticks: u64,
    /// The longest time without one, since the last lap began.
    pub longest_gap: Duration,
    /// When that gap ended, after the first tick.
    pub at: Duration,
    /// Every gap of [`STALL`] or more, from the tick before it to the one after it. Only of this side: the other's
    /// report does not carry them.
    pub stalls: Vec<(Instant, Instant)>,
}

impl fmt::Display for TickReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ticks, longest gap {:?} (at {:?})", self.ticks, self.longest_gap, self.at)
    }
}

impl TickServer {
    /// Listens on all addresses of `host`. A connection's ticks end when the client's do.
    pub async fn start(host: &Host) -> anyhow::Result<Self> {
        let (port, listening) = oneshot::channel();
        let lap = Lap::default();
        let laps = lap.clone();
        host.task(async move {
            let listener = TcpListener::bind("0.0.0.0:0").await?;
            let _ = port.send(listener.local_addr()?.port());
            loop {
                let (stream, _) = listener.accept().await?;
                tokio::spawn(serve(stream, laps.clone()));
            }
            #[allow(unreachable_code)]
            anyhow::Ok(())
        })?;
        Ok(Self { port: listening.await?, lap })
    }

    /// From now on the reports of this side are about gaps that end later than now.
    pub fn new_lap(&self) {
        self.lap.fetch_add(1, Relaxed);
    }
}

/// A running tick stream.
pub struct Ticking {
    stop: watch::Sender<bool>,
    lap: Lap,
    reports: tokio::task::JoinHandle<anyhow::Result<(TickReport, TickReport)>>,
}

impl Ticking {
    /// As [`TickServer::new_lap`], for the report of this side.
    pub fn new_lap(&self) {
        self.lap.fetch_add(1, Relaxed);
    }

    /// Stops ticking; what arrived at the technician and at the agent. Fails if a tick is missing,
    /// doubled or out of order on either side.
    pub async fn stop(self) -> anyhow::Result<(TickReport, TickReport)> {
        self.stop.send_replace(true);
        within(TAIL * 2, "the last ticks", async { self.reports.await? }).await
    }
}

/// Starts to tick through `local`, a TCP port on `host` that leads to a [`TickServer`]. Returns when
/// the first tick of the other side is there.
pub async fn tick(host: &Host, local: SocketAddr) -> anyhow::Result<Ticking> {
    let (stop, stopped) = watch::channel(false);
    let (begun, first) = oneshot::channel();
    let lap = Lap::default();
    let laps = lap.clone();
    let reports = host.task(async move {
        let stream = TcpStream::connect(local).await?;
        stream.set_nodelay(true)?;
        let (mut from, mut to) = stream.into_split();
        let sending = async {
            send_ticks(&mut to, stopped).await?;
            anyhow::Ok(to)
        };
        let (to, here) = tokio::join!(sending, receive_ticks(&mut from, &laps, Some(begun)));
        let (to, here) = (to?, here?);
        // The other side's report follows its last tick.
        let there = TickReport {
            ticks: from.read_u64().await?,
            longest_gap: Duration::from_micros(from.read_u64().await?),
            at: Duration::from_micros(from.read_u64().await?),
            stalls: Vec::new(),
        };
        drop(to);
        Ok((here, there))
    })?;
    let ticking = Ticking { stop, lap, reports };
    if within(TAIL, "the first tick", async { Ok(first.await.is_ok()) }).await? {
        return Ok(ticking);
    }
    Err(ticking.stop().await.err().context("no tick came")?)
}

async fn serve(stream: TcpStream, lap: Lap) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let (mut from, mut to) = stream.into_split();
    let (stop, stopped) = watch::channel(false);
    let receiving = async {
        let report = receive_ticks(&mut from, &lap, None).await;
        stop.send_replace(true);
        report
    };
    let (sent, report) = tokio::join!(send_ticks(&mut to, stopped), receiving);
    sent?;
    let report = report?;
    for number in [report.ticks, report.longest_gap.as_micros() as u64, report.at.as_micros() as u64] {
        to.write_u64(number).await?;
    }
    to.shutdown().await?;
    Ok(())
}

async fn send_ticks(
    to: &mut (impl AsyncWriteExt + Unpin),
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let mut pace = interval(PERIOD);
    pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut number = 0;
    while !*stopped.borrow_and_update() {
        to.write_u64(number).await?;
        number += 1;
        pace.tick().await;
    }
    to.write_u64(LAST).await?;
    to.write_u64(number).await?;
    Ok(())
}

async fn receive_ticks(
    from: &mut (impl AsyncReadExt + Unpin),
    lap: &Lap,
    mut begun: Option<oneshot::Sender<()>>,
) -> anyhow::Result<TickReport> {
    let start = Instant::now();
    let mut report =
        TickReport { ticks: 0, longest_gap: Duration::ZERO, at: Duration::ZERO, stalls: Vec::new() };
    let mut last: Option<Instant> = None;
    let mut this_lap = lap.load(Relaxed);
    loop {
        let number = from.read_u64().await.with_context(|| format!("after {}", report))?;
        let now = Instant::now();
        let current = lap.load(Relaxed);
        if current != this_lap {
            (this_lap, report.longest_gap) = (current, Duration::ZERO);
        }
        if let Some(last) = last.replace(now) {
            if now - last > report.longest_gap {
                report.longest_gap = now - last;
                report.at = now - start;
            }
            if now - last >= STALL {
                report.stalls.push((last, now));
            }
        }
        if number == LAST {
            let sent = from.read_u64().await?;
            ensure!(sent == report.ticks, "{} of {sent} ticks arrived", report.ticks);
            return Ok(report);
        }
        ensure!(number == report.ticks, "tick {number} arrived in place of {}", report.ticks);
        report.ticks += 1;
        if let Some(begun) = begun.take() {
            let _ = begun.send(());
        }
    }
}
