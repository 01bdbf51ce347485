//! Tells the fleet that this node lives, and which tunnels are logged in here. What
//! changes within a few milliseconds goes together; where the feed is away, the last
//! state of each tunnel waits, and no more.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::record::{Location, NodeRecord};
use super::{Fleet, LEASE, LOCATIONS, NODES, location_key};
use crate::feed::{Expect, Feed, Lease, Op, Txn, WriteError};
use crate::model::TunnelId;
use crate::tunnel::Attachment;

/// How long logins are gathered before they are told.
const GATHER: Duration = Duration::from_millis(5);
/// Most of one transaction; etcd takes 128.
const TOGETHER: usize = 100;
/// How long to wait before a feed that refused is asked again.
const AGAIN: Duration = Duration::from_secs(1);
/// How long the watch may trail a write of ours.
const TRAILS: Duration = Duration::from_secs(10);
/// How often it is seen whether tunnels are as far away as was told.
const LOOK: Duration = Duration::from_secs(5);
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// What the fleet was told.
#[derive(Default)]
struct Said {
    /// Of each tunnel that is here.
    serving: HashMap<TunnelId, Serving>,
    /// The revision that told of a login first, and in which life of the data.
    logins: HashMap<(TunnelId, u64), (u64, String)>,
}

/// What is told of a tunnel that is here.
#[derive(Clone, Copy)]
struct Serving {
    /// The session.
    session: u64,
    /// How far away its client is.
    trip: Option<Duration>,
    /// Checks of its origin fail.
    fails: bool,
}

impl Serving {
    fn now(fleet: &Fleet, attachment: &Attachment) -> Self {
        let session = &attachment.session;
        Self { session: session.id, trip: session.rtt(), fails: fleet.tunnels.fails(&attachment.tunnel) }
    }

    /// Whether that is what the fleet knows.
    fn is_as_told(self, told: Self) -> bool {
        self.session == told.session && self.fails == told.fails && !is_another(told.trip, self.trip)
    }
}

