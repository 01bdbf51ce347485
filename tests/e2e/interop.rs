//! The SSH engine against what real clients speak: OpenSSH forced to each
//! algorithm, other clients, and ssh-audit's opinion.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::*;

const MIB: u64 = 1 << 20;
/// Long enough for a debug build and slow clients on two shared cores.
const TRANSFER: Duration = Duration::from_secs(120);

async fn down(addr: SocketAddr, n: u64) {
    let mut visitor = TcpStream::connect(addr).await.unwrap();
    visitor.write_all(format!("DOWN {n}\n").as_bytes()).await.unwrap();
    assert_eq!(within(TRANSFER, "a download", Pattern::read(None, &mut visitor)).await, Ok(n));
}

async fn up(addr: SocketAddr, n: u64) {
    let mut visitor = TcpStream::connect(addr).await.unwrap();
    visitor.write_all(format!("UP {n}\n").as_bytes()).await.unwrap();
    within(TRANSFER, "an upload", async {
        Pattern::write(n, &mut visitor).await.unwrap();
        let mut answer = String::new();
        visitor.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, format!("exact {n}\n"));
    })
    .await;
}

/// Logs in with these options and this key, and moves bytes each way; the
/// client's own words must hold each of `says`.
async fn openssh_moves(node: &Node, origin: &Origin, key: Option<&Key>, options: &[&str], says: &[&str]) {
    static SOCKETS: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let socket = format!("raw{}", SOCKETS.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    let mut opts = SshOpts::new(&[&format!("tcp/{socket}:{}", origin.target())]);
    opts.key = key.cloned();
    opts.extra = options.iter().flat_map(|o| ["-o".to_owned(), (*o).to_owned()]).collect();
    let mut ssh = Ssh::with(node, opts).await;
    let addr = SocketAddr::new(node.ip, node.port_of(&socket).await);
    down(addr, 3 * MIB + 17).await;
    up(addr, 3 * MIB + 17).await;
    assert!(ssh.program.runs(), "{options:?}: the session ended:\n{}", ssh.program.output());
    let output = ssh.program.output();
    for word in says {
        assert!(output.contains(word), "{options:?}: not {word:?}:\n{output}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_speaks_each_key_exchange() {
    let (node, origin) = (Node::with(NodeOpts::default().set("ssh", "nist_curves = true")).await, Origin::raw().await);
    for kex in ["curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256"] {
        let says = format!("kex: algorithm: {kex}");
        openssh_moves(&node, &origin, None, &[&format!("KexAlgorithms={kex}")], &[&says]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_speaks_each_cipher_and_mac() {
    let (node, origin) = (Node::start().await, Origin::raw().await);
    for cipher in ["aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com"] {
        let says = format!("cipher: {cipher} MAC: <implicit>");
        openssh_moves(&node, &origin, None, &[&format!("Ciphers={cipher}")], &[&says]).await;
    }
    for cipher in ["aes128-ctr", "aes192-ctr", "aes256-ctr"] {
        for hash in ["hmac-sha2-256", "hmac-sha2-512"] {
            for mac in [hash.to_owned(), format!("{hash}-etm@openssh.com")] {
                let options = [format!("Ciphers={cipher}"), format!("MACs={mac}")];
                let says = format!("cipher: {cipher} MAC: {mac} ");
                openssh_moves(&node, &origin, None, &[&options[0], &options[1]], &[&says]).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_logs_in_with_each_kind_of_key() {
    let (node, origin) = (Node::start().await, Origin::raw().await);
    let dir = tempfile::tempdir().unwrap();
    let ecdsa = |bits: &str| {
        let path = dir.path().join(format!("ecdsa-{bits}"));
        output(Command::new("ssh-keygen").args(["-q", "-t", "ecdsa", "-b", bits, "-N", "", "-f"]).arg(&path));
        Key { path }
    };
    let rsa = Key::new(dir.path(), "rsa");
    let only = |algorithm: &str| format!("PubkeyAcceptedAlgorithms={algorithm}");
    for (key, algorithm) in [
        (Key::new(dir.path(), "ed25519"), "ssh-ed25519"),
        (ecdsa("256"), "ecdsa-sha2-nistp256"),
        (ecdsa("384"), "ecdsa-sha2-nistp384"),
        (rsa.clone(), "rsa-sha2-256"),
        (rsa, "rsa-sha2-512"),
    ] {
        openssh_moves(&node, &origin, Some(&key), &[&only(algorithm)], &[]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_logs_in_with_a_certificate() {
    let (node, origin) = (Node::with(NodeOpts::default().set("ssh", "mode = \"closed\"")).await, Origin::raw().await);
    let dir = tempfile::tempdir().unwrap();
    let (ca, key) = (Key::new(dir.path(), "ed25519"), Key::new(dir.path(), "ecdsa"));
    ca.certify(&key, "alice", &["-V", "-1m:+1h"]);
    node.put("sockets/raw", json!({"type": "tcp", "ports": [20500]})).await;
    let tunnel = json!({"socket": "raw", "user": "alice", "relay_port": 5001, "cert_authorities": [ca.line()]});
    node.put("tunnels/raw-1", tunnel).await;
    let mut opts = SshOpts::new(&[&format!("5001:{}", origin.target())]).key(&key);
    opts.user = "alice".into();
    let _ssh = Ssh::with(&node, opts).await;
    let addr = SocketAddr::new(node.ip, 20500);
    down(addr, 3 * MIB).await;
    up(addr, 3 * MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_takes_each_host_key() {
    let (node, origin) =
        (Node::with(NodeOpts::default().set("ssh", "ecdsa_host_key = true")).await, Origin::raw().await);
    for algorithm in ["ssh-ed25519", "ecdsa-sha2-nistp256"] {
        let says = format!("Server host key: {algorithm} ");
        openssh_moves(&node, &origin, None, &[&format!("HostKeyAlgorithms={algorithm}")], &[&says]).await;
    }
}

/// How a client takes its forward back and asks for it again.
enum Again {
    /// It cannot while it runs.
    No,
    /// A line on its standard input.
    Told,
    /// By these two commands.
    Commands(Box<[Command; 2]>),
}

/// Where the client's forward is published; returns when it serves.
async fn published(node: &Node, program: &mut Program) -> SocketAddr {
    eventually("a served forward", async || {
        assert!(program.runs(), "the client ended:\n{}", program.output());
        let addr = public(node).await?;
        let mut visitor = TcpStream::connect(addr).await.ok()?;
        visitor.write_all(b"DOWN 100\n").await.ok()?;
        (Pattern::read(None, &mut visitor).await == Ok(100)).then_some(addr)
    })
    .await
}

/// The public address of socket `raw`, where there is one.
async fn public(node: &Node) -> Option<SocketAddr> {
    let (status, record) = node.api("GET", "/v1/sockets/raw", None).await;
    let port = record["ports"][0].as_u64().filter(|_| status == 200)?;
    Some(SocketAddr::new(node.ip, u16::try_from(port).unwrap()))
}

/// What every client must do. `start` makes it forward `raw:25` to the origin.
async fn serves(start: impl AsyncFnOnce(&Node, &Origin, &Path) -> (Command, Again)) {
    let (node, origin) = (Node::start().await, Origin::raw().await);
    let dir = tempfile::tempdir().unwrap();
    let (mut command, again) = start(&node, &origin, dir.path()).await;
    command.env("HOME", dir.path()).env_remove("SSH_AUTH_SOCK");
    let mut program = Program::start("the client", command);
    let addr = published(&node, &mut program).await;
    moves(addr).await;
    match again {
        Again::No => return,
        Again::Told => {
            program.tell("again");
            program.wait_for("registered", 2, DEADLINE).await;
        }
        Again::Commands(mut commands) => {
            let [cancel, forward] = &mut *commands;
            output(cancel);
            eventually("the forward's end", async || {
                let mut visitor = TcpStream::connect(addr).await.ok()?;
                visitor.write_all(b"DOWN 100\n").await.ok();
                (Pattern::read(None, &mut visitor).await != Ok(100)).then_some(())
            })
            .await;
            output(forward);
        }
    }
    let addr = published(&node, &mut program).await;
    down(addr, MIB).await;
    up(addr, MIB).await;
    assert!(program.runs(), "the client ended:\n{}", program.output());
}

/// A visitor who ends its side and gets the answer all the same.
async fn half_close(addr: SocketAddr) {
    let mut visitor = TcpStream::connect(addr).await.unwrap();
    visitor.write_all(b"EOF\n").await.unwrap();
    within(DEADLINE, "a half-close", async {
        Pattern::write(100_000, &mut visitor).await.unwrap();
        visitor.shutdown().await.unwrap();
        let mut answer = String::new();
        visitor.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "exact 100000\n");
    })
    .await;
}

/// Eight streams each way at once, a half-close, and many short connections.
async fn moves(addr: SocketAddr) {
    let each = size(20 * MIB, 2 * MIB);
    let mut all = JoinSet::new();
    for i in 0..16 {
        all.spawn(async move { if i % 2 == 0 { down(addr, each).await } else { up(addr, each).await } });
    }
    all.join_all().await;

    half_close(addr).await;

    for _ in 0..size(1000, 100) {
        down(addr, 100).await;
    }
}

/// What the client programs take: host, port, key, and the forward.
fn told(command: &mut Command, node: &Node, origin: &Origin) {
    let addr = node.addr("ssh");
    command.args([addr.ip().to_string(), addr.port().to_string()]).arg(&node.key.path);
    command.args(["raw", "25", &origin.addr.port().to_string()]);
}

fn client(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/e2e/clients").join(file)
}

/// What tests/run installs below target.
fn installed(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target").join(file)
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_serves_and_takes_its_forward_back() {
    serves(async |node, origin, dir| {
        let (addr, control) = (node.addr("ssh"), dir.join("control"));
        let forward = format!("raw:25:{}", origin.target());
        let ssh = || {
            let mut command = Command::new("ssh");
            command.args(["-F", "none", "-p", &addr.port().to_string(), "-l", "tester", "-S"]).arg(&control);
            command
        };
        let mut command = ssh();
        command.args(["-M", "-N", "-R", &forward, "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no"]);
        command.args(["-o", "UserKnownHostsFile=/dev/null", "-o", "ExitOnForwardFailure=yes", "-i"]);
        command.arg(&node.key.path).arg(addr.ip().to_string());
        let commands = ["cancel", "forward"].map(|what| {
            let mut command = ssh();
            command.args(["-O", what, "-R", &forward, &addr.ip().to_string()]);
            command
        });
        (command, Again::Commands(Box::new(commands)))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dropbear_serves() {
    serves(async |node, origin, dir| {
        let (key, addr) = (dir.join("key.dropbear"), node.addr("ssh"));
        output(Command::new("dropbearconvert").args(["openssh", "dropbear"]).arg(&node.key.path).arg(&key));
        let mut command = Command::new("dbclient");
        command.args(["-y", "-y", "-N", "-T", "-l", "tester", "-p", &addr.port().to_string(), "-i"]).arg(key);
        command.args(["-R", &format!("raw:25:{}", origin.target()), &addr.ip().to_string()]);
        (command, Again::No)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn putty_serves() {
    serves(async |node, origin, dir| {
        let (key, addr) = (dir.join("key.ppk"), node.addr("ssh"));
        output(Command::new("puttygen").arg(&node.key.path).args(["-O", "private", "-o"]).arg(&key));
        let (ip, port) = (addr.ip().to_string(), addr.port().to_string());
        let scanned = dir.join("host.pub");
        let host = output(Command::new("ssh-keyscan").args(["-p", &port, "-t", "ed25519", &ip]));
        std::fs::write(&scanned, host).unwrap();
        let print = output(Command::new("ssh-keygen").arg("-lf").arg(scanned));
        let print = print.split(' ').find(|word| word.starts_with("SHA256:")).unwrap().to_owned();
        let mut command = Command::new("plink");
        command.args(["-batch", "-ssh", "-N", "-P", &port, "-l", "tester", "-hostkey", &print, "-i"]).arg(key);
        command.args(["-R", &format!("raw:25:{}", origin.target()), &ip]);
        (command, Again::No)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn paramiko_serves_and_takes_its_forward_back() {
    serves(async |node, origin, _| {
        // Debian's own: its modules are not seen by another on the PATH.
        let mut command = Command::new("/usr/bin/python3");
        told(command.arg(client("paramiko_client.py")), node, origin);
        (command, Again::Told)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn asyncssh_serves_and_takes_its_forward_back() {
    serves(async |node, origin, _| {
        let mut command = Command::new(installed("venv/bin/python"));
        told(command.arg(client("asyncssh_client.py")), node, origin);
        (command, Again::Told)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn npm_ssh2_serves_and_takes_its_forward_back() {
    serves(async |node, origin, _| {
        let mut command = Command::new("node");
        command.env("NODE_PATH", installed("npm/node_modules"));
        told(command.arg(client("ssh2_client.js")), node, origin);
        (command, Again::Told)
    })
    .await;
}

/// A client in C that serves one visitor after another.
async fn c_serves(library: &str) {
    let (node, origin) = (Node::start().await, Origin::raw().await);
    let dir = tempfile::tempdir().unwrap();
    let built = dir.path().join("client");
    let source = client(&format!("{library}_client.c"));
    output(Command::new("cc").args(["-Wall", "-O1", "-o"]).arg(&built).arg(source).arg(format!("-l{}", &library[3..])));
    // Both read PEM; libssh2 knows OpenSSH's own format for RSA alone.
    let key = Key { path: dir.path().join("key") };
    let mut keygen = Command::new("ssh-keygen");
    output(keygen.args(["-q", "-t", "ecdsa", "-b", "256", "-m", "PEM", "-N", "", "-f"]).arg(&key.path));
    let addr = node.addr("ssh");
    let mut command = Command::new(built);
    command.args([addr.ip().to_string(), addr.port().to_string()]).arg(&key.path);
    command.args(["raw", "25", &origin.addr.port().to_string()]).env("HOME", dir.path()).env_remove("SSH_AUTH_SOCK");
    let mut program = Program::start(library, command);
    let addr = published(&node, &mut program).await;
    down(addr, 20 * MIB).await;
    up(addr, 20 * MIB).await;
    half_close(addr).await;
    assert!(program.runs(), "the client ended:\n{}", program.output());
}

#[tokio::test(flavor = "multi_thread")]
async fn libssh_serves() {
    c_serves("libssh").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn libssh2_serves() {
    c_serves("libssh2").await;
}

/// The russh client, which serves each visitor from the origin.
struct Russh(SocketAddr);

impl russh::client::Handler for Russh {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &russh::keys::PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn server_channel_open_forwarded_tcpip(
        &mut self,
        channel: russh::Channel<russh::client::Msg>,
        _: &str,
        _: u32,
        _: &str,
        _: u32,
        reply: russh::client::ChannelOpenHandle,
        _: &mut russh::client::Session,
    ) -> Result<(), Self::Error> {
        reply.accept().await;
        let origin = self.0;
        tokio::spawn(async move {
            let mut origin = TcpStream::connect(origin).await.unwrap();
            let _ = tokio::io::copy_bidirectional(&mut channel.into_stream(), &mut origin).await;
        });
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn russh_serves_with_the_post_quantum_key_exchange_and_takes_its_forward_back() {
    let (node, origin) = (Node::start().await, Origin::raw().await);
    let mut config = russh::client::Config::default();
    config.preferred.kex = vec![russh::kex::MLKEM768X25519_SHA256].into();
    let mut session = russh::client::connect(config.into(), node.addr("ssh"), Russh(origin.addr)).await.unwrap();
    let key = russh::keys::load_secret_key(&node.key.path, None).unwrap();
    let key = russh::keys::PrivateKeyWithHashAlg::new(key.into(), None);
    assert!(session.authenticate_publickey("tester", key).await.unwrap().success());
    session.tcpip_forward("raw", 25).await.unwrap();
    moves(public(&node).await.unwrap()).await;
    session.cancel_tcpip_forward("raw", 25).await.unwrap();
    session.tcpip_forward("raw", 25).await.unwrap();
    let addr = public(&node).await.unwrap();
    down(addr, MIB).await;
    up(addr, MIB).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ssh_audit_finds_nothing_to_fail() {
    let node = Node::start().await;
    let addr = node.addr("ssh");
    let mut command = Command::new(installed("venv/bin/ssh-audit"));
    command.args(["--no-colors", "--skip-rate-test", "-p", &addr.port().to_string(), &addr.ip().to_string()]);
    // It says by its exit status too what it found.
    let said = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (tests/run installs it)")).stdout;
    let said = String::from_utf8(said).unwrap();
    assert!(said.contains("(kex) mlkem768x25519-sha256"), "{said}");
    assert!(!said.contains("[fail]"), "{said}");
    // A warning stands in its algorithm's line, or below it.
    let mut algorithm = "";
    for line in said.lines() {
        if line.starts_with('(') {
            algorithm = line;
        }
        if line.contains("[warn]") {
            assert!(algorithm.contains("(kex) curve25519"), "{line}\n{said}");
            assert!(line.contains("post-quantum"), "{line}\n{said}");
        }
    }
}

/// Runs a command that must succeed, for its output.
fn output(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (tests/run installs it)"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn who_wants_new_keys_all_the_time_is_sent_away() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let mut opts = SshOpts::new(&[&format!("tcp/raw:{}", origin.target())]);
    // OpenSSH's least: new keys after each packet.
    opts.extra = vec!["-o".into(), "RekeyLimit=16".into()];
    let mut ssh = Ssh::with(&node, opts).await;
    let addr = SocketAddr::new(node.ip, node.port_of("raw").await);
    let ping = async || {
        let mut visitor = TcpStream::connect(addr).await?;
        visitor.write_all(b"DOWN 1\n").await?;
        visitor.read_u8().await
    };
    for _ in 0..100 {
        if ping().await.is_err() {
            break;
        }
    }
    assert!(!ssh.program.ended(DEADLINE).await.success());
    assert!(ssh.program.output().contains("too many key exchanges"), "{}", ssh.program.output());
}
