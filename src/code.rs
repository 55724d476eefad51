//! The handlers of a program that has its own.

use streamgate_worker::{Hooks, Route};

/// What the code brings, beside the configuration: routes that are tried before those of the file, and hooks.
#[derive(Clone, Debug, Default)]
pub struct Code {
    pub routes: Vec<Route>,
    pub hooks: Hooks,
}
