//! /healthz: 200 while the process runs at all.

use super::{Answering, Page, text};
use hyper::StatusCode;
use hyper::http::request::Parts;

#[derive(Debug)]
pub(super) struct HealthPage;

impl Page for HealthPage {
    fn path(&self) -> &'static str {
        "/healthz"
    }

    fn answer<'a>(&'a self, _request: &'a Parts) -> Answering<'a> {
        Box::pin(std::future::ready(text(StatusCode::OK, "ok\n")))
    }
}
