//! The knobs of the HTTP path: deadlines, limits, HTTP/2 windows, TLS to
//! origins. Each with its unit, default and reason; the file's keys are the
//! fields' names under `[http]`.

use std::path::PathBuf;
use std::time::Duration;

use crate::fields::{Bytes, Fields, Network};

/// Settings of the HTTP path, section `[http]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpSettings {
    /// From the first byte of a request's head to its last (for the first
    /// request: from the connection's start). 15 s: a head is a few packets;
    /// slow-head attacks hold a connection no longer than this.
    pub head_deadline: Duration,
    /// How long a connection without a request is kept. 75 s: nginx's figure,
    /// above the 60 s after which most clients and load balancers give up.
    pub idle: Duration,
    /// From the request handed over (its last upload progress, where it has a
    /// body) to the head of the origin's answer. 60 s: as nginx and HAProxy; a
    /// longer poll needs a higher figure.
    pub first_byte: Duration,
    /// How long a body may make no progress in either direction. 5 min: server-sent
    /// events and long downloads pause, but dead peers must not pile up.
    pub body_idle: Duration,
    /// How long an upgraded connection (WebSocket) may be silent. 10 min: beyond
    /// the usual ping intervals of 20 to 60 s and of most NAT tables.
    pub upgrade_idle: Duration,
    /// How long an upload with `Expect: 100-continue` waits for the origin's
    /// word before it is sent anyway (RFC 9110 §10.1.1). 1 s: curl's own figure.
    pub continue_wait: Duration,
    /// How long a request goes on without progress after its visitor closed its
    /// side: a half-closed visitor and one that went away look alike until
    /// something is written. 10 s: answers of scripts that close early still
    /// arrive; a silent origin's channel is not held for a ghost.
    pub half_closed: Duration,
    /// How long what a visitor still sends is read and dropped after we closed,
    /// so that a reset does not destroy the answer on its way (RFC 9112 §9.6).
    /// 2 s: a round trip to anywhere, and some.
    pub linger: Duration,
    /// TLS handshake with an https origin. 10 s: three round trips through the
    /// worst tunnel, and a slow device's signature.
    pub origin_tls: Duration,
    /// How long a connection to an origin waits for the next request; zero keeps
    /// none. 4 s: Node.js, uvicorn and Apache close after 5. Shorter where the
    /// origin says so (`Keep-Alive: timeout=`).
    pub origin_idle: Duration,
    /// How old such a connection may get. 10 min: an origin that moved is found
    /// again within it.
    pub origin_age: Duration,
    /// Connections that wait, for each tunnel of a session. 128: the streams of a few
    /// visitors of HTTP/2; with 32 a burst closed most, and opened them again.
    pub origin_kept_per_tunnel: usize,
    /// Connections that wait, in all. 10,000: some 300 MB,
    /// most of it hyper's buffers.
    pub origin_kept: usize,
    /// How long an HTTP/2 connection to an origin is kept without a request. 60 s:
    /// its end is agreed on, so that no request meets it.
    pub origin_h2_idle: Duration,
    /// Requests at once on one HTTP/2 connection to an origin; more open another.
    /// 64: with `origin_h2_stream_window`, 16 MiB for a connection.
    pub origin_h2_streams: usize,
    /// HTTP/2 receive window per stream from an origin, in bytes; a connection has
    /// that of all its streams, so that a visitor who does not read holds nobody
    /// up. 256 KiB: 40 Mbit/s at 50 ms for each stream.
    pub origin_h2_stream_window: Bytes,
    /// Largest head (request line and fields) of a request or an answer, in
    /// bytes; more is 431. 64 KiB: browsers with large cookies stay below 32.
    pub head_max: Bytes,
    /// Most fields in a head; more is 431. 128: Apache and HAProxy stop at 100.
    pub headers_max: usize,
    /// Requests at once on one HTTP/2 connection. 128: RFC 9113 §6.5.2 wants at
    /// least 100.
    pub h2_streams: u32,
    /// HTTP/2 receive window per stream, in bytes. 1 MiB: 80 Mbit/s of upload at
    /// 100 ms.
    pub h2_stream_window: Bytes,
    /// HTTP/2 receive window per connection, in bytes: the bound on what one
    /// visitor's uploads hold here. 4 MiB.
    pub h2_window: Bytes,
    /// What is queued per HTTP/2 stream towards a visitor, in bytes. 128 KiB:
    /// times `h2_streams`, what a visitor that stops reading can hold.
    pub h2_send_buffer: Bytes,
    /// Interval of HTTP/2 pings to a visitor, who must answer within `h2_ping_timeout`.
    /// 30 s: below NAT timeouts, finds dead visitors before `idle` would.
    pub h2_ping: Duration,
    /// How long a visitor may take to answer an HTTP/2 ping. 15 s: a phone on a
    /// bad link needs seconds.
    pub h2_ping_timeout: Duration,
    /// Streams that a visitor may reset before we took them up; more ends the
    /// connection (rapid reset, CVE-2023-44487). 20: the h2 crate's own figure.
    pub h2_resets_pending: usize,
    /// Streams that we may have to reset for a visitor's errors; more ends the
    /// connection (RUSTSEC-2024-0003). 256: no honest client comes near.
    pub h2_resets_local: usize,
    /// Networks of peers (other proxies) whose `X-Forwarded-*` fields are
    /// believed. None by default: everybody else's are replaced.
    pub trusted_peers: Vec<Network>,
    /// HTML template of our own pages, see `page`. The built-in one by default.
    pub error_page: Option<PathBuf>,
    /// PEM file of further CAs that https origins are verified against, beside
    /// the system's. None by default.
    pub origin_ca_file: Option<PathBuf>,
    /// The port that redirects to HTTPS name, left out of the URL where 443: no
    /// key of its own, but what `[node]` and the listeners say.
    pub public_https_port: u16,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            head_deadline: Duration::from_secs(15),
            idle: Duration::from_secs(75),
            first_byte: Duration::from_secs(60),
            body_idle: Duration::from_secs(300),
            upgrade_idle: Duration::from_secs(600),
            continue_wait: Duration::from_secs(1),
            half_closed: Duration::from_secs(10),
            linger: Duration::from_secs(2),
            origin_tls: Duration::from_secs(10),
            origin_idle: Duration::from_secs(4),
            origin_age: Duration::from_secs(600),
            origin_kept_per_tunnel: 128,
            origin_kept: 10_000,
            origin_h2_idle: Duration::from_secs(60),
            origin_h2_streams: 64,
            origin_h2_stream_window: Bytes(256 << 10),
            head_max: Bytes(64 << 10),
            headers_max: 128,
            h2_streams: 128,
            h2_stream_window: Bytes(1 << 20),
            h2_window: Bytes(4 << 20),
            h2_send_buffer: Bytes(128 << 10),
            h2_ping: Duration::from_secs(30),
            h2_ping_timeout: Duration::from_secs(15),
            h2_resets_pending: 20,
            h2_resets_local: 256,
            trusted_peers: Vec::new(),
            error_page: None,
            origin_ca_file: None,
            public_https_port: 443,
        }
    }
}

