//! The table of dead letters: one line each, as wide as the terminal.

use crate::output::{self, visible};
use std::borrow::Cow;
use std::io;
use streamgate_core::dead_letter::DeadLetter;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// Spaces between two columns.
const GAP: usize = 1;
/// Characters of a webhook id, as Stream makes them.
const ID: usize = 36;

/// Widths of the columns. At 80 characters all columns but the id fit, clipped; a wider terminal shows more of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Table {
    number: usize,
    died: usize,
    reason: usize,
    route: usize,
    event_type: usize,
    error: usize,
    /// `None` when the table has no room for it.
    id: Option<usize>,
}

/// Minimum widths: with a number of 19 digits, a line has 80 characters.
const LEAST: Table = Table { number: 6, died: 11, reason: 10, route: 6, event_type: 11, error: 9, id: None };
const ATTEMPTS: usize = 8;

impl Table {
    /// `numbers`: characters of the longest number.
    pub(super) fn new(width: usize, numbers: usize) -> Table {
        let mut table = Table { number: numbers.max(LEAST.number), ..LEAST };
        let mut left = width.saturating_sub(table.width());
        let grow = |column: &mut usize, most: usize, left: &mut usize| {
            let more = most.saturating_sub(*column).min(*left);
            *column += more;
            *left -= more;
        };
        grow(&mut table.error, 24, &mut left);
        grow(&mut table.reason, 17, &mut left);
        // The date is shown with its year, or without.
        if left >= 16 - LEAST.died {
            grow(&mut table.died, 16, &mut left);
        }
        grow(&mut table.event_type, 24, &mut left);
        grow(&mut table.route, 16, &mut left);
        if left > ID {
            left -= ID + GAP;
            table.id = Some(ID);
        }
        grow(&mut table.error, 64, &mut left);
        grow(&mut table.event_type, 128, &mut left);
        table.error += left;
        table
    }

    fn width(&self) -> usize {
        let Table { number, died, reason, route, event_type, error, id } = self;
        number + died + reason + ATTEMPTS + route + event_type + error + 6 * GAP + id.map_or(0, |id| id + GAP)
    }

    pub(super) fn heading(&self) -> io::Result<()> {
        self.line(["NUMBER", "DIED", "REASON", "ATTEMPTS", "ROUTE", "TYPE", "ERROR", "ID"].map(str::to_owned))
    }

    pub(super) fn row(&self, dead_letter: &DeadLetter) -> io::Result<()> {
        let envelope = &dead_letter.envelope;
        let died = jiff::Timestamp::from_millisecond(dead_letter.died_at_ms).unwrap_or_default();
        let died = died.strftime(if self.died < 16 { "%m-%d %H:%M" } else { "%F %H:%M" });
        self.line([
            dead_letter.number.to_string(),
            died.to_string(),
            dead_letter.reason.clone(),
            envelope.attempt.to_string(),
            envelope.route.clone().unwrap_or_else(|| "-".to_owned()),
            envelope.event_type.clone(),
            dead_letter.error.as_deref().map_or_else(|| "-".to_owned(), short),
            envelope.id.clone(),
        ])
    }

    fn line(&self, cells: [String; 8]) -> io::Result<()> {
        let Table { number, died, reason, route, event_type, error, id } = self;
        let widths = [*number, *died, *reason, ATTEMPTS, *route, *event_type, *error, id.unwrap_or_default()];
        let cells = cells.iter().zip(widths).filter(|(_, width)| *width > 0);
        let mut line = String::new();
        for (place, (cell, width)) in cells.enumerate() {
            // The number identifies the dead letter for `show`, so it is never clipped.
            let cell = if place == 0 { visible(cell) } else { clipped(cell, width) };
            let padding = width.saturating_sub(cell.width()) + GAP;
            line.push_str(&format!("{cell}{:padding$}", ""));
        }
        output::line(line.trim_end())
    }
}

/// Drops the prefix that most errors share: it says nothing in a column of errors.
fn short(error: &str) -> String {
    let error = error.strip_prefix("the service ").unwrap_or(error);
    error.strip_prefix("answered ").unwrap_or(error).to_owned()
}

/// The first line, in at most `most` columns of a terminal.
pub(super) fn clipped(text: &str, most: usize) -> Cow<'_, str> {
    let line = text.lines().next().unwrap_or_default();
    let shown = visible(line);
    if shown.width() <= most && line.len() == text.len() {
        return shown;
    }
    let (mut kept, mut columns) = (String::new(), 1);
    for character in shown.chars() {
        columns += character.width().unwrap_or_default();
        if columns > most {
            break;
        }
        kept.push(character);
    }
    Cow::from(kept + "…")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_cell_is_clipped_and_stays_on_its_line() {
        for (text, shown) in [
            ("short", "short"),
            ("sixsix", "sixsix"),
            ("too long", "too l…"),
            ("a\nb", "a…"),
            ("", ""),
            ("你好你好", "你好…"),
            ("\u{1b}[2J", "\\u001…"),
        ] {
            assert_eq!(clipped(text, 6), shown);
        }
    }

    #[test]
    fn the_table_is_as_wide_as_its_terminal() {
        for numbers in [1, 6, 19] {
            for width in 80..400 {
                let table = Table::new(width, numbers);
                assert_eq!(table.width(), width, "{table:?}");
            }
        }
        assert_eq!(Table::new(20, 19).width(), 80, "a narrower one folds its lines");
        assert_eq!((Table::new(80, 19).id, Table::new(200, 19).id), (None, Some(36)));
    }
}
