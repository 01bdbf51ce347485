//! The one task that follows the feed's records and applies them: sockets and
//! tunnels to the route table, certificates and ticket keys to TLS, what logins
//! rest on to theirs. Each record is validated before it is applied; a bad one is
//! refused by name and counted, and the last good one keeps serving.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::records::Record;
use super::{Change, Cursor, Entry, Epoch, Event, Subscription};
use crate::fields::Mistake;
use crate::logins::Logins;
use crate::model::{Account, Certificate, CertificateId, Keyring, Provider, Revocation, Socket, TicketKeys, Tunnel};
use crate::routes::Routes;

/// A kind of record and what is done with one.
struct Kind {
    prefix: &'static str,
    noun: &'static str,
    put: fn(&mut Follower, id: &str, value: &str) -> Result<(), String>,
    remove: fn(&mut Follower, id: &str) -> Result<(), String>,
}

const fn kind<R: Applied>() -> Kind {
    Kind {
        prefix: R::PREFIX,
        noun: R::NOUN,
        put: |follower, id, value| {
            let id: R::Id = id.parse().map_err(|why| format!("its id {why}"))?;
            let record = R::from_value(&id, value).map_err(|mistakes| {
                let all: Vec<String> = mistakes.iter().map(Mistake::to_string).collect();
                all.join("; ")
            })?;
            record.apply(follower)
        },
        remove: |follower, id| match id.parse::<R::Id>() {
            Ok(id) => R::withdraw(&id, follower),
            // It was never applied.
            Err(_) => Ok(()),
        },
    }
}

/// What the follower follows; claims are the writers' own business.
const KINDS: [Kind; 8] = [
    kind::<Socket>(),
    kind::<Tunnel>(),
    kind::<Certificate>(),
    kind::<TicketKeys>(),
    kind::<Provider>(),
    kind::<Account>(),
    kind::<Keyring>(),
    kind::<Revocation>(),
];
/// Records applied between two chances for other tasks.
const BREATH: usize = 256;

/// What a subscription for a follower is to.
pub fn prefixes() -> Vec<&'static str> {
    KINDS.iter().map(|kind| kind.prefix).collect()
}

/// Where certificates and ticket keys go.
pub trait Certificates: Send + Sync + 'static {
    /// Takes a certificate in, in place of its former version.
    ///
    /// # Errors
    /// Why it cannot be served; the former version stays.
    fn put(&self, certificate: Certificate) -> Result<(), String>;
    /// Takes a certificate out.
    fn remove(&self, id: &CertificateId);
    /// Takes the keys of session tickets in, or out.
    ///
    /// # Errors
    /// Why they cannot be used; the former ones stay.
    fn set_ticket_keys(&self, keys: Option<&TicketKeys>) -> Result<(), String>;
}

impl Certificates for crate::tls::Certificates {
    fn put(&self, certificate: Certificate) -> Result<(), String> {
        self.put(&certificate)
    }
    fn remove(&self, id: &CertificateId) {
        self.remove(id);
    }
    fn set_ticket_keys(&self, keys: Option<&TicketKeys>) -> Result<(), String> {
        self.set_ticket_keys(keys)
    }
}

/// How far the follower has come; cheap to clone.
#[derive(Debug, Clone)]
pub struct Following {
    applied: watch::Receiver<u64>,
    ports: watch::Receiver<u64>,
    stale_since: watch::Receiver<Option<Instant>>,
    refused: watch::Receiver<Vec<String>>,
}

impl Following {
    /// The last revision that is applied; 0 before the first.
    pub fn applied(&self) -> u64 {
        *self.applied.borrow()
    }

    /// Changes with the last revision that is applied.
    pub fn revisions(&self) -> watch::Receiver<u64> {
        self.applied.clone()
    }

