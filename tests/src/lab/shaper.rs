//! When a packet leaves a link: the arithmetic of delay, rate, loss, reordering and duplication.

use std::str::FromStr;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// What a line does to packets, in each direction.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Link {
    /// One way.
    pub delay: Duration,
    /// Bits a second, counted over IP packets.
    pub rate: Option<Rate>,
    /// Percent of the packets.
    pub loss: f64,
    /// Percent of the packets that are held back so long that later ones overtake them.
    pub reorder: f64,
    /// Percent of the packets.
    pub duplicate: f64,
    /// The same seed loses, reorders and duplicates the same packets of a sequence.
    pub seed: u64,
}

impl Link {
    /// Whether the kernel can do it alone, without the user-space link.
    pub(super) fn is_only_rate(&self) -> bool {
        *self == Self { rate: self.rate, seed: self.seed, ..Self::default() }
    }
}

/// Bits a second: `100mbit`, `2gbit`, `64kbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate(pub u64);

impl Rate {
    /// `n` million bits a second.
    pub const fn mbit(n: u64) -> Self {
        Self(n * 1_000_000)
    }

    fn time(self, bytes: usize) -> Duration {
        Duration::from_nanos((bytes as u64 * 8).saturating_mul(1_000_000_000) / self.0.max(1))
    }
}

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let unit: u64 = match unit {
            "bit" => 1,
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => return Err(format!("not a rate: {text:?} (for example 100mbit)")),
        };
        let number: u64 =
            number.parse().map_err(|_| format!("not a rate: {text:?} (for example 100mbit)"))?;
        Ok(Self(number.saturating_mul(unit)))
    }
}

/// One direction of a [`Link`].
pub(super) struct Shaper {
    link: Link,
    random: StdRng,
    /// When the last packet accepted will have left the sender.
    busy_until: Option<Instant>,
}

/// What becomes of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// It arrives then, so many times.
    Arrives(Instant, usize),
    /// The line lost it.
    Lost,
    /// The queue before the line was full.
    Overflowed,
}

impl Shaper {
    /// How long a packet waits at most for the line to be free: a deep queue, as home lines have.
    const QUEUE: Duration = Duration::from_millis(100);
    /// How much later a packet that is held back arrives, at least: some packets' time at any rate.
    const HELD_BACK: Duration = Duration::from_millis(5);

    pub(super) fn new(link: Link, direction: u64) -> Self {
        Self { link, random: StdRng::seed_from_u64(link.seed ^ direction), busy_until: None }
    }

    /// The fate of a packet of `bytes` that enters the line at `now`.
    pub(super) fn push(&mut self, now: Instant, bytes: usize) -> Fate {
        if self.happens(self.link.loss) {
            return Fate::Lost;
        }
        let mut leaves = now;
        if let Some(rate) = self.link.rate {
            let starts = self.busy_until.map_or(now, |busy| busy.max(now));
            if starts - now > Self::QUEUE {
                return Fate::Overflowed;
            }
            leaves = starts + rate.time(bytes);
            self.busy_until = Some(leaves);
        }
        let mut arrives = leaves + self.link.delay;
        if self.happens(self.link.reorder) {
            arrives += Self::HELD_BACK.max(self.link.delay / 4);
        }
        Fate::Arrives(arrives, if self.happens(self.link.duplicate) { 2 } else { 1 })
    }

    fn happens(&mut self, percent: f64) -> bool {
        // Always draw: then one setting does not change what another does with the same seed.
        let drawn: f64 = self.random.random_range(0.0..100.0);
        drawn < percent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fates(link: Link, packets: usize, bytes: usize) -> (Instant, Vec<Fate>) {
        let start = Instant::now();
        let mut shaper = Shaper::new(link, 0);
        (start, (0..packets).map(|_| shaper.push(start, bytes)).collect())
    }

    #[test]
    fn delay_is_added_and_nothing_else() {
        let link = Link { delay: Duration::from_millis(20), ..Link::default() };
        let (start, fates) = fates(link, 100, 1500);
        assert!(fates.iter().all(|fate| *fate == Fate::Arrives(start + link.delay, 1)));
    }

    #[test]
    fn rate_spaces_packets_until_the_queue_is_full() {
        let link = Link { rate: Some(Rate::mbit(12)), ..Link::default() };
        let (start, fates) = fates(link, 200, 1500);
        // 1500 bytes at 12 Mbit/s take 1 ms; the queue holds 100 ms.
        assert_eq!(fates[0], Fate::Arrives(start + Duration::from_millis(1), 1));
        assert_eq!(fates[100], Fate::Arrives(start + Duration::from_millis(101), 1));
        assert_eq!(fates[101], Fate::Overflowed);
    }

    #[test]
    fn loss_and_duplicates_come_as_often_as_asked_and_the_same_again() {
        let link = Link { loss: 10.0, duplicate: 5.0, seed: 7, ..Link::default() };
        let (start, all) = fates(link, 10_000, 100);
        let count = |wanted: Fate| all.iter().filter(|fate| **fate == wanted).count();
        assert!((900..1100).contains(&count(Fate::Lost)));
        assert!((350..550).contains(&count(Fate::Arrives(start, 2))));
        let lost = |fates: &[Fate]| fates.iter().map(|fate| *fate == Fate::Lost).collect::<Vec<_>>();
        assert_eq!(lost(&all), lost(&fates(link, 10_000, 100).1));
    }

    #[test]
    fn rates_parse() {
        assert_eq!("100mbit".parse(), Ok(Rate::mbit(100)));
        assert_eq!("2gbit".parse(), Ok(Rate::mbit(2000)));
        assert!("fast".parse::<Rate>().is_err());
        assert!("100".parse::<Rate>().is_err());
    }
}
