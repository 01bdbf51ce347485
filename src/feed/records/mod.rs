//! Typed records above the feed, and the only writer of claims: a name, a port
//! or a (user, relay port) belongs to one record, because the claim's key is
//! written with the record in one guarded transaction. Used by the control API
//! and by registration on demand; who may do it is decided by them.
//!
//! Keys: `cfg/sock/<id>`, `cfg/tun/<id>`, `cert/<id>`; claims in `claims`.

mod claims;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;

use serde_json::{Map, Value};

use self::claims::{Claim, Holder};
use super::certificate_check::certificate_names;
use super::{Cursor, Entry, Expect, Feed, LeaseId, Op, ReadError, Txn, WriteError};
use crate::fields::{Fields, Mistake};
use crate::model::{Certificate, CertificateId, HostName, HostPattern, Socket, SocketId, Tunnel, TunnelId};
use crate::text_field;

/// How often a write that lost a race is tried again. Each try loses only to a
/// write that succeeded, so this is met by a storm on one name alone.
const TRIES: usize = 16;
/// Most names and ports of one socket: each is a key of one transaction.
const CLAIMS_MAX: usize = 100;
/// Longest SSH user name of a record; keys hold it escaped.
const USER_MAX: usize = 128;

/// The ports that sockets of type tcp and tls may have: `"20000-20999"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not a range of ports";
        let (low, high) = text.split_once('-').ok_or(bad)?;
        let (low, high): (u16, u16) = (low.trim().parse().map_err(|_| bad)?, high.trim().parse().map_err(|_| bad)?);
        if low == 0 || low > high { Err(bad) } else { Ok(Self(low..=high)) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}
text_field!(PortRange, "a range of ports like \"20000-20999\"");

/// The knobs of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSettings {
    /// Ports that sockets of type tcp and tls get or may ask for. Default
    /// 20000-20999: below the range that Linux gives to outgoing connections.
    pub ports: PortRange,
    /// A socket without names is published as `<id>.<domain>`. Default: none,
    /// so that names are always written out.
    pub domain: Option<HostName>,
}

impl Default for RecordSettings {
    fn default() -> Self {
        Self { ports: PortRange(20_000..=20_999), domain: None }
    }
}

impl RecordSettings {
    /// Reads the section `records` of the settings.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        Self { ports: f.take("ports", d.ports), domain: f.optional("domain") }
    }
}

/// What must hold of a record for a write to happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    Any,
    /// It does not exist.
    Absent,
    /// It exists.
    Present,
    /// Its last write was this revision.
    Rev(u64),
}

impl Condition {
    fn check(self, rev: Option<u64>) -> Result<(), RecordError> {
        let holds = match self {
            Self::Any => true,
            Self::Absent => rev.is_none(),
            Self::Present => rev.is_some(),
            Self::Rev(wanted) => rev == Some(wanted),
        };
        if holds { Ok(()) } else { Err(RecordError::Precondition { rev }) }
    }
}

/// A record that was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written<R> {
    /// As stored: names and ports filled in.
    pub record: R,
    /// The revision it has now.
    pub rev: u64,
    /// Whether it did not exist before.
    pub created: bool,
}

/// A record that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored<R> {
    /// The record.
    pub record: R,
    /// The revision of its last write.
    pub rev: u64,
}

/// Some records of one type, in the order of their ids.
#[derive(Debug, Clone)]
pub struct Page<R> {
    /// The records.
    pub items: Vec<Stored<R>>,
    /// The id to go on after, if there are more.
    pub next: Option<String>,
    /// Ids of stored records that this version cannot read.
    pub unreadable: Vec<String>,
    /// The state's place in history.
    pub at: Cursor,
}

