//! One who stops reading: the others of the tunnel are served all the while, and
//! the session lives.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

async fn ask(addr: SocketAddr, command: &str) -> TcpStream {
    let mut tcp = TcpStream::connect(addr).await.unwrap();
    tcp.write_all(format!("{command}\n").as_bytes()).await.unwrap();
    tcp
}

/// Visits the socket as another visitor does, and tells how long that took.
async fn another(addr: SocketAddr) -> Duration {
    let begun = Instant::now();
    let mut tcp = ask(addr, "DOWN 100000").await;
    let read = within(DEADLINE, "another visitor", Pattern::read(None, &mut tcp)).await;
    assert_eq!(read, Ok(100_000));
    begun.elapsed()
}

async fn others_are_served_beside(stalls: &str) {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let mut ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", origin.target())]).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    another(addr).await;

    let mut stalled = ask(addr, stalls).await;
    if stalls == "HOLD" {
        // As much as anybody takes; then nobody does.
        let mut pattern = Pattern::default();
        while let Ok(Ok(())) =
            tokio::time::timeout(Duration::from_millis(500), stalled.write_all(pattern.next(64 << 10))).await
        {}
    } else {
        stalled.read_exact(&mut [0; 1000]).await.unwrap();
        eventually("its bytes wait in the node", async || {
            let (_, status) = node.api("GET", "/v1/status", None).await;
            (status["live"]["raw"][0]["queued_bytes"].as_u64() > Some(1 << 20)).then_some(())
        })
        .await;
    }
    let mut longest = Duration::ZERO;
    for _ in 0..200 {
        longest = longest.max(another(addr).await);
    }
    eprintln!("beside {stalls}: 200 others waited {longest:?} at most");
    assert!(ssh.program.runs(), "the session ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_visitor_that_stops_reading_holds_nobody_up() {
    others_are_served_beside("DOWN 100000000").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_origin_that_stops_reading_holds_nobody_up() {
    others_are_served_beside("HOLD").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_visitor_sent_before_leaving_arrives_though_the_origin_reads_late() {
    let node = Node::start().await;
    let mut origin = Origin::raw().await;
    let _ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", origin.target())]).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    // Of some of these sizes the last bytes wait in the node when the visitor has gone.
    let mut visitors = tokio::task::JoinSet::new();
    let mut sent: Vec<u64> = (20..84).map(|n| n * (96 << 10)).collect();
    for size in sent.clone() {
        visitors.spawn(async move {
            let mut visitor = ask(addr, "CLOSE 2000").await;
            assert_eq!(visitor.read_to_end(&mut Vec::new()).await.unwrap(), 4);
            within(DEADLINE, "an upload", Pattern::write(size, &mut visitor)).await.unwrap();
            visitor.shutdown().await.unwrap();
        });
    }
    visitors.join_all().await;
    while !sent.is_empty() {
        let report = within(DEADLINE, "the origin's report", origin.reports.recv()).await.unwrap();
        let size: u64 =
            report.trim().strip_prefix("exact ").and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{report}"));
        let at = sent
            .iter()
            .position(|s| *s == size)
            .unwrap_or_else(|| panic!("{size} bytes arrived: no visitor sent so many"));
        sent.swap_remove(at);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_broken_off_visits_end_and_others_are_served() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let mut ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", origin.target())]).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    for _ in 0..8 {
        let mut visitor = ask(addr, "DOWN 20000000").await;
        visitor.read_exact(&mut [0; 1000]).await.unwrap();
        socket2::SockRef::from(&visitor).set_linger(Some(Duration::ZERO)).unwrap();
        drop(visitor);
        another(addr).await;
    }
    eventually("all have given their places back", async || {
        let (_, status) = node.api("GET", "/v1/status", None).await;
        (status["live"]["raw"][0]["connections"] == 0).then_some(())
    })
    .await;
    assert!(ssh.program.runs());
}
