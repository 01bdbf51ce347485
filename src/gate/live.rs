//! Requests that passed and still run: held against the rules again while they do,
//! and cut where they no longer pass.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use dashmap::DashMap;
use futures_util::task::AtomicWaker;
use hyper::Uri;
use tokio_util::sync::CancellationToken;

use super::Asked;
use super::who::Who;
use crate::model::SocketId;

/// What a running request was let in by.
#[derive(Debug)]
pub(super) struct Entry {
    /// The socket.
    pub(super) socket: SocketId,
    /// The host that it asked for.
    pub(super) host: Box<str>,
    /// Its target.
    pub(super) target: Uri,
    /// From where.
    pub(super) ip: IpAddr,
    /// By what.
    pub(super) who: Who,
    /// Whether there was a gate.
    pub(super) gated: bool,
    is_cut: AtomicBool,
    waker: AtomicWaker,
    /// Made for those that wait at several places.
    token: OnceLock<CancellationToken>,
}

impl Entry {
    fn cut(&self) {
        self.is_cut.store(true, Ordering::SeqCst);
        self.waker.wake();
        if let Some(token) = self.token.get() {
            token.cancel();
        }
    }

    fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::SeqCst)
    }
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
    pub(super) fn hold(self: &Arc<Self>, socket: SocketId, asked: &Asked<'_>, who: Who, gated: bool) -> Held {
        let entry = Arc::new(Entry {
            socket,
            host: asked.host.into(),
            target: asked.target.clone(),
            ip: asked.ip,
            who,
            gated,
            is_cut: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            token: OnceLock::new(),
        });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.entries.insert(id, Arc::clone(&entry));
        Held { id, entry, live: Arc::clone(self) }
    }

    /// Cuts those that `passes` denies; answers how many.
    pub(super) async fn recheck(&self, passes: impl Fn(&Entry) -> bool) -> usize {
        // Not under the map's locks: what is cut removes itself.
        let all: Vec<Arc<Entry>> = self.entries.iter().map(|entry| Arc::clone(&entry)).collect();
        let mut cut = 0;
        for (n, entry) in all.into_iter().enumerate() {
            if n % 256 == 255 {
                tokio::task::yield_now().await;
            }
            if !entry.is_cut() && !passes(&entry) {
                entry.cut();
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
    /// Ready once it no longer passes. One task at a time waits by this.
    pub fn poll_cut(&self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.entry.is_cut() {
            self.entry.waker.register(cx.waker());
            if !self.entry.is_cut() {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Is cancelled when it no longer passes: for those who wait at several places.
    pub fn cut(&self) -> &CancellationToken {
        let token = self.entry.token.get_or_init(CancellationToken::new);
        if self.entry.is_cut() {
            token.cancel();
        }
        token
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.live.entries.remove(&self.id);
    }
}
