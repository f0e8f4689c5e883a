//! What comes out: medians over rounds, ratios of the same round, and the marks.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Result;
use serde_json::json;

use crate::routes::Kind;

/// One way in one round.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Measured {
    /// Mbit/s.
    pub(crate) down: f64,
    pub(crate) up: f64,
    /// Microseconds.
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Seconds of CPU time per GB, both directions together; 0 where there is no such process.
    pub(crate) agent_cpu: f64,
    pub(crate) technician_cpu: f64,
    pub(crate) relay_cpu: f64,
}

/// Collects rounds.
#[derive(Default)]
pub(crate) struct Report {
    rounds: HashMap<Kind, Vec<Measured>>,
    /// Bytes that adit's relay spliced, and copied.
    forwarded: (u64, u64),
}

/// What a figure should be.
#[derive(Clone, Copy)]
enum Mark {
    None,
    AtLeast(f64),
    AtMost(f64),
    Above(f64),
}

struct Figure {
    name: String,
    unit: &'static str,
    /// One for each round.
    values: Vec<f64>,
    mark: Mark,
}

type Part = (&'static str, &'static str, fn(&Measured) -> f64);

const PARTS: [Part; 7] = [
    ("down", "Mbit/s", |m| m.down),
    ("up", "Mbit/s", |m| m.up),
    ("round trip p50", "us", |m| m.p50),
    ("round trip p99", "us", |m| m.p99),
    ("agent CPU", "s/GB", |m| m.agent_cpu),
    ("technician CPU", "s/GB", |m| m.technician_cpu),
    ("relay CPU", "s/GB", |m| m.relay_cpu),
];

impl Report {
    /// Adds a round of one way. Every way is added once a round.
    pub(crate) fn add(&mut self, kind: Kind, measured: Measured) {
        self.rounds.entry(kind).or_default().push(measured);
    }

    pub(crate) fn forwarded(&mut self, forwarded: (u64, u64)) {
        self.forwarded = forwarded;
    }

    /// The table to standard error, the figures as JSON to standard output.
    pub(crate) fn print(&self) -> Result<()> {
        let mut err = std::io::stderr().lock();
        write!(err, "\n{:10}", "median")?;
        PARTS.iter().try_for_each(|(name, ..)| write!(err, " {name:>14}"))?;
        write!(err, "\n{:10}", "")?;
        PARTS.iter().try_for_each(|(_, unit, _)| write!(err, " {unit:>14}"))?;
        for kind in Kind::ALL.into_iter().filter(|kind| self.rounds.contains_key(kind)) {
            write!(err, "\n{:10}", kind.name())?;
            for (_, unit, part) in PARTS {
                let values: Vec<f64> = self.values(kind, part);
                let digits = if unit == "s/GB" { 2 } else { 0 };
                write!(err, " {:>14.digits$}", spread(&values)[1])?;
            }
        }
        writeln!(err, "\n\n{:30} {:>9} {:>9} {:>9}  mark", "same round", "median", "least", "most")?;
        let compared = self.compared();
        for figure in &compared {
            let [least, median, most] = spread(&figure.values);
            let Figure { name, unit, mark, .. } = figure;
            let verdict = match mark.kept(median) {
                None => String::new(),
                Some(kept) => format!("{} {}", mark.text(), if kept { "kept" } else { "MISSED" }),
            };
            writeln!(err, "{name:30} {median:>9.3} {least:>9.3} {most:>9.3}  {unit:6} {verdict}")?;
        }
        let mut out = std::io::stdout().lock();
        for figure in self.absolute().iter().chain(&compared) {
            writeln!(out, "{}", figure.to_json())?;
        }
        Ok(())
    }

    /// Names the marks that are missed; `true` when there are none.
    pub(crate) fn marks_kept(&self) -> bool {
        let mut all = true;
        for figure in self.compared() {
            let [_, median, _] = spread(&figure.values);
            if figure.mark.kept(median) == Some(false) {
                eprintln!("missed: {} is {median:.3}, mark {}", figure.name, figure.mark.text());
                all = false;
            }
        }
        all
    }

    fn absolute(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        for kind in Kind::ALL {
            for (name, unit, part) in PARTS {
                let values = self.values(kind, part);
                // There is no such process.
                if values.iter().any(|value| *value > 0.0) {
                    figures.push(Figure {
                        name: format!("{} {name}", kind.name()),
                        unit,
                        values,
                        mark: Mark::None,
                    });
                }
            }
        }
        figures
    }

