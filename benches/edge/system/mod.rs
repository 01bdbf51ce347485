//! The systems that are compared: adit in any build and setting, and its peers. Each
//! is started afresh for a sample, and tells how to reach what it publishes.

mod fleet;
mod servers;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::program::Program;
use crate::usage::{self, Memory};
use crate::web::{NoHttp2, Site};
use crate::{Bench, Outcome, visitor, within};

pub use fleet::Fleet;

const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SSH: SocketAddr = SocketAddr::new(IP, 2222);
const HTTPS: SocketAddr = SocketAddr::new(IP, 8443);
const CONTROL: SocketAddr = SocketAddr::new(IP, 9090);
/// A forward's own port, where the system lets the client choose it; below the ports
/// of outgoing connections.
const FORWARD: SocketAddr = SocketAddr::new(IP, 7000);

const START: Duration = Duration::from_secs(15);

/// Waits until nobody listens there.
async fn free(ports: [SocketAddr; 2]) -> Outcome<()> {
    for addr in ports {
        while tokio::net::TcpListener::bind(addr).await.is_err() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

/// What is measured.
#[derive(Debug, Clone)]
pub struct System {
    /// Its name in tables.
    pub name: String,
    pub kind: Kind,
}

/// How it is built and set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// With `relay.splice` on or off.
    Adit {
        binary: PathBuf,
        splice: bool,
    },
    Sandhole {
        binary: PathBuf,
    },
    /// OpenSSH's server alone: `GatewayPorts`.
    Sshd,
    /// nginx ends TLS in front of it.
    NginxSshd,
    /// `ssh -L` to the origin: the path without an edge.
    Direct,
    /// Between visitors and a node that has the tunnel.
    Haproxy {
        splice: bool,
    },
}

/// Who can do what a workload does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Field {
    Https,
    Raw,
    Logins,
    Latency,
    Backhaul,
}

/// What a tunnel publishes, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The origin that takes orders, on a port.
    Orders,
    /// The web origin, on a port.
    Raw,
    /// The web origin behind TLS.
    Https,
    /// The same with HTTP/2 to visitors.
    Http2,
}

impl System {
    pub fn new(name: &str, kind: Kind) -> Self {
        Self { name: name.to_owned(), kind }
    }

    /// Whether it is compared there.
    pub fn takes_part(&self, field: Field) -> bool {
        match self.kind {
            Kind::Adit { splice: true, .. } => true,
            Kind::Adit { splice: false, .. } | Kind::Haproxy { .. } => field == Field::Backhaul,
            Kind::Sandhole { .. } => field != Field::Backhaul,
            Kind::Sshd => matches!(field, Field::Raw | Field::Logins),
            Kind::NginxSshd => matches!(field, Field::Https | Field::Latency),
            Kind::Direct => field == Field::Latency,
        }
    }

    /// Whether adit is held against it.
    pub fn is_peer(&self) -> bool {
        !matches!(self.kind, Kind::Adit { .. } | Kind::Direct)
    }

    /// # Errors
    /// What is missing, and where it comes from.
    pub fn check(&self) -> Result<(), String> {
        for (binary, from) in self.binaries() {
            if !binary.is_file() {
                return Err(format!(
                    "{}: there is no {} ({from}); or choose systems by --systems",
                    self.name,
                    binary.display()
                ));
            }
        }
        Ok(())
    }

    fn binaries(&self) -> Vec<(&Path, &'static str)> {
        let sshd = (Path::new(servers::SSHD), "Debian's openssh-server");
        match &self.kind {
            Kind::Adit { binary, .. } => vec![(binary.as_path(), "cargo build --release")],
            Kind::Sandhole { binary } => {
                vec![(binary.as_path(), "cargo install sandhole --version 0.10.5; --sandhole PATH")]
            }
            Kind::Sshd | Kind::Direct => vec![sshd],
            Kind::NginxSshd => vec![sshd, (Path::new(servers::NGINX), "Debian's nginx-light")],
            Kind::Haproxy { .. } => vec![
                (Path::new(servers::HAPROXY), "Debian's haproxy"),
                (Path::new(servers::ETCD), "Debian's etcd-server"),
            ],
        }
    }

    /// What it says of itself, for the record.
    pub fn version(&self) -> String {
        let said = |binary: &Path, flag: &str| match Command::new(binary).arg(flag).output() {
            Ok(done) => {
                let said = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).trim().to_owned();
                said.lines().next().unwrap_or("").to_owned()
            }
            Err(e) => e.to_string(),
        };
        let ssh = || said(Path::new("ssh"), "-V");
        match &self.kind {
            Kind::Adit { binary, .. } | Kind::Sandhole { binary } => said(binary, "--version"),
            Kind::Sshd | Kind::Direct => ssh(),
            Kind::NginxSshd => format!("{}; {}", said(Path::new(servers::NGINX), "-v"), ssh()),
            Kind::Haproxy { .. } => said(Path::new(servers::HAPROXY), "-v"),
        }
    }
}

