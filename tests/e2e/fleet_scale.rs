//! Many owners and many records in a fleet: how soon a login is known at the other
//! nodes, how soon a node starts, what records cost in memory. Figures are printed; they
//! are of the build under test (`ADIT_TEST_BINARY` names another one).

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use russh::client::{self, Handle};
use russh::keys::{PrivateKeyWithHashAlg, PublicKeyOrCertificate, load_secret_key};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;

use crate::fleet_feed::fleet;
use crate::harness::*;

const MIB: u64 = 1 << 20;
const METRIC: &str = "adit_fleet_location_seconds";

/// An owner in this process, who answers visitors by itself.
struct Owner;

impl client::Handler for Owner {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: russh::Channel<client::Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: client::ChannelOpenHandle,
        _: &mut client::Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        tokio::spawn(async move {
            let (mut stream, mut asked) = (channel.into_stream(), Vec::new());
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(stream.read_u8().await?);
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n").await
        });
        Ok(())
    }
}

/// How owners log in: the least work for this process, which is not what is measured.
struct Owners {
    config: Arc<client::Config>,
    key: PrivateKeyWithHashAlg,
}

impl Owners {
    fn new(key: &Key) -> Arc<Self> {
        use russh::{Preferred, cipher, kex};
        let kex = vec![kex::CURVE25519, kex::EXTENSION_SUPPORT_AS_CLIENT, kex::EXTENSION_OPENSSH_STRICT_KEX_AS_CLIENT];
        let cipher = Cow::Owned(vec![cipher::AES_256_GCM]);
        let preferred = Preferred { kex: kex.into(), cipher, ..Preferred::default() };
        let config = client::Config { preferred, nodelay: true, ..client::Config::default() };
        let key = load_secret_key(&key.path, None).unwrap();
        Arc::new(Self { config: config.into(), key: PrivateKeyWithHashAlg::new(key.into(), None) })
    }

    async fn login(&self, node: SocketAddr, socket: String) -> Handle<Owner> {
        let mut owner = client::connect(Arc::clone(&self.config), node, Owner).await.unwrap();
        assert!(owner.authenticate_publickey("tester", self.key.clone()).await.unwrap().success());
        owner.tcpip_forward(socket, 80).await.unwrap();
        owner
    }
}

/// A socket and its one tunnel, as they are stored.
fn published(n: usize, key: &str) -> [(String, String); 2] {
    let socket = json!({"type": "http", "hostnames": [format!("s{n}.edge.localhost")]});
    let tunnel = json!({"socket": format!("s{n}"), "keys": [key]});
    [(format!("cfg/sock/s{n}"), socket.to_string()), (format!("cfg/tun/t{n}"), tunnel.to_string())]
}

/// What a node that is none tells: that it lives, and that it has a tunnel.
fn lives(node: &str) -> (String, String) {
    (format!("up/node/{node}"), json!({"v": 1, "boot": "0123456789abcdef"}).to_string())
}

fn location(node: &str, n: usize) -> (String, String) {
    let location = json!({"v": 1, "boot": "0123456789abcdef", "login": 0, "epoch": "",
        "since_ms": 1_700_000_000_000_u64, "rtt_us": 20_000});
    (format!("up/loc/{node}/t{n}"), location.to_string())
}

/// The line of a key that nobody has: each owner has one of their own.
fn nobodys_key(n: usize) -> String {
    let mut blob = b"\0\0\0\x0bssh-ed25519\0\0\0\x20".to_vec();
    blob.extend_from_slice(&[7; 24]);
    blob.extend_from_slice(&n.to_be_bytes());
    format!("ssh-ed25519 {}", data_encoding::BASE64.encode(&blob))
}

async fn status(node: &Node) -> Value {
    node.api("GET", "/v1/status", None).await.1
}

/// Until a node's status has these numbers.
async fn counts(node: &Node, limit: Duration, expected: &[(&str, usize)]) {
    let what = format!("{expected:?} in the status");
    eventually_within(limit, &what, async || {
        let status = status(node).await;
        expected.iter().all(|(pointer, n)| status.pointer(pointer) == Some(&json!(n))).then_some(())
    })
    .await;
}

/// How many samples a histogram has up to each bound, over all of these nodes.
#[derive(Default)]
struct Histogram {
    /// By bounds in microseconds.
    up_to: BTreeMap<u64, f64>,
    count: f64,
}

impl Histogram {
    fn add(&mut self, metrics: &str) {
        for line in metrics.lines().filter_map(|line| line.strip_prefix(METRIC)) {
            if let Some(count) = line.strip_prefix("_count ") {
                self.count += count.parse::<f64>().unwrap();
            } else if let Some((bound, count)) = line.strip_prefix("_bucket{le=\"").and_then(|l| l.split_once("\"} ")) {
                let bound: f64 = bound.parse().unwrap();
                *self.up_to.entry((bound * 1e6) as u64).or_default() += count.parse::<f64>().unwrap();
            }
        }
    }

