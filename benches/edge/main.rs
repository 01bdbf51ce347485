//! What the edge costs: the CPU time and memory of the server side, for adit and
//! its peers, in one run and through the same tunnel client and origin.
//!
//! ```text
//! cargo bench --bench edge                                 # everything: adit and sshd, 5 rounds, 15 minutes
//! cargo bench --bench edge -- d1 u1 echo16                 # some workloads
//! cargo bench --bench edge -- d1 --rounds 9 --json out.json
//! cargo bench --bench edge -- --also old=PATH --baseline old      # beside another binary
//! cargo bench --bench edge -- stall --seconds 60 --systems adit
//! ```
//! Needs root, and the Debian packages openssh-client, openssh-server, iproute2.
//! The bench starts itself again in namespaces of its own (network, processes,
//! mounts), where loopback uses reno: BBR's pacing costs a server two to three
//! times the CPU there. Whatever it starts ends with it, however it ends.
//!
//! | workload | what is done | what is told |
//! |---|---|---|
//! | `d1` `d8` `u1` `u8` | downloads, uploads of 1 or 8 visitors for 2.5 s | server CPU per GB |
//! | `echo1` `echo16` | 64 bytes to and fro, 1 or 16 visitors | server CPU per round trip; p50, p99 |
//! | `conns` | 8 visitors that connect, say 64 bytes, hear them, leave | server CPU per connection |
//! | `login` | full SSH logins, one after another | server CPU per login |
//! | `bulk-echo` | a 64-byte echo: alone, beside a download, beside an upload | p50, p99 and how they grow |
//! | `idle-channels` | 400 visitors of one tunnel who said something and fell silent | memory per visitor |
//! | `idle-tunnels` | 1000 (sshd: 200) light SSH clients, each with one forward | memory per tunnel |
//! | `stall` | 30 busy visitors; 20 more stop in the middle of transfers | how much the 30 keep |
//!
//! Every sample has a fresh server and a fresh tunnel; systems take turns within a
//! round. `stall` and `idle-tunnels` are run once for every 5 rounds. Server CPU is
//! utime + stime of all its processes, also of those that ended, to 10 ms. Memory is
//! the growth of the resident set over a warm server's; `own RSS` leaves out pages of
//! files, and counts those that processes share once. The ratio of two systems is the
//! median of the ratios round by round: what slows a whole round down is in both. On a
//! busy machine take many rounds, and look at the least figures too.
//!
//! Bytes are counted exactly, and compared with a pattern in samples. A system
//! that loses or changes any gets no figure for that workload, and the bench
//! ends with 1. Load and origin are this process; they are not in the figures,
//! but share the cores, so that MB/s is not the capacity of a server. All visitors
//! are one thread: in `echo16` they come in bursts, which a server may answer at once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(missing_docs, unreachable_pub)]

mod light;
mod namespace;
mod options;
mod origin;
mod pattern;
mod program;
mod report;
mod system;
mod usage;
mod visitor;
mod workload;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use clap::Parser;

use options::Options;
use report::Report;
use system::{Server, System};
use workload::{Sample, Workload};

/// What a step gives, or why there is no figure.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What all samples share.
pub struct Bench {
    options: Options,
    origin: SocketAddr,
}

fn main() {
    let options = Options::parse();
    if !namespace::inside() {
        // Only returns where it failed.
        let why = namespace::enter(&options.congestion);
        eprintln!("edge: {why}");
        std::process::exit(2);
    }
    let systems = options.systems().unwrap_or_else(|why| {
        eprintln!("edge: {why}");
        std::process::exit(2);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let report = runtime.block_on(async {
        tokio::select! {
            report = run(options, &systems) => report,
            // The first process of its namespace hears only signals that it asks for.
            signal = namespace::told_to_end() => {
                eprintln!("edge: ended by {signal}");
                std::process::exit(130)
            }
        }
    });
    std::process::exit(if report.is_whole() { 0 } else { 1 });
}

async fn run(options: Options, systems: &[System]) -> Report {
    let bench = Bench { origin: origin::start(), options };
    let mut report = Report::new(&bench.options, systems);
    println!("{}", report.head());
    for workload in bench.options.workloads() {
        for round in 0..workload.rounds(bench.options.rounds) {
            // Another one first each time, so that none always follows the dearest.
            for turn in 0..systems.len() {
                let system = &systems[(turn + round) % systems.len()];
                let begun = Instant::now();
                let limit = workload.limit(&bench.options);
                let sample = match tokio::time::timeout(limit, bench.sample(workload, system)).await {
                    Ok(sample) => sample.map_err(|e| e.to_string()),
                    Err(_) => Err(format!("not within {limit:?}")),
                };
                eprintln!("{}", report::progress(workload, round, system, &sample, begun.elapsed()));
                report.add(workload, system, sample);
            }
        }
        println!("{}", report.table(workload));
    }
    if let Some(path) = &bench.options.json {
        match std::fs::write(path, report.json()) {
            Ok(()) => println!("written: {}", path.display()),
            Err(e) => eprintln!("edge: {}: {e}", path.display()),
        }
    }
    report
}

impl Bench {
    async fn sample(&self, workload: Workload, system: &System) -> Outcome<Sample> {
        let server = Server::start(system).await?;
        let sample = workload.sample(self, &server).await;
        sample.map_err(|e| format!("{e}{}", server.last_words()).into())
    }
}

/// Awaits `step` no longer than `limit`.
///
/// # Errors
/// That of `step`, or that it took too long.
pub async fn within<T>(limit: Duration, what: &str, step: impl Future<Output = Outcome<T>>) -> Outcome<T> {
    match tokio::time::timeout(limit, step).await {
        Ok(done) => done.map_err(|e| format!("{what}: {e}").into()),
        Err(_) => Err(format!("{what}: not within {limit:?}").into()),
    }
}