    /// Whether revision `rev` was applied within `deadline`.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn wait_applied(&self, rev: u64, deadline: Duration) -> bool {
        let mut applied = self.applied.clone();
        let reached = tokio::time::timeout(deadline, applied.wait_for(|at| *at >= rev)).await;
        matches!(reached, Ok(Ok(_)))
    }

    /// How long the table may have been behind the feed; `None`: it is live.
    pub fn stale_for(&self) -> Option<Duration> {
        self.stale_since.borrow().map(|since| since.elapsed())
    }

    /// Waits until the table is live for the first time, or the follower ended.
    pub async fn wait_live(&self) -> bool {
        self.stale_since.clone().wait_for(Option::is_none).await.is_ok()
    }

    /// Waits until there is something to serve, be it old; or the follower ended.
    pub async fn wait_served(&self) -> bool {
        let (mut live, mut applied) = (self.stale_since.clone(), self.applied.clone());
        tokio::select! {
            live = live.wait_for(Option::is_none) => live.is_ok(),
            applied = applied.wait_for(|rev| *rev > 0) => applied.is_ok(),
        }
    }

    /// Changes whenever sockets won or lost ports: read `Routes::ports` then.
    pub fn ports(&self) -> watch::Receiver<u64> {
        self.ports.clone()
    }

    /// The keys of records that are refused at present.
    pub fn refused(&self) -> Vec<String> {
        self.refused.borrow().clone()
    }
}

/// The task's state.
pub struct Follower {
    events: Subscription,
    routes: Arc<Routes>,
    certificates: Arc<dyn Certificates>,
    logins: Arc<Logins>,
    /// What was seen of each key, so that a Reset touches only what changed; none:
    /// in another life of the data.
    seen: HashMap<String, Option<u64>>,
    epoch: Option<Epoch>,
    bad: HashSet<String>,
    ports_changed: bool,
    applied: watch::Sender<u64>,
    ports: watch::Sender<u64>,
    stale_since: watch::Sender<Option<Instant>>,
    refused: watch::Sender<Vec<String>>,
}

impl Follower {
    /// A follower of what `events` tells of the keys under [`prefixes`], and the handle
    /// to watch it by.
    pub fn new(
        events: Subscription,
        routes: Arc<Routes>,
        certificates: Arc<dyn Certificates>,
        logins: Arc<Logins>,
    ) -> (Self, Following) {
        let follower = Self {
            events,
            routes,
            certificates,
            logins,
            seen: HashMap::new(),
            epoch: None,
            bad: HashSet::new(),
            ports_changed: false,
            applied: watch::Sender::new(0),
            ports: watch::Sender::new(0),
            stale_since: watch::Sender::new(Some(Instant::now())),
            refused: watch::Sender::new(Vec::new()),
        };
        let following = Following {
            applied: follower.applied.subscribe(),
            ports: follower.ports.subscribe(),
            stale_since: follower.stale_since.subscribe(),
            refused: follower.refused.subscribe(),
        };
        (follower, following)
    }

    /// The same as [`run`](Self::run) on a thread that does nothing else. A million
    /// records at once keep it busy for seconds, and on a thread that serves visitors
    /// too these would wait meanwhile: up to 22 ms, by benches/resync.rs.
    ///
    /// # Panics
    /// Outside of a runtime, or on a thread of one that runs tasks.
    pub fn run_alone(self, cancel: CancellationToken) {
        tokio::runtime::Handle::current().block_on(self.run(cancel));
    }

    /// Follows until `cancel`, or until the feed has shut down.
    pub async fn run(mut self, cancel: CancellationToken) {
        loop {
            let event = tokio::select! {
                () = cancel.cancelled() => return,
                event = self.events.next() => event,
            };
            match event {
                None => return tracing::info!("the feed has shut down; its last state keeps serving"),
                Some(Event::Reset { at, state }) => self.reset(at, state).await,
                Some(Event::Batch { at, changes }) => self.batch(at, changes),
                Some(Event::Live { at }) => {
                    self.reached(at.rev);
                    self.stale_since.send_replace(None);
                }
                Some(Event::Stale { why }) => {
                    tracing::warn!(why, "the feed is stale; its last state keeps serving");
                    self.stale_since.send_if_modified(|since| since.replace(Instant::now()).is_none());
                }
            }
        }
    }

