//! The sockets' own ports: opened and closed as sockets come and go, each by
//! itself, without touching the others or the visitors who are inside.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Door, Ingress};
use crate::tcp;

/// A port that was taken by somebody else is tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// Which own ports are open, and which could not be.
pub struct Ports {
    open: Mutex<HashMap<u16, CancellationToken>>,
    failed: Mutex<BTreeMap<u16, String>>,
    synced: watch::Sender<u64>,
}

impl Default for Ports {
    fn default() -> Self {
        Self { open: Mutex::default(), failed: Mutex::default(), synced: watch::Sender::new(0) }
    }
}

impl Ports {
    /// The last revision of the route table whose ports are open: from then on
    /// a change acts on every visitor.
    pub fn synced(&self) -> watch::Receiver<u64> {
        self.synced.subscribe()
    }

    /// The ports that are open now.
    pub fn open(&self) -> Vec<u16> {
        let mut ports: Vec<u16> = self.open.lock().keys().copied().collect();
        ports.sort_unstable();
        ports
    }

    /// Why this port could not be opened, if so.
    pub fn trouble(&self, port: u16) -> Option<String> {
        self.failed.lock().get(&port).cloned()
    }

    /// The ports that could not be opened, with the socket and the reason.
    pub fn failed(&self) -> BTreeMap<u16, String> {
        self.failed.lock().clone()
    }

    /// Keeps the open ports equal to those of the route table, until `closed`.
    pub async fn follow(
        self: Arc<Self>,
        ingress: Arc<Ingress>,
        mut changed: watch::Receiver<u64>,
        tasks: TaskTracker,
        closed: CancellationToken,
    ) {
        loop {
            let rev = *changed.borrow_and_update();
            self.sync(&ingress, &tasks, &closed);
            self.synced.send_replace(rev);
            let retry = !self.failed.lock().is_empty();
            tokio::select! {
                () = closed.cancelled() => break,
                more = changed.changed() => if more.is_err() { return },
                () = tokio::time::sleep(RETRY), if retry => {}
            }
        }
        // No port opens any more, and nobody has to wait for one.
        while changed.changed().await.is_ok() {
            let rev = *changed.borrow_and_update();
            self.synced.send_replace(rev);
        }
    }

    fn sync(&self, ingress: &Arc<Ingress>, tasks: &TaskTracker, closed: &CancellationToken) {
        let wanted: HashSet<u16> = ingress.parts.routes.ports().into_iter().collect();
        let mut open = self.open.lock();
        open.retain(|port, close| {
            let stays = wanted.contains(port);
            if !stays {
                close.cancel();
                tracing::info!(port, "port closed");
            }
            stays
        });
        self.failed.lock().retain(|port, _| wanted.contains(port));
        for port in wanted {
            if open.contains_key(&port) {
                continue;
            }
            let close = closed.child_token();
            match open_all(&ingress.settings.raw, port, ingress, tasks, &close) {
                Ok(()) => {
                    open.insert(port, close);
                    self.failed.lock().remove(&port);
                    tracing::info!(port, "port opened");
                }
                Err((addr, error)) => {
                    close.cancel();
                    let socket = ingress.parts.routes.by_port(port).map(|r| r.socket.id.to_string());
                    let why = format!("{addr} of the socket {} cannot be opened: {error}", socket.unwrap_or_default());
                    if self.failed.lock().insert(port, why.clone()).is_none() {
                        metrics::counter!("adit_port_bind_failures_total").increment(1);
                        tracing::error!(port, "{why}");
                    }
                }
            }
        }
    }
}

/// Takes visitors of `port` on every raw address, or on none.
fn open_all(
    addrs: &[IpAddr],
    port: u16,
    ingress: &Arc<Ingress>,
    tasks: &TaskTracker,
    close: &CancellationToken,
) -> Result<(), (SocketAddr, io::Error)> {
    let mut listeners = Vec::new();
    for ip in addrs {
        let addr = SocketAddr::new(*ip, port);
        let only_v6 = ip.is_unspecified() && addrs.iter().any(IpAddr::is_ipv4);
        match tcp::bind(addr, only_v6, &ingress.parts.tcp) {
            Ok(listener) => listeners.push((addr, listener)),
            // A machine without IPv6 still serves the other family.
            Err(error) if tcp::lacks_family(&error) && addrs.len() > 1 => {}
            Err(error) => return Err((addr, error)),
        }
    }
    for (addr, listener) in listeners {
        ingress.open(tasks, Door::Raw, listener, close.clone()).map_err(|error| (addr, error))?;
    }
    Ok(())
}