impl HttpSettings {
    /// Reads the section; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let read = Self {
            head_deadline: f.take("head_deadline", d.head_deadline),
            idle: f.take("idle", d.idle),
            first_byte: f.take("first_byte", d.first_byte),
            body_idle: f.take("body_idle", d.body_idle),
            upgrade_idle: f.take("upgrade_idle", d.upgrade_idle),
            continue_wait: f.take("continue_wait", d.continue_wait),
            half_closed: f.take("half_closed", d.half_closed),
            linger: f.take("linger", d.linger),
            origin_tls: f.take("origin_tls", d.origin_tls),
            origin_idle: f.take("origin_idle", d.origin_idle),
            origin_age: f.take("origin_age", d.origin_age),
            origin_kept_per_tunnel: f.take("origin_kept_per_tunnel", d.origin_kept_per_tunnel),
            origin_kept: f.take("origin_kept", d.origin_kept),
            origin_h2_idle: f.take("origin_h2_idle", d.origin_h2_idle),
            origin_h2_streams: f.take("origin_h2_streams", d.origin_h2_streams),
            origin_h2_stream_window: f.take("origin_h2_stream_window", d.origin_h2_stream_window),
            head_max: f.take("head_max", d.head_max),
            headers_max: f.take("headers_max", d.headers_max),
            h2_streams: f.take("h2_streams", d.h2_streams),
            h2_stream_window: f.take("h2_stream_window", d.h2_stream_window),
            h2_window: f.take("h2_window", d.h2_window),
            h2_send_buffer: f.take("h2_send_buffer", d.h2_send_buffer),
            h2_ping: f.take("h2_ping", d.h2_ping),
            h2_ping_timeout: f.take("h2_ping_timeout", d.h2_ping_timeout),
            h2_resets_pending: f.take("h2_resets_pending", d.h2_resets_pending),
            h2_resets_local: f.take("h2_resets_local", d.h2_resets_local),
            trusted_peers: f.take("trusted_peers", d.trusted_peers),
            error_page: f.optional("error_page"),
            origin_ca_file: f.optional("origin_ca_file"),
            public_https_port: d.public_https_port,
        };
        read.check(f);
        read
    }

    /// What hyper may buffer per HTTP/1 connection and direction, in bytes: a
    /// whole head, and enough to keep a fast link busy.
    pub(super) fn buffer_max(&self) -> usize {
        self.head_max.0.max(64 << 10)
    }

    /// Bounds that the protocols or their implementation set.
    fn check(&self, f: &Fields) {
        let size = |key: &str, Bytes(size): Bytes, low: usize, high: usize, fix: &str| {
            if !(low..=high).contains(&size) {
                f.mistake(key, format!("{size} B is out of range"), format!("write {fix}"));
            }
        };
        const WINDOW_MAX: usize = (1 << 31) - 1; // RFC 9113 §6.9.1
        size("head_max", self.head_max, 8 << 10, 1 << 20, "8KiB to 1MiB");
        size("h2_stream_window", self.h2_stream_window, 65_535, WINDOW_MAX, "64KiB to 2047MiB");
        size("h2_window", self.h2_window, 65_535, WINDOW_MAX, "64KiB to 2047MiB");
        size("origin_h2_stream_window", self.origin_h2_stream_window, 65_535, 16 << 20, "64KiB to 16MiB");
        size("h2_send_buffer", self.h2_send_buffer, 16 << 10, 64 << 20, "16KiB to 64MiB");
        let count = |key: &str, n: usize, low: usize, high: usize| {
            if !(low..=high).contains(&n) {
                f.mistake(key, format!("{n} is out of range"), format!("write {low} to {high}"));
            }
        };
        count("headers_max", self.headers_max, 16, 4096);
        count("h2_streams", self.h2_streams as usize, 1, 65_536);
        count("origin_h2_streams", self.origin_h2_streams, 1, 1024);
        count("h2_resets_pending", self.h2_resets_pending, 1, 65_536);
        count("h2_resets_local", self.h2_resets_local, 1, 65_536);
        for (key, wait) in [
            ("head_deadline", self.head_deadline),
            ("idle", self.idle),
            ("first_byte", self.first_byte),
            ("body_idle", self.body_idle),
            ("upgrade_idle", self.upgrade_idle),
            ("origin_tls", self.origin_tls),
            ("h2_ping", self.h2_ping),
            ("h2_ping_timeout", self.h2_ping_timeout),
        ] {
            if wait.is_zero() {
                f.mistake(key, "0 would end everything at once".into(), "write a longer duration".into());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_section_reads_as_the_defaults_and_bad_figures_are_named() {
        let mut f = Fields::new(serde_json::Map::new());
        assert_eq!(HttpSettings::read(&mut f), HttpSettings::default());
        assert!(f.mistakes().is_empty());

        let bad = serde_json::json!({"head_max": "1KiB", "idle": "0s", "h2_streams": 0});
        let mut f = Fields::new(bad.as_object().cloned().unwrap());
        HttpSettings::read(&mut f);
        let at: Vec<String> = f.mistakes().into_iter().map(|m| m.at).collect();
        assert_eq!(at, ["head_max", "h2_streams", "idle"]);
    }
}
