//! New session keys in the middle of transfers, asked for by both sides.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::*;

/// Eight downloads and eight uploads at once, each of `bytes`.
async fn eight_each_way(addr: SocketAddr, bytes: u64) {
    let mut visitors = JoinSet::new();
    for n in 0..16 {
        let mut visitor = TcpStream::connect(addr).await.unwrap();
        visitors.spawn(async move {
            if n % 2 == 0 {
                visitor.write_all(format!("DOWN {bytes}\n").as_bytes()).await.unwrap();
                assert_eq!(Pattern::read(None, &mut visitor).await, Ok(bytes));
            } else {
                visitor.write_all(format!("UP {bytes}\n").as_bytes()).await.unwrap();
                Pattern::write(bytes, &mut visitor).await.unwrap();
                let mut answer = String::new();
                visitor.read_to_string(&mut answer).await.unwrap();
                assert_eq!(answer, format!("exact {bytes}\n"));
            }
        });
    }
    visitors.join_all().await;
}

async fn bytes_stay_exact(rekey: &str, client: &str, bytes: u64) {
    let node = Node::with(NodeOpts::default().set("ssh", &format!("rekey_bytes = \"{rekey}\""))).await;
    let origin = Origin::raw().await;
    let mut opts = SshOpts::new(&[&format!("tcp/raw:{}", origin.target())]);
    opts.extra = vec!["-o".into(), format!("RekeyLimit={client}")];
    let mut ssh = Ssh::with(&node, opts).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    let limit = DEADLINE * u32::try_from(1 + bytes / (64 << 20)).unwrap();
    within(limit, "eight each way", eight_each_way(addr, bytes)).await;
    let renewed = ssh.program.output().matches("SSH2_MSG_NEWKEYS received").count();
    eprintln!("{renewed} key exchanges");
    assert!(renewed > 8, "{renewed} key exchanges");
    assert!(ssh.program.runs(), "the session ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_stay_exact_while_both_sides_renew_their_keys() {
    bytes_stay_exact("16MiB", "10M", size(100 << 20, 12 << 20)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_gigabytes_each_way_with_new_keys_every_64_mib() {
    if long() {
        bytes_stay_exact("64MiB", "64M", 2_500_000_000).await;
    }
}
