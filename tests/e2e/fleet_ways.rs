//! Visitors at one node, tunnels at others: real nodes, a real etcd, real ssh clients.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;

use crate::fleet_feed::{WEB, becomes, fleet, status};
use crate::harness::*;

/// A fleet of three with one socket, `web`, whose tunnels `web-0`, `web-1`... may be
/// served with these nodes' keys.
struct World {
    etcd: EtcdCluster,
    nodes: [Node; 3],
}

impl World {
    async fn new(change: impl Fn(NodeOpts) -> NodeOpts) -> Self {
        let etcd = EtcdCluster::start(1).await;
        let nodes = fleet(&etcd, change).await;
        let [a, b, c] = &nodes;
        a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
        for (i, node) in [a, b, c].into_iter().enumerate() {
            a.put(&format!("tunnels/web-{i}"), json!({"socket": "web", "keys": [node.key.line()]})).await;
        }
        for node in [b, c] {
            becomes(node, 503).await;
        }
        for node in &nodes {
            linked(node, 2).await;
        }
        Self { etcd, nodes }
    }

    async fn in_private() -> Self {
        Self::new(|opts| opts.set("fleet", "private = [\"127.0.0.0/8\"]")).await
    }
}

/// Until a node has links to so many others, and connections that wait ready.
pub async fn linked(node: &Node, others: usize) {
    eventually("the nodes are linked", async || {
        let (_, status) = node.api("GET", "/v1/status", None).await;
        let ready = |one: &&serde_json::Value| one["linked"] == json!(true) && one["ready"].as_u64() >= Some(1);
        (status["fleet"]["nodes"].as_array()?.iter().filter(ready).count() >= others).then_some(())
    })
    .await;
}

