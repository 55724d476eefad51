//! The integration tests, one binary: a file per behaviour, against real processes, sockets and files.

#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test that cannot go on should say where")]
#![expect(unreachable_pub, reason = "one binary, whose modules are its own")]

#[path = "../harness/mod.rs"]
mod harness;

mod access_log;
mod acme;
mod attack;
#[macro_use]
mod behaviour;
mod blame;
mod blocking;
mod cluster;
mod commands;
mod connect;
mod connections;
mod dead;
mod deploy;
mod disk;
mod documents;
mod erasing;
mod faults;
mod forwarding;
mod hook_faults;
mod hook_services;
mod hooks;
mod interop;
mod lanes;
mod ledger;
mod logs;
mod memory;
mod pauses;
mod policies;
mod publisher;
mod redis_store;
mod reload;
mod replay;
mod routes;
mod send;
mod services;
mod spool;
mod status;
mod statuses;
mod topology;
mod transport;
mod unrouted;
