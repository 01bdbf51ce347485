//! One subscription: a snapshot, the changes from there on, and both again as often
//! as the connection breaks. What a subscriber has not taken waits at etcd.

use std::sync::atomic::Ordering;
use std::time::Duration;

use etcd_client::{Event as EtcdEvent, EventType, GetOptions, SortOrder, SortTarget, WatchOptions};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Etcd, MESSAGE_MAX, TOO_LARGE, end_of, signed, text, unsigned};
use crate::feed::prefixes::Prefixes;
use crate::feed::{Change, Cursor, Event, ReadError};

/// How often it is asked whether the watch lives.
const ASK: Duration = Duration::from_secs(5);
/// How long it may be silent.
const SILENCE: Duration = Duration::from_secs(15);
/// Shortest and longest wait before it is tried again.
const WAIT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));

/// Why a watch ended.
enum Ended {
    /// Nobody listens any more.
    Unheard,
    /// The history before this is gone: begin with a snapshot.
    Compacted,
    /// It broke.
    Broken(String),
}

impl From<ReadError> for Ended {
    fn from(error: ReadError) -> Self {
        Self::Broken(error.0)
    }
}

impl From<etcd_client::Error> for Ended {
    fn from(error: etcd_client::Error) -> Self {
        Self::Broken(text(&error))
    }
}

pub(super) async fn run(feed: Etcd, prefixes: Prefixes, from: Option<Cursor>, tell: mpsc::Sender<Event>) {
    let mut follower = Follower { feed, prefixes, at: from, tell, tries: 0, stale: false };
    loop {
        let turn = follower.feed.turn.load(Ordering::Relaxed);
        let why = match follower.follow().await {
            Ended::Unheard => return,
            Ended::Compacted => {
                follower.at = None;
                continue;
            }
            Ended::Broken(why) => why,
        };
        follower.feed.failed(turn);
        follower.tries += 1;
        tracing::debug!(why, tries = follower.tries, "a watch broke");
        // The next member is asked at once; then nobody could be, and that is news.
        let members = u32::try_from(follower.feed.members.len()).unwrap_or(u32::MAX);
        let Some(rounds) = follower.tries.checked_sub(members) else { continue };
        if !std::mem::replace(&mut follower.stale, true) && follower.tell.send(Event::Stale { why }).await.is_err() {
            return;
        }
        // Full jitter: a whole fleet comes back at once, and must not.
        let wait = WAIT.0.saturating_mul(1 << rounds.min(16)).min(WAIT.1);
        let wait = wait.mul_f64(f64::from(rand_below(1000)) / 1000.0);
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = follower.tell.closed() => return,
        }
    }
}

pub(super) fn rand_below(n: u32) -> u32 {
    let mut bytes = [0; 4];
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u32::from_le_bytes(bytes) % n
}

struct Follower {
    feed: Etcd,
    prefixes: Prefixes,
    at: Option<Cursor>,
    tell: mpsc::Sender<Event>,
    /// How often it broke since it was live.
    tries: u32,
    /// Whether that was told.
    stale: bool,
}

impl Follower {
    async fn send(&self, event: Event) -> Result<(), Ended> {
        self.tell.send(event).await.map_err(|_| Ended::Unheard)
    }

