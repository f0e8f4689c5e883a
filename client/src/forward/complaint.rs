//! One line on standard error when a target cannot be reached, but not one for each of a thousand tries.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use adit_protocol::Target;

use crate::events::complain;
use crate::tunnel::StreamError;

/// The same complaint is not made more often than this.
const QUIET: Duration = Duration::from_secs(5);

/// What was last complained of about one target.
#[derive(Debug, Default)]
pub(super) struct Complaints(Mutex<Option<Last>>);

#[derive(Debug)]
struct Last {
    target: String,
    error: StreamError,
    at: Instant,
    more: u32,
}

impl Complaints {
    /// Says why a stream to `target` did not come about or broke.
    pub(super) fn say(&self, target: &Target, error: StreamError) {
        if let Some(line) = self.line(target, error, Instant::now()) {
            complain(&line);
        }
    }

    fn line(&self, target: &Target, error: StreamError, now: Instant) -> Option<String> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut more, text) = (0, target.to_string());
        if let Some(last) = guard.as_mut().filter(|last| last.error == error && last.target == text) {
            if now.saturating_duration_since(last.at) < QUIET {
                last.more += 1;
                return None;
            }
            more = last.more;
        }
        let again = if more > 0 { format!(" ({more} times more since)") } else { String::new() };
        let line = format!("{text}: {error}{again}");
        *guard = Some(Last { target: text, error, at: now, more: 0 });
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use adit_protocol::frame::ResetCode;

    #[test]
    fn the_same_again_is_counted_and_not_said() {
        let complaints = Complaints::default();
        let target = "127.0.0.1:3389".parse().expect("a target");
        let start = Instant::now();
        let line =
            |code, ms| complaints.line(&target, StreamError::Reset(code), start + Duration::from_millis(ms));
        let refused = "127.0.0.1:3389: the target refused the connection";
        assert_eq!(line(ResetCode::Refused, 0).as_deref(), Some(refused));
        assert_eq!(line(ResetCode::Refused, 10), None);
        assert_eq!(line(ResetCode::Refused, 4_999), None);
        assert!(line(ResetCode::NotAllowed, 5_000).is_some_and(|line| line.contains("allow list")));
        assert_eq!(line(ResetCode::Refused, 5_001).as_deref(), Some(refused));
        assert_eq!(line(ResetCode::Refused, 5_002), None);
        assert_eq!(line(ResetCode::Refused, 10_001), Some(format!("{refused} (1 times more since)")));
    }
}
