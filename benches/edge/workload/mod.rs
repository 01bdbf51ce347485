//! The workloads by name, and what one run of each gives: figures.

mod bulk_echo;
mod idle;
mod login;
mod stall;
mod transfer;

use std::time::Duration;

use clap::ValueEnum;

use crate::options::Options;
use crate::system::Server;
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
    D1,
    D8,
    U1,
    U8,
    Echo1,
    Echo16,
    Conns,
    Login,
    BulkEcho,
    IdleChannels,
    IdleTunnels,
    Stall,
}

impl Workload {
    /// Its name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
    }

    /// How often it is run: the long ones, whose figures vary little, seldom.
    pub fn rounds(self, asked: u32) -> usize {
        let rounds = if self.is_long() { asked.div_ceil(5) } else { asked };
        rounds as usize
    }

    fn is_long(self) -> bool {
        matches!(self, Workload::Stall | Workload::IdleTunnels)
    }

    /// A sample that takes longer has failed.
    pub fn limit(self, options: &Options) -> Duration {
        let stop = if self == Workload::Stall { stall::length(options) } else { Duration::ZERO };
        Duration::from_secs(180) + 4 * options.window() + stop
    }

    /// Runs it once.
    ///
    /// # Errors
    /// Why there are no figures: bytes were wrong or missing, or a step failed.
    pub async fn sample(self, bench: &Bench, server: &Server) -> Outcome<Sample> {
        match self {
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
            Workload::Stall => stall::stopped_visitors(bench, server).await,
        }
    }
}

/// The value below which this part of all lies, in microseconds.
fn quantile(times: &mut [Duration], part: f64) -> f64 {
    times.sort_unstable();
    let at = (times.len() as f64 * part) as usize;
    times.get(at.min(times.len().saturating_sub(1))).map_or(f64::NAN, |t| t.as_secs_f64() * 1e6)
}
