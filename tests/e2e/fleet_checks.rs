//! Nodes that are asked to check their tunnels' origins, or have too much to do:
//! visitors of all nodes go elsewhere before one of them was failed.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::fleet_feed::{becomes, fleet};
use crate::fleet_ways::{Visitors, comes_to_be, linked, named, tunnel, who};
use crate::harness::*;

/// An origin whose health can be switched; it serves visitors all the same.
struct Patient {
    addr: SocketAddr,
    well: Arc<AtomicBool>,
}

impl Patient {
    async fn new(name: &'static str) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let well = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&well);
        tokio::spawn(async move {
            while let Ok((mut tcp, _)) = listener.accept().await {
                let well = Arc::clone(&asked);
                tokio::spawn(async move {
                    let mut seen = String::new();
                    let mut buffer = [0; 4096];
                    while let Ok(n @ 1..) = tcp.read(&mut buffer).await {
                        seen.push_str(std::str::from_utf8(&buffer[..n]).unwrap());
                        while let Some((head, rest)) = seen.split_once("\r\n\r\n") {
                            let is_check = head.starts_with("GET /health?deep=1 HTTP/1.1\r\n")
                                && head.contains("host: web.edge.localhost")
                                && head.contains("user-agent: adit-check/");
                            let sick = is_check && !well.load(Ordering::Relaxed);
                            let status = if sick { "503 Unwell" } else { "200 OK" };
                            let body = if is_check { "" } else { name };
                            let len = body.len();
                            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {len}\r\n\r\n{body}");
                            seen = rest.to_owned();
                            if tcp.write_all(answer.as_bytes()).await.is_err() {
                                return;
                            }
                        }
                    }
                });
            }
        });
        Self { addr, well }
    }

    fn is(&self, well: bool) {
        self.well.store(well, Ordering::Relaxed);
    }
}

async fn world(change: impl Fn(NodeOpts) -> NodeOpts, check: serde_json::Value) -> (EtcdCluster, [Node; 3]) {
    let etcd = EtcdCluster::start(1).await;
    let nodes = fleet(&etcd, |opts| change(opts).set("fleet", "private = [\"127.0.0.0/8\"]")).await;
    let [a, b, c] = &nodes;
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"], "check": check})).await;
    for (i, node) in [a, b, c].into_iter().enumerate() {
        let keys = [node.key.line()];
        a.put(&format!("tunnels/web-{i}"), json!({"socket": "web", "keys": keys, "priority": i})).await;
    }
    for node in [b, c] {
        becomes(node, 503).await;
    }
    for node in &nodes {
        linked(node, 2).await;
    }
    (etcd, nodes)
}

const SOON: Duration = Duration::from_secs(10);

