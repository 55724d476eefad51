//! Durations for people to read.

use std::time::Duration;

/// Rounds to about two digits, so that the `Debug` form is what a person would write: `1.2s`, `840ms`, `75s`.
pub fn rounded(duration: Duration) -> Duration {
    let ms = duration.as_millis();
    let step = match ms {
        0..100 => 1,
        100..1_000 => 10,
        1_000..10_000 => 100,
        _ => 1_000,
    };
    let rounded = ((ms + step / 2) / step * step).max(1);
    Duration::from_millis(u64::try_from(rounded).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_durations() {
        let cases = [
            (0, "1ms"),
            (4, "4ms"),
            (200, "200ms"),
            (847, "850ms"),
            (999, "1s"),
            (1_183, "1.2s"),
            (5_000, "5s"),
            (74_700, "75s"),
        ];
        for (ms, expected) in cases {
            let duration = Duration::from_millis(ms) + Duration::from_micros(123);
            assert_eq!(format!("{:?}", rounded(duration)), expected);
        }
    }
}
