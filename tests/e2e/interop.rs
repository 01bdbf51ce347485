//! The adit engine against what real clients speak: OpenSSH forced to each
//! algorithm, other clients, and ssh-audit's opinion.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const MIB: u64 = 1 << 20;
/// Long enough for a debug build and slow clients on two shared cores.
const TRANSFER: Duration = Duration::from_secs(120);

fn adit() -> NodeOpts {
    NodeOpts::default().set("ssh", "engine = \"adit\"")
}

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
    let (node, origin) = (Node::with(adit().set("ssh", "nist_curves = true")).await, Origin::raw().await);
    for kex in ["curve25519-sha256", "curve25519-sha256@libssh.org", "ecdh-sha2-nistp256"] {
        let says = format!("kex: algorithm: {kex}");
        openssh_moves(&node, &origin, None, &[&format!("KexAlgorithms={kex}")], &[&says]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn openssh_speaks_each_cipher_and_mac() {
    let (node, origin) = (Node::with(adit()).await, Origin::raw().await);
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
    let (node, origin) = (Node::with(adit()).await, Origin::raw().await);
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
    let (node, origin) = (Node::with(adit().set("ssh", "mode = \"closed\"")).await, Origin::raw().await);
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

/// Runs a command that must succeed, for its output.
fn output(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (tests/run installs it)"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}
