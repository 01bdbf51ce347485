//! What a small request costs in allocations, held against tests/cost.json: a count
//! that does not depend on how busy a machine is. The node runs in this process, which
//! counts; ssh, nginx and h2load are processes of their own.
//!
//! A change that costs more fails here, with both figures. Where that is the price of
//! something wanted, and after one that costs less, write the file anew and say why in
//! the commit: `ADIT_RENEW=1 cargo test --features etcd --test cost`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::alloc::System;
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use adit::config::Config;
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// How much more is let pass: between runs the counts do not differ at all, with other
/// versions of the standard library they may.
const MARGIN: f64 = 1.03;

const DEADLINE: Duration = Duration::from_secs(20);

/// A program that ends with the test.
struct Program(Child);

impl Program {
    fn start(command: &mut Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_small_request_takes_no_more_allocations_than_it_did() {
    let dir = tempfile::tempdir().unwrap();
    let node = Node::start(dir.path());
    let mut now = BTreeMap::new();
    for (name, how) in [("h1", &["--h1"][..]), ("h2", &[])] {
        // The first brings up connections to the origin, and buffers that stay.
        node.allocations(how, 50);
        let per_request = (0..3).map(|_| {
            // Connecting and what else happens once is in both.
            let (few, many) = (node.allocations(how, 100), node.allocations(how, 600));
            many.saturating_sub(few) as f64 / 500.0
        });
        now.insert(name.to_owned(), (per_request.fold(f64::INFINITY, f64::min) * 10.0).round() / 10.0);
    }
    println!("allocations of a small request: {now:?}");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cost.json");
    if std::env::var_os("ADIT_RENEW").is_some() {
        return std::fs::write(file, serde_json::to_string_pretty(&now).unwrap() + "\n").unwrap();
    }
    let before: BTreeMap<String, f64> = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    for (name, count) in now {
        // A count of nothing is no count.
        assert!(count > 1.0, "{name}: {count}");
        assert!(
            count <= before[&name] * MARGIN,
            "a request of {name} takes {count} allocations, it took {}: see tests/cost.rs",
            before[&name]
        );
    }
}

/// A node of this process, and all around it.
struct Node {
    https: SocketAddr,
    _others: [Program; 2],
}

impl Node {
    fn start(dir: &Path) -> Self {
        let ip = own_address();
        let [origin, https, ssh] = [6001, 8443, 2222].map(|port| SocketAddr::new(ip, port));
        let nginx = nginx(dir, origin);
        let settings = format!(
            "[node]\ndomain = \"edge.localhost\"\nexempt_loopback = true\n\
             [ingress]\nhttp = []\nhttps = [\"{https}\"]\nraw = []\n[tls]\nmake_certificate = true\n\
             [ssh]\nlisten = [\"{ssh}\"]\nmode = \"open\"\n\
             [control]\nlisten = [\"{ip}:9090\"]\nallow_anonymous_loopback = true\n"
        );
        let file = dir.join("adit.toml");
        std::fs::write(&file, settings).unwrap();
        let mut config = Config::load(&file).unwrap();
        config.node.state = dir.join("state");
        std::thread::spawn(|| {
            // One thread: what happens does so in the same order each time.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async { adit::node::run(config, adit::cores::Cores::one()).await }).unwrap();
        });
        eventually("the node", || dir.join("state/listening.json").exists());
        let key = dir.join("key");
        let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
        assert!(made.unwrap().success());
        let mut client = Command::new("ssh");
        client.args(["-N", "-F", "none", "-R", &format!("web:80:{origin}"), "-p", &ssh.port().to_string(), "-i"]);
        client.arg(key);
        for option in
            ["UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "IdentitiesOnly=yes", "BatchMode=yes"]
        {
            client.args(["-o", option]);
        }
        let client = Program::start(client.arg(ip.to_string()));
        let node = Self { https, _others: [nginx, client] };
        eventually("the tunnel", || node.load(&["--h1"], 1).contains(" 1 2xx"));
        node
    }

    /// Of so many requests, one after another on one connection.
    fn allocations(&self, how: &[&str], requests: usize) -> usize {
        let count = || {
            let stats = COUNTED.stats();
            stats.allocations + stats.reallocations
        };
        let before = count();
        let said = self.load(how, requests);
        let after = count();
        assert!(said.contains(&format!(" {requests} 2xx, 0 3xx")), "{said}");
        after - before
    }

    fn load(&self, how: &[&str], requests: usize) -> String {
        let mut command = Command::new("h2load");
        command.args(how).args(["-c", "1", "-m", "1", "-n", &requests.to_string()]);
        command.arg(format!("--connect-to={}", self.https));
        command.arg(format!("https://web.edge.localhost:{}/", self.https.port()));
        let done = command.output().expect("h2load (nghttp2-client)");
        String::from_utf8_lossy(&done.stdout).into_owned()
    }
}

/// An origin that answers 100 bytes.
fn nginx(dir: &Path, addr: SocketAddr) -> Program {
    let dir = dir.join("nginx");
    std::fs::create_dir(&dir).unwrap();
    let temp = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.display()));
    let text = format!(
        "daemon off;\nmaster_process off;\npid {}/pid;\nerror_log stderr error;\nevents {{ }}\nhttp {{\naccess_log off;\n\
         {}server {{ listen {addr}; keepalive_requests 1000000; keepalive_timeout 600s;\n\
         location / {{ return 200 \"{}\"; }} }}\n}}\n",
        dir.display(),
        temp.concat(),
        "x".repeat(100)
    );
    std::fs::write(dir.join("nginx.conf"), text).unwrap();
    let program = Program::start(Command::new("nginx").arg("-c").arg(dir.join("nginx.conf")).arg("-p").arg(&dir));
    eventually("nginx", || TcpStream::connect(addr).is_ok());
    program
}

/// An address of 127.0.0.0/8 that no other test of this machine uses now: they choose
/// theirs by process id too.
fn own_address() -> IpAddr {
    let [_, x, y, z] = ((std::process::id() * 8) & 0x7f_ffff).to_be_bytes();
    IpAddr::from([127, 64 + x, y, z])
}

fn eventually(what: &str, there: impl Fn() -> bool) {
    let by = Instant::now() + DEADLINE;
    while !there() {
        assert!(Instant::now() < by, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