/// Why a record was not written or read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordError {
    /// The record itself is wrong.
    Mistakes(Vec<Mistake>),
    /// Names or ports belong to others; each with its field.
    Taken(Vec<Mistake>),
    /// The condition does not hold.
    Precondition {
        /// The revision it has; `None`: it does not exist.
        rev: Option<u64>,
    },
    /// There is no such record.
    NotFound,
    /// The socket is named by tunnels.
    InUse(Vec<TunnelId>),
    /// What is stored cannot be read by this version.
    Unreadable(Vec<Mistake>),
    /// Too many writers at once; nothing was written.
    Contended,
    /// The feed did not write.
    Write(WriteError),
    /// The feed did not read.
    Read(ReadError),
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, mistakes: &[Mistake]| {
            let all: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
            f.write_str(&all.join("; "))
        };
        match self {
            Self::Mistakes(mistakes) | Self::Taken(mistakes) => list(f, mistakes),
            Self::Precondition { rev: Some(rev) } => write!(f, "the record is at revision {rev}"),
            Self::Precondition { rev: None } => f.write_str("the record does not exist"),
            Self::NotFound => f.write_str("there is no such record"),
            Self::InUse(tunnels) => {
                let ids: Vec<&str> = tunnels.iter().map(TunnelId::as_str).collect();
                write!(f, "tunnels still name this socket: {}", ids.join(", "))
            }
            Self::Unreadable(mistakes) => {
                f.write_str("the stored record cannot be read by this version: ")?;
                list(f, mistakes)
            }
            Self::Contended => f.write_str("too many writers at once"),
            Self::Write(error) => error.fmt(f),
            Self::Read(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for RecordError {}

impl From<ReadError> for RecordError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

fn mistake(at: impl Into<String>, problem: impl Into<String>, fix: impl Into<String>) -> Mistake {
    Mistake { at: at.into(), problem: problem.into(), fix: fix.into() }
}

/// A type of record, by where it is kept.
pub trait Record: Sized + Clone + Send + Sync + 'static {
    /// Its id.
    type Id: FromStr<Err = &'static str> + fmt::Display + Clone + Send + Sync;
    /// Where it is kept: `<prefix><id>`.
    const PREFIX: &'static str;
    /// The word for it.
    const NOUN: &'static str;
    /// Its id.
    fn id(&self) -> &Self::Id;
    /// # Errors
    /// Every mistake of the record.
    fn from_record(id: &Self::Id, record: Map<String, Value>) -> Result<Self, Vec<Mistake>>;
    /// The record as stored.
    fn to_record(&self) -> Map<String, Value>;

    /// The key of the record with this id.
    fn key(id: &Self::Id) -> String {
        format!("{}{id}", Self::PREFIX)
    }

    /// Reads a stored value.
    ///
    /// # Errors
    /// Every mistake of the record.
    fn from_value(id: &Self::Id, value: &str) -> Result<Self, Vec<Mistake>> {
        match serde_json::from_str(value) {
            Ok(Value::Object(map)) => Self::from_record(id, map),
            Ok(_) => Err(vec![mistake("", "is not a table", "write a JSON object")]),
            Err(error) => Err(vec![mistake("", format!("is not JSON: {error}"), "write a JSON object")]),
        }
    }
}

macro_rules! record_type {
    ($t:ty, $id:ty, $prefix:literal, $noun:literal) => {
        impl Record for $t {
            type Id = $id;
            const PREFIX: &'static str = $prefix;
            const NOUN: &'static str = $noun;
            fn id(&self) -> &$id {
                &self.id
            }
            fn from_record(id: &$id, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
                <$t>::from_record(id, record)
            }
            fn to_record(&self) -> Map<String, Value> {
                <$t>::to_record(self)
            }
        }
    };
}
record_type!(Socket, SocketId, "cfg/sock/", "socket");
record_type!(Tunnel, TunnelId, "cfg/tun/", "tunnel");
record_type!(Certificate, CertificateId, "cert/", "certificate");

/// Reads and writes records.
pub struct Records {
    feed: Arc<dyn Feed>,
    settings: RecordSettings,
}

/// What one try of a write came to.
enum Outcome {
    Done(u64),
    /// Somebody else was quicker: look again.
    Raced,
}

impl Records {
    /// Records over a feed.
    pub fn new(feed: Arc<dyn Feed>, settings: RecordSettings) -> Self {
        Self { feed, settings }
    }

    /// Creates or replaces a socket with its claims. Without names it gets
    /// `<id>.<domain>`; without ports it keeps those it had or gets one.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is written then.
    pub async fn put_socket(&self, socket: Socket, condition: Condition) -> Result<Written<Socket>, RecordError> {
        let key = Socket::key(&socket.id);
        for _ in 0..TRIES {
            let old = self.feed.read(&key).await?;
            condition.check(old.as_ref().map(|e| e.rev))?;
            let record = self.completed(socket.clone(), old.as_ref()).await?;
            let mut txn = Txn::default();
            let taken = self.hold_socket(&mut txn, &record, old.as_ref(), None).await?;
            if lost_chosen_port(&socket, &taken) {
                continue;
            }
            if !taken.is_empty() {
                return Err(RecordError::Taken(taken));
            }
            write_record(&mut txn, &record, old.as_ref(), None);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(Written { record, rev, created: old.is_none() });
            }
        }
        Err(RecordError::Contended)
    }

    /// Creates or replaces a tunnel with its claim. Its socket need not exist yet.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is written then.
    pub async fn put_tunnel(&self, tunnel: Tunnel, condition: Condition) -> Result<Written<Tunnel>, RecordError> {
        check_user(&tunnel)?;
        let key = Tunnel::key(&tunnel.id);
        for _ in 0..TRIES {
            let old = self.feed.read(&key).await?;
            condition.check(old.as_ref().map(|e| e.rev))?;
            let mut txn = Txn::default();
            let taken = self.hold_tunnel(&mut txn, &tunnel, old.as_ref(), None).await?;
            if !taken.is_empty() {
                return Err(RecordError::Taken(taken));
            }
            write_record(&mut txn, &tunnel, old.as_ref(), None);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(Written { record: tunnel, rev, created: old.is_none() });
            }
        }
        Err(RecordError::Contended)
    }

    /// Creates or replaces a certificate. Several may be for the same name.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is written then.
    pub async fn put_certificate(
        &self,
        certificate: Certificate,
        condition: Condition,
    ) -> Result<Written<Certificate>, RecordError> {
        certificate_names(&certificate.chain_pem, &certificate.key_pem).map_err(|m| RecordError::Mistakes(vec![m]))?;
        let key = Certificate::key(&certificate.id);
        for _ in 0..TRIES {
            let old = self.feed.read(&key).await?;
            condition.check(old.as_ref().map(|e| e.rev))?;
            let mut txn = Txn::default();
            write_record(&mut txn, &certificate, old.as_ref(), None);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(Written { record: certificate, rev, created: old.is_none() });
            }
        }
        Err(RecordError::Contended)
    }

    /// Creates a socket and its tunnel at once, only if nobody has either, nor
    /// any of their names and ports. Under a lease they vanish with it.
    /// Answers both as written, and the revision.
    ///
    /// # Errors
    /// `Taken` names what somebody has; see [`RecordError`] for the rest.
    pub async fn claim_on_demand(
        &self,
        socket: Socket,
        tunnel: Tunnel,
        lease: Option<LeaseId>,
    ) -> Result<(Written<Socket>, Written<Tunnel>), RecordError> {
        check_user(&tunnel)?;
        for _ in 0..TRIES {
            let mut taken = Vec::new();
            if self.feed.read(&Socket::key(&socket.id)).await?.is_some() {
                taken.push(mistake("id", format!("socket \"{}\" exists", socket.id), "choose another name"));
            }
            if self.feed.read(&Tunnel::key(&tunnel.id)).await?.is_some() {
                taken.push(mistake("id", format!("tunnel \"{}\" exists", tunnel.id), "choose another name"));
            }
            if !taken.is_empty() {
                return Err(RecordError::Taken(taken));
            }
            let record = self.completed(socket.clone(), None).await?;
            let mut txn = Txn::default();
            taken.extend(self.hold_socket(&mut txn, &record, None, lease).await?);
            if lost_chosen_port(&socket, &taken) {
                continue;
            }
            taken.extend(self.hold_tunnel(&mut txn, &tunnel, None, lease).await?);
            if !taken.is_empty() {
                return Err(RecordError::Taken(taken));
            }
            write_record(&mut txn, &record, None, lease);
            write_record(&mut txn, &tunnel, None, lease);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                let tunnel = Written { record: tunnel, rev, created: true };
                return Ok((Written { record, rev, created: true }, tunnel));
            }
        }
        Err(RecordError::Contended)
    }

    /// Deletes a socket and all that it claims. With `cascade` the tunnels that
    /// name it go with it; without, it stays while there are any. Answers the
    /// revision.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is deleted then.
    pub async fn delete_socket(&self, id: &SocketId, condition: Condition, cascade: bool) -> Result<u64, RecordError> {
        for _ in 0..TRIES {
            let old = self.existing::<Socket>(id, condition).await?;
            let tunnels = self.tunnels_of(id).await?;
            if !tunnels.is_empty() && !cascade {
                return Err(RecordError::InUse(tunnels));
            }
            let mut txn = Txn::default();
            let held = claims::of_socket_record(&old.value);
            self.hold(&mut txn, &[], &held, &Holder::Socket(id), None).await?;
            erase::<Socket>(&mut txn, id, &old);
            for tunnel in &tunnels {
                if let Some(entry) = self.feed.read(&Tunnel::key(tunnel)).await? {
                    self.release_tunnel(&mut txn, tunnel, &entry).await?;
                }
            }
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(rev);
            }
        }
        Err(RecordError::Contended)
    }

    /// Deletes a tunnel and its claim. Answers the revision.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is deleted then.
    pub async fn delete_tunnel(&self, id: &TunnelId, condition: Condition) -> Result<u64, RecordError> {
        for _ in 0..TRIES {
            let old = self.existing::<Tunnel>(id, condition).await?;
            let mut txn = Txn::default();
            self.release_tunnel(&mut txn, id, &old).await?;
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(rev);
            }
        }
        Err(RecordError::Contended)
    }

    /// Deletes a certificate. Answers the revision.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is deleted then.
    pub async fn delete_certificate(&self, id: &CertificateId, condition: Condition) -> Result<u64, RecordError> {
        for _ in 0..TRIES {
            let old = self.existing::<Certificate>(id, condition).await?;
            let mut txn = Txn::default();
            erase::<Certificate>(&mut txn, id, &old);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(rev);
            }
        }
        Err(RecordError::Contended)
    }

    /// The record with this id.
    ///
    /// # Errors
    /// `NotFound`, `Unreadable` or `Read`.
    pub async fn get<R: Record>(&self, id: &R::Id) -> Result<Stored<R>, RecordError> {
        let entry = self.feed.read(&R::key(id)).await?.ok_or(RecordError::NotFound)?;
        let record = R::from_value(id, &entry.value).map_err(RecordError::Unreadable)?;
        Ok(Stored { record, rev: entry.rev })
    }

    /// Up to `limit` records whose ids sort after `after` ("": from the first).
    ///
    /// # Errors
    /// `Read`.
    pub async fn list<R: Record>(&self, after: &str, limit: usize) -> Result<Page<R>, RecordError> {
        let (at, mut entries) =
            self.feed.page(R::PREFIX, &format!("{}{after}", R::PREFIX), limit.saturating_add(1)).await?;
        let more = entries.len() > limit;
        entries.truncate(limit);
        let id_of = |entry: &Entry| entry.key.strip_prefix(R::PREFIX).unwrap_or_default().to_owned();
        let next = entries.last().filter(|_| more).map(id_of);
        let mut page = Page { items: Vec::with_capacity(entries.len()), next, unreadable: Vec::new(), at };
        for entry in &entries {
            let text = id_of(entry);
            match text.parse::<R::Id>().ok().and_then(|id| R::from_value(&id, &entry.value).ok()) {
                Some(record) => page.items.push(Stored { record, rev: entry.rev }),
                None => page.unreadable.push(text),
            }
        }
        Ok(page)
    }

    /// The tunnels that name a socket, by id.
    ///
    /// # Errors
    /// `Read`.
    pub async fn tunnels_of(&self, socket: &SocketId) -> Result<Vec<TunnelId>, RecordError> {
        let prefix = claims::index_prefix(socket.as_str());
        let (_, entries) = self.feed.list(&prefix).await?;
        Ok(entries.iter().filter_map(|e| e.key.strip_prefix(&prefix)?.parse().ok()).collect())
    }

    async fn existing<R: Record>(&self, id: &R::Id, condition: Condition) -> Result<Entry, RecordError> {
        let old = self.feed.read(&R::key(id)).await?;
        match condition.check(old.as_ref().map(|e| e.rev)) {
            Err(RecordError::Precondition { rev: None }) => Err(RecordError::NotFound),
            Err(error) => Err(error),
            Ok(()) => old.ok_or(RecordError::NotFound),
        }
    }

    /// Fills in names and ports, and checks what only this layer knows.
    async fn completed(&self, mut socket: Socket, old: Option<&Entry>) -> Result<Socket, RecordError> {
        let mut mistakes = Vec::new();
        if socket.kind.by_name() && socket.hostnames.is_empty() {
            match self.default_name(&socket) {
                Ok(name) => socket.hostnames.push(name),
                Err(wrong) => mistakes.push(wrong),
            }
        }
        repeated("hostnames", &socket.hostnames, &mut mistakes);
        repeated("ports", &socket.ports, &mut mistakes);
        let kept = old.map(|e| claims::ports_of_record(&e.value)).unwrap_or_default();
        let PortRange(range) = &self.settings.ports;
        for (i, port) in socket.ports.iter().enumerate() {
            // What it has already it may keep, whatever the range is today.
            if !range.contains(port) && !kept.contains(port) {
                let problem = format!("{port} is outside the range {}", self.settings.ports);
                let fix = "choose one inside it, or leave ports out to have one chosen";
                mistakes.push(mistake(format!("ports[{i}]"), problem, fix));
            }
        }
        if !mistakes.is_empty() {
            return Err(RecordError::Mistakes(mistakes));
        }
        if !socket.kind.by_name() && socket.ports.is_empty() {
            socket.ports = if kept.is_empty() { vec![self.free_port(&socket.id).await?] } else { kept };
        }
        Ok(socket)
    }

    fn default_name(&self, socket: &Socket) -> Result<HostPattern, Mistake> {
        let at = "hostnames";
        let Some(domain) = &self.settings.domain else {
            let problem = format!("is empty, and type {} is reached by name", socket.kind);
            return Err(mistake(at, problem, "write a host name, or set records.domain on the node"));
        };
        let id = socket.id.as_str();
        let name: Option<HostName> = if id.contains(['.', '_']) { None } else { format!("{id}.{domain}").parse().ok() };
        name.map(Into::into).ok_or_else(|| {
            let problem = format!("is empty, and the id \"{id}\" cannot be a name under {domain}");
            mistake(at, problem, "write a host name, or choose an id of letters, digits and -")
        })
    }

    /// A port that nobody has; the same one for the same id while it is free.
    async fn free_port(&self, id: &SocketId) -> Result<u16, RecordError> {
        let PortRange(range) = &self.settings.ports;
        let (_, entries) = self.feed.list(claims::PORTS).await?;
        let taken: std::collections::HashSet<u16> =
            entries.iter().filter_map(|e| e.key.strip_prefix(claims::PORTS)?.parse().ok()).collect();
        let size = u64::from(range.end() - range.start()) + 1;
        let start = claims::stable_hash(id.as_str()) % size;
        (0..size)
            .filter_map(|i| u16::try_from(u64::from(*range.start()) + (start + i) % size).ok())
            .find(|port| !taken.contains(port))
            .ok_or_else(|| {
                let problem = format!("all {size} ports of the range {} are taken", self.settings.ports);
                RecordError::Taken(vec![mistake(
                    "ports",
                    problem,
                    "delete a socket, or widen records.ports on the node",
                )])
            })
    }

    async fn hold_socket(
        &self,
        txn: &mut Txn,
        record: &Socket,
        old: Option<&Entry>,
        lease: Option<LeaseId>,
    ) -> Result<Vec<Mistake>, RecordError> {
        let held = old.map(|e| claims::of_socket_record(&e.value)).unwrap_or_default();
        self.hold(txn, &claims::of_socket(record), &held, &Holder::Socket(&record.id), lease).await
    }

    async fn hold_tunnel(
        &self,
        txn: &mut Txn,
        record: &Tunnel,
        old: Option<&Entry>,
        lease: Option<LeaseId>,
    ) -> Result<Vec<Mistake>, RecordError> {
        let held = old.map(|e| claims::of_tunnel_record(&record.id, &e.value)).unwrap_or_default();
        self.hold(txn, &claims::of_tunnel(record), &held, &Holder::Tunnel(&record.id), lease).await
    }

    async fn release_tunnel(&self, txn: &mut Txn, id: &TunnelId, old: &Entry) -> Result<(), RecordError> {
        let held = claims::of_tunnel_record(id, &old.value);
        self.hold(txn, &[], &held, &Holder::Tunnel(id), None).await?;
        erase::<Tunnel>(txn, id, old);
        Ok(())
    }

    /// Adds to `txn` what it takes that `holder` has the claims `wanted` and
    /// none of `held` beyond them; answers what others have.
    async fn hold(
        &self,
        txn: &mut Txn,
        wanted: &[Claim],
        held: &[Claim],
        holder: &Holder<'_>,
        lease: Option<LeaseId>,
    ) -> Result<Vec<Mistake>, RecordError> {
        let mut taken = Vec::new();
        for claim in wanted {
            let (key, value) = (claim.key.clone(), holder.value(lease.is_some()));
            match self.feed.read(&key).await? {
                None => {
                    txn.expect.push((key.clone(), Expect::Absent));
                    txn.ops.push(Op::Put { key, value, lease });
                }
                Some(entry) if holder.has(&entry) => {
                    txn.expect.push((key.clone(), Expect::Rev(entry.rev)));
                    // A claim under a lease must not vanish below a record that stays.
                    if value != *entry.value {
                        txn.ops.push(Op::Put { key, value, lease });
                    }
                }
                Some(entry) => taken.push(claim.taken(&entry)),
            }
        }
        for claim in held.iter().filter(|c| !wanted.iter().any(|w| w.key == c.key)) {
            if let Some(entry) = self.feed.read(&claim.key).await?.filter(|e| holder.has(e)) {
                txn.expect.push((entry.key.clone(), Expect::Rev(entry.rev)));
                txn.ops.push(Op::Delete { key: entry.key });
            }
        }
        Ok(taken)
    }

    async fn commit(&self, txn: Txn) -> Result<Outcome, RecordError> {
        match self.feed.commit(txn).await {
            Ok(rev) => Ok(Outcome::Done(rev)),
            Err(WriteError::Conflict { .. }) => Ok(Outcome::Raced),
            Err(error) => Err(RecordError::Write(error)),
        }
    }
}

