//! What the edge costs: the CPU time and memory of the server side, for adit and
//! its peers, in one run and through the same tunnel client and origin.
//!
//! ```text
//! cargo bench --features etcd --bench edge                 # the table of docs/speed.md: 5 rounds, 25 minutes
//! cargo bench --bench edge -- h1 h2 get1                   # some workloads
//! cargo bench --bench edge -- h1 --rounds 9 --json out.json
//! cargo bench --bench edge -- --also old=PATH --baseline old      # beside another binary
//! cargo bench --bench edge -- h1 --systems adit --perf /tmp/perf  # where it goes: perf report -i /tmp/perf.adit
//! cargo bench --bench edge -- stall --seconds 60 --systems adit
//! ```
//! Needs root, the Debian packages openssh-client, openssh-server, nginx-light, haproxy,
//! etcd-server, iproute2, and a peer: `cargo install sandhole --version 0.10.5`. What is
//! missing is named; `--systems` does without it.
//! The bench starts itself again in namespaces of its own (network, processes,
//! mounts), where loopback uses reno: BBR's pacing costs a server two to three
//! times the CPU there. Whatever it starts ends with it, however it ends.
//!
//! | workload | what is done | what is told |
//! |---|---|---|
//! | `h1` | GET of 100 bytes over HTTPS, 32 connections that stay | server CPU per request; p50, p99 |
//! | `h2` | the same over HTTP/2, 8 connections with 16 streams each | the same |
//! | `handshake` | the same, a TLS handshake for each, 8 visitors | the same |
//! | `get1` `get8` `post1` | GET or POST of 100 MB over HTTPS, 1 or 8 at once | server CPU per GB |
//! | `raw-get` `raw-small` | `get1` and `h1` without TLS on a tcp socket's port | as they |
//! | `backhaul` | raw visitors of one node, the tunnel at another, plain TCP between | CPU of the first |
//! | `idle-tunnels` | 5000 (peers: 500) light SSH clients, each with one forward | memory per tunnel |
//! | `idle-visitors` | 10,000 visitors (`--visitors`) over TLS that asked once and stay | memory per visitor |
//! | `latency` | `h1` at 500 requests a second | p50, p99, beside `direct`: `ssh -L`, no edge |
//! | `login` | full SSH logins, one after another | server CPU per login |
//! | `d1` `d8` `u1` `u8` | raw downloads, uploads of 1 or 8 visitors for 2.5 s | server CPU per GB |
//! | `echo1` `echo16` | 64 bytes to and fro, 1 or 16 visitors | server CPU per round trip; p50, p99 |
//! | `conns` | 8 visitors that connect, say 64 bytes, hear them, leave | server CPU per connection |
//! | `bulk-echo` | a 64-byte echo: alone, beside a download, beside an upload | p50, p99 and how they grow |
//! | `idle-channels` | 400 visitors of one tunnel who said something and fell silent | memory per visitor |
//! | `stall` | 30 busy visitors; 20 more stop in the middle of transfers | how much the 30 keep |
//! | `stall-https` `stall-h2` | the same over HTTPS; as streams of 10 connections of HTTP/2 | the same |
//!
//! | system | what it is |
//! |---|---|
//! | `adit` | this tree's, or `--adit PATH` |
//! | `sandhole` | a reverse proxy for `ssh -R`; in `h2` as many requests at once over HTTP/1.1, which cost it less |
//! | `nginx+sshd` | nginx ends TLS and keeps connections to a port that sshd forwards |
//! | `sshd` | the same without nginx |
//! | `haproxy` `haproxy-copy` | in place of the first node of `backhaul`, with and without splice |
//! | `adit-copy` | the first node of `backhaul` with `relay.splice = false` |
//!
//! Every sample has a fresh server and a fresh tunnel, and connections that stay were
//! used once before; systems take turns within a round. The long ones (`stall`, `idle-tunnels`,
//! `idle-visitors`) are run once for every 5 rounds. Server CPU is
//! utime + stime of all its processes, also of those that ended, to 10 ms. Memory is
//! the growth of the resident set over a warm server's; `own RSS` leaves out pages of
//! files, and counts those that processes share once. The ratio of two systems is the
//! median of the ratios round by round: what slows a whole round down is in both. On a
//! busy machine take many rounds, and look at the least figures too. All systems show the
//! same P-256 certificate; visitors speak TLS 1.3 with AES-256-GCM and X25519, and resume
//! nothing.
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
mod watch;
mod web;
mod workload;

use std::time::{Duration, Instant};

use clap::Parser;

use options::Options;
use origin::Origins;
use report::Report;
use system::System;
use web::Tls;

/// What a step gives, or why there is no figure.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What all samples share.
pub struct Bench {
    options: Options,
    origins: Origins,
    tls: Tls,
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
    let bench = Bench { origins: origin::start(), tls: Tls::new().unwrap(), options };
    let mut report = Report::new(&bench.options, systems);
    println!("{}", report.head());
    for workload in bench.options.workloads() {
        for round in 0..workload.rounds(bench.options.rounds) {
            // Another one first each time, so that none always follows the dearest.
            for turn in 0..systems.len() {
                let system = &systems[(turn + round) % systems.len()];
                if !system.takes_part(workload.field()) {
                    continue;
                }
                let begun = Instant::now();
                let limit = workload.limit(&bench.options);
                let sample = match tokio::time::timeout(limit, workload.sample(&bench, system)).await {
                    Ok(sample) => sample.map_err(|e| e.to_string()),
                    Err(_) => Err(format!("not within {limit:?}")),
                };
                eprintln!("{}", report::progress(workload, round, system, &sample, begun.elapsed()));
                report.add(workload, system, sample);
            }
        }
        println!("{}", report.table(workload));
    }
    println!("\n{}", report.summary(&bench.options.workloads()));
    if let Some(path) = &bench.options.json {
        match std::fs::write(path, report.json()) {
            Ok(()) => println!("written: {}", path.display()),
            Err(e) => eprintln!("edge: {}: {e}", path.display()),
        }
    }
    report
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
