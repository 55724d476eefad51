//! Adapters of the ports in `streamgate_core::ports`: one module and one cargo feature for each kind of store.

#[cfg(any(feature = "rabbitmq", feature = "redis"))]
mod backoff;
pub mod memory;
#[cfg(feature = "rabbitmq")]
pub mod rabbitmq;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "sqlite")]
pub mod sqlite;
