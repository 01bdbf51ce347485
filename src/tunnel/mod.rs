//! The door to SSH: live tunnels, and `candidates` -> `open` -> `Stream`.
//! What logs in, what it registers and how its bytes are pumped stays behind it.

mod console;
pub mod keys;
pub mod naming;
mod owner;
mod register;
mod revoked;
mod server;
mod session;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use dashmap::DashMap;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::task::TaskTracker;

pub use self::register::Urls;
use self::revoked::RevokedKeys;
pub use self::server::{HostKeyType, Server, host_key};
pub use self::session::{Bind, Session};
use crate::cores::Core;
use crate::error::Error;
use crate::feed::Feed;
use crate::feed::records::Records;
use crate::fields::{Bytes, Fields};
use crate::limits::PerAddress;
use crate::metrics::Present;
use crate::model::{AuthorizedKey, SocketType, Tunnel, TunnelId, Visitor};
use crate::routes::Routes;
use crate::stream::Stream;
use crate::text_field;

/// Who may register what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Any key; sockets are made on demand and kept for the key that took them.
    Open,
    /// Only tunnels of the feed, only by their keys and CAs.
    Closed,
}

impl std::str::FromStr for Mode {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "open" => Ok(Self::Open),
            "closed" => Ok(Self::Closed),
            _ => Err("is not a mode"),
        }
    }
}
text_field!(Mode, "\"open\" or \"closed\"");

/// The knobs of `[ssh]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SshSettings {
    /// Where owners log in.
    pub listen: Vec<SocketAddr>,
    /// Who may register what.
    pub mode: Mode,
    /// The host key file; made if absent. Default: `ssh_host_ed25519_key` in the state folder.
    pub host_key: Option<PathBuf>,
    /// Have an ECDSA host key too, `ssh_host_ecdsa_key` in the state folder.
    pub ecdsa_host_key: bool,
    /// CAs whose user certificates may serve any tunnel that names their principal.
    pub cert_authorities: Vec<AuthorizedKey>,
    /// A file of keys and certificates that may not log in any more.
    pub revoked_keys: Option<PathBuf>,
    /// Accept RSA signatures over SHA-1, which only clients of 2021 and before need.
    pub allow_sha1_rsa: bool,
    /// Time from the connection to a complete login.
    pub login_deadline: Duration,
    /// Failed attempts of one connection.
    pub auth_attempts: usize,
    /// Each failed attempt is answered after this.
    pub reject_delay: Duration,
    /// Sessions of the node.
    pub sessions: usize,
    /// Sessions of one address.
    pub sessions_per_address: usize,
    /// Connections of one address that have not logged in yet.
    pub unauthenticated_per_address: usize,
    /// Forwards of one session.
    pub forwards_per_session: usize,
    /// Sockets that one key may have made on demand.
    pub sockets_per_key: usize,
    /// Visitors of one session at once.
    pub connections_per_tunnel: usize,
    /// Time for the client's answer to an open.
    pub open_deadline: Duration,
    /// After this long without an answer another tunnel is tried beside it.
    pub open_patience: Duration,
    /// How often the peer is asked whether it is there.
    pub keepalive: Duration,
    /// Time for its answer.
    pub keepalive_deadline: Duration,
    /// SSH window of each channel.
    pub window: usize,
    /// What a channel's window may grow to.
    pub window_max: usize,
    /// Bytes that all channels of all sessions may have outstanding: promised to
    /// peers or waiting for visitors.
    pub node_buffer: usize,
    /// New keys after so many bytes.
    pub rekey_bytes: usize,
    /// New keys after this long.
    pub rekey_after: Duration,
    /// Offer key exchange over NIST's P-256.
    pub nist_curves: bool,
    /// The same for all channels of one session.
    pub tunnel_buffer: usize,
}

