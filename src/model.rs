//! The nouns of adit as plain validated values: sockets, tunnels, certificates,
//! their ids and names, and who is visiting. No I/O. A value of these types is
//! valid by construction; records that are not are refused with every mistake.

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::fields::{Base64, Field, Fields, Mistake};
use crate::header_rules::{HeaderRules, Hsts};
use crate::proxy_protocol;
use crate::text_field;

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = &'static str;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':' | b'@');
                let first = text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
                if text.len() > 128 || !first || !text.bytes().all(good) {
                    return Err("is not an id: 1 to 128 letters, digits and . _ - : @, a letter or digit first");
                }
                Ok(Self(text.into()))
            }
        }
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        text_field!($name, "an id: letters, digits and . _ - : @");
    };
}

id_type!(
    /// A socket's id. A socket made on demand has id = its name.
    SocketId
);
id_type!(
    /// A tunnel's id.
    TunnelId
);
id_type!(
    /// A certificate's id.
    CertificateId
);

/// A host name as visitors may send it: lower case, ASCII, no trailing dot, no port.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HostName(Arc<str>);

impl HostName {
    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `*.rest` for `label.rest`: the one wildcard that covers this name
    /// (a wildcard is one label deep, RFC 6125 §6.4.3).
    pub fn wildcard(&self) -> Option<String> {
        self.0.split_once('.').map(|(_, rest)| format!("*.{rest}"))
    }
}

impl FromStr for HostName {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(checked_name(text)?.as_ref().into()))
    }
}

impl Borrow<str> for HostName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Lower-cases and checks one DNS name (RFC 1123 labels, `_` allowed).
/// Allocates only where the name is not in its normal form already.
fn checked_name(text: &str) -> Result<Cow<'_, str>, &'static str> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let label_good = |l: &str| {
        (1..=63).contains(&l.len())
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if name.len() > 253 || !name.split('.').all(label_good) {
        return Err("is not a host name");
    }
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return Ok(Cow::Owned(name.to_ascii_lowercase()));
    }
    Ok(Cow::Borrowed(name))
}

/// The authority of a request (`Host`, `:authority`) without its port, checked
/// and lower-cased. IPv6 literals lose their brackets.
///
/// # Errors
/// Anything but `host[:port]`: user information, bad labels, a bad port
/// (RFC 9110 §7.2, §4.2.4).
pub fn authority_host(authority: &str) -> Result<Cow<'_, str>, &'static str> {
    let bad = "is not host[:port]";
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (ip, after) = rest.split_once(']').ok_or(bad)?;
        ip.parse::<std::net::Ipv6Addr>().map_err(|_| bad)?;
        (ip, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or(bad)?)
    } else {
        authority.split_once(':').unwrap_or((authority, ""))
    };
    if !port.is_empty() && (!port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err()) {
        return Err(bad);
    }
    if host.contains(':') {
        let upper = host.bytes().any(|b| b.is_ascii_uppercase());
        return Ok(if upper { Cow::Owned(host.to_ascii_lowercase()) } else { Cow::Borrowed(host) });
    }
    checked_name(host).map_err(|_| bad)
}

/// A name that a socket or certificate answers to: exact, or `*.` and a name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HostPattern(Arc<str>);

impl HostPattern {
    /// The pattern's text, `*.` included.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether this is `*.name`.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }
}

impl FromStr for HostPattern {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("*.") {
            Some(rest) => Ok(Self(format!("*.{}", checked_name(rest)?).into())),
            None => Ok(Self(checked_name(text)?.as_ref().into())),
        }
    }
}

impl From<HostName> for HostPattern {
    fn from(name: HostName) -> Self {
        Self(name.0)
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_field!(HostPattern, "a host name like \"web.example.com\" or \"*.example.com\"");
text_field!(HostName, "a host name like \"web.example.com\"");

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
    /// One after the other.
    RoundRobin,
}

impl FromStr for Balance {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        (text == "round_robin").then_some(Self::RoundRobin).ok_or("is not a balance policy")
    }
}
text_field!(Balance, "\"round_robin\"");

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
    /// How visitors are shared among tunnels.
    pub balance: Balance,
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
            balance: Balance::RoundRobin,
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
        socket.balance = f.take("balance", Balance::RoundRobin);
        socket.created_by = f.optional("created_by");
        if f.has("gate") {
            // A gate that is not enforced would publish what its owner closed.
            f.mistake(
                "gate",
                "this version has no gates".into(),
                "remove it, or use a version that enforces it".into(),
            );
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
                "balance": match self.balance { Balance::RoundRobin => "round_robin" },
                "created_by": self.created_by,
            }),
        )
    }
}

