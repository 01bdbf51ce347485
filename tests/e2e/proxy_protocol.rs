//! The PROXY protocol with those who made it: haproxy in front of a node and as
//! an origin, and nginx as an origin.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::harness::*;

/// Where the proxy's connections come from; the one address that is believed.
const PROXY: &str = "127.8.8.8";

async fn listens(port: u16, program: &mut Program) {
    eventually("the program listens", async || {
        assert!(program.runs(), "{}", program.output());
        TcpStream::connect(("127.0.0.1", port)).await.ok()
    })
    .await;
}

async fn haproxy(dir: &Path, port: u16, rest: &str) -> Program {
    let config = dir.join(format!("haproxy-{port}.cfg"));
    let text = format!(
        "global\n    maxconn 500\ndefaults\n    mode http\n    timeout connect 5s\n    timeout client 20s\n    \
         timeout server 20s\n{rest}\n"
    );
    std::fs::write(&config, text).unwrap();
    let mut command = Command::new("haproxy");
    command.arg("-db").arg("-f").arg(&config);
    let mut program = Program::start("haproxy", command);
    listens(port, &mut program).await;
    program
}

/// An origin that tells what the header said: source, ports, name, id; and on
/// which of its connections.
async fn telling_haproxy(dir: &Path, port: u16, tls: bool) -> Program {
    let ssl = if tls {
        let made = rcgen::generate_simple_self_signed(["origin.test".to_owned()]).unwrap();
        let pem = dir.join("origin.pem");
        std::fs::write(&pem, made.cert.pem() + &made.signing_key.serialize_pem()).unwrap();
        format!("ssl crt {} alpn h2,http/1.1", pem.display())
    } else {
        String::new()
    };
    let told = "%[src] %[dst_port] %[fc_pp_authority] %[fc_pp_unique_id] xff=%[req.hdr(x-forwarded-for)]";
    let rest = format!(
        "frontend f\n    bind 127.0.0.1:{port} accept-proxy {ssl}\n    \
         http-request return status 200 content-type text/plain lf-string \"{told}\"\n"
    );
    haproxy(dir, port, &rest).await
}

async fn free_port() -> u16 {
    Origin::refusing().await.port()
}

