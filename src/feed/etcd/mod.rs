//! The feed of a fleet (docs/fleet.md): etcd, as far as its version 3.4 has it. This file is the
//! door (connect, commit, read, lease); `subscription` follows its changes. Needs
//! the cargo feature `etcd`, because its client needs protoc at build time.
//!
//! A life of the data is a cluster's id: restore a backup with another
//! `--initial-cluster-token`, so that nodes see that time went back.

mod subscription;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use etcd_client::{
    Certificate, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, GetResponse, Identity, KeyValue,
    LeaseGrantResponse, LeaseRevokeResponse, PutOptions, ResponseHeader, TlsOptions, TxnOp, TxnOpResponse, TxnResponse,
};
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tonic::Code;

use super::prefixes::Prefixes;
use super::settings::EtcdSettings;
use super::{Cursor, Entry, Epoch, Expect, Feed, Lease, LeaseId, Op, ReadError, Subscription, Txn, WriteError};
use crate::error::Chain;

/// Entries of one page of a snapshot. Each page makes etcd count all that follows,
/// so small ones cost its square: 5,000 took twice as long as 20,000, 1,000 six
/// times.
const PAGE: i64 = 20_000;
/// Largest message that is taken, in bytes: a lease's end deletes all of its keys in
/// one message.
const MESSAGE_MAX: usize = 64 << 20;
/// What nodes write of themselves: by their own identity.
const OWN: [&str; 2] = ["live/", "up/"];
/// What is said of a message beyond that.
const TOO_LARGE: &str = "message length too large";
/// How often a silent connection is asked whether it lives. etcd cuts who asks more
/// often than every 5 s (`--grpc-keepalive-min-time`).
const KEEP_ALIVE: Duration = Duration::from_secs(6);
/// How long it may take to answer that.
const KEEP_ALIVE_WAIT: Duration = Duration::from_secs(3);
/// Events that wait for one subscriber in memory; beyond, they wait at etcd.
const SUBSCRIBER_EVENTS: usize = 64;
/// Times that a snapshot is begun again because its revision was compacted.
const TRIES: usize = 3;

/// The members, one of which is asked until it fails: a balancer over them would ask
/// the dead one most, because it has least to do.
#[derive(Clone)]
pub struct Etcd {
    members: Arc<[Member]>,
    /// Counts up with each failure; modulo their number it is whose turn it is.
    turn: Arc<AtomicUsize>,
    root: String,
    deadline: Duration,
}

/// One member, as who this node is to it.
struct Member {
    client: Client,
    /// Who writes what is not this node's own.
    control: Option<Client>,
}

