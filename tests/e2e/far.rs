//! An owner far away: 100 ms to and fro, one packet in a hundred lost, 50 Mbit/s. What
//! visitors get is what the path gives, and they share it alike.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::*;

/// From the start of what is measured until its speed is steady.
const SETTLE: Duration = Duration::from_secs(8);
const MEASURE: Duration = Duration::from_secs(20);

/// Bytes per second of each of these readers, once they are steady.
async fn speeds(all: Vec<TcpStream>) -> Vec<f64> {
    let mut counts = Vec::new();
    let mut readers = tokio::task::JoinSet::new();
    for mut tcp in all {
        let count = Arc::new(AtomicU64::new(0));
        counts.push(Arc::clone(&count));
        readers.spawn(async move {
            let mut buffer = vec![0; 64 << 10];
            while let Ok(n @ 1..) = tcp.read(&mut buffer).await {
                count.fetch_add(n as u64, Ordering::Relaxed);
            }
        });
    }
    // What is measured is what passes in this time.
    tokio::time::sleep(SETTLE).await;
    let before: Vec<u64> = counts.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    tokio::time::sleep(MEASURE).await;
    let passed = counts.iter().zip(before).map(|(count, before)| count.load(Ordering::Relaxed) - before);
    passed.map(|bytes| bytes as f64 / MEASURE.as_secs_f64()).collect()
}

/// What iperf3 says that plain TCP reaches from there to here, in bytes per second.
async fn plain_tcp(net: &Net) -> f64 {
    let mut server = Command::new("ip");
    server.args([
        "netns",
        "exec",
        &net.place(0),
        "iperf3",
        "--forceflush",
        "-s",
        "-1",
        "-B",
        &net.at(0, 1).to_string(),
    ]);
    let server = Program::start("iperf3 -s", server);
    server.wait_for("Server listening", 1, DEADLINE).await;
    let mut client = Command::new("ip");
    client.args(["netns", "exec", &net.place(1), "iperf3", "-J", "-C", "bbr", "-c", &net.at(0, 1).to_string()]);
    client.args(["-O", &SETTLE.as_secs().to_string(), "-t", &MEASURE.as_secs().to_string()]);
    let (ended, said) = Program::start("iperf3 -c", client).finished(2 * (SETTLE + MEASURE)).await;
    assert!(ended.success(), "{said}");
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    said["end"]["sum_received"]["bits_per_second"].as_f64().unwrap() / 8.0
}

#[tokio::test(flavor = "multi_thread")]
async fn visitors_of_a_far_owner_get_what_the_path_gives_and_share_it() {
    // Two minutes by a link in user space, which wants a core for itself.
    if !long() {
        return;
    }
    let test = "far::visitors_of_a_far_owner_get_what_the_path_gives_and_share_it";
    let Some(mut net) = Net::of(test, [100, 1, 1]).await else { return };
    net.set(0, 1, "loss", 1.0).await;
    net.set(0, 1, "rate", 50.0).await;
    net.congestion(1, "bbr");
    let here = net.at(0, 1);
    let opts = NodeOpts::default().at("10.77.0.2".parse().unwrap()).under(&net.under(0).each_ref().map(String::as_str));
    let node = Node::with(opts.set("ssh", &format!("listen = [\"{here}:2222\"]"))).await;
    // Where the owner's client reaches it beside the link.
    let origin = TcpListener::bind("10.77.1.1:0").await.unwrap();
    let target = origin.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = origin.accept().await {
            tokio::spawn(async move {
                let bytes = vec![0x5a; 256 << 10];
                while tcp.write_all(&bytes).await.is_ok() {}
            });
        }
    });
    let mut opts = SshOpts::new(&[&format!("tcp/bulk:{target}")]);
    (opts.ip, opts.port) = (Some(here), Some(2222));
    opts.under = net.under(1).to_vec();
    let _owner = Ssh::with(&node, opts).await;
    let addr = SocketAddr::new(node.ip, node.port_of("bulk").await);
    let visit = async || TcpStream::connect(addr).await.unwrap();

    let plain = plain_tcp(&net).await;
    let one = speeds(vec![visit().await]).await[0];
    let mut visitors = Vec::new();
    for _ in 0..20 {
        visitors.push(visit().await);
    }
    let twenty = speeds(visitors).await;
    let (sum, squares) = (twenty.iter().sum::<f64>(), twenty.iter().map(|x| x * x).sum::<f64>());
    let jain = sum * sum / (20.0 * squares);
    eprintln!(
        "plain TCP {:.2} MB/s; one download {:.2}, {:.0} %; twenty {:.2} in all, Jain {jain:.3}",
        plain / 1e6,
        one / 1e6,
        100.0 * one / plain,
        sum / 1e6
    );
    assert!(one >= 0.8 * plain, "one download reaches {:.0} %", 100.0 * one / plain);
    assert!(jain >= 0.9 && sum >= 0.7 * plain, "{twenty:?}");
}
