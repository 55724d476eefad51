//! One update of an app's settings: what it writes, and what the settings are then.

use super::plan::TIMEOUT_FIELD;
use super::settings::Settings;

/// What one update writes. Stream refuses an update as a whole, so none takes another with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The list of hooks, or the URL in its place.
    Webhooks,
    /// The plain settings.
    Urls,
    /// Back to Stream's default, which it may refuse to set.
    Default,
}

impl Part {
    /// Whether what it is about still is as it was.
    pub(super) fn is_same(self, now: &Settings, before: &Settings) -> bool {
        match self {
            Part::Webhooks => now.webhooks.says_same(&before.webhooks),
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
    /// The settings once it is written.
    pub(super) expected: Settings,
}

impl Update {
    /// Whether what it wrote stands in these settings.
    pub(super) fn is_in(&self, now: &Settings) -> bool {
        match self.part {
            Part::Webhooks => now.webhooks.holds(&self.expected.webhooks),
            Part::Urls | Part::Default => now.plain() == self.expected.plain(),
        }
    }
}
