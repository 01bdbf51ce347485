//! What comes out: a line per sample while it runs, a table per workload, JSON.

use std::time::Duration;

use serde_json::{Value, json};

use crate::namespace;
use crate::options::Options;
use crate::system::System;
use crate::workload::{Figure, Sample, Workload};

/// The system under test.
const ADIT: &str = "adit";

/// All samples so far.
pub struct Report {
    systems: Vec<String>,
    versions: Vec<String>,
    peers: Vec<String>,
    /// Whose figures others are divided by, besides the best peer's.
    baseline: Option<String>,
    settings: Value,
    cells: Vec<Cell>,
}

/// One workload of one system.
struct Cell {
    workload: Workload,
    system: String,
    samples: Vec<Sample>,
    refused: Vec<String>,
}

impl Report {
    /// An empty one.
    pub fn new(options: &Options, systems: &[System]) -> Self {
        let names: Vec<String> = systems.iter().map(|s| s.name.clone()).collect();
        let peers = systems.iter().filter(|s| s.is_peer()).map(|s| s.name.clone()).collect();
        let settings = json!({
            "machine": machine(),
            "congestion": namespace::congestion(),
            "cipher": options.cipher,
            "tls": "1.3, AES-256-GCM, X25519, P-256",
            "rounds": options.rounds,
            "window_ms": options.window().as_millis() as u64,
        });
        let versions = systems.iter().map(System::version).collect();
        Self { systems: names, versions, peers, baseline: options.baseline.clone(), settings, cells: Vec::new() }
    }

    /// What was compared, where and how.
    pub fn head(&self) -> String {
        let text = |key: &str| self.settings[key].to_string().trim_matches('"').to_owned();
        let mut head = format!(
            "{}; TCP congestion control {} (private network namespace); SSH {}; TLS {}\n",
            text("machine"),
            text("congestion"),
            text("cipher"),
            text("tls"),
        );
        for (name, version) in self.systems.iter().zip(&self.versions) {
            head += &format!("  {name}: {version}\n");
        }
        head
    }

    /// Takes a sample, or why there is none.
    pub fn add(&mut self, workload: Workload, system: &System, sample: Result<Sample, String>) {
        let at = self.cells.iter().position(|c| c.workload == workload && c.system == system.name);
        let at = at.unwrap_or_else(|| {
            let system = system.name.clone();
            self.cells.push(Cell { workload, system, samples: Vec::new(), refused: Vec::new() });
            self.cells.len() - 1
        });
        match sample {
            Ok(sample) => self.cells[at].samples.push(sample),
            Err(why) => self.cells[at].refused.push(why),
        }
    }

    /// Whether every figure asked for is there.
    pub fn is_whole(&self) -> bool {
        self.cells.iter().all(|c| c.refused.is_empty())
    }

    fn cell(&self, workload: Workload, system: &str) -> Option<&Cell> {
        self.cells.iter().find(|c| c.workload == workload && c.system == system)
    }

    /// One workload: median, least to most, and ratios.
    pub fn table(&self, workload: Workload) -> String {
        let mut head = ["figure", "system", "median", "min - max", "x best peer"].map(str::to_owned).to_vec();
        head.extend(self.baseline.iter().map(|name| format!("x {name}")));
        let mut lines = vec![head];
        for figure in self.figures(workload) {
            for system in &self.systems {
                let Some(spread) = self.cell(workload, system).and_then(|c| c.spread(figure)) else { continue };
                let mut line = vec![
                    format!("{} ({})", figure.name, figure.unit),
                    system.clone(),
                    number(spread.median),
                    format!("{} - {}", number(spread.min), number(spread.max)),
                ];
                let references = [self.best_peer(workload, figure), self.baseline.as_deref()];
                line.extend(
                    references
                        .map(|reference| {
                            let ratio = self.ratio(workload, figure, &spread, reference?);
                            ratio.map(|ratio| format!("{ratio:.2}"))
                        })
                        .map(Option::unwrap_or_default),
                );
                line.truncate(lines[0].len());
                lines.push(line);
            }
        }
        let mut text = format!("\n{}\n", workload.name());
        if lines.len() > 1 {
            text += &aligned(&lines);
        }
        for cell in self.cells.iter().filter(|c| c.workload == workload && !c.refused.is_empty()) {
            let (failed, all) = (cell.refused.len(), cell.refused.len() + cell.samples.len());
            text += &format!("  {}: NO FIGURE, {failed} of {all} runs failed: {}\n", cell.system, cell.refused[0]);
        }
        text
    }

    /// All that systems are compared by, as docs/speed.md has it: medians, least to most.
    pub fn summary(&self, workloads: &[Workload]) -> String {
        let mut text =
            "| workload | figure | adit | others | adit to the best peer |\n|---|---|---|---|---|\n".to_owned();
        for workload in workloads {
            for figure in self.figures(*workload).into_iter().filter(|figure| figure.cost) {
                let spread = |name: &str| self.cell(*workload, name)?.spread(figure);
                let told = |s: Spread| format!("{} ({} - {})", number(s.median), number(s.min), number(s.max));
                let others = self.systems.iter().filter(|name| *name != ADIT);
                let others: Vec<String> =
                    others.filter_map(|name| Some(format!("{name} {}", told(spread(name)?)))).collect();
                let ratio = spread(ADIT)
                    .and_then(|own| self.ratio(*workload, figure, &own, self.best_peer(*workload, figure)?))
                    .map(|ratio| format!("{ratio:.2}"));
                text += &format!(
                    "| `{}` | {}, {} | {} | {} | {} |\n",
                    workload.name(),
                    figure.name,
                    figure.unit,
                    spread(ADIT).map(told).unwrap_or_default(),
                    others.join("; "),
                    ratio.unwrap_or_default(),
                );
            }
        }
        text
    }

