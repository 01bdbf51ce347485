//! gRPC through the edge, with its own library as client and as origin.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::json;

use crate::harness::*;

/// Ten thousand messages of a slow library, on two shared cores.
const CALLS: Duration = Duration::from_secs(120);

pub struct Grpc {
    program: Program,
    pub port: u16,
    told: usize,
}

impl Grpc {
    pub async fn start(tls: Option<[&Path; 2]>) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(root.join("target/venv/bin/python"));
        command.arg(root.join("tests/e2e/clients/grpc_calls.py")).args(tls.into_iter().flatten());
        let mut program = Program::start("grpc", command);
        let port = eventually("the service's port", async || {
            assert!(program.runs(), "{}", program.output());
            program.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
        });
        Self { port: port.await, program, told: 0 }
    }

    fn tell(&mut self, call: &str, node: &Node, secure: bool, messages: u32) {
        let (listener, ca) = if secure { ("https", node.ca().display().to_string()) } else { ("http", "-".into()) };
        self.program.tell(&format!("{call} {} {ca} web.edge.localhost {messages}", node.addr(listener)));
        self.told += 1;
    }

    async fn ends_well(&mut self) {
        let done = eventually_within(CALLS, "the calls' end", async || {
            let lines: Vec<String> = self.program.output().lines().map(str::to_owned).collect();
            let ends: Vec<_> = lines.into_iter().filter(|l| l.starts_with("ok ") || l.starts_with("wrong ")).collect();
            (ends.len() >= self.told).then_some(ends)
        });
        let ends = done.await;
        assert!(ends.iter().all(|line| line.starts_with("ok ")), "{ends:?}\n{}", self.program.output());
    }

    pub async fn calls(&mut self, call: &str, node: &Node, secure: bool, messages: u32) {
        self.tell(call, node, secure, messages);
        self.ends_well().await;
    }
}

async fn socket(node: &Node, kind: &str) {
    let upstream = json!({"http2": true, "tls": {"verify": false}});
    let record = json!({"type": kind, "hostnames": ["web.edge.localhost"], "upstream": upstream});
    node.put("sockets/web", record).await;
    node.put("tunnels/web-1", json!({"socket": "web", "keys": [node.key.line()]})).await;
}

fn forward(port: u16) -> String {
    format!("web:80:127.0.0.1:{port}")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_call_works_over_tls_and_in_plain_text() {
    let node = Node::start().await;
    let mut grpc = Grpc::start(None).await;
    socket(&node, "http").await;
    let _ssh = Ssh::start(&node, &[&forward(grpc.port)]).await;
    grpc.calls("calls", &node, true, 10_000).await;
    grpc.calls("calls", &node, false, 1000).await;
    // One connection served them all, but for those that came at once.
    let kept = node.metric(r#"adit_origin_requests_total{connection="kept"}"#).await;
    let new = node.metric(r#"adit_origin_requests_total{connection="new"}"#).await;
    assert!(kept > 400.0 && new < 20.0, "{kept} kept, {new} new");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_call_works_to_an_origin_that_speaks_tls() {
    let node = Node::start().await;
    let dir = tempfile::tempdir().unwrap();
    let (key, chain) = (dir.path().join("key.pem"), dir.path().join("chain.pem"));
    let made = rcgen::generate_simple_self_signed(["grpc.test".to_owned()]).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    std::fs::write(&chain, made.cert.pem()).unwrap();
    let mut grpc = Grpc::start(Some([&key, &chain])).await;
    socket(&node, "https").await;
    let _ssh = Ssh::start(&node, &[&forward(grpc.port)]).await;
    grpc.calls("calls", &node, true, 1000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_ours_is_a_status_of_grpc() {
    let node = Node::with(NodeOpts::default().set("http", "first_byte = \"500ms\"")).await;
    let mut grpc = Grpc::start(None).await;
    socket(&node, "http").await;
    grpc.calls("unavailable", &node, true, 0).await;
    let mut ssh = Ssh::start(&node, &[&forward(grpc.port)]).await;
    // A stream that says nothing for long is no silent origin.
    grpc.calls("quiet", &node, true, 2).await;
    grpc.tell("breaks", &node, true, 0);
    grpc.program.wait_for("streaming", 1, DEADLINE).await;
    ssh.program.kill9();
    grpc.ends_well().await;
}
