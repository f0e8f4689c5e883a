//! The benchmark: raw TCP, the bare carriers ([`pipe`](../pipe.rs)) and adit's tunnels beside each other, in
//! interleaved rounds on 127.0.0.1, as an unprivileged user.
//!
//! | module | what it does |
//! | --- | --- |
//! | `programs` | running programs: what they say, what they cost |
//! | `routes` | brings up the server, agent, technician and the bare carriers |
//! | `traffic` | throughput and round trips |
//! | `report` | medians over rounds, ratios in the same round, marks |
//! | `unprivileged` | builds the programs, and leaves root behind |

mod programs;
mod report;
mod routes;
mod traffic;
mod unprivileged;

use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use programs::Program;
use report::{Measured, Report};
use routes::{Kind, Route, Routes};
use traffic::{Direction, Service};

/// Until congestion windows and buffers have found their size.
const WARM_UP: Duration = Duration::from_millis(500);

/// Measure adit's tunnels beside raw TCP and the bare carriers.
///
/// A table goes to standard error, and one JSON object a figure to standard output.
#[derive(Debug, Parser)]
#[command(after_help = "Example: cargo run --release -p adit-tests --bin bench -- --check")]
struct Arguments {
    /// Rounds; each measures everything once. Medians are over rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Seconds of each throughput measurement; there are two for each way and round.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Round trips for each way and round.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(100..=1_000_000))]
    trips: u32,
    /// Only these ways; marks that need others are left out. Can be given several times.
    #[arg(long)]
    only: Vec<Kind>,
    /// Exit with 1 when a mark is missed.
    #[arg(long)]
    check: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<ExitCode> {
    let binaries = unprivileged::binaries()?;
    if let Some(code) = unprivileged::leave_root(&binaries)? {
        return Ok(code);
    }
    let dir = tempfile::Builder::new().prefix("adit-bench-").tempdir()?;
    let service = Service::start()?;
    let routes = Routes::open(dir.path(), &binaries, service.address, &arguments.only)?;
    let mut report = Report::default();
    for round in 0..arguments.rounds {
        eprintln!("round {} of {}", round + 1, arguments.rounds);
        // Every second round the other way round, so that what drifts favours nobody.
        let mut order: Vec<&Route> = routes.all.iter().collect();
        if round % 2 == 1 {
            order.reverse();
        }
        for route in order {
            let measured = measure(arguments, &service, route)
                .with_context(|| format!("on {}\n{}", route.kind.name(), route.complaints()))?;
            report.add(route.kind, measured);
        }
    }
    report.forwarded(routes.forwarded()?);
    report.print()?;
    let kept = report.marks_kept();
    Ok(if arguments.check && !kept { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn measure(arguments: &Arguments, service: &Service, route: &Route) -> Result<Measured> {
    let times = [WARM_UP, Duration::from_secs_f64(arguments.seconds)];
    let mut measured = Measured::default();
    let (mut bytes, mut costs) = (0, Vec::new());
    for direction in [Direction::Down, Direction::Up] {
        let at_edge = || {
            costs.push(cpu(route)?);
            Ok(())
        };
        let (moved, seconds) = service.stream(route.entry, direction, times, at_edge)?;
        let rate = moved as f64 * 8.0 / 1e6 / seconds;
        match direction {
            Direction::Down => measured.down = rate,
            Direction::Up => measured.up = rate,
        }
        bytes += moved;
    }
    let cost = |program: usize| {
        let spent: f64 = costs.chunks_exact(2).map(|edges| edges[1][program] - edges[0][program]).sum();
        spent / (bytes as f64 / 1e9)
    };
    (measured.agent_cpu, measured.technician_cpu, measured.relay_cpu) = (cost(0), cost(1), cost(2));
    let trips = service.ping_pong(route.entry, arguments.trips as usize)?;
    let at = |share: f64| trips[(trips.len() as f64 * share) as usize].as_secs_f64() * 1e6;
    (measured.p50, measured.p99) = (at(0.5), at(0.99));
    Ok(measured)
}

/// Seconds of CPU time so far: agent, technician, relay.
fn cpu(route: &Route) -> Result<[f64; 3]> {
    let of = |program: &Option<Rc<Program>>| program.as_ref().map_or(Ok(0.0), |program| program.cpu());
    Ok([of(&route.agent)?, of(&route.technician)?, of(&route.relay)?])
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds = text.parse().map_err(|_| "expected a number".to_owned())?;
    if (0.1..=600.0).contains(&seconds) { Ok(seconds) } else { Err("expected 0.1 to 600".to_owned()) }
}
