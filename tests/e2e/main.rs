//! Real nodes, real clients, real origins: one scenario per file, and the
//! harness that they share. Sizes are for a default run of minutes;
//! `ADIT_LONG=1` takes the full ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(missing_docs, unreachable_pub)]

// What the harness offers is for every scenario, the next one included.
#[allow(dead_code)]
mod harness;

// The same for providers of logins.
#[allow(dead_code)]
mod idp;

mod cli;
mod clients;
mod conformance;
mod far;
mod faults;
#[cfg(feature = "etcd")]
mod fleet_chaos;
#[cfg(feature = "etcd")]
mod fleet_checks;
#[cfg(feature = "etcd")]
mod fleet_feed;
#[cfg(feature = "etcd")]
mod fleet_links;
#[cfg(feature = "etcd")]
mod fleet_mysocket;
#[cfg(feature = "etcd")]
mod fleet_scale;
#[cfg(feature = "etcd")]
mod fleet_visits;
#[cfg(feature = "etcd")]
mod fleet_ways;
mod gate_attacks;
mod gate_browser;
mod gate_certificates;
mod gate_logins;
mod gate_rules;
mod grpc;
mod harness_itself;
mod idp_itself;
mod interop;
mod limits;
mod mysocket;
mod mysocket_clients;
mod mysocket_go;
mod network;
mod operator;
mod owners;
mod proxy_protocol;
mod rekey;
mod review;
mod scale;
mod shortage;
mod soak;
mod stall;
mod takeover;
mod tls_scan;
mod types;
