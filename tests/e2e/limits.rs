//! Every knob that bounds something, by what the one who meets the bound sees:
//! small figures, real clients, no waiting beyond the deadlines themselves.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::*;

/// What one more step may take on a busy machine, beyond the deadline it tests.
const SLACK: Duration = Duration::from_secs(4);

/// How long until the other side ended the connection, by an end or a reset,
/// and what it said before.
async fn until_closed(io: &mut (impl AsyncRead + Unpin)) -> (Duration, String) {
    let begun = Instant::now();
    let mut said = Vec::new();
    let _ = within(DEADLINE, "the end of a connection", io.read_to_end(&mut said)).await;
    (begun.elapsed(), String::from_utf8_lossy(&said).into_owned())
}

/// That `took` is the deadline and not something else.
fn at_deadline(what: &str, took: Duration, deadline: Duration) {
    eprintln!("{what}: after {took:?} (deadline {deadline:?})");
    assert!(took >= deadline.mul_f32(0.8) && took < deadline + SLACK, "{what}: {took:?}, not {deadline:?}");
}

async fn connect_from(source: [u8; 4], to: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::from((source, 0))).unwrap();
    socket.connect(to).await.unwrap()
}

/// A request on a connection that stays: its status, or none where it was closed.
async fn ask(tcp: &mut (impl AsyncRead + AsyncWrite + Unpin), host: &str, path: &str) -> Option<u16> {
    let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\n\r\n");
    tcp.write_all(head.as_bytes()).await.ok()?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(within(DEADLINE, "an answer", tcp.read_u8()).await.ok()?);
    }
    let text = String::from_utf8(head).unwrap();
    let length = text.to_lowercase().split_once("content-length: ").map(|(_, l)| l.lines().next().unwrap().to_owned());
    let mut body = vec![0; length.map_or(0, |l| l.trim().parse().unwrap())];
    tcp.read_exact(&mut body).await.ok()?;
    text.split(' ').nth(1).and_then(|s| s.parse().ok())
}

async fn status(node: &Node, host: &str, path: &str) -> Option<u16> {
    let mut tcp = TcpStream::connect(node.addr("http")).await.ok()?;
    ask(&mut tcp, host, path).await
}

