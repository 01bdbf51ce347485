//! A published service and what its record says of it.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::gate::Gate;
use super::{Check, HostName, HostPattern, SocketId, authority_host, head, record};
use crate::fields::{Fields, Mistake};
use crate::header_rules::{HeaderRules, Hsts};
use crate::proxy_protocol;
use crate::text_field;

/// What a socket publishes, and how visitors' bytes are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SocketType {
    /// By Host; the origin speaks HTTP.
    Http,
    /// By Host; the origin speaks HTTPS, so the edge speaks TLS to it.
    Https,
    /// Raw on its own port.
    Tcp,
    /// TLS ended at the edge on its own port, raw inside.
    Tls,
    /// TLS routed by SNI on the shared port, never decrypted.
    Passthrough,
}

impl SocketType {
    /// The word for it in records, logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Passthrough => "passthrough",
        }
    }

    /// Whether visitors come by host name (else by the socket's own port).
    pub fn by_name(self) -> bool {
        matches!(self, Self::Http | Self::Https | Self::Passthrough)
    }
}

impl FromStr for SocketType {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Http, Self::Https, Self::Tcp, Self::Tls, Self::Passthrough]
            .into_iter()
            .find(|t| t.as_str() == text)
            .ok_or("is not a socket type")
    }
}
impl fmt::Display for SocketType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
text_field!(SocketType, "\"http\", \"https\", \"tcp\", \"tls\" or \"passthrough\"");

/// How a socket's visitors are shared among its tunnels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balance {
    /// The nearest one; those that are as near share.
    Nearest,
    /// One after the other.
    RoundRobin,
    /// The one with the fewest visitors.
    LeastConnections,
    /// Any.
    Random,
    /// By the visitor's address: always the same one, for as long as it is there.
    IpHash,
}

impl Balance {
    const ALL: [Self; 5] = [Self::Nearest, Self::RoundRobin, Self::LeastConnections, Self::Random, Self::IpHash];

    /// As in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nearest => "nearest",
            Self::RoundRobin => "round_robin",
            Self::LeastConnections => "least_connections",
            Self::Random => "random",
            Self::IpHash => "ip_hash",
        }
    }
}

impl FromStr for Balance {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|balance| balance.as_str() == text).ok_or("is not a balance policy")
    }
}
text_field!(Balance, "\"nearest\", \"round_robin\", \"least_connections\", \"random\" or \"ip_hash\"");

/// TLS towards an https origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamTls {
    /// SNI and the name to verify; default: `upstream.host`, else the name the
    /// visitor asked for.
    pub server_name: Option<HostName>,
    /// Whether the origin's certificate must verify against the system's roots.
    pub verify: bool,
}

/// How the edge speaks to the origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Upstream {
    /// `Host` sent to the origin; default: the visitor's.
    pub host: Option<String>,
    /// HTTP/2 towards the origin.
    pub http2: bool,
    /// TLS towards the origin (type https).
    pub tls: UpstreamTls,
}

/// Longest title or description, in bytes.
const TEXT_MAX: usize = 1024;

