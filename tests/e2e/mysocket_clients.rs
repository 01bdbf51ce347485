//! mysocketctl itself: the genuine Python client, unmodified, in namespaces whose hosts
//! file points what it has compiled in at a node; and an emulator of the Go client of
//! 2021-2022.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::harness::*;

/// Where a test finds out that it is inside its namespaces: the folder of its files.
const INSIDE: &str = "ADIT_TEST_MYSOCKET";

/// Runs the test of this name again with a network and a view of files of its own, where
/// the hosts of mysocket.io are this machine and ssh offers the key in `dir`. The folder,
/// inside; `None`: it ran, or this machine has no namespaces.
fn inside(test: &str) -> Option<PathBuf> {
    if let Ok(dir) = std::env::var(INSIDE) {
        return Some(dir.into());
    }
    let dir = tempfile::tempdir().unwrap();
    let key = Key::new(dir.path(), "ed25519");
    std::fs::rename(&key.path, dir.path().join("key")).unwrap();
    std::fs::rename(key.public(), dir.path().join("key.pub")).unwrap();
    let names = ["localhost", "api.mysocket.io", "ssh.mysocket.io", "download.edge.mysocket.io"];
    std::fs::write(dir.path().join("hosts"), format!("127.0.0.1 {}\n", names.join(" "))).unwrap();
    std::fs::write(dir.path().join("ssh_config"), format!("IdentityFile {}/key\n", dir.path().display())).unwrap();
    let set_up = "ip link set lo up && mount --bind \"$0/hosts\" /etc/hosts && \
        mount --bind \"$0/ssh_config\" /etc/ssh/ssh_config && exec \"$@\"";
    let unshare = |words: &[&str]| {
        let mut command = Command::new("unshare");
        // Whatever happens, nothing outlives it.
        command.args(["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", set_up]);
        command.arg(dir.path()).args(words).stdin(Stdio::null());
        command
    };
    let tried = unshare(&["true"]).output().unwrap();
    if !tried.status.success() {
        eprintln!("skipped: no namespaces here ({})", String::from_utf8_lossy(&tried.stderr).trim());
        return None;
    }
    let exe = std::env::current_exe().unwrap();
    let words = [exe.to_str().unwrap(), "--exact", test, "--nocapture", "--test-threads", "1"];
    let done = unshare(&words).env(INSIDE, dir.path()).env_remove("SSH_AUTH_SOCK").status().unwrap();
    assert!(done.success(), "inside its namespaces the test failed");
    None
}

/// A node at the usual ports, for the hosts that the client of 2021 has compiled in.
async fn usual_node() -> Node {
    let opts = NodeOpts::default()
        .at([127, 0, 0, 1].into())
        .set("node", "domain = \"edge.mysocket.test\"")
        .set("ingress", "https = [\"127.0.0.1:443\"]")
        .set("ingress", "http = [\"127.0.0.1:80\"]")
        .set("ssh", "listen = [\"127.0.0.1:22\"]")
        .set("ssh", "mode = \"closed\"")
        .set("mysocket", "hosts = [\"api.mysocket.io\", \"download.edge.mysocket.io\"]")
        .set("mysocket", "sign_up = true");
    Node::with(opts).await
}

/// mysocketctl with these words, by the folder's home.
fn mysocketctl(dir: &Path, node: &Node, words: &[&str]) -> Command {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(root.join("target/venv-mysocket/bin/python"));
    command.args(["-u", "-m", "mysocketctl.mysocketcli"]).args(words);
    command
        .env("HOME", dir)
        .env("REQUESTS_CA_BUNDLE", node.ca())
        .env("TERM", "xterm-256color")
        .env("LC_ALL", "C.UTF-8");
    command
}

/// What it says, where it ends by itself; whether it went well.
async fn says(dir: &Path, node: &Node, words: &[&str]) -> (bool, String) {
    let mut program = Program::start("mysocketctl", mysocketctl(dir, node, words));
    let (status, said) = program.finished(DEADLINE).await;
    (status.success(), said)
}

