//! Other SSH clients than OpenSSH, as Debian ships them: each registers a
//! tunnel and serves.

use std::path::Path;
use std::process::Command;

use crate::harness::*;

/// Runs a command that must succeed, for its output.
fn output(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?}: {e} (tests/run installs it)"));
    assert!(done.status.success(), "{command:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Starts what `client` makes of node, forward (`web:80:…`) and a folder, and
/// expects the origin's answer through it.
async fn serves(client: impl AsyncFnOnce(&Node, &Origin, &Path) -> Command) {
    let node = Node::start().await;
    let origin = Origin::http().await;
    let dir = tempfile::tempdir().unwrap();
    let mut command = client(&node, &origin, dir.path()).await;
    command.env("HOME", dir.path()).env_remove("SSH_AUTH_SOCK");
    let mut program = Program::start("the client", command);
    let url = format!("https://web.edge.localhost:{}/", node.addr("https").port());
    let body = eventually("an answer through the client", async || {
        assert!(program.runs(), "the client ended:\n{}", program.output());
        let (status, body) = curl(&node, &[&url]).await;
        (status == 200).then_some(body)
    })
    .await;
    assert_eq!(body, "hello from the origin\n");
    let big = curl(&node, &["-o", "/dev/null", &format!("{url}bytes/5000000")]).await;
    assert_eq!(big.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropbear_serves() {
    serves(async |node, origin, dir| {
        let key = dir.join("key.dropbear");
        output(Command::new("dropbearconvert").args(["openssh", "dropbear"]).arg(&node.key.path).arg(&key));
        let addr = node.addr("ssh");
        let mut command = Command::new("dbclient");
        command.args(["-y", "-y", "-N", "-T", "-l", "tester", "-p", &addr.port().to_string(), "-i"]).arg(key);
        command.args(["-R", &format!("web:80:{}", origin.target()), &addr.ip().to_string()]);
        command
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
        std::fs::write(&scanned, output(Command::new("ssh-keyscan").args(["-p", &port, "-t", "ed25519", &ip])))
            .unwrap();
        let print = output(Command::new("ssh-keygen").arg("-lf").arg(scanned));
        let print = print.split(' ').find(|word| word.starts_with("SHA256:")).unwrap().to_owned();
        let mut command = Command::new("plink");
        command.args(["-batch", "-ssh", "-N", "-P", &port, "-l", "tester", "-hostkey", &print, "-i"]).arg(key);
        command.args(["-R", &format!("web:80:{}", origin.target()), &ip]);
        command
    })
    .await;
}

const PARAMIKO: &str = r#"
import select, socket, sys, threading
import paramiko

host, port, key, target = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
client = paramiko.SSHClient()
client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
client.connect(host, port, "tester", key_filename=key, look_for_keys=False, allow_agent=False)

def pump(channel):
    origin = socket.create_connection(("127.0.0.1", int(target)))
    while True:
        ready, _, _ = select.select([channel, origin], [], [])
        for source, sink in ((channel, origin), (origin, channel)):
            if source in ready:
                piece = source.recv(65536)
                if not piece:
                    channel.close()
                    origin.close()
                    return
                sink.sendall(piece)

transport = client.get_transport()
transport.request_port_forward("web", 80)
while True:
    threading.Thread(target=pump, args=(transport.accept(),), daemon=True).start()
"#;

#[tokio::test(flavor = "multi_thread")]
async fn paramiko_serves() {
    serves(async |node, origin, _| {
        let addr = node.addr("ssh");
        // Debian's own: its modules are not seen by another on the PATH.
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", PARAMIKO, &addr.ip().to_string(), &addr.port().to_string()]);
        command.arg(&node.key.path).arg(origin.addr.port().to_string());
        command
    })
    .await;
}
