//! From what an owner asks for to the tunnel that their session serves: found
//! in the records, or (open mode) made on demand and kept for their key.

use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hmac;
use tokio::time::timeout;

use super::keys::Login;
use super::naming::{Refusal, Wanted, made_up_name};
use super::{Attached, Bind, Mode, Session, Tunnels};
use crate::feed::records::RecordError;
use crate::fields::PortRange;
use crate::model::{HostName, Socket, SocketType, Tunnel, TunnelId};
use crate::routes::Route;

/// A record just written must show in the route table within this.
const APPLY_DEADLINE: Duration = Duration::from_secs(2);

/// A lease of a session without a key: the store's own process ends it at once,
/// a fleet's engine after this.
const LEASE: Duration = Duration::from_secs(15);

/// How owners are told where they are published.
#[derive(Debug, Clone)]
pub struct Urls {
    /// Names made on demand live under this domain; none: no names are made.
    pub domain: Option<String>,
    /// The name of the allocated ports in URLs.
    pub host: String,
    /// The port of plain HTTP that visitors reach; none: not served.
    pub http_port: Option<u16>,
    /// The port of HTTPS that visitors reach; none: not served.
    pub https_port: Option<u16>,
    /// The allocatable ports.
    pub ports: PortRange,
}

impl Urls {
    /// Where visitors reach this socket, one URL a line.
    pub fn of(&self, socket: &Socket) -> Vec<String> {
        let port = |own: u16, usual: u16| if own == usual { String::new() } else { format!(":{own}") };
        let mut urls = Vec::new();
        for name in socket.hostnames.iter().filter(|n| socket.kind.by_name() && !n.is_wildcard()) {
            if let Some(https) = self.https_port {
                urls.push(format!("https://{name}{}/", port(https, 443)));
            }
            if let Some(http) = self.http_port.filter(|_| socket.kind != SocketType::Passthrough) {
                urls.push(format!("http://{name}{}/", port(http, 80)));
            }
        }
        for port in &socket.ports {
            let host = match socket.hostnames.first().filter(|n| !n.is_wildcard()) {
                Some(name) if socket.kind == SocketType::Tls => name.to_string(),
                _ => self.host.clone(),
            };
            urls.push(format!("{}://{host}:{port}", socket.kind));
        }
        urls
    }
}

/// A forward that was granted.
pub(super) struct Granted {
    pub(super) attached: Attached,
    /// What the reply carries where port 0 was asked for.
    pub(super) public_port: u16,
    /// What the owner is told.
    pub(super) told: String,
}

impl Tunnels {
    /// Grants a forward and keeps it with its session: its public port.
    ///
    /// # Errors
    /// The sentence that tells the owner why not.
    pub(super) async fn grant(
        self: &Arc<Self>,
        session: &Arc<Session>,
        wanted: Result<Wanted, Refusal>,
        bind: impl FnOnce(u16) -> Bind,
    ) -> Result<u16, Refusal> {
        if session.forwards.lock().len() >= self.settings.forwards_per_session {
            return Err("too many forwards in one session".to_owned());
        }
        let granted = self.register(session, wanted?, bind).await?;
        // Asked for twice, it is one forward.
        let same = |a: &Attached| {
            a.attachment.tunnel == granted.attached.attachment.tunnel
                && a.attachment.bind == granted.attached.attachment.bind
        };
        let mut forwards = session.forwards.lock();
        let (replaced, kept): (Vec<_>, Vec<_>) = std::mem::take(&mut *forwards).into_iter().partition(same);
        *forwards = kept;
        let tunnel = &granted.attached.attachment.tunnel;
        tracing::info!(session = session.id, peer = %session.peer, %tunnel, "registered");
        forwards.push(granted.attached);
        // One that ended meanwhile holds nothing: nobody would give it back.
        let late = if session.ended.is_cancelled() { std::mem::take(&mut *forwards) } else { Vec::new() };
        drop(forwards);
        drop((replaced, late));
        session.console.say(granted.told);
        Ok(granted.public_port)
    }

