//! STUB
use super::*;
use crate::model::*;
use crate::routes::Routes;
/// x
pub struct Records {
    /// x
    pub routes: Arc<Routes>,
    /// x
    pub rev: tokio::sync::watch::Sender<u64>,
}
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
    pub async fn claim_on_demand(&self, mut s: Socket, t: Tunnel, _l: Option<LeaseId>) -> Result<Claimed, RecordError> {
        if !s.kind.by_name() && s.ports.is_empty() {
            let n = *self.rev.borrow();
            s.ports.push(20000 + n as u16);
        }
        self.routes.put_socket(s);
        self.routes.put_tunnel(t);
        self.rev.send_modify(|r| *r += 1);
        Ok(Claimed { rev: *self.rev.borrow() })
    }
    /// x
    pub async fn lease(&self, _d: Duration) -> Result<Lease, WriteError> {
        Ok(Lease { id: LeaseId(1), revoke: None })
    }
}
