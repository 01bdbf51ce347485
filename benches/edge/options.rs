//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use crate::system::{Field, Kind, System};
use crate::workload::Workload;

/// The adit that cargo builds for the bench.
const BUILT: &str = env!("CARGO_BIN_EXE_adit");

/// CPU and memory of adit and its peers, per gigabyte, round trip, connection.
#[derive(Debug, Parser)]
#[command(name = "edge")]
pub struct Options {
    /// What to measure; the table of docs/speed.md where nothing is named.
    #[arg(value_enum)]
    workloads: Vec<Workload>,
    /// Measure all there is.
    #[arg(long, conflicts_with = "workloads")]
    all: bool,
    /// The adit under test.
    #[arg(long, value_name = "PATH", default_value = BUILT)]
    pub adit: String,
    /// Another adit beside it, by a name for the tables. May be repeated.
    #[arg(long, value_name = "NAME=PATH")]
    also: Vec<String>,
    /// The sandhole beside it; without a path as `cargo install` puts it.
    #[arg(long, value_name = "PATH")]
    sandhole: Option<PathBuf>,
    /// Only these of the systems: adit, sandhole, nginx+sshd, sshd, direct, adit-copy,
    /// haproxy, haproxy-copy, and the names of --also.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    systems: Vec<String>,
    /// A system whose figures the others are divided by, besides the best peer.
    #[arg(long, value_name = "NAME")]
    pub baseline: Option<String>,
    /// The tunnel's cipher.
    #[arg(long, default_value = "aes256-gcm@openssh.com")]
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
    /// Light SSH clients of `idle-tunnels`; 5000, of peers 500, where not said.
    #[arg(long)]
    pub tunnels: Option<usize>,
    /// Visitors of `idle-visitors`.
    #[arg(long, default_value_t = 10_000)]
    pub visitors: usize,
    /// Have `perf record` watch the servers: FILE.SYSTEM for each, of the last round. Choose
    /// one workload; the figures of such a run are no good.
    #[arg(long, value_name = "FILE")]
    pub perf: Option<PathBuf>,
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
        match (self.all, self.workloads.is_empty()) {
            (true, _) => Workload::value_variants().to_vec(),
            (_, true) => Workload::TABLE.to_vec(),
            _ => self.workloads.clone(),
        }
    }

    /// The systems asked for that do anything here, sshd last.
    ///
    /// # Errors
    /// What to write instead.
    pub fn systems(&self) -> Result<Vec<System>, String> {
        let adit = |name: &str, binary: &str| System::new(name, Kind::Adit { binary: binary.into(), splice: true });
        let mut all = vec![adit("adit", &self.adit)];
        for also in &self.also {
            let (name, binary) = also.split_once('=').ok_or(format!("--also {also}: write NAME=PATH"))?;
            all.push(adit(name, binary));
        }
        all.extend([
            System::new("sandhole", Kind::Sandhole { binary: self.sandhole() }),
            System::new("nginx+sshd", Kind::NginxSshd),
            System::new("sshd", Kind::Sshd),
            System::new("direct", Kind::Direct),
            System::new("adit-copy", Kind::Adit { binary: self.adit.clone().into(), splice: false }),
            System::new("haproxy", Kind::Haproxy { splice: true }),
            System::new("haproxy-copy", Kind::Haproxy { splice: false }),
        ]);
        let known = |name: &String| all.iter().any(|s| s.name == *name);
        if let Some(unknown) = self.systems.iter().chain(&self.baseline).find(|name| !known(name)) {
            return Err(format!("there is no system {unknown}"));
        }
        let fields: Vec<Field> = self.workloads().into_iter().map(Workload::field).collect();
        if fields.contains(&Field::Backhaul) && self.adit == BUILT && !cfg!(feature = "etcd") {
            return Err("backhaul needs an adit with etcd: cargo bench --features etcd --bench edge".into());
        }
        all.retain(|s| self.systems.is_empty() || self.systems.contains(&s.name));
        all.retain(|s| fields.iter().any(|field| s.takes_part(*field)));
        for system in &all {
            system.check()?;
        }
        Ok(all)
    }

    fn sandhole(&self) -> PathBuf {
        let folders = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
        let home = std::env::home_dir().unwrap_or_default().join(".cargo/bin");
        let found = folders.unwrap_or_default().into_iter().map(|dir| dir.join("sandhole")).find(|path| path.is_file());
        self.sandhole.clone().or(found).unwrap_or(home.join("sandhole"))
    }

    /// How long one transfer or echo is measured.
    pub fn window(&self) -> Duration {
        Duration::from_millis(self.window)
    }
}
