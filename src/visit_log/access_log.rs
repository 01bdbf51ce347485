//! The access log: one line of JSON for each visit, written by a thread of its
//! own. Visits never wait for it: what is too much for it is dropped and counted.

use std::fs::{File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::{Visit, What};
use crate::error::Error;
use crate::fields::Fields;
use crate::text_field;

/// Visits that wait for the writer.
const QUEUE: usize = 8192;

/// The longest time that a line waits in the buffer.
const FLUSH: Duration = Duration::from_millis(200);

/// `[access_log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AccessLogSettings {
    /// Where it goes.
    pub to: To,
    /// Of visits that went well one in so many is written.
    pub one_in: u64,
    /// Most lines in a second.
    pub per_second: u64,
}

impl Default for AccessLogSettings {
    fn default() -> Self {
        Self { to: To::Off, one_in: 1, per_second: 5000 }
    }
}

impl AccessLogSettings {
    /// Reads the section; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            to: f.take("to", d.to),
            one_in: f.take("one_in", d.one_in),
            per_second: f.take("per_second", d.per_second),
        };
        for (key, value) in [("one_in", settings.one_in), ("per_second", settings.per_second)] {
            if value == 0 {
                f.mistake(key, "0 would write nothing".into(), "write a whole number from 1, or to = \"off\"".into());
            }
        }
        settings
    }
}

/// Where the access log goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum To {
    /// Nowhere.
    Off,
    /// Standard output.
    Stdout,
    /// The end of this file, opened anew on SIGHUP.
    File(PathBuf),
}

impl FromStr for To {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "off" => Ok(Self::Off),
            "stdout" => Ok(Self::Stdout),
            path if Path::new(path).is_absolute() => Ok(Self::File(path.into())),
            _ => Err("is no place for it"),
        }
    }
}
text_field!(To, "\"off\", \"stdout\" or an absolute path");

enum Told {
    Visit(Arc<Visit>),
    Reopen,
    /// Write what there is, and answer.
    Flush(SyncSender<()>),
}

/// The way to the writer.
#[derive(Debug)]
pub struct AccessLog {
    writer: SyncSender<Told>,
    one_in: u64,
    well: AtomicU64,
    per_second: u64,
    /// The present second, and what was written in it.
    second: AtomicU64,
    written: AtomicU64,
    queued: Arc<AtomicUsize>,
}

impl AccessLog {
    /// Opens the log and starts its writer; none where it goes nowhere.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn start(settings: &AccessLogSettings) -> Result<Option<Self>, String> {
        let (path, out): (Option<PathBuf>, Box<dyn Write + Send>) = match &settings.to {
            To::Off => return Ok(None),
            To::Stdout => (None, Box::new(io::stdout())),
            To::File(path) => {
                let file =
                    open(path).map_err(|e| format!("access_log.to: {} cannot be opened: {e}", path.display()))?;
                (Some(path.clone()), Box::new(file))
            }
        };
        let (writer, told) = mpsc::sync_channel(QUEUE);
        let queued = Arc::<AtomicUsize>::default();
        let taken = Arc::clone(&queued);
        let run = move || write_all(&told, &taken, BufWriter::with_capacity(64 << 10, out), path.as_deref());
        std::thread::Builder::new().name("access-log".into()).spawn(run).map_err(|e| format!("access_log: {e}"))?;
        Ok(Some(Self {
            writer,
            one_in: settings.one_in,
            well: AtomicU64::new(0),
            per_second: settings.per_second,
            second: AtomicU64::new(0),
            written: AtomicU64::new(0),
            queued,
        }))
    }

    /// Takes one visit, unless it is one of too many. Never waits.
    pub fn record(&self, visit: &Arc<Visit>) {
        if visit.error.is_none() && !self.well.fetch_add(1, Ordering::Relaxed).is_multiple_of(self.one_in) {
            return dropped("sample");
        }
        let second = visit.at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        if self.second.fetch_max(second, Ordering::Relaxed) < second {
            self.written.store(0, Ordering::Relaxed);
        }
        if self.written.fetch_add(1, Ordering::Relaxed) >= self.per_second {
            return dropped("rate");
        }
        self.queued.fetch_add(1, Ordering::Relaxed);
        if self.writer.try_send(Told::Visit(Arc::clone(visit))).is_err() {
            self.queued.fetch_sub(1, Ordering::Relaxed);
            dropped("queue");
        }
    }

    /// Visits that wait for the writer.
    pub fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    /// Opens the file again, which somebody has moved away.
    pub fn reopen(&self) {
        let _ = self.writer.try_send(Told::Reopen);
    }

    /// Waits until what was recorded is written, at most two seconds.
    pub fn flush(&self) {
        let (done, wait) = mpsc::sync_channel(1);
        if self.writer.try_send(Told::Flush(done)).is_ok() {
            let _ = wait.recv_timeout(Duration::from_secs(2));
        }
    }
}

fn dropped(why: &'static str) {
    metrics::counter!("adit_access_log_dropped_total", "why" => why).increment(1);
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).open(path)
}

fn write_all(
    told: &Receiver<Told>,
    queued: &AtomicUsize,
    mut out: BufWriter<Box<dyn Write + Send>>,
    path: Option<&Path>,
) {
    let mut failing = false;
    loop {
        let written = match told.recv_timeout(FLUSH) {
            Ok(Told::Visit(visit)) => {
                queued.fetch_sub(1, Ordering::Relaxed);
                write_line(&mut out, &visit)
            }
            Ok(Told::Reopen) => match path.map(open) {
                Some(Ok(file)) => {
                    let _ = out.flush();
                    out = BufWriter::with_capacity(64 << 10, Box::new(file));
                    Ok(())
                }
                Some(Err(error)) => Err(error),
                None => Ok(()),
            },
            Ok(Told::Flush(done)) => {
                let flushed = out.flush();
                let _ = done.send(());
                flushed
            }
            Err(RecvTimeoutError::Timeout) => out.flush(),
            Err(RecvTimeoutError::Disconnected) => {
                let _ = out.flush();
                return;
            }
        };
        // A full disk is told once, not for each line.
        if let Err(error) = &written
            && !failing
        {
            tracing::error!(%error, "the access log cannot be written");
        }
        if written.is_err() {
            dropped("disk");
        }
        failing = written.is_err();
    }
}

