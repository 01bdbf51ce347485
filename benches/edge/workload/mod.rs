//! The workloads by name, and what one run of each gives: figures.

mod backhaul;
mod bulk_echo;
mod idle;
mod login;
mod stall;
mod transfer;
mod web;

use std::time::{Duration, Instant};

use clap::ValueEnum;
use tokio::task::JoinSet;

use crate::options::Options;
use crate::system::{Field, Server, System, Way};
use crate::watch::Watch;
use crate::{Bench, Outcome};

/// What one run of a workload tells.
pub type Sample = Vec<Figure>;

/// One measured number.
#[derive(Debug, Clone, Copy)]
pub struct Figure {
    /// What it is.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// The number.
    pub value: f64,
    /// Whether systems are compared by it: less is better.
    pub cost: bool,
}

/// A number by which systems are compared: the less, the better.
fn cost(name: &'static str, unit: &'static str, value: f64) -> Figure {
    Figure { name, unit, value, cost: true }
}

/// A number that is told beside.
fn told(name: &'static str, unit: &'static str, value: f64) -> Figure {
    Figure { name, unit, value, cost: false }
}

/// What visitors or clients do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    H1,
    H2,
    Handshake,
    Get1,
    Get8,
    Post1,
    RawGet,
    RawSmall,
    Backhaul,
    IdleTunnels,
    IdleVisitors,
    Latency,
    Login,
    D1,
    D8,
    U1,
    U8,
    Echo1,
    Echo16,
    Conns,
    BulkEcho,
    IdleChannels,
    Stall,
    StallHttps,
    StallH2,
}

impl Workload {
    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// Those of the table in docs/speed.md, in its order.
    pub const TABLE: [Workload; 13] = [
        Workload::H1,
        Workload::H2,
        Workload::Handshake,
        Workload::Get1,
        Workload::Get8,
        Workload::Post1,
        Workload::RawGet,
        Workload::RawSmall,
        Workload::Backhaul,
        Workload::IdleTunnels,
        Workload::IdleVisitors,
        Workload::Latency,
        Workload::Login,
    ];

    /// Who is compared.
    pub fn field(self) -> Field {
        match self {
            Workload::H1 | Workload::H2 | Workload::Handshake => Field::Https,
            Workload::Get1 | Workload::Get8 | Workload::Post1 | Workload::IdleVisitors => Field::Https,
            Workload::StallHttps | Workload::StallH2 => Field::Https,
            Workload::Latency => Field::Latency,
            Workload::Backhaul => Field::Backhaul,
            Workload::Login | Workload::IdleTunnels => Field::Logins,
            _ => Field::Raw,
        }
    }

    /// How often it is run: the long ones, whose figures vary little, seldom.
    pub fn rounds(self, asked: u32) -> usize {
        let rounds = if self.is_long() { asked.div_ceil(5) } else { asked };
        rounds as usize
    }

    fn stops(self) -> bool {
        matches!(self, Workload::Stall | Workload::StallHttps | Workload::StallH2)
    }

    fn is_long(self) -> bool {
        self.stops() || matches!(self, Workload::IdleTunnels | Workload::IdleVisitors)
    }

    /// A sample that takes longer has failed.
    pub fn limit(self, options: &Options) -> Duration {
        let stop = if self.stops() { stall::length(options) } else { Duration::ZERO };
        Duration::from_secs(180) + 4 * options.window() + stop
    }

    /// Runs it once.
    ///
    /// # Errors
    /// Why there are no figures: bytes were wrong or missing, or a step failed.
    pub async fn sample(self, bench: &Bench, system: &System) -> Outcome<Sample> {
        if self == Workload::Backhaul {
            return backhaul::entry(bench, system).await;
        }
        let mut server = Server::start(bench, system).await?;
        let sample = self.of(bench, &server).await;
        sample.map_err(|e| format!("{e}{}", server.last_words()).into())
    }

    async fn of(self, bench: &Bench, server: &Server) -> Outcome<Sample> {
        match self {
            Workload::H1 => web::http1(bench, server, Way::Https).await,
            Workload::H2 => web::http2(bench, server).await,
            Workload::Handshake => web::handshakes(bench, server, 8).await,
            Workload::Get1 => web::downloads(bench, server, Way::Https, 1).await,
            Workload::Get8 => web::downloads(bench, server, Way::Https, 8).await,
            Workload::Post1 => web::uploads(bench, server, 1).await,
            Workload::RawGet => web::downloads(bench, server, Way::Raw, 1).await,
            Workload::RawSmall => web::http1(bench, server, Way::Raw).await,
            Workload::IdleVisitors => idle::visitors(bench, server, bench.options.visitors).await,
            Workload::Latency => web::latency(bench, server).await,
            Workload::Backhaul => Err("it has servers of its own".into()),
            Workload::D1 => transfer::downloads(bench, server, 1).await,
            Workload::D8 => transfer::downloads(bench, server, 8).await,
            Workload::U1 => transfer::uploads(bench, server, 1).await,
            Workload::U8 => transfer::uploads(bench, server, 8).await,
            Workload::Echo1 => transfer::echoes(bench, server, 1).await,
            Workload::Echo16 => transfer::echoes(bench, server, 16).await,
            Workload::Conns => transfer::connections(bench, server, 8).await,
            Workload::Login => login::logins(bench, server).await,
            Workload::BulkEcho => bulk_echo::echo_beside_bulk(bench, server).await,
            Workload::IdleChannels => idle::channels(bench, server, 400).await,
            Workload::IdleTunnels => idle::tunnels(bench, server).await,
            Workload::Stall => stall::stopped_visitors(bench, server, Way::Orders).await,
            Workload::StallHttps => stall::stopped_visitors(bench, server, Way::Https).await,
            Workload::StallH2 => stall::stopped_visitors(bench, server, Way::Http2).await,
        }
    }
}

/// What visitors did at the same time, and what it took.
struct Done<T> {
    each: Vec<T>,
    cpu: Duration,
    time: Duration,
}

impl Done<u64> {
    fn per_gigabyte(&self) -> Sample {
        let bytes = self.each.iter().sum::<u64>() as f64;
        vec![
            cost("CPU", "s/GB", self.cpu.as_secs_f64() / (bytes / 1e9)),
            told("rate", "MB/s", bytes / 1e6 / self.time.as_secs_f64()),
        ]
    }
}

/// Each of `visits` at once, for the bench's window.
async fn together<V, T, F>(
    bench: &Bench,
    server: &Server,
    visits: Vec<V>,
    visit: impl Fn(V, Instant) -> F,
) -> Outcome<Done<T>>
where
    T: Send + 'static,
    F: Future<Output = Outcome<T>> + Send + 'static,
{
    let watch = Watch::start(bench, server).await?;
    let until = watch.begun() + bench.options.window();
    let mut all = JoinSet::new();
    for one in visits {
        all.spawn(visit(one, until));
    }
    let mut each = Vec::new();
    while let Some(done) = all.join_next().await {
        each.push(done??);
    }
    let (cpu, time) = watch.end(server).await;
    Ok(Done { each, cpu, time })
}

/// The value below which this part of all lies, in microseconds.
fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort_unstable();
    let at = (times.len() as f64 * part) as usize;
    times.get(at.min(times.len().saturating_sub(1))).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
}
