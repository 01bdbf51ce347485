//! What every feed promises, by a real etcd of Debian's on loopback; and what only
//! this engine can go wrong in.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;

use super::*;
use crate::feed::conformance::{Engine, HISTORY, conformance};
use crate::feed::{Change, Event};

/// An etcd of one member. Ends with the test.
struct Member {
    child: Option<Child>,
    dir: tempfile::TempDir,
    client: u16,
    peer: u16,
}

impl Drop for Member {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Member {
    fn start() -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        // Not the disk that others of this machine keep busy: what it costs is not the question.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut member = Self { child: None, dir, client: free(), peer: free() };
        member.run();
        member
    }

    fn run(&mut self) {
        let (client, peer) = (format!("http://127.0.0.1:{}", self.client), format!("http://127.0.0.1:{}", self.peer));
        let mut command = Command::new("etcd");
        command.env_clear().arg("--data-dir").arg(self.dir.path().join("data"));
        for (flag, value) in [
            ("--name", "test"),
            ("--listen-client-urls", client.as_str()),
            ("--advertise-client-urls", client.as_str()),
            ("--listen-peer-urls", peer.as_str()),
            ("--initial-advertise-peer-urls", peer.as_str()),
            ("--initial-cluster", &format!("test={peer}")),
        ] {
            command.arg(flag).arg(value);
        }
        let log = std::fs::File::create(self.dir.path().join("log")).unwrap();
        command.stdout(Stdio::null()).stderr(log).stdin(Stdio::null());
        self.child = Some(command.spawn().expect("Debian's etcd-server is installed"));
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    async fn feed(&self) -> Arc<Etcd> {
        connected(self.client).await
    }
}

/// Connected to who listens there, once it answers.
async fn connected(port: u16) -> Arc<Etcd> {
    let settings = EtcdSettings {
        endpoints: vec![format!("http://127.0.0.1:{port}")],
        prefix: "/adit/1/".into(),
        ca: None,
        certificate: None,
        key: None,
        control_certificate: None,
        control_key: None,
        deadline: Duration::from_secs(5),
    };
    let feed = Etcd::connect(&settings).await.unwrap();
    let by = Instant::now() + Duration::from_secs(10);
    while let Err(error) = feed.head().await {
        assert!(Instant::now() < by, "{error}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    feed
}

/// Keeps no more history than other engines under test.
struct Compacting(Arc<Etcd>);

impl Feed for Compacting {
    fn subscribe(&self, prefixes: &[&str], from: Option<Cursor>) -> Subscription {
        self.0.subscribe(prefixes, from)
    }
    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<u64, WriteError>> {
        Box::pin(async {
            let rev = self.0.commit(txn).await?;
            if rev % 50 == 0 && rev > HISTORY as u64 {
                let _ = self.0.members[0].client.kv_client().compact(signed(rev) - HISTORY as i64, None).await;
            }
            Ok(rev)
        })
    }
    fn read<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        self.0.read(key)
    }
    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        self.0.list(prefix)
    }
    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        self.0.page(prefix, after, limit)
    }
    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, WriteError>> {
        self.0.lease(ttl)
    }
}

struct Real(Mutex<Member>);

impl Real {
    fn new() -> Self {
        Self(Mutex::new(Member::start()))
    }
}

impl Engine for Real {
    fn open(&self) -> BoxFuture<'_, Arc<dyn Feed>> {
        let port = self.0.lock().client;
        Box::pin(async move { Arc::new(Compacting(connected(port).await)) as Arc<dyn Feed> })
    }

    fn restart(&self, _: Arc<dyn Feed>) -> BoxFuture<'_, Option<Arc<dyn Feed>>> {
        Box::pin(async {
            {
                let mut member = self.0.lock();
                member.stop();
                member.run();
            }
            Some(self.open().await)
        })
    }
}

conformance!(Real::new());

