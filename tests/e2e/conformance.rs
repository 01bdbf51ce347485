//! HTTP's edge cases by other people's tools: varnishtest scripts of ours, real
//! clients, and a browser.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::*;

fn root(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(file)
}

/// A port of 127.0.0.1 where nobody listens now.
async fn free_port() -> u16 {
    Origin::refusing().await.port()
}

/// Plays a script of `tests/vtc` against a node of its own.
async fn script(name: &str) {
    let node = Node::start().await;
    let origin = free_port().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{origin}")]).await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("varnishtest");
    command.arg(format!("-Dhttp={}", node.addr("http"))).arg(format!("-Dorigin={origin}"));
    // Its own deadline, in seconds; and it says what it did only where it failed.
    command.args(["-t", "60"]).arg(root(&format!("tests/vtc/{name}.vtc"))).env("TMPDIR", dir.path());
    let mut program = Program::start("varnishtest", command);
    let ended = program.ended(DEADLINE * 4).await;
    assert!(ended.success(), "{name}:\n{}\n{}", program.output(), node.log());
}

macro_rules! scripts {
    ($($name:ident),*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            script(stringify!($name)).await;
        }
    )*};
}
scripts!(h1_passes, h1_answers, h1_refused, h1_chunks, h2_passes, h2_refused);

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_smuggled_and_floods_end_their_own_connection() {
    let node = Node::start().await;
    let mut command = Command::new(root("target/venv/bin/python"));
    command.arg(root("tests/e2e/clients/http_attacks.py"));
    let mut attacks = Program::start("attacks", command);
    let port: u16 = eventually("the origin's port", async || {
        assert!(attacks.runs(), "{}", attacks.output());
        attacks.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
    })
    .await;
    let mut ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{port}")]).await;
    let before = node.usage().memory;
    attacks.tell(&format!("{} {}", node.ip, node.addr("http").port()));
    let mut most = before;
    eventually_within(DEADLINE * 8, "the attacks' end", async || {
        most = most.max(node.usage().memory);
        attacks.output().lines().any(|line| line == "done").then_some(())
    })
    .await;
    let output = attacks.output();
    eprintln!("{output}\nmemory: {} MiB before, {} MiB at most", before >> 20, most >> 20);
    assert!(!output.contains("wrong "), "{output}");
    assert!(most - before < 64 << 20, "{} MiB more", (most - before) >> 20);
    assert!(ssh.program.runs() && !node.log().contains("panicked"), "{}", node.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn h2rs_finds_no_smuggling() {
    let page = Page::published().await;
    let addr = page.node.addr("https");
    // It has no way to another address than the name's.
    let run = "import socket, sys; at = (sys.argv.pop(1), int(sys.argv.pop(1))); connect = socket.create_connection; \
               socket.create_connection = lambda *_: connect(at); import h2rs.h2rs; h2rs.h2rs.main()";
    let mut command = Command::new(root("target/venv/bin/python"));
    command.args(["-c", run, &addr.ip().to_string(), &addr.port().to_string(), "-t", "web.edge.localhost", "-m", "1"]);
    let said = page.said_by(command).await;
    assert!(said.contains("Got response status code 200"), "{said}");
    assert_eq!(said.matches("Not potencial vulnerable").count(), 5, "{said}");
}

/// `tests/e2e/clients/page_origin.py`, published as `web`.
struct Page {
    node: Node,
    _ssh: Ssh,
    _origin: Program,
    port: u16,
}

impl Page {
    async fn published() -> Self {
        let node = Node::start().await;
        let mut command = Command::new(root("target/venv/bin/python"));
        command.arg(root("tests/e2e/clients/page_origin.py"));
        let mut origin = Program::start("the page's origin", command);
        let port: u16 = eventually("the origin's port", async || {
            assert!(origin.runs(), "{}", origin.output());
            origin.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
        })
        .await;
        let ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{port}")]).await;
        Self { node, _ssh: ssh, _origin: origin, port }
    }

    fn https(&self, path: &str) -> String {
        format!("https://web.edge.localhost:{}{path}", self.node.addr("https").port())
    }

    fn http(&self, path: &str) -> String {
        format!("http://web.edge.localhost:{}{path}", self.node.addr("http").port())
    }

    /// What a program says that must end well.
    async fn said_by(&self, mut command: Command) -> String {
        let mut program = Program::start("a client", {
            command.env("HOME", self.node.state());
            command
        });
        let ended = program.ended(DEADLINE * 4).await;
        assert!(ended.success(), "{}\n{}", program.output(), self.node.log());
        program.output()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_and_nghttp_and_h2load_find_no_error() {
    let page = Page::published().await;
    for (option, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        for url in (0..20).map(|n| page.https(&format!("/asset/{n}.js"))) {
            let (status, head) = curl(&page.node, &[option, "-I", &url]).await;
            assert!(status == 200 && head.starts_with(&format!("HTTP/{version} 200")), "{url}: {head}");
            assert!(curl(&page.node, &[option, &url]).await.1.starts_with("//"), "{url}");
        }
    }
    // nghttp has no way to another address than the URL's, but to another :authority.
    let addr = page.node.addr("https");
    let mut nghttp = Command::new("nghttp");
    nghttp.arg(format!("--header=:authority: web.edge.localhost:{}", addr.port()));
    nghttp.args(["-n", "-s", "-y", "-m", "20", &format!("https://{addr}/asset/1.js")]);
    let said = page.said_by(nghttp).await;
    assert!(said.contains("200") && !said.to_lowercase().contains("error"), "{said}");
    for (listener, url) in [("https", page.https("/asset/1.js")), ("http", page.http("/asset/1.js"))] {
        for more in [&[][..], &["--h1"]] {
            let mut h2load = Command::new("h2load");
            h2load.arg(format!("--connect-to={}", page.node.addr(listener)));
            h2load.args(["-n", "2000", "-c", "10", "-m", "10"]).args(more).arg(&url);
            let said = page.said_by(h2load).await;
            let ok = said.contains("2000 succeeded, 0 failed, 0 errored") && said.contains("status codes: 2000 2xx");
            assert!(ok, "{url} {more:?}: {said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn httpx_gets_everything_and_each_event_before_the_next_is_sent() {
    let page = Page::published().await;
    let mut command = Command::new(root("target/venv/bin/python"));
    command.arg(root("tests/e2e/clients/http_clients.py")).arg(page.node.addr("https").to_string());
    command.arg(page.node.ca()).args([page.port.to_string(), size(2000, 50).to_string()]);
    let said = page.said_by(command).await;
    eprintln!("{said}");
    assert!(said.contains("done"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_browser_loads_a_page_with_a_hundred_assets_without_an_error() {
    let page = Page::published().await;
    for (url, over) in [(page.https("/"), "h2"), (page.http("/"), "http/1.1")] {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("chromium");
        command.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"]);
        command.args(["--disable-background-networking", "--disable-component-update", "--disable-sync"]);
        command.arg("--ignore-certificate-errors");
        command.arg(format!("--host-resolver-rules=MAP web.edge.localhost {}", page.node.ip));
        command.arg(format!("--user-data-dir={}", dir.path().display())).arg(&url);
        let said = page.said_by(command).await;
        let line = said.lines().find(|line| line.contains("id=\"said\"")).unwrap_or(&said);
        assert!(line.contains("loaded 100 failed 0") && line.contains(&format!("over {over}")), "{url}: {line}");
        assert!(line.contains("echoed 3 closed 1000"), "{url}: {line}");
    }
    // The first one's WebSocket was a stream of its HTTP/2 connection (RFC 8441).
    for method in ["CONNECT", "GET"] {
        let visit = format!("what={method} web.edge.localhost/echo");
        eventually("the WebSocket's record", async || page.node.log().contains(&visit).then_some(())).await;
    }
}

/// Plays every check over a socket of this type, for visitors with and without TLS.
async fn websocket_checks(kind: &str) {
    let node = Node::start().await;
    let upstream = json!({"tls": {"verify": false}});
    node.put("sockets/web", json!({"type": kind, "hostnames": ["web.edge.localhost"], "upstream": upstream})).await;
    node.put("tunnels/web-1", json!({"socket": "web", "keys": [node.key.line()]})).await;
    let dir = tempfile::tempdir().unwrap();
    let (key, chain) = (dir.path().join("key.pem"), dir.path().join("chain.pem"));
    let made = rcgen::generate_simple_self_signed(["echo.test".to_owned()]).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    std::fs::write(&chain, made.cert.pem()).unwrap();
    for scheme in ["wss", "ws"] {
        let mut command = Command::new(root("target/venv/bin/python"));
        command.arg(root("tests/e2e/clients/websocket_checks.py"));
        if kind == "https" {
            command.args([&key, &chain]);
        }
        let mut checks = Program::start("the checks", command);
        let port: u16 = eventually("the echo's port", async || {
            assert!(checks.runs(), "{}", checks.output());
            checks.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
        })
        .await;
        let _ssh = Ssh::start(&node, &[&format!("web:80:127.0.0.1:{port}")]).await;
        let addr = node.addr(if scheme == "wss" { "https" } else { "http" });
        let url = format!("{scheme}://web.edge.localhost:{}/", addr.port());
        checks.tell(&format!("{url} {} {addr}", node.ca().display()));
        checks.wait_for("done", 1, DEADLINE * 4).await;
        let said = checks.output();
        let same = said.lines().filter(|line| line.starts_with("same ")).count();
        eprintln!("{kind}, {scheme}: {same} alike");
        assert!(same >= 80 && !said.contains("DIFFERS"), "{said}");
        // What was right of itself: sizes up to 16 MiB, texts, fragments.
        assert!(!said.contains("False") && !said.contains("TimeoutError"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_behaves_through_the_edge_as_it_does_directly() {
    websocket_checks("http").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_of_an_origin_with_tls_behaves_as_it_does_directly() {
    websocket_checks("https").await;
}

/// The time of each of so many small requests, one after another on one
/// connection, sorted.
async fn small_requests(node: &Node, name: &str, count: usize) -> Vec<Duration> {
    let ask = async {
        let mut tcp = tokio::net::TcpStream::connect(node.addr("http")).await.unwrap();
        let mut times = Vec::new();
        for _ in 0..count {
            let begun = Instant::now();
            let head = format!("GET /bytes/100 HTTP/1.1\r\nHost: {name}.edge.localhost\r\n\r\n");
            tcp.write_all(head.as_bytes()).await.unwrap();
            let mut got = Vec::new();
            while got.windows(4).position(|w| w == b"\r\n\r\n").is_none_or(|at| got.len() < at + 104) {
                assert!(tcp.read_buf(&mut got).await.unwrap() > 0, "{}", String::from_utf8_lossy(&got));
            }
            assert!(got.starts_with(b"HTTP/1.1 200"));
            times.push(begun.elapsed());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        times.sort();
        times
    };
    within(DEADLINE * 4, "small requests", ask).await
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_attackers_hold_up_nobody() {
    // Short enough that attackers are let go within the test; in the long form they
    // stay as long as they are measured.
    let deadline = format!("deadline = \"{}s\"", size(60, 8));
    let opts = NodeOpts::default().set("http", &format!("head_{deadline}")).set("hello", &deadline);
    let node = Node::with(opts).await;
    let origin = Origin::http().await;
    // An SSH client walks through all its channels for each packet: who shares the
    // attacked one's tunnel waits for that, not for the node. It too is elsewhere.
    let mut opts = SshOpts::new(&[&format!("web:80:{}", origin.target())]);
    opts.under = ["nice", "-n", "19"].map(str::to_owned).to_vec();
    let attacked = Ssh::launch(&node, opts);
    attacked.program.wait_for("remote forward success", 1, DEADLINE).await;
    let _other = Ssh::start(&node, &[&format!("other:80:{}", origin.target())]).await;
    let connections = size(500, 100);
    let held = r#"adit_visitors{door="http"}"#;
    // The best of some rounds: other programs of this machine are no attackers. And
    // how many of those there were in each at least.
    let p99 = async |name: &str| {
        let (mut best, mut least) = (Duration::MAX, f64::MAX);
        for _ in 0..size(4, 1) {
            best = best.min(small_requests(&node, name, 1000).await[990]);
            least = least.min(node.metric(held).await);
        }
        (best, least)
    };
    small_requests(&node, "other", 200).await;
    let (quiet, _) = p99("other").await;
    let before = node.usage().memory;
    eprintln!("quiet: p99 {quiet:?}");
    for (name, how) in [
        ("slow heads", &["-H", "-i", "2", "-x", "24"][..]),
        ("slow bodies", &["-B", "-i", "2", "-s", "8192", "-x", "10"]),
        ("slow reads", &["-X", "-w", "10", "-y", "20", "-n", "2", "-z", "16", "-k", "3"]),
    ] {
        // Attackers have processors of their own: the tool spins, and shares ours.
        let mut attack = Command::new("nice");
        attack.args(["-n", "19", "slowhttptest"]);
        let path = match name {
            "slow reads" => "/bytes/10000000",
            // The origin waits for it all; with an early answer there would be no attack.
            _ => "/sink",
        };
        // By absolute form, as to a proxy: the tool has no way to say Host.
        attack.args(how).args(["-c", &connections.to_string(), "-r", "250", "-p", "5"]);
        attack.args(["-l", &size(45, 12).to_string()]);
        attack.args(["-d", &node.addr("http").to_string(), "-u", &format!("http://web.edge.localhost{path}")]);
        let mut attack = Program::start("slowhttptest", attack);
        eventually("the attackers", async || (node.metric(held).await >= connections as f64 * 0.95).then_some(()))
            .await;
        let (busy, there) = p99("other").await;
        let beside = small_requests(&node, "web", size(1000, 100) as usize).await;
        let grown = node.usage().memory.saturating_sub(before);
        let each = grown / connections;
        let beside = beside[beside.len() * 99 / 100];
        eprintln!(
            "{name}: p99 {busy:?}, through the attacked tunnel {beside:?}, {there} inside, {} KiB each",
            each >> 10
        );
        // What the tunnel may hold (ssh.tunnel_buffer), and for each connection pieces
        // of 64 KiB: the window that a channel always has, both of hyper's buffers and
        // what is between them, twice where a buffer is grown while it is shared.
        let bound = (64 << 20) + connections * (512 << 10);
        assert!(grown < bound, "{name}: {} MiB more", grown >> 20);
        if std::env::var_os("ADIT_LONG").is_some() {
            assert!(there >= connections as f64 * 0.95, "{name}: {there} inside");
            assert!(busy <= quiet * 2, "{name}: p99 {busy:?}, quiet {quiet:?}");
        }
        attack.ended(DEADLINE * 4).await;
        eventually("all are gone", async || (node.metric(held).await <= 1.0).then_some(())).await;
    }
}
