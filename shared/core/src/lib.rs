//! Streamgate's protocol, decisions and ports.
//!
//! Pure: no IO, no clock, no randomness, no environment. Time, secrets and random numbers are arguments, so every decision
//! can be tested by a table, and both services and all stores share the same terms.

pub mod admission;
pub mod allowance;
pub mod apps;
pub mod attempts;
pub mod breaker;
pub mod claim;
pub mod dead_letter;
pub mod duration;
pub mod envelope;
pub mod event_types;
pub mod fields;
pub mod further;
pub mod gate;
pub mod hook;
pub mod id;
pub mod inflate;
pub mod instance;
pub mod path;
pub mod pattern;
pub mod peek;
pub mod peer;
pub mod ports;
pub mod proxy;
pub mod rate;
pub mod reason;
pub mod repeated;
pub mod retry;
pub mod route_record;
pub mod rules;
pub mod signature;
pub mod template;
pub mod timestamp;
pub mod user;