impl Etcd {
    /// Reads certificates and makes the client; nothing waits for the engine.
    ///
    /// # Errors
    /// A file that cannot be read, or an endpoint that is none.
    pub async fn connect(settings: &EtcdSettings) -> Result<Arc<Self>, String> {
        let read = async |path: &PathBuf| {
            tokio::fs::read(path).await.map_err(|e| format!("{} cannot be read: {e}", path.display()))
        };
        let roots = match &settings.ca {
            Some(ca) => TlsOptions::new().ca_certificate(Certificate::from_pem(read(ca).await?)),
            None => TlsOptions::new().with_enabled_roots(),
        };
        let identity = async |certificate: &Option<PathBuf>, key: &Option<PathBuf>| -> Result<TlsOptions, String> {
            Ok(match certificate.as_ref().zip(key.as_ref()) {
                Some((chain, key)) => roots.clone().identity(Identity::from_pem(read(chain).await?, read(key).await?)),
                None => roots.clone(),
            })
        };
        let client = async |endpoint: &String, tls: &TlsOptions| {
            let mut options = ConnectOptions::new()
                .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE_WAIT)
                .with_keep_alive_while_idle(true)
                .with_connect_timeout(settings.deadline / 2)
                // A member that lost the others would tell nothing, and nobody would know.
                .with_require_leader(true);
            if endpoint.starts_with("https://") {
                options = options.with_tls(tls.clone());
            }
            Client::connect([endpoint], Some(options)).await.map_err(|e| format!("{endpoint}: {e}"))
        };
        let own = identity(&settings.certificate, &settings.key).await?;
        let control = identity(&settings.control_certificate, &settings.control_key).await?;
        let mut members = Vec::new();
        for endpoint in &settings.endpoints {
            let control = match &settings.control_certificate {
                Some(_) => Some(client(endpoint, &control).await?),
                None => None,
            };
            members.push(Member { client: client(endpoint, &own).await?, control });
        }
        // Nodes that start together do not all ask the first.
        let turn = Arc::new(AtomicUsize::new(subscription::rand_below(1 << 16) as usize));
        let (root, deadline) = (settings.prefix.clone(), settings.deadline);
        Ok(Arc::new(Self { members: members.into(), turn, root, deadline }))
    }

    /// Whose turn it is, and the number of the turn.
    fn member(&self) -> Result<(usize, &Member), String> {
        let turn = self.turn.load(Ordering::Relaxed);
        let member = self.members.get(turn % self.members.len().max(1));
        member.map(|member| (turn, member)).ok_or_else(|| "there is no etcd.endpoints".to_owned())
    }

    /// The member of this turn failed: the next one's, unless that was noticed already.
    fn failed(&self, turn: usize) {
        let _ = self.turn.compare_exchange(turn, turn.wrapping_add(1), Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The place of an answer. Below another prefix is another life of the data too.
    fn cursor(&self, header: Option<&ResponseHeader>) -> Result<Cursor, ReadError> {
        let header = header.ok_or_else(|| ReadError("an answer without its revision".into()))?;
        let epoch = Epoch(format!("etcd-{:016x}{}", header.cluster_id(), self.root).into());
        Ok(Cursor { epoch, rev: unsigned(header.revision()) })
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.root)
    }

    /// A key's entry, as the trait has it; none: no text, which no writer of ours makes.
    fn entry(&self, kv: &KeyValue) -> Option<Entry> {
        let key = kv.key_str().ok()?.strip_prefix(&self.root)?.to_owned();
        Some(Entry { key, value: kv.value_str().ok()?.into(), rev: unsigned(kv.mod_revision()) })
    }

    async fn get(&self, key: Vec<u8>, options: GetOptions) -> Result<GetResponse, ReadError> {
        let by = Instant::now() + self.deadline;
        let mut failed = ReadError(format!("no answer within {:?}", self.deadline));
        for _ in 0..self.members.len() {
            let (turn, member) = self.member().map_err(ReadError)?;
            let mut kv = member.client.kv_client().max_decoding_message_size(MESSAGE_MAX);
            // A read is asked of the next one too, within the same deadline.
            match tokio::time::timeout_at(by, kv.get(key.clone(), Some(options.clone()))).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => {
                    failed = ReadError(text(&error));
                    if !is_members_fault(&error) {
                        return Err(failed);
                    }
                }
                Err(_) => {
                    self.failed(turn);
                    return Err(failed);
                }
            }
            self.failed(turn);
        }
        Err(failed)
    }

    /// Everything under the prefixes, sorted, as of one revision.
    async fn snapshot(&self, prefixes: &Prefixes) -> Result<(Cursor, Vec<Entry>), ReadError> {
        let mut tries = 0;
        loop {
            match self.try_snapshot(prefixes).await {
                // The history moved on under it.
                Err(error) if tries < TRIES && error.0.contains("compacted") => tries += 1,
                done => return done,
            }
        }
    }

    async fn try_snapshot(&self, prefixes: &Prefixes) -> Result<(Cursor, Vec<Entry>), ReadError> {
        let mut at: Option<Cursor> = None;
        let mut entries = Vec::new();
        for prefix in prefixes.iter() {
            let prefix = self.full(prefix);
            let (mut from, end, mut limit) = (prefix.clone().into_bytes(), end_of(&prefix), PAGE);
            loop {
                let pinned = at.as_ref().map_or(0, |at| signed(at.rev));
                let options = GetOptions::new().with_range(end.clone()).with_limit(limit).with_revision(pinned);
                let page = match self.get(from.clone(), options).await {
                    // Certificates are larger than most.
                    Err(error) if error.0.contains(TOO_LARGE) && limit > 1 => {
                        limit = (limit / 4).max(1);
                        continue;
                    }
                    page => page?,
                };
                if at.is_none() {
                    at = Some(self.cursor(page.header())?);
                }
                entries.extend(page.kvs().iter().filter_map(|kv| self.entry(kv)));
                let Some(last) = page.kvs().last().filter(|_| page.more()) else { break };
                from = after(last.key());
            }
        }
        let at = match at {
            Some(at) => at,
            None => self.head().await?,
        };
        Ok((at, entries))
    }

    /// The newest revision.
    async fn head(&self) -> Result<Cursor, ReadError> {
        let nothing = GetOptions::new().with_limit(1).with_keys_only();
        self.cursor(self.get(self.full("").into_bytes(), nothing).await?.header())
    }

    async fn txn(&self, txn: Txn) -> Result<u64, WriteError> {
        let own = txn.ops.iter().all(|op| match op {
            Op::Put { key, .. } | Op::Delete { key } => OWN.iter().any(|own| key.starts_with(own)),
        });
        let compares = txn.expect.iter().map(|(key, expect)| {
            let key = self.full(key);
            match expect {
                Expect::Absent => Compare::version(key, CompareOp::Equal, 0),
                Expect::Present => Compare::version(key, CompareOp::Greater, 0),
                Expect::Rev(rev) => Compare::mod_revision(key, CompareOp::Equal, signed(*rev)),
            }
        });
        let ops = txn.ops.into_iter().map(|op| match op {
            Op::Put { key, value, lease } => {
                let lease = lease.map(|lease| PutOptions::new().with_lease(lease.0.cast_signed()));
                TxnOp::put(self.full(&key), value, lease)
            }
            Op::Delete { key } => TxnOp::delete(self.full(&key), None),
        });
        // Which guard it was is asked in the same breath.
        let held =
            txn.expect.iter().map(|(key, _)| TxnOp::get(self.full(key), Some(GetOptions::new().with_keys_only())));
        let request = etcd_client::Txn::new()
            .when(compares.collect::<Vec<_>>())
            .and_then(ops.collect::<Vec<_>>())
            .or_else(held.collect::<Vec<_>>());
        let answer = self.write(own, |client| txn_at(client, request.clone())).await?;
        if answer.succeeded() {
            return answer
                .header()
                .map(|header| unsigned(header.revision()))
                .ok_or_else(|| WriteError::Unknown("an answer without its revision".into()));
        }
        let revs = answer.op_responses().into_iter().map(|response| match response {
            TxnOpResponse::Get(get) => get.kvs().first().map(|kv| unsigned(kv.mod_revision())),
            _ => None,
        });
        let broken = txn.expect.into_iter().zip(revs).find(|((_, expect), rev)| match expect {
            Expect::Absent => rev.is_some(),
            Expect::Present => rev.is_none(),
            Expect::Rev(expected) => *rev != Some(*expected),
        });
        Err(match broken {
            Some(((key, _), rev)) => WriteError::Conflict { key, rev },
            None => WriteError::Unavailable("etcd refused the guards, and they hold".into()),
        })
    }

    /// Writes at the member whose turn it is; at the next one only where nothing was
    /// sent.
    async fn write<T, F>(&self, own: bool, call: impl Fn(Client) -> F) -> Result<T, WriteError>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let by = Instant::now() + self.deadline;
        let mut failed = WriteError::Unavailable("there is no etcd.endpoints".into());
        for _ in 0..self.members.len() {
            let (turn, member) = self.member().map_err(WriteError::Unavailable)?;
            let client = member.control.as_ref().filter(|_| !own).unwrap_or(&member.client);
            failed = match tokio::time::timeout_at(by, call(client.clone())).await {
                Ok(Ok(done)) => return Ok(done),
                Ok(Err(error)) if !is_members_fault(&error) => return Err(written(&error)),
                Ok(Err(error)) => written(&error),
                Err(_) => WriteError::Unknown(format!("no answer within {:?}", self.deadline)),
            };
            self.failed(turn);
            if !matches!(failed, WriteError::Unavailable(_)) {
                break;
            }
        }
        Err(failed)
    }

    async fn grant(&self, ttl: Duration) -> Result<Lease, WriteError> {
        let seconds = i64::try_from(ttl.as_secs().max(1)).unwrap_or(i64::MAX);
        let granted = self.write(true, |client| grant_at(client, seconds)).await?;
        let (id, dropped) = (granted.id(), CancellationToken::new());
        let ttl = Duration::from_secs(granted.ttl().unsigned_abs().max(1));
        tokio::spawn(keep(self.clone(), id, ttl, dropped.clone()));
        Ok(Lease { id: LeaseId(id.cast_unsigned()), revoke: Some(Box::new(move || dropped.cancel())) })
    }
}

