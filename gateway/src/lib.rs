//! Streamgate's receiving side: accept, read, admit, enqueue, answer.
//!
//! Knows the ports, not the stores. A push is answered 2xx only when its event is durable.

mod accept;
mod activity;
mod budget;
mod connection;
mod connections;
mod intake;
mod receive;
mod response;
mod route;
mod tls;
mod watched;

pub use accept::Gateway;
pub use receive::Intake;
pub use tls::{Tls, TlsError};