/// A running system. Dropping it ends all its processes.
pub struct Server {
    pub name: String,
    kind: Kind,
    programs: Vec<Program>,
    dir: TempDir,
}

impl Server {
    /// Starts it; returns when it listens.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn start(bench: &Bench, system: &System) -> Outcome<Self> {
        let dir = tempfile::tempdir_in("/run")?;
        keygen(&dir.path().join("key"))?;
        let mut server = Self { name: system.name.clone(), kind: system.kind.clone(), programs: Vec::new(), dir };
        let (dir, tls) = (server.dir.path(), &bench.tls);
        let (command, more) = match &system.kind {
            Kind::Adit { binary, .. } => (servers::lone_adit(binary, dir, tls)?, None),
            Kind::Sandhole { binary } => (servers::sandhole(binary, dir, tls)?, None),
            Kind::Sshd | Kind::Direct => (servers::sshd(dir)?, None),
            Kind::NginxSshd => (servers::sshd(dir)?, Some(servers::nginx(dir, tls)?)),
            Kind::Haproxy { .. } => return Err("it has no tunnels".into()),
        };
        let also = more.is_some().then_some(HTTPS);
        // The one before was killed, with 10,000 connections that are still being closed.
        within(START, "the ports", free([SSH, HTTPS])).await?;
        for (name, command) in [("the server", Some(command)), ("nginx", more)] {
            if let Some(command) = command {
                server.programs.push(Program::start(name, command, server.dir.path())?);
            }
        }
        for addr in [Some(SSH), also].into_iter().flatten() {
            within(START, "the server", listens(&mut server.programs, addr)).await?;
        }
        Ok(server)
    }

    /// Where SSH clients log in.
    pub fn ssh(&self) -> SocketAddr {
        SSH
    }

    /// Whom they log in as: sshd runs as root and lets nobody else in.
    pub fn user(&self) -> &'static str {
        "root"
    }

    /// The private key of whoever may log in.
    pub fn key(&self) -> PathBuf {
        self.dir.path().join("key")
    }

    /// Logs in with OpenSSH's client and publishes an origin; returns when a visitor
    /// reaches it.
    ///
    /// # Errors
    /// Why none does.
    pub async fn tunnel(&self, bench: &Bench, way: Way) -> Outcome<Tunnel> {
        let mut login = Login::new(SSH, self.key(), &bench.options.cipher);
        login.forward = self.forward(bench, way);
        login.terminal = self.kind == Kind::Direct;
        let program = Program::start("ssh", login.command(), self.dir.path())?;
        let mut tunnel = Tunnel { program, visitors: FORWARD, http2: false };
        let serves = async {
            loop {
                tunnel.program.runs()?;
                if let Some(visitors) = self.visitors(way).await {
                    let met = match way {
                        Way::Orders => visitor::greet(visitors).await,
                        Way::Http2 => bench.site(Way::Https, visitors, self).greet(false).await,
                        _ => bench.site(way, visitors, self).greet(false).await,
                    };
                    if met.is_ok() {
                        return Ok(visitors);
                    }
                }
                pause().await;
            }
        };
        tunnel.visitors = within(START, "the tunnel", serves).await?;
        // What the login left to do is not the workload's.
        tokio::time::sleep(Duration::from_millis(200)).await;
        if way == Way::Http2 {
            tunnel.http2 = match bench.site(way, tunnel.visitors, self).greet(true).await {
                Ok(()) => true,
                Err(why) if why.is::<NoHttp2>() => false,
                Err(why) => return Err(why),
            };
        }
        Ok(tunnel)
    }

    /// The forward that OpenSSH's client is told.
    fn forward(&self, bench: &Bench, way: Way) -> [String; 2] {
        let target = match way {
            Way::Orders => bench.origins.orders,
            _ => bench.origins.web,
        };
        let raw = matches!(way, Way::Orders | Way::Raw);
        let (flag, from) = match self.kind {
            Kind::Adit { .. } if raw => ("-R", "tcp/raw".to_owned()),
            Kind::Sandhole { .. } if raw => ("-R", FORWARD.port().to_string()),
            Kind::Adit { .. } | Kind::Sandhole { .. } => ("-R", "web:80".to_owned()),
            Kind::Direct => ("-L", FORWARD.to_string()),
            _ => ("-R", FORWARD.to_string()),
        };
        [flag.to_owned(), format!("{from}:{target}")]
    }

    /// Where visitors of the tunnel come, as soon as it is known.
    async fn visitors(&self, way: Way) -> Option<SocketAddr> {
        let raw = matches!(way, Way::Orders | Way::Raw);
        match self.kind {
            Kind::Adit { .. } if raw => Some(SocketAddr::new(IP, raw_port(CONTROL).await.ok()?)),
            Kind::Direct => Some(FORWARD),
            _ if raw => Some(FORWARD),
            _ => Some(HTTPS),
        }
    }

    /// Whether visitors of the web come with TLS.
    pub fn has_tls(&self) -> bool {
        self.kind != Kind::Direct
    }

    /// The forward that the nth light client asks for: an http socket, which
    /// needs no port of its own; sshd knows ports alone.
    pub fn light_forward(&self, n: usize) -> (String, u32) {
        match self.kind {
            Kind::Adit { .. } | Kind::Sandhole { .. } => (format!("t{n}"), 80),
            _ => (IP.to_string(), 10_000 + n as u32),
        }
    }

    /// How many light clients fit this system.
    pub fn light_clients(&self) -> usize {
        match self.kind {
            Kind::Adit { .. } => 5000,
            _ => 500,
        }
    }

    /// CPU that all its processes used so far.
    pub fn cpu(&self) -> Duration {
        self.programs.iter().map(|p| usage::cpu(p.pid())).sum()
    }

    /// Memory that all its processes hold.
    pub fn memory(&self) -> Memory {
        self.programs.iter().map(|p| usage::memory(p.pid())).sum()
    }

    /// Its processes.
    pub fn pids(&self) -> Vec<u32> {
        self.programs.iter().flat_map(|p| usage::tree(p.pid())).collect()
    }

    /// What ended of it, and the ends of its logs, for messages.
    pub fn last_words(&mut self) -> String {
        let words = self.programs.iter_mut().map(|program| match program.runs() {
            Ok(()) => program.last_words(),
            Err(ended) => format!("; {ended}"),
        });
        words.collect()
    }
}

