//! The route table: which socket answers to this name or port, which tunnels
//! serve it, which key may serve which tunnel. Written by the feed's follower
//! alone, read by every visit; a lookup hands out an `Arc`, never a map guard.

mod inside;

use std::hash::Hash;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use dashmap::{DashMap, DashSet};
use parking_lot::Mutex;
use smallvec::SmallVec;
use tokio_util::sync::CancellationToken;

use self::inside::Inside;
pub use self::inside::Stay;
use crate::error::Error;
use crate::model::{AuthorizedKey, HostName, Socket, SocketId, Tunnel, TunnelId};
use crate::tls::{Client, ClientAuth};

/// All that a visit needs to know of its socket.
#[derive(Debug)]
pub struct Route {
    /// The record.
    pub socket: Socket,
    /// The tunnels that serve it, by id.
    pub tunnels: Vec<TunnelId>,
    /// What outlives a change of the record.
    pub state: Arc<RouteState>,
    /// What the record asks of visitors' certificates, made when first needed.
    client_auth: OnceLock<Result<Option<Arc<ClientAuth>>, Error>>,
}

/// The part of a route that a new version of its record takes over.
#[derive(Debug, Default)]
pub struct RouteState {
    turn: AtomicUsize,
    /// The tunnel that was the nearest last, by a hash of its id.
    pub nearest: AtomicU64,
    /// Visitors connected to this socket now.
    pub visitors: Arc<AtomicUsize>,
}

impl Route {
    /// What it asks of visitors' certificates; none where it asks for none.
    ///
    /// # Errors
    /// `Internal`: its CAs cannot be used, so nobody comes in.
    pub fn client_auth(&self) -> Result<Option<&Arc<ClientAuth>>, Error> {
        let made = self.client_auth.get_or_init(|| {
            let Some(gate) = &self.socket.gate else { return Ok(None) };
            ClientAuth::new(gate).map_err(|why| {
                tracing::error!(socket = self.socket.id.as_str(), why, "client certificates cannot be verified");
                Error::Internal
            })
        });
        made.as_ref().map(Option::as_ref).map_err(|error| *error)
    }

    /// Whether visitors from there may come at all.
    ///
    /// # Errors
    /// `Forbidden`.
    pub fn admits_address(&self, ip: IpAddr) -> Result<(), Error> {
        let rules = self.socket.gate.as_ref().and_then(|gate| gate.ip.as_ref());
        if rules.is_none_or(|rules| rules.allows(ip)) { Ok(()) } else { Err(Error::Forbidden) }
    }

    /// Whether a raw connection from there, of who showed this certificate if any,
    /// may be here.
    fn admits_raw(&self, ip: IpAddr, client: Option<&Client>) -> Result<(), Error> {
        self.admits_address(ip)?;
        // It was raw when they came, and is HTTP with logins now.
        if self.socket.gate.as_ref().is_some_and(|gate| gate.asks_identity()) {
            return Err(Error::Forbidden);
        }
        match (self.client_auth()?, client) {
            (None, _) => Ok(()),
            (Some(auth), Some(client)) if auth.admits(client) => Ok(()),
            _ => Err(Error::ClientCertificate),
        }
    }
}

impl RouteState {
    /// Which visit this is, so that several tunnels take turns.
    pub fn turn(&self) -> usize {
        self.turn.fetch_add(1, Ordering::Relaxed)
    }
}

/// Parts of a map that grow each for itself, under its lock: of a million names one
/// part's move takes less than a millisecond, and with the default of 8 on two cores
/// 10 ms, for which visitors would wait. Few enough that their locks stay in a core's
/// cache.
const SHARDS: usize = 128;

/// A map as large as the table. Its hasher is seeded at random, as the standard one is,
/// and quick enough that one lookup's misses of the CPU's caches overlap the next one's.
type Map<K, V> = DashMap<K, V, ahash::RandomState>;

fn map<K: Eq + Hash, V>() -> Map<K, V> {
    DashMap::with_hasher_and_shard_amount(ahash::RandomState::default(), SHARDS)
}

