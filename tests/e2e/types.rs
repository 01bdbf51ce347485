//! Each of the five types end to end: the real OpenSSH client, a real origin,
//! a visitor who checks every byte.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::Request;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::*;

const MIB: u64 = 1 << 20;
/// One big transfer each way.
const BIG: u64 = 100 * MIB;
/// Long enough for a debug build on two shared cores.
const TRANSFER: Duration = Duration::from_secs(120);

/// A published raw service, whatever the type around it.
#[derive(Clone)]
struct Raw {
    addr: SocketAddr,
    tls: Option<(String, Vec<u8>)>,
}

impl Raw {
    /// Connects a visitor and sends the origin's command.
    async fn ask(&self, command: &str) -> Io {
        let mut io: Io = match &self.tls {
            None => Box::new(TcpStream::connect(self.addr).await.unwrap()),
            Some((name, ca)) => tls_connect(self.addr, name, trusting(ca, &[])).await.unwrap(),
        };
        if !command.is_empty() {
            io.write_all(format!("{command}\n").as_bytes()).await.unwrap();
            io.flush().await.unwrap();
        }
        io
    }

    async fn down(&self, n: u64) {
        let mut io = self.ask(&format!("DOWN {n}")).await;
        let read = within(TRANSFER, "a download", Pattern::read(None, &mut io)).await;
        assert_eq!(read, Ok(n));
    }

    async fn up(&self, n: u64) {
        let mut io = self.ask(&format!("UP {n}")).await;
        within(TRANSFER, "an upload", async {
            Pattern::write(n, &mut io).await.unwrap();
            assert_eq!(rest(&mut io).await, format!("exact {n}\n"));
        })
        .await;
    }
}

async fn rest(io: &mut Io) -> String {
    let mut text = String::new();
    within(DEADLINE, "an answer", io.read_to_string(&mut text)).await.unwrap();
    text
}

/// A raw origin behind each of the three raw types.
async fn raw_of(node: &Node, kind: &str) -> (Ssh, Origin, Raw) {
    let name = format!("{kind}.edge.localhost");
    let origin = if kind == "passthrough" { Origin::raw_tls(&name).await } else { Origin::raw().await };
    let ssh = Ssh::start(node, &[&format!("{kind}/{kind}:{}", origin.target())]).await;
    let raw = match kind {
        "passthrough" => {
            let ca = origin.certificate.clone().unwrap().into_bytes();
            Raw { addr: node.addr("https"), tls: Some((name, ca)) }
        }
        _ => {
            let addr = SocketAddr::new(node.ip, node.port_of(kind).await);
            let tls = (kind == "tls").then(|| (name, std::fs::read(node.ca()).unwrap()));
            Raw { addr, tls }
        }
    };
    (ssh, origin, raw)
}

/// An HTTP origin behind `http` (on demand) or `https` (by record: its
/// certificate is self-signed, which only a record can allow).
async fn http_of(node: &Node, kind: &str) -> (Ssh, Origin, String) {
    let name = format!("{kind}.edge.localhost");
    let origin = if kind == "https" { Origin::https(&name).await } else { Origin::http().await };
    if kind == "https" {
        let socket = json!({"type": "https", "hostnames": [name], "upstream": {"tls": {"verify": false}}});
        node.put("sockets/https", socket).await;
        node.put("tunnels/https-1", json!({"socket": "https", "keys": [node.key.line()]})).await;
    }
    let ssh = Ssh::start(node, &[&format!("{kind}:80:{}", origin.target())]).await;
    (ssh, origin, name)
}

async fn raw_type(kind: &str) {
    let node = Node::start().await;
    let (_ssh, mut origin, raw) = raw_of(&node, kind).await;
    raw.down(BIG).await;
    raw.up(BIG).await;
    let each = size(BIG, 8 * MIB);
    let mut all = JoinSet::new();
    for i in 0..8 {
        let raw = raw.clone();
        all.spawn(async move { if i % 2 == 0 { raw.down(each).await } else { raw.up(each).await } });
    }
    all.join_all().await;

    // The visitor ends first and still gets the answer.
    let mut io = raw.ask("EOF").await;
    Pattern::write(100_000, &mut io).await.unwrap();
    io.shutdown().await.unwrap();
    assert_eq!(rest(&mut io).await, "exact 100000\n");

    // The origin ends first and still gets what the visitor sends.
    let mut io = raw.ask("CLOSE").await;
    assert_eq!(rest(&mut io).await, "bye\n");
    Pattern::write(100_000, &mut io).await.unwrap();
    io.shutdown().await.unwrap();
    let report = within(DEADLINE, "the origin's report", origin.reports.recv()).await;
    assert_eq!(report.as_deref(), Some("exact 100000\n"));
}

