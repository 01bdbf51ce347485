//! # adit
//!
//! THE MAP (grows with the code).

pub mod dial;
pub mod error;
pub mod feed;
pub mod fields;
#[doc(hidden)]
pub mod fuzzing;
pub mod ingress;
pub mod metrics;
pub mod model;
pub mod relay;
pub mod routes;
pub mod stream;
pub mod visit_log;
