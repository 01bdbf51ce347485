//! The echo of one visitor: alone, then beside another's bulk transfer through
//! the same tunnel, at full speed and at a pace that leaves the machine idle: what
//! grows at full speed only is the wait for a core, and for the client's own cipher.

use std::time::{Duration, Instant};

use super::{Sample, cost, quantile, told};
use crate::system::{Server, Way};
use crate::visitor::{self, Pace, Tally};
use crate::{Bench, Outcome};

/// A transfer is at full speed after this.
const RUN_UP: Duration = Duration::from_millis(500);

/// A gigabit link's worth, in bytes a second.
const PACED: Pace = Pace::Of(100_000_000);

pub async fn echo_beside_bulk(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let mut tunnel = server.tunnel(bench, Way::Orders).await?;
    let (addr, window) = (tunnel.visitors, bench.options.window());
    let listen = async || visitor::echo(addr, Instant::now() + window, Tally::default()).await;
    let until = || Instant::now() + RUN_UP + window;

    let mut quiet = listen().await?;
    let quiet_p99 = quantile(&mut quiet, 0.99);
    let mut sample = vec![told("quiet p50", "µs", quantile(&mut quiet, 0.5)), told("quiet p99", "µs", quiet_p99)];
    for (pace, down, up) in [
        (Pace::Full, ["beside download p50", "beside download p99"], ["beside upload p50", "beside upload p99"]),
        (
            PACED,
            ["beside 100 MB/s down p50", "beside 100 MB/s down p99"],
            ["beside 100 MB/s up p50", "beside 100 MB/s up p99"],
        ),
    ] {
        let bulk = tokio::spawn(visitor::download(addr, until(), pace, Tally::default()));
        tokio::time::sleep(RUN_UP).await;
        let beside_download = listen().await?;
        bulk.await??;
        let bulk = tokio::spawn(visitor::upload(addr, until(), pace, Tally::default()));
        tokio::time::sleep(RUN_UP).await;
        let beside_upload = listen().await?;
        bulk.await??;
        for ([p50, p99], mut times) in [(down, beside_download), (up, beside_upload)] {
            let value = quantile(&mut times, 0.99);
            sample.push(told(p50, "µs", quantile(&mut times, 0.5)));
            sample.push(cost(p99, "µs", value));
            sample.push(told(p99, "x quiet", value / quiet_p99));
        }
    }
    tunnel.runs()?;
    Ok(sample)
}
