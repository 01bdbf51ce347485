//! Three minutes of everything at once: visitors of all kinds, owners who are
//! killed and stopped, records that change. Nothing is wrong, nothing leaks.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use http_body_util::BodyExt;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

use crate::harness::*;

const MIB: u64 = 1 << 20;
const LASTS: Duration = Duration::from_secs(180);

/// What has happened, by everybody.
#[derive(Default)]
struct Tally {
    visits: AtomicU64,
    bytes: AtomicU64,
    /// Visitors who left in the middle of a download.
    left: AtomicU64,
    /// Visits that a killed or stopped owner cost.
    excused: AtomicU64,
    /// When an owner was killed or stopped, and until when that may be felt.
    gaps: Mutex<Vec<(Instant, Instant)>>,
}

impl Tally {
    fn visit(&self, bytes: u64) {
        self.visits.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn gap(&self, from: Instant) {
        self.gaps.lock().unwrap().push((from, Instant::now()));
    }

    /// Whether a visit that began at `begun` and is over now met a gap.
    fn excuses(&self, begun: Instant) -> bool {
        // The gap that is going on is written down at its end: leave it the time.
        self.gaps
            .lock()
            .unwrap()
            .iter()
            .any(|(from, to)| *from < Instant::now() && begun <= *to + Duration::from_secs(1))
    }
}

/// A simple generator: the same history for the same seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

async fn pause(dice: &mut Dice) {
    tokio::time::sleep(Duration::from_millis(2 + dice.below(30))).await;
}

/// One request over a new connection, plain or TLS: all `n` bytes, or why not.
async fn h1(addr: SocketAddr, ca: Option<&[u8]>, host: &str, n: u64) -> Result<u64, String> {
    let mut io: Io = match ca {
        Some(ca) => tls_connect(addr, host, trusting(ca, &[])).await.map_err(|e| e.to_string())?,
        None => Box::new(TcpStream::connect(addr).await.map_err(|e| e.to_string())?),
    };
    let head = format!("GET /bytes/{n} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    io.write_all(head.as_bytes()).await.map_err(|e| e.to_string())?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.map_err(|e| e.to_string())?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    if !head.starts_with("HTTP/1.1 200") {
        return Err(head.lines().next().unwrap_or_default().to_owned());
    }
    Pattern::read(Some(n), &mut io).await
}

fn never_wrong(result: &Result<u64, String>) {
    assert!(!result.as_ref().is_err_and(|e| e.contains("is wrong")), "{result:?}");
}

struct World {
    addr: [SocketAddr; 2],
    raw: SocketAddr,
    ca: Vec<u8>,
    tally: Arc<Tally>,
    until: Instant,
}

impl World {
    fn goes_on(&self) -> bool {
        Instant::now() < self.until
    }

    /// Visitors of a socket whose owner nobody touches: every one is served.
    async fn steady_h1(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed);
        while self.goes_on() {
            let (n, secure) = (dice.below(300_000), dice.below(2) == 1);
            let ca = secure.then_some(&self.ca[..]);
            let visit = h1(self.addr[usize::from(secure)], ca, "steady.edge.localhost", n);
            assert_eq!(within(DEADLINE, "a steady visit", visit).await, Ok(n));
            self.tally.visit(n);
            pause(&mut dice).await;
        }
    }

