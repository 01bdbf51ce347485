//! Tunnel clients other than OpenSSH, unmodified: each registers a socket and
//! carries a visitor's bytes both ways.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

const MIB: u64 = 1 << 20;

/// Waits until the named socket has a live tunnel.
async fn registered(node: &Node, program: &Program) {
    let by = std::time::Instant::now() + DEADLINE;
    while !node.log().contains("registered") {
        assert!(std::time::Instant::now() < by, "not registered:\n{}\n{}", program.output(), node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// 4 MiB each way, byte-exact, and a half-close.
async fn carries(node: &Node, socket: &str) {
    let addr = SocketAddr::new(node.ip, node.port_of(socket).await);
    let mut down = TcpStream::connect(addr).await.unwrap();
    down.write_all(format!("DOWN {}\n", 4 * MIB).as_bytes()).await.unwrap();
    assert_eq!(within(DEADLINE, "a download", Pattern::read(None, &mut down)).await, Ok(4 * MIB));
    let mut up = TcpStream::connect(addr).await.unwrap();
    up.write_all(b"EOF\n").await.unwrap();
    Pattern::write(4 * MIB, &mut up).await.unwrap();
    up.shutdown().await.unwrap();
    let mut answer = String::new();
    within(DEADLINE, "an answer", up.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, format!("exact {}\n", 4 * MIB));
}

#[tokio::test]
async fn dropbear_registers_and_serves() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let key = node.state().join("dropbear.key");
    let made = Command::new("dropbearkey").args(["-t", "ed25519", "-f"]).arg(&key).output().expect("dropbear-bin");
    assert!(made.status.success());
    let ssh = node.addr("ssh");
    let mut command = Command::new("dbclient");
    command.args(["-y", "-y", "-N", "-p", &ssh.port().to_string(), "-i"]).arg(&key);
    command.args(["-R", &format!("db:5000:{}", origin.target()), &format!("tester@{}", ssh.ip())]);
    command.env("HOME", node.state());
    let client = Program::start("dbclient", command);
    registered(&node, &client).await;
    carries(&node, "db").await;
}

#[tokio::test]
async fn plink_registers_and_serves() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let key = node.state().join("plink.ppk");
    let made = Command::new("puttygen")
        .arg(&node.key.path)
        .args(["-O", "private", "-o"])
        .arg(&key)
        .output()
        .expect("putty-tools");
    assert!(made.status.success(), "{made:?}");
    let ssh = node.addr("ssh");
    let host_key = host_key_fingerprint(&node);
    let mut command = Command::new("plink");
    command.args(["-ssh", "-batch", "-N", "-P", &ssh.port().to_string(), "-hostkey", &host_key, "-i"]).arg(&key);
    command.args(["-R", &format!("db:5000:{}", origin.target()), &format!("tester@{}", ssh.ip())]);
    command.env("HOME", node.state());
    let client = Program::start("plink", command);
    registered(&node, &client).await;
    carries(&node, "db").await;
}

/// What `ssh-keyscan` and `ssh-keygen -l` say of the node's host key.
fn host_key_fingerprint(node: &Node) -> String {
    let listed = Command::new("ssh-keygen").arg("-lf").arg(node.state().join("ssh_host_ed25519_key")).output().unwrap();
    let text = String::from_utf8_lossy(&listed.stdout).into_owned();
    text.split(' ').nth(1).unwrap_or_else(|| panic!("{listed:?}")).to_owned()
}

const PARAMIKO: &str = r#"
import socket, sys, threading, paramiko
host, port, key, origin = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(host, port, username="tester", pkey=paramiko.Ed25519Key.from_private_key_file(key), allow_agent=False, look_for_keys=False)
transport = client.get_transport()
def pump(read, write, end):
    while True:
        data = read(32768)
        if not data: break
        write(data)
    end()
def serve(channel):
    oh, op = origin.rsplit(":", 1)
    tcp = socket.create_connection((oh, int(op)))
    up = threading.Thread(target=pump, args=(channel.recv, tcp.sendall, lambda: tcp.shutdown(socket.SHUT_WR)))
    down = threading.Thread(target=pump, args=(tcp.recv, channel.sendall, channel.shutdown_write))
    up.start(); down.start(); up.join(); down.join(); channel.close()
def handler(channel, origin_addr, server_addr):
    threading.Thread(target=serve, args=(channel,), daemon=True).start()
bound = transport.request_port_forward("db", 5000, handler)
print("registered", bound, flush=True)
threading.Event().wait()
"#;

#[tokio::test]
async fn paramiko_registers_and_serves() {
    let node = Node::start().await;
    let origin = Origin::raw().await;
    let ssh = node.addr("ssh");
    // Debian's paramiko belongs to Debian's python.
    let mut command = Command::new("/usr/bin/python3");
    command
        .args(["-c", PARAMIKO, &ssh.ip().to_string(), &ssh.port().to_string()])
        .arg(&node.key.path)
        .arg(origin.target());
    let client = Program::start("paramiko", command);
    client.wait_for("registered", 1, DEADLINE).await;
    carries(&node, "db").await;
}
