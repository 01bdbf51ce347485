//! # adit
//!
//! THE MAP (grows with the code).

pub mod config;
pub mod dial;
pub mod drain;
pub mod error;
pub mod feed;
pub mod fields;
pub mod limits;
pub mod metrics;
pub mod model;
pub mod node;
pub mod relay;
pub mod routes;
pub mod secret_file;
pub mod stream;
pub mod tls;
pub mod tunnel;
pub mod visit_log;
