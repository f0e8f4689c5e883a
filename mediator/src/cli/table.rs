//! Tables and times for people.

use adit_client::events::{print_line, printable};

/// Longest text of one cell, in characters.
const MAX_CELL: usize = 120;

/// Prints rows under a head, in columns.
pub(super) fn table<const N: usize>(head: [&str; N], rows: impl IntoIterator<Item = [String; N]>) {
    let rows: Vec<[String; N]> =
        rows.into_iter().map(|row| row.map(|cell| printable(&cell, MAX_CELL))).collect();
    let mut widths = head.map(|cell| cell.chars().count());
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[&str]| {
        let padded = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        print_line(padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    line(&head);
    for row in &rows {
        line(&row.iter().map(String::as_str).collect::<Vec<_>>());
    }
}

/// How long before `now` that was.
pub(super) fn ago(now: u64, then: u64) -> String {
    span(now.saturating_sub(then))
}

/// How long until then, or since when it is over.
pub(super) fn until(now: u64, then: u64) -> String {
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
