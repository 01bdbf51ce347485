//! STUB
use super::*;
use crate::model::*;
/// x
pub struct Records;
/// x
#[derive(Debug)]
pub enum RecordError {
    /// x
    Conflict {
        /// x
        field: String,
    },
    /// x
    Other,
}
impl std::fmt::Display for RecordError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("x")
    }
}
/// x
pub struct Claimed {
    /// x
    pub rev: u64,
}
impl Records {
    /// x
    pub async fn claim_on_demand(&self, _s: Socket, _t: Tunnel, _l: Option<LeaseId>) -> Result<Claimed, RecordError> {
        Err(RecordError::Other)
    }
    /// x
    pub async fn lease(&self, _d: Duration) -> Result<Lease, WriteError> {
        Err(WriteError::LeaseLost)
    }
}
