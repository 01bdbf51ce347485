//! What every engine behind the feed's trait must do, as tests over any engine:
//! write an [`Engine`], name it in `conformance!`, and each promise becomes one
//! test of at most 15 s. Random histories print their seed.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;

use super::*;

/// Changes that an engine under test may keep as history: few, so that
/// compaction is quick to reach.
pub(crate) const HISTORY: usize = 200;
/// Changes that are surely more than any engine under test keeps or buffers.
const BEYOND: usize = 5 * HISTORY;
const BOUND: Duration = Duration::from_secs(15);

/// Makes feeds to test.
pub(crate) trait Engine: Send + Sync {
    /// A new and empty feed with a history of [`HISTORY`] changes.
    fn open(&self) -> BoxFuture<'_, Arc<dyn Feed>>;
    /// The same data after a stop and a start; `None` where data is not kept.
    fn restart(&self, feed: Arc<dyn Feed>) -> BoxFuture<'_, Option<Arc<dyn Feed>>>;
}

/// One test per promise for an engine: `conformance!(MyEngine::new())`.
macro_rules! conformance {
    ($engine:expr) => {
        $crate::feed::conformance::conformance!($engine;
            a_transaction_is_applied_whole_in_one_order,
            guards_hold_or_nothing_is_written,
            of_racing_writers_one_wins,
            pages_and_lists_are_sorted_and_of_one_revision,
            snapshot_and_watch_join_without_gap_or_duplicate,
            a_cursor_resumes_where_it_was,
            a_compacted_cursor_starts_over,
            a_cursor_of_another_epoch_starts_over,
            a_dropped_lease_deletes_its_keys,
            a_key_leaves_its_lease_when_written_without,
            a_slow_subscriber_ends_with_the_right_state,
            only_the_asked_prefixes_are_told,
            random_histories_equal_the_model,
            a_restart_keeps_what_was_acknowledged,
        );
    };
    ($engine:expr; $($name:ident,)*) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            let engine = $engine;
            $crate::feed::conformance::bounded($crate::feed::conformance::$name(&engine)).await;
        }
    )*};
}
pub(crate) use conformance;

pub(crate) async fn bounded(scenario: impl Future<Output = ()>) {
    tokio::time::timeout(BOUND, scenario).await.expect("the scenario must end in time");
}

type Model = BTreeMap<String, (String, u64)>;

fn put(key: &str, value: impl ToString) -> Op {
    Op::Put { key: key.into(), value: value.to_string(), lease: None }
}

fn delete(key: &str) -> Op {
    Op::Delete { key: key.into() }
}

fn txn(ops: Vec<Op>) -> Txn {
    Txn { expect: vec![], ops }
}

fn guarded(key: &str, expect: Expect, ops: Vec<Op>) -> Txn {
    Txn { expect: vec![(key.into(), expect)], ops }
}

fn model_of(entries: Vec<Entry>) -> Model {
    entries.into_iter().map(|e| (e.key, (e.value.as_ref().to_owned(), e.rev))).collect()
}

async fn state(feed: &dyn Feed, prefix: &str) -> Model {
    model_of(feed.list(prefix).await.unwrap().1)
}

/// A subscriber that keeps a model and checks the order of what it hears.
struct Follower {
    subscription: Subscription,
    model: Model,
    at: Option<Cursor>,
    resets: usize,
    batches: usize,
}

impl Follower {
    fn new(feed: &dyn Feed, prefixes: &[&str], from: Option<Cursor>) -> Self {
        let subscription = feed.subscribe(prefixes, from.clone());
        Self { subscription, model: Model::new(), at: from, resets: 0, batches: 0 }
    }

    async fn step(&mut self) -> bool {
        match self.subscription.next().await.expect("a subscription goes on while the feed lives") {
            Event::Reset { at, state } => {
                assert!(state.is_sorted_by(|a, b| a.key < b.key), "a Reset is sorted");
                self.model = model_of(state);
                self.at = Some(at);
                self.resets += 1;
            }
            Event::Batch { at, changes } => {
                let before = self.at.as_ref().expect("a place before the first batch");
                assert!(before.epoch == at.epoch && before.rev < at.rev, "{before:?} then {at:?}");
                assert!(!changes.is_empty());
                for change in changes {
                    match change {
                        Change::Put(e) => {
                            assert_eq!(e.rev, at.rev);
                            self.model.insert(e.key, (e.value.as_ref().to_owned(), e.rev));
                        }
                        Change::Delete { key, rev } => {
                            assert_eq!(rev, at.rev);
                            assert!(self.model.remove(&key).is_some(), "{key} was deleted and not there");
                        }
                    }
                }
                self.at = Some(at);
                self.batches += 1;
            }
            Event::Live { at } => {
                self.at = Some(at);
                return true;
            }
            Event::Stale { .. } => {}
        }
        false
    }

