//! Follows the feed and keeps the route table and the certificates equal to it:
//! their only writer. Each record is checked by itself; a bad one is refused by
//! name and counted, and the last good one keeps serving.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::records::{Record, parse};
use super::{Change, Entry, Event, Feed};
use crate::model::{Certificate, Socket, Tunnel};
use crate::routes::Routes;
use crate::tls::Certificates;

/// What a follower has applied.
#[derive(Clone)]
pub struct Follower {
    applied: watch::Receiver<u64>,
    live: watch::Receiver<bool>,
}

impl Follower {
    /// Starts following.
    pub fn start(
        feed: Arc<dyn Feed>,
        routes: Arc<Routes>,
        certificates: Arc<Certificates>,
        tasks: &TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let (applied_to, applied) = watch::channel(0);
        let (live_to, live) = watch::channel(false);
        tasks.spawn(async move {
            let mut events = feed.subscribe(&["cfg/sock/", "cfg/tun/", "cert/"], None);
            let table = Table { routes, certificates };
            loop {
                let event = tokio::select! {
                    () = stop.cancelled() => return,
                    event = events.next() => event,
                };
                match event {
                    Some(Event::Reset { at, state }) => {
                        table.reset(&state);
                        applied_to.send_replace(at.rev);
                    }
                    Some(Event::Batch { at, changes }) => {
                        changes.iter().for_each(|change| table.apply(change));
                        applied_to.send_replace(at.rev);
                    }
                    Some(Event::Live { .. }) => {
                        live_to.send_replace(true);
                    }
                    Some(Event::Stale { why }) => {
                        live_to.send_replace(false);
                        tracing::warn!(why, "the feed is stale; serving what was seen last");
                    }
                    None => return,
                }
                metrics::gauge!("adit_sockets").set(table.routes.size().0 as f64);
            }
        });
        Self { applied, live }
    }

    /// The last revision that the table shows. Revisions that touch nothing of
    /// the table do not count.
    pub fn applied(&self) -> watch::Receiver<u64> {
        self.applied.clone()
    }

    /// Waits until the whole feed has been applied once.
    ///
    /// # Errors
    /// What to tell the operator.
    pub async fn wait_live(&self, deadline: Duration) -> Result<(), String> {
        let mut live = self.live.clone();
        match tokio::time::timeout(deadline, live.wait_for(|live| *live)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err(format!("the store was not read within {deadline:?}")),
        }
    }
}

struct Table {
    routes: Arc<Routes>,
    certificates: Arc<Certificates>,
}

impl Table {
    /// By diff: what is not in `state` goes, what is comes or changes.
    fn reset(&self, state: &[Entry]) {
        let keys: HashSet<&str> = state.iter().map(|e| e.key.as_str()).collect();
        let gone = |prefix: &str, id: &str| !keys.contains(format!("{prefix}{id}").as_str());
        for id in self.routes.tunnel_ids().iter().filter(|id| gone(Tunnel::PREFIX, id.as_str())) {
            self.routes.remove_tunnel(id);
        }
        for id in self.routes.socket_ids().iter().filter(|id| gone(Socket::PREFIX, id.as_str())) {
            self.routes.remove_socket(id);
        }
        for id in self.certificates.ids().iter().filter(|id| gone(Certificate::PREFIX, id.as_str())) {
            self.certificates.remove(id);
        }
        state.iter().for_each(|entry| self.put(entry));
    }

    fn apply(&self, change: &Change) {
        match change {
            Change::Put(entry) => self.put(entry),
            Change::Delete { key, .. } => self.delete(key),
        }
    }

    fn put(&self, entry: &Entry) {
        let result = if let Some(id) = id_of::<Socket>(&entry.key) {
            parse::<Socket>(&id, entry).map(|socket| self.routes.put_socket(socket)).map_err(|e| e.to_string())
        } else if let Some(id) = id_of::<Tunnel>(&entry.key) {
            parse::<Tunnel>(&id, entry).map(|tunnel| self.routes.put_tunnel(tunnel)).map_err(|e| e.to_string())
        } else if let Some(id) = id_of::<Certificate>(&entry.key) {
            let parsed = parse::<Certificate>(&id, entry).map_err(|e| e.to_string());
            parsed.and_then(|certificate| self.certificates.put(&certificate))
        } else {
            Err("its key names no record".to_owned())
        };
        if let Err(why) = result {
            metrics::counter!("adit_bad_records_total").increment(1);
            tracing::error!(key = entry.key, why, "a bad record is refused; the last good one stays");
        }
    }

    fn delete(&self, key: &str) {
        if let Some(id) = id_of::<Socket>(key) {
            self.routes.remove_socket(&id);
        } else if let Some(id) = id_of::<Tunnel>(key) {
            self.routes.remove_tunnel(&id);
        } else if let Some(id) = id_of::<Certificate>(key) {
            self.certificates.remove(&id);
        }
    }
}

fn id_of<R: Record>(key: &str) -> Option<R::Id> {
    R::id_of(key.strip_prefix(R::PREFIX)?)
}
