//! One adit as its operator would run it: the real binary, a settings file, a
//! state folder, and a loopback address of its own so that the usual ports
//! never clash between tests.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{DEADLINE, Key, Program, request, within};

/// What differs from the harness's node.
#[derive(Default)]
pub struct NodeOpts {
    settings: Vec<(String, String)>,
    ipv6: bool,
    under: Vec<String>,
    ip: Option<IpAddr>,
}

impl NodeOpts {
    /// Started by this command, which must exec what follows it.
    #[must_use]
    pub fn under(mut self, command: &[&str]) -> Self {
        self.under = command.iter().map(|word| (*word).to_owned()).collect();
        self
    }

    /// At this address instead of one of its own.
    #[must_use]
    pub fn at(mut self, ip: IpAddr) -> Self {
        self.ip = Some(ip);
        self
    }

    /// Whether its name is this one.
    pub fn is_named(&self, name: &str) -> bool {
        self.settings.iter().any(|(section, line)| section == "node" && *line == format!("name = \"{name}\""))
    }

    /// By a clock that is as far off as this file says, at any time.
    #[must_use]
    pub fn with_clock(mut self, file: &str) -> Self {
        let library = format!("/usr/lib/{}-linux-gnu/faketime/libfaketime.so.1", std::env::consts::ARCH);
        let how = [
            "env",
            &format!("LD_PRELOAD={library}"),
            "FAKETIME_NO_CACHE=1",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            "DONT_FAKE_MONOTONIC=1",
            &format!("FAKETIME_TIMESTAMP_FILE={file}"),
        ];
        self.under.extend(how.map(str::to_owned));
        self
    }

    /// One more line of a section, over the harness's: `("ssh", "mode = \"closed\"")`;
    /// `{ip}` is the node's own address.
    #[must_use]
    pub fn set(mut self, section: &str, line: &str) -> Self {
        self.settings.push((section.to_owned(), line.to_owned()));
        self
    }

    /// Listens on ::1 too (on ports that the system chooses).
    #[must_use]
    pub fn ipv6(mut self) -> Self {
        self.ipv6 = true;
        self
    }
}

/// A running node. Dropping it kills it; a failing test prints its log.
pub struct Node {
    dir: tempfile::TempDir,
    program: Option<Program>,
    /// Its own loopback address.
    pub ip: IpAddr,
    /// The key that `Ssh` logs in with unless told otherwise.
    pub key: Key,
    under: Vec<String>,
    listening: BTreeMap<String, Vec<SocketAddr>>,
}

impl Node {
    /// An open node with default settings.
    pub async fn start() -> Self {
        Self::with(NodeOpts::default()).await
    }