/// A public key (or CA key) of a record: one `authorized_keys` line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AuthorizedKey {
    /// The line as it was written.
    pub line: String,
    /// `SHA256:…`, what keys are compared by.
    pub fingerprint: String,
}

impl FromStr for AuthorizedKey {
    type Err = &'static str;
    fn from_str(line: &str) -> Result<Self, Self::Err> {
        let line = line.trim();
        // A line with options (`from=…`, `restrict`) is refused rather than
        // read without the restriction that it asks for.
        let key = ssh_key::PublicKey::from_openssh(line)
            .map_err(|_| "is not a public key line (algorithm, base64, comment; no options)")?;
        Ok(Self { line: line.to_owned(), fingerprint: key.fingerprint(ssh_key::HashAlg::Sha256).to_string() })
    }
}
text_field!(AuthorizedKey, "a public key line like \"ssh-ed25519 AAAA… comment\"");

/// What may no longer log in: lines as `ssh-keygen -k` takes them (ssh-keygen(1),
/// KEY REVOCATION LISTS).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Revoked {
    /// The key of this fingerprint; if it is a CA's, whatever it has signed.
    Key(String),
    /// Certificates of these serial numbers.
    Serials(RangeInclusive<u64>),
    /// Certificates with this key id.
    Id(String),
}

impl FromStr for Revoked {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fingerprint = |text: &str| text.parse::<ssh_key::Fingerprint>().ok().filter(|f| f.is_sha256());
        let text = text.trim();
        if let Some(fingerprint) = fingerprint(text) {
            return Ok(Self::Key(fingerprint.to_string()));
        }
        let (word, value) = text.split_once(':').map_or(("key", text), |(word, value)| (word, value.trim()));
        match word.to_ascii_lowercase().as_str() {
            "serial" => {
                let (first, last) = value.split_once('-').unwrap_or((value, value));
                match (first.trim().parse(), last.trim().parse()) {
                    (Ok(first), Ok(last)) if first <= last => Ok(Self::Serials(first..=last)),
                    _ => Err("is not a serial number or a range of them"),
                }
            }
            "id" if !value.is_empty() => Ok(Self::Id(value.to_owned())),
            "hash" => fingerprint(value).map(|f| Self::Key(f.to_string())).ok_or("is not a SHA256 fingerprint"),
            "key" | "sha256" => {
                let key: AuthorizedKey = value.parse().map_err(|_| "names no public key")?;
                Ok(Self::Key(key.fingerprint))
            }
            _ => Err("names nothing that can be revoked"),
        }
    }
}

impl fmt::Display for Revoked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Key(fingerprint) => f.write_str(fingerprint),
            Self::Serials(range) => write!(f, "serial: {}-{}", range.start(), range.end()),
            Self::Id(id) => write!(f, "id: {id}"),
        }
    }
}
text_field!(Revoked, "\"SHA256:…\", a public key line, \"serial: 5\", \"serial: 5-9\" or \"id: KEY_ID\"");

/// One registered path to an origin.
#[derive(Debug, Clone, PartialEq)]
pub struct Tunnel {
    /// Its id.
    pub id: TunnelId,
    /// The socket that it serves.
    pub socket: SocketId,
    /// The SSH user name that must log in; any, if absent and `relay_port` is too.
    pub user: Option<String>,
    /// The bind port that names this tunnel together with `user`.
    pub relay_port: Option<u16>,
    /// Keys that may serve it.
    pub keys: Vec<AuthorizedKey>,
    /// CAs whose user certificates may serve it.
    pub cert_authorities: Vec<AuthorizedKey>,
    /// Principals of which a certificate must carry one; empty = `user`.
    pub principals: Vec<String>,
    /// Keys and certificates that may not serve it any more.
    pub revoked: Vec<Revoked>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl Tunnel {
    /// A tunnel with every optional field at its default.
    pub fn new(id: TunnelId, socket: SocketId) -> Self {
        Self {
            id,
            socket,
            user: None,
            relay_port: None,
            keys: Vec::new(),
            cert_authorities: Vec::new(),
            principals: Vec::new(),
            revoked: Vec::new(),
            extra: Map::new(),
        }
    }

    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &TunnelId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let socket: Option<SocketId> = f.required("socket");
        let user: Option<String> = f.optional("user");
        let relay_port: Option<u16> = f.optional("relay_port");
        let keys = f.take("keys", Vec::new());
        let cert_authorities = f.take("cert_authorities", Vec::new());
        let principals = f.take("principals", Vec::new());
        let revoked = f.take("revoked", Vec::new());
        if relay_port.is_some() && user.is_none() {
            f.mistake("user", "is missing beside relay_port".into(), "write the SSH user name that logs in".into());
        }
        if relay_port == Some(0) {
            f.mistake("relay_port", "0 is not a port".into(), "write a whole number from 1 to 65535".into());
        }
        let mistakes = f.mistakes();
        let extra = f.rest();
        match socket {
            Some(socket) if mistakes.is_empty() => Ok(Self {
                id: id.clone(),
                socket,
                user,
                relay_port,
                keys,
                cert_authorities,
                principals,
                revoked,
                extra,
            }),
            _ => Err(mistakes),
        }
    }