/// Runs until `stop`, then takes the node out.
pub(super) async fn run(fleet: &Fleet, stop: CancellationToken) {
    let mut said = Said::default();
    fleet.tunnels.gather_changes();
    let mut present = None;
    let telling = async {
        loop {
            let failed = match register(fleet, &mut said).await {
                Ok(registered) => {
                    // The former lease ends here, when the key is under this one.
                    let registered: &mut Registered = present.insert(registered);
                    // All that is here is told once more.
                    said.serving.clear();
                    tell_all(fleet, &mut said, registered).await
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
    if let Some(registered) = present {
        let key = node_key(fleet);
        let leaving = leave(&*fleet.feed, &key, &fleet.boot, registered.rev);
        let _ = tokio::time::timeout(GOODBYE, leaving).await;
    }
}

/// Takes out the key of a node that was at `rev` when it was told last. A write that was
/// broken off by the end may have changed it since; what another start of the node wrote
/// stays.
async fn leave(feed: &dyn Feed, key: &str, boot: &str, mut rev: u64) {
    loop {
        let ops = vec![Op::Delete { key: key.to_owned() }];
        let goodbye = Txn { expect: vec![(key.to_owned(), Expect::Rev(rev))], ops };
        let Err(WriteError::Conflict { .. }) = feed.commit(goodbye).await else { return };
        match feed.read(key).await {
            Ok(Some(entry)) if NodeRecord::read(&entry.value).is_some_and(|node| node.boot == boot) => rev = entry.rev,
            _ => return,
        }
    }
}

fn node_key(fleet: &Fleet) -> String {
    format!("{NODES}{}", fleet.me)
}

/// The node's key, as it was put in.
struct Registered {
    lease: Lease,
    rev: u64,
    epoch: String,
    draining: bool,
}

impl Registered {
    /// Writes that count only while the key is as it was put in: what comes late
    /// finds another one.
    fn guarded(&self, fleet: &Fleet, ops: Vec<Op>) -> Txn {
        Txn { expect: vec![(node_key(fleet), Expect::Rev(self.rev))], ops }
    }
}

/// What the node tells of itself.
fn put_node(fleet: &Fleet, lease: &Lease, draining: bool) -> Op {
    let mut node = NodeRecord::new(&fleet.boot).at(fleet.means.settings.place);
    node.draining = draining;
    node.addresses.clone_from(&fleet.addresses);
    node.control = fleet.control;
    Op::Put { key: node_key(fleet), value: node.to_text(), lease: Some(lease.id) }
}

/// Takes out what an earlier run left, and puts the node in.
async fn register(fleet: &Fleet, said: &mut Said) -> Result<Registered, WriteError> {
    let lease = fleet.feed.lease(LEASE).await?;
    let told = fleet.feed.list(&format!("{LOCATIONS}{}/", fleet.me)).await;
    let (at, told) = told.map_err(|error| WriteError::Unavailable(error.to_string()))?;
    let epoch = at.epoch.0.to_string();
    // An order counts in the life of the data that it is of.
    said.logins.retain(|_, (_, of)| *of == epoch);
    let mut left = Vec::new();
    for entry in told {
        let tunnel: Option<TunnelId> = location_key(&entry.key).and_then(|(_, tunnel)| tunnel.parse().ok());
        let Some((tunnel, serving)) = tunnel.and_then(|t| fleet.tunnels.serving(&t).map(|serving| (t, serving))) else {
            left.push(entry.key);
            continue;
        };
        // Written, although the answer to that was lost: it is the login's order.
        let location = Location::read(&entry.value).filter(|told| told.boot == fleet.boot && told.login == 0);
        if location.is_some_and(|told| told.is_since(serving.since)) {
            said.logins.entry((tunnel, serving.session.id)).or_insert((entry.rev, epoch.clone()));
        }
    }
    let draining = fleet.is_draining();
    let put = put_node(fleet, &lease, draining);
    let rev = fleet.feed.commit(Txn { expect: Vec::new(), ops: vec![put] }).await?;
    let registered = Registered { lease, rev, epoch, draining };
    for chunk in left.chunks(TOGETHER) {
        let ops = chunk.iter().map(|key| Op::Delete { key: key.clone() }).collect();
        fleet.feed.commit(registered.guarded(fleet, ops)).await?;
    }
    tracing::info!(node = %fleet.me, "the fleet is told that this node lives");
    Ok(registered)
}

/// Tells of all tunnels that are here, and of each that changes, until the feed
/// refuses or the node's key is lost.
async fn tell_all(fleet: &Fleet, said: &mut Said, registered: &mut Registered) -> WriteError {
    let mut dirty: HashSet<TunnelId> = fleet.tunnels.live().into_keys().collect();
    let (began, mut was_known) = (Instant::now(), false);
    let mut look = tokio::time::interval(LOOK);
    loop {
        dirty.extend(fleet.tunnels.take_changes());
        if fleet.is_draining() && !registered.draining {
            let told = registered.guarded(fleet, vec![put_node(fleet, &registered.lease, true)]);
            match fleet.feed.commit(told).await {
                Ok(rev) => (registered.rev, registered.draining) = (rev, true),
                Err(error) => return error,
            }
        }
        if !dirty.is_empty() {
            if let Err(error) = tell(fleet, &mut dirty, said, registered).await {
                return error;
            }
            continue;
        }
        let (told, epoch) = {
            let table = fleet.table.read();
            (table.boot(&fleet.me).cloned(), table.epoch())
        };
        let same = told.as_ref() == Some(&fleet.boot);
        // A backup may have our key, and not what was told since.
        let known = same && epoch == registered.epoch;
        if was_known && !same && told.is_some() {
            tracing::error!(node = %fleet.me, "another node runs by this name: node.name must be each one's own");
        }
        was_known |= known;
        if !known && (was_known || began.elapsed() > TRAILS) {
            return WriteError::LeaseLost;
        }
        tokio::select! {
            () = fleet.tunnels.wait_changes() => tokio::time::sleep(GATHER).await,
            () = fleet.lost.notified() => {}
            () = tokio::time::sleep(TRAILS), if !was_known => {}
            _ = look.tick() => {
                let moved = said.serving.iter().filter(|(tunnel, told)| {
                    let serving = fleet.tunnels.serving(tunnel);
                    serving.is_some_and(|serving| !Serving::now(fleet, &serving).is_as_told(**told))
                });
                dirty.extend(moved.map(|(tunnel, _)| tunnel.clone()));
            }
        }
    }
}

/// Whether a round trip is another one than was told: the first that is measured, or
/// one that differs by a quarter and 5 ms.
fn is_another(told: Option<Duration>, now: Option<Duration>) -> bool {
    match (told, now) {
        (None, now) => now.is_some(),
        (Some(told), Some(now)) => told.abs_diff(now) > Duration::from_millis(5).max(told.min(now) / 4),
        (Some(_), None) => false,
    }
}

/// Tells of some of these.
async fn tell(
    fleet: &Fleet,
    dirty: &mut HashSet<TunnelId>,
    said: &mut Said,
    registered: &Registered,
) -> Result<(), WriteError> {
    let some: Vec<TunnelId> = dirty.iter().take(TOGETHER).cloned().collect();
    let (mut ops, mut told, mut gone) = (Vec::new(), Vec::new(), Vec::new());
    for tunnel in &some {
        let key = format!("{LOCATIONS}{}/{tunnel}", fleet.me);
        match fleet.tunnels.serving(tunnel) {
            Some(serving) => {
                let now = Serving::now(fleet, &serving);
                if said.serving.get(tunnel).is_some_and(|told| now.is_as_told(*told)) {
                    continue;
                }
                let login = (tunnel.clone(), serving.session.id);
                let (first, of) = said.logins.get(&login).cloned().unwrap_or_default();
                let location = Location {
                    boot: fleet.boot.clone(),
                    login: first,
                    epoch: of,
                    since: serving.since,
                    round_trip: now.trip,
                    fails: now.fails,
                };
                ops.push(Op::Put { key, value: location.to_text(), lease: None });
                told.push((tunnel.clone(), first == 0, now));
            }
            None if said.serving.contains_key(tunnel) => {
                ops.push(Op::Delete { key });
                gone.push(tunnel.clone());
            }
            None => {}
        }
    }
    if !ops.is_empty() {
        let rev = fleet.feed.commit(registered.guarded(fleet, ops)).await?;
        // What was written, whatever has changed since: that is dirty again.
        for tunnel in gone {
            said.serving.remove(&tunnel);
            fleet.told.remove(&tunnel);
        }
        for (tunnel, first, now) in told {
            let session = now.session;
            let order = || (rev, registered.epoch.clone());
            // Who stands by here logged in before who is told of, and is no newer later.
            for standby in fleet.tunnels.sessions_of(&tunnel).into_iter().filter(|one| one.id < session) {
                said.logins.entry((tunnel.clone(), standby.id)).or_insert_with(order);
            }
            if first {
                said.logins.insert((tunnel.clone(), session), order());
            }
            fleet.told.insert(tunnel.clone(), session);
            said.serving.insert(tunnel, now);
        }
    }
    for tunnel in some {
        dirty.remove(&tunnel);
    }
    // Of sessions that ended nothing needs to be remembered.
    if said.logins.len() > 2 * said.serving.len() + TOGETHER {
        said.logins.retain(|(_, session), _| fleet.tunnels.has_session(*session));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feed::store::Store;

    #[tokio::test]
    async fn a_node_that_leaves_is_gone_though_its_last_word_was_not_answered() {
        let store = Store::in_memory(Default::default()).unwrap();
        let put = async |boot: &str| {
            let op = Op::Put { key: "up/node/a".into(), value: NodeRecord::new(boot).to_text(), lease: None };
            store.commit(Txn { expect: Vec::new(), ops: vec![op] }).await.unwrap()
        };
        let told = put("first").await;
        put("first").await;
        leave(&*store, "up/node/a", "first", told).await;
        assert!(store.read("up/node/a").await.unwrap().is_none());

        let told = put("first").await;
        put("second").await;
        leave(&*store, "up/node/a", "first", told).await;
        assert!(store.read("up/node/a").await.unwrap().is_some(), "another start of the node stays");
        // What is gone already is no reason to stay.
        leave(&*store, "up/node/b", "first", 1).await;
    }
}
