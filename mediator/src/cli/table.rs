//! Tables for people.

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