    /// The record as stored and answered; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        let lines = |keys: &[AuthorizedKey]| keys.iter().map(|k| k.line.clone()).collect::<Vec<_>>();
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                "socket": self.socket.as_str(),
                "user": self.user,
                "relay_port": self.relay_port,
                "keys": lines(&self.keys),
                "cert_authorities": lines(&self.cert_authorities),
                "principals": self.principals,
                "revoked": self.revoked.iter().map(Revoked::to_string).collect::<Vec<_>>(),
            }),
        )
    }
}

/// A TLS certificate with its key, chosen by its leaf's subjectAltNames.
#[derive(Clone, PartialEq)]
pub struct Certificate {
    /// Its id.
    pub id: CertificateId,
    /// PEM, leaf first.
    pub chain_pem: String,
    /// PEM; never logged, never answered in an error.
    pub key_pem: String,
    /// An OCSP response for the leaf (DER, RFC 6960), shown to visitors while
    /// it lasts.
    pub ocsp: Option<Base64>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl fmt::Debug for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads a record; `id` is the one it is stored under. That chain and key
    /// are well-formed and belong together is checked where TLS is at hand
    /// (`tls::check`).
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &CertificateId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let chain_pem: Option<String> = f.required("chain_pem");
        let key_pem: Option<String> = f.required("key_pem");
        let ocsp = f.optional("ocsp");
        let mistakes = f.mistakes();
        let extra = f.rest();
        match (chain_pem, key_pem) {
            (Some(chain_pem), Some(key_pem)) if mistakes.is_empty() => {
                Ok(Self { id: id.clone(), chain_pem, key_pem, ocsp, extra })
            }
            _ => Err(mistakes),
        }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                "chain_pem": self.chain_pem,
                "key_pem": self.key_pem,
                "ocsp": self.ocsp.as_ref().map(Base64::to_string),
            }),
        )
    }
}

/// The id of the ticket keys: there is one record of them, `default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TicketKeysId;

impl FromStr for TicketKeysId {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        (text == "default").then_some(Self).ok_or("is not \"default\", the one record of its kind")
    }
}

impl fmt::Display for TicketKeysId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("default")
    }
}
text_field!(TicketKeysId, "\"default\"");

/// The secrets that TLS session tickets of all nodes are made from.
#[derive(Clone, PartialEq)]
pub struct TicketKeys {
    /// Its id.
    pub id: TicketKeysId,
    /// 1 to 8 secrets of 32 to 256 bytes: the first makes tickets, each one
    /// reads those that were made from it.
    pub keys: Vec<Base64>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl fmt::Debug for TicketKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TicketKeys").field("keys", &self.keys.len()).finish_non_exhaustive()
    }
}

impl TicketKeys {
    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record; never a byte of a key.
    pub fn from_record(id: &TicketKeysId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let keys: Vec<Base64> = f.required("keys").unwrap_or_default();
        if !f.mistakes().iter().any(|m| m.at == "keys") && !(1..=8).contains(&keys.len()) {
            let problem = format!("holds {} keys", keys.len());
            f.mistake("keys", problem, "write 1 to 8, first the one that makes tickets".into());
        }
        for (i, key) in keys.iter().enumerate() {
            let fix = "write 32 random bytes, as `openssl rand -base64 32` makes them";
            if !(32..=256).contains(&key.0.len()) {
                f.mistake(&format!("keys[{i}]"), format!("has {} bytes", key.0.len()), fix.into());
            }
            if keys.iter().take(i).any(|earlier| earlier == key) {
                f.mistake(&format!("keys[{i}]"), "is there twice".into(), fix.into());
            }
        }
        let mistakes = f.mistakes();
        let extra = f.rest();
        if mistakes.is_empty() { Ok(Self { id: *id, keys, extra }) } else { Err(mistakes) }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        let keys: Vec<String> = self.keys.iter().map(Base64::to_string).collect();
        record(&self.extra, json!({ "v": 1, "id": self.id.to_string(), "keys": keys }))
    }
}