    /// A node with other settings; returns when it is ready.
    pub async fn with(opts: NodeOpts) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ip = opts.ip.unwrap_or_else(own_address);
        std::fs::write(dir.path().join("adit.toml"), settings(ip, &opts)).unwrap();
        let key = Key::new(dir.path(), "ed25519");
        let mut node = Self { dir, program: None, ip, key, under: opts.under, listening: BTreeMap::new() };
        node.launch().await;
        node
    }

    async fn launch(&mut self) {
        let listening = self.state().join("listening.json");
        let _ = std::fs::remove_file(&listening);
        // Figures want another build than the tests' own.
        let binary = std::env::var("ADIT_TEST_BINARY").unwrap_or_else(|_| env!("CARGO_BIN_EXE_adit").into());
        let mut words = self.under.iter().map(String::as_str).chain([binary.as_str()]);
        let mut command = Command::new(words.next().unwrap());
        command.args(words).arg("run").arg("--config").arg(self.dir.path().join("adit.toml"));
        command.arg("--state").arg(self.state()).env("RUST_BACKTRACE", "1").env_remove("ADIT_STATE");
        let program = self.program.insert(Program::start("adit", command));
        let by = Instant::now() + DEADLINE;
        // Written whole, and only when ready.
        while !listening.exists() {
            assert!(program.runs(), "adit ended at its start:\n{}", program.output());
            assert!(Instant::now() < by, "adit is not ready within {DEADLINE:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        self.listening = serde_json::from_slice(&std::fs::read(&listening).unwrap()).unwrap();
    }

    /// The state folder.
    pub fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    /// The made-up CA's certificate.
    pub fn ca(&self) -> PathBuf {
        self.state().join("tls/ca.pem")
    }

    /// Where it listens for `http`, `https`, `ssh` or `control`, on its own address.
    pub fn addr(&self, listener: &str) -> SocketAddr {
        self.addr_on(listener, self.ip)
    }

    /// The same on another of its addresses.
    pub fn addr_on(&self, listener: &str, ip: IpAddr) -> SocketAddr {
        let all = &self.listening[listener];
        *all.iter().find(|a| a.ip() == ip).unwrap_or_else(|| panic!("{listener} listens on {all:?}, not on {ip}"))
    }

    /// The running program.
    pub fn program(&mut self) -> &mut Program {
        self.program.as_mut().unwrap()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.program.as_ref().unwrap().pid()
    }

    /// Its log so far.
    pub fn log(&self) -> String {
        self.program.as_ref().unwrap().output()
    }

    /// What it uses now.
    pub fn usage(&self) -> Usage {
        Usage::of(self.program.as_ref().unwrap().pid())
    }

    /// Tells it to drain (SIGTERM) without waiting.
    pub fn drain(&mut self) {
        self.program().signal("TERM");
    }

    /// Kills it.
    pub fn kill9(&mut self) {
        self.program().kill9();
    }

    /// Ends it if it runs (in good order, or by force at last) and starts it on the same state.
    pub async fn restart(&mut self) {
        if self.program().runs() {
            self.drain();
            self.drain();
            self.program().ended(DEADLINE).await;
        }
        self.launch().await;
    }

    /// The line that proves an operator, where one must: not on loopback.
    fn token(&self) -> String {
        let token = std::fs::read_to_string(self.state().join("control.token")).unwrap_or_default();
        if token.is_empty() { token } else { format!("authorization: Bearer {}\r\n", token.trim()) }
    }

    /// One call of the operator's API: status and JSON body (null where none).
    pub async fn api(&self, method: &str, path: &str, body: Option<&Value>) -> (u16, Value) {
        let body = body.map(Value::to_string).unwrap_or_default();
        let mut stream = tokio::net::TcpStream::connect(self.addr("control")).await.unwrap();
        let head = format!("{method} {path} HTTP/1.1\r\ncontent-type: application/json\r\n{}", self.token());
        let host = self.addr("control").to_string();
        let call = request(&mut stream, &head, &host, body.as_bytes());
        let (status, _, body) = within(DEADLINE, "an API call", call).await;
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// All metrics, as a scraper reads them.
    pub async fn metrics(&self) -> String {
        let mut stream = tokio::net::TcpStream::connect(self.addr("control")).await.unwrap();
        let host = self.addr("control").to_string();
        let head = format!("GET /metrics HTTP/1.1\r\n{}", self.token());
        let call = request(&mut stream, &head, &host, b"");
        let (_, _, body) = within(DEADLINE, "the metrics", call).await;
        String::from_utf8(body).unwrap()
    }

    /// The value of one metric, named with its labels; 0 where it is not told.
    pub async fn metric(&self, name: &str) -> f64 {
        let text = self.metrics().await;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        value.unwrap_or(0.0)
    }

    /// Puts a record and expects it to be taken.
    pub async fn put(&self, path: &str, record: Value) {
        let (status, answer) = self.api("PUT", &format!("/v1/{path}"), Some(&record)).await;
        assert!(matches!(status, 200 | 201), "PUT {path}: {status} {answer}");
    }

    /// The public port of a tcp or tls socket.
    pub async fn port_of(&self, socket: &str) -> u16 {
        let (status, record) = self.api("GET", &format!("/v1/sockets/{socket}"), None).await;
        assert_eq!(status, 200, "socket {socket}: {record}");
        u16::try_from(record["ports"][0].as_u64().expect("a port")).unwrap()
    }
}

/// What a process uses, as the kernel tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Resident memory, in bytes.
    pub memory: u64,
    /// The most that it ever was.
    pub peak: u64,
    /// Open descriptors.
    pub descriptors: usize,
    /// Processor time of all its threads since its start.
    pub cpu: Duration,
}

impl Usage {
    pub(super) fn of(pid: u32) -> Self {
        let read = |file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap();
        let status = read("status");
        let kib = |field: &str| -> u64 {
            let told = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
            told.split_whitespace().next().unwrap().parse().unwrap()
        };
        // proc_pid_stat(5): the name may hold anything; utime and stime are fields 14 and 15.
        let stat = read("stat");
        let ticks = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|n| n.parse::<u64>().unwrap()).sum();
        Self {
            memory: kib("VmRSS:") << 10,
            peak: kib("VmHWM:") << 10,
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
            // USER_HZ is 100 on every Linux of today.
            cpu: Duration::from_millis(ticks * 10),
        }
    }
}

/// An address of 127.0.0.0/8 that no other test of this machine uses now.
pub fn own_address() -> IpAddr {
    static NODES: AtomicU32 = AtomicU32::new(0);
    let n = (std::process::id() * 8 + NODES.fetch_add(1, Ordering::Relaxed)) & 0x7f_ffff;
    let [_, x, y, z] = n.to_be_bytes();
    IpAddr::from([127, 64 + x, y, z])
}

fn settings(ip: IpAddr, opts: &NodeOpts) -> String {
    let listen = |port: u16| match opts.ipv6 {
        true => format!("[\"{ip}:{port}\", \"[::1]:0\"]"),
        false => format!("[\"{ip}:{port}\"]"),
    };
    // On ::1 tests share one address: a range of their own instead.
    let first = 21000 + (std::process::id() % 1000) * 10;
    let (raw, ports) = match opts.ipv6 {
        true => (format!("[\"{ip}\", \"::1\"]"), format!("{first}-{}", first + 9)),
        false => (format!("[\"{ip}\"]"), "20000-20999".to_owned()),
    };
    let mut all = BTreeMap::<&str, BTreeMap<&str, String>>::new();
    let mut set = |section, key, value: String| {
        all.entry(section).or_default().insert(key, value);
    };
    set("node", "name", "\"test\"".into());
    set("node", "domain", "\"edge.localhost\"".into());
    set("node", "exempt_loopback", "true".into());
    set("drain", "notice", "\"0s\"".into());
    set("drain", "deadline", "\"5s\"".into());
    set("drain", "spread", "\"0s\"".into());
    set("log", "level", "\"info,adit=debug\"".into());
    set("ingress", "http", listen(8080));
    set("ingress", "https", listen(8443));
    set("ingress", "raw", raw);
    set("ingress", "ports", format!("\"{ports}\""));
    set("tls", "make_certificate", "true".into());
    set("ssh", "listen", listen(2222));
    set("ssh", "mode", "\"open\"".into());
    set("control", "listen", format!("[\"{ip}:9090\"]"));
    set("control", "allow_anonymous_loopback", ip.is_loopback().to_string());
    for (section, line) in &opts.settings {
        let (key, value) = line.split_once('=').unwrap();
        set(section, key.trim(), value.trim().replace("{ip}", &ip.to_string()));
    }
    let mut text = String::new();
    for (section, keys) in all {
        text += &format!("[{section}]\n");
        for (key, value) in keys {
            text += &format!("{key} = {value}\n");
        }
    }
    text
}
