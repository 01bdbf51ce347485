//! Visitors who all do the same for a while: the server's CPU for what they did.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use super::{Sample, cost, quantile, told};
use crate::system::Server;
use crate::visitor::{self, Pace, Tally};
use crate::{Bench, Outcome};

/// What all of them did, and what it took.
struct Done<T> {
    each: Vec<T>,
    cpu: Duration,
    time: Duration,
}

pub async fn downloads(bench: &Bench, server: &Server, streams: usize) -> Outcome<Sample> {
    let done =
        together(bench, server, streams, |addr, until| visitor::download(addr, until, Pace::Full, Tally::default()))
            .await?;
    bulk(&done)
}

pub async fn uploads(bench: &Bench, server: &Server, streams: usize) -> Outcome<Sample> {
    let done =
        together(bench, server, streams, |addr, until| visitor::upload(addr, until, Pace::Full, Tally::default()))
            .await?;
    bulk(&done)
}

fn bulk(done: &Done<u64>) -> Outcome<Sample> {
    let bytes = done.each.iter().sum::<u64>() as f64;
    Ok(vec![
        cost("CPU", "s/GB", done.cpu.as_secs_f64() / (bytes / 1e9)),
        told("rate", "MB/s", bytes / 1e6 / done.time.as_secs_f64()),
    ])
}

pub async fn echoes(bench: &Bench, server: &Server, visitors: usize) -> Outcome<Sample> {
    let done = together(bench, server, visitors, |addr, until| visitor::echo(addr, until, Tally::default())).await?;
    let mut times = done.each.concat();
    let trips = times.len() as f64;
    Ok(vec![
        cost("CPU", "µs/trip", done.cpu.as_secs_f64() * 1e6 / trips),
        told("rate", "trips/s", trips / done.time.as_secs_f64()),
        told("p50", "µs", quantile(&mut times, 0.5)),
        told("p99", "µs", quantile(&mut times, 0.99)),
    ])
}

pub async fn connections(bench: &Bench, server: &Server, visitors: usize) -> Outcome<Sample> {
    let done = together(bench, server, visitors, come_and_go).await?;
    let mut times = done.each.concat();
    let visits = times.len() as f64;
    Ok(vec![
        cost("CPU", "µs/conn", done.cpu.as_secs_f64() * 1e6 / visits),
        told("rate", "conns/s", visits / done.time.as_secs_f64()),
        told("p50", "µs", quantile(&mut times, 0.5)),
        told("p99", "µs", quantile(&mut times, 0.99)),
    ])
}

async fn come_and_go(addr: SocketAddr, until: Instant) -> Outcome<Vec<Duration>> {
    let mut times = Vec::new();
    let mut begun = Instant::now();
    while begun < until {
        visitor::greet(addr).await?;
        let done = Instant::now();
        times.push(done - begun);
        begun = done;
    }
    Ok(times)
}

async fn together<T, F>(
    bench: &Bench,
    server: &Server,
    visitors: usize,
    visit: impl Fn(SocketAddr, Instant) -> F,
) -> Outcome<Done<T>>
where
    T: Send + 'static,
    F: Future<Output = Outcome<T>> + Send + 'static,
{
    let mut tunnel = server.tunnel(bench).await?;
    let (before, begun) = (server.cpu(), Instant::now());
    let mut all = JoinSet::new();
    for _ in 0..visitors {
        all.spawn(visit(tunnel.visitors, begun + bench.options.window()));
    }
    let mut each = Vec::new();
    while let Some(done) = all.join_next().await {
        each.push(done??);
    }
    let (cpu, time) = (server.cpu() - before, begun.elapsed());
    tunnel.runs()?;
    Ok(Done { each, cpu, time })
}