/// A host name or wildcard, kept in the map itself unless it is long: elsewhere it
/// would cost each lookup one more miss of the CPU's caches.
type Name = SmallVec<[u8; 40]>;

/// The table. Cheap to read from any thread.
#[derive(Debug)]
pub struct Routes {
    by_id: Map<SocketId, Arc<Route>>,
    by_host: Map<Name, Arc<Route>>,
    by_port: DashMap<u16, Arc<Route>>,
    tunnels: Map<TunnelId, Arc<Tunnel>>,
    by_relay: DashMap<(Box<str>, u16), TunnelId>,
    of_socket: Map<SocketId, Vec<TunnelId>>,
    by_key: Map<Box<str>, Vec<TunnelId>>,
    by_authority: Map<Box<str>, Vec<TunnelId>>,
    checked: DashSet<SocketId>,
    inside: Arc<Inside>,
    /// Held by the one writer; guards against a second.
    writer: Mutex<()>,
}

impl Default for Routes {
    fn default() -> Self {
        Self {
            by_id: map(),
            by_host: map(),
            by_port: DashMap::default(),
            tunnels: map(),
            by_relay: DashMap::default(),
            of_socket: map(),
            by_key: map(),
            by_authority: map(),
            checked: DashSet::default(),
            inside: Arc::default(),
            writer: Mutex::default(),
        }
    }
}

impl Routes {
    /// The socket that answers to this name: exact names beat wildcards, a
    /// wildcard is one label deep. `host` is lower case, without port.
    pub fn by_host(&self, host: &str) -> Option<Arc<Route>> {
        if let Some(exact) = self.by_host.get(host.as_bytes()) {
            return Some(Arc::clone(&exact));
        }
        let (_, rest) = host.split_once('.')?;
        // The only allocation of a lookup, and only for names without an exact entry.
        let mut wildcard = String::with_capacity(rest.len() + 2);
        wildcard.push_str("*.");
        wildcard.push_str(rest);
        self.by_host.get(wildcard.as_bytes()).map(|r| Arc::clone(&r))
    }

    /// The socket that owns this port.
    pub fn by_port(&self, port: u16) -> Option<Arc<Route>> {
        self.by_port.get(&port).map(|r| Arc::clone(&r))
    }

    /// The socket with this id.
    pub fn socket(&self, id: &SocketId) -> Option<Arc<Route>> {
        self.by_id.get(id).map(|r| Arc::clone(&r))
    }

    /// A place inside for a raw connection that found its way to `route`, where the
    /// socket's record, as it is now, admits it. `cut` is cancelled when it no longer
    /// does.
    ///
    /// # Errors
    /// `Forbidden`, `ClientCertificate`, or `Internal` where that cannot be told.
    pub fn let_in(
        &self,
        route: &Route,
        ip: IpAddr,
        client: Option<Client>,
        cut: CancellationToken,
    ) -> Result<Stay, Error> {
        let stay = self.inside.enter(&route.socket.id, ip, client, cut);
        // Looked up once it is registered: of a change before this is the outcome, and
        // a later one finds it inside.
        let now = self.socket(&route.socket.id);
        now.as_deref().unwrap_or(route).admits_raw(ip, stay.client())?;
        Ok(stay)
    }

    /// The socket that a tunnel serves.
    pub fn socket_of(&self, tunnel: &TunnelId) -> Option<Arc<Route>> {
        self.socket(&self.tunnel(tunnel)?.socket)
    }

    /// The sockets whose tunnels are to be checked.
    pub fn checked(&self) -> Vec<Arc<Route>> {
        self.checked.iter().filter_map(|id| self.socket(&id)).collect()
    }

    /// The tunnel with this id.
    pub fn tunnel(&self, id: &TunnelId) -> Option<Arc<Tunnel>> {
        self.tunnels.get(id).map(|t| Arc::clone(&t))
    }

    /// The tunnel that (SSH user, relay port) names.
    pub fn by_relay(&self, user: &str, port: u16) -> Option<Arc<Tunnel>> {
        // A borrowed pair cannot look up an owned one; logins are rare.
        let id = self.by_relay.get(&(user.into(), port)).map(|id| id.clone())?;
        self.tunnel(&id)
    }