    /// Grants or refuses one forward of a logged-in session.
    ///
    /// # Errors
    /// The sentence that tells the owner why not.
    pub(super) async fn register(
        self: &Arc<Self>,
        session: &Arc<Session>,
        wanted: Wanted,
        bind: impl FnOnce(u16) -> Bind,
    ) -> Result<Granted, Refusal> {
        let login = session.login.get().ok_or("not logged in")?;
        let tunnel = match &wanted {
            Wanted::Relay(port) => self.by_relay(session, login, *port)?,
            Wanted::AnyName => {
                match self.by_relay(session, login, 80).or_else(|_| self.by_relay(session, login, 443)) {
                    Ok(tunnel) => tunnel,
                    Err(_) => self.made_up(session, login, SocketType::Http).await?,
                }
            }
            Wanted::AnyPort => self.made_up(session, login, SocketType::Tcp).await?,
            Wanted::Named { name, explicit, implied, port } => {
                self.by_name(session, login, name, *explicit, *implied, *port).await?
            }
        };
        let route = self.routes.socket(&tunnel.socket).ok_or_else(|| {
            format!("the tunnel {} belongs to the socket {}, which does not exist", tunnel.id, tunnel.socket)
        })?;
        let public_port = match (route.socket.ports.first(), self.urls.https_port.or(self.urls.http_port)) {
            (Some(own), _) => *own,
            (None, shared) => shared.unwrap_or(0),
        };
        let mut attached = self.attach(session, &tunnel, bind(public_port));
        attached.made_up = match wanted {
            Wanted::AnyName => Some(SocketType::Http),
            Wanted::AnyPort => Some(SocketType::Tcp),
            _ => None,
        };
        let urls = self.urls.of(&route.socket).join(" ");
        let title = route.socket.title.as_deref().unwrap_or(route.socket.id.as_str());
        let mut told = format!("{title} is published: {urls}");
        for trouble in route.socket.ports.iter().filter_map(|port| (self.port_trouble)(*port)) {
            told.push_str(&format!("\n{trouble}"));
        }
        Ok(Granted { attached, public_port, told })
    }

    fn by_relay(&self, session: &Session, login: &Login, port: u16) -> Result<Arc<Tunnel>, Refusal> {
        let user = session.user();
        let tunnel = self.routes.by_relay(user, port);
        tunnel.filter(|t| self.may_serve(session, login, t)).ok_or_else(|| {
            format!(
                "no tunnel with relay port {port} for the user {} and this key; \
                 to name a socket write -R NAME:{port}:HOST:PORT, for any public port -R 0:HOST:PORT",
                user.escape_debug()
            )
        })
    }

    fn may_serve(&self, session: &Session, login: &Login, tunnel: &Tunnel) -> bool {
        match login {
            Login::Nobody => session.made.lock().contains(&tunnel.id),
            login => login.may_serve(session.user(), tunnel, &self.settings.cert_authorities),
        }
    }

    /// The socket that a name means: its id, its host name, or a name under our domain.
    fn socket_named(&self, name: &str) -> Option<Arc<Route>> {
        let by_id = name.parse().ok().and_then(|id| self.routes.socket(&id));
        let exactly =
            |host: &str| self.routes.by_host(host).filter(|r| r.socket.hostnames.iter().any(|h| h.as_str() == host));
        let under_domain = || exactly(&format!("{name}.{}", self.urls.domain.as_ref()?));
        by_id.or_else(|| exactly(name)).or_else(under_domain)
    }

    async fn by_name(
        &self,
        session: &Session,
        login: &Login,
        name: &str,
        explicit: Option<SocketType>,
        implied: SocketType,
        port: Option<u16>,
    ) -> Result<Arc<Tunnel>, Refusal> {
        if let Some(route) = self.socket_named(name) {
            return self.of_socket(session, login, &route, explicit);
        }
        if self.settings.mode == Mode::Closed {
            return Err(format!("no socket named {name}: this node serves only sockets that its operator has made"));
        }
        self.make(session, login, name, explicit.unwrap_or(implied), port).await
    }

    /// The tunnel of an existing socket that this login may serve.
    fn of_socket(
        &self,
        session: &Session,
        login: &Login,
        route: &Route,
        explicit: Option<SocketType>,
    ) -> Result<Arc<Tunnel>, Refusal> {
        let socket = &route.socket;
        if let Some(kind) = explicit.filter(|k| *k != socket.kind) {
            return Err(format!("{} is of type {}, not {kind}", socket.id, socket.kind));
        }
        let mut mine = self.routes.tunnels_of(&socket.id);
        mine.retain(|t| self.may_serve(session, login, t));
        // A tunnel that names this user is meant before one for any user.
        mine.sort_by_key(|t| t.user.is_none());
        mine.into_iter().next().ok_or_else(|| match self.settings.mode {
            Mode::Open => format!("{} is taken by another key; choose another name", socket.id),
            Mode::Closed => {
                format!("this key may not serve {} as the user {}", socket.id, session.user().escape_debug())
            }
        })
    }

