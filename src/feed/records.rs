//! Typed records above the feed, and the claims that keep names, ports and
//! relay ports from being held twice: every write of a record writes or frees
//! its claims in the same transaction. The one way in which records are
//! written, by the operator's API and by logins that make sockets on demand.

use std::collections::BTreeSet;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::certificate::certificate_mistake;
use super::{Entry, Expect, Feed, Lease, LeaseId, Op, ReadError, Txn, WriteError};
use crate::fields::{Mistake, PortRange};
use crate::model::{Certificate, CertificateId, Socket, SocketId, Tunnel, TunnelId};

/// A write that met another one is tried again so many times.
const TRIES: usize = 8;

/// What must hold of a record for a write to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Nothing: create or replace.
    Any,
    /// It does not exist (`If-None-Match: *`).
    Absent,
    /// It exists (`If-Match: *`).
    Present,
    /// Its last write was this revision (`If-Match`).
    Rev(u64),
}

/// A record as it was written.
#[derive(Debug, Clone, PartialEq)]
pub struct Written<T> {
    /// The record, with what was filled in (ports, names).
    pub record: T,
    /// The revision that wrote it.
    pub rev: u64,
    /// Whether it was not there before.
    pub created: bool,
}

/// Why a record was not written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RecordError {
    /// Its fields are wrong.
    Invalid(Vec<Mistake>),
    /// Another record holds what it wants.
    Taken {
        /// The field that wants it.
        field: String,
        /// The name or port.
        what: String,
        /// The id of the holder.
        holder: String,
    },
    /// The condition does not hold; the revision it has, if it exists.
    Precondition(Option<u64>),
    /// There is no such record.
    Missing,
    /// All ports of the range are taken.
    NoPort(PortRange),
    /// The feed did not take the write.
    Feed(WriteError),
    /// The feed could not be read.
    Read(ReadError),
    /// Others kept writing the same record.
    Contended,
}

impl fmt::Display for RecordError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Invalid(mistakes) => {
                let all: Vec<String> = mistakes.iter().map(ToString::to_string).collect();
                f.write_str(&all.join("; "))
            }
            Self::Taken { what, holder, .. } => write!(f, "{what} is taken by {holder}"),
            Self::Precondition(Some(rev)) => write!(f, "the record is at revision {rev}"),
            Self::Precondition(None) => f.write_str("the record does not exist"),
            Self::Missing => f.write_str("there is no such record"),
            Self::NoPort(range) => write!(f, "all ports of {range} are taken; widen ingress.ports"),
            Self::Feed(error) => error.fmt(f),
            Self::Read(error) => error.fmt(f),
            Self::Contended => f.write_str("others write the same record; try again"),
        }
    }
}

impl std::error::Error for RecordError {}

impl From<ReadError> for RecordError {
    fn from(error: ReadError) -> Self {
        Self::Read(error)
    }
}

/// A kind of record.
pub trait Record: Sized + Clone + Send + Sync {
    /// Its id's type.
    type Id: fmt::Display + Send + Sync;
    /// Where its kind is kept.
    const PREFIX: &'static str;
    /// Its id.
    fn id(&self) -> &Self::Id;
    /// Reads it.
    ///
    /// # Errors
    /// Every mistake.
    fn read(id: &Self::Id, map: Map<String, Value>) -> Result<Self, Vec<Mistake>>;
    /// Writes it out.
    fn write(&self) -> Map<String, Value>;
    /// Reads an id from a key without its prefix.
    fn id_of(text: &str) -> Option<Self::Id>;
    /// What it holds that no other may: key of the claim, field, in words.
    fn claims(&self) -> Vec<Claim> {
        Vec::new()
    }
}

/// Something that only one record may hold.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Claim {
    key: String,
    field: String,
    what: String,
}

impl Record for Socket {
    type Id = SocketId;
    const PREFIX: &'static str = "cfg/sock/";
    fn id(&self) -> &SocketId {
        &self.id
    }
    fn read(id: &SocketId, map: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        Self::from_record(id, map)
    }
    fn write(&self) -> Map<String, Value> {
        self.to_record()
    }
    fn id_of(text: &str) -> Option<SocketId> {
        text.parse().ok()
    }
    fn claims(&self) -> Vec<Claim> {
        // A tls socket's names only choose its certificate: several may share one.
        let names = self.hostnames.iter().filter(|_| self.kind.by_name()).enumerate().map(|(i, name)| Claim {
            key: format!("cfg/host/{name}"),
            field: format!("hostnames[{i}]"),
            what: format!("the name {name}"),
        });
        let ports = self.ports.iter().enumerate().map(|(i, port)| Claim {
            key: format!("cfg/port/{port}"),
            field: format!("ports[{i}]"),
            what: format!("port {port}"),
        });
        names.chain(ports).collect()
    }
}

