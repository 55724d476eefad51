//! What every Streamgate process needs: configuration, metrics, logs, the ops endpoints, an HTTP client, and signals.

pub mod config;
pub mod http_client;
pub mod metrics;
pub mod ops;
pub mod pem;
pub mod private;
pub mod secret;
pub mod shutdown;
pub mod telemetry;
