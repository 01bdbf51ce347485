//! What a request costs: CPU microseconds of the node for a small GET, next to
//! nginx doing TLS and a proxy's work to the same origin, without a tunnel.
//!
//! ```text
//! cargo bench --bench requests                  # h1 and h2, 5 rounds, 2 minutes
//! cargo bench --bench requests -- --rounds 9 h1
//! ```
//! Needs the Debian packages nghttp2-client (h2load), nginx-light, openssh-client.
//! The origin is an nginx that answers 100 bytes. Both proxies keep connections to
//! it; visitors keep theirs: `h1` is 32 connections with a request each, `h2` is 4
//! with 16 streams each; `plain` is `h1` without TLS. CPU is what the scheduler
//! gave the node's (or the proxy's) threads, not of the SSH client, the origin or the
//! load, which share the cores: requests per second are no capacity.
//! `gated` is adit with a login in every request's cookie: read, held against the
//! rules, and told to the origin; what that adds is printed as the median of rounds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(missing_docs)]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;

/// What a request costs, next to nginx.
#[derive(Parser)]
struct Options {
    /// h1, h2, plain; all where none is named.
    workloads: Vec<String>,
    #[arg(long, default_value_t = 15)]
    rounds: usize,
    /// Requests of one round: short ones, so that what the machine does beside hits
    /// all alike.
    #[arg(long, default_value_t = 10_000)]
    requests: usize,
    /// Another adit to compare with.
    #[arg(long)]
    also: Option<PathBuf>,
    /// Cargo says it.
    #[arg(long, hide = true)]
    bench: bool,
}

/// A program that ends with the bench.
struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Program {
    fn start(mut command: Command) -> Self {
        Self(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// Processor time so far, of all its threads.
    fn cpu(&self) -> Duration {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.0.id())).unwrap();
        let spent = |task: std::io::Result<std::fs::DirEntry>| -> Option<u64> {
            // Nanoseconds on a processor come first.
            std::fs::read_to_string(task.ok()?.path().join("schedstat")).ok()?.split(' ').next()?.parse().ok()
        };
        Duration::from_nanos(tasks.filter_map(spent).sum())
    }
}

/// A proxy under test: where h1 and h2 over TLS, and plain HTTP, are served.
struct Proxy {
    name: &'static str,
    program: Program,
    https: SocketAddr,
    http: SocketAddr,
    /// What visitors send along.
    cookie: Option<String>,
    _more: Vec<Program>,
}

fn free() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

