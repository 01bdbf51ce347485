//! The echo of one visitor: alone, then beside another's bulk transfer through
//! the same tunnel.

use std::time::{Duration, Instant};

use super::{Sample, cost, quantile, told};
use crate::system::Server;
use crate::visitor::{self, Tally};
use crate::{Bench, Outcome};

/// A transfer is at full speed after this.
const RUN_UP: Duration = Duration::from_millis(500);

pub async fn echo_beside_bulk(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench).await?;
    let (addr, window) = (tunnel.visitors, bench.options.window());
    let listen = async || visitor::echo(addr, Instant::now() + window, Tally::default()).await;

    let mut quiet = listen().await?;

    let bulk = tokio::spawn(visitor::download(addr, Instant::now() + RUN_UP + window, Tally::default()));
    tokio::time::sleep(RUN_UP).await;
    let mut down = listen().await?;
    bulk.await??;

    let bulk = tokio::spawn(visitor::upload(addr, Instant::now() + RUN_UP + window, Tally::default()));
    tokio::time::sleep(RUN_UP).await;
    let mut up = listen().await?;
    bulk.await??;

    tunnel.runs()?;
    let quiet_p99 = quantile(&mut quiet, 0.99);
    let (down_p99, up_p99) = (quantile(&mut down, 0.99), quantile(&mut up, 0.99));
    Ok(vec![
        told("quiet p50", "µs", quantile(&mut quiet, 0.5)),
        told("quiet p99", "µs", quiet_p99),
        told("beside download p50", "µs", quantile(&mut down, 0.5)),
        cost("beside download p99", "µs", down_p99),
        told("beside download p99", "x quiet", down_p99 / quiet_p99),
        told("beside upload p50", "µs", quantile(&mut up, 0.5)),
        cost("beside upload p99", "µs", up_p99),
        told("beside upload p99", "x quiet", up_p99 / quiet_p99),
    ])
}