/// A published service.
#[derive(Debug, Clone, PartialEq)]
pub struct Socket {
    /// Its id.
    pub id: SocketId,
    /// Its type.
    pub kind: SocketType,
    /// Names it answers to (types http, https, passthrough; for tls the names
    /// whose certificate it presents).
    pub hostnames: Vec<HostPattern>,
    /// Its own ports (types tcp, tls).
    pub ports: Vec<u16>,
    /// How the edge speaks to the origin.
    pub upstream: Upstream,
    /// Whether plain HTTP visitors are sent to HTTPS.
    pub redirect_https: bool,
    /// What is changed in requests' heads on their way to the origin.
    pub request_headers: HeaderRules,
    /// What is changed in the heads of the origin's answers.
    pub response_headers: HeaderRules,
    /// Whether browsers are told to come by HTTPS alone.
    pub hsts: Option<Hsts>,
    /// Whether each connection to the origin begins with a PROXY protocol header.
    pub proxy_protocol: Option<proxy_protocol::Version>,
    /// What a visitor must pass.
    pub gate: Option<Arc<Gate>>,
    /// Whose it is: a visitor who let one socket of an owner see their address is
    /// not asked again for the others. Default: the socket stands alone.
    pub owner: Option<String>,
    /// What its owner calls it; no visitor sees it.
    pub title: Option<String>,
    /// What its owner says of it; the same.
    pub description: Option<String>,
    /// How visitors are shared among tunnels.
    pub balance: Balance,
    /// How its tunnels are asked whether their origin serves; none: they are not.
    pub check: Option<Check>,
    /// Who made it: `api`, or the fingerprint of the key that claimed the name.
    pub created_by: Option<String>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl Socket {
    /// A socket with every field at its default.
    pub fn new(id: SocketId, kind: SocketType) -> Self {
        Self {
            id,
            kind,
            hostnames: Vec::new(),
            ports: Vec::new(),
            upstream: Upstream { host: None, http2: false, tls: UpstreamTls { server_name: None, verify: true } },
            redirect_https: false,
            request_headers: HeaderRules::default(),
            response_headers: HeaderRules::default(),
            hsts: None,
            proxy_protocol: None,
            gate: None,
            owner: None,
            title: None,
            description: None,
            balance: Balance::Nearest,
            check: None,
            created_by: None,
            extra: Map::new(),
        }
    }

    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &SocketId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let mut socket = Self::new(id.clone(), f.required("type").unwrap_or(SocketType::Http));
        socket.hostnames = f.take("hostnames", Vec::new());
        socket.ports = f.take("ports", Vec::new());
        let _derived: Option<Value> = f.optional("tunnels");
        let mut up = f.section("upstream");
        socket.upstream.host = up.optional("host");
        socket.upstream.http2 = up.take("http2", false);
        let mut tls = up.section("tls");
        socket.upstream.tls.server_name = tls.optional("server_name");
        socket.upstream.tls.verify = tls.take("verify", true);
        tls.refuse_rest();
        up.refuse_rest();
        socket.redirect_https = f.take("redirect_https", false);
        socket.request_headers = HeaderRules::read(&mut f.section("request_headers"));
        socket.response_headers = HeaderRules::read(&mut f.section("response_headers"));
        if f.has_value("hsts") {
            socket.hsts = Hsts::read(&mut f.section("hsts"));
        } else {
            let _none: Option<Value> = f.optional("hsts");
        }
        socket.proxy_protocol = f.optional("proxy_protocol");
        socket.balance = f.take("balance", Balance::Nearest);
        if f.has_value("check") {
            let http = matches!(socket.kind, SocketType::Http | SocketType::Https);
            socket.check = Some(Check::read(&mut f.section("check"), http));
        } else {
            let _none: Option<Value> = f.optional("check");
        }
        socket.created_by = f.optional("created_by");
        socket.owner = f.optional("owner");
        socket.title = f.optional("title");
        socket.description = f.optional("description");
        for (key, text) in [("title", &socket.title), ("description", &socket.description)] {
            if text.as_ref().is_some_and(|text| text.len() > TEXT_MAX || text.chars().any(char::is_control)) {
                let fix = format!("write at most {TEXT_MAX} bytes without control characters");
                f.mistake(key, "is too long, or no line of text".into(), fix);
            }
        }
        if f.has_value("gate") {
            let gate = Gate::read(&mut f.section("gate"));
            gate_fits(&gate, socket.kind, &f);
            socket.gate = Some(Arc::new(gate));
        } else {
            let _none: Option<Value> = f.optional("gate");
        }
        if let Some(host) = &socket.upstream.host
            && authority_host(host).is_err()
        {
            f.mistake(
                "upstream.host",
                format!("\"{}\" is not host[:port]", host.escape_debug()),
                "write a host name".into(),
            );
        }
        if socket.kind.by_name() && !socket.ports.is_empty() {
            f.mistake("ports", format!("type {} has no port of its own", socket.kind), "leave ports out".into());
        }
        if socket.kind == SocketType::Tcp && !socket.hostnames.is_empty() {
            f.mistake(
                "hostnames",
                "type tcp is reached by port alone".into(),
                "leave hostnames out, or use type tls".into(),
            );
        }
        if socket.ports.contains(&0) {
            f.mistake("ports", "0 is not a port".into(), "leave ports out to have one chosen".into());
        }
        let mistakes = f.mistakes();
        socket.extra = f.rest();
        if mistakes.is_empty() { Ok(socket) } else { Err(mistakes) }
    }

    /// The record as stored and answered; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                "type": self.kind.as_str(),
                "hostnames": self.hostnames.iter().map(HostPattern::as_str).collect::<Vec<_>>(),
                "ports": self.ports,
                "upstream": {
                    "host": self.upstream.host,
                    "http2": self.upstream.http2,
                    "tls": {
                        "server_name": self.upstream.tls.server_name.as_ref().map(HostName::as_str),
                        "verify": self.upstream.tls.verify,
                    },
                },
                "redirect_https": self.redirect_https,
                "request_headers": self.request_headers.to_value(),
                "response_headers": self.response_headers.to_value(),
                "proxy_protocol": self.proxy_protocol.map(proxy_protocol::Version::as_str),
                "hsts": self.hsts.as_ref().map(Hsts::to_value),
                "gate": self.gate.as_ref().map(|gate| gate.to_value()),
                "owner": self.owner,
                "title": self.title,
                "description": self.description,
                "balance": self.balance.as_str(),
                "check": self.check.as_ref().map(Check::to_value),
                "created_by": self.created_by,
            }),
        )
    }
}

/// What of a gate a socket of this type cannot keep would publish what its owner
/// closed: a mistake.
fn gate_fits(gate: &Gate, kind: SocketType, f: &Fields) {
    let http = matches!(kind, SocketType::Http | SocketType::Https);
    let parts = [
        ("basic", gate.basic.is_some(), http),
        ("oidc", gate.oidc.is_some(), http),
        ("service_tokens", gate.service_tokens.is_some(), http),
        ("rules", !gate.rules.is_empty(), http),
        ("client_certificates", gate.client_certificates.is_some(), kind == SocketType::Tls),
    ];
    for (part, there, fits) in parts {
        if there && !fits {
            let fix = match part {
                "client_certificates" => "leave it out, or use type tls",
                _ => "leave it out, or use type http or https",
            };
            f.mistake(&format!("gate.{part}"), format!("type {kind} cannot ask for it"), fix.into());
        }
    }
}
