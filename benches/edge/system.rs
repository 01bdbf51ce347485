//! The systems that are compared: adit in any build and setting, and sshd. Each
//! is started afresh for a sample, and tells how to reach what it publishes.

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
use crate::{Bench, Outcome, visitor, within};

const IP: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const SSH: SocketAddr = SocketAddr::new(IP, 2222);
const CONTROL: SocketAddr = SocketAddr::new(IP, 9090);
/// Where sshd's visitors come; below the ports of outgoing connections.
const SSHD_VISITORS: u16 = 7000;
/// It re-executes itself, and so wants to know where it is.
const SSHD: &str = "/usr/sbin/sshd";

const START: Duration = Duration::from_secs(15);

/// What is measured.
#[derive(Debug, Clone)]
pub struct System {
    /// Its name in tables.
    pub name: String,
    kind: Kind,
}

#[derive(Debug, Clone)]
enum Kind {
    Adit { binary: PathBuf },
    Sshd,
}

impl System {
    /// An adit by its binary.
    pub fn adit(name: &str, binary: &str) -> Self {
        Self { name: name.to_owned(), kind: Kind::Adit { binary: binary.into() } }
    }

    /// OpenSSH's server.
    pub fn sshd() -> Self {
        Self { name: "sshd".to_owned(), kind: Kind::Sshd }
    }

    /// # Errors
    /// What is missing.
    pub fn check(&self) -> Result<(), String> {
        let (binary, hint) = match &self.kind {
            Kind::Adit { binary } => (binary.as_path(), ""),
            Kind::Sshd => (Path::new(SSHD), " (openssh-server)"),
        };
        if binary.is_file() { Ok(()) } else { Err(format!("{}: there is no {}{hint}", self.name, binary.display())) }
    }

    /// What it says of itself, for the record.
    pub fn version(&self) -> String {
        let mut command = match &self.kind {
            Kind::Adit { binary } => Command::new(binary),
            Kind::Sshd => Command::new("ssh"),
        };
        match command.arg("-V").output() {
            Ok(done) => String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).trim().to_owned(),
            Err(e) => e.to_string(),
        }
    }
}

/// A running system. Dropping it ends all its processes.
pub struct Server {
    kind: Kind,
    program: Program,
    dir: TempDir,
}

