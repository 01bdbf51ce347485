//! Typed records above the feed, and the only writer of claims: a name, a port
//! or a (user, relay port) belongs to one record, because the claim's key is
//! written with the record in one guarded transaction. Used by the control API
//! and by registration on demand; who may do it is decided by them.
//!
//! Keys: `cfg/sock/<id>`, `cfg/tun/<id>`, `cert/<id>` and the like (`record`);
//! claims in `claims`.

mod claims;
mod completion;
mod error;
mod record;
mod settings;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use serde_json::{Map, Value};

pub use self::error::RecordError;
pub use self::record::{Condition, Page, Record, Stored, Written, without};
pub use self::settings::RecordSettings;

use self::claims::{Claim, Holder};
use self::completion::check_user;
use self::error::mistake;
use super::certificate_check::check_certificate;
use super::{Entry, Expect, Feed, LeaseId, Op, ReadError, Txn, WriteError};
use crate::fields::Mistake;
use crate::model::{Account, AccountId, Certificate, Socket, SocketId, Tunnel, TunnelId};

/// How often a write that lost a race is tried again. Each try loses only to a
/// write that succeeded, so this is met by a storm on one name alone.
const TRIES: usize = 16;

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
        check_certificate(&certificate).map_err(|m| RecordError::Mistakes(vec![m]))?;
        self.put_unclaimed(certificate, condition).await
    }

    /// Creates or replaces an account, with its address.
    ///
    /// # Errors
    /// `Taken`: another account has the address. See [`RecordError`] for the rest.
    pub async fn put_account(&self, account: Account, condition: Condition) -> Result<Written<Account>, RecordError> {
        let key = Account::key(&account.id);
        for _ in 0..TRIES {
            let old = self.feed.read(&key).await?;
            condition.check(old.as_ref().map(|e| e.rev))?;
            let mut txn = Txn::default();
            let held = old.as_ref().map(|e| claims::of_account_record(&e.value)).unwrap_or_default();
            let wanted = claims::of_account(&account);
            let taken = self.hold(&mut txn, &wanted, &held, &Holder::Account(&account.id), None).await?;
            if !taken.is_empty() {
                return Err(RecordError::Taken(taken));
            }
            write_record(&mut txn, &account, old.as_ref(), None);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(Written { record: account, rev, created: old.is_none() });
            }
        }
        Err(RecordError::Contended)
    }

    /// Deletes an account and its claim. Answers the revision.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is deleted then.
    pub async fn delete_account(&self, id: &AccountId, condition: Condition) -> Result<u64, RecordError> {
        for _ in 0..TRIES {
            let old = self.existing::<Account>(id, condition).await?;
            let mut txn = Txn::default();
            let held = claims::of_account_record(&old.value);
            self.hold(&mut txn, &[], &held, &Holder::Account(id), None).await?;
            erase::<Account>(&mut txn, id, &old);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(rev);
            }
        }
        Err(RecordError::Contended)
    }

    /// Creates or replaces a record of a kind that claims nothing.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is written then.
    pub async fn put_unclaimed<R: Record>(&self, record: R, condition: Condition) -> Result<Written<R>, RecordError> {
        let key = R::key(record.id());
        for _ in 0..TRIES {
            let old = self.feed.read(&key).await?;
            condition.check(old.as_ref().map(|e| e.rev))?;
            let mut txn = Txn::default();
            write_record(&mut txn, &record, old.as_ref(), None);
            if let Outcome::Done(rev) = self.commit(txn).await? {
                return Ok(Written { record, rev, created: old.is_none() });
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
            let held = claims::of_socket_record(id, &old.value);
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

    /// Deletes a record of a kind that claims nothing. Answers the revision.
    ///
    /// # Errors
    /// See [`RecordError`]; nothing is deleted then.
    pub async fn delete_unclaimed<R: Record>(&self, id: &R::Id, condition: Condition) -> Result<u64, RecordError> {
        for _ in 0..TRIES {
            let old = self.existing::<R>(id, condition).await?;
            let mut txn = Txn::default();
            erase::<R>(&mut txn, id, &old);
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

    /// A record as it is stored, whether this version can read it or not.
    ///
    /// # Errors
    /// The feed cannot be read.
    pub async fn raw(&self, key: &str) -> Result<Option<Map<String, Value>>, ReadError> {
        let entry = self.feed.read(key).await?;
        Ok(entry.and_then(|entry| serde_json::from_str(&entry.value).ok()))
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

    /// The sockets of an owner, by id.
    ///
    /// # Errors
    /// `Read`.
    pub async fn sockets_of(&self, owner: &str) -> Result<Vec<SocketId>, RecordError> {
        let prefix = claims::owner_prefix(owner);
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

    async fn hold_socket(
        &self,
        txn: &mut Txn,
        record: &Socket,
        old: Option<&Entry>,
        lease: Option<LeaseId>,
    ) -> Result<Vec<Mistake>, RecordError> {
        let held = old.map(|e| claims::of_socket_record(&record.id, &e.value)).unwrap_or_default();
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
