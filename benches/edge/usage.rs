//! What a server uses, with all processes that it started: CPU and memory, as
//! /proc tells them.

use std::collections::HashMap;
use std::time::Duration;

/// A process and its descendants, now.
pub fn tree(root: u32) -> Vec<u32> {
    let mut children = HashMap::<u32, Vec<u32>>::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if let Some(parent) = stat(pid).and_then(|fields| fields.get(PARENT).copied()) {
            children.entry(parent as u32).or_default().push(pid);
        }
    }
    let mut all = vec![root];
    let mut at = 0;
    while let Some(pid) = all.get(at) {
        all.extend(children.remove(pid).unwrap_or_default());
        at += 1;
    }
    all
}

/// The processor time of a process tree since its start, to 10 ms: that of
/// processes which ended is in their parents' `cutime` and `cstime`.
pub fn cpu(root: u32) -> Duration {
    let ticks: u64 = tree(root).into_iter().filter_map(stat).map(|fields| fields[TIMES].iter().sum::<u64>()).sum();
    // USER_HZ is 100 on every Linux of today.
    Duration::from_millis(ticks * 10)
}

/// Resident memory of a process tree, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// Every process's resident set; shared pages are counted in each.
    pub rss: u64,
    /// What is not a file's, each page divided among those that share it.
    pub own: u64,
}

impl std::iter::Sum for Memory {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self { rss: 0, own: 0 }, |sum, one| Self { rss: sum.rss + one.rss, own: sum.own + one.own })
    }
}

/// The memory of a process tree now.
pub fn memory(root: u32) -> Memory {
    let mut sum = Memory { rss: 0, own: 0 };
    for pid in tree(root) {
        let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        let kib = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name));
            line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0)
        };
        sum.rss += kib("Rss:") << 10;
        sum.own += kib("Pss_Anon:") << 10;
    }
    sum
}

/// Processor time of this machine since its start: unused, and that of this
/// bench with all that it started.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    idle: Duration,
    ours: Duration,
}

impl Share {
    /// Until now.
    pub fn now() -> Self {
        let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        let all = text.lines().next().unwrap_or("").split_whitespace().skip(1);
        // proc_stat(5): user, nice, system, idle, iowait.
        let idle: u64 = all.skip(3).take(2).filter_map(|ticks| ticks.parse::<u64>().ok()).sum();
        Self { idle: Duration::from_millis(idle * 10), ours: cpu(std::process::id()) }
    }

    /// What others (and the machine's host) left to the bench since then, used or not.
    pub fn left_since(self, then: Self) -> Duration {
        self.idle.saturating_sub(then.idle) + self.ours.saturating_sub(then.ours)
    }
}

// proc_pid_stat(5), counted from the field after the name and the state.
const PARENT: usize = 0;
const TIMES: std::ops::Range<usize> = 10..14;

fn stat(pid: u32) -> Option<Vec<u64>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    // Negative ones (tpgid, priorities) are not among those that matter.
    Some(rest.split_whitespace().skip(1).map(|field| field.parse().unwrap_or(0)).collect())
}
