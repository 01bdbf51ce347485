//! Composition root: builds every part, hands each its handles, runs, drains.

use std::fmt;
use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::checks::Checks;
use crate::config::Config;
use crate::control::{self, ControlSettings, ControlState, Mysocket, MysocketHooks, MysocketParts};
use crate::cores::Cores;
use crate::dial::Dialer;
use crate::drain::{DrainSettings, Stages};
use crate::feed::follower::{self, Follower, Following};
use crate::feed::records::{RecordSettings, Records};
use crate::feed::settings::EtcdSettings;
use crate::feed::store::Store;
use crate::feed::{self, Feed, Subscription};
use crate::fleet::{self, Fleet};
use crate::gate::{self, Gates};
use crate::http::{Http, HttpSettings, OwnHosts};
use crate::ingress::{self, Door, Ingress, Ports};
use crate::logins::Logins;
use crate::metrics::Exporter;
use crate::model::TunnelId;
use crate::routes::Routes;
use crate::secret_file;
use crate::tcp;
use crate::tls::Certificates;
use crate::tls::dev::DevTls;
use crate::tunnel::{self, HostKeyType, Mode, Tunnels, Urls};
use crate::visit_log;
use crate::visit_log::access_log::AccessLog;

/// The store is read and the route table filled within this.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// Why the node ended other than by being told to.
#[derive(Debug)]
pub enum Failure {
    /// A listener of the settings could not be opened.
    Listen {
        /// The key that names it: `ingress.https`.
        key: &'static str,
        /// The address wanted.
        addr: SocketAddr,
        /// What the system said.
        error: io::Error,
    },
    /// The state folder cannot be used.
    State {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Anything else that keeps the node from starting.
    Start(String),
    /// The node ran and then failed.
    Run(String),
}

impl Failure {
    /// Whether the node never became ready.
    pub fn at_start(&self) -> bool {
        !matches!(self, Failure::Run(_))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Listen { key, addr, error } => {
                write!(f, "cannot listen on {addr} ({key}): {error}; ")?;
                match error.kind() {
                    io::ErrorKind::AddrInUse => write!(f, "stop what holds the port or change {key}"),
                    io::ErrorKind::PermissionDenied => {
                        write!(f, "ports below 1024 need CAP_NET_BIND_SERVICE; grant it or change {key}")
                    }
                    io::ErrorKind::AddrNotAvailable => {
                        write!(f, "this machine does not have that address; change {key}")
                    }
                    _ => write!(f, "change {key}"),
                }
            }
            Failure::State { path, error } => write!(
                f,
                "cannot use the state folder {}: {error}; make it writable, or name another by --state or node.state",
                path.display()
            ),
            Failure::Start(why) | Failure::Run(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for Failure {}

/// Runs the node until it is told to stop (SIGTERM, SIGINT) and has drained. Visitors
/// and owners are served on `cores`, all else on the caller's runtime.
///
/// # Errors
/// Why it could not start, or what broke it.
pub async fn run(config: Config, cores: Cores) -> Result<(), Failure> {
    let mut signals = Signals::install().map_err(|e| Failure::Start(format!("signals cannot be handled: {e}")))?;
    let state = StateDir::open(&config.node.state)?;
    let exporter = Exporter::install().map_err(Failure::Start)?;
    if let Some(log) = AccessLog::start(&config.access_log).map_err(Failure::Start)? {
        visit_log::install(log);
    }
    let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
    tasks.spawn(until(stop.clone(), exporter.clone().upkeep()));

    // What is published, and the certificates to show.
    let certificates = Arc::new(Certificates::new(&config.tls).map_err(Failure::Start)?);
    let made = made_up_tls(&config, &state, &certificates)?;
    certificates.reload(&config.tls).map_err(Failure::Start)?;
    let engine = Engine::open(&config, &state).await?;
    let feed = engine.feed();
    let routes = Arc::new(Routes::default());
    let knobs = RecordSettings {
        ports: config.ingress.ports,
        domain: config.node.domain.clone(),
        reserved: config.own_hosts(),
    };
    let records = Arc::new(Records::new(Arc::clone(&feed), knobs));
    let logins = Arc::<Logins>::default();
    let shown = Arc::clone(&certificates) as _;
    let (follower, following) = Follower::new(engine.follow(&state), Arc::clone(&routes), shown, Arc::clone(&logins));
    let cancel = stop.clone();
    tasks.spawn_blocking(move || follower.run_alone(cancel));
    engine.wait(&following, &mut signals).await?;

    // A taken port ends the start before anything is served.
    let listeners = Listeners::bind(&config)?;
    let bound = listeners.bound();

    // Owners and their tunnels.
    let (stages, owner_tasks) = (Stages::default(), TaskTracker::new());
    let urls = urls(&config, &bound);
    let host_key = config.ssh.host_key.clone().unwrap_or_else(|| state.file("ssh_host_ed25519_key"));
    let mut host_keys = vec![tunnel::host_key(&host_key, HostKeyType::Ed25519).map_err(Failure::Start)?];
    if config.ssh.ecdsa_host_key {
        let file = state.file("ssh_host_ecdsa_key");
        host_keys.push(tunnel::host_key(&file, HostKeyType::Ecdsa).map_err(Failure::Start)?);
    }
    let ports = Arc::new(Ports::default());
    let parts = tunnel::Parts {
        routes: Arc::clone(&routes),
        records: Arc::clone(&records),
        feed: Arc::clone(&feed),
        applied: ports.synced(),
        port_trouble: {
            let ports = Arc::clone(&ports);
            Box::new(move |port| ports.trouble(port))
        },
        urls: urls.clone(),
        name_key: state.name_key()?,
        tasks: owner_tasks.clone(),
        exempt_loopback: config.node.exempt_loopback,
    };
    let tunnels = Tunnels::new(config.ssh.clone(), parts).map_err(Failure::Start)?;
    let owners = Arc::new(tunnel::Server::new(Arc::clone(&tunnels), &host_keys).map_err(Failure::Start)?);

    // The fleet, where the feed is one.
    let fleet = match &engine {
        Engine::Store(_) => None,
        Engine::Elsewhere(_) => Some(join_fleet(&config, &feed, &tunnels, bound.fleet.clone())?),
    };
    if let Some(fleet) = &fleet {
        tasks.spawn(Arc::clone(fleet).run(stop.clone()));
        let door = fleet::Door::new(Arc::clone(fleet), config.relay.clone(), stages.clone(), cores.clone());
        for listener in listeners.fleet {
            tasks.spawn(Arc::clone(&door).open(listener, stop.clone()));
        }
    }

    // Visitors and their path.
    let dialer = Arc::new(Dialer::new(Arc::clone(&tunnels), fleet.clone(), config.dial.clone()));
    let http = HttpSettings { public_https_port: urls.https_port.unwrap_or(443), ..config.http.clone() };
    let parts = gate::Parts {
        logins: Arc::clone(&logins),
        routes: Arc::clone(&routes),
        records: Arc::clone(&records),
        public_https_port: http.public_https_port,
        exempt_loopback: config.node.exempt_loopback,
    };
    let gates = Gates::new(config.gate.clone(), parts).map_err(Failure::Start)?;
    gates.make_keyring().await;
    tasks.spawn(Arc::clone(&gates).watch(following.revisions(), stop.clone()));
    let http = Http::new(Arc::clone(&routes), Arc::clone(&dialer), Arc::clone(&gates), http, stages.visitors.clone());
    let http = http.map_err(Failure::Start)?;
    if !config.mysocket.hosts.is_empty() {
        let hooks = mysocket_hooks(&config, &urls, fleet.as_ref());
        let (records, acting) = (Arc::clone(&records), ports.synced());
        let parts = MysocketParts { records, logins, gates, acting, hooks };
        let mysocket = Mysocket::new(config.mysocket.clone(), parts);
        let answers = move |request, ip| {
            let mysocket = Arc::clone(&mysocket);
            Box::pin(async move { mysocket.answer(request, ip).await }) as _
        };
        http.serve_own(OwnHosts { names: config.mysocket.hosts.clone(), answers: Arc::new(answers) });
    }
    tasks.spawn({
        let (http, closed) = (Arc::clone(&http), stages.close.clone());
        async move {
            closed.cancelled().await;
            http.close();
        }
    });
    tasks.spawn(Checks::new(Arc::clone(&routes), Arc::clone(&tunnels), Arc::clone(&http)).run(stop.clone()));
    let parts = ingress::Parts {
        routes: Arc::clone(&routes),
        tls: Arc::clone(&certificates),
        dialer,
        http,
        owners: Arc::clone(&owners),
        owner_tasks: owner_tasks.clone(),
        cores: cores.clone(),
        stages: stages.clone(),
        hello: config.hello,
        relay: config.relay.clone(),
        tcp: config.tcp.clone(),
        exempt_loopback: config.node.exempt_loopback,
    };
    let ingress = Ingress::new(config.ingress.clone(), parts);
    let closed = stages.close.clone();
    tasks.spawn(Arc::clone(&ports).follow(Arc::clone(&ingress), following.revisions(), tasks.clone(), closed.clone()));

    // The operator.
    let ready = Arc::new(AtomicBool::new(false));
    let drain_asked = CancellationToken::new();
    let hooks = control::NodeHooks {
        status: status(&config, &bound, &tunnels, &routes, &ports, fleet.as_ref()),
        metrics: {
            let (owners, cores) = (Arc::clone(&owners), cores.clone());
            Box::new(move || {
                cores.tell();
                metrics::gauge!("adit_tunnel_outstanding_bytes").set(owners.outstanding_bytes() as f64);
                let queued = visit_log::access_log().map_or(0, AccessLog::queued);
                metrics::gauge!("adit_access_log_queue").set(queued as f64);
                exporter.render()
            })
        },
        ready: {
            let ready = Arc::clone(&ready);
            Box::new(move || ready.load(Ordering::Acquire).then_some(()).ok_or_else(|| "starting or draining".into()))
        },
        writers: {
            let fleet = fleet.clone();
            let writers = move || fleet.as_ref().map(|fleet| fleet.writers()).unwrap_or_default();
            Box::new(move || writers().iter().map(ToString::to_string).collect())
        },
        drain: {
            let asked = drain_asked.clone();
            Box::new(move || asked.cancel())
        },
    };
    let control = state.control_settings(&config.control)?;
    let control = ControlState::new(control, records, feed, following, ports.synced(), hooks)
        .map_err(|mistake| Failure::Start(mistake.to_string()))?;
    for listener in listeners.control {
        tasks.spawn(control::serve(listener, Arc::clone(&control), stop.clone()));
    }
    let unwatched = |error| Failure::Start(format!("a listener cannot be watched: {error}"));
    for (door, listener) in listeners.visitors {
        ingress.open(&tasks, door, listener, closed.clone()).map_err(unwatched)?;
    }
    // Owners may log in until the end of the drain: their sessions are what visitors use.
    let owners_closed = CancellationToken::new();
    for listener in listeners.owners {
        ingress.open_to_owners(&tasks, listener, owners_closed.clone()).map_err(unwatched)?;
    }
    state.write_listening(&bound)?;
    ready.store(true, Ordering::Release);
    metrics::gauge!("adit_ready").set(1.0);
    greet(&config, &urls, &bound, made.as_ref());

    loop {
        tokio::select! {
            told = signals.next() => match told {
                Told::End => break,
                Told::Reload => {
                    if let Some(log) = visit_log::access_log() {
                        log.reopen();
                    }
                    let fleet = fleet.as_ref().map_or(Ok(()), |fleet| fleet.reload());
                    match certificates.reload(&config.tls).and(fleet) {
                        Ok(()) => tracing::info!("certificates read again"),
                        Err(error) => tracing::error!(%error, "certificates not read again; the former ones stay"),
                    }
                }
            },
            () = drain_asked.cancelled() => break,
        }
    }
    ready.store(false, Ordering::Release);
    metrics::gauge!("adit_ready").set(0.0);
    if let Some(fleet) = &fleet {
        fleet.drain();
    }
    let hurry = CancellationToken::new();
    let hurrying = async {
        while signals.next().await != Told::End {}
        tracing::info!("told again: hurrying");
        hurry.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = drain(&config.drain, &stages, &tunnels, &owners_closed, &owner_tasks, &hurry) => {}
        () = hurrying => {}
    }
    stop.cancel();
    tasks.close();
    let _ = tokio::time::timeout(Duration::from_secs(2), tasks.wait()).await;
    engine.close().await;
    state.forget_listening();
    if let Some(log) = visit_log::access_log() {
        log.flush();
    }
    tracing::info!("ended");
    Ok(())
}

/// Where records come from.
enum Engine {
    Store(Arc<Store>),
    Elsewhere(Arc<dyn Feed>),
}

impl Engine {
    async fn open(config: &Config, state: &StateDir) -> Result<Self, Failure> {
        if let Some(feed) = elsewhere(&config.etcd).await.map_err(Failure::Start)? {
            return Ok(Self::Elsewhere(feed));
        }
        let store = Store::open(&state.file("store.db"), config.store.clone());
        store.map(Self::Store).map_err(|error| Failure::Start(error.to_string()))
    }

    fn feed(&self) -> Arc<dyn Feed> {
        match self {
            Self::Store(store) => Arc::clone(store) as _,
            Self::Elsewhere(feed) => Arc::clone(feed),
        }
    }

    /// What is followed; of an engine that is elsewhere, from what is remembered on.
    fn follow(&self, state: &StateDir) -> Subscription {
        match self {
            Self::Store(store) => store.subscribe(&follower::prefixes(), None),
            Self::Elsewhere(feed) => {
                feed::cache::follow(state.file("feed.cache"), Arc::clone(feed), follower::prefixes())
            }
        }
    }

    /// Waits until there is something to serve. A store that cannot be read ends the
    /// start; an engine that is elsewhere is waited for.
    async fn wait(&self, following: &Following, signals: &mut Signals) -> Result<(), Failure> {
        loop {
            let served = tokio::select! {
                served = tokio::time::timeout(START_DEADLINE, following.wait_served()) => served,
                Told::End = signals.next() => {
                    return Err(Failure::Start("told to end before there was anything to serve".into()));
                }
            };
            match (served, self) {
                (Ok(true), _) => return Ok(()),
                (Ok(false), Self::Elsewhere(_)) => return Err(Failure::Start("the feed has ended".into())),
                (_, Self::Store(_)) => {
                    return Err(Failure::Start(format!("the store was not read within {START_DEADLINE:?}")));
                }
                (_, Self::Elsewhere(_)) => {
                    tracing::error!("the feed does not answer, and nothing is remembered: not ready");
                }
            }
        }
    }

    async fn close(&self) {
        if let Self::Store(store) = self {
            store.close().await;
        }
    }
}

/// This node's part in the fleet: by its name, which no other node has.
fn join_fleet(
    config: &Config,
    feed: &Arc<dyn Feed>,
    tunnels: &Arc<Tunnels>,
    bound: Vec<SocketAddr>,
) -> Result<Arc<Fleet>, Failure> {
    let name = config.node.name();
    let parts = fleet::Parts {
        me: name.parse().map_err(|why| Failure::Start(format!("node.name: \"{name}\" {why}")))?,
        feed: Arc::clone(feed),
        tunnels: Arc::clone(tunnels),
        settings: config.fleet.clone(),
        bound,
        tcp: config.tcp.clone(),
        // Without certificates etcd asks nobody who they are.
        control: config.etcd.control_certificate.is_some() || config.etcd.certificate.is_none(),
    };
    Fleet::new(parts).map_err(Failure::Start)
}

#[cfg(feature = "etcd")]
async fn elsewhere(settings: &EtcdSettings) -> Result<Option<Arc<dyn Feed>>, String> {
    if settings.endpoints.is_empty() {
        return Ok(None);
    }
    let etcd = feed::etcd::Etcd::connect(settings).await?;
    Ok(Some(etcd as _))
}

/// Endpoints of an engine that is not built in are a mistake of the settings.
#[cfg(not(feature = "etcd"))]
async fn elsewhere(_: &EtcdSettings) -> Result<Option<Arc<dyn Feed>>, String> {
    Ok(None)
}

/// The stepwise shutdown; readiness says no already.
async fn drain(
    settings: &DrainSettings,
    stages: &Stages,
    tunnels: &Tunnels,
    owners_closed: &CancellationToken,
    owner_tasks: &TaskTracker,
    hurry: &CancellationToken,
) {
    tracing::info!(notice_ms = settings.notice.as_millis() as u64, visitors = stages.visitors.len(), "draining");
    stages.wait(settings.notice, hurry).await;
    let cut = stages.finish_visitors(settings.deadline, hurry).await;
    if cut > 0 {
        metrics::counter!("adit_visitors_cut_total").increment(cut as u64);
        tracing::warn!(cut, "visitors were cut at the deadline");
    }
    owners_closed.cancel();
    let sessions = tunnels.sessions();
    let each = settings.spread.checked_div(u32::try_from(sessions.len()).unwrap_or(u32::MAX)).unwrap_or_default();
    for session in sessions {
        // One that is stuck must not keep the next ones waiting.
        owner_tasks.spawn(async move {
            session.console.say("this node is shutting down; your client may connect again".to_owned());
            session.disconnect("this node is shutting down");
        });
        stages.wait(each, hurry).await;
    }
    stages.wait(GOODBYE, hurry).await;
    for session in tunnels.sessions() {
        session.kill();
    }
    owner_tasks.close();
    let _ = tokio::time::timeout(Duration::from_secs(2), owner_tasks.wait()).await;
}

/// What `GET /v1/status` tells.
fn status(
    config: &Config,
    bound: &Bound,
    tunnels: &Arc<Tunnels>,
    routes: &Arc<Routes>,
    ports: &Arc<Ports>,
    fleet: Option<&Arc<Fleet>>,
) -> Box<dyn Fn() -> serde_json::Map<String, Value> + Send + Sync> {
    let fleet = fleet.cloned();
    let (name, listeners) = (config.node.name(), bound.to_json());
    let (tunnels, routes) = (Arc::clone(tunnels), Arc::clone(routes));
    let ports = Arc::clone(ports);
    Box::new(move || {
        let (sockets, recorded) = routes.size();
        let session = |s: &Arc<tunnel::Session>| {
            json!({
                "session": s.id,
                "peer": s.peer.to_string(),
                "user": s.user(),
                "connections": s.channels(),
                "queued_bytes": s.queued_bytes(),
                "rtt_us": s.rtt().map(|rtt| rtt.as_micros() as u64),
            })
        };
        let live: serde_json::Map<String, Value> = tunnels
            .live()
            .into_iter()
            .map(|(id, sessions)| (id.to_string(), sessions.iter().map(session).collect()))
            .collect();
        let failed: Vec<Value> = ports.failed().iter().map(|(port, why)| json!({ "port": port, "why": why })).collect();
        let fleet = fleet.as_ref().map(|fleet| ("fleet".to_owned(), fleet.status()));
        let own = [
            ("name".to_owned(), json!(name)),
            ("listeners".to_owned(), listeners.clone()),
            ("sockets".to_owned(), json!(sockets)),
            ("tunnels".to_owned(), json!(recorded)),
            ("sessions".to_owned(), json!(tunnels.sessions().len())),
            ("live".to_owned(), Value::Object(live)),
            ("failing".to_owned(), tunnels.failing().iter().map(|tunnel| json!(tunnel.as_str())).collect()),
            ("ports".to_owned(), json!({ "open": ports.open(), "failed": failed })),
        ];
        own.into_iter().chain(fleet).collect()
    })
}

/// What the mysocket adapter asks the node for. A tunnel's server is the node of its
/// latest login.
fn mysocket_hooks(config: &Config, urls: &Urls, fleet: Option<&Arc<Fleet>>) -> MysocketHooks {
    let (fleet, here) = (fleet.cloned(), urls.host.clone());
    let elsewhere =
        move |tunnel: &TunnelId| fleet.as_ref()?.places(tunnel).first().map(|place| place.node().to_string());
    MysocketHooks {
        domain: config.node.domain.clone(),
        public_host: urls.host.clone(),
        public_ports: urls.http_port.into_iter().chain(urls.https_port).collect(),
        tunnel_server: Box::new(move |tunnel| elsewhere(tunnel).unwrap_or_else(|| here.clone())),
        exempt_loopback: config.node.exempt_loopback,
    }
}

/// Runs `work` until `stop`.
async fn until(stop: CancellationToken, work: impl Future<Output = ()> + Send) {
    tokio::select! {
        () = work => {}
        () = stop.cancelled() => {}
    }
}

/// The made-up CA and certificate, where the settings ask for them.
fn made_up_tls(config: &Config, state: &StateDir, certificates: &Certificates) -> Result<Option<DevTls>, Failure> {
    let Some(domain) = config.node.domain.as_ref().filter(|_| config.tls.make_certificate) else { return Ok(None) };
    let dir = state.file("tls");
    let made =
        DevTls::load_or_make(&dir, domain, &config.own_hosts()).map_err(|error| Failure::State { path: dir, error })?;
    certificates.put_default(&made.chain_pem, &made.key_pem).map_err(Failure::Start)?;
    Ok(Some(made))
}

/// What the owners are told: the ports as listeners got them, unless set.
fn urls(config: &Config, bound: &Bound) -> Urls {
    let public = config.public();
    let port =
        |given: Option<u16>, bound: &[SocketAddr]| bound.first().map(|listener| given.unwrap_or(listener.port()));
    Urls {
        domain: config.node.domain.as_ref().map(ToString::to_string),
        host: public.host,
        http_port: port(config.node.public_http_port, &bound.http),
        https_port: port(config.node.public_https_port, &bound.https),
        ports: config.ingress.ports,
    }
}

/// Prints what an owner copies.
fn greet(config: &Config, urls: &Urls, bound: &Bound, made: Option<&DevTls>) {
    let mut out = String::new();
    let mut line = |text: String| {
        out.push_str(&text);
        out.push('\n');
    };
    line(format!("adit {} is ready.", env!("CARGO_PKG_VERSION")));
    if let (Some(made), Some(domain)) = (made, &config.node.domain) {
        line(format!("  certificate for  {domain}, *.{domain}"));
        line(format!("  made-up CA       {}", made.ca_path.display()));
    }
    if let (Mode::Open, Some(domain), Some(ssh)) = (config.ssh.mode, &config.node.domain, bound.ssh.first()) {
        let host = if ssh.ip().is_loopback() { "localhost".to_owned() } else { urls.host.clone() };
        let port = config.node.public_ssh_port.unwrap_or(ssh.port());
        line("Publish what listens on port 8000 of this machine:".to_owned());
        line(format!("  ssh -p {port} -R web:80:localhost:8000 {host}"));
        if let Some(https) = urls.https_port {
            let at = if https == 443 { String::new() } else { format!(":{https}") };
            let ca = made.map_or_else(String::new, |m| format!("--cacert {} ", m.ca_path.display()));
            line("and open:".to_owned());
            line(format!("  curl {ca}https://web.{domain}{at}/"));
        }
    }
    let mut stdout = io::stdout().lock();
    let _ = stdout.write_all(out.as_bytes());
    let _ = stdout.flush();
    tracing::info!(name = config.node.name(), "ready");
}

/// Where the node listens, by what for.
#[derive(Debug, Clone, Default)]
struct Bound {
    http: Vec<SocketAddr>,
    https: Vec<SocketAddr>,
    ssh: Vec<SocketAddr>,
    control: Vec<SocketAddr>,
    fleet: Vec<SocketAddr>,
}

impl Bound {
    fn to_json(&self) -> Value {
        let texts = |addrs: &[SocketAddr]| addrs.iter().map(ToString::to_string).collect::<Vec<_>>();
        json!({
            "http": texts(&self.http),
            "https": texts(&self.https),
            "ssh": texts(&self.ssh),
            "control": texts(&self.control),
            "fleet": texts(&self.fleet),
        })
    }
}

/// The fixed listeners, bound and not yet served.
struct Listeners {
    visitors: Vec<(Door, TcpListener)>,
    owners: Vec<TcpListener>,
    control: Vec<TcpListener>,
    fleet: Vec<TcpListener>,
}

impl Listeners {
    fn bind(config: &Config) -> Result<Self, Failure> {
        let http = bind("ingress.http", &config.ingress.http, config)?;
        let https = bind("ingress.https", &config.ingress.https, config)?;
        let http = http.into_iter().map(|l| (Door::Http, l));
        let https = https.into_iter().map(|l| (Door::Https, l));
        Ok(Self {
            visitors: http.chain(https).collect(),
            owners: bind("ssh.listen", &config.ssh.listen, config)?,
            control: bind("control.listen", &config.control.listen, config)?,
            fleet: bind("fleet.listen", &config.fleet.listen, config)?,
        })
    }

    fn bound(&self) -> Bound {
        let local = |l: &TcpListener| l.local_addr().ok();
        let door = |wanted: Door| {
            self.visitors.iter().filter(|(door, _)| *door == wanted).filter_map(|(_, l)| local(l)).collect()
        };
        Bound {
            http: door(Door::Http),
            https: door(Door::Https),
            ssh: self.owners.iter().filter_map(local).collect(),
            control: self.control.iter().filter_map(local).collect(),
            fleet: self.fleet.iter().filter_map(local).collect(),
        }
    }
}

fn bind(key: &'static str, addrs: &[SocketAddr], config: &Config) -> Result<Vec<TcpListener>, Failure> {
    let mut listeners = Vec::new();
    for addr in addrs {
        match tcp::bind(*addr, tcp::only_v6(*addr, addrs), &config.tcp) {
            Ok(listener) => listeners.push(listener),
            Err(error) if tcp::lacks_family(&error) && addrs.len() > 1 => {
                tracing::warn!(%addr, key, %error, "this machine has no such address family; not listening there");
            }
            Err(error) => return Err(Failure::Listen { key, addr: *addr, error }),
        }
    }
    Ok(listeners)
}

/// Time for the last owners' clients to leave by themselves.
const GOODBYE: Duration = Duration::from_millis(300);

/// The folder for all that is kept between runs.
struct StateDir(PathBuf);

impl StateDir {
    fn open(path: &Path) -> Result<Self, Failure> {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| Failure::State { path: path.to_owned(), error })?;
        let dir = Self(path.to_owned());
        dir.forget_listening();
        Ok(dir)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The secret behind made-up names: the same names for the same keys after
    /// a restart, and nobody can compute whose name is whose.
    fn name_key(&self) -> Result<[u8; 32], Failure> {
        let path = self.file("names.key");
        if let Some(kept) = std::fs::read(&path).ok().and_then(|k| <[u8; 32]>::try_from(k).ok()) {
            return Ok(kept);
        }
        let mut key = [0; 32];
        aws_lc_rs::rand::fill(&mut key).map_err(|_| Failure::Start("no random bytes".to_owned()))?;
        secret_file::write(&path, &key).map_err(|error| Failure::State { path, error })?;
        Ok(key)
    }

    /// The control API's settings, with a token of our own where the operator
    /// gave none and nobody may do without.
    fn control_settings(&self, given: &ControlSettings) -> Result<ControlSettings, Failure> {
        let mut settings = given.clone();
        if settings.token_file.is_none() && !settings.allow_anonymous_loopback {
            let path = self.file("control.token");
            if !path.exists() {
                let mut random = [0u8; 32];
                aws_lc_rs::rand::fill(&mut random).map_err(|_| Failure::Start("no random bytes".to_owned()))?;
                let token: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
                let made = secret_file::write(&path, format!("{token}\n").as_bytes());
                made.map_err(|error| Failure::State { path: path.clone(), error })?;
                tracing::info!(path = %path.display(), "a token for the control API was made");
            }
            settings.token_file = Some(path);
        }
        Ok(settings)
    }

    /// Tells programs on this machine where the node listens, once it does.
    fn write_listening(&self, bound: &Bound) -> Result<(), Failure> {
        let path = self.file("listening.json");
        let text = bound.to_json().to_string();
        secret_file::write(&path, text.as_bytes()).map_err(|error| Failure::State { path, error })
    }

    fn forget_listening(&self) {
        let _ = std::fs::remove_file(self.file("listening.json"));
    }
}

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    /// Drain and end; again: hurry.
    End,
    /// Read certificates again.
    Reload,
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::End,
            _ = self.interrupt.recv() => Told::End,
            _ = self.hangup.recv() => Told::Reload,
        }
    }
}
