//! The real OpenSSH client, and keys made by ssh-keygen.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{DEADLINE, Node, Program};

/// A key pair in files.
#[derive(Debug, Clone)]
pub struct Key {
    /// The private key; `.pub` and `-cert.pub` stand beside it.
    pub path: PathBuf,
}

impl Key {
    /// A new key of a type that ssh-keygen knows: ed25519, ecdsa, rsa.
    pub fn new(dir: &Path, kind: &str) -> Self {
        static KEYS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let n = KEYS.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = dir.join(format!("key-{kind}-{n}"));
        keygen(&["-t", kind, "-N", "", "-C", "test", "-f", path.to_str().unwrap()]);
        Self { path }
    }

    /// The public key's file.
    pub fn public(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push(".pub");
        path.into()
    }

    /// The public key's authorized_keys line.
    pub fn line(&self) -> String {
        std::fs::read_to_string(self.public()).unwrap().trim().to_owned()
    }

    /// Certifies `user`'s key for these principals; `options` as ssh-keygen
    /// takes them (`-V`, `-O`, `-h`).
    pub fn certify(&self, user: &Key, principals: &str, options: &[&str]) {
        let (ca, public) = (self.path.to_str().unwrap(), user.public());
        let fixed = ["-s", ca, "-I", "test", "-n", principals];
        keygen(&[&fixed, options, &[public.to_str().unwrap()]].concat());
    }
}

fn keygen(arguments: &[&str]) {
    let made = Command::new("ssh-keygen").arg("-q").args(arguments).output().expect("ssh-keygen (openssh-client)");
    assert!(made.status.success(), "ssh-keygen {arguments:?}: {}", String::from_utf8_lossy(&made.stderr));
}

/// How the client is started.
pub struct SshOpts {
    /// What stands behind each `-R`.
    pub forwards: Vec<String>,
    /// The login name.
    pub user: String,
    /// The key; the node's usual one where none is given.
    pub key: Option<Key>,
    /// Whether to open a session (the console), and with a pty; else `-N`.
    pub session: Session,
    /// The node's address to log in at; its own where none is given.
    pub ip: Option<IpAddr>,
    /// The port to log in at; the SSH port where none is given.
    pub port: Option<u16>,
    /// Ask nothing; off, keyboard-interactive is tried too.
    pub batch: bool,
    /// More arguments.
    pub extra: Vec<String>,
    /// Started by this command, which must exec what follows it.
    pub under: Vec<String>,
}

/// What the client asks for besides forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// Nothing: `-N`.
    None,
    /// A session without a pty: `-T`.
    Plain,
    /// A session with a pty: `-tt`.
    Pty,
}

impl SshOpts {
    /// `-N` with these forwards.
    pub fn new(forwards: &[&str]) -> Self {
        let forwards = forwards.iter().map(|f| (*f).to_owned()).collect();
        Self {
            forwards,
            user: "tester".into(),
            key: None,
            session: Session::None,
            ip: None,
            port: None,
            batch: true,
            extra: Vec::new(),
            under: Vec::new(),
        }
    }

    /// Logs in with another key.
    #[must_use]
    pub fn key(mut self, key: &Key) -> Self {
        self.key = Some(key.clone());
        self
    }

    /// Opens the console on a pty.
    #[must_use]
    pub fn pty(mut self) -> Self {
        self.session = Session::Pty;
        self
    }
}

/// A running client.
pub struct Ssh {
    /// The process and what it says.
    pub program: Program,
}

impl Ssh {
    /// Logs in with these forwards; returns when all are registered.
    pub async fn start(node: &Node, forwards: &[&str]) -> Self {
        Self::with(node, SshOpts::new(forwards)).await
    }

    /// The same with other options.
    pub async fn with(node: &Node, opts: SshOpts) -> Self {
        let count = opts.forwards.len();
        let ssh = Self::launch(node, opts);
        ssh.program.wait_for("remote forward success", count, DEADLINE).await;
        ssh
    }

    /// Starts it without waiting for anything: for refusals.
    pub fn launch(node: &Node, opts: SshOpts) -> Self {
        let addr = match (opts.ip, opts.port) {
            (Some(ip), Some(port)) => SocketAddr::new(ip, port),
            (ip, _) => node.addr_on("ssh", ip.unwrap_or(node.ip)),
        };
        let key = opts.key.as_ref().unwrap_or(&node.key);
        let mut words = opts.under.iter().map(String::as_str).chain(["ssh"]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words);
        let port = opts.port.unwrap_or(addr.port());
        command.args(["-v", "-F", "none", "-p", &port.to_string(), "-l", &opts.user]);
        command.arg("-i").arg(&key.path).env_remove("SSH_AUTH_SOCK");
        for option in [
            "UserKnownHostsFile=/dev/null",
            "GlobalKnownHostsFile=/dev/null",
            "StrictHostKeyChecking=no",
            "ExitOnForwardFailure=yes",
            "IdentitiesOnly=yes",
            "IdentityAgent=none",
            if opts.batch { "BatchMode=yes" } else { "BatchMode=no" },
            "ConnectTimeout=10",
        ] {
            command.args(["-o", option]);
        }
        command.args(
            match opts.session {
                Session::None => "-N",
                Session::Plain => "-T",
                Session::Pty => "-tt",
            }
            .split(' '),
        );
        for forward in &opts.forwards {
            command.args(["-R", forward]);
        }
        command.args(&opts.extra).arg(addr.ip().to_string());
        Self { program: Program::start("ssh", command) }
    }

    /// The public port that the server gave for a forward of port 0.
    pub async fn allocated_port(&self) -> u16 {
        const SAYS: &str = "Allocated port ";
        self.program.wait_for(SAYS, 1, Duration::from_secs(10)).await;
        let output = self.program.output();
        let rest = output.split_once(SAYS).unwrap().1;
        rest.split(' ').next().unwrap().parse().unwrap()
    }
}
