//! # adit
//!
//! THE MAP (grows with the code).

pub mod control;
pub mod dial;
pub mod error;
pub mod feed;
pub mod fields;
pub mod metrics;
pub mod model;
pub mod routes;
pub mod stream;
pub mod visit_log;
