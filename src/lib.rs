//! Streamgate: a webhook gateway for Stream Chat. It verifies a webhook, makes it durable, answers, and hands it to workers.
//!
//! This crate is the command line and the place where the services meet the stores. For handlers written in Rust start at
//! [`Streamgate`].
//!
//! # Features
//!
//! - `cli` (default): the command line, with `services`. A program with its own handlers needs neither: `default-features =
//!   false`.
//! - `services`: [`Streamgate::worker`], on RabbitMQ and Redis. Without it there is only [`Streamgate::up`], on the embedded
//!   store.

pub mod app;
pub mod backends;
mod background;
#[cfg(feature = "cli")]
pub mod check;
#[cfg(feature = "cli")]
pub mod cli;
mod closing;
mod code;
#[cfg(feature = "cli")]
pub mod connect;
#[cfg(feature = "cli")]
pub mod dead;
pub mod dev;
#[cfg(feature = "cli")]
pub mod drain;
pub mod exit;
#[cfg(feature = "cli")]
pub mod gateway;
#[cfg(feature = "cli")]
pub mod global;
pub mod greeting;
mod heartbeat;
pub mod open_files;
pub mod output;
#[cfg(feature = "cli")]
mod prompt;
mod receiving;
pub mod reload;
#[cfg(feature = "cli")]
pub mod route;
#[cfg(feature = "cli")]
pub mod send;
#[cfg(feature = "cli")]
pub mod status;
pub mod up;
pub mod wiring;
#[cfg(feature = "services")]
pub mod worker;
mod working;

pub use app::{Error, Streamgate};
pub use serde_json;
pub use streamgate_core::pattern::Pattern;
pub use streamgate_service::{config, metrics::Metrics, shutdown::Shutdown};
pub use streamgate_worker::{
    Answer, AnsweredBy, BeforeMessageSend, BoxFuture, Button, Command, Context, Event, Handler, HandlerError, Hook,
    HookHandler, Hooks, Route, Router, Style, Unreadable,
};
