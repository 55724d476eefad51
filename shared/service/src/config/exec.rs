//! `exec = { … }`: a command that is run for each event.

use super::reader::Section;
use std::time::Duration;

/// `exec = { command, timeout }`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecConfig {
    /// The program and its arguments, run without a shell. A relative path is resolved from the working directory.
    pub command: Vec<String>,
    /// Time limit of one run; a shorter `handler_timeout` applies first. Default 10 s.
    pub timeout: Duration,
    /// Whether the configuration sets it explicitly.
    pub(super) timeout_is_given: bool,
}

impl ExecConfig {
    pub(super) fn read(mut section: Section<'_>) -> Option<ExecConfig> {
        let command = section.texts("command").unwrap_or_default();
        let is_command = command.first().is_some_and(|program| !program.is_empty());
        if !is_command || command.iter().any(|part| part.contains('\0')) {
            section.problem("command", "takes a program and its arguments, [\"./handle\", \"--fast\"]");
        }
        let timeout = section.duration("timeout", Duration::from_secs(10));
        let timeout_is_given = section.was_given("timeout");
        section.finish();
        is_command.then_some(ExecConfig { command, timeout, timeout_is_given })
    }
}
