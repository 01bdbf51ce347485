//! Raw visitors of a node whose tunnel is at another: what the first one costs.

use std::time::Duration;

use super::{Sample, cost, together, told};
use crate::system::{Fleet, System};
use crate::visitor::{self, Pace, Tally};
use crate::{Bench, Outcome};

/// Of each kind at once.
const DOWNLOADS: usize = 4;
const ECHOES: usize = 16;

pub async fn entry(bench: &Bench, system: &System) -> Outcome<Sample> {
    let mut fleet = Fleet::start(bench, system).await?;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let visitors = |count| vec![fleet.visitors; count];
    let bulk = together(bench, &fleet.entry, visitors(DOWNLOADS), |addr, until| {
        visitor::download(addr, until, Pace::Full, Tally::default())
    });
    let bulk = bulk.await?;
    let echoes =
        together(bench, &fleet.entry, visitors(ECHOES), |addr, until| visitor::echo(addr, until, Tally::default()));
    let echoes = echoes.await?;
    fleet.runs()?;
    let trips = echoes.each.iter().map(Vec::len).sum::<usize>() as f64;
    let mut sample = bulk.per_gigabyte();
    sample.push(cost("CPU of echoes", "µs/trip", echoes.cpu.as_secs_f64() * 1e6 / trips));
    sample.push(told("rate of echoes", "trips/s", trips / echoes.time.as_secs_f64()));
    Ok(sample)
}