    /// A socket with a made-up name: always the same for the same key.
    async fn made_up(&self, session: &Session, login: &Login, kind: SocketType) -> Result<Arc<Tunnel>, Refusal> {
        if self.settings.mode == Mode::Closed {
            return Err("this node makes no sockets on demand: name one, as in -R NAME:80:HOST:PORT".to_owned());
        }
        // The first, second, ... of its kind in this session: each has its own name.
        let nth = session.forwards.lock().iter().filter(|a| a.made_up == Some(kind)).count();
        let seed = match login.fingerprint() {
            Some(fingerprint) => {
                let key = hmac::Key::new(hmac::HMAC_SHA256, &self.name_key);
                let tag = hmac::sign(&key, format!("{kind} {fingerprint} {nth}").as_bytes());
                tag.as_ref().first_chunk::<8>().copied()
            }
            None => {
                let mut random = [0; 8];
                aws_lc_rs::rand::fill(&mut random).ok().map(|()| random)
            }
        };
        let name = made_up_name(seed.ok_or("no name could be made up")?);
        match self.socket_named(&name) {
            Some(route) => self.of_socket(session, login, &route, None),
            None => self.make(session, login, &name, kind, None).await,
        }
    }

    /// Makes socket and tunnel on demand, for the key that asks first.
    async fn make(
        &self,
        session: &Session,
        login: &Login,
        name: &str,
        kind: SocketType,
        port: Option<u16>,
    ) -> Result<Arc<Tunnel>, Refusal> {
        let made = match login {
            Login::Key(key) => self.routes.tunnels_of_key(&key.fingerprint),
            _ => session.made.lock().len(),
        };
        if made >= self.settings.sockets_per_key {
            return Err(format!("this key has {made} sockets already; use one of them, or ask the operator"));
        }
        let domain =
            self.urls.domain.as_ref().ok_or("this node has no domain for names made on demand (node.domain)")?;
        let label = name.strip_suffix(domain.as_str()).and_then(|n| n.strip_suffix('.')).unwrap_or(name);
        if label.contains('.') {
            return Err(format!("{name} is not under {domain}: names made on demand are NAME or NAME.{domain}"));
        }
        let host: HostName = format!("{label}.{domain}").parse().map_err(|_| format!("{name} is too long"))?;
        // A recorded wildcard claims the name too: its keys serve it, nobody else.
        if kind != SocketType::Tcp
            && let Some(route) = self.routes.by_host(host.as_str())
        {
            if !kind.by_name() {
                return Err(format!("{host} is the name of socket {} already; choose another name", route.socket.id));
            }
            return self.of_socket(session, login, &route, None);
        }
        let bad_id = |_| format!("{label} cannot be a name: it must start with a letter or digit");
        let mut socket = Socket::new(label.parse().map_err(bad_id)?, kind);
        if kind != SocketType::Tcp {
            socket.hostnames = vec![host.into()];
        }
        // A port of the allocatable range is a wish; any other only says "tcp".
        socket.ports.extend(port.filter(|p| !kind.by_name() && self.urls.ports.contains(*p)));
        socket.created_by = Some(login.fingerprint().unwrap_or("a session without a key").to_owned());
        let id: TunnelId = label.parse().map_err(bad_id)?;
        let mut tunnel = Tunnel::new(id.clone(), socket.id.clone());
        let mut lease = None;
        match login {
            Login::Key(key) => tunnel.keys = vec![key.clone()],
            Login::Certificate { authority, principals, .. } => {
                tunnel.cert_authorities = vec![authority.clone()];
                tunnel.principals = principals.clone();
            }
            Login::Nobody => lease = Some(self.lease_of(session).await?),
        }
        match self.records.claim_on_demand(socket, tunnel, lease).await {
            Ok((claimed, _)) => {
                session.made.lock().push(id.clone());
                self.wait_applied(claimed.rev).await?;
                tracing::info!(socket = label, session = session.id, "made on demand");
                self.routes.tunnel(&id).ok_or_else(|| format!("{label} was removed again"))
            }
            // Somebody was faster, perhaps this very key in another session.
            Err(RecordError::Taken(_)) => match self.socket_named(label) {
                Some(route) => self.of_socket(session, login, &route, None),
                None => Err(format!("{label} is taken; choose another name")),
            },
            Err(error) => {
                tracing::warn!(socket = label, %error, "not made on demand");
                Err(format!("{label} could not be made: {error}"))
            }
        }
    }

    async fn lease_of(&self, session: &Session) -> Result<crate::feed::LeaseId, Refusal> {
        if let Some(lease) = &*session.lease.lock() {
            return Ok(lease.id);
        }
        let lease = self.feed.lease(LEASE).await.map_err(|e| e.to_string())?;
        let id = lease.id;
        *session.lease.lock() = Some(lease);
        Ok(id)
    }

    async fn wait_applied(&self, rev: u64) -> Result<(), Refusal> {
        let mut applied = self.applied.clone();
        match timeout(APPLY_DEADLINE, applied.wait_for(|seen| *seen >= rev)).await {
            Ok(Ok(_)) => Ok(()),
            _ => Err("the route table does not follow the feed; try again".to_owned()),
        }
    }
}