    async fn until_live(&mut self) {
        while !self.step().await {}
    }

    async fn until(&mut self, rev: u64) {
        while self.at.as_ref().is_none_or(|at| at.rev < rev) {
            self.step().await;
        }
    }
}

pub(crate) async fn a_transaction_is_applied_whole_in_one_order(engine: &dyn Engine) {
    let feed = engine.open().await;
    let mut watch = feed.subscribe(&["t/"], None);
    assert!(matches!(watch.next().await, Some(Event::Reset { state, .. }) if state.is_empty()));
    assert!(matches!(watch.next().await, Some(Event::Live { .. })));
    let first = feed.commit(txn(vec![put("t/b", 1), put("t/a", 1)])).await.unwrap();
    let second = feed.commit(txn(vec![put("t/c", 2), delete("t/a"), delete("t/none")])).await.unwrap();
    assert!(first < second);
    let Some(Event::Batch { at, changes }) = watch.next().await else { panic!("the first transaction") };
    assert_eq!(at.rev, first);
    let entry = |key: &str, value: &str, rev| Change::Put(Entry { key: key.into(), value: value.into(), rev });
    assert_eq!(changes, [entry("t/b", "1", first), entry("t/a", "1", first)]);
    let Some(Event::Batch { at, changes }) = watch.next().await else { panic!("the second transaction") };
    assert_eq!(at.rev, second);
    assert_eq!(changes, [entry("t/c", "2", second), Change::Delete { key: "t/a".into(), rev: second }]);
}

pub(crate) async fn guards_hold_or_nothing_is_written(engine: &dyn Engine) {
    let feed = engine.open().await;
    let rev = feed.commit(guarded("a", Expect::Absent, vec![put("a", 1)])).await.unwrap();
    let refused = feed.commit(guarded("a", Expect::Absent, vec![put("b", 1)])).await;
    assert_eq!(refused, Err(WriteError::Conflict { key: "a".into(), rev: Some(rev) }));
    let refused = feed.commit(guarded("b", Expect::Present, vec![put("b", 1)])).await;
    assert_eq!(refused, Err(WriteError::Conflict { key: "b".into(), rev: None }));
    let next = feed.commit(guarded("a", Expect::Rev(rev), vec![put("a", 2)])).await.unwrap();
    let refused = feed.commit(guarded("a", Expect::Rev(rev), vec![put("a", 3), put("b", 1)])).await;
    assert_eq!(refused, Err(WriteError::Conflict { key: "a".into(), rev: Some(next) }));
    feed.commit(guarded("a", Expect::Present, vec![delete("a")])).await.unwrap();
    let refused = feed.commit(guarded("a", Expect::Rev(next), vec![put("a", 4)])).await;
    assert_eq!(refused, Err(WriteError::Conflict { key: "a".into(), rev: None }));
    // Guards are judged before the transaction's own writes.
    feed.commit(guarded("a", Expect::Absent, vec![put("a", 5)])).await.unwrap();
    assert_eq!(state(&*feed, "").await.keys().collect::<Vec<_>>(), ["a"]);
}

pub(crate) async fn of_racing_writers_one_wins(engine: &dyn Engine) {
    let feed = engine.open().await;
    for round in 0..20 {
        let key = format!("race/{round}");
        let racers = (0..8).map(|i| {
            let (feed, key) = (Arc::clone(&feed), key.clone());
            tokio::spawn(async move { feed.commit(guarded(&key, Expect::Absent, vec![put(&key, i)])).await.map(|_| i) })
        });
        let mut winners = Vec::new();
        for racer in racers.collect::<Vec<_>>() {
            match racer.await.unwrap() {
                Ok(i) => winners.push(i.to_string()),
                Err(error) => assert!(matches!(error, WriteError::Conflict { .. }), "{error}"),
            }
        }
        assert_eq!(winners.len(), 1);
        assert_eq!(feed.read(&key).await.unwrap().unwrap().value.as_ref(), winners[0]);
    }
}

