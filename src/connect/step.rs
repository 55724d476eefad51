//! One line of a plan, for users and scripts.

/// How one line of the plan begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    Add,
    Change,
    Remove,
    Keep,
    Attention,
}

impl Mark {
    pub(super) fn sign(self) -> char {
        match self {
            Mark::Add => '+',
            Mark::Change => '~',
            Mark::Remove => '-',
            Mark::Keep => '=',
            Mark::Attention => '!',
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Mark::Add => "add",
            Mark::Change => "change",
            Mark::Remove => "remove",
            Mark::Keep => "keep",
            Mark::Attention => "attention",
        }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) mark: Mark,
    pub(super) what: String,
}
