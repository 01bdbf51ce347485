//! Latest login wins, older sessions stand by; and what a node remembers.

use std::sync::atomic::Ordering;

use serde_json::json;

use crate::harness::*;

/// How many visits each origin has answered.
fn counts(origins: [&Origin; 2]) -> [usize; 2] {
    origins.map(|o| o.requests.load(Ordering::Relaxed))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_latest_login_serves_and_the_older_takes_over_when_it_dies() {
    let node = Node::start().await;
    let (old, new) = (Origin::http().await, Origin::http().await);
    let first = Ssh::with(&node, SshOpts::new(&[&format!("web:80:{}", old.target())]).pty()).await;
    let mut second = Ssh::start(&node, &[&format!("web:80:{}", new.target())]).await;
    let url = format!("http://web.edge.localhost:{}/", node.addr("http").port());
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    assert_eq!(counts([&old, &new]), [0, 1]);
    second.program.kill9();
    // The very next visitor, with no time for anybody to notice.
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    assert_eq!(counts([&old, &new]), [1, 1]);
    first.program.wait_for("stands by", 1, DEADLINE).await;
    first.program.wait_for("serves again", 1, DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_ports_and_the_host_key_outlive_a_crash() {
    let mut node = Node::start().await;
    let dir = tempfile::tempdir().unwrap();
    let stranger = Key::new(dir.path(), "ed25519");
    let origin = Origin::raw().await;
    let forward = format!("tcp/db:{}", origin.target());
    let ssh = Ssh::start(&node, &[&forward]).await;
    let port = node.port_of("db").await;
    let host_key = |ssh: &Ssh| ssh.program.output().lines().find(|l| l.contains("Server host key")).map(str::to_owned);
    let key = host_key(&ssh);
    assert!(key.is_some());
    node.kill9();
    node.restart().await;
    let mut thief = Ssh::launch(&node, SshOpts::new(&[&forward]).key(&stranger));
    assert!(!thief.program.ended(DEADLINE).await.success(), "another key took the name");
    let again = Ssh::start(&node, &[&forward]).await;
    assert_eq!((node.port_of("db").await, host_key(&again)), (port, key));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_tunnels_of_a_socket_share_its_visitors_and_a_dead_origin_is_passed_over() {
    let node = Node::start().await;
    let (one, two) = (Origin::http().await, Origin::http().await);
    let dir = tempfile::tempdir().unwrap();
    let keys = [Key::new(dir.path(), "ed25519"), Key::new(dir.path(), "ecdsa"), Key::new(dir.path(), "rsa")];
    node.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    for (i, key) in keys.iter().enumerate() {
        node.put(&format!("tunnels/web-{i}"), json!({"socket": "web", "keys": [key.line()]})).await;
    }
    let forward = |target: String| SshOpts::new(&[&format!("web:80:{target}")]);
    let _one = Ssh::with(&node, forward(one.target()).key(&keys[0])).await;
    let _two = Ssh::with(&node, forward(two.target()).key(&keys[1])).await;
    let _dead = Ssh::with(&node, forward(Origin::refusing().await.to_string()).key(&keys[2])).await;
    let url = format!("http://web.edge.localhost:{}/", node.addr("http").port());
    for _ in 0..12 {
        assert_eq!(curl(&node, &[&url]).await.0, 200);
    }
    let [a, b] = counts([&one, &two]);
    assert!(a >= 3 && b >= 3, "{a} and {b} of 12");
    // A burst left them behind.
    assert!(one.accepted.load(Ordering::Relaxed) + two.accepted.load(Ordering::Relaxed) < 12, "none was kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_console_greets_with_the_url_and_tells_each_request() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    for session in [Session::Pty, Session::Plain] {
        let mut opts = SshOpts::new(&[&format!("web:80:{}", origin.target())]);
        opts.session = session;
        let ssh = Ssh::with(&node, opts).await;
        let url = format!("https://web.edge.localhost:{}", node.addr("https").port());
        ssh.program.wait_for(&url, 1, DEADLINE).await;
        assert_eq!(curl(&node, &[&format!("{url}/some/path?q=1")]).await.0, 404);
        ssh.program.wait_for("GET web.edge.localhost/some/path?q=1 404", 1, DEADLINE).await;
    }
}