    async fn steady_h2(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed);
        while self.goes_on() {
            let io = tls_connect(self.addr[1], "steady.edge.localhost", trusting(&self.ca, &["h2"])).await.unwrap();
            let io = hyper_util::rt::TokioIo::new(io);
            let executor = hyper_util::rt::TokioExecutor::new();
            let (sender, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
            let connection = tokio::spawn(connection);
            for _ in 0..10 {
                let mut streams = JoinSet::new();
                for _ in 0..10 {
                    let (mut sender, n) = (sender.clone(), dice.below(100_000));
                    streams.spawn(async move {
                        get_exact(&mut sender, &format!("https://steady.edge.localhost/bytes/{n}"), n).await;
                        n
                    });
                }
                while let Some(n) = within(DEADLINE, "streams", streams.join_next()).await {
                    self.tally.visit(n.unwrap());
                }
                pause(&mut dice).await;
            }
            // One that is given up in its middle.
            let mut leaver = sender.clone();
            let request =
                hyper::Request::get("https://steady.edge.localhost/bytes/3000000").body(pattern_body(0)).unwrap();
            let mut answer = leaver.send_request(request).await.unwrap();
            let _ = answer.body_mut().frame().await;
            drop(answer);
            connection.abort();
            self.tally.left.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn steady_raw(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed);
        while self.goes_on() {
            let n = dice.below(500_000);
            let mut tcp = TcpStream::connect(self.raw).await.unwrap();
            let visit = async {
                match dice.below(4) {
                    0 => {
                        tcp.write_all(format!("DOWN {n}\n").as_bytes()).await.unwrap();
                        assert_eq!(Pattern::read(None, &mut tcp).await, Ok(n));
                    }
                    1 => {
                        tcp.write_all(b"EOF\n").await.unwrap();
                        Pattern::write(n, &mut tcp).await.unwrap();
                        tcp.shutdown().await.unwrap();
                        let mut verdict = String::new();
                        tcp.read_to_string(&mut verdict).await.unwrap();
                        assert_eq!(verdict, format!("exact {n}\n"));
                    }
                    2 => {
                        tcp.write_all(b"ECHO\n").await.unwrap();
                        let (mut from, mut to) = tcp.split();
                        let (read, ()) = tokio::join!(Pattern::read(None, &mut from), async {
                            Pattern::write(n, &mut to).await.unwrap();
                            to.shutdown().await.unwrap();
                        });
                        assert_eq!(read, Ok(n));
                    }
                    _ => {
                        // Leaves in the middle.
                        tcp.write_all(b"DOWN 2000000\n").await.unwrap();
                        tcp.read_exact(&mut [0; 1000]).await.unwrap();
                        self.tally.left.fetch_add(1, Ordering::Relaxed);
                    }
                }
            };
            within(DEADLINE, "a raw visit", visit).await;
            self.tally.visit(n);
            pause(&mut dice).await;
        }
    }

    async fn steady_ws(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed);
        while self.goes_on() {
            let tcp = TcpStream::connect(self.addr[0]).await.unwrap();
            let mut socket = WebSocket::connect(Box::new(tcp), "steady.edge.localhost", "/ws").await;
            for _ in 0..20 {
                let message = Pattern::default().next(1 + dice.below(60_000) as usize);
                let echo = async {
                    socket.write(2, message).await;
                    socket.read().await
                };
                assert!(within(DEADLINE, "an echo", echo).await == Some((2, message.to_vec())));
                self.tally.visit(message.len() as u64);
                pause(&mut dice).await;
            }
        }
    }

    /// Visitors of a socket with two tunnels, one of which is killed and
    /// stopped: only what was on its way through that one may be lost.
    async fn shared(self: Arc<Self>, seed: u64) {
        let mut dice = Dice(seed);
        while self.goes_on() {
            let (begun, n) = (Instant::now(), dice.below(300_000));
            let result = within(DEADLINE, "a shared visit", h1(self.addr[0], None, "shared.edge.localhost", n)).await;
            never_wrong(&result);
            match result {
                Ok(read) => self.tally.visit(read),
                Err(why) => {
                    // Whoever kills or stops writes it down right after.
                    tokio::time::sleep(Duration::from_millis(500)).await;
                    assert!(self.tally.excuses(begun), "{why}, and no owner was touched");
                    self.tally.excused.fetch_add(1, Ordering::Relaxed);
                }
            }
            pause(&mut dice).await;
        }
    }
}

/// An owner of the shared socket comes, serves, and is killed, stopped for a
/// while, or told to leave.
async fn owners(node: &Node, key: &Key, target: &str, tally: &Tally, until: Instant) -> u64 {
    let (mut dice, mut logins) = (Dice(7), 0);
    while Instant::now() < until {
        let mut ssh = Ssh::with(node, SshOpts::new(&[&format!("shared:80:{target}")]).key(key)).await;
        logins += 1;
        tokio::time::sleep(Duration::from_millis(500 + dice.below(2000))).await;
        let begun = Instant::now();
        match dice.below(4) {
            0 => ssh.program.kill9(),
            1 => ssh.program.signal("TERM"),
            _ => {
                tally.gaps.lock().unwrap().push((begun, begun + Duration::from_secs(10)));
                ssh.program.signal("STOP");
                tokio::time::sleep(Duration::from_millis(500 + dice.below(4000))).await;
                ssh.program.signal("CONT");
                tokio::time::sleep(Duration::from_millis(500)).await;
                ssh.program.kill9();
            }
        }
        tally.gap(begun);
    }
    logins
}

