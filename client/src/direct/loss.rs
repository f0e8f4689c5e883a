//! Notices a direct path that loses so much that the relay is the better way.

use std::collections::VecDeque;
use std::time::Duration;

use quinn::{Connection, VarInt};
use tokio::time::{MissedTickBehavior, interval};

/// The connection's error code when it is given up for the relay, at either end, is this and the percentage lost.
const LOSSY: u32 = 1000;
/// How the reason for it begins.
const DROPS: &str = "it drops";
/// Of 100 packets. Congestion control that looks for a line's limit loses some, too: at worst about half as many.
const TOO_MUCH: u64 = 20;
/// Looked at so often, over so many looks: loss that comes and goes is no reason.
const LOOK: Duration = Duration::from_millis(500);
const LOOKS: usize = 6;
/// Less says nothing.
const LEAST_PACKETS: u64 = 100;

/// The error code for a path that loses so many of 100 packets.
pub(crate) fn code(percent: u64) -> VarInt {
    VarInt::from_u32(LOSSY + percent.min(100) as u32)
}

/// How many of 100 packets are lost where a connection is closed with this code; `None`: that is not why.
pub(crate) fn lost_percent(code: VarInt) -> Option<u64> {
    code.into_inner().checked_sub(LOSSY.into()).filter(|percent| *percent <= 100)
}

/// The same for people.
pub(crate) fn reason(percent: u64) -> String {
    format!("{DROPS} {percent} % of the packets")
}

/// Whether a carrier's end has that reason. The other end's own words never begin like this.
pub(crate) fn is_reason(why: &str) -> bool {
    why.starts_with(DROPS)
}

/// Returns when the path has lost too much for a while: how much, in percent.
pub(crate) async fn too_much(connection: &Connection) -> u64 {
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut window = Window::default();
    loop {
        looks.tick().await;
        let path = connection.stats().path;
        if let Some(percent) = window.add(path.sent_packets, path.lost_packets) {
            return percent;
        }
    }
}

/// The last looks at what was sent and lost.
#[derive(Default)]
struct Window {
    looks: VecDeque<(u64, u64)>,
}

impl Window {
    /// Takes the numbers of packets so far. The percentage that is lost, if it is too much.
    fn add(&mut self, sent: u64, lost: u64) -> Option<u64> {
        self.looks.push_back((sent, lost));
        if self.looks.len() <= LOOKS {
            return None;
        }
        let (sent_before, lost_before) = self.looks.pop_front()?;
        let (sent, lost) = (sent.saturating_sub(sent_before), lost.saturating_sub(lost_before));
        let percent = lost * 100 / sent.max(1);
        (sent >= LEAST_PACKETS && percent >= TOO_MUCH).then_some(percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Counts up by these numbers of sent and lost packets; when it is too much.
    fn run(looks: impl Iterator<Item = (u64, u64)>) -> Option<(usize, u64)> {
        let (mut window, mut total) = (Window::default(), (0, 0));
        looks.enumerate().find_map(|(at, (sent, lost))| {
            total = (total.0 + sent, total.1 + lost);
            window.add(total.0, total.1).map(|percent| (at, percent))
        })
    }

    #[test]
    fn a_third_is_too_much_and_a_burst_is_not() {
        assert_eq!(run((0..20).map(|_| (100, 30))), Some((6, 30)));
        assert_eq!(lost_percent(code(30)), Some(30));
        assert_eq!([0, 2, 999, 1101].map(|other| lost_percent(VarInt::from_u32(other))), [None; 4]);
        assert!(is_reason(&reason(30)) && !is_reason("closed by peer: it drops 30 % of the packets"));
        assert_eq!(run((0..20).map(|_| (100, 10))), None);
        assert_eq!(run((0..20).map(|_| (3, 1))), None, "too few");
        assert_eq!(run((0..20).map(|at| (100, if at == 10 { 90 } else { 0 }))), None);
        assert_eq!(run((0..30).map(|at| (100, if at < 15 { 0 } else { 40 }))), Some((17, 20)));
    }
}