    /// The tunnels of a socket, by id.
    pub fn tunnels_of(&self, socket: &SocketId) -> Vec<Arc<Tunnel>> {
        let ids = self.of_socket.get(socket).map(|ids| ids.clone()).unwrap_or_default();
        ids.iter().filter_map(|id| self.tunnel(id)).collect()
    }

    /// Whether any tunnel's record names this key (by fingerprint).
    pub fn knows_key(&self, fingerprint: &str) -> bool {
        self.by_key.contains_key(fingerprint)
    }

    /// How many tunnels' records name this key (by fingerprint).
    pub fn tunnels_of_key(&self, fingerprint: &str) -> usize {
        self.by_key.get(fingerprint).map_or(0, |ids| ids.len())
    }

    /// Whether any tunnel's record trusts this CA (by fingerprint).
    pub fn knows_authority(&self, fingerprint: &str) -> bool {
        self.by_authority.contains_key(fingerprint)
    }

    /// Whether any tunnel's record trusts a CA.
    pub fn has_authorities(&self) -> bool {
        !self.by_authority.is_empty()
    }

    /// All ports that sockets own, for the listeners.
    pub fn ports(&self) -> Vec<u16> {
        self.by_port.iter().map(|r| *r.key()).collect()
    }

    /// How many sockets and tunnels there are.
    pub fn size(&self) -> (usize, usize) {
        (self.by_id.len(), self.tunnels.len())
    }

    /// The ids of all sockets, for a resync's diff.
    pub fn socket_ids(&self) -> Vec<SocketId> {
        self.by_id.iter().map(|r| r.key().clone()).collect()
    }

    /// The ids of all tunnels, for a resync's diff.
    pub fn tunnel_ids(&self) -> Vec<TunnelId> {
        self.tunnels.iter().map(|r| r.key().clone()).collect()
    }

    /// Puts a socket in, in place of its former version.
    pub fn put_socket(&self, socket: Socket) {
        let _writer = self.writer.lock();
        let old = self.by_id.get(&socket.id).map(|r| Arc::clone(&r));
        let tunnels = self.of_socket.get(&socket.id).map(|t| t.clone()).unwrap_or_default();
        let state = old.as_ref().map(|r| Arc::clone(&r.state)).unwrap_or_default();
        let same_gate = old.as_ref().is_some_and(|old| old.socket.gate == socket.gate);
        let new = Arc::new(Route { socket, tunnels, state, client_auth: OnceLock::new() });
        match new.socket.check {
            Some(_) => drop(self.checked.insert(new.socket.id.clone())),
            None => drop(self.checked.remove(&new.socket.id)),
        }
        self.publish(Arc::clone(&new), old.as_deref());
        if !same_gate {
            self.inside.sift(&new.socket.id, |guest| new.admits_raw(guest.ip, guest.client.as_ref()));
        }
    }

    /// Takes a socket out. Visits that hold its `Arc` go on.
    pub fn remove_socket(&self, id: &SocketId) {
        let _writer = self.writer.lock();
        self.checked.remove(id);
        if let Some((_, old)) = self.by_id.remove(id) {
            self.unpublish_names(&old, |_| true, |_| true);
        }
    }

    /// Puts a tunnel in, in place of its former version: what is new first, so
    /// that what both have is never missing in between.
    pub fn put_tunnel(&self, tunnel: Tunnel) {
        let _writer = self.writer.lock();
        let tunnel = Arc::new(tunnel);
        let (id, socket) = (&tunnel.id, &tunnel.socket);
        if let (Some(user), Some(port)) = (&tunnel.user, tunnel.relay_port) {
            self.by_relay.insert((user.as_str().into(), port), id.clone());
        }
        for key in &tunnel.keys {
            insert_sorted(&mut self.by_key.entry(key.fingerprint.as_str().into()).or_default(), id);
        }
        for ca in &tunnel.cert_authorities {
            insert_sorted(&mut self.by_authority.entry(ca.fingerprint.as_str().into()).or_default(), id);
        }
        let old = self.tunnels.insert(id.clone(), Arc::clone(&tunnel));
        let grown = insert_sorted(&mut self.of_socket.entry(socket.clone()).or_default(), id);
        if grown {
            self.republish(socket);
        }
        if let Some(old) = old {
            self.forget_tunnel(&old, Some(&tunnel));
        }
    }

