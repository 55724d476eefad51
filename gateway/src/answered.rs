//! The answer to a hook, and where it came from.

use bytes::Bytes;
use streamgate_core::reason::Reason;

/// A hook's answer.
#[derive(Clone, Debug)]
pub struct Answered {
    /// A JSON object.
    pub(crate) body: Bytes,
    pub(crate) source: Source,
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    Worker,
    /// The first answer to the same hook, repeated.
    Repeat,
    /// The policy's: there was no answer, for this reason.
    Policy(Reason),
}

impl Answered {
    /// Why the policy answered, if it did.
    pub(crate) fn policy(&self) -> Option<Reason> {
        match self.source {
            Source::Worker | Source::Repeat => None,
            Source::Policy(reason) => Some(reason),
        }
    }

    /// The label in metrics and in the answer's header.
    pub(crate) fn label(&self) -> &'static str {
        match self.source {
            Source::Worker => "answered",
            Source::Repeat => "repeated",
            Source::Policy(reason) => reason.as_str(),
        }
    }
}