    /// The value that so many of a hundred samples do not exceed, as if those of a bucket
    /// were evenly spread; and the bucket's upper bound.
    fn percentile(&self, percent: f64) -> (Duration, Duration) {
        let wanted = self.count * percent / 100.0;
        let mut below = (0, 0.0);
        for (bound, count) in &self.up_to {
            if *count >= wanted {
                let share = (wanted - below.1) / (count - below.1).max(1.0);
                let value = below.0 as f64 + share * (bound - below.0) as f64;
                return (Duration::from_micros(value as u64), Duration::from_micros(*bound));
            }
            below = (*bound, *count);
        }
        (Duration::MAX, Duration::MAX)
    }
}

/// One after another in 100 logins a second, for 30 s or 3 s.
#[tokio::test(flavor = "multi_thread")]
async fn fleet_logins_are_routable_everywhere_within_a_moment() {
    let logins = usize::try_from(size(3000, 300)).unwrap();
    let etcd = EtcdCluster::start(1).await;
    let nodes = fleet(&etcd, |opts| opts.set("log", "level = \"warn\"").set("ssh", "mode = \"closed\"")).await;
    let (key, owners) = (nodes[0].key.line(), Owners::new(&nodes[0].key));
    etcd.put_all((0..logins).flat_map(|n| published(n, &key))).await;
    for node in &nodes {
        counts(node, DEADLINE, &[("/sockets", logins), ("/tunnels", logins)]).await;
        eventually("all nodes are known", async || {
            (status(node).await.pointer("/fleet/nodes")?.as_array()?.len() == nodes.len()).then_some(())
        })
        .await;
    }
    let before: Vec<Usage> = nodes.iter().map(Node::usage).collect();

    let (mut tick, mut coming) = (tokio::time::interval(Duration::from_millis(10)), JoinSet::new());
    let begun = Instant::now();
    for n in 0..logins {
        tick.tick().await;
        let (owners, addr) = (Arc::clone(&owners), nodes[n % nodes.len()].addr("ssh"));
        coming.spawn(async move {
            let begun = Instant::now();
            let owner = within(DEADLINE, "a login", owners.login(addr, format!("s{n}"))).await;
            (owner, begun.elapsed())
        });
    }
    let (sessions, mut took): (Vec<_>, Vec<_>) = coming.join_all().await.into_iter().unzip();
    let rate = logins as f64 / begun.elapsed().as_secs_f64();

    let mut known = Histogram::default();
    for (i, node) in nodes.iter().enumerate() {
        counts(node, DEADLINE, &[("/fleet/locations", logins)]).await;
        let elsewhere = (0..logins).filter(|n| n % nodes.len() != i).count();
        let count = eventually("all logins elsewhere are counted", async || {
            let count = node.metric(&format!("{METRIC}_count")).await;
            (count >= elsewhere as f64).then_some(count)
        })
        .await;
        assert!(count <= elsewhere as f64, "{count} of {elsewhere}: some were told twice");
        known.add(&node.metrics().await);
    }
    took.sort_unstable();
    let ([p50, p99], seconds) = ([50.0, 99.0].map(|percent| known.percentile(percent)), begun.elapsed().as_secs_f64());
    let cpu = nodes.iter().zip(&before).map(|(node, before)| (node.usage().cpu - before.cpu).as_secs_f64() / seconds);
    eprintln!(
        "{logins} logins at {rate:.0}/s, from the grant until known elsewhere ({} samples): \
         p50 {:?} (bucket to {:?}), p99 {:?} (bucket to {:?}); the login itself: p50 {:?}, p99 {:?}; \
         CPU of the nodes: {:.0?} %",
        known.count,
        p50.0,
        p50.1,
        p99.0,
        p99.1,
        took[logins / 2],
        took[logins * 99 / 100],
        cpu.map(|share| share * 100.0).collect::<Vec<_>>(),
    );
    for (percent, (_, bound)) in [(50, p50), (99, p99)] {
        let limit = Duration::from_secs(if percent == 50 { 1 } else { 10 });
        assert!(bound <= limit, "p{percent} is {bound:?}");
    }
    // Known is reachable: tunnels of each node, by each node.
    for node in &nodes {
        for n in 0..nodes.len() {
            let answer = Browser::at(node).get(&format!("https://s{n}.edge.localhost:8443/")).await;
            assert_eq!(answer.status, 200, "s{n}");
        }
    }
    assert!(sessions.iter().all(|owner| !owner.is_closed()), "an owner's session ended");
}

/// What a start took, and what the node uses then.
struct Started {
    ready: Duration,
    live: Duration,
    known: Duration,
    usage: Usage,
}

