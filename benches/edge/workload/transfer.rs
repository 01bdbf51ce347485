//! Visitors who all do the same for a while: the server's CPU for what they did.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use super::{Done, Sample, cost, quantile, together, told};
use crate::system::{Server, Way};
use crate::visitor::{self, Pace, Tally};
use crate::{Bench, Outcome};

pub async fn downloads(bench: &Bench, server: &Server, streams: usize) -> Outcome<Sample> {
    let each = |addr, until| visitor::download(addr, until, Pace::Full, Tally::default());
    Ok(through(bench, server, streams, each).await?.per_gigabyte())
}

pub async fn uploads(bench: &Bench, server: &Server, streams: usize) -> Outcome<Sample> {
    let each = |addr, until| visitor::upload(addr, until, Pace::Full, Tally::default());
    Ok(through(bench, server, streams, each).await?.per_gigabyte())
}

pub async fn echoes(bench: &Bench, server: &Server, visitors: usize) -> Outcome<Sample> {
    let done = through(bench, server, visitors, |addr, until| visitor::echo(addr, until, Tally::default())).await?;
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
    let done = through(bench, server, visitors, come_and_go).await?;
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

async fn through<T, F>(
    bench: &Bench,
    server: &Server,
    visitors: usize,
    visit: impl Fn(SocketAddr, Instant) -> F,
) -> Outcome<Done<T>>
where
    T: Send + 'static,
    F: Future<Output = Outcome<T>> + Send + 'static,
{
    let mut tunnel = server.tunnel(bench, Way::Orders).await?;
    let done = together(bench, server, vec![tunnel.visitors; visitors], visit).await?;
    tunnel.runs()?;
    Ok(done)
}
