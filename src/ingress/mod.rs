//! The doors that visitors come through: the shared HTTP and HTTPS ports, the
//! sockets' own ports, and the limits at each. What happens to one visitor is
//! in `visit`: begin there.

pub mod hello;
mod ports;
mod visit;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::hello::HelloSettings;
pub use self::ports::Ports;
use crate::cores::{Core, Cores};
use crate::dial::Dialer;
use crate::drain::Stages;
use crate::error::Error;
use crate::fields::{Fields, Network, PortRange};
use crate::http::Http;
use crate::limits::PerAddress;
use crate::model::Visitor;
use crate::proxy_protocol::{self, Told};
use crate::relay::RelaySettings;
use crate::routes::{Route, Routes};
use crate::tcp::{self, TcpSettings};
use crate::tls::Certificates;
use crate::tunnel;

/// The knobs of `[ingress]`.
#[derive(Debug, Clone, PartialEq)]
pub struct IngressSettings {
    /// Where plain HTTP is served.
    pub http: Vec<SocketAddr>,
    /// Where HTTPS and passed-through TLS are served.
    pub https: Vec<SocketAddr>,
    /// Addresses on which the sockets' own ports open.
    pub raw: Vec<IpAddr>,
    /// Ports for sockets that ask for none.
    pub ports: PortRange,
    /// Visitors' connections of the node at once.
    pub connections: usize,
    /// Visitors' connections of one address at once.
    pub connections_per_address: usize,
    /// Networks of proxies whose connections begin with a PROXY protocol header.
    pub proxy_protocol_from: Vec<Network>,
}

impl IngressSettings {
    /// Reads `[ingress]`.
    pub fn read(f: &mut Fields) -> Self {
        let any = |port: u16| vec![SocketAddr::from(([0u16; 8], port))];
        let settings = Self {
            http: f.take("http", any(80)),
            https: f.take("https", any(443)),
            raw: f.take("raw", vec![IpAddr::from([0u16; 8])]),
            ports: f.take("ports", PortRange { first: 20000, last: 20999 }),
            connections: f.take("connections", 200_000),
            connections_per_address: f.take("connections_per_address", 1_000),
            proxy_protocol_from: f.take("proxy_protocol_from", Vec::new()),
        };
        let limits =
            [("connections", settings.connections), ("connections_per_address", settings.connections_per_address)];
        for (key, _) in limits.into_iter().filter(|(_, limit)| *limit == 0) {
            f.mistake(key, "0 would refuse everybody".into(), "write a whole number from 1".into());
        }
        settings
    }
}

/// Which listener a visitor came through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// The shared port of plain HTTP.
    Http,
    /// The shared port of HTTPS, passed-through TLS and SSH.
    Https,
    /// A socket's own port.
    Raw,
}

impl Door {
    /// The word for it in logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
            Self::Raw => "raw",
        }
    }
}

/// What a visit needs, shared by all doors.
pub struct Parts {
    /// The route table.
    pub routes: Arc<Routes>,
    /// Certificates by name.
    pub tls: Arc<Certificates>,
    /// The way to origins.
    pub dialer: Arc<Dialer>,
    /// The HTTP side.
    pub http: Arc<Http<Dialer>>,
    /// The SSH side, for owners who come by the HTTPS port.
    pub owners: Arc<tunnel::Server>,
    /// Tracks owners' sessions.
    pub owner_tasks: TaskTracker,
    /// Where visitors and owners are served.
    pub cores: Cores,
    /// The stages of the shutdown.
    pub stages: Stages,
    /// `[hello]`.
    pub hello: HelloSettings,
    /// `[relay]`.
    pub relay: RelaySettings,
    /// `[tcp]`.
    pub tcp: TcpSettings,
    /// Per-address limits do not apply to loopback.
    pub exempt_loopback: bool,
}

/// All doors of this node.
pub struct Ingress {
    settings: IngressSettings,
    parts: Parts,
    count: Arc<AtomicUsize>,
    per_address: PerAddress,
}

impl Ingress {
    /// Doors that nobody has opened yet.
    pub fn new(settings: IngressSettings, parts: Parts) -> Arc<Self> {
        let per_address = PerAddress::new(settings.connections_per_address, parts.exempt_loopback);
        Arc::new(Self { settings, parts, count: Arc::default(), per_address })
    }