    /// Takes a tunnel out.
    pub fn remove_tunnel(&self, id: &TunnelId) {
        let _writer = self.writer.lock();
        if let Some((_, old)) = self.tunnels.remove(id) {
            self.forget_tunnel(&old, None);
        }
    }

    /// Takes out what a tunnel had and its new version, if any, has not.
    fn forget_tunnel(&self, old: &Tunnel, new: Option<&Tunnel>) {
        if let (Some(user), Some(port)) = (&old.user, old.relay_port)
            && new.is_none_or(|new| (&new.user, new.relay_port) != (&old.user, old.relay_port))
        {
            self.by_relay.remove_if(&(user.as_str().into(), port), |_, id| *id == old.id);
        }
        for key in old.keys.iter().filter(|key| new.is_none_or(|new| !has(&new.keys, key))) {
            remove_sorted(&self.by_key, key.fingerprint.as_str(), &old.id);
        }
        for ca in old.cert_authorities.iter().filter(|ca| new.is_none_or(|new| !has(&new.cert_authorities, ca))) {
            remove_sorted(&self.by_authority, ca.fingerprint.as_str(), &old.id);
        }
        if new.is_none_or(|new| new.socket != old.socket) {
            if let Some(mut ids) = self.of_socket.get_mut(&old.socket) {
                ids.retain(|id| *id != old.id);
            }
            self.of_socket.remove_if(&old.socket, |_, ids| ids.is_empty());
            self.republish(&old.socket);
        }
    }

    /// A socket's tunnels changed: a new `Route` with the same record.
    fn republish(&self, id: &SocketId) {
        if let Some(old) = self.socket(id) {
            let tunnels = self.of_socket.get(id).map(|t| t.clone()).unwrap_or_default();
            let client_auth = old.client_auth.clone();
            let new = Route { socket: old.socket.clone(), tunnels, state: Arc::clone(&old.state), client_auth };
            self.publish(Arc::new(new), Some(&old));
        }
    }

    /// New names first, then the old ones that are no longer wanted, so that a
    /// name both have is never missing in between.
    fn publish(&self, new: Arc<Route>, old: Option<&Route>) {
        if new.socket.kind.by_name() {
            for name in &new.socket.hostnames {
                self.by_host.insert(Name::from_slice(name.as_str().as_bytes()), Arc::clone(&new));
            }
        }
        for port in &new.socket.ports {
            self.by_port.insert(*port, Arc::clone(&new));
        }
        if let Some(old) = old {
            let (named, socket) = (new.socket.kind.by_name(), &new.socket);
            self.unpublish_names(
                old,
                |name| !named || !socket.hostnames.iter().any(|n| n.as_str() == name),
                |port| !socket.ports.contains(&port),
            );
        }
        self.by_id.insert(new.socket.id.clone(), new);
    }

    fn unpublish_names(&self, old: &Route, drop_name: impl Fn(&str) -> bool, drop_port: impl Fn(u16) -> bool) {
        for name in old.socket.hostnames.iter().map(|n| n.as_str()).filter(|n| drop_name(n)) {
            self.by_host.remove_if(name.as_bytes(), |_, r| r.socket.id == old.socket.id);
        }
        for port in old.socket.ports.iter().filter(|p| drop_port(**p)) {
            self.by_port.remove_if(port, |_, r| r.socket.id == old.socket.id);
        }
    }

    /// Whether a TLS connection made for `sni` may carry a request for `host`
    /// by name alone: the same name. (Coalescing is decided by the certificate.)
    pub fn same_name(sni: Option<&HostName>, host: &str) -> bool {
        sni.is_some_and(|sni| sni.as_str() == host)
    }
}

fn has(keys: &[AuthorizedKey], key: &AuthorizedKey) -> bool {
    keys.iter().any(|k| k.fingerprint == key.fingerprint)
}

