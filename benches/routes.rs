//! Lookups in a route table of a million sockets, and the writer's cost of one
//! more. A lookup is paid by every visit (port) and every request (host).
#![allow(missing_docs, clippy::unwrap_used)]

use std::hint::black_box;

use adit::model::{Socket, SocketType};
use adit::routes::Routes;
use criterion::{Criterion, criterion_group, criterion_main};

const SOCKETS: u32 = 1_000_000;
/// All the ports there are for raw sockets.
const PORTS: u16 = 40_000;

fn table() -> Routes {
    let routes = Routes::default();
    for i in 0..SOCKETS {
        routes.put_socket(http(i));
    }
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
    let mut ports = jumping(PORTS.into()).map(|i| 20_000 + u16::try_from(i).unwrap());
    group.bench_function("port", |b| b.iter(|| routes.by_port(black_box(ports.next().unwrap()))));
    let mut changed = jumping(SOCKETS);
    group.bench_function("replace a socket", |b| b.iter(|| routes.put_socket(http(changed.next().unwrap()))));
    group.finish();
}

criterion_group!(routes, benches);
criterion_main!(routes);