fn eventually(what: &str, mut there: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !there() {
        assert!(begun.elapsed() < Duration::from_secs(15), "{what}: not within 15 s");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn nginx(dir: &Path, name: &str, http: &str) -> Program {
    let dir = dir.join(name);
    std::fs::create_dir(&dir).unwrap();
    let temp: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("{kind}_temp_path {}/{kind};\n", dir.display()))
        .concat();
    let text = format!(
        "daemon off;\nmaster_process off;\nworker_rlimit_nofile 4096;\npid {0}/pid;\nerror_log /dev/null;\n\
         events {{ worker_connections 2048; }}\nhttp {{\naccess_log off;\n{temp}{http}\n}}\n",
        dir.display()
    );
    std::fs::write(dir.join("nginx.conf"), text).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-c").arg(dir.join("nginx.conf")).arg("-p").arg(&dir);
    Program::start(command)
}

fn main() {
    let options = Options::parse();
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let origin = free();
    let keep = "keepalive_requests 1000000000; keepalive_timeout 600s;";
    let body = "x".repeat(100);
    let _origin = nginx(
        dir,
        "origin",
        &format!("server {{ listen {origin} backlog=2048; {keep} location / {{ return 200 \"{body}\"; }} }}"),
    );

    let made = rcgen::generate_simple_self_signed(["web.edge.localhost".to_owned()]).unwrap();
    let (chain, key) = (dir.join("chain.pem"), dir.join("key.pem"));
    std::fs::write(&chain, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();

    let mut proxies = vec![nginx_proxy(dir, origin, &chain, &key)];
    proxies.push(adit(dir, "adit", Path::new(env!("CARGO_BIN_EXE_adit")), origin, &chain, &key, false));
    proxies.push(adit(dir, "gated", Path::new(env!("CARGO_BIN_EXE_adit")), origin, &chain, &key, true));
    if let Some(other) = &options.also {
        proxies.push(adit(dir, "other", other, origin, &chain, &key, false));
    }
    println!(
        "{} requests a round, {} rounds; CPU us per request: least, median (requests/s)",
        options.requests, options.rounds
    );
    for (workload, args) in
        [("h1", &["--h1", "-c", "32"][..]), ("h2", &["-c", "4", "-m", "16"]), ("plain", &["--h1", "-c", "32"])]
    {
        // Gates are not passed in the clear.
        let proxies: Vec<&Proxy> =
            proxies.iter().filter(|proxy| workload != "plain" || proxy.cookie.is_none()).collect();
        if !options.workloads.is_empty() && !options.workloads.iter().any(|w| w == workload) {
            continue;
        }
        let mut figures = vec![Vec::new(); proxies.len()];
        for round in 0..=options.rounds {
            for turn in 0..proxies.len() {
                let at = (turn + round) % proxies.len();
                let figure = load(proxies[at], workload, args, options.requests);
                // The first warms up.
                if round > 0 {
                    figures[at].push(figure);
                }
            }
        }
        let median = |of: &mut Vec<f64>| {
            of.sort_by(f64::total_cmp);
            of[of.len() / 2]
        };
        if let Some(gated) = proxies.iter().find(|proxy| proxy.cookie.is_some()) {
            let open = proxies.iter().find(|proxy| proxy.name == "adit").expect("it is one of them");
            // Open, gated, gated, open: what drifts meanwhile hits both alike.
            let cpu = |proxy: &Proxy| load(proxy, workload, args, options.requests / 2).0;
            let mut adds: Vec<f64> = (0..2 * options.rounds)
                .map(|_| [cpu(open), cpu(gated), cpu(gated), cpu(open)])
                .map(|[before, one, two, after]| (one + two - before - after) / 2.0)
                .collect();
            let middle = median(&mut adds);
            let (low, high) = (adds[adds.len() / 4], adds[adds.len() * 3 / 4]);
            println!(
                "{workload:6} the gate adds {middle:.1} us per request (half of the rounds: {low:.1} to {high:.1})"
            );
        }
        for (proxy, figures_of) in proxies.iter().zip(&figures) {
            let mut cpu: Vec<f64> = figures_of.iter().map(|(cpu, _)| *cpu).collect();
            let mut rate: Vec<f64> = figures_of.iter().map(|(_, rate)| *rate).collect();
            let mut ratio: Vec<f64> =
                figures_of.iter().zip(&figures[0]).map(|((cpu, _), (base, _))| cpu / base).collect();
            let (middle, rate, ratio) = (median(&mut cpu), median(&mut rate), median(&mut ratio));
            println!("{workload:6} {:6} {:7.1} {middle:7.1} ({rate:6.0}/s)  {ratio:.2}x nginx", proxy.name, cpu[0]);
        }
    }
}

/// CPU microseconds per request, and requests per second.
fn load(proxy: &Proxy, workload: &str, args: &[&str], requests: usize) -> (f64, f64) {
    let (scheme, addr) = if workload == "plain" { ("http", proxy.http) } else { ("https", proxy.https) };
    let mut command = Command::new("h2load");
    command.args(args).args(["-n", &requests.to_string(), &format!("--connect-to={addr}")]);
    if let Some(cookie) = &proxy.cookie {
        command.args(["-H", &format!("cookie: {cookie}")]);
    }
    command.arg(format!("{scheme}://web.edge.localhost:{}/", addr.port()));
    let before = proxy.program.cpu();
    let done = command.output().expect("h2load");
    let used = proxy.program.cpu() - before;
    let said = String::from_utf8_lossy(&done.stdout).into_owned();
    assert!(said.contains(&format!("{requests} 2xx, 0 3xx")), "{}: {said}", proxy.name);
    let rate =
        said.lines().find_map(|line| line.split(", ").nth(1)?.strip_suffix(" req/s")?.parse().ok()).unwrap_or(0.0);
    (used.as_secs_f64() * 1e6 / requests as f64, rate)
}

fn nginx_proxy(dir: &Path, origin: SocketAddr, chain: &Path, key: &Path) -> Proxy {
    let (https, http) = (free(), free());
    let forward = "proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host; \
         proxy_set_header X-Forwarded-For $remote_addr; proxy_set_header X-Forwarded-Proto $scheme;";
    let keep = "keepalive_requests 1000000000; keepalive_timeout 600s;";
    let text = format!(
        "upstream origin {{ server {origin}; keepalive 128; keepalive_requests 1000000000; }}\n\
         server {{ listen {https} ssl http2; listen {http}; {keep}\n\
         ssl_certificate {}; ssl_certificate_key {}; location / {{ {forward} }} }}",
        chain.display(),
        key.display()
    );
    let program = nginx(dir, "proxy", &text);
    for addr in [https, http, origin] {
        eventually("nginx", || TcpStream::connect(addr).is_ok());
    }
    Proxy { name: "nginx", program, https, http, cookie: None, _more: Vec::new() }
}

fn adit(
    dir: &Path,
    name: &'static str,
    binary: &Path,
    origin: SocketAddr,
    chain: &Path,
    key: &Path,
    gated: bool,
) -> Proxy {
    let (https, http, ssh, control) = (free(), free(), free(), free());
    let state = dir.join(name);
    std::fs::create_dir(&state).unwrap();
    let settings = format!(
        "[node]\ndomain = \"edge.localhost\"\nexempt_loopback = true\n[log]\nlevel = \"warn\"\n\
         [ingress]\nhttp = [\"{http}\"]\nhttps = [\"{https}\"]\nraw = []\n\
         [tls]\ndefault_certificate = {chain:?}\ndefault_key = {key:?}\n\
         [ssh]\nlisten = [\"{ssh}\"]\nmode = \"open\"\n\
         [control]\nlisten = [\"{control}\"]\nallow_anonymous_loopback = true\n\
         [gate]\nhost = \"auth.edge.localhost\"\n"
    );
    std::fs::write(state.join("adit.toml"), settings).unwrap();
    let mut command = Command::new(binary);
    command.arg("run").arg("--config").arg(state.join("adit.toml")).arg("--state").arg(state.join("state"));
    let program = Program::start(command);
    eventually("adit", || TcpStream::connect(ssh).is_ok());
    let user_key = state.join("key");
    let made = Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&user_key).status();
    assert!(made.unwrap().success());
    if gated {
        let public = std::fs::read_to_string(user_key.with_extension("pub")).unwrap();
        let gate = r#"{"oidc": {"providers": ["here"], "allow_emails": ["ann@example.com"]}}"#;
        for (path, record) in [
            ("providers/here", r#"{"kind": "local"}"#.to_owned()),
            ("accounts/ann", r#"{"email": "ann@example.com", "password": "right"}"#.to_owned()),
            ("sockets/web", format!(r#"{{"type": "http", "hostnames": ["web.edge.localhost"], "gate": {gate}}}"#)),
            ("tunnels/web", format!(r#"{{"socket": "web", "keys": ["{}"]}}"#, public.trim())),
        ] {
            let url = format!("http://{control}/v1/{path}");
            curl(&["-f", "-X", "PUT", "-H", "content-type: application/json", "-d", &record, &url]);
        }
    }
    let mut command = Command::new("ssh");
    command.args(["-N", "-F", "none", "-c", "aes128-gcm@openssh.com", "-R", &format!("web:80:{origin}"), "-p"]);
    command.arg(ssh.port().to_string()).arg("-i").arg(&user_key);
    for option in ["UserKnownHostsFile=/dev/null", "StrictHostKeyChecking=no", "IdentitiesOnly=yes", "BatchMode=yes"] {
        command.args(["-o", option]);
    }
    let tunnel = Program::start({
        command.arg("127.0.0.1");
        command
    });
    let served = || {
        use std::io::{Read, Write};
        let Ok(mut tcp) = TcpStream::connect(http) else { return false };
        let _ = tcp.write_all(b"GET / HTTP/1.1\r\nHost: web.edge.localhost\r\nConnection: close\r\n\r\n");
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).is_ok()
            && answer.starts_with(if gated { "HTTP/1.1 308" } else { "HTTP/1.1 200" })
    };
    eventually("the tunnel", served);
    let cookie = gated.then(|| logged_in(&state, https));
    Proxy { name, program, https, http, cookie, _more: vec![tunnel] }
}

fn curl(args: &[&str]) -> String {
    let done = Command::new("curl").args(["-sS", "-m", "10"]).args(args).output().expect("curl");
    assert!(done.status.success(), "curl {args:?}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Logs in as a browser would, and answers the cookie.
fn logged_in(dir: &Path, https: SocketAddr) -> String {
    let (port, jar) = (https.port(), dir.join("jar"));
    let (jar, to) = (jar.to_str().unwrap(), format!("::{https}"));
    let all = ["-k", "-L", "--connect-to", &to, "-b", jar, "-c", jar, "-H", "accept: text/html"];
    let web = format!("https://web.edge.localhost:{port}/");
    let page = curl(&[&all[..], &[&web]].concat());
    let token = page.split("name=\"t\" value=\"").nth(1).and_then(|rest| rest.split('"').next()).expect("a form");
    let (own, form) = (format!("origin: https://auth.edge.localhost:{port}"), format!("t={token}"));
    let to = format!("https://auth.edge.localhost:{port}/.adit/local");
    let fields = ["--data-urlencode", form.as_str(), "-d", "email=ann@example.com", "-d", "password=right"];
    curl(&[&all[..], &["-H", &own], &fields[..], &[&to]].concat());
    let kept = std::fs::read_to_string(jar).unwrap();
    let line = kept.lines().find(|line| line.contains("__Host-adit_s\t")).unwrap_or_else(|| panic!("no login: {kept}"));
    format!("__Host-adit_s={}", line.rsplit('\t').next().unwrap())
}
