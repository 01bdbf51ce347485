//! Every metric: name, unit, labels, help; and the exporter. Values that a
//! visitor controls (hosts, paths, addresses) are never labels.

use std::cell::RefCell;
use std::time::Duration;

use metrics::Unit;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::error::Error;
use crate::visit_log::Visit;

/// Name, unit and help of each counter.
const COUNTERS: &[(&str, Unit, &str)] = &[
    (
        "adit_visits_total",
        Unit::Count,
        "Requests and raw connections that ended, by type of the socket, class of the status, error and whose fault it was",
    ),
    ("adit_visit_bytes_total", Unit::Bytes, "Bytes relayed, by direction: up = towards the origin"),
    (
        "adit_origin_requests_total",
        Unit::Count,
        "Requests sent to origins, by connection: kept from an earlier one, or new",
    ),
    ("adit_gate_decisions_total", Unit::Count, "Decisions at gates, by kind, decision and why"),
    ("adit_mysocket_calls_total", Unit::Count, "Calls of mysocketctl, by status"),
    ("adit_gate_cut_total", Unit::Count, "Running requests that were cut because they no longer passed"),
    ("adit_origin_retries_total", Unit::Count, "Requests sent again because their connection had ended"),
    (
        "adit_access_log_dropped_total",
        Unit::Count,
        "Visits left out of the access log: sampled, over its rate, or its writer too slow",
    ),
    ("adit_visitors_refused_total", Unit::Count, "Connections refused at the door, by limit"),
    ("adit_visitors_stalled_total", Unit::Count, "Visitors reset because they held their tunnel up"),
    ("adit_visitors_cut_total", Unit::Count, "Connections cut at the end of a drain"),
    ("adit_accept_failures_total", Unit::Count, "Failed accepts"),
    ("adit_tls_handshake_failures_total", Unit::Count, "TLS handshakes with visitors that failed, by reason"),
    ("adit_ssh_refused_total", Unit::Count, "SSH connections refused at the door, by limit"),
    ("adit_ssh_rejected_total", Unit::Count, "SSH logins rejected"),
    ("adit_ssh_login_timeouts_total", Unit::Count, "SSH connections that did not log in in time"),
    ("adit_ssh_faults_total", Unit::Count, "SSH sessions ended for a fault of the peer, by fault"),
    ("adit_sessions_dead_total", Unit::Count, "SSH sessions ended because the peer did not answer"),
    ("adit_store_write_failures_total", Unit::Count, "Transactions that the disk did not take"),
    ("adit_feed_records_refused_total", Unit::Count, "Records of the feed that were refused, by kind"),
    (
        "adit_provider_requests_total",
        Unit::Count,
        "Requests to login providers, by provider, its kind, what was asked for (metadata, keys, token, userinfo, api) and outcome: ok, refused (another status), failed (no answer)",
    ),
    ("adit_checks_total", Unit::Count, "Checks of origins that sockets' records ask for, by result"),
    ("adit_tunnels_ejected_total", Unit::Count, "Times that a tunnel which failed was left alone for a while"),
    ("adit_fleet_opens_total", Unit::Count, "Streams asked for at other nodes, by connection: kept ready, or new"),
    ("adit_fleet_bytes_total", Unit::Bytes, "Bytes of other nodes' visitors, by direction: up = towards the origin"),
    ("adit_fleet_lines_dropped_total", Unit::Count, "Lines for owners at other nodes that the link could not take"),
    ("adit_relay_spliced_bytes_total", Unit::Bytes, "Relayed bytes that stayed in the kernel"),
    ("adit_port_bind_failures_total", Unit::Count, "Sockets' own ports that could not be opened"),
];

/// Name, unit and help of each gauge.
const GAUGES: &[(&str, Unit, &str)] = &[
    ("adit_visitors", Unit::Count, "Visitors' connections open now, by door"),
    ("adit_http_connections", Unit::Count, "Visitors' HTTP connections open now, by protocol"),
    (
        "adit_core_busy_ratio",
        Unit::Count,
        "The share of its time that each thread that serves visitors worked of late, by core",
    ),
    (
        "adit_http_connections_resting",
        Unit::Count,
        "Of these, those of HTTP/1 that were idle for a second and take little memory",
    ),
    ("adit_requests", Unit::Count, "Requests under way"),
    ("adit_upgrades", Unit::Count, "WebSockets and other upgraded connections open now"),
    ("adit_raw_connections", Unit::Count, "Raw connections that are relayed now, by type of the socket"),
    (
        "adit_tunnel_outstanding_bytes",
        Unit::Bytes,
        "Promised to owners' clients or waiting for visitors, of ssh.node_buffer",
    ),
    ("adit_access_log_queue", Unit::Count, "Visits that wait for the access log's writer"),
    ("process_resident_memory_bytes", Unit::Bytes, "Memory in RAM"),
    ("process_open_fds", Unit::Count, "Open descriptors"),
    ("process_max_fds", Unit::Count, "Most descriptors that may be open"),
    ("process_cpu_seconds_total", Unit::Seconds, "Processor time used"),
    ("process_threads", Unit::Count, "Threads"),
    ("adit_origin_connections_kept", Unit::Count, "Connections to origins that wait for a request"),
    ("adit_tunnels_attached", Unit::Count, "Tunnels that live sessions serve, standbys included"),
    ("adit_sessions", Unit::Count, "SSH sessions logged in"),
    (
        "adit_fleet_nodes_suspect",
        Unit::Count,
        "Nodes that vanished from the feed with many others, and are kept for a minute",
    ),
    ("adit_fleet_streams", Unit::Count, "Visitors of other nodes at tunnels of this one, by side: owner"),
    ("adit_fleet_nodes", Unit::Count, "Nodes of the fleet that live"),
    ("adit_fleet_locations", Unit::Count, "Tunnels that nodes of the fleet told of"),
    ("adit_ready", Unit::Count, "1 while the node takes visitors"),
];

