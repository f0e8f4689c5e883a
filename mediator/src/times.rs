//! Times for people. All are in seconds.

/// How long before `now` that was.
pub(crate) fn ago(now: u64, then: u64) -> String {
    span(now.saturating_sub(then))
}

/// How long until then, or since when it is over.
pub(crate) fn until(now: u64, then: u64) -> String {
    if then > now { format!("{} left", span(then - now)) } else { format!("ended {} ago", span(now - then)) }
}

fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        assert_eq!(ago(100, 10), "90 s");
        assert_eq!(ago(10, 100), "0 s");
        assert_eq!(until(0, 365 * 86_400), "365 days left");
        assert_eq!(until(7200, 0), "ended 2 h ago");
    }
}
