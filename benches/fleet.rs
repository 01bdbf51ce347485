//! What a node knows of a fleet of 1000 nodes with 10^6 tunnels: memory of a location,
//! time to fill the table, and what one event and one lookup cost.
#![allow(missing_docs, clippy::unwrap_used, clippy::print_stdout)]

use std::hint::black_box;
use std::time::Instant;

use adit::fleet::Known;
use adit::model::TunnelId;
use criterion::{Criterion, criterion_group, criterion_main};

const LOCATIONS: u32 = 1_000_000;
const NODES: u32 = 1000;

fn node(n: u32) -> String {
    format!("node-{:04}", n % NODES)
}

fn tunnel(n: u32) -> String {
    format!("tunnel-{n:08}")
}

/// As a node writes it.
fn location(n: u32) -> String {
    let boot = n % NODES;
    format!(r#"{{"v":1,"boot":"{boot:016x}","login":0,"epoch":"","since_ms":1700000000000,"rtt_us":20000}}"#)
}

fn lives(n: u32) -> String {
    format!(r#"{{"v":1,"boot":"{n:016x}","addresses":["192.0.2.1:7443"]}}"#)
}

/// Resident memory, in bytes.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap();
    pages.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
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
    let before = resident();
    let begun = Instant::now();
    let mut known = Known::default();
    for n in 0..NODES {
        assert!(known.put(format!("up/node/{}", node(n)), &lives(n)));
    }
    for n in 0..LOCATIONS {
        assert!(known.put(format!("up/loc/{}/{}", node(n), tunnel(n)), &location(n)));
    }
    let (took, grown) = (begun.elapsed(), resident() - before);
    println!(
        "{LOCATIONS} locations of {NODES} nodes: {} MiB, {} bytes each; filled in {took:?}",
        grown >> 20,
        grown / u64::from(LOCATIONS)
    );
    let ids: Vec<TunnelId> = jumping(LOCATIONS).take(100_000).map(|n| tunnel(n).parse().unwrap()).collect();
    assert!(ids.iter().all(|id| known.places(id) == 1));

    let mut group = c.benchmark_group("a fleet of 10^6 tunnels at 1000 nodes");
    let mut asked = ids.iter().cycle();
    group.bench_function("where a tunnel is", |b| b.iter(|| known.places(black_box(asked.next().unwrap()))));
    let events: Vec<(String, String)> =
        jumping(LOCATIONS).take(100_000).map(|n| (format!("up/loc/{}/{}", node(n), tunnel(n)), location(n))).collect();
    let mut next = events.iter().cycle();
    group.bench_function("a login", |b| {
        b.iter(|| {
            let (key, value) = next.next().unwrap();
            known.put(key.clone(), value)
        });
    });
    group.bench_function("a login's end, and the next", |b| {
        b.iter(|| {
            let (key, value) = next.next().unwrap();
            known.remove(key);
            known.put(key.clone(), value)
        });
    });
    let nodes = jumping(NODES).take(1000).map(|n| (format!("up/node/{}", node(n)), lives(n)));
    let nodes: Vec<(String, String)> = nodes.collect();
    let mut dying = nodes.iter().cycle();
    group.bench_function("a node's death, and its return", |b| {
        b.iter(|| {
            let (key, value) = dying.next().unwrap();
            known.remove(key);
            known.put(key.clone(), value)
        });
    });
    group.bench_function("all nodes with their tunnels", |b| b.iter(|| known.tunnels()));
    group.finish();
}

criterion_group!(fleet, benches);
criterion_main!(fleet);