/// Name, unit and help of each histogram.
const HISTOGRAMS: &[(&str, Unit, &str)] = &[
    (
        "adit_visit_seconds",
        Unit::Seconds,
        "Parts of a visit: tls (the handshake before it), route (and gate), dial, first_byte (of the origin, from the start), total",
    ),
    ("adit_tls_handshake_seconds", Unit::Seconds, "TLS handshakes with visitors, by whether a session was resumed"),
    (
        "adit_provider_request_seconds",
        Unit::Seconds,
        "Requests to login providers from the name to the last byte, by kind and what was asked for",
    ),
    ("adit_store_commit_seconds", Unit::Seconds, "Time for a group of transactions to reach the disk"),
    (
        "adit_fleet_location_seconds",
        Unit::Seconds,
        "From the grant of a login at another node, by its clock, until it is known here",
    ),
    ("adit_tunnel_rtt_seconds", Unit::Seconds, "Round trips to owners' SSH clients"),
];

/// Seconds: from a loopback round trip to a very slow origin.
const BUCKETS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The same, finer where a fleet's promise is: 20 ms for most, 100 ms for nearly all.
const LOCATION_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];

/// The exporter of this process.
#[derive(Clone)]
pub struct Exporter(PrometheusHandle);

impl Exporter {
    /// Takes over all metrics of the process and describes them.
    ///
    /// # Errors
    /// Where another exporter is there already.
    pub fn install() -> Result<Self, String> {
        let builder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS)
            .and_then(|builder| {
                let location = Matcher::Full("adit_fleet_location_seconds".to_owned());
                builder.set_buckets_for_metric(location, LOCATION_BUCKETS)
            })
            .map_err(|e| e.to_string())?;
        let handle = builder.install_recorder().map_err(|e| e.to_string())?;
        for (name, unit, help) in COUNTERS {
            metrics::describe_counter!(*name, *unit, *help);
        }
        for (name, unit, help) in GAUGES {
            metrics::describe_gauge!(*name, *unit, *help);
        }
        for (name, unit, help) in HISTOGRAMS {
            metrics::describe_histogram!(*name, *unit, *help);
        }
        Ok(Self(handle))
    }

    /// All metrics in Prometheus' text form.
    pub fn render(&self) -> String {
        process();
        self.0.render()
    }

    /// Folds histograms' samples so that they do not gather; ends never.
    pub async fn upkeep(self) {
        let mut tick = tokio::time::interval(Duration::from_secs(5));
        loop {
            tick.tick().await;
            self.0.run_upkeep();
        }
    }
}

/// The handle of a metric whose name and labels are constant, looked up once: that costs
/// a tenth of a microsecond, and a request has a dozen. For what is first used after
/// `Exporter::install`.
macro_rules! held {
    (counter: $($what:tt)*) => { $crate::metrics::held!(Counter, ::metrics::counter!($($what)*)) };
    (gauge: $($what:tt)*) => { $crate::metrics::held!(Gauge, ::metrics::gauge!($($what)*)) };
    (histogram: $($what:tt)*) => { $crate::metrics::held!(Histogram, ::metrics::histogram!($($what)*)) };
    ($kind:ident, $made:expr) => {{
        static HELD: std::sync::LazyLock<::metrics::$kind> = std::sync::LazyLock::new(|| $made);
        &*HELD
    }};
}
pub(crate) use held;

/// Counts in a gauge while it lives.
pub struct Present(metrics::Gauge);

impl Present {
    /// One more.
    pub fn new(gauge: metrics::Gauge) -> Self {
        gauge.increment(1.0);
        Self(gauge)
    }
}

