//! Many records: how long a start takes, how long a change takes to act, what
//! it costs in memory. Figures are of the build under test (debug by default).

use std::time::{Duration, Instant};

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const SOCKETS: usize = 20_000;
const MIB: u64 = 1 << 20;

/// A connection that takes one request after another.
struct Caller {
    tcp: TcpStream,
    host: String,
}

impl Caller {
    async fn to(node: &Node, listener: &str) -> Self {
        let addr = node.addr(listener);
        Self { tcp: TcpStream::connect(addr).await.unwrap(), host: addr.to_string() }
    }

    async fn call(&mut self, line: &str, host: &str, body: &str) -> u16 {
        let length = body.len();
        let kind = "content-type: application/json";
        let head = format!("{line} HTTP/1.1\r\nhost: {host}\r\n{kind}\r\ncontent-length: {length}\r\n\r\n{body}");
        self.tcp.write_all(head.as_bytes()).await.unwrap();
        let (status, head) = within(DEADLINE, line, read_answer(&mut self.tcp)).await;
        let length = head
            .to_lowercase()
            .split_once("content-length: ")
            .map_or(0, |(_, l)| l.lines().next().unwrap().trim().parse().unwrap());
        self.tcp.read_exact(&mut vec![0; length]).await.unwrap();
        status
    }

    async fn put(&mut self, n: usize) -> u16 {
        let record = json!({"type": "http", "hostnames": [format!("s{n}.scale.test")]});
        let host = self.host.clone();
        self.call(&format!("PUT /v1/sockets/s{n}"), &host, &record.to_string()).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_thousand_sockets() {
    if !long() {
        return;
    }
    let mut node = Node::with(NodeOpts::default().set("log", "level = \"warn\"")).await;
    let empty = node.usage();
    let begun = Instant::now();
    let mut writers = Vec::new();
    for first in 0..16 {
        let mut caller = Caller::to(&node, "control").await;
        writers.push(tokio::spawn(async move {
            for n in (first..SOCKETS).step_by(16) {
                assert_eq!(caller.put(n).await, 201, "s{n}");
            }
        }));
    }
    for writer in writers {
        writer.await.unwrap();
    }
    let writing = begun.elapsed();
    let full = node.usage();

    node.kill9();
    let begun = Instant::now();
    node.restart().await;
    let starting = begun.elapsed();
    let started = node.usage();
    let (_, status) = node.api("GET", "/v1/status", None).await;
    assert_eq!(status["sockets"], json!(SOCKETS));

    // A name that is known has no tunnel (503), another is nobody's (404).
    let (mut operator, mut visitor) = (Caller::to(&node, "control").await, Caller::to(&node, "http").await);
    let mut took = Vec::new();
    for n in SOCKETS..SOCKETS + 1000 {
        let name = format!("s{n}.scale.test");
        assert_eq!(visitor.call("GET /", &name, "").await, 404);
        let begun = Instant::now();
        assert_eq!(operator.put(n).await, 201);
        assert_eq!(visitor.call("GET /", &name, "").await, 503, "{name} does not act");
        took.push(begun.elapsed());
    }
    took.sort_unstable();
    let (p50, p99, most) = (took[500], took[990], took[999]);
    eprintln!(
        "{SOCKETS} sockets: written in {writing:?} by 16 callers, {} MiB (empty {} MiB); \
         start {starting:?}, then {} MiB; PUT until it acts: p50 {p50:?}, p99 {p99:?}, max {most:?}",
        full.memory / MIB,
        empty.memory / MIB,
        started.memory / MIB,
    );
    assert!(starting < Duration::from_secs(20), "{starting:?}");
    assert!(p99 < Duration::from_millis(100), "{p99:?}");
    assert!(full.memory < empty.memory + 200 * MIB, "{} MiB", full.memory / MIB);
}