async fn http_type(kind: &str) {
    let node = Node::start().await;
    let (_ssh, _origin, name) = http_of(&node, kind).await;
    let (http, https) = (node.addr("http").port(), node.addr("https").port());
    for url in [format!("http://{name}:{http}/"), format!("https://{name}:{https}/")] {
        for version in ["--http1.1", "--http2"] {
            let got = curl(&node, &[version, &url]).await;
            assert_eq!(got, (200, "hello from the origin\n".into()), "{version} {url}");
        }
    }

    let mut sender = h2(&node, &name).await;
    let base = format!("https://{name}:{https}");
    within(TRANSFER, "a download", get_exact(&mut sender, &format!("{base}/bytes/{BIG}"), BIG)).await;
    within(TRANSFER, "an upload", put_exact(&mut sender, &format!("{base}/sink"), BIG)).await;
    let each = size(BIG, 8 * MIB);
    let mut all = JoinSet::new();
    for i in 0..8 {
        let (mut sender, base) = (sender.clone(), base.clone());
        all.spawn(async move {
            if i % 2 == 0 {
                get_exact(&mut sender, &format!("{base}/bytes/{each}"), each).await;
            } else {
                put_exact(&mut sender, &format!("{base}/sink"), each).await;
            }
        });
    }
    within(TRANSFER, "eight at once", all.join_all()).await;

    // A visitor may end its side after the request and still gets the answer.
    let mut tcp = TcpStream::connect(node.addr("http")).await.unwrap();
    let head = format!("GET /slow/200 HTTP/1.1\r\nhost: {name}\r\nconnection: close\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.unwrap();
    tcp.shutdown().await.unwrap();
    let (status, _) = within(DEADLINE, "an answer", read_answer(&mut tcp)).await;
    assert_eq!(status, 200);
}

async fn put_exact(sender: &mut hyper::client::conn::http2::SendRequest<Body>, url: &str, n: u64) {
    let request = Request::post(url).body(pattern_body(n)).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(body, format!("exact {n}\n").as_bytes());
}

#[tokio::test(flavor = "multi_thread")]
async fn http_end_to_end() {
    http_type("http").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn https_end_to_end() {
    http_type("https").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tcp_end_to_end() {
    raw_type("tcp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_end_to_end() {
    raw_type("tls").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn passthrough_end_to_end() {
    raw_type("passthrough").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_echoes_over_http_and_https() {
    let node = Node::start().await;
    let (_ssh, _origin, name) = http_of(&node, "http").await;
    let ca = std::fs::read(node.ca()).unwrap();
    let plain: Io = Box::new(TcpStream::connect(node.addr("http")).await.unwrap());
    let tls = tls_connect(node.addr("https"), &name, trusting(&ca, &["http/1.1"])).await.unwrap();
    for io in [plain, tls] {
        let mut socket = within(DEADLINE, "the upgrade", WebSocket::connect(io, &name, "/ws")).await;
        for n in [0, 1, 125, 126, 70_000] {
            let message = Pattern::default().next(n).to_vec();
            socket.write(2, &message).await;
            let echoed = within(DEADLINE, "an echo", socket.read()).await;
            assert_eq!(echoed, Some((2, message)));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_one_by_one() {
    let node = Node::start().await;
    let (_ssh, _origin, name) = http_of(&node, "http").await;
    let mut tcp = TcpStream::connect(node.addr("http")).await.unwrap();
    tcp.write_all(format!("GET /sse HTTP/1.1\r\nhost: {name}\r\n\r\n").as_bytes()).await.unwrap();
    let mut seen = String::new();
    let mut at = Vec::new();
    within(DEADLINE, "three events", async {
        while at.len() < 3 {
            seen.push(tcp.read_u8().await.unwrap() as char);
            if seen.ends_with(&format!("data: {}\n\n", at.len())) {
                at.push(tokio::time::Instant::now());
            }
        }
    })
    .await;
    // The origin waits 300 ms between two: buffered, they would come together.
    assert!(at[2] - at[0] > Duration::from_millis(400), "{:?}", at[2] - at[0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_short_connections() {
    let node = Node::start().await;
    let (_http_ssh, _http_origin, name) = http_of(&node, "http").await;
    let (_tcp_ssh, _tcp_origin, raw) = raw_of(&node, "tcp").await;
    let mut all = JoinSet::new();
    // 16 at once, a thousand of each type in all.
    for _ in 0..16 {
        let (raw, name, addr) = (raw.clone(), name.clone(), node.addr("http"));
        all.spawn(async move {
            for _ in 0..1000 / 16 + 1 {
                raw.down(100).await;
                let mut tcp = TcpStream::connect(addr).await.unwrap();
                let got = request(&mut tcp, "GET / HTTP/1.1\r\n", &name, b"");
                let (status, _, body) = within(DEADLINE, "an answer", got).await;
                assert_eq!((status, body.as_slice()), (200, &b"hello from the origin\n"[..]));
            }
        });
    }
    within(TRANSFER, "a thousand connections", all.join_all()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn h2_carries_a_hundred_streams() {
    let node = Node::start().await;
    let (_ssh, _origin, name) = http_of(&node, "http").await;
    let sender = h2(&node, &name).await;
    let url = format!("https://{name}:{}", node.addr("https").port());
    let mut all = JoinSet::new();
    for i in 0..100 {
        let (mut sender, n) = (sender.clone(), 10_000 + i);
        let url = format!("{url}/bytes/{n}");
        all.spawn(async move { get_exact(&mut sender, &url, n).await });
    }
    within(TRANSFER, "a hundred streams", all.join_all()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_speaks_first_greets_a_silent_visitor() {
    let node = Node::start().await;
    let origin = Origin::greeting().await;
    let (tcp, tls) = (format!("tcp/mail:{}", origin.target()), format!("tls/mails:{}", origin.target()));
    let _ssh = Ssh::start(&node, &[&tcp, &tls]).await;
    let ca = std::fs::read(node.ca()).unwrap();
    for (socket, tls) in [("mail", None), ("mails", Some(("mails.edge.localhost".to_owned(), ca)))] {
        let addr = SocketAddr::new(node.ip, node.port_of(socket).await);
        let mut io = Raw { addr, tls }.ask("").await;
        let mut greeting = [0; 21];
        within(DEADLINE, "the greeting", io.read_exact(&mut greeting)).await.unwrap();
        assert_eq!(&greeting, b"220 mail.test ESMTP\r\n");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_works_like_ipv4() {
    if !has_ipv6() {
        return;
    }
    let node = Node::with(NodeOpts::default().ipv6()).await;
    let ip = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let (origin, web) = (Origin::raw_on_ipv6().await, Origin::http().await);
    let mut opts = SshOpts::new(&[&format!("tcp/tcp:{}", origin.target()), &format!("web:80:{}", web.target())]);
    opts.ip = Some(ip);
    let _ssh = Ssh::with(&node, opts).await;
    let raw = Raw { addr: SocketAddr::new(ip, node.port_of("tcp").await), tls: None };
    raw.down(MIB).await;
    raw.up(MIB).await;
    let name = "web.edge.localhost";
    let mut tcp = TcpStream::connect(node.addr_on("http", ip)).await.unwrap();
    let (status, _, _) = request(&mut tcp, "GET / HTTP/1.1\r\n", name, b"").await;
    assert_eq!(status, 200);
    let ca = std::fs::read(node.ca()).unwrap();
    let mut tls = tls_connect(node.addr_on("https", ip), name, trusting(&ca, &[])).await.unwrap();
    let (status, _, _) = request(&mut tls, "GET / HTTP/1.1\r\n", name, b"").await;
    assert_eq!(status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allocated_port_is_told_to_the_client() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let ssh = Ssh::start(&node, &[&format!("0:{}", origin.target())]).await;
    let port = ssh.allocated_port().await;
    Raw { addr: SocketAddr::new(node.ip, port), tls: None }.down(MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_arrives_whole_at_an_origin_that_answered_early_and_reads_slowly() {
    let node = Node::start().await;
    let mut origin = Origin::raw().await;
    let _ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", origin.target())]).await;
    let mut tcp = TcpStream::connect(SocketAddr::new(node.ip, node.port_of("raw").await)).await.unwrap();
    // More than the windows on the way hold: its end waits in the node.
    let n = 40_000_000;
    tcp.write_all(b"SLOW\n").await.unwrap();
    within(DEADLINE, "the upload", Pattern::write(n, &mut tcp)).await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "bye\n");
    let report = within(DEADLINE, "the origin's report", origin.reports.recv()).await;
    assert_eq!(report, Some(format!("exact {n}\n")));
}