/// What a visitor from this address is answered, on so many requests of one connection.
async fn asked_from(source: &str, to: SocketAddr, count: usize) -> Vec<String> {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
    let mut tcp = socket.connect(to).await.unwrap();
    let ask = async {
        let mut answers = Vec::new();
        for _ in 0..count {
            tcp.write_all(b"GET /headers HTTP/1.1\r\nHost: web.edge.localhost\r\n\r\n").await.unwrap();
            let mut got = Vec::new();
            let body = loop {
                let text = String::from_utf8_lossy(&got).into_owned();
                if let Some((head, body)) = text.split_once("\r\n\r\n") {
                    let len = head
                        .lines()
                        .find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
                    if body.len() >= len.unwrap_or(0) {
                        assert!(head.starts_with("HTTP/1.1 200"), "{text}");
                        break body.to_owned();
                    }
                }
                assert!(tcp.read_buf(&mut got).await.unwrap() > 0, "{text}");
            };
            answers.push(body);
        }
        answers
    };
    within(DEADLINE, "answers", ask).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_is_told_who_visits_on_a_connection_of_his_own() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, version) in [("http", "v1"), ("http", "v2"), ("https", "v2")] {
        let node = Node::start().await;
        let port = free_port().await;
        let _origin = telling_haproxy(dir.path(), port, kind == "https").await;
        let upstream = json!({"tls": {"verify": false}, "http2": kind == "https"});
        let record =
            json!({"type": kind, "hostnames": ["web.edge.localhost"], "proxy_protocol": version, "upstream": upstream});
        node.put("sockets/web", record).await;
        node.put("tunnels/web", json!({"socket": "web", "keys": [node.key.line()]})).await;
        let _ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{port}")]).await;
        let addr = node.addr("http");
        // One after another, so that a kept connection of one could serve the next.
        for source in ["127.1.1.1", "127.2.2.2", "127.1.1.1"] {
            for answer in asked_from(source, addr, 3).await {
                assert!(answer.starts_with(&format!("{source} {}", addr.port())), "{kind} {version}: {answer}");
                assert!(answer.ends_with(&format!("xff={source}")), "{answer}");
            }
        }
        let url = format!("https://web.edge.localhost:{}/", node.addr("https").port());
        let (status, answer) = curl(&node, &[&url]).await;
        let words: Vec<&str> = answer.split(' ').collect();
        assert_eq!(status, 200);
        match version {
            "v2" => assert!(words[2] == "web.edge.localhost" && words[3].len() == 32, "{answer}"),
            _ => assert!(answer.starts_with(&format!("127.0.0.1 {}", node.addr("https").port())), "{answer}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_and_a_raw_origin_are_told_too() {
    let dir = tempfile::tempdir().unwrap();
    let port = free_port().await;
    let config = format!(
        "daemon off;\nmaster_process off;\npid {0}/pid;\nerror_log stderr;\nevents {{}}\nhttp {{\n access_log off;\n \
         client_body_temp_path {0}/b;\n proxy_temp_path {0}/p;\n fastcgi_temp_path {0}/f;\n uwsgi_temp_path {0}/u;\n \
         scgi_temp_path {0}/s;\n server {{\n listen 127.0.0.1:{port} proxy_protocol;\n location / {{\n default_type text/plain;\n \
         return 200 \"$proxy_protocol_addr $proxy_protocol_server_port\\n\";\n }}\n }}\n}}\n",
        dir.path().display()
    );
    std::fs::write(dir.path().join("nginx.conf"), config).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-c").arg(dir.path().join("nginx.conf")).arg("-p").arg(dir.path());
    let mut nginx = Program::start("nginx", command);
    listens(port, &mut nginx).await;
    let node = Node::start().await;
    node.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"], "proxy_protocol": "v1"})).await;
    node.put("sockets/raw", json!({"type": "tcp", "proxy_protocol": "v2"})).await;
    for id in ["web", "raw"] {
        node.put(&format!("tunnels/{id}"), json!({"socket": id, "keys": [node.key.line()]})).await;
    }
    let forwards = ["web", "raw"].map(|id| format!("{id}:80:127.0.0.1:{port}"));
    let _ssh = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    for (name, addr) in [("web", node.addr("http")), ("raw", SocketAddr::new(node.ip, node.port_of("raw").await))] {
        let answers = asked_from("127.3.3.3", addr, 2).await;
        assert_eq!(answers, vec![format!("127.3.3.3 {}\n", addr.port()); 2], "{name}");
    }
}

/// The header with which a connection from here begins.
async fn header(listener: &TcpListener) -> Vec<u8> {
    let read = async {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut header = vec![0; 16];
        tcp.read_exact(&mut header).await.unwrap();
        header.resize(16 + usize::from(u16::from_be_bytes([header[14], header[15]])), 0);
        tcp.read_exact(&mut header[16..]).await.unwrap();
        header
    };
    within(DEADLINE, "a header", read).await
}

#[tokio::test(flavor = "multi_thread")]
async fn haproxy_takes_what_is_told_of_a_certificate_and_nothing_that_was_changed() {
    let (dir, node) = (tempfile::tempdir().unwrap(), Node::start().await);
    let port = free_port().await;
    let _origin = telling_haproxy(dir.path(), port, false).await;
    let plain = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let visitor = rcgen::generate_simple_self_signed(["visitor.test".to_owned()]).unwrap();
    let asked = json!({"client_certificates": {"ca_pem": visitor.cert.pem(), "allow_subjects": ["*"]}});
    for id in ["told", "seen"] {
        let record = json!({"type": "tls", "proxy_protocol": "v2", "gate": asked});
        node.put(&format!("sockets/{id}"), record).await;
        node.put(&format!("tunnels/{id}"), json!({"socket": id, "keys": [node.key.line()]})).await;
    }
    let forwards = [format!("told:80:127.0.0.1:{port}"), format!("seen:80:{}", plain.local_addr().unwrap())];
    let _ssh = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    let (pem, key) = (dir.path().join("visitor.pem"), dir.path().join("visitor.key"));
    std::fs::write(&pem, visitor.cert.pem()).unwrap();
    std::fs::write(&key, visitor.signing_key.serialize_pem()).unwrap();
    let url = |id: &str, port: u16| format!("https://{id}.edge.localhost:{port}/");
    let shown = ["--cert", pem.to_str().unwrap(), "--key", key.to_str().unwrap()];
    let told = url("told", node.port_of("told").await);
    let (status, answer) = curl(&node, &[&shown[..], &[&told]].concat()).await;
    let words: Vec<&str> = answer.split(' ').collect();
    assert_eq!((status, words[0], words[2], words[3].len()), (200, "127.0.0.1", "told.edge.localhost", 32), "{answer}");

    // The same header again, as it was and with one bit of its certificate's part changed.
    let seen = url("seen", node.port_of("seen").await);
    let mut command = Command::new("curl");
    command.args(["-s", "--max-time", "20", "--noproxy", "*", "--cacert"]).arg(node.ca()).args(shown);
    command.args(["--connect-to", &format!("::{}:", node.ip), &seen]);
    let _curl = Program::start("curl", command);
    let mut header = header(&plain).await;
    let asks = async |header: &[u8]| {
        let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        let _ = tcp.write_all(&[header, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"].concat()).await;
        let mut got = Vec::new();
        let _ = within(DEADLINE, "an end", tcp.read_to_end(&mut got)).await;
        String::from_utf8_lossy(&got).into_owned()
    };
    assert!(asks(&header).await.starts_with("HTTP/1.1 200"));
    let at = header.windows(7).position(|word| word == b"TLSv1.3").unwrap();
    header[at + 6] ^= 1;
    assert_eq!(asks(&header).await, "");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listed_proxy_says_who_visits_and_nobody_else_does() {
    let opts = NodeOpts::default()
        .set("ingress", &format!("proxy_protocol_from = [\"{PROXY}\"]"))
        .set("ingress", "connections_per_address = 3")
        .set("node", "exempt_loopback = false")
        .set("hello", "deadline = \"1s\"");
    let node = Node::with(opts).await;
    let (web, raw) = (Origin::http().await, Origin::raw().await);
    let forwards = [format!("web:80:{}", web.target()), format!("tcp/raw:{}", raw.target())];
    let _ssh = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    let (http, tcp) = (node.addr("http"), SocketAddr::new(node.ip, node.port_of("raw").await));
    let dir = tempfile::tempdir().unwrap();
    for send in ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"] {
        let (front, raw_front) = (free_port().await, free_port().await);
        let rest = format!(
            "listen web\n    bind 127.0.0.1:{front}\n    mode tcp\n    server s {http} {send} source {PROXY}\n\
             listen raw\n    bind 127.0.0.1:{raw_front}\n    mode tcp\n    server s {tcp} {send} source {PROXY}\n"
        );
        let _haproxy = haproxy(dir.path(), raw_front, &rest).await;
        let front = SocketAddr::from(([127, 0, 0, 1], front));
        let told = asked_from("127.4.4.4", front, 2).await;
        for told in told {
            assert!(told.contains("x-forwarded-for: 127.4.4.4\n"), "{send}: {told}");
            assert!(told.contains(&format!("x-forwarded-port: {}\n", front.port())), "{send}: {told}");
        }
        // Whom the header names has the share, not the proxy: six at once from two.
        let mut inside = Vec::new();
        for source in ["127.5.5.1", "127.5.5.2"] {
            for _ in 0..3 {
                let socket = TcpSocket::new_v4().unwrap();
                socket.bind(SocketAddr::new(source.parse().unwrap(), 0)).unwrap();
                let mut tcp = socket.connect(SocketAddr::from(([127, 0, 0, 1], raw_front))).await.unwrap();
                // With data right behind the header.
                tcp.write_all(b"ECHO\nx").await.unwrap();
                assert_eq!(within(DEADLINE, "an echo", tcp.read_u8()).await.unwrap(), b'x');
                inside.push(tcp);
            }
        }
    }

    let from_proxy = async |bytes: &[u8]| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(PROXY.parse().unwrap(), 0)).unwrap();
        let mut tcp = socket.connect(http).await.unwrap();
        tcp.write_all(bytes).await.unwrap();
        let begun = Instant::now();
        let mut got = Vec::new();
        let _ = within(DEADLINE, "an end", tcp.read_to_end(&mut got)).await;
        (String::from_utf8_lossy(&got).into_owned(), begun.elapsed())
    };
    let request = b"GET / HTTP/1.1\r\nHost: web.edge.localhost\r\nConnection: close\r\n\r\n";
    // A proxy without a header, or with half of one, is let go unanswered.
    assert_eq!(from_proxy(request).await.0, "");
    let (said, after) = from_proxy(b"PROXY TCP4 127.6.6.6 ").await;
    assert!(said.is_empty() && after >= Duration::from_millis(800) && after < DEADLINE, "{said:?} {after:?}");
    // One that speaks for itself is taken for the visitor.
    let own = [b"PROXY UNKNOWN\r\n".as_slice(), request].concat();
    assert!(from_proxy(&own).await.0.starts_with("HTTP/1.1 200"));
    // From anywhere else a header is no HTTP.
    let mut other = TcpStream::connect(http).await.unwrap();
    other.write_all(&[b"PROXY TCP4 127.6.6.6 127.0.0.1 1 2\r\n".as_slice(), request].concat()).await.unwrap();
    let mut got = Vec::new();
    let _ = within(DEADLINE, "an end", other.read_to_end(&mut got)).await;
    assert!(!String::from_utf8_lossy(&got).contains("200 OK"), "{got:?}");
}
