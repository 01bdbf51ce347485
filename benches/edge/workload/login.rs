//! SSH logins, one after another: key exchange, host key, user's key, the end.

use std::time::{Duration, Instant};

use super::{Sample, cost, quantile, told};
use crate::light::Lights;
use crate::system::Server;
use crate::watch::Watch;
use crate::{Bench, Outcome, within};

/// At least so many: sshd takes 30 ms of CPU for each.
const LOGINS: usize = 50;

pub async fn logins(bench: &Bench, server: &Server) -> Outcome<Sample> {
    let lights = Lights::new(&server.key(), &bench.options.cipher)?;
    let login = async || within(Duration::from_secs(10), "a login", lights.login(server)).await;
    login().await?.leave().await;

    let watch = Watch::start(bench, server).await?;
    let begun = watch.begun();
    let mut times = Vec::new();
    while times.len() < LOGINS || begun.elapsed() < bench.options.window() {
        let from = Instant::now();
        let light = login().await?;
        times.push(from.elapsed());
        light.leave().await;
    }
    let time = begun.elapsed();
    // sshd's children end a little later.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (cpu, _) = watch.end(server).await;
    let logins = times.len() as f64;
    Ok(vec![
        cost("CPU", "ms/login", cpu.as_secs_f64() * 1e3 / logins),
        told("rate", "logins per CPU second", logins / cpu.as_secs_f64()),
        told("rate", "logins/s", logins / time.as_secs_f64()),
        told("p50", "µs", quantile(&mut times, 0.5)),
        told("p99", "µs", quantile(&mut times, 0.99)),
    ])
}