    fn compared(&self) -> Vec<Figure> {
        let mut figures = Vec::new();
        let mut figure = |name: &str, unit, values: Vec<f64>, mark| {
            if !values.is_empty() {
                figures.push(Figure { name: name.to_owned(), unit, values, mark });
            }
        };
        let tunnel = Mark::AtLeast(0.8);
        let added = Mark::AtMost(30.0);
        for (name, kind, bare) in
            [("relay", Kind::Relay, Kind::BareRelay), ("quic", Kind::Quic, Kind::BareQuic)]
        {
            figure(
                &format!("tunnel/bare {name} down"),
                "",
                self.both(kind, bare, |a, b| a.down / b.down),
                tunnel,
            );
            figure(&format!("tunnel/bare {name} up"), "", self.both(kind, bare, |a, b| a.up / b.up), tunnel);
            figure(&format!("added p50 {name}"), "us", self.both(kind, bare, |a, b| a.p50 - b.p50), added);
            let raw = |part: fn(&Measured) -> f64| self.both(bare, Kind::Raw, |a, b| part(a) / part(b));
            figure(&format!("bare/raw {name} down"), "", raw(|m| m.down), Mark::None);
            figure(&format!("bare/raw {name} up"), "", raw(|m| m.up), Mark::None);
        }
        figure("relay CPU per GB", "s/GB", self.values(Kind::Relay, |m| m.relay_cpu), Mark::AtMost(0.6));
        let (spliced, copied) = self.forwarded;
        // Without any byte there is no share, and no mark kept.
        let share = spliced as f64 / (spliced + copied) as f64 * 100.0;
        let relayed = self.rounds.get(&Kind::Relay).map(|_| share);
        figure("relay's spliced bytes", "%", Vec::from_iter(relayed), Mark::Above(99.0));
        figures
    }

    fn values(&self, kind: Kind, part: fn(&Measured) -> f64) -> Vec<f64> {
        self.rounds.get(&kind).into_iter().flatten().map(part).collect()
    }

    fn both(&self, one: Kind, other: Kind, combine: impl Fn(&Measured, &Measured) -> f64) -> Vec<f64> {
        let of = |kind| self.rounds.get(&kind).into_iter().flatten();
        of(one).zip(of(other)).map(|(one, other)| combine(one, other)).collect()
    }
}

impl Figure {
    fn to_json(&self) -> serde_json::Value {
        let [least, median, most] = spread(&self.values);
        let mut line = json!({
            "figure": self.name, "median": median, "least": least, "most": most, "rounds": self.values.len(),
        });
        if !self.unit.is_empty() {
            line["unit"] = self.unit.into();
        }
        if let Some(kept) = self.mark.kept(median) {
            line["mark"] = self.mark.text().into();
            line["kept"] = kept.into();
        }
        line
    }
}

impl Mark {
    fn kept(self, value: f64) -> Option<bool> {
        match self {
            Mark::None => None,
            Mark::AtLeast(mark) => Some(value >= mark),
            Mark::AtMost(mark) => Some(value <= mark),
            Mark::Above(mark) => Some(value > mark),
        }
    }

    fn text(self) -> String {
        match self {
            Mark::None => String::new(),
            Mark::AtLeast(mark) => format!(">= {mark}"),
            Mark::AtMost(mark) => format!("<= {mark}"),
            Mark::Above(mark) => format!("> {mark}"),
        }
    }
}

/// Least, median and most.
fn spread(values: &[f64]) -> [f64; 3] {
    let mut values = values.to_vec();
    values.sort_unstable_by(f64::total_cmp);
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    let middle = values.len() / 2;
    let median =
        if values.len() % 2 == 1 { at(middle) } else { (at(middle.wrapping_sub(1)) + at(middle)) / 2.0 };
    [at(0), median, at(values.len().wrapping_sub(1))]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(spread(&[3.0, 1.0, 2.0]), [1.0, 2.0, 3.0]);
        assert_eq!(spread(&[4.0, 1.0]), [1.0, 2.5, 4.0]);
        assert!(spread(&[])[1].is_nan());
    }

    #[test]
    fn ratios_are_of_the_same_round_and_a_missed_mark_is_noticed() {
        let mut report = Report::default();
        for (adit, bare) in [(80.0, 100.0), (70.0, 50.0), (10.0, 100.0)] {
            for kind in Kind::ALL {
                let rate = if matches!(kind, Kind::Relay | Kind::Quic) { adit } else { bare };
                report.add(kind, Measured { down: rate, up: rate, ..Measured::default() });
            }
        }
        report.forwarded((1000, 1));
        let compared = report.compared();
        assert_eq!(spread(&compared[0].values), [0.1, 0.8, 1.4]);
        assert!(report.marks_kept());
        report.forwarded((90, 10));
        assert!(!report.marks_kept());
    }
}
