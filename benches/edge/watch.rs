//! The server's CPU from one moment to another, and where it goes: `--perf`.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::program::Program;
use crate::system::Server;
use crate::{Bench, Outcome};

/// What perf takes to attach itself, or to write what it saw.
const PERF: Duration = Duration::from_millis(500);

/// Begun; ends by `end`.
pub struct Watch {
    cpu: Duration,
    begun: Instant,
    perf: Option<Program>,
}

impl Watch {
    /// From now on.
    ///
    /// # Errors
    /// That perf does not run.
    pub async fn start(bench: &Bench, server: &Server) -> Outcome<Self> {
        let perf = match &bench.options.perf {
            Some(file) => Some(perf(file, server).await?),
            None => None,
        };
        Ok(Self { cpu: server.cpu(), begun: Instant::now(), perf })
    }

    /// When it began.
    pub fn begun(&self) -> Instant {
        self.begun
    }

    /// Until now: CPU and time.
    pub async fn end(self, server: &Server) -> (Duration, Duration) {
        let (cpu, time) = (server.cpu() - self.cpu, self.begun.elapsed());
        if let Some(mut perf) = self.perf {
            if let Some(pid) = i32::try_from(perf.pid()).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::INT);
            }
            let by = Instant::now() + 20 * PERF;
            while perf.runs().is_ok() && Instant::now() < by {
                tokio::time::sleep(PERF / 10).await;
            }
        }
        (cpu, time)
    }
}

async fn perf(file: &Path, server: &Server) -> Outcome<Program> {
    let pids: Vec<String> = server.pids().iter().map(u32::to_string).collect();
    let mut command = Command::new("perf");
    // The clock, not cycles: virtual machines often have no counters.
    command.args(["record", "-e", "cpu-clock", "-F", "1999", "-g", "-p", &pids.join(",")]);
    command.arg("-o").arg(format!("{}.{}", file.display(), server.name));
    let mut perf = Program::start("perf", command, Path::new("/run"))?;
    tokio::time::sleep(PERF).await;
    perf.runs()?;
    Ok(perf)
}