impl Record for Tunnel {
    type Id = TunnelId;
    const PREFIX: &'static str = "cfg/tun/";
    fn id(&self) -> &TunnelId {
        &self.id
    }
    fn read(id: &TunnelId, map: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        Self::from_record(id, map)
    }
    fn write(&self) -> Map<String, Value> {
        self.to_record()
    }
    fn id_of(text: &str) -> Option<TunnelId> {
        text.parse().ok()
    }
    fn claims(&self) -> Vec<Claim> {
        let (Some(user), Some(port)) = (&self.user, self.relay_port) else { return Vec::new() };
        // The port first: no user name can forge another claim's key.
        vec![Claim {
            key: format!("cfg/relay/{port}/{user}"),
            field: "relay_port".to_owned(),
            what: format!("relay port {port} of the user {user}"),
        }]
    }
}

impl Record for Certificate {
    type Id = CertificateId;
    const PREFIX: &'static str = "cert/";
    fn id(&self) -> &CertificateId {
        &self.id
    }
    fn read(id: &CertificateId, map: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let certificate = Self::from_record(id, map)?;
        match certificate_mistake(&certificate) {
            Some(mistake) => Err(vec![mistake]),
            None => Ok(certificate),
        }
    }
    fn write(&self) -> Map<String, Value> {
        self.to_record()
    }
    fn id_of(text: &str) -> Option<CertificateId> {
        text.parse().ok()
    }
}

/// The records of the feed.
pub struct Records {
    feed: Arc<dyn Feed>,
    ports: PortRange,
    domain: Option<String>,
}

impl Records {
    /// Records above `feed`: sockets that ask for no port get one of `ports`,
    /// sockets without a name one under `domain`.
    pub fn new(feed: Arc<dyn Feed>, ports: PortRange, domain: Option<String>) -> Self {
        Self { feed, ports, domain }
    }

    /// The record with this id, and its revision.
    ///
    /// # Errors
    /// `Read`; `Invalid` where what is stored cannot be read by this version.
    pub async fn get<R: Record>(&self, id: &R::Id) -> Result<Option<(R, u64)>, RecordError> {
        match self.feed.read(&key::<R>(id)).await? {
            Some(entry) => Ok(Some((parse(id, &entry)?, entry.rev))),
            None => Ok(None),
        }
    }

    /// All records of a kind by id, after `after`, at most `limit`.
    ///
    /// # Errors
    /// `Read`.
    pub async fn list<R: Record>(&self, after: Option<&str>, limit: usize) -> Result<Vec<R>, RecordError> {
        let (_, entries) = self.feed.list(R::PREFIX).await?;
        let id_of = |entry: &Entry| entry.key.strip_prefix(R::PREFIX).map(str::to_owned);
        let wanted = entries.iter().filter(|e| after.is_none_or(|after| id_of(e).as_deref() > Some(after)));
        let records = wanted.filter_map(|entry| parse(&R::id_of(&id_of(entry)?)?, entry).ok());
        Ok(records.take(limit).collect())
    }

    /// Creates or replaces a record with its claims.
    ///
    /// # Errors
    /// `Invalid`, `Taken`, `Precondition`, `Feed`, `Read`, `Contended`.
    pub async fn put<R: Record>(&self, record: R, condition: Condition) -> Result<Written<R>, RecordError> {
        for _ in 0..TRIES {
            let before = self.get_leniently::<R>(record.id()).await?;
            let rev = before.as_ref().map(|(_, rev)| *rev);
            let holds = match condition {
                Condition::Any => true,
                Condition::Absent => rev.is_none(),
                Condition::Present => rev.is_some(),
                Condition::Rev(wanted) => rev == Some(wanted),
            };
            if !holds {
                return Err(RecordError::Precondition(rev));
            }
            let old = before.and_then(|(old, _)| old);
            let mut txn = Txn::default();
            write(&mut txn, &record, rev, old.as_ref(), None);
            match self.feed.commit(txn).await {
                Ok(new) => return Ok(Written { record, rev: new, created: rev.is_none() }),
                Err(error) => self.explain(error, &record.claims(), &record.id().to_string()).await?,
            }
        }
        Err(RecordError::Contended)
    }