    fn batch(&mut self, at: Cursor, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Put(entry) => self.put(&entry),
                Change::Delete { key, .. } => self.remove(&key),
            }
        }
        self.reached(at.rev);
    }

    /// Applies a whole state by what differs: first what is there, so that a
    /// name that moved is never missing, then what is gone.
    async fn reset(&mut self, at: Cursor, state: Vec<Entry>) {
        if self.epoch.as_ref() != Some(&at.epoch) {
            self.seen.values_mut().for_each(|rev| *rev = None);
            self.epoch = Some(at.epoch);
        }
        let mut present = HashSet::with_capacity(state.len());
        for (i, entry) in state.into_iter().enumerate() {
            if self.seen.get(&entry.key) != Some(&Some(entry.rev)) {
                self.put(&entry);
            }
            present.insert(entry.key);
            if i % BREATH == BREATH - 1 {
                tokio::task::yield_now().await;
            }
        }
        let gone: Vec<String> = self.seen.keys().filter(|key| !present.contains(*key)).cloned().collect();
        for key in gone {
            self.remove(&key);
        }
        self.reached(at.rev);
    }

    fn reached(&mut self, rev: u64) {
        if std::mem::take(&mut self.ports_changed) {
            self.ports.send_modify(|n| *n += 1);
        }
        self.applied.send_replace(rev);
    }

    fn put(&mut self, entry: &Entry) {
        let Some((kind, id)) = kind_of(&entry.key) else { return };
        let result = (kind.put)(self, id, &entry.value);
        self.seen.insert(entry.key.clone(), Some(entry.rev));
        match result {
            Ok(()) => {
                if self.bad.remove(&entry.key) {
                    self.tell_refused();
                }
            }
            Err(why) => {
                metrics::counter!("adit_feed_records_refused_total", "kind" => kind.noun).increment(1);
                tracing::error!(
                    key = entry.key,
                    rev = entry.rev,
                    why,
                    "a bad record is refused; the last good one keeps serving"
                );
                self.bad.insert(entry.key.clone());
                self.tell_refused();
            }
        }
    }

    fn remove(&mut self, key: &str) {
        self.seen.remove(key);
        if self.bad.remove(key) {
            self.tell_refused();
        }
        if let Some((kind, id)) = kind_of(key)
            && let Err(why) = (kind.remove)(self, id)
        {
            tracing::error!(key, why, "a record that is gone keeps serving");
        }
    }

    fn tell_refused(&self) {
        let mut keys: Vec<String> = self.bad.iter().cloned().collect();
        keys.sort();
        self.refused.send_replace(keys);
    }
}

/// The kind of the record at a key, and its id.
fn kind_of(key: &str) -> Option<(&'static Kind, &str)> {
    const { &KINDS }.iter().find_map(|kind| Some((kind, key.strip_prefix(kind.prefix)?)))
}

/// What a kind of record does to the node.
trait Applied: Record {
    /// Takes it in, in place of its former version.
    ///
    /// # Errors
    /// Why it cannot be used; the former version stays.
    fn apply(self, follower: &mut Follower) -> Result<(), String>;
    /// Takes it out.
    ///
    /// # Errors
    /// Why it stays.
    fn withdraw(id: &Self::Id, follower: &mut Follower) -> Result<(), String>;
}

impl Applied for Socket {
    fn apply(self, follower: &mut Follower) -> Result<(), String> {
        let before = follower.routes.socket(&self.id);
        follower.ports_changed |= before.map(|r| r.socket.ports.clone()).unwrap_or_default() != self.ports;
        follower.routes.put_socket(self);
        Ok(())
    }
    fn withdraw(id: &Self::Id, follower: &mut Follower) -> Result<(), String> {
        follower.ports_changed |= follower.routes.socket(id).is_some_and(|r| !r.socket.ports.is_empty());
        follower.routes.remove_socket(id);
        Ok(())
    }
}

impl Applied for Certificate {
    fn apply(self, follower: &mut Follower) -> Result<(), String> {
        follower.certificates.put(self)
    }
    fn withdraw(id: &Self::Id, follower: &mut Follower) -> Result<(), String> {
        follower.certificates.remove(id);
        Ok(())
    }
}

impl Applied for TicketKeys {
    fn apply(self, follower: &mut Follower) -> Result<(), String> {
        follower.certificates.set_ticket_keys(Some(&self))
    }
    fn withdraw(_: &Self::Id, follower: &mut Follower) -> Result<(), String> {
        follower.certificates.set_ticket_keys(None)
    }
}