/// Whether somebody took the port that was chosen for `asked` a moment ago:
/// nothing to tell its owner, another will do.
fn lost_chosen_port(asked: &Socket, taken: &[Mistake]) -> bool {
    asked.ports.is_empty() && taken.iter().any(|m| m.at.starts_with("ports["))
}

fn write_record<R: Record>(txn: &mut Txn, record: &R, old: Option<&Entry>, lease: Option<LeaseId>) {
    let key = R::key(record.id());
    txn.expect.push((key.clone(), old.map_or(Expect::Absent, |e| Expect::Rev(e.rev))));
    txn.ops.push(Op::Put { key, value: Value::Object(record.to_record()).to_string(), lease });
}

fn erase<R: Record>(txn: &mut Txn, id: &R::Id, old: &Entry) {
    let key = R::key(id);
    txn.expect.push((key.clone(), Expect::Rev(old.rev)));
    txn.ops.push(Op::Delete { key });
}

fn check_user(tunnel: &Tunnel) -> Result<(), RecordError> {
    let Some(user) = &tunnel.user else { return Ok(()) };
    if user.is_empty() || user.len() > USER_MAX || user.chars().any(char::is_control) {
        let problem = "is not an SSH user name";
        let fix = format!("write 1 to {USER_MAX} bytes without control characters, or leave it out");
        return Err(RecordError::Mistakes(vec![mistake("user", problem, fix)]));
    }
    Ok(())
}

/// Records what a list names twice, and a list that is too long.
fn repeated<T: PartialEq + fmt::Display>(field: &str, items: &[T], mistakes: &mut Vec<Mistake>) {
    if items.len() > CLAIMS_MAX {
        mistakes.push(mistake(field, format!("has {} items", items.len()), format!("write at most {CLAIMS_MAX}")));
        return;
    }
    for (i, item) in items.iter().enumerate() {
        if items.iter().take(i).any(|earlier| earlier == item) {
            mistakes.push(mistake(format!("{field}[{i}]"), format!("\"{item}\" is named twice"), "name it once"));
        }
    }
}