/// Reads what every record starts with: its version and its id.
fn head<I: Field + PartialEq + fmt::Display>(f: &mut Fields, id: &I) {
    if let Some(v) = f.optional::<u64>("v")
        && v != 1
    {
        f.mistake("v", format!("version {v} is not known here"), "write 1".into());
    }
    if let Some(own) = f.optional::<I>("id")
        && own != *id
    {
        f.mistake(
            "id",
            format!("\"{own}\" is not the id it is stored under"),
            format!("write \"{id}\" or leave it out"),
        );
    }
}

/// The known fields over the unknown ones that were kept.
fn record(extra: &Map<String, Value>, known: Value) -> Map<String, Value> {
    let mut out = extra.clone();
    if let Value::Object(known) = known {
        out.extend(known);
    }
    out
}

/// Who visits: the far and near address of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visitor {
    /// The visitor's address, as the origin should see it.
    pub addr: SocketAddr,
    /// The address and port of ours that they reached.
    pub local: SocketAddr,
}

impl Visitor {
    /// A visitor; IPv4-mapped IPv6 addresses (dual-stack listeners) become IPv4.
    pub fn new(addr: SocketAddr, local: SocketAddr) -> Self {
        Self { addr: canonical(addr), local: canonical(local) }
    }

    /// The visitor's IP address.
    pub fn ip(&self) -> IpAddr {
        self.addr.ip()
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn a_record_comes_back_as_it_was_with_its_unknown_fields() {
        let id: SocketId = "web".parse().unwrap();
        let record = object(json!({"type": "https", "hostnames": ["*.Web.Example.com."], "x-note": {"a": 1},
            "upstream": {"tls": {"verify": false}}}));
        let socket = Socket::from_record(&id, record).unwrap();
        assert_eq!(socket.hostnames[0].as_str(), "*.web.example.com");
        let again = Socket::from_record(&id, socket.to_record()).unwrap();
        assert_eq!(socket, again);
        assert_eq!(again.to_record()["x-note"], json!({"a": 1}));
    }

    #[test]
    fn every_mistake_of_a_record_is_told_at_once() {
        let id: SocketId = "web".parse().unwrap();
        let record = object(json!({"id": "other", "type": "htp", "hostnames": ["a b"], "ports": [70000],
            "upstream": {"tsl": {}}, "gate": {"basic": {}}, "v": 2}));
        let at: Vec<String> = Socket::from_record(&id, record).unwrap_err().into_iter().map(|m| m.at).collect();
        assert_eq!(at, ["v", "id", "type", "hostnames", "ports", "upstream.tsl", "gate"]);
    }

    #[test]
    fn an_authority_gives_one_host_or_none() {
        for (text, host) in [
            ("Web.Example.com:8443", "web.example.com"),
            ("web.example.com.", "web.example.com"),
            ("a_b.example.com", "a_b.example.com"),
            ("[::1]:80", "::1"),
            ("[2001:DB8::A]", "2001:db8::a"),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            assert_eq!(authority_host(text).unwrap(), host);
        }
        for bad in ["", "a@b", "a b", "a:b", "a:1:2", "[::1", "[::1]x", "ä.example", "a..b", "a/b", "a:99999", "[x]"] {
            assert!(authority_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ticket_keys_are_checked_and_never_shown() {
        let read = |keys: Value| {
            let Value::Object(record) = json!({ "keys": keys }) else { unreachable!() };
            TicketKeys::from_record(&TicketKeysId, record)
        };
        let key = |byte: u8, len: usize| Base64(vec![byte; len]).to_string();
        let good = read(json!([key(1, 32), key(2, 256)])).unwrap();
        assert_eq!(TicketKeys::from_record(&TicketKeysId, good.to_record()).as_ref(), Ok(&good));
        let shown = format!("{good:?} {:?}", good.keys);
        assert!(!shown.contains(&key(1, 32)[..8]) && shown.contains("32 bytes"), "{shown}");
        let many: Vec<String> = (0..9).map(|byte| key(byte, 32)).collect();
        for (bad, at) in [
            (json!([]), "keys"),
            (json!(many), "keys"),
            (json!(null), "keys"),
            (json!("secret"), "keys"),
            (json!(["secret!"]), "keys"),
            (json!([key(1, 31)]), "keys[0]"),
            (json!([key(1, 32), key(1, 257)]), "keys[1]"),
            (json!([key(1, 32), key(2, 32), key(1, 32)]), "keys[2]"),
        ] {
            let mistakes = read(bad.clone()).unwrap_err();
            assert_eq!(mistakes.iter().map(|m| m.at.as_str()).collect::<Vec<_>>(), [at], "{bad}");
            assert!(!format!("{mistakes:?}").contains("secret"), "{mistakes:?}");
        }
        assert!("other".parse::<TicketKeysId>().is_err());
    }
}