impl Feed for Etcd {
    fn subscribe(&self, prefixes: &[&str], from: Option<Cursor>) -> Subscription {
        let (tell, events) = mpsc::channel(SUBSCRIBER_EVENTS);
        tokio::spawn(subscription::run(self.clone(), Prefixes::new(prefixes), from, tell));
        Subscription { events }
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<u64, WriteError>> {
        Box::pin(self.txn(txn))
    }

    fn read<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<Option<Entry>, ReadError>> {
        Box::pin(async move {
            let found = self.get(self.full(key).into_bytes(), GetOptions::new()).await?;
            Ok(found.kvs().first().and_then(|kv| self.entry(kv)))
        })
    }

    fn list<'a>(&'a self, prefix: &'a str) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        Box::pin(async move { self.snapshot(&Prefixes::new(&[prefix])).await })
    }

    fn page<'a>(
        &'a self,
        prefix: &'a str,
        after_key: &'a str,
        limit: usize,
    ) -> BoxFuture<'a, Result<(Cursor, Vec<Entry>), ReadError>> {
        Box::pin(async move {
            let full = self.full(prefix);
            let from = if after_key > prefix { after(self.full(after_key).as_bytes()) } else { full.clone().into() };
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let page = self.get(from, GetOptions::new().with_range(end_of(&full)).with_limit(limit)).await?;
            Ok((self.cursor(page.header())?, page.kvs().iter().filter_map(|kv| self.entry(kv)).collect()))
        })
    }

    fn lease(&self, ttl: Duration) -> BoxFuture<'_, Result<Lease, WriteError>> {
        Box::pin(self.grant(ttl))
    }
}

