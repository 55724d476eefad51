//! The answer to a hook, and whose it is.

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
    /// Given before.
    First,
    /// There was no answer, for this reason.
    Policy(Reason),
}

impl Answered {
    /// Why it is the policy's, if it is.
    pub(crate) fn policy(&self) -> Option<Reason> {
        match self.source {
            Source::Worker | Source::First => None,
            Source::Policy(reason) => Some(reason),
        }
    }

    /// The word in metrics and in the answer's header.
    pub(crate) fn word(&self) -> &'static str {
        match self.source {
            Source::Worker => "answered",
            Source::First => "repeated",
            Source::Policy(reason) => reason.as_str(),
        }
    }
}