/// An origin that answers with its own name.
pub async fn named(name: &'static str) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut seen = Vec::new();
                let mut buffer = [0; 4096];
                while let Ok(n) = tcp.read(&mut buffer).await {
                    seen.extend_from_slice(&buffer[..n]);
                    if n == 0 {
                        return;
                    }
                    while let Some(end) = seen.windows(4).position(|w| w == b"\r\n\r\n") {
                        seen.drain(..end + 4);
                        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{name}", name.len());
                        if tcp.write_all(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    addr
}

/// Who answers a visitor of this node, or the status of who refuses.
pub async fn who(node: &Node) -> String {
    let answer = Browser::at(node).get(&format!("{WEB}/")).await;
    if answer.status == 200 { answer.text() } else { answer.status.to_string() }
}

pub async fn comes_to_be(node: &Node, limit: Duration, name: &str) {
    let what = format!("{name} serves");
    eventually_within(limit, &what, async || (who(node).await == name).then_some(())).await;
}

pub async fn tunnel(at: &Node, key: &Node, origin: SocketAddr) -> Ssh {
    Ssh::with(at, SshOpts::new(&[&format!("web:80:{origin}")]).key(&key.key)).await
}

/// Visitors of one node without a pause, each answer looked at.
pub struct Visitors {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<(Duration, Instant, String)>>,
}

impl Visitors {
    pub fn of(node: &Node) -> Self {
        Self::come(node.addr("http"), None)
    }

    /// Who come only while the node says that it is ready, which they ask five times a
    /// second.
    pub fn while_ready(node: &Node) -> Self {
        Self::come(node.addr("http"), Some(node.addr("control")))
    }

    fn come(addr: SocketAddr, ask: Option<SocketAddr>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let ready = Arc::new(AtomicBool::new(ask.is_none()));
        if let Some(control) = ask {
            let (ready, stop) = (Arc::clone(&ready), Arc::clone(&stop));
            tokio::spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    let asked = async {
                        let mut tcp = TcpStream::connect(control).await.ok()?;
                        let head = "GET /readyz HTTP/1.1\r\n";
                        Some(request(&mut tcp, head, &control.to_string(), b"").await.0 == 200)
                    };
                    let asked = tokio::time::timeout(Duration::from_secs(1), asked).await;
                    ready.store(asked.ok().flatten() == Some(true), Ordering::Relaxed);
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            });
        }
        let task = tokio::spawn(async move {
            let mut all = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                if !ready.load(Ordering::Relaxed) {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                let begun = Instant::now();
                let visit = async {
                    let mut tcp = TcpStream::connect(addr).await.ok()?;
                    let ask = b"GET / HTTP/1.1\r\nhost: web.edge.localhost\r\nconnection: close\r\n\r\n";
                    tcp.write_all(ask).await.ok()?;
                    let mut answer = String::new();
                    tcp.read_to_string(&mut answer).await.ok()?;
                    let (head, body) = answer.split_once("\r\n\r\n")?;
                    Some(if head.starts_with("HTTP/1.1 200") { body.to_owned() } else { head[9..12].to_owned() })
                };
                let answered = tokio::time::timeout(Duration::from_secs(20), visit).await;
                let answered = answered.unwrap_or_else(|_| Some("late".into())).unwrap_or_else(|| "broken".into());
                all.push((begun.elapsed(), begun, answered));
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            all
        });
        Self { stop, task }
    }

    /// All answers: how long each took, when it was asked for, and what it was.
    pub async fn end(self) -> Vec<(Duration, Instant, String)> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_visitor_of_any_node_reaches_the_tunnel_as_if_it_were_there() {
    let World { etcd: _etcd, nodes: [a, b, c] } = World::new(|opts| opts).await;
    let origin = Origin::http().await;
    let opts = SshOpts::new(&[&format!("web:80:{}", origin.target())]).pty();
    let owner = Ssh::with(&b, opts).await;
    for node in [&a, &b, &c] {
        becomes(node, 200).await;
        let mut sender = h2(node, "web.edge.localhost").await;
        get_exact(&mut sender, &format!("{WEB}/bytes/3000000"), 3_000_000).await;
        let page = Browser::at(node).get(&format!("{WEB}/headers")).await.text();
        assert!(page.contains("x-forwarded-for: 127.0.0.1") && page.contains("x-forwarded-proto: https"), "{page}");
        let url = format!("http://web.edge.localhost:{}/sink", node.addr("http").port());
        let body = "0123456789".repeat(8_000);
        let (status, _) = curl(node, &["-d", &body, &url]).await;
        assert_eq!(status, 200);
    }
    // The owner sees visits wherever they come in, with the nodes and the time of each leg.
    owner.program.wait_for(" at b by a between ", 3, DEADLINE).await;
    owner.program.wait_for(" at b by c between ", 3, DEADLINE).await;
    let line = owner.program.output().lines().find(|line| line.contains("at b by a")).unwrap().to_owned();
    assert!(line.contains("ms tunnel ") && line.contains(" total "), "{line}");
    assert!(!owner.program.output().contains("at b by b"));
    // Connections were ready, and no handshake was waited for.
    assert!(a.metric("adit_fleet_opens_total{connection=\"kept\"}").await >= 1.0);
    drop(owner);
    for node in [&a, &b, &c] {
        becomes(node, 503).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_raw_bytes_and_their_ends_cross_between_nodes() {
    for private in [false, true] {
        let etcd = EtcdCluster::start(1).await;
        let change = |opts: NodeOpts| if private { opts.set("fleet", "private = [\"127.0.0.0/8\"]") } else { opts };
        let [a, b, _c] = fleet(&etcd, change).await;
        a.put("sockets/db", json!({"type": "tcp"})).await;
        a.put("tunnels/db", json!({"socket": "db", "keys": [b.key.line()]})).await;
        let port = a.port_of("db").await;
        linked(&a, 2).await;
        let mut origin = Origin::raw().await;
        eventually("the socket is known", async || (b.api("GET", "/v1/tunnels/db", None).await.0 == 200).then_some(()))
            .await;
        let _owner = Ssh::start(&b, &[&format!("tcp/db:{}", origin.target())]).await;
        let visit = async || eventually("the port is open", async || TcpStream::connect((a.ip, port)).await.ok()).await;
        eventually("the tunnel is known", async || {
            let mut tcp = visit().await;
            tcp.write_all(b"DOWN 5\n").await.ok()?;
            let mut got = Vec::new();
            tcp.read_to_end(&mut got).await.ok().filter(|n| *n == 5)
        })
        .await;
        // 64 MiB each way, exact to the byte, and a clean end.
        let mut tcp = visit().await;
        tcp.write_all(b"DOWN 67108864\n").await.unwrap();
        tcp.shutdown().await.unwrap();
        assert_eq!(Pattern::read(None, &mut tcp).await.unwrap(), 67_108_864);
        let mut tcp = visit().await;
        tcp.write_all(b"UP 67108864\n").await.unwrap();
        Pattern::write(67_108_864, &mut tcp).await.unwrap();
        let mut verdict = String::new();
        tcp.read_to_string(&mut verdict).await.unwrap();
        assert_eq!(verdict, "exact 67108864\n");
        drop(tcp);
        // The visitor's end is the origin's end, and it answers after that.
        let mut tcp = visit().await;
        tcp.write_all(b"EOF\n").await.unwrap();
        Pattern::write(1000, &mut tcp).await.unwrap();
        tcp.shutdown().await.unwrap();
        let mut verdict = String::new();
        tcp.read_to_string(&mut verdict).await.unwrap();
        assert_eq!(verdict, "exact 1000\n");
        // The origin ends first, and takes on.
        let mut tcp = visit().await;
        tcp.write_all(b"CLOSE 50\n").await.unwrap();
        let mut said = Vec::new();
        tcp.read_to_end(&mut said).await.unwrap();
        assert_eq!(said, b"bye\n");
        Pattern::write(300_000, &mut tcp).await.unwrap();
        tcp.shutdown().await.unwrap();
        assert_eq!(within(DEADLINE, "the origin's verdict", origin.reports.recv()).await.unwrap(), "exact 300000\n");
        // Between two bare TCP connections the kernel moves them.
        let spliced = async |node: &Node| node.metric("adit_relay_spliced_bytes_total").await;
        if private {
            eventually("both are counted", async || (spliced(&a).await > 120_000_000.0).then_some(())).await;
        } else {
            assert!(spliced(&a).await < 1.0);
        }
        assert!(spliced(&b).await < 1.0, "SSH is no bare TCP");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_the_latest_login_serves_everywhere_and_the_standby_when_its_node_is_killed() {
    let World { etcd: _etcd, nodes: [a, b, mut c] } = World::in_private().await;
    let (old, new) = (named("old").await, named("new").await);
    // Both hold tunnel web-0.
    let _old = tunnel(&b, &a, old).await;
    comes_to_be(&a, DEADLINE, "old").await;
    let _new = tunnel(&c, &a, new).await;
    for node in [&a, &b, &c] {
        comes_to_be(node, DEADLINE, "new").await;
    }
    // Nobody evicts anybody, and nobody goes back and forth.
    let visitors = [Visitors::of(&a), Visitors::of(&b)];
    tokio::time::sleep(Duration::from_secs(2)).await;
    c.kill9();
    let killed = Instant::now();
    comes_to_be(&a, Duration::from_secs(3), "old").await;
    comes_to_be(&b, Duration::from_secs(3), "old").await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    for visitors in visitors {
        let all = visitors.end().await;
        let failed: Vec<_> = all.iter().filter(|(_, _, who)| who != "old" && who != "new").collect();
        // One may have been under way.
        assert!(failed.len() <= 1, "{failed:?}");
        assert!(
            all.iter().filter(|(took, at, _)| *at + *took < killed).all(|(_, _, who)| who == "new"),
            "nobody flaps"
        );
        let after = all.iter().filter(|(_, at, _)| *at > killed + Duration::from_millis(100));
        assert!(after.map(|(_, _, who)| who).all(|who| who == "old"));
        let slowest = all.iter().map(|(took, _, _)| *took).max().unwrap();
        assert!(slowest < Duration::from_secs(3), "{slowest:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_node_that_stops_answering_is_left_at_once_and_comes_back() {
    let World { etcd: _etcd, nodes: [a, mut b, c] } = World::new(|opts| opts).await;
    let (one, two) = (named("b").await, named("c").await);
    // The one at b is preferred wherever it is.
    let record = json!({"socket": "web", "keys": [c.key.line()], "priority": 1});
    a.put("tunnels/web-2", record).await;
    let _b = tunnel(&b, &b, one).await;
    let _c = tunnel(&c, &c, two).await;
    comes_to_be(&a, DEADLINE, "b").await;
    let visitors = Visitors::of(&a);
    tokio::time::sleep(Duration::from_millis(300)).await;
    b.program().signal("STOP");
    let stopped = Instant::now();
    comes_to_be(&a, Duration::from_secs(4), "c").await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    b.program().signal("CONT");
    comes_to_be(&a, DEADLINE, "b").await;
    let all = visitors.end().await;
    let failed: Vec<_> = all.iter().filter(|(_, _, who)| who != "b" && who != "c").collect();
    assert!(failed.is_empty(), "{failed:?}");
    let left = all.iter().find(|(_, at, who)| *at > stopped && who == "c").unwrap();
    // Who was under way waits until the link is known to be dead.
    let noticed = left.1 + left.0 - stopped;
    assert!(noticed < Duration::from_secs(3), "{noticed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_node_that_drains_loses_nobody_who_can_go_elsewhere() {
    let World { etcd: _etcd, nodes: [a, mut b, c] } =
        World::new(|opts| opts.set("fleet", "private = [\"127.0.0.0/8\"]").set("drain", "notice = \"1s\"")).await;
    let (one, two) = (named("b").await, named("c").await);
    // Both, however far away they are measured to be.
    let record = json!({"type": "http", "hostnames": ["web.edge.localhost"], "balance": "round_robin"});
    a.put("sockets/web", record).await;
    let _b = tunnel(&b, &b, one).await;
    let _c = tunnel(&c, &c, two).await;
    comes_to_be(&a, DEADLINE, "b").await;
    comes_to_be(&a, DEADLINE, "c").await;
    let visitors = [Visitors::of(&a), Visitors::of(&c)];
    for _ in 0..2 {
        b.drain();
        b.program().ended(DEADLINE).await;
        b.restart().await;
        linked(&a, 2).await;
        let again = tunnel(&b, &b, one).await;
        comes_to_be(&a, DEADLINE, "b").await;
        drop(again);
    }
    for visitors in visitors {
        let all = visitors.end().await;
        let failed: Vec<_> = all.iter().filter(|(_, _, who)| who != "b" && who != "c").collect();
        assert!(failed.is_empty() && all.len() > 50, "{failed:?} of {}", all.len());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_stale_table_is_repaired_by_the_node_that_is_asked() {
    let World { mut etcd, nodes: [a, b, c] } = World::new(|opts| opts).await;
    let (one, two) = (named("b").await, named("c").await);
    let record = json!({"socket": "web", "keys": [c.key.line()], "priority": 1});
    a.put("tunnels/web-2", record).await;
    let at_b = tunnel(&b, &b, one).await;
    let _c = tunnel(&c, &c, two).await;
    comes_to_be(&a, DEADLINE, "b").await;
    for node in [&a, &b] {
        let known = async || node.api("GET", "/v1/status", None).await.1["fleet"]["locations"] == json!(2);
        eventually("both are known", async || known().await.then_some(())).await;
    }
    etcd.kill(0);
    drop(at_b);
    eventually("the owner is gone", async || (who(&b).await == "c").then_some(())).await;
    // The feed cannot say so: the very first visitor goes on to the next.
    assert_eq!(who(&a).await, "c");
    assert_eq!(status(&a).await, 200);
    // One that comes back without the feed serves at its node, and gets its place when
    // the feed is there again.
    let _b = tunnel(&b, &b, one).await;
    assert_eq!(who(&b).await, "b");
    etcd.restart(0);
    comes_to_be(&a, Duration::from_secs(30), "b").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_strangers_at_the_door_of_nodes_get_nothing() {
    let World { etcd: _etcd, nodes: [a, b, _c] } = World::new(|opts| opts).await;
    let origin = named("b").await;
    let _b = tunnel(&b, &b, origin).await;
    comes_to_be(&a, DEADLINE, "b").await;
    let door = b.addr("fleet");
    // Plain TCP where that is not private, another protocol, TLS without a certificate.
    for said in [&b"adit\x01\x02\x00\x04\x00\x01a\x00"[..], b"GET / HTTP/1.1\r\n\r\n", b"SSH-2.0-x\r\n"] {
        let mut tcp = TcpStream::connect(door).await.unwrap();
        tcp.write_all(said).await.unwrap();
        let mut got = Vec::new();
        let read = within(Duration::from_secs(7), "the end", tcp.read_to_end(&mut got)).await;
        // An alert at most.
        assert!(read.is_err() || got.len() < 16, "{got:?}");
    }
    let ca = std::fs::read(b.ca()).unwrap();
    let refused = tls_connect(door, "b", trusting(&ca, &["adit/1"])).await;
    assert!(refused.is_err(), "it has no certificate of the visitors' CA");
    // Silence does not keep a place.
    let mut silent = TcpStream::connect(door).await.unwrap();
    let end = within(Duration::from_secs(7), "the end of silence", silent.read(&mut [0; 1])).await;
    assert_eq!(end.unwrap_or(0), 0);
    assert_eq!(status(&a).await, 200);
}

/// Sends gibibytes down from an origin at b to a visitor of a; the processor time that
/// one cost a at least (others of the machine only add to it), and how many splices strace saw, where it may look.
async fn gibibyte(splice: bool) -> (Duration, Option<usize>) {
    let etcd = EtcdCluster::start(1).await;
    let change = |opts: NodeOpts| {
        opts.set("fleet", "private = [\"127.0.0.0/8\"]")
            .set("relay", &format!("splice = {splice}"))
            .set("log", "level = \"warn\"")
            // BBR's pacing costs more than either on loopback.
            .set("tcp", "congestion = \"reno\"")
    };
    let [a, b, _c] = fleet(&etcd, change).await;
    a.put("sockets/db", json!({"type": "tcp"})).await;
    a.put("tunnels/db", json!({"socket": "db", "keys": [b.key.line()]})).await;
    let port = a.port_of("db").await;
    linked(&a, 2).await;
    let origin = Origin::raw().await;
    eventually("the socket is known", async || (b.api("GET", "/v1/tunnels/db", None).await.0 == 200).then_some(()))
        .await;
    let _owner = Ssh::start(&b, &[&format!("tcp/db:{}", origin.target())]).await;
    let take = async |bytes: u64| {
        let mut tcp = TcpStream::connect((a.ip, port)).await.ok()?;
        tcp.write_all(format!("DOWN {bytes}\n").as_bytes()).await.ok()?;
        tcp.shutdown().await.ok()?;
        Pattern::read(None, &mut tcp).await.ok().filter(|got| *got == bytes)
    };
    eventually("the tunnel is known", async || take(5).await).await;
    let mut spent = Duration::MAX;
    for _ in 0..5 {
        let before = a.usage().cpu;
        within(Duration::from_secs(120), "a gibibyte", take(1 << 30)).await.expect("all of it");
        spent = spent.min(a.usage().cpu - before);
    }
    let mut strace = std::process::Command::new("strace");
    strace.args(["-f", "-qq", "-e", "trace=splice", "-p", &a.pid().to_string()]);
    let strace = Program::start("strace", strace);
    // It says nothing where it is let; and has ended where it is not.
    tokio::time::sleep(Duration::from_millis(500)).await;
    within(Duration::from_secs(120), "16 MiB", take(16 << 20)).await.expect("all of it");
    let said = strace.output();
    let seen = said.lines().filter(|line| line.contains("splice(") && !line.contains("= -1")).count();
    (spent, (!said.contains("ttach")).then_some(seen))
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_splicing_between_nodes_costs_less_than_copying() {
    if !long() {
        return;
    }
    let (spliced, calls) = gibibyte(true).await;
    let (copied, none) = gibibyte(false).await;
    println!(
        "a GiB at the entry: {spliced:?} of CPU spliced ({calls:?} splices of 16 MiB), {copied:?} copied ({none:?})"
    );
    assert!(spliced < copied, "{spliced:?} {copied:?}");
    match (calls, none) {
        (Some(calls), Some(none)) => assert!(calls > 20 && none == 0, "{calls} {none}"),
        _ => eprintln!("skipped: strace may not look here"),
    }
}
