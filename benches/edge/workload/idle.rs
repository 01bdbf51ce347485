//! Memory of what is open and says nothing: the growth over a warm server's.

use std::time::Duration;

use tokio::io::AsyncWriteExt;

use super::{Sample, cost};
use crate::light::{Light, Lights};
use crate::origin::Order;
use crate::system::{Server, Way};
use crate::usage::Memory;
use crate::web::{SMALL, Site, Visit};
use crate::{Bench, Outcome, visitor, within};

/// What makes a server warm: buffers, caches and code that it keeps anyway.
const WARM: usize = 20;

/// Logins at once.
const ABREAST: usize = 4;

/// Servers give buffers back when nothing happens for a while.
const QUIET: Duration = Duration::from_secs(3);

/// The same for tunnels, and time for adit's keepalive, which it sends every 10 s.
const QUIET_TUNNELS: Duration = Duration::from_secs(12);

pub async fn channels(bench: &Bench, server: &Server, count: usize) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Orders).await?;
    let mut open = Vec::new();
    let mut warm = None;
    for n in 0..WARM + count {
        if n == WARM {
            tokio::time::sleep(QUIET).await;
            warm = Some(server.memory());
        }
        let mut tcp = visitor::connect(tunnel.visitors).await?;
        tcp.write_all(&Order::Echo.bytes()).await?;
        visitor::ping(&mut tcp, n as u64).await?;
        open.push(tcp);
    }
    tokio::time::sleep(QUIET).await;
    let full = server.memory();
    // All are still there.
    for (n, tcp) in open.iter_mut().enumerate() {
        visitor::ping(tcp, n as u64).await?;
    }
    tunnel.runs()?;
    Ok(growth(warm.ok_or("no visitors")?, full, count, "KiB/channel"))
}

/// Visitors over TLS, each with a request that was answered, on connections that stay.
pub async fn visitors(bench: &Bench, server: &Server, count: usize) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Https).await?;
    let site = bench.site(Way::Https, tunnel.visitors, server);
    let mut open = come(&site, WARM).await?;
    tokio::time::sleep(QUIET).await;
    let warm = server.memory();
    open.extend(come(&site, count).await?);
    tokio::time::sleep(QUIET).await;
    let full = server.memory();
    // All are still there.
    for visit in &mut open {
        visit.get(SMALL).await?;
    }
    tunnel.runs()?;
    Ok(growth(warm, full, count, "KiB/visitor"))
}

async fn come(site: &Site, count: usize) -> Outcome<Vec<Visit>> {
    let mut open = Vec::new();
    for _ in 0..count {
        let mut visit = site.http1().await?;
        visit.get(SMALL).await?;
        open.push(visit);
    }
    Ok(open)
}

pub async fn tunnels(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let count = bench.options.tunnels.unwrap_or(server.light_clients());
    let lights = Lights::new(&server.key(), &bench.options.cipher)?;
    let mut open = register(&lights, server, 0..WARM).await?;
    tokio::time::sleep(QUIET).await;
    let warm = server.memory();
    open.extend(register(&lights, server, WARM..WARM + count).await?);
    tokio::time::sleep(QUIET_TUNNELS).await;
    let full = server.memory();
    open.iter().try_for_each(Light::lives)?;
    Ok(growth(warm, full, count, "KiB/tunnel"))
}

async fn register(lights: &Lights, server: &Server, which: std::ops::Range<usize>) -> Outcome<Vec<Light>> {
    let one = async |n| {
        let light = lights.login(server).await?;
        light.register(server.light_forward(n)).await?;
        Ok(light)
    };
    let mut open = Vec::new();
    let all: Vec<usize> = which.collect();
    for some in all.chunks(ABREAST) {
        let logins = some.iter().map(|n| within(Duration::from_secs(20), "a tunnel", one(*n)));
        for light in futures_util::future::join_all(logins).await {
            open.push(light?);
        }
    }
    Ok(open)
}

fn growth(warm: Memory, full: Memory, count: usize, unit: &'static str) -> Sample {
    let each = |from: u64, to: u64| (to as f64 - from as f64) / 1024.0 / count as f64;
    vec![cost("RSS", unit, each(warm.rss, full.rss)), cost("own RSS", unit, each(warm.own, full.own))]
}
