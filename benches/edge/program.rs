//! A child process with its log; dropping it ends it and all that it started.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use crate::{Outcome, usage};

/// A running program.
pub struct Program {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Program {
    /// Starts `command` with its outputs in a file of `dir`.
    ///
    /// # Errors
    /// Why it cannot be started.
    pub fn start(name: &'static str, mut command: Command, dir: &Path) -> Outcome<Self> {
        let log = dir.join(format!("{name}.log"));
        let file = File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = command.spawn().map_err(|e| format!("{name}: {e}"))?;
        Ok(Self { name, child, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// # Errors
    /// That it ended, with what it said.
    pub fn runs(&mut self) -> Outcome<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(format!("{} ended with {status}{}", self.name, self.last_words()).into()),
        }
    }

    /// The end of its log, for messages; empty where it said nothing.
    pub fn last_words(&self) -> String {
        let log = std::fs::read(&self.log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        let last = &lines[lines.len().saturating_sub(5)..];
        if last.is_empty() { String::new() } else { format!("; {} said: {}", self.name, last.join(" | ")) }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // sshd's children outlive it otherwise.
        for pid in usage::tree(self.pid()) {
            if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = self.child.wait();
    }
}