    /// The peer with the least of it.
    fn best_peer(&self, workload: Workload, figure: Figure) -> Option<&str> {
        let median = |name: &str| Some(self.cell(workload, name)?.spread(figure)?.median);
        let peers = self.peers.iter().filter_map(|name| Some((name.as_str(), median(name)?)));
        peers.min_by(|(_, a), (_, b)| a.total_cmp(b)).map(|(name, _)| name)
    }

    /// None of what is only told, and where the other has no figure.
    fn ratio(&self, workload: Workload, figure: Figure, spread: &Spread, to: &str) -> Option<f64> {
        let other = self.cell(workload, to)?.spread(figure).filter(|_| figure.cost)?;
        Some(spread.ratio_to(&other))
    }

    /// The figures of a workload, as any system has them.
    fn figures(&self, workload: Workload) -> Vec<Figure> {
        let mut cells = self.cells.iter().filter(|c| c.workload == workload);
        cells.find_map(|c| c.samples.first()).cloned().unwrap_or_default()
    }

    /// All of it.
    pub fn json(&self) -> String {
        let results: Vec<Value> = self.cells.iter().map(|cell| self.cell_json(cell)).collect();
        let systems: Vec<Value> = self
            .systems
            .iter()
            .zip(&self.versions)
            .map(|(name, version)| json!({"name": name, "version": version}))
            .collect();
        let all = json!({"settings": self.settings, "systems": systems, "results": results});
        format!("{all:#}\n")
    }

    fn cell_json(&self, cell: &Cell) -> Value {
        let figures: Vec<Value> = self
            .figures(cell.workload)
            .into_iter()
            .filter_map(|figure| {
                let spread = cell.spread(figure)?;
                let best = self.best_peer(cell.workload, figure);
                let ratio = |to: Option<&str>| self.ratio(cell.workload, figure, &spread, to?);
                Some(json!({
                    "name": figure.name, "unit": figure.unit, "median": spread.median, "min": spread.min,
                    "max": spread.max, "samples": spread.samples,
                    "best_peer": best, "ratio_to_best_peer": ratio(best),
                    "ratio_to_baseline": ratio(self.baseline.as_deref()),
                }))
            })
            .collect();
        json!({"workload": cell.workload.name(), "system": cell.system, "figures": figures, "failed": cell.refused})
    }
}

struct Spread {
    median: f64,
    min: f64,
    max: f64,
    samples: Vec<f64>,
}

impl Spread {
    /// The median of the ratios round by round: what slows a whole round down
    /// is in both figures of it.
    fn ratio_to(&self, other: &Self) -> f64 {
        median(self.samples.iter().zip(&other.samples).map(|(a, b)| a / b).collect())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.get((values.len() - 1) / 2).zip(values.get(values.len() / 2));
    middle.map_or(f64::NAN, |(low, high)| (low + high) / 2.0)
}

impl Cell {
    /// Of one figure over all rounds; none where any round failed.
    fn spread(&self, figure: Figure) -> Option<Spread> {
        let same = |f: &&Figure| (f.name, f.unit) == (figure.name, figure.unit);
        let samples: Vec<f64> = self.samples.iter().filter_map(|s| s.iter().find(same)).map(|f| f.value).collect();
        if samples.is_empty() || !self.refused.is_empty() {
            return None;
        }
        let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
        let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Spread { median: median(samples.clone()), min: least, max: most, samples })
    }
}

/// A line for who waits.
pub fn progress(
    workload: Workload,
    round: usize,
    system: &System,
    sample: &Result<Sample, String>,
    took: Duration,
) -> String {
    let said = match sample {
        Ok(figures) => {
            let first = figures.iter().take(4).map(|f| format!("{} {} {}", f.name, number(f.value), f.unit));
            first.collect::<Vec<_>>().join(", ")
        }
        Err(why) => format!("FAILED: {why}"),
    };
    format!("{} #{} {}: {said} [{:.1} s]", workload.name(), round + 1, system.name, took.as_secs_f64())
}

/// Three figures, and all before the point.
fn number(value: f64) -> String {
    match value.abs() {
        large if large >= 100.0 => format!("{value:.0}"),
        middle if middle >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn aligned(lines: &[Vec<String>]) -> String {
    let columns = lines[0].len();
    let width = |column: usize| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for line in lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text += &format!("  {}\n", padded.join("  ").trim_end());
    }
    text
}

/// The machine's kind: what figures depend on.
fn machine() -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model =
        cpu.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or("").trim_start_matches([' ', '\t', ':']);
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or("");
    format!("{cores} x {model}, Linux {}, load {load} at the start", kernel.trim())
}