/// Keeps a lease alive until it is dropped, then revokes it.
async fn keep(feed: Etcd, id: i64, ttl: Duration, dropped: CancellationToken) {
    let renewing = async {
        loop {
            if let Ok((turn, member)) = feed.member()
                && let Err(error) = renew(&member.client, id, ttl).await
            {
                tracing::debug!(lease = id, error = text(&error), "a lease was not renewed");
                if is_members_fault(&error) {
                    feed.failed(turn);
                }
            }
            // Until it is gone for good, and its holder notices at the next write.
            tokio::time::sleep(ttl / 6).await;
        }
    };
    tokio::select! {
        () = dropped.cancelled() => {}
        () = renewing => {}
    }
    // Gone by itself after `ttl`: tried for as long.
    let revoked = async {
        while let Err(error) = feed.write(true, |client| revoke_at(client, id)).await {
            if error == WriteError::LeaseLost {
                return;
            }
            tokio::time::sleep(ttl / 6).await;
        }
    };
    let _ = tokio::time::timeout(ttl, revoked).await;
}

async fn txn_at(client: Client, txn: etcd_client::Txn) -> Result<TxnResponse, Error> {
    client.kv_client().txn(txn).await
}

async fn grant_at(client: Client, seconds: i64) -> Result<LeaseGrantResponse, Error> {
    client.lease_client().grant(seconds, None).await
}

async fn revoke_at(client: Client, id: i64) -> Result<LeaseRevokeResponse, Error> {
    client.lease_client().revoke(id).await
}

async fn renew(client: &Client, id: i64, ttl: Duration) -> Result<(), Error> {
    let begun = tokio::time::timeout(ttl / 3, client.lease_client().keep_alive(id)).await;
    let (mut keeper, mut answers) = begun.map_err(|_| Error::LeaseKeepAliveError("no answer".into()))??;
    loop {
        tokio::time::sleep(ttl / 3).await;
        keeper.keep_alive().await?;
        match tokio::time::timeout(ttl / 3, answers.message()).await {
            Ok(Ok(Some(alive))) if alive.ttl() > 0 => {}
            Ok(Ok(_)) => return Err(Error::LeaseKeepAliveError("it is gone".into())),
            Ok(Err(error)) => return Err(error),
            Err(_) => return Err(Error::LeaseKeepAliveError("no answer".into())),
        }
    }
}

/// etcd's revisions count from 1.
fn unsigned(rev: i64) -> u64 {
    u64::try_from(rev).unwrap_or(0)
}

fn signed(rev: u64) -> i64 {
    i64::try_from(rev).unwrap_or(i64::MAX)
}

/// The first key behind one.
fn after(key: &[u8]) -> Vec<u8> {
    [key, b"\0"].concat()
}

/// The first key behind all that begin so; "\0" is etcd's word for none.
fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < 0xff {
            end.push(last + 1);
            return end;
        }
    }
    vec![0]
}

/// Whether another member may do better.
fn is_members_fault(error: &Error) -> bool {
    match error {
        Error::GRpcStatus(status) => {
            matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled)
        }
        Error::TransportError(_) | Error::IoError(_) | Error::LeaseKeepAliveError(_) | Error::WatchError(_) => true,
        _ => false,
    }
}

/// What an error is to who wanted to write.
fn written(error: &Error) -> WriteError {
    let Error::GRpcStatus(status) = error else { return WriteError::Unavailable(text(error)) };
    let why = text(error);
    match status.code() {
        Code::PermissionDenied | Code::Unauthenticated => {
            WriteError::Denied(format!("this node's identity may not write there ({why}): etcd.control_certificate"))
        }
        Code::NotFound if status.message().contains("lease") => WriteError::LeaseLost,
        Code::InvalidArgument | Code::FailedPrecondition | Code::ResourceExhausted | Code::OutOfRange => {
            WriteError::Unavailable(why)
        }
        // It was never sent.
        Code::Unavailable if why.contains("connect error") || why.contains("no leader") => WriteError::Unavailable(why),
        _ => WriteError::Unknown(why),
    }
}

/// An error with what is behind it, without the metadata.
fn text(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => match std::error::Error::source(status) {
            Some(source) => format!("{}: {}", status.message(), Chain(source)),
            None => status.message().to_owned(),
        },
        error => error.to_string(),
    }
}
