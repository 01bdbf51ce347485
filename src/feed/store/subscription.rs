//! One subscription: reads the history at its own pace and hands events over.
//! It holds no queue but the receiver's: one that falls behind the history
//! starts over with a `Reset`, so nothing it does can block or bloat the writer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Shared;
use super::state::Next;
use crate::feed::prefixes::Prefixes;
use crate::feed::{Cursor, Event};

/// Revisions taken from the history at once: short holds of the lock.
const STEP: usize = 128;
/// How often an idle subscriber hears that other keys moved on, so that its
/// cursor stays within the history.
const PROGRESS: Duration = Duration::from_secs(5);

pub(super) async fn pump(shared: Arc<Shared>, prefixes: Prefixes, from: Option<Cursor>, events: mpsc::Sender<Event>) {
    let mut head = shared.head.subscribe();
    let epoch = shared.state.read().epoch.clone();
    let mut at = from.filter(|c| c.epoch == epoch).map(|c| c.rev);
    let mut told_live = None;
    loop {
        head.borrow_and_update();
        // Its own binding: the guard must be gone before anything is awaited.
        let next = shared.state.read().next(at, &prefixes, STEP);
        match next {
            Next::Reset(cursor, raw) => {
                at = Some(cursor.rev);
                told_live = None;
                let state = raw.into_iter().map(Into::into).collect();
                if !send(&shared, &events, Event::Reset { at: cursor, state }).await {
                    return;
                }
            }
            Next::Revisions(revisions) => {
                for revision in revisions {
                    at = Some(revision.rev);
                    let changes: Vec<_> = revision.changes.iter().filter(|c| prefixes.cover(c)).cloned().collect();
                    let cursor = Cursor { epoch: epoch.clone(), rev: revision.rev };
                    if !changes.is_empty() {
                        // A batch tells the place as well as `Live` would.
                        told_live = told_live.map(|_| revision.rev);
                        if !send(&shared, &events, Event::Batch { at: cursor, changes }).await {
                            return;
                        }
                    }
                }
            }
            Next::Current => {
                let rev = at.unwrap_or_default();
                if told_live.is_none() {
                    told_live = Some(rev);
                    if !send(&shared, &events, Event::Live { at: Cursor { epoch: epoch.clone(), rev } }).await {
                        return;
                    }
                }
                tokio::select! {
                    () = events.closed() => return,
                    () = shared.closed.cancelled() => return,
                    moved = head.changed() => if moved.is_err() { return },
                    () = tokio::time::sleep(PROGRESS), if told_live != Some(rev) => told_live = None,
                }
            }
        }
    }
}

/// Whether the event went out.
async fn send(shared: &Shared, events: &mpsc::Sender<Event>, event: Event) -> bool {
    tokio::select! {
        biased;
        sent = events.send(event) => sent.is_ok(),
        () = shared.closed.cancelled() => false,
    }
}