    /// Follows until something ends it.
    async fn follow(&mut self) -> Ended {
        match self.try_follow().await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn try_follow(&mut self) -> Result<std::convert::Infallible, Ended> {
        let head = self.feed.head().await?;
        let known = self.at.clone().filter(|at| at.epoch == head.epoch && at.rev <= head.rev);
        // What there is to catch up with, as far as it is still there.
        let (at, newest) = match known {
            Some(at) => {
                let newest = self.newest_since(&at).await?;
                (at, newest)
            }
            None => {
                let (at, state) = self.feed.snapshot(&self.prefixes).await?;
                self.send(Event::Reset { at: at.clone(), state }).await?;
                (at, 0)
            }
        };
        self.at = Some(at.clone());
        // One watch, because only one tells revisions in their order. What else lies
        // between is sent in vain.
        let (first, last) = self.prefixes.ends();
        let options = WatchOptions::new()
            .with_range(end_of(&self.feed.full(last)))
            .with_start_revision(signed(at.rev) + 1)
            // Now and then where nothing changes here, so that the place stays in the history.
            .with_progress_notify();
        let key = self.feed.full(first);
        let (_, member) = self.feed.member().map_err(Ended::Broken)?;
        let mut client = member.client.watch_client().max_decoding_message_size(MESSAGE_MAX);
        let begun = tokio::time::timeout(self.feed.deadline, client.watch(key, Some(options))).await;
        let mut watch = begun.map_err(|_| Ended::Broken("no watch within the deadline".into()))??;
        let (mut heard, mut ask, mut live) = (Instant::now(), tokio::time::interval(ASK), false);
        ask.reset();
        ask.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let response = tokio::select! {
                response = watch.message() => match response {
                    Ok(Some(response)) => response,
                    Ok(None) => return Err(Ended::Broken("the watch ended".into())),
                    // It would be as large again: the whole state comes in pages.
                    Err(error) if text(&error).contains(TOO_LARGE) => return Err(Ended::Compacted),
                    Err(error) => return Err(error.into()),
                },
                _ = ask.tick() => {
                    if heard.elapsed() > SILENCE {
                        return Err(Ended::Broken(format!("silent for {SILENCE:?}")));
                    }
                    watch.request_progress().await?;
                    continue;
                }
                () = self.tell.closed() => return Err(Ended::Unheard),
            };
            if response.canceled() {
                return Err(match response.compact_revision() {
                    0 => Ended::Broken(format!("the watch was cancelled: {}", response.cancel_reason())),
                    _ => Ended::Compacted,
                });
            }
            let told = self.feed.cursor(response.header())?;
            if self.at.as_ref().is_some_and(|at| at.epoch != told.epoch) {
                return Err(Ended::Broken("another life of the data began".into()));
            }
            match response.events() {
                [] if response.created() => {}
                // Told by the watch, in its order. The answer to a question of ours is
                // not (mended in 3.4.25): it says that somebody is there, and no more.
                [] if response.watch_id() >= 0 => self.advance(told.rev),
                [] => {}
                events => self.tell_changes(&told, events).await?,
            }
            heard = Instant::now();
            if !live && self.at.as_ref().is_some_and(|at| at.rev >= newest) {
                (live, self.tries, self.stale) = (true, 0, false);
                let at = self.at.clone().unwrap_or(told);
                self.send(Event::Live { at }).await?;
            }
        }
    }

    /// The newest revision of a key that has changed since: 0 where none has.
    async fn newest_since(&self, at: &Cursor) -> Result<u64, Ended> {
        let mut newest = 0;
        for prefix in self.prefixes.iter() {
            let options = GetOptions::new()
                .with_prefix()
                .with_min_mod_revision(signed(at.rev) + 1)
                .with_sort(SortTarget::Mod, SortOrder::Descend)
                .with_limit(1)
                .with_keys_only();
            let found = self.feed.get(self.feed.full(prefix).into_bytes(), options).await?;
            newest = newest.max(found.kvs().first().map_or(0, |kv| unsigned(kv.mod_revision())));
        }
        Ok(newest)
    }

    fn advance(&mut self, rev: u64) {
        if let Some(at) = &mut self.at {
            at.rev = at.rev.max(rev);
        }
    }

    /// Each revision is one batch, whole: etcd never splits one over two responses.
    async fn tell_changes(&mut self, told: &Cursor, events: &[EtcdEvent]) -> Result<(), Ended> {
        let rev_of = |event: &EtcdEvent| event.kv().map_or(0, |kv| unsigned(kv.mod_revision()));
        for revision in events.chunk_by(|a, b| rev_of(a) == rev_of(b)) {
            let rev = revision.first().map_or(0, rev_of);
            if self.at.as_ref().is_some_and(|at| at.rev >= rev) {
                continue;
            }
            let changes: Vec<Change> =
                revision.iter().filter_map(|event| self.change(event)).filter(|c| self.prefixes.cover(c)).collect();
            let at = Cursor { epoch: told.epoch.clone(), rev };
            self.at = Some(at.clone());
            if !changes.is_empty() {
                self.send(Event::Batch { at, changes }).await?;
            }
        }
        Ok(())
    }

    fn change(&self, event: &EtcdEvent) -> Option<Change> {
        let kv = event.kv()?;
        match event.event_type() {
            EventType::Put => self.feed.entry(kv).map(Change::Put),
            EventType::Delete => {
                let key = kv.key_str().ok()?.strip_prefix(&self.feed.root)?.to_owned();
                Some(Change::Delete { key, rev: unsigned(kv.mod_revision()) })
            }
        }
    }
}