impl Default for SshSettings {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([0u16; 8], 2222))],
            mode: Mode::Closed,
            host_key: None,
            ecdsa_host_key: false,
            cert_authorities: Vec::new(),
            revoked_keys: None,
            allow_sha1_rsa: false,
            login_deadline: Duration::from_secs(20),
            auth_attempts: 12,
            reject_delay: Duration::from_millis(100),
            sessions: 100_000,
            sessions_per_address: 200,
            unauthenticated_per_address: 20,
            forwards_per_session: 64,
            sockets_per_key: 100,
            connections_per_tunnel: 4096,
            open_deadline: Duration::from_secs(10),
            open_patience: Duration::from_secs(2),
            keepalive: Duration::from_secs(10),
            keepalive_deadline: Duration::from_secs(15),
            window: 2 << 20,
            window_max: 8 << 20,
            node_buffer: 1 << 30,
            rekey_bytes: 1 << 30,
            rekey_after: Duration::from_secs(3600),
            nist_curves: false,
            tunnel_buffer: 64 << 20,
        }
    }
}

impl SshSettings {
    /// Reads `[ssh]`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let mut size = |key: &str, default: usize| f.take(key, Bytes(default)).0;
        let (window, window_max) = (size("window", d.window), size("window_max", d.window_max));
        let (tunnel_buffer, node_buffer) = (size("tunnel_buffer", d.tunnel_buffer), size("node_buffer", d.node_buffer));
        let rekey_bytes = size("rekey_bytes", d.rekey_bytes);
        for (key, bytes) in [("window", window), ("window_max", window_max)] {
            if !(32 << 10..=64 << 20).contains(&bytes) {
                f.mistake(key, format!("{bytes} bytes is out of range"), "write 32KiB to 64MiB".into());
            }
        }
        if rekey_bytes < 1 << 20 {
            f.mistake("rekey_bytes", format!("{rekey_bytes} bytes is out of range"), "write 1MiB or more".into());
        }
        let settings = Self {
            listen: f.take("listen", d.listen),
            mode: f.take("mode", d.mode),
            host_key: f.optional("host_key"),
            ecdsa_host_key: f.take("ecdsa_host_key", d.ecdsa_host_key),
            cert_authorities: f.take("cert_authorities", d.cert_authorities),
            revoked_keys: f.optional("revoked_keys"),
            allow_sha1_rsa: f.take("allow_sha1_rsa", d.allow_sha1_rsa),
            login_deadline: f.take("login_deadline", d.login_deadline),
            auth_attempts: f.take("auth_attempts", d.auth_attempts),
            reject_delay: f.take("reject_delay", d.reject_delay),
            sessions: f.take("sessions", d.sessions),
            sessions_per_address: f.take("sessions_per_address", d.sessions_per_address),
            unauthenticated_per_address: f.take("unauthenticated_per_address", d.unauthenticated_per_address),
            forwards_per_session: f.take("forwards_per_session", d.forwards_per_session),
            sockets_per_key: f.take("sockets_per_key", d.sockets_per_key),
            connections_per_tunnel: f.take("connections_per_tunnel", d.connections_per_tunnel),
            open_deadline: f.take("open_deadline", d.open_deadline),
            open_patience: f.take("open_patience", d.open_patience),
            keepalive: f.take("keepalive", d.keepalive),
            keepalive_deadline: f.take("keepalive_deadline", d.keepalive_deadline),
            window,
            window_max,
            node_buffer,
            rekey_bytes,
            rekey_after: f.take("rekey_after", d.rekey_after),
            nist_curves: f.take("nist_curves", d.nist_curves),
            tunnel_buffer,
        };
        // A zero would refuse everybody, ask without a pause, or never end a stall.
        let s = &settings;
        for (key, is_zero) in [
            ("login_deadline", s.login_deadline.is_zero()),
            ("open_deadline", s.open_deadline.is_zero()),
            ("rekey_after", s.rekey_after.is_zero()),
            ("keepalive", s.keepalive.is_zero()),
            ("keepalive_deadline", s.keepalive_deadline.is_zero()),
            ("auth_attempts", s.auth_attempts == 0),
            ("sessions", s.sessions == 0),
            ("sessions_per_address", s.sessions_per_address == 0),
            ("unauthenticated_per_address", s.unauthenticated_per_address == 0),
            ("forwards_per_session", s.forwards_per_session == 0),
            ("connections_per_tunnel", s.connections_per_tunnel == 0),
        ] {
            if is_zero {
                f.mistake(key, "is zero".into(), "write a value above zero".into());
            }
        }
        settings
    }
}

