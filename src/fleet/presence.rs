//! Tells the fleet that this node lives, and which tunnels are logged in here. What
//! changes within a few milliseconds goes together; where the feed is away, the last
//! state of each tunnel waits, and no more.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::record::{Location, NodeRecord};
use super::{Fleet, LEASE, LOCATIONS, NODES, location_key};
use crate::feed::{Lease, Op, Txn, WriteError};
use crate::model::TunnelId;

/// How long logins are gathered before they are told.
const GATHER: Duration = Duration::from_millis(5);
/// Most of one transaction; etcd takes 128.
const TOGETHER: usize = 100;
/// How long to wait before a feed that refused is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the watch may trail a write of ours.
const TRAILS: Duration = Duration::from_secs(10);
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// What the fleet was told.
#[derive(Default)]
struct Said {
    /// The session that serves a tunnel.
    serving: HashMap<TunnelId, u64>,
    /// The revision that told of a login first, and in which life of the data.
    logins: HashMap<(TunnelId, u64), (u64, String)>,
}

/// Runs until `stop`, then takes the node out.
pub(super) async fn run(fleet: &Fleet, stop: CancellationToken) {
    let mut said = Said::default();
    fleet.tunnels.gather_changes();
    let telling = async {
        loop {
            let failed = match register(fleet).await {
                Ok(_lease) => {
                    // All that is here is told once more.
                    said.serving.clear();
                    tell_all(fleet, &mut said).await
                }
                Err(error) => error,
            };
            tracing::warn!(error = %failed, "the fleet does not know this node: it is told in a moment");
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        () = telling => {}
        () = stop.cancelled() => {}
    }
    let goodbye = Txn { expect: Vec::new(), ops: vec![Op::Delete { key: format!("{NODES}{}", fleet.me) }] };
    let _ = tokio::time::timeout(GOODBYE, fleet.feed.commit(goodbye)).await;
}

/// Takes out what an earlier run left, and puts the node in.
async fn register(fleet: &Fleet) -> Result<Lease, WriteError> {
    let lease = fleet.feed.lease(LEASE).await?;
    let told = fleet.feed.list(&format!("{LOCATIONS}{}/", fleet.me)).await;
    let (_, told) = told.map_err(|error| WriteError::Unavailable(error.to_string()))?;
    let is_here = |key: &str| {
        let tunnel = location_key(key).and_then(|(_, tunnel)| tunnel.parse().ok());
        tunnel.is_some_and(|tunnel: TunnelId| fleet.tunnels.serving(&tunnel).is_some())
    };
    let left: Vec<String> = told.into_iter().map(|entry| entry.key).filter(|key| !is_here(key)).collect();
    for chunk in left.chunks(TOGETHER) {
        let ops = chunk.iter().map(|key| Op::Delete { key: key.clone() }).collect();
        fleet.feed.commit(Txn { expect: Vec::new(), ops }).await?;
    }
    let value = serde_json::to_string(&NodeRecord::new(&fleet.boot, false)).unwrap_or_default();
    let put = Op::Put { key: format!("{NODES}{}", fleet.me), value, lease: Some(lease.id) };
    fleet.feed.commit(Txn { expect: Vec::new(), ops: vec![put] }).await?;
    tracing::info!(node = %fleet.me, "the fleet is told that this node lives");
    Ok(lease)
}

/// Tells of all tunnels that are here, and of each that changes, until the feed
/// refuses or the node's key is lost.
async fn tell_all(fleet: &Fleet, said: &mut Said) -> WriteError {
    let mut dirty: HashSet<TunnelId> = fleet.tunnels.live().into_keys().collect();
    let (registered, mut was_known) = (Instant::now(), false);
    loop {
        dirty.extend(fleet.tunnels.take_changes());
        if !dirty.is_empty() {
            if let Err(error) = tell(fleet, &mut dirty, said).await {
                return error;
            }
            continue;
        }
        let told = fleet.table.read().boot(&fleet.me).cloned();
        let known = told.as_ref() == Some(&fleet.boot);
        if was_known && !known && told.is_some() {
            tracing::error!(node = %fleet.me, "another node runs by this name: node.name must be each one's own");
        }
        was_known |= known;
        if !known && (was_known || registered.elapsed() > TRAILS) {
            return WriteError::LeaseLost;
        }
        tokio::select! {
            () = fleet.tunnels.wait_changes() => tokio::time::sleep(GATHER).await,
            () = fleet.lost.notified() => {}
            () = tokio::time::sleep(TRAILS), if !was_known => {}
        }
    }
}

/// Tells of some of these.
async fn tell(fleet: &Fleet, dirty: &mut HashSet<TunnelId>, said: &mut Said) -> Result<(), WriteError> {
    let some: Vec<TunnelId> = dirty.iter().take(TOGETHER).cloned().collect();
    let epoch = fleet.table.read().epoch();
    let (mut ops, mut told) = (Vec::new(), Vec::new());
    for tunnel in &some {
        let key = format!("{LOCATIONS}{}/{tunnel}", fleet.me);
        match fleet.tunnels.serving(tunnel) {
            Some(session) if said.serving.get(tunnel) == Some(&session.id) => {}
            Some(session) => {
                let login = (tunnel.clone(), session.id);
                let (first, of) = said.logins.get(&login).cloned().unwrap_or_default();
                let location = Location { boot: fleet.boot.clone(), login: first, epoch: of, since: session.since };
                ops.push(Op::Put { key, value: location.to_text(), lease: None });
                told.push((login, first == 0));
            }
            None if said.serving.contains_key(tunnel) => ops.push(Op::Delete { key }),
            None => {}
        }
    }
    if !ops.is_empty() {
        let rev = fleet.feed.commit(Txn { expect: Vec::new(), ops }).await?;
        for (login, first) in told {
            said.serving.insert(login.0.clone(), login.1);
            if first {
                said.logins.insert(login, (rev, epoch.clone()));
            }
        }
    }
    for tunnel in some {
        if fleet.tunnels.serving(&tunnel).is_none() {
            said.serving.remove(&tunnel);
        }
        dirty.remove(&tunnel);
    }
    // Of sessions that ended nothing needs to be remembered.
    if said.logins.len() > 2 * said.serving.len() + TOGETHER {
        said.logins.retain(|(_, session), _| fleet.tunnels.has_session(*session));
    }
    Ok(())
}