/// Whether it was not there yet.
fn insert_sorted(ids: &mut Vec<TunnelId>, id: &TunnelId) -> bool {
    match ids.binary_search(id) {
        Ok(_) => false,
        Err(at) => {
            ids.insert(at, id.clone());
            true
        }
    }
}

fn remove_sorted(map: &Map<Box<str>, Vec<TunnelId>>, key: &str, id: &TunnelId) {
    if let Some(mut ids) = map.get_mut(key) {
        ids.retain(|i| i != id);
    }
    map.remove_if(key, |_, ids| ids.is_empty());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SocketType;

    fn socket(id: &str, kind: SocketType, hosts: &[&str], ports: &[u16]) -> Socket {
        let mut socket = Socket::new(id.parse().unwrap(), kind);
        socket.hostnames = hosts.iter().map(|h| h.parse().unwrap()).collect();
        socket.ports = ports.to_vec();
        socket
    }

    fn id_of(route: Option<Arc<Route>>) -> Option<String> {
        route.map(|r| r.socket.id.to_string())
    }

    #[test]
    fn exact_names_beat_wildcards_and_a_wildcard_is_one_label_deep() {
        let routes = Routes::default();
        routes.put_socket(socket("any", SocketType::Http, &["*.example.com"], &[]));
        routes.put_socket(socket("web", SocketType::Http, &["web.example.com"], &[]));
        assert_eq!(id_of(routes.by_host("web.example.com")).as_deref(), Some("web"));
        assert_eq!(id_of(routes.by_host("x.example.com")).as_deref(), Some("any"));
        assert_eq!(id_of(routes.by_host("a.x.example.com")), None);
        assert_eq!(id_of(routes.by_host("example.com")), None);
    }

    #[test]
    fn a_changed_record_drops_only_the_names_it_lost() {
        let routes = Routes::default();
        routes.put_socket(socket("a", SocketType::Http, &["a.test", "b.test"], &[]));
        routes.put_socket(socket("a", SocketType::Http, &["b.test", "c.test"], &[]));
        assert_eq!(id_of(routes.by_host("a.test")), None);
        assert!(routes.by_host("b.test").is_some() && routes.by_host("c.test").is_some());
        routes.put_socket(socket("a", SocketType::Tcp, &[], &[20000]));
        assert!(routes.by_host("b.test").is_none() && routes.by_port(20000).is_some());
        routes.remove_socket(&"a".parse().unwrap());
        assert!(routes.by_port(20000).is_none() && routes.size() == (0, 0));
    }

    #[test]
    fn a_replaced_tunnel_is_never_missing_in_between() {
        let routes = Routes::default();
        let mut tunnel = Tunnel::new("t".parse().unwrap(), "a".parse().unwrap());
        (tunnel.user, tunnel.relay_port) = (Some("u".to_owned()), Some(5000));
        tunnel.keys = vec![AuthorizedKey { line: "l".to_owned(), fingerprint: "f".to_owned() }];
        routes.put_tunnel(tunnel.clone());
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let until = std::time::Instant::now() + std::time::Duration::from_millis(300);
                while std::time::Instant::now() < until {
                    routes.put_tunnel(tunnel.clone());
                }
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                assert!(routes.tunnel(&tunnel.id).is_some(), "the tunnel was missing");
                assert!(routes.by_relay("u", 5000).is_some(), "its relay port was missing");
                assert!(routes.knows_key("f"), "its key was missing");
            }
        });
        let mut other = Tunnel::new("t".parse().unwrap(), "b".parse().unwrap());
        other.keys = vec![AuthorizedKey { line: "g".to_owned(), fingerprint: "g".to_owned() }];
        routes.put_tunnel(other);
        assert!(routes.by_relay("u", 5000).is_none() && !routes.knows_key("f") && routes.knows_key("g"));
        assert!(routes.tunnels_of(&"a".parse().unwrap()).is_empty());
        assert_eq!(routes.tunnels_of(&"b".parse().unwrap()).len(), 1);
        routes.remove_tunnel(&tunnel.id);
        assert!(routes.by_key.is_empty() && routes.of_socket.is_empty() && routes.tunnels.is_empty());
    }

    #[test]
    fn tunnels_follow_their_records_and_turns_outlast_them() {
        let routes = Routes::default();
        let (one, two): (TunnelId, TunnelId) = ("t1".parse().unwrap(), "t2".parse().unwrap());
        routes.put_tunnel(Tunnel::new(one.clone(), "a".parse().unwrap()));
        routes.put_socket(socket("a", SocketType::Http, &["a.test"], &[]));
        routes.put_tunnel(Tunnel::new(two.clone(), "a".parse().unwrap()));
        assert_eq!(routes.by_host("a.test").unwrap().tunnels, [one.clone(), two.clone()]);
        let turns = [routes.by_host("a.test").unwrap().state.turn(), routes.by_host("a.test").unwrap().state.turn()];
        assert_eq!(turns, [0, 1]);
        routes.remove_tunnel(&one);
        assert_eq!(routes.by_host("a.test").unwrap().tunnels, [two]);
        assert_eq!(routes.by_host("a.test").unwrap().state.turn(), 2);
    }

    fn with_gate(gate: serde_json::Value) -> Socket {
        let record = serde_json::json!({"type": "tcp", "ports": [20000], "gate": gate});
        Socket::from_record(&"a".parse().unwrap(), record.as_object().cloned().unwrap()).unwrap()
    }

    #[test]
    fn a_changed_gate_puts_out_whom_it_no_longer_admits_and_lets_nobody_in_who_came_before_it() {
        let routes = Routes::default();
        let (one, two) = ("127.0.0.1".parse().unwrap(), "127.0.0.2".parse().unwrap());
        let deny = |ip: IpAddr| with_gate(serde_json::json!({"ip": {"deny": [ip.to_string()]}}));
        let enter = |route: &Route, ip| routes.let_in(route, ip, None, CancellationToken::new());
        routes.put_socket(with_gate(serde_json::Value::Null));
        let before = routes.by_port(20000).unwrap();
        let (first, second) = (enter(&before, one).unwrap(), enter(&before, two).unwrap());
        routes.put_socket(deny(one));
        assert!(first.cut().is_cancelled() && first.allowed() == Err(Error::Forbidden));
        assert!(!second.cut().is_cancelled() && second.allowed().is_ok());
        // Who found their way by the record before it.
        assert_eq!(enter(&before, one).unwrap_err(), Error::Forbidden);
        let third = enter(&before, two).unwrap();
        // A socket that is gone ends nobody; one that comes back has a say.
        routes.remove_socket(&before.socket.id);
        assert!(!second.cut().is_cancelled());
        routes.put_socket(deny(two));
        assert!(second.cut().is_cancelled() && third.cut().is_cancelled());
        drop((first, second, third));
        assert_eq!(routes.inside.len(), 0);
    }

    #[test]
    fn a_raw_visitor_has_no_place_in_what_asks_for_a_login_or_a_certificate_now() {
        let routes = Routes::default();
        routes.put_socket(with_gate(serde_json::Value::Null));
        let route = routes.by_port(20000).unwrap();
        let stay = || routes.let_in(&route, "127.0.0.1".parse().unwrap(), None, CancellationToken::new());
        let ca = rcgen::generate_simple_self_signed(["ca.test".to_owned()]).unwrap().cert.pem();
        let certificates = serde_json::json!({"client_certificates": {"ca_pem": ca, "allow_subjects": ["*"]}});
        let login = serde_json::json!({"service_tokens": [{"name": "t", "token_hash": "00".repeat(32)}]});
        for (kind, gate, error) in [("tls", certificates, Error::ClientCertificate), ("http", login, Error::Forbidden)]
        {
            let inside = stay().unwrap();
            let record = serde_json::json!({"type": kind, "gate": gate});
            routes.put_socket(Socket::from_record(&route.socket.id, record.as_object().cloned().unwrap()).unwrap());
            assert_eq!((inside.allowed(), stay().unwrap_err()), (Err(error), error));
            routes.put_socket(with_gate(serde_json::Value::Null));
        }
    }
}
