//! Streamgate's gateway: accept, read, admit, enqueue or ask, answer.
//!
//! This crate knows the ports, not the stores. A push is answered 2xx only when its event is durable; a synchronous hook is
//! answered within its deadline, by a worker or by its policy.

mod accept;
mod access_log;
mod acme;
mod activity;
mod answered;
mod budget;
mod certificate;
mod certificate_files;
mod clock;
mod connection;
mod connections;
mod deadline;
mod deduplicated;
mod hand_over;
mod head;
mod hooks;
mod intake;
mod linger;
mod paths;
mod progress;
mod proxy;
mod read;
mod receive;
mod repoll;
mod response;
mod spool;
#[cfg(test)]
mod spool_model;
mod suspects;
mod tls;
mod waiting;
mod waiting_line;
mod watched;

pub use accept::Gateway;
pub use access_log::AccessLog;
pub use deduplicated::Deduplicated;
pub use hooks::{AnswerHook, Hooks};
pub use receive::Intake;
pub use spool::{SpoolPolicy, Spooled};
pub use tls::{Tls, TlsError, doubt as doubt_tls, inspect as inspect_tls, leaf as tls_leaf};
