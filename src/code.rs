//! The handlers of a program that embeds Streamgate.

use streamgate_worker::{Hooks, Route};

/// Handlers in code, in addition to the configuration: routes that are tried before those of the file, and hooks.
#[derive(Clone, Debug, Default)]
pub struct Code {
    pub routes: Vec<Route>,
    pub hooks: Hooks,
}
