//! Three places far from each other: namespaces joined by links with delays, and one
//! more, the hub, where visitors, owners, origins and the feed are, each a hop from
//! every place. The test that asks for it runs itself again inside the hub.

use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use super::{DEADLINE, EtcdCluster, NodeOpts, Program};

/// Where a test finds out that it is inside, and in whose namespaces.
const INSIDE: &str = "ADIT_TEST_NET";
/// Where the feed is.
const FEED: Ipv4Addr = Ipv4Addr::new(10, 79, 0, 1);
/// What nodes reach it by.
const FEED_NET: &str = "10.79.0.0/29";
/// Places.
const PLACES: usize = 3;

/// The network, as the test inside sees it.
pub struct Net {
    name: String,
    links: Program,
    asked: usize,
}

/// The namespaces; removed with all that is in them.
struct Namespaces(Vec<String>);

impl Drop for Namespaces {
    fn drop(&mut self) {
        for name in &self.0 {
            let _ = ip(&format!("netns del {name}"));
        }
    }
}

fn ip(arguments: &str) -> Result<(), String> {
    let done = Command::new("ip").args(arguments.split(' ')).output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() { Ok(()) } else { Err(format!("ip {arguments}: {}", said.trim())) }
}

impl Net {
    /// The network with these round trips between places 0 and 1, 0 and 2, 1 and 2, for
    /// the test of this name. `None`: it ran, inside, or this machine has no namespaces.
    pub async fn of(test: &str, round_trips_ms: [u32; 3]) -> Option<Self> {
        match std::env::var(INSIDE) {
            Ok(name) => Some(Self::inside(name, round_trips_ms).await),
            Err(_) => {
                Self::run_inside(test);
                None
            }
        }
    }

    fn run_inside(test: &str) {
        let name = format!("af{}", std::process::id());
        let hub = format!("{name}h");
        let mut namespaces = Namespaces(Vec::new());
        let mut lines = vec![format!("netns add {hub}"), format!("-n {hub} link set lo up")];
        lines.push(format!("-n {hub} addr add {FEED}/29 dev lo"));
        lines.extend([2, 3].map(|i| format!("-n {hub} addr add 10.79.0.{i}/29 dev lo")));
        for i in 0..PLACES {
            let place = format!("{name}{i}");
            lines.extend([format!("netns add {place}"), format!("-n {place} link set lo up")]);
            // One way for all, one for the feed alone.
            for (net, device) in [(77, 'v'), (78, 'f')] {
                lines.extend([
                    format!("-n {hub} link add {device}{i} type veth peer name {device} netns {place}"),
                    format!("-n {hub} addr add 10.{net}.{i}.1/24 dev {device}{i}"),
                    format!("-n {place} addr add 10.{net}.{i}.2/24 dev {device}"),
                    format!("-n {hub} link set {device}{i} up"),
                    format!("-n {place} link set {device} up"),
                ]);
            }
            lines.push(format!("-n {place} route add {FEED_NET} via 10.78.{i}.1"));
            namespaces.0.push(place);
        }
        namespaces.0.push(hub.clone());
        for line in &lines {
            if let Err(why) = ip(line) {
                eprintln!("skipped: no network namespaces here ({why})");
                return;
            }
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &hub]).arg(std::env::current_exe().unwrap());
        command.args(["--exact", test, "--nocapture", "--test-threads", "1"]).env(INSIDE, &name);
        let done = command.stdin(Stdio::null()).status().unwrap();
        assert!(done.success(), "inside its network the test failed");
    }

    async fn inside(name: String, round_trips_ms: [u32; 3]) -> Self {
        let mut command = Command::new("/usr/bin/python3");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/tools/links.py")).arg("1");
        for ((a, b), trip) in [(0, 1), (0, 2), (1, 2)].into_iter().zip(round_trips_ms) {
            let end = |at: usize, to: usize| format!("{name}{at}:to{to}:{}/30", Self::link_address(at, to));
            command.arg(format!("{a}-{b},{},{},{trip}", end(a, b), end(b, a)));
        }
        let links = Program::start("links", command);
        links.wait_for("up", 1, DEADLINE).await;
        Self { name, links, asked: 0 }
    }

    /// The address of place `at` on its link to place `to`.
    fn link_address(at: usize, to: usize) -> IpAddr {
        let (low, high) = (at.min(to), at.max(to));
        let net = u8::try_from(low * PLACES + high).unwrap();
        Ipv4Addr::new(10, 80, net, if at == low { 1 } else { 2 }).into()
    }

    /// A feed at the hub.
    pub async fn feed(&self) -> EtcdCluster {
        EtcdCluster::at(vec![FEED.into()]).await
    }

    /// The same of so many members.
    pub async fn feed_of(&self, members: u8) -> EtcdCluster {
        let [a, b, c, d] = FEED.octets();
        EtcdCluster::at((0..members).map(|i| IpAddr::from([a, b, c, d + i])).collect()).await
    }

    /// A node of this feed at a place, which others reach by its links alone.
    pub fn node(&self, etcd: &EtcdCluster, place: usize) -> NodeOpts {
        let name = ["a", "b", "c"][place];
        let addresses: Vec<String> =
            (0..PLACES).filter(|to| *to != place).map(|to| format!("{}:7443", Self::link_address(place, to))).collect();
        etcd.node(name, place == 0)
            .at(IpAddr::from([10, 77, u8::try_from(place).unwrap(), 2]))
            .under(&["ip", "netns", "exec", &format!("{}{place}", self.name)])
            .set("fleet", "listen = [\"0.0.0.0:7443\"]")
            .set("fleet", &format!("advertise = {addresses:?}"))
    }

    /// The namespace of a place.
    pub fn place(&self, place: usize) -> String {
        format!("{}{place}", self.name)
    }

    /// What starts a program there.
    pub fn under(&self, place: usize) -> [String; 4] {
        ["ip".into(), "netns".into(), "exec".into(), self.place(place)]
    }

    /// A place's address on its link to another one.
    pub fn at(&self, place: usize, to: usize) -> IpAddr {
        Self::link_address(place, to)
    }

    /// The congestion control of what begins at a place from now on.
    pub fn congestion(&self, place: usize, name: &str) {
        ip(&format!("netns exec {} sysctl -qw net.ipv4.tcp_congestion_control={name}", self.place(place))).unwrap();
    }

    async fn tell(&mut self, word: &str, (a, b): (usize, usize), rest: &str) {
        self.links.tell(&format!("{word} {}-{} {rest}", a.min(b), a.max(b)));
        self.asked += 1;
        self.links.wait_for("ok", self.asked, DEADLINE).await;
    }

    /// Changes what a link does: `rtt`, `jitter`, `loss` or `rate`.
    pub async fn set(&mut self, a: usize, b: usize, what: &str, value: f64) {
        self.tell("set", (a, b), &format!("{what} {value}")).await;
    }

    /// Nothing passes between two places from here on.
    pub async fn cut(&mut self, a: usize, b: usize) {
        self.tell("cut", (a, b), "").await;
    }

    /// It passes again.
    pub async fn heal(&mut self, a: usize, b: usize) {
        self.tell("heal", (a, b), "").await;
    }

    /// Whether a place reaches the feed.
    pub fn feed_reaches(&self, place: usize, reaches: bool) {
        let state = if reaches { "up" } else { "down" };
        ip(&format!("link set f{place} {state}")).unwrap();
        if reaches {
            // The kernel dropped it with the link.
            let hub = ip(&format!("-n {}{place} route replace {FEED_NET} via 10.78.{place}.1", self.name));
            hub.unwrap();
        }
    }
}