/// A tunnel as one session serves it.
pub struct Attachment {
    /// Its number, which no other of this node ever has.
    pub id: u64,
    /// The session.
    pub session: Arc<Session>,
    /// Which tunnel.
    pub tunnel: TunnelId,
    /// How its channels are opened.
    pub bind: Bind,
    /// When it was registered.
    pub since: SystemTime,
    /// The record under which the session was last found entitled.
    entitled: Mutex<Arc<Tunnel>>,
    /// Checks of its origin fail.
    fails: AtomicBool,
}

impl Attachment {
    /// Whether checks of its origin fail: visitors go there if nobody else serves them.
    pub fn fails(&self) -> bool {
        self.fails.load(Ordering::Relaxed)
    }
}

/// Keeps a tunnel attached to a session; dropping it detaches.
pub(crate) struct Attached {
    tunnels: Arc<Tunnels>,
    attachment: Arc<Attachment>,
    /// The type, where its name was made up.
    made_up: Option<SocketType>,
    _present: Present,
}

/// What the SSH side needs besides its knobs.
pub struct Parts {
    /// The route table.
    pub routes: Arc<Routes>,
    /// Where sockets made on demand are written.
    pub records: Arc<Records>,
    /// Gives leases for what lives only as long as a session.
    pub feed: Arc<dyn Feed>,
    /// The last revision that acts on every visitor.
    pub applied: tokio::sync::watch::Receiver<u64>,
    /// Why a socket's own port could not be opened, if so.
    pub port_trouble: Box<dyn Fn(u16) -> Option<String> + Send + Sync>,
    /// How owners are told where they are published.
    pub urls: Urls,
    /// Keyed hash for made-up names; secret, kept between runs.
    pub name_key: [u8; 32],
    /// Tracks every task of every session.
    pub tasks: TaskTracker,
    /// Per-address limits do not apply to loopback.
    pub exempt_loopback: bool,
}

/// Tunnels whose serving session may be another now, where somebody gathers them.
#[derive(Default)]
struct Changes {
    gathered: AtomicBool,
    tunnels: Mutex<HashSet<TunnelId>>,
    told: Notify,
}

impl Changes {
    fn tell(&self, tunnel: &TunnelId) {
        if self.gathered.load(Ordering::Acquire) {
            self.tunnels.lock().insert(tunnel.clone());
            self.told.notify_one();
        }
    }
}

/// All live tunnels of this node.
pub struct Tunnels {
    settings: SshSettings,
    live: DashMap<TunnelId, Vec<Arc<Attachment>>>,
    sessions: DashMap<u64, Arc<Session>>,
    next_id: AtomicU64,
    routes: Arc<Routes>,
    records: Arc<Records>,
    feed: Arc<dyn Feed>,
    applied: tokio::sync::watch::Receiver<u64>,
    port_trouble: Box<dyn Fn(u16) -> Option<String> + Send + Sync>,
    urls: Urls,
    name_key: [u8; 32],
    tasks: TaskTracker,
    per_address: PerAddress,
    unauthenticated: PerAddress,
    changes: Changes,
    session_count: Arc<std::sync::atomic::AtomicUsize>,
    revoked: RevokedKeys,
}

impl Tunnels {
    /// No session yet.
    ///
    /// # Errors
    /// Where `ssh.revoked_keys` cannot be read.
    pub fn new(settings: SshSettings, parts: Parts) -> Result<Arc<Self>, String> {
        let revoked = RevokedKeys::new(settings.revoked_keys.clone())?;
        Ok(Arc::new(Self {
            per_address: PerAddress::new(settings.sessions_per_address, parts.exempt_loopback),
            unauthenticated: PerAddress::new(settings.unauthenticated_per_address, parts.exempt_loopback),
            settings,
            live: DashMap::new(),
            sessions: DashMap::new(),
            next_id: AtomicU64::new(1),
            routes: parts.routes,
            records: parts.records,
            feed: parts.feed,
            applied: parts.applied,
            port_trouble: parts.port_trouble,
            urls: parts.urls,
            name_key: parts.name_key,
            tasks: parts.tasks,
            changes: Changes::default(),
            session_count: Arc::default(),
            revoked,
        }))
    }

    /// The knobs.
    pub fn settings(&self) -> &SshSettings {
        &self.settings
    }