    /// Creates or replaces a socket; fills in a name or a port where it has none.
    ///
    /// # Errors
    /// As `put`; `NoPort`.
    pub async fn put_socket(&self, socket: Socket, condition: Condition) -> Result<Written<Socket>, RecordError> {
        let mut mistakes = Vec::new();
        let mut socket = socket;
        self.name_it(&mut socket, &mut mistakes);
        self.check_ports(&socket, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(RecordError::Invalid(mistakes));
        }
        if socket.kind.by_name() || !socket.ports.is_empty() {
            return self.put(socket, condition).await;
        }
        // Stable: the port it had, else the next free one from a place of its own.
        let had = self.get_leniently::<Socket>(&socket.id).await?.and_then(|(old, _)| old).map(|old| old.ports);
        if let Some(ports) = had.filter(|ports| !ports.is_empty()) {
            socket.ports = ports;
            return self.put(socket, condition).await;
        }
        let free = self.free_ports(&socket.id).await?;
        for port in free.into_iter().take(TRIES * 4) {
            socket.ports = vec![port];
            match self.put(socket.clone(), condition).await {
                Err(RecordError::Taken { .. }) => {}
                done => return done,
            }
        }
        Err(RecordError::NoPort(self.ports))
    }

    /// Deletes a record with its claims.
    ///
    /// # Errors
    /// `Missing`, `Precondition`, `Feed`, `Read`, `Contended`.
    pub async fn delete<R: Record>(&self, id: &R::Id, condition: Condition) -> Result<u64, RecordError> {
        for _ in 0..TRIES {
            let Some((record, rev)) = self.get_leniently::<R>(id).await? else { return Err(RecordError::Missing) };
            let holds = match condition {
                Condition::Any | Condition::Present => true,
                Condition::Absent => false,
                Condition::Rev(wanted) => wanted == rev,
            };
            if !holds {
                return Err(RecordError::Precondition(Some(rev)));
            }
            let key = key::<R>(id);
            let mut txn = Txn { expect: vec![(key.clone(), Expect::Rev(rev))], ops: vec![Op::Delete { key }] };
            for claim in record.iter().flat_map(Record::claims) {
                txn.ops.push(Op::Delete { key: claim.key });
            }
            match self.feed.commit(txn).await {
                Ok(rev) => return Ok(rev),
                Err(WriteError::Conflict { .. }) => {}
                Err(error) => return Err(RecordError::Feed(error)),
            }
        }
        Err(RecordError::Contended)
    }

    /// Creates a socket and its tunnel for a login, if nobody has either, nor
    /// any of their names and ports. Under a lease they end with it.
    ///
    /// # Errors
    /// `Taken` where somebody was faster; as `put_socket` otherwise.
    pub async fn claim_on_demand(
        &self,
        mut socket: Socket,
        tunnel: Tunnel,
        lease: Option<LeaseId>,
    ) -> Result<Written<Socket>, RecordError> {
        let mut mistakes = Vec::new();
        self.check_ports(&socket, &mut mistakes);
        if !mistakes.is_empty() {
            return Err(RecordError::Invalid(mistakes));
        }
        let choose = !socket.kind.by_name() && socket.ports.is_empty();
        let ports = if choose { self.free_ports(&socket.id).await? } else { Vec::new() };
        let mut ports = ports.into_iter();
        for _ in 0..TRIES * 4 {
            if choose {
                socket.ports = vec![ports.next().ok_or(RecordError::NoPort(self.ports))?];
            }
            let mut txn = Txn::default();
            write(&mut txn, &socket, None, None, lease);
            write(&mut txn, &tunnel, None, None, lease);
            match self.feed.commit(txn).await {
                Ok(rev) => return Ok(Written { record: socket, rev, created: true }),
                Err(WriteError::Conflict { key, .. }) if choose && key.starts_with("cfg/port/") => {}
                Err(WriteError::Conflict { key, .. }) => {
                    let holder = self.holder(&key).await?.unwrap_or_default();
                    return Err(RecordError::Taken { field: "id".to_owned(), what: key, holder });
                }
                Err(error) => return Err(RecordError::Feed(error)),
            }
        }
        Err(RecordError::Contended)
    }

    /// A lease for what lives only as long as a session.
    ///
    /// # Errors
    /// The feed does not answer.
    pub async fn lease(&self, ttl: Duration) -> Result<Lease, WriteError> {
        self.feed.lease(ttl).await
    }

    /// A socket that visitors reach by name needs one.
    fn name_it(&self, socket: &mut Socket, mistakes: &mut Vec<Mistake>) {
        if !socket.kind.by_name() || !socket.hostnames.is_empty() {
            return;
        }
        let own = self.domain.as_ref().filter(|_| !socket.id.as_str().contains('.'));
        match own.and_then(|domain| format!("{}.{domain}", socket.id).parse().ok()) {
            Some(name) => socket.hostnames.push(name),
            None => mistakes.push(Mistake {
                at: "hostnames".to_owned(),
                problem: format!("type {} is reached by name, and it has none", socket.kind),
                fix: "write at least one host name".to_owned(),
            }),
        }
    }

