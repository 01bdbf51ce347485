//! A node short of descriptors or memory: visitors wait or are refused, the
//! node and its sessions live, and it serves again when they have left.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const MIB: u64 = 1 << 20;

/// What the tunnels of a node may hold at default settings (`ssh.tunnel_buffer`).
const TUNNEL_BUFFER: u64 = 64 * MIB;

/// What a visitor costs beside it: 128 KiB towards the origin, as much again
/// for the relay's and the library's own buffers in both directions.
const PER_VISITOR: u64 = 256 << 10;

/// What allocators keep, page tables, stacks: a third of a hundred.
const SLACK: u64 = 32 * MIB;

async fn say(addr: SocketAddr, command: &str) -> std::io::Result<TcpStream> {
    let mut tcp = TcpStream::connect(addr).await?;
    tcp.write_all(format!("{command}\n").as_bytes()).await?;
    Ok(tcp)
}

/// Visits as another visitor does, and tells how long that took.
async fn another(addr: SocketAddr) -> Duration {
    let begun = Instant::now();
    let mut tcp = say(addr, "DOWN 100000").await.unwrap();
    let read = within(DEADLINE, "another visitor", Pattern::read(Some(100_000), &mut tcp)).await;
    assert_eq!(read, Ok(100_000));
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_descriptors_waits_and_serves_again() {
    let limited = ["sh", "-c", r#"ulimit -n 64; exec "$0" "$@""#];
    let mut node = Node::with(NodeOpts::default().under(&limited)).await;
    let (web, raw) = (Origin::http().await, Origin::raw().await);
    let forwards = [format!("web:80:{}", web.target()), format!("tcp/raw:{}", raw.target())];
    let mut ssh = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    another(addr).await;

    // Silent on the HTTP port would end them at hello.deadline: on a raw port they stay.
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(say(addr, "ECHO").await.unwrap());
    }
    eventually("the node has no descriptor left", async || {
        node.log().contains("cannot accept connections").then_some(())
    })
    .await;
    let before = node.usage();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let after = node.usage();
    eprintln!("{} descriptors of 64; a second of shortage took {:?} of CPU", after.descriptors, after.cpu - before.cpu);
    assert!(after.cpu - before.cpu < Duration::from_millis(200), "it spins: {:?}", after.cpu - before.cpu);
    assert!(node.program().runs() && ssh.program.runs());
    // Who is inside is served meanwhile.
    crowd[0].write_all(b"!").await.unwrap();
    assert_eq!(within(DEADLINE, "an echo", crowd[0].read_u8()).await.unwrap(), b'!');

    drop(crowd);
    let begun = Instant::now();
    let served = eventually("served again", async || {
        let mut tcp = say(addr, "DOWN 100000").await.ok()?;
        Pattern::read(Some(100_000), &mut tcp).await.ok()
    });
    assert_eq!(served.await, 100_000);
    eprintln!("served again after {:?}", begun.elapsed());
    let url = format!("https://web.edge.localhost:{}/", node.addr("https").port());
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    assert_eq!(node.api("GET", "/healthz", None).await.0, 200);
    // A record can still be written, and an owner log in.
    node.put("sockets/late", serde_json::json!({"type": "http", "hostnames": ["late.test"]})).await;
    let _second = Ssh::start(&node, &["second:80:localhost:1"]).await;
    assert!(ssh.program.runs(), "the session ended");
    assert!(!node.log().contains("panicked"), "{}", node.log());
}

/// Forty visitors who do as `crowd` does; the most memory that the node had,
/// over what it had before.
async fn memory_with(crowd: impl AsyncFn(SocketAddr) -> TcpStream) -> (u64, Duration) {
    let node = Node::start().await;
    let raw = Origin::raw().await;
    let mut ssh = Ssh::start(&node, &[&format!("tcp/raw:{}", raw.target())]).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    another(addr).await;
    let before = node.usage();
    let mut most = before.memory;
    let mut inside = Vec::new();
    for _ in 0..40 {
        inside.push(crowd(addr).await);
        most = most.max(node.usage().memory);
    }
    let mut longest = Duration::ZERO;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(8) {
        let waited = tokio::join!(another(addr), async {
            for _ in 0..10 {
                most = most.max(node.usage().memory);
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        longest = longest.max(waited.0);
    }
    assert!(ssh.program.runs(), "the session ended");
    // By reset: a close would wait behind what the node does not read.
    inside.iter().for_each(|tcp| socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO)).unwrap());
    drop(inside);
    eventually("all are gone", async || {
        let (_, status) = node.api("GET", "/v1/status", None).await;
        let session = &status["live"]["raw"][0];
        (session["connections"] == 0 && session["queued_bytes"] == 0).then_some(())
    })
    .await;
    eprintln!(
        "memory: {} MiB before, {} MiB at most, {} MiB after; another visitor waited {longest:?} at most",
        before.memory / MIB,
        most / MIB,
        node.usage().memory / MIB
    );
    (most - before.memory, longest)
}

#[tokio::test(flavor = "multi_thread")]
async fn forty_visitors_that_stop_reading_cost_bounded_memory() {
    // How long others wait is no promise here: those who stop one after another
    // may each hold the session up for a deadline. What holds for those who stop
    // together is tested with paused time, beside the pump.
    let (grown, _) = memory_with(async |addr| say(addr, "DOWN 100000000").await.unwrap()).await;
    let bound = TUNNEL_BUFFER + 40 * PER_VISITOR + SLACK;
    assert!(grown < bound, "{} MiB more, not {}", grown / MIB, bound / MIB);
}

#[tokio::test(flavor = "multi_thread")]
async fn forty_uploads_to_an_origin_that_stops_reading_cost_bounded_memory() {
    let upload = async |addr| {
        let mut tcp = say(addr, "HOLD").await.unwrap();
        // As much as anybody takes; then nobody does.
        let mut pattern = Pattern::default();
        while let Ok(Ok(())) =
            tokio::time::timeout(Duration::from_millis(100), tcp.write_all(pattern.next(64 << 10))).await
        {}
        tcp
    };
    let (grown, longest) = memory_with(upload).await;
    let bound = 40 * PER_VISITOR + SLACK;
    assert!(grown < bound, "{} MiB more, not {}", grown / MIB, bound / MIB);
    assert!(longest < Duration::from_secs(4 + 2), "another waited {longest:?}");
}

/// Any host key will do.
struct Trusting;

impl russh::client::Handler for Trusting {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &russh::keys::PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_that_never_log_in_cost_16_kib_each_and_go_at_the_deadline() {
    let deadline = Duration::from_secs(20);
    let opts = ["unauthenticated_per_address = 2000", "sessions_per_address = 2000", "login_deadline = \"20s\""];
    let node = Node::with(opts.iter().fold(NodeOpts::default(), |opts, line| opts.set("ssh", line))).await;
    let mut staying = Ssh::start(&node, &["web:80:localhost:1"]).await;
    let addr = node.addr("ssh");
    // The first bytes of a packet as long as may be before the login, and no more of it.
    let unfinished = [b"SSH-2.0-x\r\n".as_slice(), &8_188_u32.to_be_bytes(), &[7; 8_000]].concat();
    let first: [&[u8]; 3] = [b"", b"SSH-2.0-OpenSSH_9.2\r\n", &unfinished];
    let before = node.usage();
    let begun = Instant::now();
    let (mut saying, mut agreed) = (Vec::new(), Vec::new());
    for number in 0..1000 {
        match first.get(number % 4) {
            Some(bytes) => {
                let mut tcp = TcpStream::connect(addr).await.unwrap();
                tcp.write_all(bytes).await.unwrap();
                saying.push(tcp);
            }
            None => agreed.push(russh::client::connect(Default::default(), addr, Trusting).await.unwrap()),
        }
    }
    let opened = begun.elapsed();
    assert!(opened < deadline, "the first is gone before the last came");
    let inside = node.usage();
    assert!(inside.descriptors >= before.descriptors + 1000, "{} descriptors", inside.descriptors);
    let each = (inside.memory - before.memory) / 1000;
    eprintln!("{each} bytes each; opened in {opened:?}, {:?} of CPU", inside.cpu - before.cpu);
    assert!(each <= 16 << 10, "{each} bytes each");

    let gone = async {
        for mut tcp in saying {
            let _ = tcp.read_to_end(&mut Vec::new()).await;
        }
        for client in agreed {
            let _ = client.await;
        }
    };
    within(deadline + DEADLINE, "the end of all", gone).await;
    eventually("their descriptors are free", async || (node.usage().descriptors <= before.descriptors).then_some(()))
        .await;
    assert!(begun.elapsed() >= deadline, "some went before: {:?}", begun.elapsed());
    assert!(staying.program.runs(), "who logged in stays");
}