    /// The sessions that serve a tunnel and still may, the latest login first;
    /// the others are silent standbys. Before them those whose origin fails its checks
    /// have to step back.
    pub fn candidates(&self, tunnel: &TunnelId) -> Vec<Arc<Attachment>> {
        let Some(record) = self.routes.tunnel(tunnel) else { return Vec::new() };
        let Some(attached) = self.live.get(tunnel) else { return Vec::new() };
        let mut candidates: Vec<_> = attached.iter().rev().filter(|a| self.is_entitled(a, &record)).cloned().collect();
        candidates.sort_by_key(|attachment| attachment.fails());
        candidates
    }

    /// Where the latest login of a tunnel is served, of those here.
    pub fn core(&self, tunnel: &TunnelId) -> Option<Core> {
        self.live.get(tunnel)?.last()?.session.core
    }

    /// Whether checks fail of all that serve a tunnel here.
    pub fn fails(&self, tunnel: &TunnelId) -> bool {
        self.live.get(tunnel).is_some_and(|all| all.iter().all(|attachment| attachment.fails()))
    }

    /// The tunnels of which that is so.
    pub fn failing(&self) -> Vec<TunnelId> {
        let fails = |all: &Vec<Arc<Attachment>>| all.iter().all(|attachment| attachment.fails());
        self.live.iter().filter(|live| fails(live.value())).map(|live| live.key().clone()).collect()
    }

    /// Takes in that checks of an origin fail from now on, and why, or pass. Its owner
    /// is told.
    pub fn checked(&self, attachment: &Attachment, failure: Option<&str>) {
        if attachment.fails.swap(failure.is_some(), Ordering::Relaxed) == failure.is_some() {
            return;
        }
        let (tunnel, console) = (&attachment.tunnel, &attachment.session.console);
        match failure {
            Some(why) => {
                tracing::info!(%tunnel, session = attachment.session.id, why, "checks fail");
                console.say(format!("{tunnel}: checks fail ({why}); visitors go elsewhere if they can"));
            }
            None => {
                tracing::info!(%tunnel, session = attachment.session.id, "checks pass again");
                console.say(format!("{tunnel}: checks pass again"));
            }
        }
        self.changes.tell(tunnel);
    }

    /// Whether the session's key is still in the tunnel's record: checked anew
    /// when the record has changed.
    fn is_entitled(&self, attachment: &Attachment, record: &Arc<Tunnel>) -> bool {
        let mut entitled = attachment.entitled.lock();
        if Arc::ptr_eq(&entitled, record) {
            return true;
        }
        let session = &attachment.session;
        let may = session.login.get().is_some_and(|login| match login {
            // What a login without a key made stays its maker's until a record gives it keys.
            keys::Login::Nobody => {
                record.keys.is_empty() && record.cert_authorities.is_empty() && session.made.lock().contains(&record.id)
            }
            login => login.may_serve(session.user(), record, &self.settings.cert_authorities),
        });
        if may {
            *entitled = Arc::clone(record);
        }
        may
    }

    /// A tunnel's record.
    pub fn record(&self, tunnel: &TunnelId) -> Option<Arc<Tunnel>> {
        self.routes.tunnel(tunnel)
    }

    /// Opens a way to the origin through one session.
    ///
    /// # Errors
    /// `OriginRefused`, `TunnelSilent`, `TunnelLost`, `TunnelLimit`.
    pub async fn open(&self, attachment: &Attachment, visitor: &Visitor) -> Result<Stream, Error> {
        attachment.session.open(self, &attachment.bind, visitor).await
    }

    /// An open through this session is slow.
    pub fn suspect(&self, attachment: &Attachment) {
        attachment.session.suspect();
    }

    /// All sessions, for status and drain.
    pub fn sessions(&self) -> Vec<Arc<Session>> {
        self.sessions.iter().map(|s| Arc::clone(s.value())).collect()
    }

    /// The live tunnels with their sessions, the latest login first.
    pub fn live(&self) -> HashMap<TunnelId, Vec<Arc<Session>>> {
        let sessions = |all: &Vec<Arc<Attachment>>| all.iter().rev().map(|a| Arc::clone(&a.session)).collect();
        self.live.iter().map(|t| (t.key().clone(), sessions(t.value()))).collect()
    }

