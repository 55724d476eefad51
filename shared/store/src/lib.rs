//! Adapters of the ports in `streamgate_core::ports`, one module per kind of store, a feature each.

#[cfg(any(feature = "rabbitmq", feature = "redis"))]
mod backoff;
pub mod memory;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "sqlite")]
pub mod sqlite;
