//! mysocketctl's calls at several nodes of one feed: accounts, tokens and signed keys
//! count at all, and nothing is given twice.

use std::collections::HashSet;

use serde_json::{Value, json};

use crate::harness::*;
use crate::mysocket::{Caller, certify, ssh_of, text};

#[tokio::test(flavor = "multi_thread")]
async fn fleet_owners_call_any_node_and_get_nothing_twice() {
    let etcd = EtcdCluster::start(1).await;
    let node = |name: &str, control: bool| {
        etcd.node(name, control)
            .set("ingress", "ports = \"20000-20019\"")
            .set("ssh", "mode = \"closed\"")
            .set("mysocket", "hosts = [\"api.edge.localhost\"]")
            .set("mysocket", "sign_up = true")
    };
    let (a, b, c) =
        tokio::join!(Node::with(node("a", true)), Node::with(node("b", true)), Node::with(node("c", false)));
    eventually("a keyring", async || {
        (Caller::stranger(&b).status("GET", "/connect", &Value::Null).await == 401).then_some(())
    })
    .await;
    let ann = Caller::signed_up(&a, "ann", None).await;
    let (at_b, at_c) = (ann.at(&b), ann.at(&c));
    for caller in [&at_b, &at_c] {
        eventually("the account is known", async || {
            (caller.status("GET", "/connect", &Value::Null).await == 200).then_some(())
        })
        .await;
    }
    // From two nodes at once, until there are no more ports.
    let calls = (0..30).map(|i| {
        let caller = if i % 2 == 0 { ann.clone() } else { at_b.clone() };
        async move { caller.call("POST", "/connect", &json!({"name": format!("db {i}"), "socket_type": "tcp"})).await }
    });
    let answers: Vec<(u16, Value)> = futures_util::future::join_all(calls).await;
    let made: Vec<&Value> = answers.iter().filter(|(status, _)| *status == 200).map(|(_, made)| made).collect();
    let ports: HashSet<u64> = made.iter().map(|made| made["socket_tcp_ports"][0].as_u64().unwrap()).collect();
    let relays: HashSet<u64> = made.iter().map(|made| made["tunnels"][0]["local_port"].as_u64().unwrap()).collect();
    assert_eq!((made.len(), ports.len(), relays.len()), (20, 20, 20));
    assert!(answers.iter().all(|(status, told)| *status == 200 || text(told, "message").contains("no free port")));
    assert_eq!(at_c.ok("GET", "/connect", &Value::Null).await.as_array().unwrap().len(), 20);
    // One that may not write says so.
    let (status, told) = at_c.call("POST", "/connect", &json!({"name": "x"})).await;
    assert!(status == 503 && text(&told, "message").contains("does not write records"), "{status} {told}");

    // A key signed at one node, a login at another, a visitor at the third.
    let dir = tempfile::tempdir().unwrap();
    let (key, origin) = (Key::new(dir.path(), "ecdsa"), Origin::http().await);
    let socket = ann.ok("POST", "/connect", &json!({"name": "web"})).await;
    let tunnel = &socket["tunnels"][0];
    let path = format!("/socket/{}/tunnel/{}", text(&socket, "socket_id"), text(tunnel, "tunnel_id"));
    let signed = at_b.ok("POST", &format!("{path}/signkey"), &json!({"ssh_public_key": key.line()})).await;
    certify(&key, text(&signed, "signed_ssh_cert"));
    let url = format!("https://{}:8443/", text(&socket, "dnsname"));
    for node in [&b, &c] {
        eventually("the socket is known", async || (curl(node, &[&url]).await.0 == 503).then_some(())).await;
    }
    let _ssh = Ssh::with(&c, ssh_of(&ann.user, tunnel, &origin.target(), &key)).await;
    eventually("a visitor of another node", async || (curl(&b, &[&url]).await.0 == 200).then_some(())).await;
    eventually("the node of the last login", async || {
        (text(&ann.ok("GET", &path, &Value::Null).await, "tunnel_server") == "c").then_some(())
    })
    .await;
}