    fn check_ports(&self, socket: &Socket, mistakes: &mut Vec<Mistake>) {
        for (i, port) in socket.ports.iter().enumerate().filter(|(_, p)| !self.ports.contains(**p)) {
            mistakes.push(Mistake {
                at: format!("ports[{i}]"),
                problem: format!("{port} is not one of this node's ports for sockets"),
                fix: format!("write a port of {} (ingress.ports), or leave ports out", self.ports),
            });
        }
    }

    /// The ports that nobody claims now, from a place that the id decides on.
    async fn free_ports(&self, id: &SocketId) -> Result<Vec<u16>, RecordError> {
        let (_, claims) = self.feed.list("cfg/port/").await?;
        let taken: BTreeSet<u16> =
            claims.iter().filter_map(|e| e.key.strip_prefix("cfg/port/")?.parse().ok()).collect();
        let mut free: Vec<u16> = self.ports.iter().filter(|port| !taken.contains(port)).collect();
        if free.is_empty() {
            return Err(RecordError::NoPort(self.ports));
        }
        let mut hasher = DefaultHasher::new();
        id.as_str().hash(&mut hasher);
        let start = usize::try_from(hasher.finish() % free.len() as u64).unwrap_or(0);
        free.rotate_left(start);
        Ok(free)
    }

    /// A record for replacing or deleting: one that this version cannot read
    /// may still be replaced, by its revision.
    async fn get_leniently<R: Record>(&self, id: &R::Id) -> Result<Option<(Option<R>, u64)>, RecordError> {
        let entry = self.feed.read(&key::<R>(id)).await?;
        Ok(entry.map(|entry| (parse(id, &entry).ok(), entry.rev)))
    }

    /// Turns a conflict over a claim into who holds it; any other conflict is
    /// worth another try.
    async fn explain(&self, error: WriteError, claims: &[Claim], id: &str) -> Result<(), RecordError> {
        let WriteError::Conflict { key, .. } = error else { return Err(RecordError::Feed(error)) };
        let Some(claim) = claims.iter().find(|claim| claim.key == key) else { return Ok(()) };
        match self.holder(&key).await? {
            Some(holder) if holder != id => {
                Err(RecordError::Taken { field: claim.field.clone(), what: claim.what.clone(), holder })
            }
            _ => Ok(()),
        }
    }

    async fn holder(&self, claim: &str) -> Result<Option<String>, RecordError> {
        let entry = self.feed.read(claim).await?;
        let value: Option<Value> = entry.and_then(|e| serde_json::from_str(&e.value).ok());
        Ok(value.map(|v| v.get("of").and_then(Value::as_str).unwrap_or_default().to_owned()))
    }
}

fn key<R: Record>(id: &R::Id) -> String {
    format!("{}{id}", R::PREFIX)
}

/// Reads a stored record.
///
/// # Errors
/// `Invalid`.
pub fn parse<R: Record>(id: &R::Id, entry: &Entry) -> Result<R, RecordError> {
    match serde_json::from_str::<Value>(&entry.value) {
        Ok(Value::Object(map)) => R::read(id, map).map_err(RecordError::Invalid),
        _ => Err(RecordError::Invalid(vec![Mistake {
            at: entry.key.clone(),
            problem: "is not a JSON object".to_owned(),
            fix: "write the record again".to_owned(),
        }])),
    }
}