/// Times are in milliseconds.
#[derive(Serialize)]
struct Line<'a> {
    time: String,
    visitor: String,
    r#type: &'a str,
    protocol: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    socket: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunnel: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    entry: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    node: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    method: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    host: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    path: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<u16>,
    up: u64,
    down: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    tls_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    route_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dial_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tunnel_ms: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    first_byte_ms: Option<f64>,
    total_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fault: Option<&'a str>,
}

fn write_line(out: &mut impl Write, visit: &Visit) -> io::Result<()> {
    let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
    let (method, host, path) = match &visit.what {
        What::Request { method, host, path } => (Some(method.as_str()), Some(host.as_str()), Some(path.as_str())),
        What::Connection => (None, None, None),
    };
    let line = Line {
        time: rfc3339(visit.at),
        visitor: visit.visitor.to_string(),
        r#type: visit.kind,
        protocol: visit.protocol,
        id: visit.id.as_ref().and_then(|id| id.to_str().ok()),
        socket: visit.socket.as_ref().map(|s| s.as_str()),
        tunnel: visit.tunnel.as_ref().map(|t| t.as_str()),
        entry: visit.node.as_ref().map(|far| far.entry.as_str()),
        node: visit.node.as_ref().map(|far| far.owner.as_str()),
        method,
        host: host.filter(|host| !host.is_empty()),
        path,
        status: visit.status,
        up: visit.bytes_up,
        down: visit.bytes_down,
        tls_ms: visit.legs.tls.map(ms),
        route_ms: visit.legs.route.map(ms),
        dial_ms: visit.legs.dial.map(ms),
        tunnel_ms: visit.legs.tunnel.map(ms),
        first_byte_ms: visit.first_byte.map(ms),
        total_ms: ms(visit.total),
        error: visit.error.map(Error::label),
        fault: visit.error.map(|e| e.fault().as_str()),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}

fn rfc3339(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let at = at.replace_millisecond(at.millisecond()).unwrap_or(at);
    at.format(&Rfc3339).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::super::Legs;
    use super::*;

    fn visit(error: Option<Error>) -> Arc<Visit> {
        Arc::new(Visit {
            at: UNIX_EPOCH + Duration::from_millis(1_795_000_000_123),
            visitor: "192.0.2.7:5000".parse().unwrap(),
            kind: "http",
            protocol: "h2",
            id: Some("abc".parse().unwrap()),
            socket: Some("web".parse().unwrap()),
            tunnel: Some("web".parse().unwrap()),
            node: None,
            what: What::Request { method: "GET".into(), host: "web.test".into(), path: "/\"\u{1b}[2J\n".into() },
            status: Some(200),
            bytes_up: 0,
            bytes_down: 5,
            legs: Legs {
                route: Some(Duration::from_micros(12)),
                dial: Some(Duration::from_micros(1500)),
                ..Legs::default()
            },
            first_byte: Some(Duration::from_millis(2)),
            total: Duration::from_micros(3456),
            error,
        })
    }

    fn log_to(path: &Path, one_in: u64, per_second: u64) -> AccessLog {
        let to = path.to_str().unwrap().parse().unwrap();
        AccessLog::start(&AccessLogSettings { to, one_in, per_second }).unwrap().unwrap()
    }

    #[test]
    fn a_visit_is_one_line_of_json_whatever_the_visitor_sent() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("access.log");
        let log = log_to(&path, 1, 100);
        log.record(&visit(None));
        log.record(&visit(Some(Error::OriginRefused)));
        log.flush();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(
            lines[0],
            serde_json::json!({"time": "2026-11-18T11:06:40.123Z", "visitor": "192.0.2.7:5000", "type": "http",
                "protocol": "h2", "id": "abc", "socket": "web", "tunnel": "web", "method": "GET", "host": "web.test",
                "path": "/\"\u{1b}[2J\n", "status": 200, "up": 0, "down": 5, "route_ms": 0.012, "dial_ms": 1.5,
                "first_byte_ms": 2.0, "total_ms": 3.456})
        );
        assert_eq!((&lines[1]["error"], &lines[1]["fault"]), (&"origin_refused".into(), &"origin".into()));
        // Moved away by whoever rotates it.
        std::fs::rename(&path, dir.path().join("old")).unwrap();
        log.reopen();
        log.record(&visit(None));
        log.flush();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
    }

    #[test]
    fn a_flood_is_sampled_and_bounded_and_failures_are_not_sampled_away() {
        let dir = tempfile::tempdir().unwrap();
        for (one_in, per_second, error, lines) in
            [(10, 1000, None, 10), (10, 1000, Some(Error::Internal), 100), (1, 7, None, 7)]
        {
            let path = dir.path().join(format!("{one_in}-{per_second}-{lines}"));
            let log = log_to(&path, one_in, per_second);
            (0..100).for_each(|_| log.record(&visit(error)));
            log.flush();
            assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), lines);
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let to = "/proc/nowhere/log".parse().unwrap();
        let error = AccessLog::start(&AccessLogSettings { to, ..AccessLogSettings::default() }).unwrap_err();
        assert!(error.contains("access_log.to: /proc/nowhere/log"), "{error}");
        assert!("relative/path".parse::<To>().is_err());
    }
}
