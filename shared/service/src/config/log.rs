//! `[log]`: which webhooks and attempts are logged.

use super::reader::Section;

/// `[log]`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogConfig {
    /// Webhooks at the gateway. Default `refused`: those that Stream does not repeat.
    pub requests: Lines,
    /// Attempts of the worker. Default `failed`.
    pub deliveries: Lines,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lines {
    None,
    /// `refused` or `failed`: at most ten lines a second, and the rest as a count every minute.
    Failures,
    All,
}

impl LogConfig {
    pub(super) fn read(mut section: Section<'_>) -> LogConfig {
        let mut lines = |key, failures: &'static str| {
            let parsed = section.parsed(key, |text| match text {
                "none" => Ok(Lines::None),
                "all" => Ok(Lines::All),
                text if text == failures => Ok(Lines::Failures),
                other => Err(format!("{other:?} is neither \"{failures}\" nor \"all\" nor \"none\"")),
            });
            parsed.unwrap_or(Lines::Failures)
        };
        let config = LogConfig { requests: lines("requests", "refused"), deliveries: lines("deliveries", "failed") };
        section.finish();
        config
    }
}
