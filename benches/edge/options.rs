//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::system::System;
use crate::workload::Workload;

/// CPU and memory of adit and its peers, per gigabyte, round trip, connection.
#[derive(Debug, Parser)]
#[command(name = "edge")]
pub struct Options {
    /// What to measure; everything where nothing is named.
    #[arg(value_enum)]
    workloads: Vec<Workload>,
    /// The adit under test.
    #[arg(long, value_name = "PATH", default_value = env!("CARGO_BIN_EXE_adit"))]
    adit: String,
    /// Another adit beside it, by a name for the tables. May be repeated.
    #[arg(long, value_name = "NAME=PATH")]
    also: Vec<String>,
    /// Only these of the systems: adit, sshd, and the names of --also.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    systems: Vec<String>,
    /// A system whose figures the others are divided by, besides sshd.
    #[arg(long, value_name = "NAME")]
    pub baseline: Option<String>,
    /// The tunnel's cipher.
    #[arg(long, default_value = "aes128-gcm@openssh.com")]
    pub cipher: String,
    /// How often each is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: u32,
    /// How long visitors stop in `stall`.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub seconds: u64,
    /// How long one transfer or echo is measured, in milliseconds.
    #[arg(long, default_value_t = 2500, value_parser = clap::value_parser!(u64).range(200..=60_000))]
    window: u64,
    /// Light SSH clients of `idle-tunnels`; 1000, of sshd 200, where not said.
    #[arg(long)]
    pub tunnels: Option<usize>,
    /// Where to write the samples as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// The TCP congestion control of all systems.
    #[arg(long, default_value = "reno")]
    pub congestion: String,
    /// What `cargo bench` adds.
    #[arg(long, hide = true)]
    bench: bool,
}

impl Options {
    /// The workloads asked for.
    pub fn workloads(&self) -> Vec<Workload> {
        if self.workloads.is_empty() { Workload::value_variants().to_vec() } else { self.workloads.clone() }
    }

    /// The systems asked for, sshd last.
    ///
    /// # Errors
    /// What to write instead.
    pub fn systems(&self) -> Result<Vec<System>, String> {
        let mut all = vec![System::adit("adit", &self.adit)];
        for also in &self.also {
            let (name, binary) = also.split_once('=').ok_or(format!("--also {also}: write NAME=PATH"))?;
            all.push(System::adit(name, binary));
        }
        all.push(System::sshd());
        let known = |name: &String| all.iter().any(|s| s.name == *name);
        if let Some(unknown) = self.systems.iter().chain(&self.baseline).find(|name| !known(name)) {
            return Err(format!("there is no system {unknown}"));
        }
        all.retain(|s| self.systems.is_empty() || self.systems.contains(&s.name));
        for system in &all {
            system.check()?;
        }
        Ok(all)
    }

    /// How long one transfer or echo is measured.
    pub fn window(&self) -> Duration {
        Duration::from_millis(self.window)
    }
}
