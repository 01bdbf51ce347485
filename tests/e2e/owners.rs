//! What owners of tunnels see: names and who may have them, the latest login,
//! standbys, certificates, the console, and refusals that say why.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

/// Waits until the node's log says `needle`.
async fn logged(node: &Node, needle: &str) {
    let by = Instant::now() + DEADLINE;
    while !node.log().contains(needle) {
        assert!(Instant::now() < by, "the log does not say {needle:?}:\n{}", node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A key in a folder of the node.
fn another_key(node: &Node, kind: &str) -> Key {
    Key::new(&node.state(), kind)
}

async fn page(node: &Node, name: &str) -> (u16, String) {
    curl(node, &[&format!("https://{name}.edge.localhost:8443/")]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_newest_client_is_passed_over_within_the_visit_and_then_ended() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let forward = format!("web:80:{}", origin.target());
    let _older = Ssh::start(&node, &[&forward]).await;
    let newer = Ssh::start(&node, &[&forward]).await;
    newer.program.signal("STOP");
    let start = Instant::now();
    assert_eq!(page(&node, "web").await.0, 200);
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    // The slow open made the node ask; no answer ends the session well before the timer.
    logged(&node, "the peer does not answer").await;
    assert!(start.elapsed() < Duration::from_secs(12), "{:?}", start.elapsed());
    newer.program.signal("CONT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_stays_with_the_key_that_took_it_first() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let forward = format!("web:80:{}", origin.target());
    let ssh = Ssh::start(&node, &[&forward]).await;
    let mut opts = SshOpts::new(&[&forward]);
    opts.key = Some(another_key(&node, "ecdsa"));
    let mut other = Ssh::launch(&node, opts);
    assert!(!other.program.ended(DEADLINE).await.success());
    logged(&node, "web is taken by another key").await;
    drop(ssh);
    // Its owner comes back to it, and after a restart too.
    let mut node = node;
    node.restart().await;
    let _ssh = Ssh::start(&node, &[&forward]).await;
    assert_eq!(page(&node, "web").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_made_up_name_is_the_same_for_the_same_key() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let forward = format!("80:{}", origin.target());
    let mut urls = Vec::new();
    for _ in 0..2 {
        let ssh = Ssh::with(&node, SshOpts::new(&[&forward]).pty()).await;
        ssh.program.wait_for("is published", 1, DEADLINE).await;
        let output = ssh.program.output();
        let url = output.split("https://").nth(1).unwrap().split('/').next().unwrap().to_owned();
        let (status, _) = curl(&node, &[&format!("https://{url}/")]).await;
        assert_eq!(status, 200);
        urls.push(url);
    }
    assert_eq!(urls[0], urls[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn port_zero_gives_a_public_port_that_stays() {
    let mut node = Node::start().await;
    let origin = Origin::greeting().await;
    let mut ports = Vec::new();
    for forward in [format!("0:{}", origin.target()), format!("mail:0:{}", origin.target())] {
        let ssh = Ssh::start(&node, &[&forward]).await;
        let port = ssh.allocated_port().await;
        assert!((20000..=20999).contains(&port));
        let mut visitor = TcpStream::connect(SocketAddr::new(node.ip, port)).await.unwrap();
        let mut greeting = [0; 4];
        within(DEADLINE, "a greeting", visitor.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 ");
        ports.push(port);
    }
    assert_ne!(ports[0], ports[1]);
    node.restart().await;
    let ssh = Ssh::start(&node, &[&format!("mail:0:{}", origin.target())]).await;
    assert_eq!(ssh.allocated_port().await, ports[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_without_any_key_gets_a_name_for_its_session() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let mut opts = SshOpts::new(&[&format!("web:80:{}", origin.target())]);
    // The harness asks for batch mode, which turns keyboard-interactive off.
    opts.extra = ["-o", "PubkeyAuthentication=no"].map(str::to_owned).to_vec();
    opts.batch = false;
    let ssh = Ssh::with(&node, opts).await;
    assert_eq!(page(&node, "web").await.0, 200);
    assert_eq!(node.api("GET", "/v1/sockets/web", None).await.0, 200);
    drop(ssh);
    let by = Instant::now() + DEADLINE;
    while node.api("GET", "/v1/sockets/web", None).await.0 != 404 {
        assert!(Instant::now() < by, "the name outlived its session");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_node_serves_recorded_tunnels_by_relay_port_and_key_alone() {
    let node = Node::with(NodeOpts::default().set("ssh", "mode = \"closed\"")).await;
    let origin = Origin::http().await;
    node.put("sockets/s1", json!({"type": "http", "hostnames": ["s1.edge.localhost"]})).await;
    let tunnel = json!({"socket": "s1", "user": "alice", "relay_port": 5001, "keys": [node.key.line()]});
    node.put("tunnels/t1", tunnel).await;
    let as_user = |user: &str, key: Option<Key>| {
        let mut opts = SshOpts::new(&[&format!("5001:{}", origin.target())]);
        opts.user = user.to_owned();
        opts.key = key;
        opts
    };
    let mut stranger = Ssh::launch(&node, as_user("alice", Some(another_key(&node, "ed25519"))));
    assert!(!stranger.program.ended(DEADLINE).await.success());
    logged(&node, "the key is not in any tunnel's record").await;
    let mut wrong_user = Ssh::launch(&node, as_user("bob", None));
    assert!(!wrong_user.program.ended(DEADLINE).await.success());
    logged(&node, "no tunnel with relay port 5001").await;
    let _ssh = Ssh::with(&node, as_user("alice", None)).await;
    assert_eq!(page(&node, "s1").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn user_certificates_of_trusted_cas_serve_and_every_other_is_refused() {
    let node = Node::with(NodeOpts::default().set("ssh", "mode = \"closed\"")).await;
    let origin = Origin::http().await;
    let (ca, other_ca) = (another_key(&node, "ed25519"), another_key(&node, "ed25519"));
    node.put("sockets/s1", json!({"type": "http", "hostnames": ["s1.edge.localhost"]})).await;
    let tunnel = json!({"socket": "s1", "user": "alice", "relay_port": 5001, "cert_authorities": [ca.line()]});
    node.put("tunnels/t1", tunnel).await;
    let login = |key: &Key| {
        let mut opts = SshOpts::new(&[&format!("5001:{}", origin.target())]);
        opts.user = "alice".to_owned();
        opts.key = Some(key.clone());
        opts
    };
    let refusals: [(&str, &Key, &str, &[&str]); 7] = [
        ("its CA is not trusted here", &other_ca, "alice", &[]),
        ("no tunnel with relay port", &ca, "bob", &[]),
        ("", &ca, "alice", &["-h"]),
        ("source-address does not allow", &ca, "alice", &["-O", "source-address=10.0.0.0/8"]),
        ("critical option that is not understood", &ca, "alice", &["-O", "force-command=true"]),
        ("no tunnel with relay port", &ca, "alice", &["-O", "no-port-forwarding"]),
        ("", &ca, "alice", &["-V", "-2h:-1h"]),
    ];
    for (why, signer, principals, options) in refusals {
        let key = another_key(&node, "ecdsa");
        signer.certify(&key, principals, options);
        let mut ssh = Ssh::launch(&node, login(&key));
        assert!(!ssh.program.ended(DEADLINE).await.success(), "{why}: let in");
        logged(&node, why).await;
    }
    let key = another_key(&node, "ecdsa");
    ca.certify(&key, "alice", &["-V", "-1m:+5m", "-O", "source-address=127.0.0.0/8"]);
    let _ssh = Ssh::with(&node, login(&key)).await;
    assert_eq!(page(&node, "s1").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_revoked_is_out_by_the_nodes_file_and_by_the_record() {
    let dir = tempfile::tempdir().unwrap();
    let list = dir.path().join("revoked");
    std::fs::write(&list, "# nobody\n").unwrap();
    let opts = NodeOpts::default().set("ssh", "mode = \"closed\"");
    let node = Node::with(opts.set("ssh", &format!("revoked_keys = \"{}\"", list.display()))).await;
    let origin = Origin::http().await;
    let (ca, key) = (another_key(&node, "ed25519"), another_key(&node, "ecdsa"));
    ca.certify(&key, "alice", &["-z", "7"]);
    node.put("sockets/s1", json!({"type": "http", "hostnames": ["s1.edge.localhost"]})).await;
    let tunnel = |revoked: &[&str]| {
        let keys = [node.key.line()];
        json!({"socket": "s1", "cert_authorities": [ca.line()], "principals": ["alice"], "keys": keys, "revoked": revoked})
    };
    node.put("tunnels/t1", tunnel(&[])).await;
    let login = |key: &Key| SshOpts::new(&[&format!("s1:80:{}", origin.target())]).key(key);
    let running = Ssh::with(&node, login(&key)).await;
    assert_eq!(page(&node, "s1").await.0, 200);

    // By the record: at once, and for those who are logged in too.
    node.put("tunnels/t1", tunnel(&["serial: 5-9"])).await;
    assert_eq!(page(&node, "s1").await.0, 503);
    node.put("tunnels/t1", tunnel(&["id: somebody else"])).await;
    assert_eq!(page(&node, "s1").await.0, 200);
    drop(running);

    // By the file: at the next login.
    std::fs::write(&list, format!("serial: 7\n{}\n", node.key.line())).unwrap();
    for key in [&key, &node.key] {
        let mut refused = Ssh::launch(&node, login(key));
        assert!(!refused.program.ended(DEADLINE).await.success());
    }
    assert_eq!(node.log().matches("it is revoked (ssh.revoked_keys)").count(), 2);
    std::fs::write(&list, "id: somebody else\n").unwrap();
    let _ssh = Ssh::with(&node, login(&key)).await;
    assert_eq!(page(&node, "s1").await.0, 200);
    let (status, answer) = node.api("PUT", "/v1/tunnels/t1", Some(&tunnel(&["serial: 9-5"]))).await;
    assert_eq!(status, 400, "{answer}");
    assert!(answer.to_string().contains("revoked: item 0"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_let_in_is_told_why_by_its_own_client() {
    let node = Node::with(NodeOpts::default().set("ssh", "mode = \"closed\"")).await;
    let mut opts = SshOpts::new(&["s1:80:localhost:1"]);
    opts.batch = false;
    let mut ssh = Ssh::launch(&node, opts);
    assert!(!ssh.program.ended(DEADLINE).await.success());
    let said = ssh.program.output();
    assert!(said.contains("the key is not in any tunnel's record") && said.contains("SHA256:"), "{said}");
    assert_eq!(said.matches("adit: no login.").count(), 1, "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removed_key_loses_its_tunnel_for_the_next_visitor() {
    let node = Node::with(NodeOpts::default().set("ssh", "mode = \"closed\"")).await;
    let origin = Origin::http().await;
    node.put("sockets/s1", json!({"type": "http", "hostnames": ["s1.edge.localhost"]})).await;
    node.put("tunnels/t1", json!({"socket": "s1", "keys": [node.key.line()]})).await;
    let _ssh = Ssh::start(&node, &[&format!("s1:80:{}", origin.target())]).await;
    assert_eq!(page(&node, "s1").await.0, 200);
    node.put("tunnels/t1", json!({"socket": "s1", "keys": [another_key(&node, "ed25519").line()]})).await;
    assert_eq!(page(&node, "s1").await.0, 503);
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_on_the_https_port_is_told_apart_by_its_banner() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let mut opts = SshOpts::new(&[&format!("web:80:{}", origin.target())]);
    opts.port = Some(node.addr("https").port());
    let _ssh = Ssh::with(&node, opts).await;
    assert_eq!(page(&node, "web").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_forward_can_be_cancelled_and_added_again() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let control = node.state().join("mux");
    let mut opts = SshOpts::new(&[&format!("db:5000:{}", origin.target())]);
    opts.extra = ["-M", "-S", control.to_str().unwrap()].map(str::to_owned).to_vec();
    let _ssh = Ssh::with(&node, opts).await;
    let mux = |op: &str| {
        let target = format!("db:5000:{}", origin.target());
        let mut command = std::process::Command::new("ssh");
        command.args(["-S", control.to_str().unwrap(), "-O", op, "-R", &target, "x"]);
        let done = command.output().unwrap();
        assert!(done.status.success(), "{op}: {done:?}");
    };
    let addr = SocketAddr::new(node.ip, node.port_of("db").await);
    let asks = || async {
        let mut visitor = TcpStream::connect(addr).await.map_err(|e| e.to_string())?;
        let _ = visitor.write_all(b"DOWN 5\n").await;
        within(DEADLINE, "an end", Pattern::read(None, &mut visitor)).await
    };
    assert_eq!(asks().await, Ok(5));
    mux("cancel");
    assert!(asks().await.is_err());
    mux("forward");
    assert_eq!(asks().await, Ok(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_unnamed_ports_of_one_client_are_two_sockets() {
    let node = Node::start().await;
    let (one, two) = (Origin::raw().await, Origin::greeting().await);
    let ssh = Ssh::start(&node, &[&format!("0:{}", one.target()), &format!("0:{}", two.target())]).await;
    ssh.program.wait_for("Allocated port ", 2, DEADLINE).await;
    let output = ssh.program.output();
    let ports = output.split("Allocated port ").skip(1).map(|rest| rest.split(' ').next().unwrap().parse::<u16>());
    let ports: Vec<u16> = ports.map(Result::unwrap).collect();
    assert_ne!(ports[0], ports[1]);
    let mut visitor = TcpStream::connect(SocketAddr::new(node.ip, ports[1])).await.unwrap();
    let mut greeting = [0; 4];
    within(DEADLINE, "a greeting", visitor.read_exact(&mut greeting)).await.unwrap();
    assert_eq!(&greeting, b"220 ");
    let mut visitor = TcpStream::connect(SocketAddr::new(node.ip, ports[0])).await.unwrap();
    visitor.write_all(b"DOWN 5\n").await.unwrap();
    assert_eq!(within(DEADLINE, "an end", Pattern::read(None, &mut visitor)).await, Ok(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn one_key_makes_no_more_sockets_than_it_may() {
    let node = Node::with(NodeOpts::default().set("ssh", "sockets_per_key = 2")).await;
    let origin = Origin::http().await;
    let forward = |name: &str| format!("{name}:80:{}", origin.target());
    let _ssh = Ssh::start(&node, &[&forward("a"), &forward("b")]).await;
    let mut third = Ssh::launch(&node, SshOpts::new(&[&forward("c")]));
    assert!(!third.program.ended(DEADLINE).await.success());
    logged(&node, "has 2 sockets already").await;
    let _again = Ssh::start(&node, &[&forward("a")]).await;
}
