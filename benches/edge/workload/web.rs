//! Visitors of the web who all do the same for a while, each answer looked at: the
//! server's CPU for what they did.

use std::time::{Duration, Instant};

use super::{Done, Sample, cost, quantile, together, told};
use crate::system::{Server, Way};
use crate::web::{SMALL, Site, Visit};
use crate::{Bench, Outcome};

/// What a large body has, in bytes.
const LARGE: u64 = 100_000_000;

/// Connections at once of visitors that keep them.
const CONNECTIONS: usize = 32;

/// HTTP/2: connections, and streams on each.
const HTTP2: (usize, usize) = (8, 16);

/// Between two requests of `latency`, whose visitors take turns: 500 a second.
const PAUSE: Duration = Duration::from_millis(2);

pub async fn http1(bench: &Bench, server: &Server, way: Way) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, way).await?;
    let site = bench.site(way, tunnel.visitors, server);
    let visits = connections(&site, CONNECTIONS).await?;
    let sample = small(bench, server, visits, 1.1).await?;
    tunnel.runs()?;
    Ok(sample)
}

/// As many requests at once over HTTP/1.1 where a system speaks nothing else.
pub async fn http2(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let (count, streams) = HTTP2;
    let mut tunnel = server.tunnel(bench, Way::Http2).await?;
    let sample = if tunnel.http2 {
        let site = bench.site(Way::Http2, tunnel.visitors, server);
        let mut visits = Vec::new();
        for _ in 0..count {
            let mut visit = site.http2().await?;
            visit.get(SMALL).await?;
            visits.extend((0..streams).filter_map(|_| visit.stream()));
        }
        small(bench, server, visits, 2.0).await?
    } else {
        let site = bench.site(Way::Https, tunnel.visitors, server);
        small(bench, server, connections(&site, count * streams).await?, 1.1).await?
    };
    tunnel.runs()?;
    Ok(sample)
}

/// Connections that were used once.
async fn connections(site: &Site, count: usize) -> Outcome<Vec<Visit>> {
    let mut visits = Vec::new();
    for _ in 0..count {
        let mut visit = site.http1().await?;
        visit.get(SMALL).await?;
        visits.push(visit);
    }
    Ok(visits)
}

async fn small(bench: &Bench, server: &Server, visits: Vec<Visit>, version: f64) -> Outcome<Sample> {
    let done = together(bench, server, visits, |mut visit, until| async move {
        let mut times = Vec::new();
        let mut begun = Instant::now();
        while begun < until {
            visit.get(SMALL).await?;
            let done = Instant::now();
            times.push(done - begun);
            begun = done;
        }
        Ok(times)
    });
    let mut sample = per_request(&done.await?);
    sample.push(told("HTTP", "version", version));
    Ok(sample)
}

fn per_request(done: &Done<Vec<Duration>>) -> Sample {
    let mut times = done.each.concat();
    let requests = times.len() as f64;
    vec![
        cost("CPU", "µs/request", done.cpu.as_secs_f64() * 1e6 / requests),
        told("rate", "requests/s", requests / done.time.as_secs_f64()),
        told("p50", "µs", quantile(&mut times, 0.5)),
        told("p99", "µs", quantile(&mut times, 0.99)),
    ]
}

/// A connection with its handshake, a small request, the end.
pub async fn handshakes(bench: &Bench, server: &Server, visitors: usize) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Https).await?;
    let site = bench.site(Way::Https, tunnel.visitors, server);
    let done = together(bench, server, vec![site; visitors], |site, until| async move {
        let mut times = Vec::new();
        let mut begun = Instant::now();
        while begun < until {
            site.greet(false).await?;
            let done = Instant::now();
            times.push(done - begun);
            begun = done;
        }
        Ok(times)
    });
    let done = done.await?;
    tunnel.runs()?;
    Ok(per_request(&done))
}

/// Large answers, whole ones, one after another.
pub async fn downloads(bench: &Bench, server: &Server, way: Way, visitors: usize) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, way).await?;
    let visits = connections(&bench.site(way, tunnel.visitors, server), visitors).await?;
    let done = together(bench, server, visits, |mut visit, until| async move {
        let mut bytes = 0;
        while Instant::now() < until {
            bytes += visit.get(LARGE).await?;
        }
        Ok(bytes)
    });
    let done = done.await?;
    tunnel.runs()?;
    Ok(done.per_gigabyte())
}

/// Large requests, one after another.
pub async fn uploads(bench: &Bench, server: &Server, visitors: usize) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Https).await?;
    let visits = connections(&bench.site(Way::Https, tunnel.visitors, server), visitors).await?;
    let done = together(bench, server, visits, |mut visit, until| async move {
        let mut bytes = 0;
        while Instant::now() < until {
            bytes += visit.post(LARGE).await?;
        }
        Ok(bytes)
    });
    let done = done.await?;
    tunnel.runs()?;
    Ok(done.per_gigabyte())
}

/// A small request every 2 ms, whoever is slow: each connection asks in its turn.
pub async fn latency(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Https).await?;
    let visits = connections(&bench.site(Way::Https, tunnel.visitors, server), CONNECTIONS).await?;
    let turn = PAUSE * CONNECTIONS as u32;
    let first = Instant::now() + turn;
    let visits = visits.into_iter().enumerate().map(|(n, visit)| (visit, first + PAUSE * n as u32)).collect();
    let done = together(bench, server, visits, move |(mut visit, mut due), until| async move {
        let mut times = Vec::new();
        // Twice as long as others: few requests.
        let until = until + until.duration_since(first);
        while due < until {
            let late = Instant::now() > due;
            tokio::time::sleep_until(due.into()).await;
            // The timer's own delay is not the system's; that of the last answer is.
            let begun = if late { due } else { Instant::now() };
            visit.get(SMALL).await?;
            times.push(begun.elapsed());
            due += turn;
        }
        Ok(times)
    });
    let done = done.await?;
    tunnel.runs()?;
    let mut times = done.each.concat();
    let requests = times.len() as f64;
    Ok(vec![
        cost("p50", "µs", quantile(&mut times, 0.5)),
        cost("p99", "µs", quantile(&mut times, 0.99)),
        cost("CPU", "µs/request", done.cpu.as_secs_f64() * 1e6 / requests),
        told("rate", "requests/s", requests / done.time.as_secs_f64()),
    ])
}