/// The cells of the rows of a table that prettytable printed.
fn rows(table: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect();
    table.lines().filter(|line| line.starts_with('|')).map(cells).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_client_goes_from_account_to_clean_up() {
    let test = "mysocket_clients::the_python_client_goes_from_account_to_clean_up";
    let Some(dir) = inside(test) else { return };
    let node = usual_node().await;
    let key = dir.join("key.pub");
    let well = async |words: &[&str]| {
        let (fine, said) = says(&dir, &node, words).await;
        assert!(fine, "{words:?}: {said}");
        said
    };

    // Account and login; what is refused is said.
    let new = ["account", "create", "--name", "Ann", "--email", "ann@example.com", "--password", "correct horse"];
    let said = well(&[&new[..], &["--sshkey", key.to_str().unwrap()]].concat()).await;
    assert!(said.contains("your account has been created"), "{said}");
    let (fine, said) = says(&dir, &node, &[&new[..], &["--sshkey", key.to_str().unwrap()]].concat()).await;
    assert!(!fine && said.contains("409") && said.contains("address already"), "{said}");
    let login = |password: &'static str| ["login", "--email", "ann@example.com", "--password", password];
    let (fine, said) = says(&dir, &node, &login("wrong")).await;
    assert!(!fine && said.contains("Login failed"), "{said}");
    let said = well(&login("correct horse")).await;
    assert!(said.contains("Logged in! Token stored in"), "{said}");
    let shown = rows(&well(&["account", "show"]).await);
    let user = shown.iter().find(|row| row[0] == "ssh username").unwrap()[1].clone();
    assert_eq!(shown[1], ["Email", "ann@example.com"]);

    // A socket of each type.
    for kind in ["http", "https", "tcp", "tls"] {
        let made = rows(&well(&["socket", "create", "--name", &format!("my {kind}"), "--type", kind]).await);
        assert_eq!((made[1][3].as_str(), made[1][5].as_str()), (kind, &*format!("my {kind}")));
    }
    let protected = ["--protected", "--username", "guest", "--password", "open it"];
    let said = well(&[&["socket", "create", "--name", "closed"], &protected[..]].concat()).await;
    assert!(said.contains("Protected Socket, login details") && said.contains("open it"), "{said}");
    let (fine, said) =
        says(&dir, &node, &["socket", "create", "--name", "c", "--cloudauth", "--allowed_email_domains", "a.test"])
            .await;
    assert!(!fine && said.contains("422") && said.contains("mysocket.providers"), "{said}");
    let listed = rows(&well(&["socket", "ls"]).await);
    assert_eq!(listed.len(), 6, "{listed:?}");

    // A tunnel, and a visitor whose request shows in its terminal.
    let http = listed.iter().find(|row| row[5] == "my http").unwrap().clone();
    let (socket, name) = (http[0].as_str(), http[1].as_str());
    assert!(http[2] == "80 443" && name.ends_with(".edge.mysocket.test"), "{http:?}");
    let made = rows(&well(&["tunnel", "create", "--socket_id", socket]).await);
    let tunnel = made[1][1].clone();
    assert_eq!(rows(&well(&["tunnel", "ls", "--socket_id", socket]).await), made);
    let origin = Origin::http().await;
    let port = origin.addr.port().to_string();
    let connect = ["tunnel", "connect", "--socket_id", socket, "--tunnel_id", &tunnel, "--port", &port];
    let _home = home_with_key(&dir);
    for engine in ["system", "paramiko"] {
        let words = [&connect[..], &["--engine", engine]].concat();
        let mut client = in_terminal(&mysocketctl(&dir, &node, &words));
        client.wait_for("is published: https://", 1, DEADLINE).await;
        let (status, body) = curl(&node, &[&format!("https://{name}/?by={engine}")]).await;
        assert_eq!((status, body.as_str()), (200, "hello from the origin\n"));
        client.wait_for(&format!("GET {name}/?by={engine} 200"), 1, DEADLINE).await;
        interrupted(&mut client, "Bye").await;
        client.finished(DEADLINE).await;
    }
    let said = well(&["tunnel", "delete", "--socket_id", socket, "--tunnel_id", &tunnel]).await;
    assert!(said.contains("deleted"), "{said}");
    for row in listed.iter().skip(1) {
        let said = well(&["socket", "delete", "--socket_id", &row[0]]).await;
        assert!(said.contains(&format!("Socket {} deleted", row[0])), "{said}");
    }
    assert_eq!(rows(&well(&["socket", "ls"]).await).len(), 1);
    let (fine, said) = says(&dir, &node, &["socket", "delete", "--socket_id", socket]).await;
    assert!(!fine && said.contains("404") && said.contains("no such socket"), "{said}");

    // All of it at once, in a terminal, until Ctrl-C twice, as its users do.
    let mut client = in_terminal(&mysocketctl(&dir, &node, &["connect", "--port", &port, "--name", "quick"]));
    client.wait_for("is published: https://", 1, DEADLINE).await;
    let name = rows(&client.output().replace('\r', "")).pop().unwrap()[1].clone();
    let (status, _) = curl(&node, &[&format!("https://{name}/?quick")]).await;
    assert_eq!(status, 200);
    client.wait_for(&format!("GET {name}/?quick 200"), 1, DEADLINE).await;
    interrupted(&mut client, "cleaning up...").await;
    let (_, said) = client.finished(DEADLINE).await;
    assert!(said.contains("deleted"), "{said}");
    assert_eq!(rows(&well(&["socket", "ls"]).await).len(), 1, "it cleaned up");
    assert_eq!(curl(&node, &[&format!("https://{name}/?quick")]).await.0, 404);
    assert!(node.log().contains(&format!("user=\"{user}\"")) || node.log().contains(&user));
}

/// A client at a terminal of its own.
fn in_terminal(line: &Command) -> Program {
    let words = std::iter::once(line.get_program()).chain(line.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    let mut command = Command::new("script");
    command.args(["-qefc", &words.join(" "), "/dev/null"]);
    command.envs(line.get_envs().filter_map(|(name, value)| Some((name, value?))));
    Program::start("mysocketctl in a terminal", command)
}

/// Ctrl-C ends the SSH session, and a second one the client.
async fn interrupted(client: &mut Program, last: &str) {
    client.tell("\u{3}");
    client.wait_for("Press ctrl-c to exit", 1, DEADLINE).await;
    client.tell("\u{3}");
    client.wait_for(last, 1, DEADLINE).await;
}

/// A home with token and key, for paramiko, which reads no settings of ssh.
fn home_with_key(dir: &Path) -> PathBuf {
    let ssh = dir.join(".ssh");
    std::fs::create_dir_all(&ssh).unwrap();
    std::fs::copy(dir.join("key"), ssh.join("id_ed25519")).unwrap();
    std::fs::copy(dir.join("key.pub"), ssh.join("id_ed25519.pub")).unwrap();
    dir.to_owned()
}