impl Applied for Keyring {
    fn apply(self, follower: &mut Follower) -> Result<(), String> {
        follower.logins.set_keyring(Some(&self))
    }
    fn withdraw(_: &Self::Id, follower: &mut Follower) -> Result<(), String> {
        follower.logins.set_keyring(None)
    }
}

macro_rules! applied {
    ($($t:ty => $table:ident, $put:ident, $remove:ident);*) => {$(
        impl Applied for $t {
            fn apply(self, follower: &mut Follower) -> Result<(), String> {
                follower.$table.$put(self);
                Ok(())
            }
            fn withdraw(id: &Self::Id, follower: &mut Follower) -> Result<(), String> {
                follower.$table.$remove(id);
                Ok(())
            }
        }
    )*};
}
applied!(
    Tunnel => routes, put_tunnel, remove_tunnel;
    Provider => logins, put_provider, remove_provider;
    Account => logins, put_account, remove_account;
    Revocation => logins, put_revocation, remove_revocation
);

#[cfg(test)]
pub(crate) mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::feed::store::{Store, StoreSettings};
    use crate::feed::{Feed, Op, Txn};

    /// Certificates that only remember; one whose chain is "bad" is refused.
    #[derive(Default)]
    pub(crate) struct Remembered(
        pub(crate) Mutex<HashMap<CertificateId, String>>,
        pub(crate) Mutex<Option<TicketKeys>>,
    );

    impl Certificates for Remembered {
        fn put(&self, certificate: Certificate) -> Result<(), String> {
            if certificate.chain_pem == "bad" {
                return Err("bad chain".into());
            }
            self.0.lock().insert(certificate.id, certificate.chain_pem);
            Ok(())
        }
        fn remove(&self, id: &CertificateId) {
            self.0.lock().remove(id);
        }
        fn set_ticket_keys(&self, keys: Option<&TicketKeys>) -> Result<(), String> {
            *self.1.lock() = keys.cloned();
            Ok(())
        }
    }

    async fn write(store: &Store, key: &str, value: &str) -> u64 {
        let op = if value.is_empty() {
            Op::Delete { key: key.into() }
        } else {
            Op::Put { key: key.into(), value: value.into(), lease: None }
        };
        store.commit(Txn { expect: vec![], ops: vec![op] }).await.unwrap()
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test]
    async fn records_are_applied_and_bad_ones_leave_the_last_good() {
        let store = Store::in_memory(StoreSettings::default()).unwrap();
        write(&store, "cfg/sock/old", r#"{"type":"http","hostnames":["old.test"]}"#).await;
        write(&store, "cfg/sock/never", r#"{"type":"nonsense"}"#).await;
        let (routes, certificates) = (Arc::new(Routes::default()), Arc::new(Remembered::default()));
        let (follower, following) =
            Follower::new(store.subscribe(&prefixes(), None), routes.clone(), certificates.clone(), Arc::default());
        let cancel = CancellationToken::new();
        let task = tokio::spawn(follower.run(cancel.clone()));
        assert!(following.wait_live().await);
        assert!(routes.by_host("old.test").is_some());
        assert_eq!(following.refused(), ["cfg/sock/never"]);

        let ports = following.ports();
        let rev = write(&store, "cfg/sock/raw", r#"{"type":"tcp","ports":[20001]}"#).await;
        assert!(following.wait_applied(rev, SECOND).await);
        assert!(ports.has_changed().unwrap() && routes.by_port(20001).is_some());

        write(&store, "cfg/sock/old", r#"{"type":"http","hostnames":["a b"]}"#).await;
        write(&store, "cfg/sock/old!", r#"{"type":"http"}"#).await;
        write(&store, "cert/c", r#"{"chain_pem":"good","key_pem":"k"}"#).await;
        write(&store, "cfg/host/x", r#"{"anything":1}"#).await;
        let rev = write(&store, "cert/c", r#"{"chain_pem":"bad","key_pem":"k"}"#).await;
        assert!(following.wait_applied(rev, SECOND).await);
        assert!(routes.by_host("old.test").is_some());
        assert_eq!(certificates.0.lock().values().collect::<Vec<_>>(), ["good"]);
        assert_eq!(following.refused(), ["cert/c", "cfg/sock/never", "cfg/sock/old", "cfg/sock/old!"]);

        write(&store, "cert/c", "").await;
        write(&store, "cfg/sock/raw", "").await;
        let rev = write(&store, "cfg/sock/old", r#"{"type":"http","hostnames":["new.test"]}"#).await;
        assert!(following.wait_applied(rev, SECOND).await);
        assert!(routes.by_port(20001).is_none() && certificates.0.lock().is_empty());
        assert!(routes.by_host("old.test").is_none() && routes.by_host("new.test").is_some());
        assert!(!following.wait_applied(rev + 100, Duration::from_millis(20)).await);
        cancel.cancel();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn ticket_keys_come_go_and_outlast_a_bad_record() {
        let (events, receiver) = tokio::sync::mpsc::channel(8);
        let feed = Subscription { events: receiver };
        let certificates = Arc::new(Remembered::default());
        let (follower, following) = Follower::new(feed, Arc::default(), certificates.clone(), Arc::default());
        let task = tokio::spawn(follower.run(CancellationToken::new()));
        let held = || certificates.1.lock().as_ref().map(|keys| keys.keys.len());
        let one = format!(r#"{{"keys":["{}"]}}"#, "A".repeat(43) + "=");
        let steps: [(&[(&str, &str)], _); 5] = [
            (&[("ticket/default", &one)], Some(1)),
            (&[("ticket/default", r#"{"keys":[]}"#)], Some(1)),
            (&[("ticket/default", &one), ("ticket/other", &one)], Some(1)),
            (&[("ticket/other", &one)], None),
            (&[("ticket/default", &one)], Some(1)),
        ];
        for (rev, (records, expected)) in (1..).zip(steps) {
            let entry = |(key, value): &(&str, &str)| Entry { key: (*key).into(), value: (*value).into(), rev };
            let at = Cursor { epoch: Epoch("e".into()), rev };
            events.send(Event::Reset { at, state: records.iter().map(entry).collect() }).await.unwrap();
            assert!(following.wait_applied(rev, SECOND).await);
            assert_eq!(held(), expected, "step {rev}");
        }
        let deleted = Change::Delete { key: "ticket/default".into(), rev: 9 };
        let at = Cursor { epoch: Epoch("e".into()), rev: 9 };
        events.send(Event::Batch { at, changes: vec![deleted] }).await.unwrap();
        assert!(following.wait_applied(9, SECOND).await);
        assert_eq!(held(), None);
        drop(events);
        task.await.unwrap();
    }

    #[tokio::test]
    async fn a_reset_is_applied_by_what_differs() {
        let (events, receiver) = tokio::sync::mpsc::channel(8);
        let feed = Subscription { events: receiver };
        let (routes, certificates) = (Arc::new(Routes::default()), Arc::new(Remembered::default()));
        let (follower, following) = Follower::new(feed, routes.clone(), certificates, Arc::default());
        let task = tokio::spawn(follower.run(CancellationToken::new()));
        let at = |rev| Cursor { epoch: Epoch("e".into()), rev };
        let sock = |id: &str, host: &str, rev| Entry {
            key: format!("cfg/sock/{id}"),
            value: format!(r#"{{"type":"http","hostnames":["{host}"]}}"#).into(),
            rev,
        };
        let first = vec![sock("gone", "moves.test", 1), sock("stays", "stays.test", 2)];
        events.send(Event::Reset { at: at(5), state: first }).await.unwrap();
        events.send(Event::Live { at: at(5) }).await.unwrap();
        assert!(following.wait_live().await && following.wait_applied(5, SECOND).await);
        let stays = routes.by_host("stays.test").unwrap();
        events.send(Event::Stale { why: "test".into() }).await.unwrap();
        let second = vec![sock("gets", "moves.test", 7), sock("stays", "stays.test", 2)];
        events.send(Event::Reset { at: at(9), state: second }).await.unwrap();
        assert!(following.wait_applied(9, SECOND).await);
        assert!(following.stale_for().is_some());
        assert_eq!(routes.by_host("moves.test").unwrap().socket.id.as_str(), "gets");
        assert!(Arc::ptr_eq(&stays, &routes.by_host("stays.test").unwrap()), "what did not change was not touched");
        assert_eq!(routes.size(), (2, 0));
        drop(events);
        task.await.unwrap();
    }
}
