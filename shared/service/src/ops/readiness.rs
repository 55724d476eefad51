//! /readyz: whether the process would accept work.

use super::{Answering, Page, text};
use crate::shutdown::Shutdown;
use hyper::StatusCode;
use hyper::http::request::Parts;
use std::sync::Arc;

/// Returns whether the process would accept work now, or why not. `Ok(Some(_))` says what is impaired although it
/// would.
pub type Readiness = Arc<dyn Fn() -> Result<Option<String>, String> + Send + Sync>;

/// Joins all impairments into one text.
pub fn all(troubles: impl IntoIterator<Item = Option<String>>) -> Option<String> {
    troubles.into_iter().flatten().reduce(|one, other| format!("{one}; {other}"))
}

/// Ready while `ready` says so and the process does not drain.
pub fn unless_draining(
    shutdown: &Shutdown,
    ready: impl Fn() -> Result<Option<String>, String> + Send + Sync + 'static,
) -> Readiness {
    let draining = shutdown.drain.clone();
    Arc::new(move || if draining.is_cancelled() { Err("draining".to_owned()) } else { ready() })
}

pub(super) struct ReadyPage(pub(super) Readiness);

impl Page for ReadyPage {
    fn path(&self) -> &'static str {
        "/readyz"
    }

    fn answer<'a>(&'a self, _request: &'a Parts) -> Answering<'a> {
        Box::pin(std::future::ready(match (self.0)() {
            Ok(None) => text(StatusCode::OK, "ready\n"),
            Ok(Some(but)) => text(StatusCode::OK, format!("ready, but {but}\n")),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        }))
    }
}
