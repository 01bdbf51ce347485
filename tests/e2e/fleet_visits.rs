//! What visitors of one node get from tunnels at another that is not plain HTTP: who they
//! are arrives, as do WebSockets and gRPC; sessions of TLS go from node to node; and
//! nodes take a new CA without losing one of them.

use std::io::ErrorKind;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

use crate::fleet_feed::{becomes, fleet};
use crate::fleet_ways::{Visitors, comes_to_be, linked, named, tunnel};
use crate::grpc::Grpc;
use crate::harness::*;
use crate::tls_scan::{Ca, s_client};

#[tokio::test(flavor = "multi_thread")]
async fn fleet_the_owner_and_the_origin_are_told_who_visits_elsewhere() {
    let etcd = EtcdCluster::start(1).await;
    let [a, b, _c] = fleet(&etcd, |opts| opts).await;
    a.put("sockets/db", json!({"type": "tcp", "proxy_protocol": "v1"})).await;
    a.put("tunnels/db", json!({"socket": "db", "keys": [b.key.line()]})).await;
    let port = a.port_of("db").await;
    linked(&a, 2).await;
    eventually("the tunnel is known", async || (b.api("GET", "/v1/tunnels/db", None).await.0 == 200).then_some(()))
        .await;
    let origin = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let owner = Ssh::start(&b, &[&format!("db:5432:{}", origin.local_addr().unwrap())]).await;
    let visit = async || {
        let mut tcp = TcpStream::connect((a.ip, port)).await.ok()?;
        tcp.write_all(b"first\n").await.ok()?;
        let (tunnel, _) = tokio::time::timeout(Duration::from_secs(1), origin.accept()).await.ok()?.ok()?;
        Some((tcp, tunnel))
    };
    let (tcp, far) = eventually("a visitor of a is at the origin", visit).await;
    let (from, to) = (tcp.local_addr().unwrap(), tcp.peer_addr().unwrap());
    let mut lines = BufReader::new(far).lines();
    let told = within(DEADLINE, "the origin is told", lines.next_line()).await.unwrap().unwrap();
    assert_eq!(told, format!("PROXY TCP4 {} {} {} {}", from.ip(), to.ip(), from.port(), to.port()));
    assert_eq!(lines.next_line().await.unwrap().unwrap(), "first");
    // What OpenSSH's client says of each connection.
    let says = format!("originator {} port {}", from.ip(), from.port());
    owner.program.wait_for(&says, 1, DEADLINE).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_websockets_and_grpc_cross_between_nodes() {
    let etcd = EtcdCluster::start(1).await;
    let [a, b, _c] = fleet(&etcd, |opts| opts).await;
    let mut grpc = Grpc::start(None).await;
    let web = json!({"type": "http", "hostnames": ["web.edge.localhost"], "upstream": {"http2": true}});
    a.put("sockets/web", web).await;
    a.put("sockets/chat", json!({"type": "http", "hostnames": ["chat.edge.localhost"]})).await;
    for socket in ["web", "chat"] {
        a.put(&format!("tunnels/{socket}-1"), json!({"socket": socket, "keys": [b.key.line()]})).await;
    }
    linked(&a, 2).await;
    becomes(&b, 503).await;
    let chat = Origin::http().await;
    let _calls = Ssh::start(&b, &[&format!("web:80:127.0.0.1:{}", grpc.port)]).await;
    let _chat = Ssh::start(&b, &[&format!("chat:80:{}", chat.target())]).await;
    eventually("the tunnel is known", async || {
        let mut tcp = TcpStream::connect(a.addr("http")).await.ok()?;
        (request(&mut tcp, "GET / HTTP/1.1\r\n", "chat.edge.localhost", b"").await.0 == 200).then_some(())
    })
    .await;
    let tcp = TcpStream::connect(a.addr("http")).await.unwrap();
    let mut socket = WebSocket::connect(Box::new(tcp), "chat.edge.localhost", "/ws").await;
    for n in 0..100_usize {
        let message = vec![b'a' + (n % 26) as u8; n * 97];
        socket.write(2, &message).await;
        assert_eq!(within(DEADLINE, "the echo", socket.read()).await, Some((2, message)));
    }
    grpc.calls("calls", &a, true, 500).await;
    grpc.calls("calls", &a, false, 500).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_session_of_tls_resumes_at_another_node() {
    let etcd = EtcdCluster::start(1).await;
    let [a, b, _c] = fleet(&etcd, |opts| opts).await;
    let (ca, name) = (Ca::new(), "shop.example.test");
    a.put("certificates/shop", ca.certify(name, 1, &rcgen::PKCS_ECDSA_P256_SHA256)).await;
    a.put("ticket-keys/default", json!({"keys": [data_encoding::BASE64.encode(&[7; 32])]})).await;
    let (ca, session) = (ca.file("ca.pem"), ca.file("session"));
    let session = session.to_str().unwrap();
    eventually("the records are at b", async || {
        let record = b.api("GET", "/v1/ticket-keys/default", None).await.0;
        let shown = tls_connect(b.addr("https"), name, trusting(&std::fs::read(&ca).unwrap(), &["http/1.1"])).await;
        (record == 200 && shown.is_ok()).then_some(())
    })
    .await;
    for version in ["-tls1_3", "-tls1_2"] {
        let said = s_client(&a, name, &ca, &[version, "-sess_out", session]).await;
        assert!(said.contains("New, TLSv1."), "{said}");
        let said = s_client(&b, name, &ca, &[version, "-sess_in", session]).await;
        assert!(said.contains("Reused, TLSv1."), "{version}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_nodes_take_a_new_ca_while_visitors_go_on() {
    let etcd = EtcdCluster::start(1).await;
    let [mut a, mut b, mut c] = fleet(&etcd, |opts| opts).await;
    a.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    a.put("tunnels/web-1", json!({"socket": "web", "keys": [b.key.line()]})).await;
    linked(&a, 2).await;
    becomes(&b, 503).await;
    let _owner = tunnel(&b, &b, named("served").await).await;
    for node in [&a, &c] {
        comes_to_be(node, DEADLINE, "served").await;
    }
    let visitors = Visitors::of(&a);
    let (old, new) = (etcd.path("fleet"), etcd.path("fleet-new"));
    for name in ["a", "b", "c"] {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_adit"));
        assert!(command.arg("ca").arg("--dir").arg(&new).arg(name).output().unwrap().status.success());
    }
    let read = |dir: &std::path::Path, file: &str| std::fs::read_to_string(dir.join(file)).unwrap();
    // The new one beside the old, then the certificates, then the old one goes.
    let both = read(&old, "ca.pem") + &read(&new, "ca.pem");
    std::fs::write(old.join("ca.pem"), both).unwrap();
    told_to_read(&mut [&mut a, &mut b, &mut c], 1).await;
    for name in ["a", "b", "c"] {
        for kind in ["pem", "key"] {
            std::fs::write(old.join(format!("{name}.{kind}")), read(&new, &format!("{name}.{kind}"))).unwrap();
        }
    }
    told_to_read(&mut [&mut a, &mut b, &mut c], 2).await;
    std::fs::write(old.join("ca.pem"), read(&new, "ca.pem")).unwrap();
    told_to_read(&mut [&mut a, &mut b, &mut c], 3).await;
    // One that begins anew has nothing of the old one.
    c.kill9();
    c.restart().await;
    linked(&c, 2).await;
    comes_to_be(&c, DEADLINE, "served").await;
    let answers = visitors.end().await;
    assert!(answers.iter().all(|(.., answer)| answer == "served"));
    assert!(answers.len() > 20, "{} visits", answers.len());
}

async fn told_to_read(nodes: &mut [&mut Node], times: usize) {
    for node in nodes {
        let program = node.program();
        program.signal("HUP");
        program.wait_for("certificates read again", times, DEADLINE).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn fleet_a_node_takes_only_so_many_connections_of_others() {
    let etcd = EtcdCluster::start(1).await;
    let few = |opts: NodeOpts| opts.set("fleet", "private = [\"127.0.0.0/8\"]").set("fleet", "streams = 4");
    let [a, _b, _c] = fleet(&etcd, few).await;
    let mut connections = Vec::new();
    for _ in 0..20 {
        let mut tcp = TcpStream::connect(a.addr("fleet")).await.unwrap();
        // As node "a" says hello, to wait for what it may ask.
        tcp.write_all(b"adit\x01\x02\x00\x04\x00\x01a\x00").await.unwrap();
        connections.push(tcp);
    }
    // Twice as many as streams, links included; who waits is let wait.
    eventually("the others are shut out", async || {
        let mut buffer = [0];
        let open = connections
            .iter()
            .filter(|tcp| matches!(tcp.try_read(&mut buffer), Err(error) if error.kind() == ErrorKind::WouldBlock));
        (open.count() <= 8).then_some(())
    })
    .await;
    drop(connections);
    linked(&a, 2).await;
}