/// Eight visitors of one address where three may be: how many are served.
async fn served_of_eight(node: &Node) -> Vec<TcpStream> {
    let mut served = Vec::new();
    for _ in 0..8 {
        // Refused at once, the connection may be gone before it is told of.
        let Ok(mut tcp) = TcpStream::connect(node.addr("http")).await else { continue };
        if ask(&mut tcp, "nobody.test", "/").await == Some(404) {
            served.push(tcp);
        }
    }
    served
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_share_of_connections_and_others_have_theirs() {
    let few = |opts: NodeOpts| opts.set("ingress", "connections_per_address = 3");
    let node = Node::with(few(NodeOpts::default()).set("node", "exempt_loopback = false")).await;
    let mut served = served_of_eight(&node).await;
    assert_eq!(served.len(), 3);
    let mut other = connect_from([127, 0, 0, 9], node.addr("http")).await;
    assert_eq!(ask(&mut other, "nobody.test", "/").await, Some(404), "another address");
    // Those who are in stay in, on every door it is one share, and a place is given back.
    assert_eq!(ask(&mut served[0], "nobody.test", "/").await, Some(404));
    let ca = std::fs::read(node.ca()).unwrap();
    let by_tls = tls_connect(node.addr("https"), "edge.localhost", trusting(&ca, &[]));
    assert!(by_tls.await.is_err());
    served.pop();
    eventually("the place is given back", async || status(&node, "nobody.test", "/").await).await;

    let exempt = Node::with(few(NodeOpts::default())).await;
    assert_eq!(served_of_eight(&exempt).await.len(), 8, "node.exempt_loopback");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_has_its_share_of_connections() {
    let node = Node::with(NodeOpts::default().set("ingress", "connections = 4")).await;
    let mut served = served_of_eight(&node).await;
    assert_eq!(served.len(), 4);
    served.pop();
    eventually("the place is given back", async || status(&node, "nobody.test", "/").await).await;
}

/// A visitor who keeps a connection and asks now and then does not notice that the
/// node keeps little of it meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_rests_is_there_when_it_is_needed() {
    let mut node = Node::start().await;
    let web = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", web.target())]).await;
    let host = "web.edge.localhost";
    let ca = std::fs::read(node.ca()).unwrap();
    let mut plain = TcpStream::connect(node.addr("http")).await.unwrap();
    let mut tls = tls_connect(node.addr("https"), host, trusting(&ca, &["http/1.1"])).await.unwrap();
    let resting = async |n: f64| {
        let rest = async || (node.metric("adit_http_connections_resting").await == n).then_some(());
        eventually(&format!("{n} connections rest"), rest).await;
    };
    for _ in 0..2 {
        eventually("the tunnel serves", async || ask(&mut plain, host, "/").await.filter(|s| *s == 200)).await;
        assert_eq!(ask(&mut tls, host, "/").await, Some(200));
        resting(2.0).await;
    }
    // A WebSocket on a connection that rested, and one that is begun on a fresh one.
    let mut upgraded = WebSocket::connect(tls, host, "/ws").await;
    upgraded.write(1, b"after a rest").await;
    assert_eq!(upgraded.read().await, Some((1, b"after a rest".to_vec())));
    resting(1.0).await;
    drop(upgraded);
    node.drain();
    let (took, said) = until_closed(&mut plain).await;
    assert_eq!(said, "");
    assert!(took < SLACK, "a drain closed it after {took:?}");
}

/// Two visitors of a socket where two may be, then one more.
async fn a_third_is_refused(section: &str, line: &str) {
    let node = Node::with(NodeOpts::default().set(section, line)).await;
    let (web, raw) = (Origin::http().await, Origin::raw().await);
    // A session of its own for each socket: the limit may be the session's.
    let _web = Ssh::start(&node, &[&format!("web:80:{}", web.target())]).await;
    let mut ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", raw.target())]).await;

    let host = "web.edge.localhost";
    let visit = async || Box::new(TcpStream::connect(node.addr("http")).await.unwrap()) as Io;
    let first = WebSocket::connect(visit().await, host, "/ws").await;
    let mut second = WebSocket::connect(visit().await, host, "/ws").await;
    assert_eq!(status(&node, host, "/").await, Some(503), "{line}");
    second.write(1, b"still here").await;
    assert_eq!(second.read().await, Some((1, b"still here".to_vec())));
    drop(first);
    eventually("the place is given back", async || status(&node, host, "/").await.filter(|s| *s == 200)).await;

    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    let echo = async || {
        let mut tcp = TcpStream::connect(addr).await.ok()?;
        tcp.write_all(b"ECHO\n!").await.ok()?;
        tcp.read_u8().await.ok().map(|_| tcp)
    };
    let (one, _two) = (echo().await.unwrap(), echo().await.unwrap());
    assert!(echo().await.is_none(), "{line}: a third raw visitor");
    drop(one);
    eventually("the place is given back", echo).await;
    assert!(ssh.program.runs());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_has_its_share_of_connections() {
    a_third_is_refused("dial", "connections_per_socket = 2").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_has_its_share_of_connections() {
    a_third_is_refused("ssh", "connections_per_tunnel = 2").await;
}

/// Logs in three times where two may; whether the third is let in.
async fn a_third_login(node: &Node) -> bool {
    let _two = [Ssh::start(node, &["a:80:localhost:1"]).await, Ssh::start(node, &["b:80:localhost:1"]).await];
    let mut third = Ssh::launch(node, SshOpts::new(&["c:80:localhost:1"]));
    eventually("the third login is decided", async || {
        if third.program.output().contains("remote forward success") {
            return Some(true);
        }
        (!third.program.runs()).then_some(false)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_and_the_node_have_their_share_of_sessions() {
    let per_address = |opts: NodeOpts| opts.set("ssh", "sessions_per_address = 2");
    let node = Node::with(per_address(NodeOpts::default()).set("node", "exempt_loopback = false")).await;
    assert!(!a_third_login(&node).await, "sessions_per_address");
    // All three are gone again.
    eventually("the places are given back", async || {
        let mut ssh = Ssh::launch(&node, SshOpts::new(&["a:80:localhost:1"]));
        eventually("a login is decided", async || {
            (ssh.program.output().contains("remote forward success") || !ssh.program.runs()).then_some(())
        })
        .await;
        ssh.program.runs().then_some(())
    })
    .await;
    let exempt = Node::with(per_address(NodeOpts::default())).await;
    assert!(a_third_login(&exempt).await, "node.exempt_loopback");
    let few = Node::with(NodeOpts::default().set("ssh", "sessions = 2")).await;
    assert!(!a_third_login(&few).await, "sessions");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_has_its_share_of_connections_that_have_not_logged_in() {
    let few = |opts: NodeOpts| opts.set("ssh", "unauthenticated_per_address = 2");
    let node = Node::with(few(NodeOpts::default()).set("node", "exempt_loopback = false")).await;
    // Who has logged in does not count.
    let _three = [
        Ssh::start(&node, &["a:80:localhost:1"]).await,
        Ssh::start(&node, &["b:80:localhost:1"]).await,
        Ssh::start(&node, &["c:80:localhost:1"]).await,
    ];
    let silent = async || {
        let mut tcp = TcpStream::connect(node.addr("ssh")).await.ok()?;
        // The banner comes after a moment; a refusal is an end.
        tcp.read_u8().await.ok().map(|_| tcp)
    };
    let (one, _two) = (silent().await.unwrap(), silent().await.unwrap());
    assert!(silent().await.is_none(), "a third that says nothing");
    let mut owner = Ssh::launch(&node, SshOpts::new(&["d:80:localhost:1"]));
    assert!(!owner.program.ended(DEADLINE).await.success());
    drop(one);
    eventually("the place is given back", silent).await;

    let exempt = Node::with(few(NodeOpts::default())).await;
    let mut all = Vec::new();
    for _ in 0..5 {
        let mut tcp = TcpStream::connect(exempt.addr("ssh")).await.unwrap();
        assert!(tcp.read_u8().await.is_ok(), "node.exempt_loopback");
        all.push(tcp);
    }
}

/// A client that agrees on keys and then never logs in.
const NO_LOGIN: &str = "
import paramiko, socket, sys, time
transport = paramiko.Transport(socket.create_connection((sys.argv[1], int(sys.argv[2]))))
transport.start_client(timeout=10)
print('agreed', flush=True)
while transport.is_active():
    time.sleep(0.05)
";

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_log_in_is_let_go_at_the_deadline() {
    let deadline = Duration::from_secs(2);
    let node = Node::with(NodeOpts::default().set("ssh", "login_deadline = \"2s\"")).await;
    let staying = Ssh::start(&node, &["a:80:localhost:1"]).await;
    let saying = async |listener: &str, first: &[u8]| {
        let begun = Instant::now();
        let mut tcp = TcpStream::connect(node.addr(listener)).await.unwrap();
        tcp.write_all(first).await.unwrap();
        let (_, said) = until_closed(&mut tcp).await;
        at_deadline(&format!("{listener} {:?}", String::from_utf8_lossy(first)), begun.elapsed(), deadline);
        assert!(said.starts_with("SSH-2.0-"), "{said:?}");
    };
    let begun = Instant::now();
    let mut command = Command::new("/usr/bin/python3");
    let addr = node.addr("ssh");
    command.args(["-c", NO_LOGIN, &addr.ip().to_string(), &addr.port().to_string()]);
    let mut agreeing = Program::start("paramiko", command);
    tokio::join!(
        saying("ssh", b""),
        saying("ssh", b"SSH-2.0-OpenSSH_9.2\r\n"),
        saying("ssh", b"SSH-2.0-half a banner"),
        saying("https", b"SSH-2.0-OpenSSH_9.2\r\n"),
    );
    agreeing.ended(DEADLINE).await;
    assert!(agreeing.output().contains("agreed"), "{}", agreeing.output());
    assert!(begun.elapsed() < deadline + SLACK, "who agreed on keys stayed {:?}", begun.elapsed());
    let mut staying = staying;
    assert!(staying.program.runs(), "who logged in stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_slowed_and_cut() {
    let opts = NodeOpts::default().set("ssh", "mode = \"closed\"").set("ssh", "auth_attempts = 4");
    let node = Node::with(opts.set("ssh", "reject_delay = \"400ms\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let mut guess = SshOpts::new(&["a:80:localhost:1"]);
    for _ in 0..8 {
        let key = Key::new(dir.path(), "ed25519");
        guess.extra.extend(["-i".into(), key.path.to_str().unwrap().into()]);
    }
    let begun = Instant::now();
    let mut ssh = Ssh::launch(&node, guess);
    assert!(!ssh.program.ended(DEADLINE).await.success());
    let (took, said) = (begun.elapsed(), ssh.program.output());
    let offered = said.matches("Offering public key").count();
    eprintln!("{offered} keys in {took:?}");
    assert!((3..=5).contains(&offered), "{offered} keys were heard:\n{said}");
    assert!(took >= Duration::from_millis(400) * 3, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_its_share_of_forwards() {
    let node = Node::with(NodeOpts::default().set("ssh", "forwards_per_session = 3")).await;
    let _three = Ssh::start(&node, &["a:80:localhost:1", "b:80:localhost:1", "c:80:localhost:1"]).await;
    let mut greedy = Ssh::launch(
        &node,
        SshOpts::new(&["a:80:localhost:1", "b:80:localhost:1", "c:80:localhost:1", "d:80:localhost:1"]),
    );
    assert!(!greedy.program.ended(DEADLINE).await.success());
    assert_eq!(greedy.program.output().matches("remote forward success").count(), 3);
    assert!(node.log().contains("too many forwards"), "the log says why");
}

/// A node with `opts` whose socket `web` is served by stopped clients alone;
/// how long its visitor waits for 504.
async fn visit_to_stopped_clients(opts: NodeOpts, clients: usize) -> Duration {
    let node = Node::with(opts).await;
    let origin = Origin::http().await;
    let mut stopped = Vec::new();
    for _ in 0..clients {
        let ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
        ssh.program.signal("STOP");
        stopped.push(ssh);
    }
    let begun = Instant::now();
    assert_eq!(status(&node, "web.edge.localhost", "/").await, Some(504));
    let waited = begun.elapsed();
    // No tunnel is given up for one slow answer.
    for ssh in &stopped {
        ssh.program.signal("CONT");
    }
    eventually("served again", async || status(&node, "web.edge.localhost", "/").await.filter(|s| *s == 200)).await;
    waited
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_client_is_given_up_at_the_deadline_of_the_open_or_of_the_dial() {
    let two = Duration::from_secs(2);
    let by_open = NodeOpts::default().set("ssh", "open_deadline = \"2s\"");
    let by_dial = NodeOpts::default().set("dial", "deadline = \"2s\"").set("ssh", "open_patience = \"500ms\"");
    let (open, dial) = tokio::join!(visit_to_stopped_clients(by_open, 1), visit_to_stopped_clients(by_dial, 2));
    at_deadline("ssh.open_deadline", open, two);
    at_deadline("dial.deadline", dial, two);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_client_that_vanished_is_noticed() {
    let opts = NodeOpts::default().set("ssh", "keepalive = \"1s\"").set("ssh", "keepalive_deadline = \"1s\"");
    let node = Node::with(opts).await;
    let origin = Origin::http().await;
    let ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    let steady = Ssh::start(&node, &["steady:80:localhost:1"]).await;
    ssh.program.signal("STOP");
    let begun = Instant::now();
    eventually("its session ends", async || {
        let (_, status) = node.api("GET", "/v1/status", None).await;
        (status["sessions"] == json!(1)).then_some(())
    })
    .await;
    eprintln!("ssh.keepalive: a stopped client was noticed after {:?}", begun.elapsed());
    assert!(begun.elapsed() < Duration::from_secs(2) + SLACK);
    assert_eq!(status(&node, "web.edge.localhost", "/").await, Some(503));
    let mut steady = steady;
    assert!(steady.program.runs(), "who answers stays");
}

/// Sends one byte every 100 ms until the other side ends it; when that was.
async fn dribbled(addr: SocketAddr, bytes: &[u8]) -> (Duration, String) {
    let (begun, tcp) = (Instant::now(), TcpStream::connect(addr).await.unwrap());
    tcp.set_nodelay(true).unwrap();
    let (mut from, mut to) = tcp.into_split();
    let bytes = bytes.to_vec();
    let sending = tokio::spawn(async move {
        for byte in bytes.iter().cycle() {
            if to.write_u8(*byte).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let (_, said) = until_closed(&mut from).await;
    sending.abort();
    (begun.elapsed(), said)
}

/// A ClientHello as a client of the `rustls` library makes it.
fn client_hello() -> Vec<u8> {
    let mut client = rustls::ClientConnection::new(trusting(b"", &[]), "edge.localhost".try_into().unwrap()).unwrap();
    let mut hello = Vec::new();
    client.write_tls(&mut hello).unwrap();
    hello
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_that_is_slow_to_speak_is_let_go_at_each_deadline() {
    let two = Duration::from_secs(2);
    let opts = NodeOpts::default().set("hello", "deadline = \"2s\"").set("tls", "handshake_deadline = \"2s\"");
    let node = Node::with(opts.set("http", "head_deadline = \"2s\"").set("http", "idle = \"2s\"")).await;
    let (http, https) = (node.addr("http"), node.addr("https"));
    let hello = client_hello();
    let hello_half = async {
        let (took, _) = dribbled(https, &hello[..hello.len() - 1]).await;
        at_deadline("hello.deadline, a ClientHello in drops", took, two);
    };
    let silent = async {
        let (begun, mut tcp) = (Instant::now(), TcpStream::connect(http).await.unwrap());
        until_closed(&mut tcp).await;
        at_deadline("hello.deadline, silence", begun.elapsed(), two);
    };
    let handshake = async {
        let (begun, mut tcp) = (Instant::now(), TcpStream::connect(https).await.unwrap());
        tcp.write_all(&hello).await.unwrap();
        until_closed(&mut tcp).await;
        at_deadline("tls.handshake_deadline", begun.elapsed(), two);
    };
    let head = async {
        let (took, _) = dribbled(http, b"GET / HTTP/1.1\r\nhost: nobody.test\r\nx: yyyyyyyyyyyyyyyyyyyyyyyy").await;
        at_deadline("http.head_deadline", took, two);
    };
    let second_head = async {
        let mut tcp = TcpStream::connect(http).await.unwrap();
        assert_eq!(ask(&mut tcp, "nobody.test", "/").await, Some(404));
        let begun = Instant::now();
        tcp.write_all(b"GET /").await.unwrap();
        until_closed(&mut tcp).await;
        at_deadline("http.head_deadline, the second request", begun.elapsed(), two);
    };
    let idle = async {
        let mut tcp = TcpStream::connect(http).await.unwrap();
        assert_eq!(ask(&mut tcp, "nobody.test", "/").await, Some(404));
        let (took, _) = until_closed(&mut tcp).await;
        at_deadline("http.idle", took, two);
    };
    let idle_h2 = async {
        let mut sender = h2(&node, "nobody.edge.localhost").await;
        let url = "https://nobody.edge.localhost/";
        let request = hyper::Request::get(url).body(pattern_body(0)).unwrap();
        assert_eq!(sender.send_request(request).await.unwrap().status(), 404);
        let begun = Instant::now();
        while !sender.is_closed() {
            assert!(begun.elapsed() < DEADLINE);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        at_deadline("http.idle, HTTP/2", begun.elapsed(), two);
    };
    tokio::join!(hello_half, silent, handshake, head, second_head, idle, idle_h2);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stays_silent_behind_an_open_connection_is_given_up() {
    let two = Duration::from_secs(2);
    let opts = NodeOpts::default().set("http", "first_byte = \"2s\"").set("http", "body_idle = \"2s\"");
    let opts = opts.set("http", "upgrade_idle = \"2s\"").set("relay", "idle = \"2s\"");
    let node = Node::with(opts).await;
    let (web, raw) = (Origin::http().await, Origin::raw().await);
    let forwards = [format!("web:80:{}", web.target()), format!("tcp/raw:{}", raw.target())];
    let _ssh = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    let raw = SocketAddr::new(node.ip, node.port_of("raw").await);
    let (node, host) = (&node, "web.edge.localhost");
    let first_byte = async {
        let begun = Instant::now();
        assert_eq!(status(node, host, "/slow/20000").await, Some(504));
        at_deadline("http.first_byte", begun.elapsed(), two);
        assert_eq!(status(node, host, "/slow/1000").await, Some(200));
    };
    let body = async {
        // A body that is announced and does not come.
        let mut tcp = TcpStream::connect(node.addr("http")).await.unwrap();
        let head = format!("POST /sink HTTP/1.1\r\nhost: {host}\r\ncontent-length: 1000\r\n\r\nabc");
        tcp.write_all(head.as_bytes()).await.unwrap();
        let (took, _) = until_closed(&mut tcp).await;
        at_deadline("http.body_idle", took, two);
    };
    let upgraded = async {
        let tcp = TcpStream::connect(node.addr("http")).await.unwrap();
        let mut socket = WebSocket::connect(Box::new(tcp), host, "/ws").await;
        let begun = Instant::now();
        assert_eq!(within(DEADLINE, "the end of a silent WebSocket", socket.read()).await, None);
        at_deadline("http.upgrade_idle", begun.elapsed(), two);
    };
    let relay = async {
        let mut tcp = TcpStream::connect(raw).await.unwrap();
        tcp.write_all(b"ECHO\n").await.unwrap();
        // Either direction's bytes keep it.
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            tcp.write_all(b"!").await.unwrap();
            tcp.read_u8().await.unwrap();
        }
        let (took, _) = until_closed(&mut tcp).await;
        at_deadline("relay.idle", took, two);
    };
    tokio::join!(first_byte, body, upgraded, relay);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_is_too_large_is_told_so() {
    let opts = NodeOpts::default().set("http", "head_max = \"8KiB\"").set("http", "headers_max = 20");
    let node = Node::with(opts.set("hello", "max = \"4KiB\"")).await;
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    let host = "web.edge.localhost";
    let large = format!("x-large: {}\r\n", "y".repeat(20 << 10));
    let many: String = (0..30).map(|n| format!("x-{n}: y\r\n")).collect();
    let fits = format!("x-fits: {}\r\n", "y".repeat(6 << 10));
    for (fields, expected) in [(&large, 431), (&many, 431), (&fits, 200)] {
        let mut tcp = TcpStream::connect(node.addr("http")).await.unwrap();
        let head = format!("GET / HTTP/1.1\r\nhost: {host}\r\n{fields}connection: close\r\n\r\n");
        tcp.write_all(head.as_bytes()).await.unwrap();
        let (answered, _) = within(DEADLINE, "an answer", read_answer(&mut tcp)).await;
        assert_eq!(answered, expected, "{} bytes of fields", fields.len());

        let mut sender = h2(&node, host).await;
        let mut request = hyper::Request::get(format!("https://{host}/"));
        for line in fields.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            request = request.header(name, value);
        }
        let answer =
            within(DEADLINE, "an answer over HTTP/2", sender.send_request(request.body(pattern_body(0)).unwrap()));
        assert_eq!(answer.await.unwrap().status(), expected, "{} bytes of fields over HTTP/2", fields.len());
    }
    // A ClientHello beyond hello.max: refused at once, not at the deadline.
    let mut tcp = TcpStream::connect(node.addr("https")).await.unwrap();
    let mut record = vec![22, 3, 1, 0x3f, 0, 1, 0, 0x3e, 0xfc, 3, 3];
    record.resize(5 + 0x3f00, 0);
    let _ = tcp.write_all(&record).await;
    let (took, _) = until_closed(&mut tcp).await;
    assert!(took < Duration::from_secs(5), "a ClientHello beyond hello.max was kept {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_control_listener_bounds_bodies_heads_and_time() {
    let opts = NodeOpts::default().set("control", "body_limit = \"1KiB\"").set("control", "head_deadline = \"2s\"");
    let opts = opts.set("control", "body_deadline = \"2s\"").set("control", "watchers = 1");
    let node = Node::with(opts.set("control", "connections = 3")).await;
    let socket = |fill: usize| json!({"type": "http", "hostnames": ["a.test"], "x-fill": "y".repeat(fill)});
    assert_eq!(node.api("PUT", "/v1/sockets/a", Some(&socket(2000))).await.0, 413);
    // Without its length too.
    let mut tcp = TcpStream::connect(node.addr("control")).await.unwrap();
    let chunk = format!("7d0\r\n{}\r\n0\r\n\r\n", "y".repeat(2000));
    let head = format!(
        "PUT /v1/sockets/a HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n",
        node.addr("control")
    );
    tcp.write_all(format!("{head}{chunk}").as_bytes()).await.unwrap();
    assert_eq!(within(DEADLINE, "an answer", read_answer(&mut tcp)).await.0, 413);
    drop(tcp);
    assert_eq!(node.api("PUT", "/v1/sockets/a", Some(&socket(100))).await.0, 201);

    let two = Duration::from_secs(2);
    let slow = async |first: String| {
        let mut tcp = TcpStream::connect(node.addr("control")).await.unwrap();
        let begun = Instant::now();
        tcp.write_all(first.as_bytes()).await.unwrap();
        let (_, said) = until_closed(&mut tcp).await;
        at_deadline(&format!("control deadline after {} bytes", first.len()), begun.elapsed(), two);
        said
    };
    let body = format!(
        "PUT /v1/sockets/a HTTP/1.1\r\nhost: {}\r\ncontent-type: application/json\r\ncontent-length: 900\r\n\r\n{{",
        node.addr("control")
    );
    let (_, said, ()) = tokio::join!(slow("GET /v1/status HT".into()), slow(body), async {
        // Two of three places are taken; with a third, others wait for theirs.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let _third = TcpStream::connect(node.addr("control")).await.unwrap();
        tokio::time::sleep(Duration::from_millis(300)).await;
        let begun = Instant::now();
        assert_eq!(node.api("GET", "/healthz", None).await.0, 200);
        eprintln!("control.connections: the fourth waited {:?}", begun.elapsed());
        assert!(begun.elapsed() > Duration::from_millis(500), "there was a fourth place");
    });
    assert!(said.starts_with("HTTP/1.1 408"), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_need_the_token_and_a_listener_beyond_loopback_needs_one() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    std::fs::write(&file, "0123456789abcdef-a-token\n").unwrap();
    let token_file = format!("token_file = \"{}\"", file.display());
    let node = Node::with(NodeOpts::default().set("control", &token_file)).await;
    let call = async |path: &str, authorization: &str| {
        let mut tcp = TcpStream::connect(node.addr("control")).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\n{authorization}");
        let host = node.addr("control").to_string();
        within(DEADLINE, "an API call", request(&mut tcp, &head, &host, b"")).await.0
    };
    let right = "authorization: Bearer 0123456789abcdef-a-token\r\n";
    for path in ["/v1/status", "/v1/sockets", "/v1/watch", "/v1/openapi.json", "/metrics"] {
        assert_eq!(call(path, "").await, 401, "{path}");
        assert_eq!(call(path, "authorization: Bearer 0123456789abcdef-another\r\n").await, 401, "{path}");
        if path != "/v1/watch" {
            assert_eq!(call(path, right).await, 200, "{path}");
        }
    }
    for path in ["/healthz", "/readyz"] {
        assert_eq!(call(path, "").await, 200, "{path}");
    }

    let settings = dir.path().join("open.toml");
    let own: IpAddr = node.ip;
    let text = format!(
        "[ingress]\nhttp = []\nhttps = []\nraw = []\n[ssh]\nlisten = [\"{own}:2299\"]\n[control]\nlisten = [\"0.0.0.0:0\"]\n"
    );
    let adit = |command: &str, text: &str| {
        std::fs::write(&settings, text).unwrap();
        let mut adit = Command::new(env!("CARGO_BIN_EXE_adit"));
        adit.args([command, "--config", settings.to_str().unwrap(), "--state"]).arg(dir.path().join("state"));
        adit.env_remove("ADIT_STATE").output().unwrap()
    };
    let anonymous = format!("{text}allow_anonymous_loopback = true\n");
    for command in ["check", "run"] {
        let done = adit(command, &anonymous);
        let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
        assert_eq!(done.status.code(), Some(2), "{command}: {said}");
        assert!(said.contains("control.allow_anonymous_loopback"), "{command}: {said}");
    }
    // With one, `check` is content; a token that can be guessed ends the start.
    let with_token = format!("{text}{token_file}\n");
    assert_eq!(adit("check", &with_token).status.code(), Some(0));
    std::fs::write(&file, "short\n").unwrap();
    let done = adit("run", &with_token);
    assert_eq!(done.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&done.stderr).contains("16 bytes"));
}
