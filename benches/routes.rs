//! A route table of a million sockets with a tunnel each: its memory, lookups with
//! names that jump about and with the same few (hot), and the writer's cost of a
//! change. A lookup is paid by every visit (port) and every request (host).
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use std::hint::black_box;

use adit::model::{Socket, SocketType, Tunnel};
use adit::routes::Routes;
use criterion::{Criterion, criterion_group, criterion_main};

const SOCKETS: u32 = 1_000_000;
/// All the ports there are for raw sockets.
const PORTS: u16 = 40_000;

/// Resident memory, in bytes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

fn table() -> Routes {
    let routes = Routes::default();
    let before = resident();
    for i in 0..SOCKETS {
        routes.put_socket(http(i));
    }
    let sockets = resident() - before;
    for i in 0..SOCKETS {
        routes.put_tunnel(tunnel(i));
    }
    let both = resident() - before;
    let each = |bytes: u64| bytes / u64::from(SOCKETS);
    println!("{SOCKETS} sockets: {} bytes each; with a tunnel each: {}", each(sockets), each(both));
    for port in 0..PORTS {
        let mut socket = Socket::new(format!("raw-{port}").parse().unwrap(), SocketType::Tcp);
        socket.ports = vec![20_000 + port];
        routes.put_socket(socket);
    }
    routes
}

/// Every tenth answers to a wildcard.
fn http(i: u32) -> Socket {
    let mut socket = Socket::new(format!("socket-{i}").parse().unwrap(), SocketType::Http);
    let star = if i.is_multiple_of(10) { "*." } else { "" };
    socket.hostnames = vec![format!("{star}name-{i}.customers.example.com").parse().unwrap()];
    socket
}

fn tunnel(i: u32) -> Tunnel {
    let record = serde_json::json!({"socket": format!("socket-{i}")});
    Tunnel::from_record(&format!("tunnel-{i}").parse().unwrap(), record.as_object().unwrap().clone()).unwrap()
}

/// Numbers that jump about, so that every lookup misses the CPU's caches as in life.
fn jumping(limit: u32) -> impl Iterator<Item = u32> {
    let mut state = 1u64;
    std::iter::from_fn(move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from((state >> 33) % u64::from(limit)).ok()
    })
}

fn benches(c: &mut Criterion) {
    let routes = table();
    let names = |make: fn(u32) -> String| jumping(SOCKETS / 10).take(100_000).map(make).collect::<Vec<_>>();
    let mut group = c.benchmark_group("routes at 10^6 sockets");
    for (what, hit, names) in [
        ("exact host", true, names(|i| format!("name-{}.customers.example.com", i * 10 + 1))),
        ("wildcard", true, names(|i| format!("any.name-{}.customers.example.com", i * 10))),
        ("miss", false, names(|i| format!("no-{i}.customers.example.com"))),
    ] {
        let mut names = names.iter().cycle();
        assert!(names.by_ref().take(1000).all(|name| routes.by_host(name).is_some() == hit), "{what}");
        group.bench_function(what, |b| b.iter(|| routes.by_host(black_box(names.next().unwrap()))));
    }
    let mut hot = names(|i| format!("name-{}.customers.example.com", i % 16 * 10 + 1));
    hot.truncate(16);
    let mut hot = hot.iter().cycle();
    group.bench_function("exact host, hot", |b| b.iter(|| routes.by_host(black_box(hot.next().unwrap()))));
    let mut ports = jumping(PORTS.into()).map(|i| 20_000 + u16::try_from(i).unwrap());
    group.bench_function("port", |b| b.iter(|| routes.by_port(black_box(ports.next().unwrap()))));
    let mut changed = jumping(SOCKETS);
    group.bench_function("replace a socket", |b| b.iter(|| routes.put_socket(http(changed.next().unwrap()))));
    let mut changed = jumping(SOCKETS);
    group.bench_function("replace a tunnel", |b| {
        b.iter(|| routes.put_tunnel(tunnel(changed.next().unwrap())));
    });
    group.finish();
}

criterion_group!(routes, benches);
criterion_main!(routes);
