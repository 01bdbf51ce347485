//! What went wrong once where several parts meet: slow links, early ends, and
//! who may take which name.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

/// A link to the node's SSH port that carries this many bytes a second in each
/// direction; answers the port to log in at.
async fn slow_link(node: &Node, up: usize, down: usize) -> u16 {
    async fn trickle(mut from: impl AsyncReadExt + Unpin, mut to: impl AsyncWriteExt + Unpin, rate: usize) {
        let mut chunk = vec![0; (rate / 20).max(1)];
        while let Ok(n @ 1..) = from.read(&mut chunk).await {
            if to.write_all(&chunk[..n]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs_f64(n as f64 / rate as f64)).await;
        }
    }
    let listener = tokio::net::TcpSocket::new_v4().unwrap();
    listener.set_recv_buffer_size(64 << 10).unwrap();
    listener.bind((node.ip, 0).into()).unwrap();
    let listener = listener.listen(8).unwrap();
    let (port, ssh) = (listener.local_addr().unwrap().port(), node.addr("ssh"));
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let far = tokio::net::TcpSocket::new_v4().unwrap();
            far.set_recv_buffer_size(64 << 10).unwrap();
            let far = far.connect(ssh).await.unwrap();
            let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
            tokio::spawn(trickle(near_read, far_write, up));
            tokio::spawn(trickle(far_read, near_write, down));
        }
    });
    port
}

const FAST: usize = 1 << 30;

async fn a_busy_slow_link_lives(up: usize, down: usize, command: &'static str, bytes: u64, visits: usize) {
    let opts = NodeOpts::default().set("ssh", "keepalive = \"1s\"").set("ssh", "keepalive_deadline = \"5s\"");
    let node = Node::with(opts).await;
    let origin = Origin::raw().await;
    let mut opts = SshOpts::new(&[&format!("tcp/raw:{}", origin.target())]);
    opts.port = Some(slow_link(&node, up, down).await);
    let mut ssh = Ssh::with(&node, opts).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    let mut visitors = tokio::task::JoinSet::new();
    for _ in 0..visits {
        let mut visitor = TcpStream::connect(addr).await.unwrap();
        visitors.spawn(async move {
            visitor.write_all(format!("{command} {bytes}\n").as_bytes()).await.unwrap();
            if command == "UP" {
                Pattern::write(bytes, &mut visitor).await.unwrap();
                let mut answer = String::new();
                let read = within(DEADLINE, "the answer", visitor.read_to_string(&mut answer)).await;
                assert_eq!((read.is_ok(), answer), (true, format!("exact {bytes}\n")));
            } else {
                let read = within(DEADLINE, "the download", Pattern::read(None, &mut visitor)).await;
                assert_eq!(read, Ok(bytes));
            }
        });
    }
    while let Some(visited) = visitors.join_next().await {
        visited.unwrap();
    }
    assert!(ssh.program.runs());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_waits_behind_a_download_is_no_dead_peer() {
    a_busy_slow_link_lives(100_000, FAST, "DOWN", 1_500_000, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_that_waits_behind_an_upload_is_no_dead_peer() {
    a_busy_slow_link_lives(FAST, 100_000, "UP", 1_500_000, 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_full_of_uploads_is_no_dead_peer() {
    a_busy_slow_link_lives(FAST, 600_000, "UP", 1_500_000, 6).await;
}

/// The origin ends its own side first and reads late: the visitor's last bytes
/// still wait for the channel's window when both sides have said their end.
/// Where they wait depends on their number, so many numbers are tried.
#[tokio::test(flavor = "multi_thread")]
async fn an_upload_arrives_whole_where_the_origin_ended_its_side_first() {
    let node = Node::start().await;
    let origin = tokio::net::TcpSocket::new_v4().unwrap();
    origin.set_recv_buffer_size(16 << 10).unwrap();
    origin.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let origin = origin.listen(64).unwrap();
    let _ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", origin.local_addr().unwrap())]).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    let mut ends = tokio::task::JoinSet::new();
    for i in 0..48 {
        let bytes = (2 << 20) + i * (64 << 10);
        let mut visitor = TcpStream::connect(addr).await.unwrap();
        let (mut tcp, _) = within(DEADLINE, "a connection", origin.accept()).await.unwrap();
        ends.spawn(async move {
            tcp.shutdown().await.unwrap();
            Pattern::write(bytes, &mut visitor).await.unwrap();
            visitor.shutdown().await.unwrap();
            visitor.read_to_end(&mut Vec::new()).await.unwrap();
            tokio::time::sleep(Duration::from_secs(2)).await;
            (bytes, within(DEADLINE, "the upload", Pattern::read(None, &mut tcp)).await)
        });
    }
    while let Some(end) = ends.join_next().await {
        let (sent, arrived) = end.unwrap();
        assert_eq!(arrived, Ok(sent));
    }
}

/// A name under a recorded wildcard is claimed: open mode adds only what nobody
/// claimed.
#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_wildcard_keeps_its_names_for_its_own_keys() {
    let node = Node::start().await;
    let owner = Key::new(&node.state(), "ed25519");
    node.put("sockets/all", json!({ "type": "http", "hostnames": ["*.edge.localhost"] })).await;
    node.put("tunnels/all", json!({ "socket": "all", "keys": [owner.line()] })).await;
    let origin = Origin::http().await;
    let forward = format!("web:80:{}", origin.target());
    let stranger = Ssh::launch(&node, SshOpts::new(&[&forward]));
    stranger.program.wait_for("remote port forwarding failed", 1, DEADLINE).await;
    eventually("why, in the log", async || node.log().contains("taken by another key").then_some(())).await;
    assert_eq!(node.api("GET", "/v1/sockets/web", None).await.0, 404);
    let _owner = Ssh::with(&node, SshOpts::new(&[&forward]).key(&owner)).await;
}