/// Guests make sockets on demand and vanish.
async fn guests(node: &Node, target: &str, until: Instant) -> u64 {
    let mut n = 0;
    while Instant::now() < until {
        let name = format!("guest-{}", n % 10);
        let ssh = Ssh::with(node, SshOpts::new(&[&format!("{name}:80:{target}")]).pty()).await;
        assert_eq!(h1(node.addr("http"), None, &format!("{name}.edge.localhost"), 1000).await, Ok(1000), "{name}");
        drop(ssh);
        n += 1;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    n
}

/// Records come, change and go; each answer is true when it is given.
async fn operator(node: &Node, until: Instant) -> u64 {
    let mut n = 0;
    let expect = async |name: &str, wanted: &str| {
        let got = h1(node.addr("http"), None, name, 1).await.unwrap_err();
        assert!(got.contains(wanted), "{name}: {got}, not {wanted}");
    };
    while Instant::now() < until {
        let (id, name, other) = (format!("rec-{}", n % 50), format!("a{n}.soak.test"), format!("b{n}.soak.test"));
        node.put(&format!("sockets/{id}"), json!({"type": "http", "hostnames": [name]})).await;
        expect(&name, "503").await;
        node.put(&format!("tunnels/{id}"), json!({"socket": id, "keys": [node.key.line()]})).await;
        node.put(&format!("sockets/{id}"), json!({"type": "http", "hostnames": [other]})).await;
        expect(&name, "404").await;
        expect(&other, "503").await;
        for record in ["tunnels", "sockets"] {
            let (status, answer) = node.api("DELETE", &format!("/v1/{record}/{id}"), None).await;
            assert!(matches!(status, 200 | 204), "{answer}");
        }
        expect(&other, "404").await;
        n += 1;
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    n
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_wrong_and_nothing_leaks_under_everything_at_once() {
    if !long() {
        return;
    }
    let mut node = Node::with(NodeOpts::default().set("log", "level = \"info,adit::visit=warn\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let (lasting, leaving) = (Key::new(dir.path(), "ed25519"), Key::new(dir.path(), "ecdsa"));
    let (web, raw) = (Origin::http().await, Origin::raw().await);
    node.put("sockets/shared", json!({"type": "http", "hostnames": ["shared.edge.localhost"]})).await;
    for (id, key) in [("lasting", &lasting), ("leaving", &leaving)] {
        node.put(&format!("tunnels/{id}"), json!({"socket": "shared", "keys": [key.line()]})).await;
    }
    let forwards = [format!("steady:80:{}", web.target()), format!("tcp/raw:{}", raw.target())];
    let mut steady = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    let mut shared = Ssh::with(&node, SshOpts::new(&[&format!("shared:80:{}", web.target())]).key(&lasting)).await;

    let tally = Arc::new(Tally::default());
    let world = |lasts: Duration, node: &Node, port: u16| {
        Arc::new(World {
            addr: [node.addr("http"), node.addr("https")],
            raw: SocketAddr::new(node.ip, port),
            ca: std::fs::read(node.ca()).unwrap(),
            tally: Arc::clone(&tally),
            until: Instant::now() + lasts,
        })
    };
    let port = node.port_of("raw").await;
    let crowd = |world: &Arc<World>| {
        let mut all = JoinSet::new();
        for seed in 1..=3 {
            all.spawn(Arc::clone(world).steady_h1(seed));
            all.spawn(Arc::clone(world).steady_h2(seed + 10));
            all.spawn(Arc::clone(world).steady_raw(seed + 20));
            all.spawn(Arc::clone(world).steady_ws(seed + 30));
            all.spawn(Arc::clone(world).shared(seed + 40));
        }
        all
    };
    // Buffers, pools and tables have their size after a while of the same.
    let warm = world(Duration::from_secs(15), &node, port);
    crowd(&warm).join_all().await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let before = node.usage();

    let world = world(LASTS, &node, port);
    let (until, target) = (world.until, web.target());
    let watch = async {
        let mut most = node.usage().memory;
        while Instant::now() < until {
            tokio::time::sleep(Duration::from_secs(1)).await;
            most = most.max(node.usage().memory);
        }
        most
    };
    let (_, logins, guests, changes, most) = tokio::join!(
        crowd(&world).join_all(),
        owners(&node, &leaving, &target, &tally, until),
        guests(&node, &target, until),
        operator(&node, until),
        watch
    );
    assert!(steady.program.runs() && shared.program.runs() && node.program().runs());
    eventually("descriptors are given back", async || {
        (node.usage().descriptors <= before.descriptors + 5).then_some(())
    })
    .await;
    let after = node.usage();
    eprintln!(
        "{:?}: {} visits, {} MiB, {logins} logins of a dying owner ({} visits lost with it), {guests} guests, \
         {changes} rounds of records; memory {} MiB before, {} MiB at most, {} MiB after; descriptors {} and {}; CPU {:?}",
        LASTS,
        tally.visits.load(Ordering::Relaxed),
        tally.bytes.load(Ordering::Relaxed) / MIB,
        tally.excused.load(Ordering::Relaxed),
        before.memory / MIB,
        most / MIB,
        after.memory / MIB,
        before.descriptors,
        after.descriptors,
        after.cpu,
    );
    // What is known to stay: of a download that is broken off, what the SSH library
    // keeps of its channel until the session ends; and the store's bounded history,
    // six revisions a round.
    let left = tally.left.load(Ordering::Relaxed);
    let stays = left * (3 << 10) + changes * 6 * (2 << 10);
    eprintln!("{left} visitors left in the middle: {} MiB may stay", stays / MIB);
    assert!(after.memory < before.memory + stays + 24 * MIB, "memory grew");
    assert!(!node.log().contains("panicked"), "{}", node.log());
}
