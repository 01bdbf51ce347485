//! Every metric: name, unit, labels, help; and the exporter. Values that a
//! visitor controls (hosts, paths, addresses) are never labels.

use std::time::Duration;

use metrics::Unit;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use crate::error::Error;
use crate::visit_log::{Visit, What};

/// Name, unit and help of each counter.
const COUNTERS: &[(&str, Unit, &str)] = &[
    ("adit_visits_total", Unit::Count, "Requests and raw connections that ended, by kind, error label and fault"),
    ("adit_visit_bytes_total", Unit::Bytes, "Bytes relayed, by direction: up = towards the origin"),
    (
        "adit_origin_requests_total",
        Unit::Count,
        "Requests sent to origins, by connection: kept from an earlier one, or new",
    ),
    ("adit_origin_retries_total", Unit::Count, "Requests sent again because their connection had ended"),
    ("adit_visitors_refused_total", Unit::Count, "Connections refused at the door, by limit"),
    ("adit_visitors_stalled_total", Unit::Count, "Visitors reset because they held their tunnel up"),
    ("adit_visitors_cut_total", Unit::Count, "Connections cut at the end of a drain"),
    ("adit_accept_failures_total", Unit::Count, "Failed accepts"),
    ("adit_ssh_refused_total", Unit::Count, "SSH connections refused at the door, by limit"),
    ("adit_ssh_rejected_total", Unit::Count, "SSH logins rejected"),
    ("adit_ssh_login_timeouts_total", Unit::Count, "SSH connections that did not log in in time"),
    ("adit_ssh_faults_total", Unit::Count, "SSH sessions ended for a fault of the peer, by fault"),
    ("adit_sessions_dead_total", Unit::Count, "SSH sessions ended because the peer did not answer"),
    ("adit_store_write_failures_total", Unit::Count, "Transactions that the disk did not take"),
    ("adit_feed_records_refused_total", Unit::Count, "Records of the feed that were refused, by kind"),
    ("adit_port_bind_failures_total", Unit::Count, "Sockets' own ports that could not be opened"),
];

/// Name, unit and help of each gauge.
const GAUGES: &[(&str, Unit, &str)] = &[
    ("adit_visitors", Unit::Count, "Visitors' connections open now, by door"),
    ("adit_origin_connections_kept", Unit::Count, "Connections to origins that wait for a request"),
    ("adit_tunnels_attached", Unit::Count, "Tunnels that live sessions serve, standbys included"),
    ("adit_sessions", Unit::Count, "SSH sessions logged in"),
    ("adit_ready", Unit::Count, "1 while the node takes visitors"),
];

/// Name, unit and help of each histogram.
const HISTOGRAMS: &[(&str, Unit, &str)] = &[
    ("adit_visit_first_byte_seconds", Unit::Seconds, "From the start of a visit to the origin's first byte"),
    ("adit_store_commit_seconds", Unit::Seconds, "Time for a group of transactions to reach the disk"),
    ("adit_tunnel_rtt_seconds", Unit::Seconds, "Round trips to owners' SSH clients"),
];

/// Seconds: from a loopback round trip to a very slow origin.
const BUCKETS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

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

/// Counts one finished visit.
pub fn visit(visit: &Visit) {
    let kind = match &visit.what {
        What::Request { .. } => "request",
        What::Connection(kind) => kind,
    };
    let error = visit.error.map_or("none", Error::label);
    let fault = visit.error.map_or("none", |e| e.fault().as_str());
    metrics::counter!("adit_visits_total", "kind" => kind, "error" => error, "fault" => fault).increment(1);
    metrics::counter!("adit_visit_bytes_total", "direction" => "up").increment(visit.bytes_up);
    metrics::counter!("adit_visit_bytes_total", "direction" => "down").increment(visit.bytes_down);
    if let Some(first) = visit.first_byte {
        metrics::histogram!("adit_visit_first_byte_seconds").record(first.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
                assert!(known.contains(&name) || !name.starts_with("adit_"), "{name} is not described");
            }
        }
    }
}
