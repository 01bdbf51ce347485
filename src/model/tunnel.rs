//! A registered path to an origin, and who may serve it.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::{SocketId, TunnelId, head, record};
use crate::fields::{Fields, Mistake};
use crate::text_field;

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
    /// Its share of the socket's visitors, next to the other tunnels' weights. 1.
    pub weight: u32,
    /// Tunnels of a higher one wait until all of a lower one fail. 0.
    pub priority: u32,
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
            weight: 1,
            priority: 0,
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
        let (weight, priority) = (f.take("weight", 1), f.take("priority", 0));
        if !(1..=1000).contains(&weight) {
            f.mistake("weight", format!("{weight} is out of range"), "write a whole number from 1 to 1000".into());
        }
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
                weight,
                priority,
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
                "weight": self.weight,
                "priority": self.priority,
            }),
        )
    }
}
