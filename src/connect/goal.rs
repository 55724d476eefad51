//! What `connect` is asked to make of an app's settings.

use super::address::BaseUrl;

/// What the app's settings are to say.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) base: BaseUrl,
    pub(super) goal: Goal,
    /// What is worth a thought, whatever the settings are.
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
        /// What Stream is to wait for before-message-send, in milliseconds.
        timeout: u64,
        compress: bool,
    },
    /// Takes out what leads to the gateway. `timeout`: the one that `Connect` would have set.
    Remove { timeout: u64 },
}

/// What becomes of the URL of a synchronous hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HookUrl {
    Set,
    /// Stays as it is.
    Keep,
    /// Goes, if it is ours.
    Clear,
}