impl Drop for Present {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

thread_local! {
    /// What this thread counted last: most visits are as the one before.
    static LAST: RefCell<Option<([&'static str; 4], metrics::Counter)>> = const { RefCell::new(None) };
}

/// Counts one finished visit.
pub fn visit(visit: &Visit) {
    let class = match visit.status.map(|status| status / 100) {
        Some(1) => "1xx",
        Some(2) => "2xx",
        Some(3) => "3xx",
        Some(4) => "4xx",
        Some(5) => "5xx",
        _ => "none",
    };
    let error = visit.error.map_or("none", Error::label);
    let fault = visit.error.map_or("none", |e| e.fault().as_str());
    let kind = visit.kind;
    LAST.with_borrow_mut(|last| {
        let labels = [kind, class, error, fault];
        match last {
            Some((of, counter)) if *of == labels => counter.increment(1),
            last => {
                let counter = metrics::counter!("adit_visits_total",
                    "type" => kind, "class" => class, "error" => error, "fault" => fault);
                counter.increment(1);
                *last = Some((labels, counter));
            }
        }
    });
    held!(counter: "adit_visit_bytes_total", "direction" => "up").increment(visit.bytes_up);
    held!(counter: "adit_visit_bytes_total", "direction" => "down").increment(visit.bytes_down);
    macro_rules! legs {
        ($($name:literal: $time:expr),*) => {$(
            if let Some(time) = $time {
                held!(histogram: "adit_visit_seconds", "leg" => $name).record(time.as_secs_f64());
            }
        )*};
    }
    let legs = &visit.legs;
    legs!("tls": legs.tls, "route": legs.route, "dial": legs.dial, "tunnel": legs.tunnel, "first_byte": visit.first_byte, "total": Some(visit.total));
}

/// Sets the gauges of this process, as the kernel tells them.
fn process() {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/self/{file}")).unwrap_or_default();
    let status = read("status");
    let field = |name: &str| -> Option<f64> {
        status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next()?.parse().ok())
    };
    if let Some(kib) = field("VmRSS:") {
        metrics::gauge!("process_resident_memory_bytes").set(kib * 1024.0);
    }
    if let Some(threads) = field("Threads:") {
        metrics::gauge!("process_threads").set(threads);
    }
    if let Ok(fds) = std::fs::read_dir("/proc/self/fd") {
        metrics::gauge!("process_open_fds").set(fds.count() as f64);
    }
    let limits = read("limits");
    let max = limits.lines().find_map(|line| line.strip_prefix("Max open files")?.split_whitespace().next());
    if let Some(max) = max.and_then(|max| max.parse::<f64>().ok()) {
        metrics::gauge!("process_max_fds").set(max);
    }
    if let Some(time) = processor_time() {
        metrics::gauge!("process_cpu_seconds_total").set(time.as_secs_f64());
    }
}

/// The processor time that this process has used, to 10 ms.
pub fn processor_time() -> Option<Duration> {
    // proc_pid_stat(5): fields 14 and 15, in hundredths of a second; the name
    // before them may hold anything.
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>);
    Some(Duration::from_millis(10 * ticks.sum::<Result<u64, _>>().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dashboard_asks_for_metrics_that_exist() {
        let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/grafana.json");
        let dashboard: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
        let mut asked = Vec::new();
        fn gather(value: &serde_json::Value, asked: &mut Vec<String>) {
            match value {
                serde_json::Value::Object(map) => {
                    asked.extend(map.get("expr").and_then(|expr| expr.as_str()).map(str::to_owned));
                    map.values().for_each(|value| gather(value, asked));
                }
                serde_json::Value::Array(list) => list.iter().for_each(|value| gather(value, asked)),
                _ => {}
            }
        }
        gather(&dashboard, &mut asked);
        assert!(asked.len() > 20, "{asked:?}");
        let plain: Vec<&str> = COUNTERS.iter().chain(GAUGES).map(|(name, ..)| *name).collect();
        let (mut buckets, mut seen) = (0, std::collections::BTreeSet::new());
        for expr in &asked {
            let words = expr.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            for name in words.filter(|w| w.starts_with("adit_") || w.starts_with("process_")) {
                let histogram = HISTOGRAMS
                    .iter()
                    .any(|(h, ..)| ["_bucket", "_sum", "_count"].iter().any(|end| name.strip_suffix(end) == Some(h)));
                buckets += usize::from(histogram);
                assert!(histogram || plain.contains(&name), "{name} in {expr}");
                seen.insert(name.to_owned());
            }
        }
        assert!(buckets > 0 && seen.len() > 20, "{seen:?}");
    }

    #[test]
    fn every_metric_in_the_code_is_described_here() {
        fn sources(dir: &std::path::Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
                match entry.path() {
                    path if path.is_dir() => sources(&path, found),
                    path => found.push(std::fs::read_to_string(path).unwrap_or_default()),
                }
            }
        }
        let mut all = Vec::new();
        sources(&std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
        let known: Vec<&str> = COUNTERS.iter().chain(GAUGES).chain(HISTOGRAMS).map(|(name, ..)| *name).collect();
        for macro_name in ["counter!(\"", "gauge!(\"", "histogram!(\""] {
            for name in all.iter().flat_map(|text| text.split(macro_name).skip(1)).filter_map(|t| t.split('"').next()) {
                let ours = name.starts_with("adit_") || name.starts_with("process_");
                assert!(known.contains(&name) || !ours, "{name} is not described");
            }
        }
    }
}