#[tokio::test(flavor = "multi_thread")]
async fn fleet_an_origin_that_fails_its_checks_is_left_at_all_nodes() {
    let check = json!({"path": "/health?deep=1", "every": "1s", "timeout": "900ms", "fail_after": 2, "pass_after": 1});
    let (_etcd, [a, b, c]) = world(|opts| opts, check).await;
    let (first, second) = (Patient::new("first").await, Patient::new("second").await);
    let forward = format!("web:80:{}", first.addr);
    let owner = Ssh::with(&b, SshOpts::new(&[&forward]).key(&b.key).pty()).await;
    let _second = tunnel(&c, &c, second.addr).await;
    // By priority.
    for node in [&a, &b, &c] {
        comes_to_be(node, SOON, "first").await;
    }
    let visitors = Visitors::of(&a);
    first.is(false);
    for node in [&a, &b, &c] {
        comes_to_be(node, SOON, "second").await;
    }
    owner.program.wait_for("web-1: checks fail (the origin answered 503", 1, SOON).await;
    let (_, told) = b.api("GET", "/v1/status", None).await;
    assert_eq!(told["failing"], json!(["web-1"]));
    let out = std::process::Command::new(env!("CARGO_BIN_EXE_adit"))
        .args(["status", "--state", b.state().to_str().unwrap()])
        .output()
        .unwrap();
    let out = String::from_utf8(out.stdout).unwrap();
    assert!(out.contains("checks fail: web-1"), "{out}");
    // Where all fail, any serves.
    second.is(false);
    eventually_within(SOON, "the second fails too", async || {
        (c.api("GET", "/v1/status", None).await.1["failing"] == json!(["web-2"])).then_some(())
    })
    .await;
    comes_to_be(&a, SOON, "first").await;
    second.is(true);
    comes_to_be(&a, SOON, "second").await;
    first.is(true);
    comes_to_be(&a, SOON, "first").await;
    owner.program.wait_for("web-1: checks pass again", 1, SOON).await;
    // Who is no longer checked is taken for well.
    first.is(false);
    comes_to_be(&a, SOON, "second").await;
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    comes_to_be(&a, SOON, "first").await;
    for (_, at, answer) in visitors.end().await {
        assert!(answer == "first" || answer == "second", "a visitor was failed: {answer} at {at:?}");
    }
    assert!(b.metrics().await.contains("adit_checks_total{result=\"failed\"}"));
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_standby_serves_where_the_latest_login_fails_its_checks() {
    let check = json!({"path": "/health?deep=1", "every": "1s", "timeout": "900ms", "fail_after": 1, "pass_after": 1});
    let (_etcd, [a, b, c]) = world(|opts| opts, check).await;
    let (old, near, new) = (Patient::new("old").await, Patient::new("near").await, Patient::new("new").await);
    let _old = tunnel(&b, &a, old.addr).await;
    let _near = tunnel(&c, &a, near.addr).await;
    comes_to_be(&a, SOON, "near").await;
    let _new = tunnel(&c, &a, new.addr).await;
    comes_to_be(&a, SOON, "new").await;
    // First the standby of the same node, then the one at another.
    new.is(false);
    comes_to_be(&a, SOON, "near").await;
    comes_to_be(&c, SOON, "near").await;
    near.is(false);
    comes_to_be(&a, SOON, "old").await;
    comes_to_be(&c, SOON, "old").await;
    new.is(true);
    comes_to_be(&a, SOON, "new").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_an_origin_that_takes_no_connection_is_left_before_anybody_came() {
    let (_etcd, [a, b, c]) = world(|opts| opts, json!({"every": "1s", "timeout": "1s"})).await;
    let _gone = tunnel(&b, &b, Origin::refusing().await).await;
    let _serves = tunnel(&c, &c, named("serves").await).await;
    eventually_within(SOON, "the check fails", async || {
        (b.api("GET", "/v1/status", None).await.1["failing"] == json!(["web-1"])).then_some(())
    })
    .await;
    comes_to_be(&a, SOON, "serves").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_node_with_much_to_do_is_spared_a_share_of_others_visitors() {
    // From the first percent on: what a node of tests can reach.
    let (_etcd, [a, b, c]) = world(|opts| opts.set("fleet", "spare_from = 0"), json!(null)).await;
    let _first = tunnel(&b, &b, named("first").await).await;
    let _backup = tunnel(&c, &c, named("backup").await).await;
    comes_to_be(&a, SOON, "first").await;
    let busy: Vec<_> = (0..4).map(|_| Visitors::of(&b)).collect();
    eventually_within(Duration::from_secs(20), "it says that it is busy", async || {
        let (_, status) = a.api("GET", "/v1/status", None).await;
        let nodes = status["fleet"]["nodes"].as_array()?.clone();
        nodes.iter().find(|node| node["node"] == "b")?["spared"].as_u64().filter(|spared| *spared > 5)
    })
    .await;
    // Its own visitors stay, those of others are shared.
    let mut counts = [0, 0];
    eventually_within(Duration::from_secs(20), "others' visitors are shared", async || {
        match who(&a).await.as_str() {
            "first" => counts[0] += 1,
            "backup" => counts[1] += 1,
            other => panic!("{other}"),
        }
        (counts[0] > 2 && counts[1] > 2).then_some(())
    })
    .await;
    for visitors in busy {
        assert!(visitors.end().await.iter().all(|(.., answer)| answer == "first"));
    }
}
