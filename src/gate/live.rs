//! Requests that passed and still run: held against the rules again while they do,
//! and cut where they no longer pass.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use tokio_util::sync::CancellationToken;

use super::who::Who;
use crate::model::SocketId;

/// What a running request was let in by.
#[derive(Debug)]
pub(super) struct Entry {
    /// The socket.
    pub(super) socket: SocketId,
    /// The host that it asked for.
    pub(super) host: String,
    /// The path.
    pub(super) path: String,
    /// From where.
    pub(super) ip: IpAddr,
    /// By what.
    pub(super) who: Who,
    cut: CancellationToken,
}

/// All that run.
#[derive(Debug, Default)]
pub(super) struct Live {
    next: AtomicU64,
    entries: DashMap<u64, Arc<Entry>>,
}

/// One that runs; counted until it is dropped.
#[derive(Debug)]
pub struct Held {
    id: u64,
    entry: Arc<Entry>,
    live: Arc<Live>,
}

impl Live {
    /// One more.
    pub(super) fn hold(self: &Arc<Self>, socket: SocketId, host: &str, path: &str, ip: IpAddr, who: Who) -> Held {
        let (host, path) = (host.to_owned(), path.to_owned());
        let entry = Arc::new(Entry { socket, host, path, ip, who, cut: CancellationToken::new() });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.entries.insert(id, Arc::clone(&entry));
        Held { id, entry, live: Arc::clone(self) }
    }

    /// Cuts those that `passes` denies; answers how many.
    pub(super) fn recheck(&self, passes: impl Fn(&Entry) -> bool) -> usize {
        // Not under the map's locks: what is cut removes itself.
        let all: Vec<Arc<Entry>> = self.entries.iter().map(|entry| Arc::clone(&entry)).collect();
        let mut cut = 0;
        for entry in all {
            if !entry.cut.is_cancelled() && !passes(&entry) {
                entry.cut.cancel();
                cut += 1;
            }
        }
        cut
    }

    /// Whether none runs.
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

impl Held {
    /// Is cancelled when it no longer passes.
    pub fn cut(&self) -> &CancellationToken {
        &self.entry.cut
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.live.entries.remove(&self.id);
    }
}
