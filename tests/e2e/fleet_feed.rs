//! Several nodes, one feed: a real etcd cluster with TLS and roles.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::gate_logins::title;
use crate::harness::*;

pub const WEB: &str = "https://web.edge.localhost:8443";
const ANN: &str = "ann@example.com";

pub async fn fleet(etcd: &EtcdCluster, change: impl Fn(NodeOpts) -> NodeOpts) -> [Node; 3] {
    let [a, b, c] = [("a", true), ("b", false), ("c", false)].map(|(name, control)| change(etcd.node(name, control)));
    let (a, b, c) = tokio::join!(Node::with(a), Node::with(b), Node::with(c));
    [a, b, c]
}

pub async fn status(node: &Node) -> u16 {
    Browser::at(node).get(&format!("{WEB}/")).await.status
}

/// Until a visitor of this node gets this status.
pub async fn becomes(node: &Node, expected: u16) {
    eventually("the records act here", async || (status(node).await == expected).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_records_written_at_one_node_act_at_all() {
    let etcd = EtcdCluster::start(1).await;
    let [a, b, c] = fleet(&etcd, |opts| opts).await;
    let origin = Origin::http().await;
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    a.put("tunnels/web-1", json!({"socket": "web", "keys": [b.key.line()]})).await;
    // What a write was answered by has acted there; elsewhere a moment later.
    becomes(&b, 503).await;
    let _ssh = Ssh::start(&b, &[&format!("web:80:{}", origin.target())]).await;
    assert_eq!(status(&b).await, 200);
    // Every node reads all records, and only the one with the role writes them.
    let (read, record) = c.api("GET", "/v1/sockets/web", None).await;
    assert_eq!((read, &record["hostnames"]), (200, &json!(["web.edge.localhost"])));
    let (denied, why) = c.api("PUT", "/v1/sockets/other", Some(&json!({"type": "tcp"}))).await;
    assert_eq!(denied, 403, "{why}");
    let detail = why["detail"].as_str().unwrap();
    assert!(detail.contains("etcd.control_certificate") && detail.ends_with("Nodes that write records: a"), "{why}");
    // Nobody gets a name or a port twice, wherever it was asked for.
    let twice = json!({"type": "http", "hostnames": ["web.edge.localhost"]});
    assert_eq!(a.api("PUT", "/v1/sockets/twice", Some(&twice)).await.0, 409);
    assert_eq!(a.api("DELETE", "/v1/sockets/web?cascade=true", None).await.0, 204);
    for node in [&b, &c] {
        becomes(node, 404).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_serves_on_without_its_feed_and_from_the_start() {
    let mut etcd = EtcdCluster::start(1).await;
    let [a, mut b, c] = fleet(&etcd, |opts| opts).await;
    let origin = Origin::http().await;
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    a.put("tunnels/web-1", json!({"socket": "web", "keys": [b.key.line()]})).await;
    becomes(&b, 503).await;
    becomes(&c, 503).await;
    let ssh = Ssh::start(&b, &[&format!("web:80:{}", origin.target())]).await;
    etcd.kill(0);
    let stale = async |node: &Node| node.api("GET", "/v1/status", None).await.1["stale_ms"].as_u64();
    eventually("it is told", async || stale(&b).await).await;
    assert_eq!(status(&b).await, 200);
    let (denied, why) = a.api("PUT", "/v1/sockets/late", Some(&json!({"type": "tcp"}))).await;
    assert_eq!(denied, 503, "{why}");
    // Started without a feed: the last state serves, and owners log in.
    drop(ssh);
    b.kill9();
    b.restart().await;
    let _ssh = Ssh::start(&b, &[&format!("web:80:{}", origin.target())]).await;
    assert_eq!(status(&b).await, 200);
    assert!(stale(&b).await.is_some());
    // It comes back, and brings what is new.
    etcd.restart(0);
    eventually("it is there again", async || {
        let (status, _) = a
            .api(
                "PUT",
                "/v1/sockets/web",
                Some(&json!({"type": "http",
            "hostnames": ["web.edge.localhost"], "gate": {"ip": {"deny": ["127.0.0.0/8"]}}})),
            )
            .await;
        (status == 200).then_some(())
    })
    .await;
    becomes(&b, 403).await;
    becomes(&c, 403).await;
    eventually("it is live again", async || stale(&b).await.is_none().then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_of_three_members_loses_one_without_a_word() {
    let mut etcd = EtcdCluster::start(3).await;
    let [a, b, _c] = fleet(&etcd, |opts| opts).await;
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    becomes(&b, 503).await;
    for (turn, lost) in [0, 1, 2].into_iter().enumerate() {
        etcd.kill(lost);
        let rules = json!({"ip": {"deny": [if turn % 2 == 0 { "127.0.0.0/8" } else { "192.0.2.0/24" }]}});
        let record = json!({"type": "http", "hostnames": ["web.edge.localhost"], "gate": rules});
        // A leader that dies takes writes along for a while.
        eventually("a write", async || (a.api("PUT", "/v1/sockets/web", Some(&record)).await.0 == 200).then_some(()))
            .await;
        becomes(&b, if turn % 2 == 0 { 403 } else { 503 }).await;
        etcd.restart(lost);
        eventually_within(DEADLINE, "it is whole again", async || {
            etcd.ctl_if_healthy(&["endpoint", "health", "--cluster"]).then_some(())
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_login_goes_through_three_nodes_and_a_logout_reaches_all() {
    let etcd = EtcdCluster::start(1).await;
    let nodes = fleet(&etcd, |opts| opts.set("gate", "host = \"auth.edge.localhost\"")).await;
    let [a, b, c] = &nodes;
    let origin = Origin::http().await;
    a.put("providers/here", json!({"kind": "local", "title": "This edge"})).await;
    a.put("accounts/ann", json!({"email": ANN, "password": "correct horse"})).await;
    let gate = json!({"oidc": {"providers": ["here"], "allow_emails": [ANN]}});
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"], "gate": gate})).await;
    let keys: Vec<String> = nodes.iter().map(|node| node.key.line()).collect();
    a.put("tunnels/web-1", json!({"socket": "web", "keys": keys})).await;
    for node in [b, c] {
        becomes(node, 302).await;
    }
    let mut tunnels = Vec::new();
    for node in &nodes {
        tunnels.push(Ssh::start(node, &[&format!("web:80:{}", origin.target())]).await);
    }
    let cas: Vec<u8> = nodes.iter().flat_map(|node| std::fs::read(node.ca()).unwrap()).collect();
    let ips = [a.ip, b.ip, c.ip];
    let asked = Arc::<AtomicUsize>::default();
    let turn = Arc::clone(&asked);
    let mut browser = Browser::new(&cas, move |host, port, _| {
        let next = |_| ips[turn.fetch_add(1, Ordering::Relaxed) % 3];
        SocketAddr::new(host.parse().unwrap_or_else(next), port)
    });
    let page = browser.follow(&format!("{WEB}/headers"), 4).await.pop().unwrap();
    assert_eq!(title(&page), "Log in to web.edge.localhost");
    let form = page.form().with("email", ANN).with("password", "correct horse");
    let done = browser.submit(&page, &form).await;
    let page = browser.follow_on(done, 4).await.pop().unwrap();
    assert!(page.text().contains("x-adit-user-email: ann@example.com"), "{}", page.text());
    for _ in 0..6 {
        assert_eq!(browser.get(&format!("{WEB}/")).await.status, 200);
    }
    assert!(asked.load(Ordering::Relaxed) >= 10);
    // A copy of it, at each node; then logged out by one that writes no records but this.
    let kept = browser.cookie("web.edge.localhost", "__Host-adit_s").unwrap().value.clone();
    let mut at_c = Browser::at(c);
    at_c.jar.put("web.edge.localhost", "__Host-adit_s", &kept);
    let page = at_c.get(&format!("{WEB}/.adit/logout")).await;
    let out = at_c.submit(&page, &page.form().with("where", "everywhere")).await;
    assert_eq!(out.status, 303, "{}", out.text());
    for node in &nodes {
        let mut browser = Browser::at(node);
        browser.jar.put("web.edge.localhost", "__Host-adit_s", &kept);
        eventually_within(Duration::from_secs(2), "it is out here too", async || {
            (browser.get(&format!("{WEB}/")).await.status == 302).then_some(())
        })
        .await;
    }
}

/// The nodes that a node knows, each with its number of tunnels.
async fn known(node: &Node) -> Vec<(String, u64)> {
    let (_, status) = node.api("GET", "/v1/status", None).await;
    let told = status["fleet"]["nodes"].as_array().cloned().unwrap_or_default();
    told.iter().map(|one| (one["node"].as_str().unwrap().to_owned(), one["tunnels"].as_u64().unwrap())).collect()
}

async fn is_live(node: &Node) -> bool {
    node.api("GET", "/v1/status", None).await.1["stale_ms"].is_null()
}

async fn comes_to_know(node: &Node, limit: Duration, expected: &[(&str, u64)]) {
    let expected: Vec<(String, u64)> = expected.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
    let what = format!("{expected:?} is known");
    eventually_within(limit, &what, async || (known(node).await == expected).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_nodes_know_who_lives_and_where_tunnels_are() {
    let mut etcd = EtcdCluster::start(1).await;
    let [a, mut b, mut c] = fleet(&etcd, |opts| opts).await;
    let (soon, origin) = (Duration::from_secs(5), Origin::http().await);
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    a.put("tunnels/web-1", json!({"socket": "web", "keys": [b.key.line(), c.key.line()]})).await;
    becomes(&b, 503).await;
    becomes(&c, 503).await;
    let forward = format!("web:80:{}", origin.target());
    let at_b = Ssh::start(&b, &[&forward]).await;
    comes_to_know(&a, soon, &[("a", 0), ("b", 1), ("c", 0)]).await;
    assert!(a.metric("adit_fleet_location_seconds_count").await >= 1.0);
    let _at_c = Ssh::start(&c, &[&forward]).await;
    for node in [&a, &b, &c] {
        comes_to_know(node, soon, &[("a", 0), ("b", 1), ("c", 1)]).await;
    }
    // An owner leaves: nobody else is moved.
    drop(at_b);
    comes_to_know(&a, soon, &[("a", 0), ("b", 0), ("c", 1)]).await;
    let _at_b = Ssh::start(&b, &[&forward]).await;
    comes_to_know(&a, soon, &[("a", 0), ("b", 1), ("c", 1)]).await;
    // A node that is killed is gone with its lease, and all that it told with it.
    b.kill9();
    comes_to_know(&a, Duration::from_secs(10), &[("a", 0), ("c", 1)]).await;
    b.restart().await;
    comes_to_know(&a, soon, &[("a", 0), ("b", 0), ("c", 1)]).await;
    let _at_b = Ssh::start(&b, &[&forward]).await;
    comes_to_know(&a, soon, &[("a", 0), ("b", 1), ("c", 1)]).await;
    // Longer without the feed than leases last: all are told again.
    etcd.kill(0);
    // Nothing tells that a lease of 6 s is over while nobody is there to say so.
    tokio::time::sleep(Duration::from_secs(8)).await;
    assert_eq!(known(&a).await.len(), 3, "what was told last still holds");
    etcd.restart(0);
    for node in [&a, &b, &c] {
        eventually("it is live again", async || is_live(node).await.then_some(())).await;
        comes_to_know(node, Duration::from_secs(30), &[("a", 0), ("b", 1), ("c", 1)]).await;
    }
    // One that leaves says so.
    c.drain();
    comes_to_know(&a, Duration::from_secs(5), &[("a", 0), ("b", 1)]).await;
}
