//! What visitors and owners are told when something is not there: the right
//! status, the right words, nothing about other tenants.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

async fn get(node: &Node, host: &str, accept: &str) -> (u16, String, String) {
    let mut tcp = TcpStream::connect(node.addr("http")).await.unwrap();
    let head = format!("GET /secret-path HTTP/1.1\r\naccept: {accept}\r\n");
    let (status, headers, body) = within(DEADLINE, "an answer", request(&mut tcp, &head, host, b"")).await;
    (status, headers.to_lowercase(), String::from_utf8(body).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_name_gets_404_that_says_nothing_of_others() {
    let node = Node::start().await;
    node.put("sockets/tenant", json!({"type": "http", "hostnames": ["tenant.edge.localhost"]})).await;
    for host in ["nobody.edge.localhost", "edge.localhost", "else.example", "127.0.0.1"] {
        let (status, headers, body) = get(&node, host, "text/html").await;
        assert_eq!(status, 404, "{host}");
        assert!(headers.contains("content-type: text/html") && !body.contains("tenant"), "{headers}{body}");
    }
    let (_, headers, body) = get(&node, "nobody.edge.localhost", "application/json").await;
    assert!(headers.contains("json"), "{headers}");
    assert!(serde_json::from_str::<serde_json::Value>(&body).unwrap().is_object());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_the_certificate_does_not_cover_gets_421() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let hostnames = json!(["web.edge.localhost", "web.example.com"]);
    node.put("sockets/web", json!({"type": "http", "hostnames": hostnames})).await;
    node.put("tunnels/web-1", json!({"socket": "web", "keys": [node.key.line()]})).await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    let url = format!("https://web.edge.localhost:{}/", node.addr("https").port());
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    assert_eq!(curl(&node, &["-H", "Host: web.example.com", &url]).await.0, 421);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_without_a_tunnel_a_refusing_and_a_silent_origin_are_told_apart() {
    let node = Node::with(NodeOpts::default().set("http", "first_byte = \"1s\"")).await;
    node.put("sockets/idle", json!({"type": "http", "hostnames": ["idle.edge.localhost"]})).await;
    let refusing = Origin::refusing().await;
    let silent = Origin::silent().await;
    let (gone, mute) = (format!("gone:80:{refusing}"), format!("mute:80:{}", silent.target()));
    let _ssh = Ssh::start(&node, &[&gone, &mute]).await;
    let (status, headers, body) = get(&node, "idle.edge.localhost", "text/html").await;
    assert_eq!(status, 503);
    assert!(headers.contains("retry-after: ") && body.contains("not connected"), "{headers}{body}");
    let (status, _, body) = get(&node, "gone.edge.localhost", "text/html").await;
    assert!(status == 502 && body.contains("refused"), "{status} {body}");
    let (status, _, body) = get(&node, "mute.edge.localhost", "text/html").await;
    assert!(status == 504 && body.contains("did not answer"), "{status} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_hello_in_single_bytes_is_understood() {
    let node = Node::start().await;
    let name = "pt.edge.localhost";
    let (web, sealed) = (Origin::http().await, Origin::raw_tls(name).await);
    let (web_to, sealed_to) = (format!("web:80:{}", web.target()), format!("passthrough/pt:{}", sealed.target()));
    let _ssh = Ssh::start(&node, &[&web_to, &sealed_to]).await;
    let ca = std::fs::read(node.ca()).unwrap();
    for (name, ca) in [("web.edge.localhost", ca), (name, sealed.certificate.clone().unwrap().into_bytes())] {
        let (near, far) = tokio::io::duplex(1 << 16);
        let tcp = TcpStream::connect(node.addr("https")).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        tokio::spawn(dribble(far, tcp));
        let connector = tokio_rustls::TlsConnector::from(trusting(&ca, &[]));
        let tls = connector.connect(name.try_into().unwrap(), near);
        within(DEADLINE, "a handshake in single bytes", tls).await.unwrap();
    }
}

/// Sends the first 2,000 bytes one by one, then as they come.
async fn dribble(near: tokio::io::DuplexStream, tcp: TcpStream) -> std::io::Result<()> {
    let (mut from, mut to) = tokio::io::split(near);
    let (mut tcp_from, mut tcp_to) = tcp.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut tcp_from, &mut to).await });
    for _ in 0..2000 {
        tcp_to.write_u8(from.read_u8().await?).await?;
    }
    tokio::io::copy(&mut from, &mut tcp_to).await.map(|_| ())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_node_refuses_an_unknown_key_and_a_foreign_name() {
    let node = Node::with(NodeOpts::default().set("ssh", "mode = \"closed\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let stranger = Key::new(dir.path(), "ed25519");
    for id in ["mine", "other"] {
        node.put(&format!("sockets/{id}"), json!({"type": "http", "hostnames": [format!("{id}.test")]})).await;
    }
    node.put("tunnels/mine-1", json!({"socket": "mine", "keys": [node.key.line()]})).await;
    let origin = Origin::http().await;
    let forward = |name: &str| SshOpts::new(&[&format!("{name}:80:{}", origin.target())]);
    let mut refused = Ssh::launch(&node, forward("mine").key(&stranger));
    assert!(!refused.program.ended(DEADLINE).await.success());
    let mut foreign = Ssh::launch(&node, forward("other"));
    assert!(!foreign.program.ended(DEADLINE).await.success());
    let _mine = Ssh::with(&node, forward("mine")).await;
    assert_eq!(get(&node, "mine.test", "*/*").await.0, 404, "the origin answers");
    let served = curl(&node, &["-H", "Host: mine.test", &format!("http://x:{}/", node.addr("http").port())]).await;
    assert_eq!(served.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_who_says_nothing_is_let_go() {
    let node = Node::with(NodeOpts::default().set("hello", "deadline = \"1s\"")).await;
    for listener in ["http", "https"] {
        let mut tcp = TcpStream::connect(node.addr(listener)).await.unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(5), tcp.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "{listener} keeps a silent visitor");
    }
}