/// A tunnel that serves: OpenSSH's client, logged in.
pub struct Tunnel {
    program: Program,
    /// Where its visitors come.
    pub visitors: SocketAddr,
    /// Whether they were offered HTTP/2.
    pub http2: bool,
}

impl Tunnel {
    /// # Errors
    /// That the client ended.
    pub fn runs(&mut self) -> Outcome<()> {
        self.program.runs()
    }
}

/// How OpenSSH's client logs in.
struct Login {
    server: SocketAddr,
    key: PathBuf,
    cipher: String,
    /// -R or -L, and what follows it.
    forward: [String; 2],
    /// Whether it has a terminal there, without which OpenSSH lets small packets wait for
    /// acknowledgements (Nagle), at both ends.
    terminal: bool,
}

impl Login {
    fn new(server: SocketAddr, key: PathBuf, cipher: &str) -> Self {
        Self { server, key, cipher: cipher.to_owned(), forward: Default::default(), terminal: false }
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ssh");
        command.arg(if self.terminal { "-tt" } else { "-N" });
        command.args(["-F", "none", "-c", &self.cipher, "-l", "root"]).args(&self.forward);
        command.args(["-p", &self.server.port().to_string(), "-i"]).arg(&self.key);
        for option in [
            "UserKnownHostsFile=/dev/null",
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=no",
            "ExitOnForwardFailure=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            "BatchMode=yes",
            "ConnectTimeout=10",
            "LogLevel=ERROR",
        ] {
            command.args(["-o", option]);
        }
        command.arg(self.server.ip().to_string());
        if self.terminal {
            command.arg("sleep 86400");
        }
        command
    }
}

/// Returns when something listens there, or a program ended.
async fn listens(programs: &mut [Program], addr: SocketAddr) -> Outcome<()> {
    loop {
        programs.iter_mut().try_for_each(Program::runs)?;
        if TcpStream::connect(addr).await.is_ok() {
            return Ok(());
        }
        pause().await;
    }
}

fn keygen(path: &Path) -> Outcome<()> {
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path).output()?;
    if made.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&made.stderr).into()) }
}

/// The port of the socket `raw`, of the adit whose operators come there.
async fn raw_port(control: SocketAddr) -> Outcome<u16> {
    let record = operator_reads(control, "/v1/sockets/raw").await?;
    let port = record.get("ports").and_then(|ports| ports.get(0)?.as_u64()).ok_or("no port yet")?;
    Ok(u16::try_from(port)?)
}

/// A record as adit's control API has it.
async fn operator_reads(control: SocketAddr, path: &str) -> Outcome<Value> {
    let mut tcp = TcpStream::connect(control).await?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: {control}\r\nconnection: close\r\n\r\n");
    tcp.write_all(head.as_bytes()).await?;
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok(serde_json::from_str(body)?)
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}

impl Bench {
    /// What is published there.
    pub fn site(&self, way: Way, addr: SocketAddr, server: &Server) -> Site {
        let tls = matches!(way, Way::Https | Way::Http2) && server.has_tls();
        Site { addr, tls: tls.then(|| self.tls.visitors(way == Way::Http2)) }
    }
}