/// The record and its claims, guarded: the record is as it was read, new claims
/// are free, those it lost are freed.
fn write<R: Record>(txn: &mut Txn, record: &R, rev: Option<u64>, old: Option<&R>, lease: Option<LeaseId>) {
    let own = key::<R>(record.id());
    txn.expect.push((own.clone(), rev.map_or(Expect::Absent, Expect::Rev)));
    let claims = record.claims();
    let had = old.map(Record::claims).unwrap_or_default();
    for claim in had.iter().filter(|had| !claims.iter().any(|c| c.key == had.key)) {
        txn.ops.push(Op::Delete { key: claim.key.clone() });
    }
    let mut seen = BTreeSet::new();
    for claim in claims.iter().filter(|c| !had.iter().any(|had| had.key == c.key) && seen.insert(&c.key)) {
        txn.expect.push((claim.key.clone(), Expect::Absent));
        let value = serde_json::json!({ "v": 1, "of": record.id().to_string() }).to_string();
        txn.ops.push(Op::Put { key: claim.key.clone(), value, lease });
    }
    txn.ops.push(Op::Put { key: own, value: Value::Object(record.write()).to_string(), lease });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feed::store::{Store, StoreSettings};
    use crate::model::SocketType;

    fn records() -> Records {
        let store = Store::in_memory(StoreSettings::default()).unwrap();
        Records::new(store, PortRange { first: 20000, last: 20002 }, Some("edge.test".to_owned()))
    }

    #[tokio::test]
    async fn a_delete_keeps_to_its_condition() {
        let records = records();
        let web = socket("web", SocketType::Http, &["web.test"]);
        let rev = records.put(web.clone(), Condition::Any).await.unwrap().rev;
        for condition in [Condition::Absent, Condition::Rev(rev + 1)] {
            let refused = records.delete::<Socket>(&web.id, condition).await;
            assert_eq!(refused, Err(RecordError::Precondition(Some(rev))), "{condition:?}");
        }
        records.delete::<Socket>(&web.id, Condition::Present).await.unwrap();
    }

    fn socket(id: &str, kind: SocketType, hosts: &[&str]) -> Socket {
        let mut socket = Socket::new(id.parse().unwrap(), kind);
        socket.hostnames = hosts.iter().map(|h| h.parse().unwrap()).collect();
        socket
    }

    #[tokio::test]
    async fn a_name_has_one_holder_until_it_is_given_up() {
        let records = records();
        let put = async |s| records.put_socket(s, Condition::Any).await;
        put(socket("a", SocketType::Http, &["x.test"])).await.unwrap();
        let taken = put(socket("b", SocketType::Http, &["y.test", "x.test"])).await.unwrap_err();
        assert!(matches!(&taken, RecordError::Taken { field, holder, .. } if field == "hostnames[1]" && holder == "a"));
        // Refused whole: y.test is still free.
        put(socket("a", SocketType::Http, &["y.test"])).await.unwrap();
        put(socket("b", SocketType::Http, &["x.test"])).await.unwrap();
        records.delete::<Socket>(&"a".parse().unwrap(), Condition::Any).await.unwrap();
        put(socket("c", SocketType::Http, &["y.test"])).await.unwrap();
    }

    #[tokio::test]
    async fn a_port_is_chosen_once_and_kept_and_the_range_ends() {
        let records = records();
        let put = async |s| records.put_socket(s, Condition::Any).await;
        let first = put(socket("a", SocketType::Tcp, &[])).await.unwrap().record.ports;
        assert_eq!(put(socket("a", SocketType::Tcp, &[])).await.unwrap().record.ports, first);
        put(socket("b", SocketType::Tls, &["t.test"])).await.unwrap();
        put(socket("c", SocketType::Tcp, &[])).await.unwrap();
        assert!(matches!(put(socket("d", SocketType::Tcp, &[])).await, Err(RecordError::NoPort(_))));
        let mut outside = socket("e", SocketType::Tcp, &[]);
        outside.ports = vec![30000];
        assert!(matches!(put(outside).await, Err(RecordError::Invalid(m)) if m[0].at == "ports[0]"));
    }

    #[tokio::test]
    async fn conditions_hold_or_refuse() {
        let records = records();
        let a = || socket("a", SocketType::Http, &["x.test"]);
        let first = records.put_socket(a(), Condition::Absent).await.unwrap();
        assert!(first.created);
        let refused = records.put_socket(a(), Condition::Absent).await.unwrap_err();
        assert_eq!(refused, RecordError::Precondition(Some(first.rev)));
        let second = records.put_socket(a(), Condition::Rev(first.rev)).await.unwrap();
        assert!(!second.created && second.rev > first.rev);
        assert!(records.put_socket(a(), Condition::Rev(first.rev)).await.is_err());
        let gone = records.delete::<Socket>(&"nobody".parse().unwrap(), Condition::Any).await;
        assert_eq!(gone, Err(RecordError::Missing));
    }

    #[tokio::test]
    async fn on_demand_both_records_come_or_neither_and_a_lease_takes_them_back() {
        let records = records();
        let lease = records.lease(Duration::from_secs(1)).await.unwrap();
        let tunnel = |id: &str| Tunnel::new(id.parse().unwrap(), "a".parse().unwrap());
        let claim =
            async |lease| records.claim_on_demand(socket("a", SocketType::Http, &["x.test"]), tunnel("a"), lease).await;
        claim(Some(lease.id)).await.unwrap();
        assert!(matches!(claim(None).await, Err(RecordError::Taken { .. })));
        drop(lease);
        claim(None).await.unwrap();
        assert!(records.get::<Tunnel>(&"a".parse().unwrap()).await.unwrap().is_some());
    }
}
