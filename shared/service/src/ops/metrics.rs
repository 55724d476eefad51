//! /metrics: the metrics, for Prometheus.

use super::{Answering, Page, text};
use crate::metrics::Metrics;
use hyper::StatusCode;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;
use std::sync::Arc;

/// Content type of the Prometheus text format.
const FORMAT: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

#[derive(Debug)]
pub(super) struct MetricsPage(pub(super) Arc<Metrics>);

impl Page for MetricsPage {
    fn path(&self) -> &'static str {
        "/metrics"
    }

    fn answer<'a>(&'a self, _request: &'a Parts) -> Answering<'a> {
        Box::pin(std::future::ready(match self.0.render() {
            Ok(rendered) => {
                let mut response = text(StatusCode::OK, rendered);
                response.headers_mut().insert(CONTENT_TYPE, FORMAT);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }))
    }
}
