//! Adapters of the ports in `streamgate_core::ports`, one module per kind of store, a feature each.

#[cfg(feature = "sqlite")]
pub mod sqlite;
