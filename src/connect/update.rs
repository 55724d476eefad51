//! One update of an app's settings: what it writes, and the settings expected afterwards.

use super::settings::{Settings, TIMEOUT_FIELD};

/// The part of the settings that one update writes. Stream refuses an update as a whole, so a refused part does not
/// block the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The list of hooks, or the single URL instead.
    Webhooks,
    /// The plain settings.
    Urls,
    /// Resets the timeout to Stream's default, which Stream may refuse.
    Default,
}

impl Part {
    /// Whether this part of the settings is unchanged.
    pub(super) fn is_same(self, now: &Settings, before: &Settings) -> bool {
        match self {
            Part::Webhooks => now.webhooks.is_equivalent(&before.webhooks),
            Part::Urls | Part::Default => now.plain() == before.plain(),
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Webhooks => "the list of hooks",
            Part::Urls => "the URLs of the hooks",
            Part::Default => TIMEOUT_FIELD,
        })
    }
}

#[derive(Clone, Debug)]
pub(super) struct Update {
    pub(super) part: Part,
    pub(super) body: String,
    /// The expected settings after it.
    pub(super) expected: Settings,
}

impl Update {
    /// Whether these settings contain what it wrote.
    pub(super) fn is_in(&self, now: &Settings) -> bool {
        match self.part {
            Part::Webhooks => now.webhooks.holds(&self.expected.webhooks),
            Part::Urls | Part::Default => now.plain() == self.expected.plain(),
        }
    }
}