    /// What serves a tunnel here: of the latest login, if its origin does not fail its checks.
    pub fn serving(&self, tunnel: &TunnelId) -> Option<Arc<Attachment>> {
        let all = self.live.get(tunnel)?;
        all.iter().rev().find(|attachment| !attachment.fails()).or(all.last()).map(Arc::clone)
    }

    /// The sessions that have a tunnel here, standbys included.
    pub fn sessions_of(&self, tunnel: &TunnelId) -> Vec<Arc<Session>> {
        let attached = self.live.get(tunnel);
        attached.map(|all| all.iter().map(|one| Arc::clone(&one.session)).collect()).unwrap_or_default()
    }

    /// Whether a session lives.
    pub fn has_session(&self, id: u64) -> bool {
        self.sessions.contains_key(&id)
    }

    /// From now on tunnels whose session changes are gathered for `take_changes`.
    pub fn gather_changes(&self) {
        self.changes.gathered.store(true, Ordering::Release);
    }

    /// The tunnels that changed since they were taken last.
    pub fn take_changes(&self) -> HashSet<TunnelId> {
        std::mem::take(&mut self.changes.tunnels.lock())
    }

    /// Waits until there is something to take.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn wait_changes(&self) {
        self.changes.told.notified().await;
    }

    /// Attaches a tunnel to a session; the latest login wins, older ones stay
    /// as silent standbys, and both are told.
    fn attach(self: &Arc<Self>, session: &Arc<Session>, tunnel: &Arc<Tunnel>, bind: Bind) -> Attached {
        let attachment = Arc::new(Attachment {
            id: self.next_id.fetch_add(1, Ordering::Relaxed),
            session: Arc::clone(session),
            tunnel: tunnel.id.clone(),
            bind,
            since: SystemTime::now(),
            entitled: Mutex::new(Arc::clone(tunnel)),
            fails: AtomicBool::new(false),
        });
        // In the order of logins: who asks again later does not become newer.
        let (ahead, behind) = {
            let mut all = self.live.entry(tunnel.id.clone()).or_default();
            let place = all.partition_point(|a| a.session.login_order() <= session.login_order());
            let other = |a: Option<&Arc<Attachment>>| a.map(|a| Arc::clone(&a.session)).filter(|s| s.id != session.id);
            let (ahead, behind) = (other(all.last()).filter(|_| place < all.len()), other(all.last()));
            all.insert(place, Arc::clone(&attachment));
            (ahead, behind)
        };
        self.changes.tell(&tunnel.id);
        if let Some(newer) = ahead {
            let peer = newer.peer.ip();
            session.console.say(format!("{}: a newer login from {peer} serves; this session stands by", tunnel.id));
        } else if let Some(older) = behind {
            tracing::info!(tunnel = %tunnel.id, newer = session.id, older = older.id, "latest login wins");
            let (from, to) = (older.peer.ip(), session.peer.ip());
            let id = &tunnel.id;
            older.console.say(format!("{id}: a newer login from {to} serves now; this session stands by"));
            session.console.say(format!("{id}: took over from an older login from {from}, which stands by"));
        }
        Attached {
            tunnels: Arc::clone(self),
            attachment,
            made_up: None,
            _present: Present::new(metrics::gauge!("adit_tunnels_attached")),
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let Attachment { tunnel, session, .. } = &*self.attachment;
        let mut promoted = None;
        if let Some(mut all) = self.tunnels.live.get_mut(tunnel) {
            let was_serving = all.last().is_some_and(|a| Arc::ptr_eq(a, &self.attachment));
            all.retain(|a| !Arc::ptr_eq(a, &self.attachment));
            promoted = all.last().filter(|_| was_serving).map(|a| Arc::clone(&a.session));
        }
        self.tunnels.live.remove_if(tunnel, |_, all| all.is_empty());
        self.tunnels.changes.tell(tunnel);
        if let Some(standby) = promoted.filter(|s| s.id != session.id) {
            tracing::info!(%tunnel, session = standby.id, gone = session.id, "a standby serves again");
            standby.console.say(format!("{tunnel}: the newer login is gone; this session serves again"));
        }
    }
}
