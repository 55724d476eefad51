//! Streamgate's worker: takes deliveries, claims them, runs the handler of the route that matches their type, and settles them.
//!
//! This crate knows the ports, not the stores. A delivery leaves the queue only when its handler succeeded, or when it is in
//! the dead letters with a reason.

mod attempts;
mod delivery;
mod dispatch;
mod exec;
mod forward;
mod handler;
mod hooks;
mod isolation;
mod lanes;
mod observe;
mod pauses;
mod router;
mod run;
mod threads;
mod turn;
mod unmatched;
mod unmatched_log;

pub use delivery::Policy;
pub use exec::Exec;
pub use forward::Forward;
pub use handler::{BoxFuture, Context, Event, Handler, HandlerError};
pub use hooks::{
    Answer, AnsweredBy, BeforeMessageSend, Button, CallPolicy, CallWorker, Command, ForwardHook, Hook, HookHandler,
    Hooks, Reply, Screen, Style, Unreadable,
};
pub use lanes::Limits;
pub use observe::Observe;
pub use router::{Route, Router};
pub use run::{Stores, Worker};