impl Server {
    /// Starts it; returns when it listens.
    ///
    /// # Errors
    /// Why it does not.
    pub async fn start(system: &System) -> Outcome<Self> {
        let dir = tempfile::tempdir_in("/run")?;
        keygen(&dir.path().join("key"))?;
        let command = match &system.kind {
            Kind::Adit { binary } => adit(binary, dir.path())?,
            Kind::Sshd => sshd(dir.path())?,
        };
        let mut program = Program::start("the server", command, dir.path())?;
        let listens = async {
            loop {
                program.runs()?;
                if TcpStream::connect(SSH).await.is_ok() {
                    return Ok(());
                }
                pause().await;
            }
        };
        within(START, "the server", listens).await?;
        Ok(Self { kind: system.kind.clone(), program, dir })
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

    /// Logs in with OpenSSH's client and publishes the origin; returns when a
    /// visitor reaches it.
    ///
    /// # Errors
    /// Why none does.
    pub async fn tunnel(&self, bench: &Bench) -> Outcome<Tunnel> {
        let target = bench.origin;
        let forward = match self.kind {
            Kind::Adit { .. } => format!("tcp/raw:{target}"),
            Kind::Sshd => format!("{IP}:{SSHD_VISITORS}:{target}"),
        };
        let mut command = Command::new("ssh");
        command.args(["-N", "-F", "none", "-c", &bench.options.cipher, "-R", &forward, "-l", self.user()]);
        command.args(["-p", &SSH.port().to_string(), "-i"]).arg(self.key());
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
        command.arg(IP.to_string());
        let program = Program::start("ssh", command, self.dir.path())?;
        let mut tunnel = Tunnel { program, visitors: SocketAddr::new(IP, SSHD_VISITORS) };
        let serves = async {
            loop {
                tunnel.program.runs()?;
                if let Some(visitors) = self.visitors().await
                    && visitor::greet(visitors).await.is_ok()
                {
                    return Ok(visitors);
                }
                pause().await;
            }
        };
        tunnel.visitors = within(START, "the tunnel", serves).await?;
        // What the login left to do is not the workload's.
        tokio::time::sleep(Duration::from_millis(200)).await;
        Ok(tunnel)
    }

    /// Where visitors of the tunnel come, as soon as it is known.
    async fn visitors(&self) -> Option<SocketAddr> {
        match self.kind {
            Kind::Sshd => Some(SocketAddr::new(IP, SSHD_VISITORS)),
            Kind::Adit { .. } => {
                let record = operator_reads("/v1/sockets/raw").await.ok()?;
                let port = record.get("ports")?.get(0)?.as_u64()?;
                Some(SocketAddr::new(IP, u16::try_from(port).ok()?))
            }
        }
    }

    /// The forward that the nth light client asks for: an http socket, which
    /// needs no port of its own; sshd knows ports alone.
    pub fn light_forward(&self, n: usize) -> (String, u32) {
        match self.kind {
            Kind::Adit { .. } => (format!("t{n}"), 80),
            Kind::Sshd => (IP.to_string(), 10_000 + n as u32),
        }
    }

    /// How many light clients fit this system.
    pub fn light_clients(&self) -> usize {
        match self.kind {
            Kind::Adit { .. } => 1000,
            Kind::Sshd => 200,
        }
    }

    /// CPU that all its processes used so far.
    pub fn cpu(&self) -> Duration {
        usage::cpu(self.program.pid())
    }

    /// Memory that all its processes hold.
    pub fn memory(&self) -> Memory {
        usage::memory(self.program.pid())
    }

    /// The end of its log, for messages.
    pub fn last_words(&self) -> String {
        self.program.last_words()
    }
}

/// A tunnel that serves: OpenSSH's client, logged in.
pub struct Tunnel {
    program: Program,
    /// Where its visitors come.
    pub visitors: SocketAddr,
}

impl Tunnel {
    /// # Errors
    /// That the client ended.
    pub fn runs(&mut self) -> Outcome<()> {
        self.program.runs()
    }
}

fn adit(binary: &Path, dir: &Path) -> Outcome<Command> {
    let settings = format!(
        "[node]\nname = \"edge\"\ndomain = \"edge.localhost\"\nexempt_loopback = true\n\
         [log]\nlevel = \"warn\"\n\
         [ingress]\nhttp = [\"{IP}:8080\"]\nhttps = []\nraw = [\"{IP}\"]\n\
         [ssh]\nlisten = [\"{SSH}\"]\nmode = \"open\"\nsockets_per_key = 100000\n\
         [control]\nlisten = [\"{CONTROL}\"]\nallow_anonymous_loopback = true\n"
    );
    let config = dir.join("adit.toml");
    std::fs::write(&config, settings)?;
    let mut command = Command::new(binary);
    command.arg("run").arg("--config").arg(config).arg("--state").arg(dir.join("state")).env_remove("ADIT_STATE");
    Ok(command)
}

fn sshd(dir: &Path) -> Outcome<Command> {
    let host_key = dir.join("host_key");
    keygen(&host_key)?;
    let settings = format!(
        "ListenAddress {SSH}\nHostKey {}\nAuthorizedKeysFile {}\nStrictModes no\nUsePAM no\nPidFile none\n\
         PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n\
         GatewayPorts clientspecified\nMaxStartups 1000\n",
        host_key.display(),
        dir.join("key.pub").display(),
    );
    let config = dir.join("sshd_config");
    std::fs::write(&config, settings)?;
    let mut command = Command::new(SSHD);
    command.args(["-D", "-e", "-f"]).arg(config);
    Ok(command)
}

fn keygen(path: &Path) -> Outcome<()> {
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path).output()?;
    if made.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&made.stderr).into()) }
}

/// A record as adit's control API has it.
async fn operator_reads(path: &str) -> Outcome<Value> {
    let mut tcp = TcpStream::connect(CONTROL).await?;
    let head = format!("GET {path} HTTP/1.1\r\nhost: {CONTROL}\r\nconnection: close\r\n\r\n");
    tcp.write_all(head.as_bytes()).await?;
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).await?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
    Ok(serde_json::from_str(body)?)
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(10)).await;
}
