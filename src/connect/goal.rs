//! What `connect` is asked to change in an app's settings.

use super::address::BaseUrl;

/// The requested state of the app's settings.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) base: BaseUrl,
    pub(super) goal: Goal,
    /// Remarks that do not depend on the settings.
    pub(super) remarks: Vec<String>,
    pub(super) may_replace: bool,
    pub(super) is_forced: bool,
}

#[derive(Clone, Debug)]
pub(super) enum Goal {
    /// Points the app at the gateway.
    Connect {
        /// Empty: every event.
        event_types: Vec<String>,
        custom_events: bool,
        before_message_send: HookUrl,
        custom_commands: HookUrl,
        /// Stream's timeout for before-message-send, in milliseconds.
        timeout: u64,
        compress: bool,
    },
    /// Removes what leads to the gateway. `timeout`: the one that `Connect` would have set.
    Remove { timeout: u64 },
}

/// What to do with the URL of a synchronous hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HookUrl {
    Set,
    /// Leaves it as it is.
    Keep,
    /// Clears it, if it leads to this gateway.
    Clear,
}
