//! The relay between two TCP connections: spliced, copied, and tokio's
//! `copy_bidirectional` as the baseline, and no relay at all as the ceiling. The
//! relay has a thread of its own, so that the CPU it costs (printed at the end)
//! is told apart from the load's.
//!
//! What this tells is how the four compare on one machine at one time. On
//! loopback the bytes never leave the CPU's caches: the gigabytes per second
//! are no promise for a network card.
#![allow(missing_docs, clippy::unwrap_used, clippy::panic)]

use std::net::SocketAddr;
use std::time::Duration;

use adit::relay::{RelaySettings, relay};
use adit::stream::Stream;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Builder, Handle, Runtime};
use tokio_util::sync::CancellationToken;

const BULK: usize = 64 << 20;

const KINDS: [Kind; 3] = [Kind::Spliced, Kind::Copied, Kind::Baseline];

#[derive(Debug, Clone, Copy)]
enum Kind {
    Spliced,
    Copied,
    Baseline,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Spliced => "adit, spliced",
            Kind::Copied => "adit, copied",
            Kind::Baseline => "tokio copy_bidirectional",
        }
    }

    async fn relay(self, mut visitor: TcpStream, mut origin: TcpStream) {
        if let Kind::Baseline = self {
            let _ = tokio::io::copy_bidirectional(&mut visitor, &mut origin).await;
            return;
        }
        let settings = RelaySettings { splice: matches!(self, Kind::Spliced), ..RelaySettings::default() };
        relay(Stream::tcp(visitor), Stream::tcp(origin), &settings, &CancellationToken::new()).await;
    }
}

/// Reno everywhere, whatever the system's own is: figures must compare.
async fn listen() -> TcpListener {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    socket2::SockRef::from(&listener).set_tcp_congestion(b"reno").unwrap();
    listener
}

async fn connect(addr: SocketAddr) -> TcpStream {
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket2::SockRef::from(&socket).set_tcp_congestion(b"reno").unwrap();
    let stream = socket.connect(addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    stream
}

/// A thread that relays every connection to `origin`.
fn edge(kind: Kind, origin: SocketAddr) -> (SocketAddr, Handle) {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let handle = runtime.handle().clone();
        runtime.block_on(async move {
            let listener = listen().await;
            tell.send((listener.local_addr().unwrap(), handle)).unwrap();
            loop {
                let (visitor, _) = listener.accept().await.unwrap();
                visitor.set_nodelay(true).unwrap();
                tokio::spawn(async move { kind.relay(visitor, connect(origin).await).await });
            }
        })
    });
    told.recv().unwrap()
}

/// The CPU time of the edge's thread.
fn cpu(edge: &Handle) -> Duration {
    let (tell, told) = std::sync::mpsc::channel();
    edge.spawn(async move {
        let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
        let nanos = text.split_whitespace().next().unwrap().parse().unwrap();
        tell.send(Duration::from_nanos(nanos)).unwrap();
    });
    told.recv().unwrap()
}

/// An origin that sends `BULK` to whoever sends `b`, and anything else back.
fn origin(load: &Runtime) -> SocketAddr {
    let listener = load.block_on(listen());
    let addr = listener.local_addr().unwrap();
    load.spawn(async move {
        loop {
            let (mut visitor, _) = listener.accept().await.unwrap();
            visitor.set_nodelay(true).unwrap();
            tokio::spawn(async move {
                let mut buf = vec![0; 256 << 10];
                while let Ok(n @ 1..) = visitor.read(&mut buf).await {
                    let [said, ..] = buf.as_mut_slice() else { return };
                    if *said == b'b' {
                        *said = 0;
                        for _ in 0..BULK / buf.len() {
                            visitor.write_all(&buf).await.unwrap();
                        }
                    } else if visitor.write_all(buf.get(..n).unwrap()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    addr
}

async fn bulk(visitor: &mut TcpStream, buf: &mut [u8]) {
    visitor.write_all(b"b").await.unwrap();
    let mut left = BULK;
    while left > 0 {
        left -= visitor.read(buf).await.unwrap();
    }
}

async fn ping(visitor: &mut TcpStream, buf: &mut [u8]) {
    visitor.write_all(buf).await.unwrap();
    visitor.read_exact(buf).await.unwrap();
}

fn benches(c: &mut Criterion) {
    let load = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let origin = origin(&load);
    let edges = KINDS.map(|kind| (kind, edge(kind, origin)));
    let ways: Vec<(&str, SocketAddr)> =
        edges.iter().map(|(kind, (addr, _))| (kind.name(), *addr)).chain([("no relay", origin)]).collect();
    let mut buf = vec![0; 256 << 10];

    let mut group = c.benchmark_group("relay 64 MiB");
    group.throughput(Throughput::Bytes(BULK as u64)).sample_size(20);
    for (name, addr) in &ways {
        let mut visitor = load.block_on(connect(*addr));
        group.bench_function(*name, |b| b.iter(|| load.block_on(bulk(&mut visitor, &mut buf))));
    }
    group.finish();

    let mut group = c.benchmark_group("relay round trip");
    for size in [64usize, 4 << 10, 32 << 10] {
        for (name, addr) in &ways {
            let mut visitor = load.block_on(connect(*addr));
            let mut message = vec![0; size];
            group.bench_function(BenchmarkId::new(*name, size), |b| {
                b.iter(|| load.block_on(ping(&mut visitor, &mut message)));
            });
        }
    }
    group.finish();

    println!("CPU of the relay's thread:");
    for (kind, (addr, handle)) in &edges {
        let mut visitor = load.block_on(connect(*addr));
        let before = cpu(handle);
        load.block_on(async {
            for _ in 0..32 {
                bulk(&mut visitor, &mut buf).await;
            }
        });
        let spent = cpu(handle) - before;
        let gb = (32 * BULK) as f64 / 1e9;
        println!("  {}: {:.3} s per GB", kind.name(), spent.as_secs_f64() / gb);
        let mut visitor = load.block_on(connect(*addr));
        let before = cpu(handle);
        load.block_on(async {
            let mut message = [0; 64];
            for _ in 0..20_000 {
                ping(&mut visitor, &mut message).await;
            }
        });
        println!(
            "  {}: {:.1} us per round trip of 64 B",
            kind.name(),
            (cpu(handle) - before).as_secs_f64() * 1e6 / 2e4
        );
    }
}

criterion_group!(relays, benches);
criterion_main!(relays);