    /// Takes visitors from a listener until `closed`; those who came stay.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn open(
        self: &Arc<Self>,
        tasks: &TaskTracker,
        door: Door,
        listener: TcpListener,
        closed: CancellationToken,
    ) -> io::Result<()> {
        let ingress = Arc::clone(self);
        self.parts.cores.listen(tasks, listener, move |listener| ingress.accept(door, listener, closed))
    }

    /// Takes owners from a listener until `closed`.
    ///
    /// # Errors
    /// It cannot be watched.
    pub fn open_to_owners(
        self: &Arc<Self>,
        tasks: &TaskTracker,
        listener: TcpListener,
        closed: CancellationToken,
    ) -> io::Result<()> {
        let ingress = Arc::clone(self);
        self.parts.cores.listen(tasks, listener, move |listener| ingress.accept_owners(listener, closed))
    }

    async fn accept(self: Arc<Self>, door: Door, listener: TcpListener, closed: CancellationToken) {
        let tcp_settings = self.parts.tcp.clone();
        tcp::accept_loop(listener, closed, |tcp, addr| {
            let Ok(local) = tcp.local_addr() else { return };
            tcp::prepare_accepted(&tcp, &tcp_settings);
            let core = match door {
                Door::Raw => self.core(self.parts.routes.by_port(local.port()).as_deref(), addr),
                // Whose visitor it is is known when the first bytes are, which are here soon.
                Door::Http | Door::Https => self.parts.cores.for_hello(),
            };
            let (ingress, visitor) = (Arc::clone(&self), Visitor::new(addr, local));
            let visit = move |tcp| ingress.visit(door, tcp, visitor);
            self.parts.cores.serve(core, &self.parts.stages.visitors, tcp, visit);
        })
        .await;
    }

    async fn accept_owners(self: Arc<Self>, listener: TcpListener, closed: CancellationToken) {
        let tcp_settings = self.parts.tcp.clone();
        tcp::accept_loop(listener, closed, |tcp, addr| {
            tcp::prepare_accepted(&tcp, &tcp_settings);
            if !self.speaks_first(addr.ip()) {
                return self.owner(tcp, Bytes::new(), addr);
            }
            let ingress = Arc::clone(&self);
            self.parts.owner_tasks.spawn(async move {
                let mut tcp = tcp;
                match ingress.told_by_proxy(&mut tcp).await {
                    Ok(told) => ingress.owner(tcp, Bytes::new(), told.map_or(addr, |told| told.source)),
                    Err(error) => tracing::debug!(proxy = %addr, %error, "turned away"),
                }
            });
        })
        .await;
    }

    /// Where a visitor from `addr` is served, by what is known of where they go.
    fn core(&self, route: Option<&Route>, addr: SocketAddr) -> Core {
        let home = route.and_then(|route| self.parts.dialer.core(route, addr.port().into()));
        self.parts.cores.for_visitor(home)
    }

    /// Whether connections from there begin with a PROXY protocol header.
    fn speaks_first(&self, ip: IpAddr) -> bool {
        self.settings.proxy_protocol_from.iter().any(|network| network.contains(ip))
    }

    /// The header that a proxy's connection begins with, within the deadline for
    /// first bytes.
    async fn told_by_proxy(&self, tcp: &mut TcpStream) -> Result<Option<Told>, Error> {
        match tokio::time::timeout(self.parts.hello.deadline, proxy_protocol::read(tcp)).await {
            Ok(Ok(told)) => Ok(told),
            Ok(Err(error)) => {
                tracing::debug!(%error, "no PROXY protocol header");
                Err(Error::ProxyHeader)
            }
            Err(_) => Err(Error::HelloTimeout),
        }
    }

    /// Hands a connection that speaks SSH over to the tunnels' side.
    fn owner(&self, tcp: TcpStream, head: Bytes, addr: SocketAddr) {
        let owners = Arc::clone(&self.parts.owners);
        let cores = &self.parts.cores;
        cores.serve(cores.for_session(), &self.parts.owner_tasks, tcp, move |tcp| owners.serve(tcp, head, addr));
    }
}
