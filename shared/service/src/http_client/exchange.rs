//! One request and its whole response, bounded in time and size.

use super::{HttpClient, causes};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Request, Response};
use std::time::Duration;

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The connection failed, or broke off before the response's head.
    #[error("{0}")]
    Failed(String),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
}

/// Sends the request and reads the response. `timeout` covers both; `limit`: the most bytes of the body. A body that
/// breaks off or is longer is a separate error, alongside the status that came before it.
pub async fn exchange(
    client: &HttpClient,
    request: Request<Full<Bytes>>,
    timeout: Duration,
    limit: usize,
) -> Result<Response<Result<Bytes, String>>, ExchangeError> {
    let exchanged = async {
        let response = client.request(request).await.map_err(|error| ExchangeError::Failed(causes(&error)))?;
        let (parts, body) = response.into_parts();
        let body = Limited::new(body, limit).collect().await;
        let body = body.map(|body| body.to_bytes()).map_err(|error| causes(error.as_ref()));
        Ok(Response::from_parts(parts, body))
    };
    tokio::time::timeout(timeout, exchanged).await.unwrap_or(Err(ExchangeError::TimedOut(timeout)))
}
