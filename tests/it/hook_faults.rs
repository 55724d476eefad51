//! Hooks by the real binary: services and rules that answer, and what callers are told when a part is killed or hangs.