#[test]
fn the_end_of_a_prefix_is_behind_all_that_begin_so() {
    assert_eq!(end_of("/adit/1/"), b"/adit/10");
    assert_eq!(end_of(""), [0]);
    assert_eq!(Prefixes::new(&["live/", "cfg/sock/", "cfg/"]).ends(), ("cfg/", "live/"));
    assert_eq!(Prefixes::new(&["cfg/sock/"]).ends(), ("cfg/sock/", "cfg/sock/"));
}

/// Until something is told that `wanted` knows.
async fn until<T>(watch: &mut Subscription, mut wanted: impl FnMut(Event) -> Option<T>) -> T {
    let told = async {
        loop {
            if let Some(found) = wanted(watch.next().await.expect("it goes on")) {
                return found;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(15), told).await.expect("it is told in time")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_subscriber_resumes_after_the_engine_was_killed() {
    let mut member = Member::start();
    let feed = member.feed().await;
    let put = |key: &str| Txn {
        expect: vec![],
        ops: vec![Op::Put { key: format!("cfg/{key}"), value: "1".into(), lease: None }],
    };
    feed.commit(put("before")).await.unwrap();
    let mut watch = feed.subscribe(&["cfg/"], None);
    until(&mut watch, |event| matches!(event, Event::Live { .. }).then_some(())).await;
    member.stop();
    until(&mut watch, |event| matches!(event, Event::Stale { .. }).then_some(())).await;
    let refused = feed.commit(put("meanwhile")).await.unwrap_err();
    assert!(matches!(refused, WriteError::Unavailable(_) | WriteError::Unknown(_)), "{refused}");
    member.run();
    let other = member.feed().await;
    other.commit(put("after")).await.unwrap();
    // Without a Reset: nothing but what is new comes.
    let changes = until(&mut watch, |event| match event {
        Event::Batch { changes, .. } => Some(changes),
        Event::Reset { .. } => panic!("it knew where it was"),
        _ => None,
    });
    let changes = changes.await;
    assert!(matches!(&changes[..], [Change::Put(entry)] if entry.key == "cfg/after"), "{changes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_that_is_kept_outlives_its_time_and_one_of_the_dead_does_not() {
    let member = Member::start();
    let feed = member.feed().await;
    let lease = feed.lease(Duration::from_secs(2)).await.unwrap();
    let leased = |key: &str, id| Txn {
        expect: vec![],
        ops: vec![Op::Put { key: key.into(), value: "1".into(), lease: Some(id) }],
    };
    feed.commit(leased("live/kept", lease.id)).await.unwrap();
    // Granted, and renewed by nobody: what a process that died leaves.
    let orphan = feed.members[0].client.lease_client().grant(2, None).await.unwrap();
    feed.commit(leased("live/dead", LeaseId(orphan.id().cast_unsigned()))).await.unwrap();
    let mut watch = feed.subscribe(&["live/"], None);
    let gone = until(&mut watch, |event| match event {
        Event::Batch { changes, .. } => Some(changes),
        _ => None,
    })
    .await;
    assert!(matches!(&gone[..], [Change::Delete { key, .. }] if key == "live/dead"), "{gone:?}");
    assert!(feed.read("live/kept").await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_revision_deletes_comes_however_much_it_is() {
    let member = Member::start();
    let feed = member.feed().await;
    let lease = feed.lease(Duration::from_secs(30)).await.unwrap();
    let mut watch = feed.subscribe(&["live/"], None);
    until(&mut watch, |event| matches!(event, Event::Live { .. }).then_some(())).await;
    let long = "x".repeat(400);
    for n in 0..100u32 {
        let key = |i: u32| format!("live/{long}/{:05}", n * 100 + i);
        let put = |i| Op::Put { key: key(i), value: "1".into(), lease: Some(lease.id) };
        feed.commit(Txn { expect: vec![], ops: (0..100).map(put).collect() }).await.unwrap();
    }
    drop(lease);
    // 10,000 keys of 400 bytes: more than the 4 MiB that clients take unless told.
    let gone = until(&mut watch, |event| match event {
        Event::Batch { changes, .. } if matches!(changes[0], Change::Delete { .. }) => Some(changes.len()),
        Event::Stale { why } => panic!("{why}"),
        _ => None,
    });
    assert_eq!(gone.await, 10_000);
}
