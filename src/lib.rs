//! Streamgate: a webhook gateway for Stream Chat. It verifies a webhook, makes it durable, answers, and hands it to workers.
//!
//! This crate is the command line and the place where the services meet the stores. For handlers written in Rust start at
//! [`Streamgate`].

pub mod app;
pub mod check;
pub mod cli;
pub mod dead;
pub mod dev;
pub mod drain;
pub mod exit;
pub mod gateway;
pub mod greeting;
pub mod limits;
pub mod output;
pub mod reload;
pub mod send;
pub mod up;
pub mod wiring;
pub mod worker;

pub use app::{Error, Streamgate};
pub use serde_json;
pub use streamgate_core::pattern::Pattern;
pub use streamgate_service::{config, metrics::Metrics, shutdown::Shutdown};
pub use streamgate_worker::{
    Answer, AnsweredBy, BeforeMessageSend, BoxFuture, Button, Command, Context, Event, Handler, HandlerError, Hook,
    HookHandler, Hooks, Route, Router, Style, Unreadable,
};