pub(crate) async fn pages_and_lists_are_sorted_and_of_one_revision(engine: &dyn Engine) {
    let feed = engine.open().await;
    let mut rev = 0;
    for i in (0..25).rev() {
        rev = feed.commit(txn(vec![put(&format!("p/{i:02}"), i), put(&format!("q/{i:02}"), i)])).await.unwrap();
    }
    let (at, all) = feed.list("p/").await.unwrap();
    assert_eq!(at.rev, rev);
    let keys: Vec<_> = all.iter().map(|e| e.key.clone()).collect();
    assert_eq!(keys, (0..25).map(|i| format!("p/{i:02}")).collect::<Vec<_>>());
    let (mut paged, mut after) = (Vec::new(), String::new());
    loop {
        let (_, page) = feed.page("p/", &after, 10).await.unwrap();
        let Some(last) = page.last() else { break };
        after = last.key.clone();
        paged.extend(page);
    }
    assert_eq!(paged, all);
    assert!(feed.list("none/").await.unwrap().1.is_empty());
    assert_eq!(feed.read("p/").await.unwrap(), None);
}

pub(crate) async fn snapshot_and_watch_join_without_gap_or_duplicate(engine: &dyn Engine) {
    let feed = engine.open().await;
    let writers: Vec<_> = (0..3)
        .map(|w| {
            let feed = Arc::clone(&feed);
            tokio::spawn(async move {
                let mut last = 0;
                for i in 0..60 {
                    let both = vec![put(&format!("s/{w}/{i}"), i), put(&format!("s/{w}/last"), i)];
                    last = feed.commit(txn(both)).await.unwrap();
                }
                last
            })
        })
        .collect();
    // Each subscriber starts at another moment of the writing.
    let mut followers = Vec::new();
    for _ in 0..10 {
        followers.push(Follower::new(&*feed, &["s/"], None));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut last = 0;
    for writer in writers {
        last = last.max(writer.await.unwrap());
    }
    let truth = state(&*feed, "s/").await;
    for mut follower in followers {
        follower.until(last).await;
        assert_eq!(follower.model, truth);
    }
}

pub(crate) async fn a_cursor_resumes_where_it_was(engine: &dyn Engine) {
    let feed = engine.open().await;
    for i in 0..20 {
        feed.commit(txn(vec![put(&format!("r/{i}"), i)])).await.unwrap();
    }
    let mut first = Follower::new(&*feed, &["r/"], None);
    first.until_live().await;
    let (at, model) = (first.at.clone().unwrap(), first.model.clone());
    drop(first);
    feed.commit(txn(vec![delete("r/3")])).await.unwrap();
    let last = feed.commit(txn(vec![put("r/4", "new")])).await.unwrap();
    let mut second = Follower::new(&*feed, &["r/"], Some(at));
    second.model = model;
    second.until(last).await;
    assert_eq!((second.resets, second.batches), (0, 2));
    assert_eq!(second.model, state(&*feed, "r/").await);
    let mut current = Follower::new(&*feed, &["r/"], second.at);
    current.until_live().await;
    assert_eq!((current.resets, current.batches), (0, 0));
}

pub(crate) async fn a_compacted_cursor_starts_over(engine: &dyn Engine) {
    let feed = engine.open().await;
    feed.commit(txn(vec![put("c/gone", 1)])).await.unwrap();
    let (at, _) = feed.list("c/").await.unwrap();
    feed.commit(txn(vec![delete("c/gone")])).await.unwrap();
    write_many(&feed, "c/", BEYOND).await;
    let mut follower = Follower::new(&*feed, &["c/"], Some(at));
    follower.model.insert("c/gone".into(), ("1".into(), 1));
    follower.until_live().await;
    assert!(follower.resets >= 1, "history is gone, so it must be told");
    assert_eq!(follower.model, state(&*feed, "c/").await);
}

pub(crate) async fn a_cursor_of_another_epoch_starts_over(engine: &dyn Engine) {
    let feed = engine.open().await;
    feed.commit(txn(vec![put("e/a", 1)])).await.unwrap();
    let (now, _) = feed.list("e/").await.unwrap();
    let alien = Cursor { epoch: Epoch("another life".into()), rev: now.rev };
    let ahead = Cursor { epoch: now.epoch, rev: now.rev + 10_000 };
    for from in [alien, ahead] {
        let mut follower = Follower::new(&*feed, &["e/"], Some(from));
        follower.until_live().await;
        assert_eq!(follower.resets, 1);
        assert_eq!(follower.model, state(&*feed, "e/").await);
    }
}

pub(crate) async fn a_dropped_lease_deletes_its_keys(engine: &dyn Engine) {
    let feed = engine.open().await;
    let mut follower = Follower::new(&*feed, &["l/"], None);
    follower.until_live().await;
    let lease = feed.lease(Duration::from_secs(2)).await.unwrap();
    let id = lease.id;
    let leased = |key: &str| Op::Put { key: key.into(), value: "1".into(), lease: Some(id) };
    let rev = feed.commit(txn(vec![leased("l/a"), leased("l/b"), put("l/stays", 1)])).await.unwrap();
    follower.until(rev).await;
    // Leased keys are keys: guards, reads and lists see them.
    let refused = feed.commit(guarded("l/a", Expect::Absent, vec![put("l/a", 2)])).await;
    assert_eq!(refused, Err(WriteError::Conflict { key: "l/a".into(), rev: Some(rev) }));
    assert!(feed.read("l/b").await.unwrap().is_some());
    assert_eq!(state(&*feed, "l/").await.len(), 3);
    drop(lease);
    while follower.model.len() > 1 {
        follower.step().await;
    }
    assert_eq!(follower.model, state(&*feed, "l/").await);
    assert_eq!(feed.commit(txn(vec![leased("l/c")])).await, Err(WriteError::LeaseLost));
}

pub(crate) async fn a_key_leaves_its_lease_when_written_without(engine: &dyn Engine) {
    let feed = engine.open().await;
    let mut follower = Follower::new(&*feed, &["l/"], None);
    let (one, two) =
        (feed.lease(Duration::from_secs(2)).await.unwrap(), feed.lease(Duration::from_secs(2)).await.unwrap());
    let leased = |key: &str, id| Op::Put { key: key.into(), value: "1".into(), lease: Some(id) };
    let ops = vec![leased("l/kept", one.id), leased("l/moved", one.id), leased("l/gone", one.id)];
    feed.commit(txn(ops)).await.unwrap();
    let rev = feed.commit(txn(vec![put("l/kept", 2), leased("l/moved", two.id)])).await.unwrap();
    follower.until(rev).await;
    drop(one);
    while follower.model.contains_key("l/gone") {
        follower.step().await;
    }
    assert_eq!(state(&*feed, "l/").await.keys().collect::<Vec<_>>(), ["l/kept", "l/moved"]);
    drop(two);
    while follower.model.contains_key("l/moved") {
        follower.step().await;
    }
    assert_eq!(state(&*feed, "l/").await.keys().collect::<Vec<_>>(), ["l/kept"]);
}

pub(crate) async fn a_slow_subscriber_ends_with_the_right_state(engine: &dyn Engine) {
    let feed = engine.open().await;
    let mut slow = Follower::new(&*feed, &["w/"], None);
    slow.until_live().await;
    // Writes do not wait for it, however long it does not listen.
    write_many(&feed, "w/", BEYOND).await;
    let last = feed.commit(txn(vec![put("w/end", 1)])).await.unwrap();
    slow.until(last).await;
    assert_eq!(slow.model, state(&*feed, "w/").await);
}

pub(crate) async fn only_the_asked_prefixes_are_told(engine: &dyn Engine) {
    let feed = engine.open().await;
    feed.commit(txn(vec![put("a/1", 1), put("b/1", 1), put("c/1", 1)])).await.unwrap();
    let mut follower = Follower::new(&*feed, &["c/", "a/", "a/1"], None);
    follower.until_live().await;
    feed.commit(txn(vec![put("b/2", 1)])).await.unwrap();
    let last = feed.commit(txn(vec![put("a/2", 1), put("b/3", 1), put("ab", 1)])).await.unwrap();
    follower.until(last).await;
    assert_eq!(follower.model.keys().collect::<Vec<_>>(), ["a/1", "a/2", "c/1"]);
    assert_eq!(follower.batches, 1);
}

pub(crate) async fn random_histories_equal_the_model(engine: &dyn Engine) {
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
    println!("seed {seed}");
    let mut random = Random(seed);
    let feed = engine.open().await;
    let mut model = Model::new();
    let mut followers = vec![Follower::new(&*feed, &["h/"], None)];
    // Where nothing was written yet: engines count from 0 or from 1.
    let mut last = feed.list("h/").await.unwrap().0.rev;
    for step in 0..400 {
        let mut ops: BTreeMap<String, Op> = BTreeMap::new();
        for _ in 0..=random.below(4) {
            let key = format!("h/{}", random.below(30));
            let op = if random.below(3) == 0 { delete(&key) } else { put(&key, random.below(1000)) };
            ops.insert(key, op);
        }
        let guard = format!("h/{}", random.below(30));
        let now = model.get(&guard).map(|(_, rev)| *rev);
        let (expect, holds) = match random.below(6) {
            0 => (Some(Expect::Absent), now.is_none()),
            1 => (Some(Expect::Present), now.is_some()),
            2 => (Some(Expect::Rev(now.unwrap_or(1))), now.is_some()),
            3 => (Some(Expect::Rev(u64::MAX / 2)), false),
            _ => (None, true),
        };
        let expect = expect.map(|e| (guard.clone(), e)).into_iter().collect();
        let changes = ops.values().any(|op| match op {
            Op::Put { .. } => true,
            Op::Delete { key } => model.contains_key(key),
        });
        let result = feed.commit(Txn { expect, ops: ops.values().cloned().collect() }).await;
        match result {
            Ok(rev) => {
                assert!(holds, "step {step}: the guard does not hold");
                assert!(if changes { rev > last } else { rev == last }, "step {step}");
                last = rev;
                for op in ops.into_values() {
                    match op {
                        Op::Put { key, value, .. } => drop(model.insert(key, (value, rev))),
                        Op::Delete { key } => drop(model.remove(&key)),
                    }
                }
            }
            Err(error) => {
                assert!(!holds && error == WriteError::Conflict { key: guard, rev: now }, "step {step}: {error}");
            }
        }
        if random.below(40) == 0 {
            followers.push(Follower::new(&*feed, &["h/"], None));
        }
        if random.below(40) == 0 {
            let i = random.below(followers.len() as u64) as usize;
            let gone = followers.swap_remove(i);
            let mut again = Follower::new(&*feed, &["h/"], gone.at);
            again.model = gone.model;
            followers.push(again);
        }
    }
    assert_eq!(state(&*feed, "h/").await, model);
    for mut follower in followers {
        follower.until(last).await;
        assert_eq!(follower.model, model);
    }
}

pub(crate) async fn a_restart_keeps_what_was_acknowledged(engine: &dyn Engine) {
    let feed = engine.open().await;
    write_many(&feed, "k/", 50).await;
    let rev = feed.commit(txn(vec![delete("k/7"), put("k/8", "new")])).await.unwrap();
    let before = state(&*feed, "").await;
    let (at, _) = feed.list("").await.unwrap();
    let Some(feed) = engine.restart(feed).await else { return };
    assert_eq!(state(&*feed, "").await, before);
    let next = feed.commit(txn(vec![put("k/9", "newer")])).await.unwrap();
    assert!(next > rev, "revisions go on");
    let mut resumed = Follower::new(&*feed, &["k/"], Some(at));
    resumed.model = before;
    resumed.until(next).await;
    assert_eq!(resumed.model, state(&*feed, "k/").await);
}

/// Writes `count` changes over a few keys, several in flight.
async fn write_many(feed: &Arc<dyn Feed>, prefix: &str, count: usize) {
    let writers: Vec<_> = (0..4)
        .map(|w| {
            let (feed, prefix) = (Arc::clone(feed), prefix.to_owned());
            tokio::spawn(async move {
                for i in (w..count).step_by(4) {
                    feed.commit(txn(vec![put(&format!("{prefix}{}", i % 40), i)])).await.unwrap();
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
}

/// xorshift64: enough to vary a history, and repeatable from its seed.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}
