//! HTTP's edge cases by other people's tools: varnishtest scripts of ours, real
//! clients, and a browser.

use std::path::{Path, PathBuf};
use std::process::Command;

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
        command.args(["--ignore-certificate-errors", "--virtual-time-budget=20000"]);
        command.arg(format!("--host-resolver-rules=MAP web.edge.localhost {}", page.node.ip));
        command.arg(format!("--user-data-dir={}", dir.path().display())).arg(&url);
        let said = page.said_by(command).await;
        let line = said.lines().find(|line| line.contains("id=\"said\"")).unwrap_or(&said);
        assert!(line.contains("loaded 100 failed 0") && line.contains(&format!("over {over}")), "{url}: {line}");
    }
}
