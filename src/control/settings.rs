//! The knobs of the control API.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::fields::{Bytes, Fields};
use crate::model::HostName;

/// The control API's knobs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ControlSettings {
    /// Where the API listens. Default 127.0.0.1:9090: this machine alone.
    pub listen: Vec<SocketAddr>,
    /// A file with one bearer token a line (16 bytes or more; `#` comments),
    /// read at start. Default: `control.token` in the state folder, made with a
    /// random token where it is missing.
    pub token_file: Option<PathBuf>,
    /// Whether a loopback listener may do without a token. Default false: every
    /// user of the machine could change records.
    pub allow_anonymous_loopback: bool,
    /// Names besides localhost and loopback addresses that `Host` may have when
    /// no token is asked for. Default none: guards against DNS rebinding.
    pub hosts: Vec<HostName>,
    /// Whether `/metrics` needs no token. Default false: it tells what runs.
    pub metrics_open: bool,
    /// Largest body of a request. Default 256 KiB: the largest record, a
    /// certificate chain with its key, has some 20 KiB.
    pub body_limit: Bytes,
    /// How long a request's head may take, and a connection stay idle. Default
    /// 10 s: the operator's tools are near and quick.
    pub head_deadline: Duration,
    /// How long a request's body may take. Default 10 s, for the same reason.
    pub body_deadline: Duration,
    /// Connections at once; more wait to be accepted. Default 256.
    pub connections: usize,
    /// Watches at once; more are refused. Default 64: each takes a connection,
    /// which the other requests must not run out of.
    pub watchers: usize,
    /// How often an idle watch gets a comment. Default 15 s: below the idle
    /// limits of common proxies (60 s).
    pub heartbeat: Duration,
    /// How long a peer may leave what was sent unacknowledged or unread before
    /// it is cut. Default 60 s: a suspended laptop resumes by cursor anyway.
    pub stall_deadline: Duration,
    /// How long a write waits until this node acts on it. Default 2 s: it takes
    /// milliseconds; beyond, the answer says that it is stored and not yet applied.
    pub apply_deadline: Duration,
    /// How long open requests may take when the node stops. Default 5 s.
    pub close_deadline: Duration,
}

impl Default for ControlSettings {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([127, 0, 0, 1], 9090))],
            token_file: None,
            allow_anonymous_loopback: false,
            hosts: Vec::new(),
            metrics_open: false,
            body_limit: Bytes(256 << 10),
            head_deadline: Duration::from_secs(10),
            body_deadline: Duration::from_secs(10),
            connections: 256,
            watchers: 64,
            heartbeat: Duration::from_secs(15),
            stall_deadline: Duration::from_secs(60),
            apply_deadline: Duration::from_secs(2),
            close_deadline: Duration::from_secs(5),
        }
    }
}

impl ControlSettings {
    /// Reads the section `control` of the settings.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let settings = Self {
            listen: f.take("listen", d.listen),
            token_file: f.optional("token_file"),
            allow_anonymous_loopback: f.take("allow_anonymous_loopback", d.allow_anonymous_loopback),
            hosts: f.take("hosts", d.hosts),
            metrics_open: f.take("metrics_open", d.metrics_open),
            body_limit: f.take("body_limit", d.body_limit),
            head_deadline: f.take("head_deadline", d.head_deadline),
            body_deadline: f.take("body_deadline", d.body_deadline),
            connections: f.take("connections", d.connections),
            watchers: f.take("watchers", d.watchers),
            heartbeat: f.take("heartbeat", d.heartbeat),
            stall_deadline: f.take("stall_deadline", d.stall_deadline),
            apply_deadline: f.take("apply_deadline", d.apply_deadline),
            close_deadline: f.take("close_deadline", d.close_deadline),
        };
        let open = settings.listen.iter().find(|a| !a.ip().to_canonical().is_loopback());
        if let Some(open) = open.filter(|_| settings.allow_anonymous_loopback && settings.token_file.is_none()) {
            let problem = format!("{open} is not loopback, and no token is asked for");
            f.mistake("allow_anonymous_loopback", problem, "write false, or listen on 127.0.0.1".into());
        }
        if settings.connections <= settings.watchers {
            let problem = format!("leaves no room beside {} watchers", settings.watchers);
            f.mistake("connections", problem, "write more connections than watchers".into());
        }
        for (key, value) in [("heartbeat", settings.heartbeat), ("stall_deadline", settings.stall_deadline)] {
            if value.is_zero() {
                f.mistake(key, "is 0".into(), "write a duration above 0".into());
            }
        }
        settings
    }
}