async fn start(node: &mut Node, records: usize) -> Started {
    node.kill9();
    let begun = Instant::now();
    node.restart().await;
    let ready = begun.elapsed();
    let (mut live, mut known) = (None, None);
    let (live, known) = eventually_within(Duration::from_secs(120), "all is known", async || {
        let status = status(node).await;
        let elapsed = begun.elapsed();
        if status["stale_ms"].is_null() {
            live.get_or_insert(elapsed);
        }
        if status.pointer("/fleet/locations") == Some(&json!(records)) {
            known.get_or_insert(elapsed);
        }
        live.zip(known)
    })
    .await;
    counts(node, DEADLINE, &[("/sockets", records), ("/tunnels", records)]).await;
    Started { ready, live, known, usage: node.usage() }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_hundred_thousand_sockets_and_locations() {
    const RECORDS: usize = 100_000;
    const OTHERS: [&str; 2] = ["p1", "p2"];
    if !long() {
        return;
    }
    let etcd = EtcdCluster::start(1).await;
    let mut node = Node::with(etcd.node("a", false).set("log", "level = \"warn\"")).await;
    eventually("the node is live", async || status(&node).await["stale_ms"].is_null().then_some(())).await;
    let empty = node.usage();
    node.kill9();

    let begun = Instant::now();
    etcd.put_all((0..RECORDS).flat_map(|n| published(n, &nobodys_key(n)))).await;
    etcd.put_all((0..RECORDS).map(|n| location(OTHERS[n % OTHERS.len()], n))).await;
    etcd.put_all(OTHERS.into_iter().map(lives)).await;
    eprintln!("written in {:?}", begun.elapsed());

    let cache = node.state().join("feed.cache");
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(format!("{}{suffix}", cache.display()));
    }
    for how in ["cold", "with its last state"] {
        let Started { ready, live, known, usage } = start(&mut node, RECORDS).await;
        let more = usage.memory.saturating_sub(empty.memory);
        eprintln!(
            "{RECORDS} sockets, tunnels and locations, {how}: ready {ready:?}, live {live:?}, locations known {known:?}; \
             {} MiB (at most {}; empty {}), {} bytes a record; CPU {:?}",
            usage.memory / MIB,
            usage.peak / MIB,
            empty.memory / MIB,
            more / (3 * RECORDS as u64),
            usage.cpu,
        );
        let status = status(&node).await;
        let told = status.pointer("/fleet/nodes").and_then(Value::as_array).unwrap();
        for other in OTHERS {
            let told = told.iter().find(|told| told["node"] == json!(other)).unwrap();
            assert_eq!(told["tunnels"], json!(RECORDS / OTHERS.len()));
        }
        assert!(ready < Duration::from_secs(60), "{ready:?}");
        eventually_within(Duration::from_secs(60), "the last state is kept", async || {
            let kept = rusqlite::Connection::open(&cache).ok()?;
            let kept: i64 = kept.query_row("SELECT count(*) FROM kv, meta", [], |row| row.get(0)).ok()?;
            (kept >= 2 * RECORDS as i64).then_some(())
        })
        .await;
    }
}

/// Locations told one by one, 500 a second: a fleet of a million tunnels whose sessions
/// last for an hour has about as many events.
#[tokio::test(flavor = "multi_thread")]
async fn fleet_what_an_event_costs_a_node_and_etcd() {
    const EVENTS: usize = 5000;
    if !long() {
        return;
    }
    let etcd = EtcdCluster::start(1).await;
    let node = Node::with(etcd.node("a", false).set("log", "level = \"warn\"")).await;
    etcd.put_all([lives("p1")].into_iter()).await;
    let (mut told, mut cost, mut watchers) = (0, Vec::new(), JoinSet::new());
    for others in [0, 20, 60] {
        for _ in watchers.len()..others {
            let mut client = etcd.client().await;
            let options = etcd_client::WatchOptions::new().with_prefix();
            let mut watch = client.watch(format!("{ROOT}up/"), Some(options)).await.unwrap();
            watchers.spawn(async move { while let Ok(Some(_)) = watch.message().await {} });
        }
        let (kv, mut tick) = (etcd.client().await.kv_client(), tokio::time::interval(Duration::from_millis(2)));
        let before = (node.usage().cpu, etcd.usage(0).cpu);
        let mut puts = JoinSet::new();
        for _ in 0..EVENTS {
            tick.tick().await;
            let ((key, value), mut kv) = (location("p1", told), kv.clone());
            puts.spawn(async move { kv.put(format!("{ROOT}{key}"), value, None).await.unwrap() });
            told += 1;
        }
        puts.join_all().await;
        counts(&node, DEADLINE, &[("/fleet/locations", told)]).await;
        let after = (node.usage().cpu, etcd.usage(0).cpu);
        let each = |before: Duration, after: Duration| (after - before).as_secs_f64() * 1e6 / EVENTS as f64;
        cost.push((others, each(before.1, after.1)));
        eprintln!(
            "an event, with {others} other watchers: {:.0} µs of CPU at the node, {:.0} µs at etcd",
            each(before.0, after.0),
            each(before.1, after.1)
        );
    }
    let ([few, .., many], watchers) = (cost.as_slice(), watchers) else { unreachable!() };
    eprintln!("one more watcher: {:.1} µs at etcd for each event", (many.1 - few.1) / watchers.len() as f64);
}
