//! A network between node and visitor: two namespaces joined by a veth pair.
//! Congestion control as the kernel reports it, and IPv6 beyond loopback.

use std::process::Command;

use crate::harness::*;

const NODE_V4: &str = "192.0.2.1";
const NODE_V6: &str = "2001:db8::1";

/// Two namespaces, `node` and `out`; removed with all that is in them.
struct Net {
    node: String,
    out: String,
}

fn ip(arguments: &str) -> Result<(), String> {
    let done = Command::new("ip").args(arguments.split(' ')).output().map_err(|e| e.to_string())?;
    let said = String::from_utf8_lossy(&done.stderr);
    if done.status.success() { Ok(()) } else { Err(format!("ip {arguments}: {}", said.trim())) }
}

impl Net {
    /// The pair, each side with its addresses and its loopback up; `None`,
    /// with a word, where this machine does not let us.
    fn make() -> Option<Self> {
        let n = std::process::id();
        let net = Self { node: format!("adit-n{n}"), out: format!("adit-o{n}") };
        let (node, out) = (&net.node, &net.out);
        let lines = [
            format!("netns add {node}"),
            format!("netns add {out}"),
            format!("-n {node} link add a{n} type veth peer name b{n} netns {out}"),
            format!("-n {node} addr add {NODE_V4}/24 dev a{n}"),
            format!("-n {out} addr add 192.0.2.2/24 dev b{n}"),
            format!("-n {node} addr add {NODE_V6}/64 dev a{n} nodad"),
            format!("-n {out} addr add 2001:db8::2/64 dev b{n} nodad"),
            format!("-n {node} link set lo up"),
            format!("-n {out} link set lo up"),
            format!("-n {node} link set a{n} up"),
            format!("-n {out} link set b{n} up"),
        ];
        for line in lines {
            if let Err(why) = ip(&line) {
                eprintln!("skipped: no network namespaces here ({why})");
                return None;
            }
        }
        // What the system would use by itself must not be what is asked for.
        let set = ["sh", "-c", "echo reno >/proc/sys/net/ipv4/tcp_congestion_control"];
        assert!(Self::command(node, &set).status().unwrap().success());
        Some(net)
    }

    fn within(namespace: &str) -> [&str; 4] {
        ["ip", "netns", "exec", namespace]
    }

    fn command(namespace: &str, line: &[&str]) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespace]).args(line);
        command
    }

    /// Runs a line of words there; whether it went well, and what it said.
    fn run(&self, namespace: &str, line: &str) -> (bool, String) {
        let words: Vec<&str> = line.split(' ').collect();
        let done = Self::command(namespace, &words).output().unwrap();
        (done.status.success(), String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned())
    }

    /// The congestion control of each connection that the node has accepted on `port`.
    fn congestion(&self, port: u16) -> Vec<String> {
        let (fine, said) = self.run(&self.node, &format!("ss -tinOH state established sport = :{port}"));
        assert!(fine, "{said}");
        let known = ["bbr", "reno", "cubic"];
        said.lines()
            .map(|line| line.split_whitespace().find(|w| known.contains(w)).unwrap_or(line).to_owned())
            .collect()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        for namespace in [&self.node, &self.out] {
            let _ = ip(&format!("netns del {namespace}"));
        }
    }
}

/// Connects to each HOST/PORT, says so, and stays.
const STAY: &str = "
import socket, sys, time
held = [socket.create_connection(a.split('/')) for a in sys.argv[1:]]
print('connected', flush=True)
time.sleep(60)
";

#[tokio::test(flavor = "multi_thread")]
async fn visitors_and_owners_from_a_network_get_bbr_and_those_on_loopback_what_the_system_has() {
    let Some(net) = Net::make() else { return };
    let known = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_available_congestion_control").unwrap();
    if !known.contains("bbr") || !known.contains("reno") {
        eprintln!("skipped: this kernel has only {known}");
        return;
    }
    let mut opts = NodeOpts::default().under(&Net::within(&net.node)).set("ingress", "raw = [\"::\"]");
    for (section, key, port) in [("ingress", "http", 8080), ("ingress", "https", 8443), ("ssh", "listen", 2222)] {
        opts = opts.set(section, &format!("{key} = [\"[::]:{port}\"]"));
    }
    let node = Node::with(opts.set("hello", "deadline = \"60s\"")).await;

    // An origin, an owner and visitors on the other side of the veth.
    let page = tempfile::tempdir().unwrap();
    std::fs::write(page.path().join("index.html"), "from the other side\n").unwrap();
    let mut serve =
        Net::command(&net.out, &["/usr/bin/python3", "-u", "-m", "http.server", "--bind", "127.0.0.1", "8000"]);
    serve.current_dir(page.path());
    let origin = Program::start("http.server", serve);
    origin.wait_for("Serving", 1, DEADLINE).await;
    let mut sessions = Vec::new();
    for (name, host) in [("four", NODE_V4), ("six", NODE_V6)] {
        let mut owner =
            SshOpts::new(&[&format!("{name}:80:127.0.0.1:8000"), &format!("tcp/raw-{name}:127.0.0.1:8000")]);
        (owner.ip, owner.port) = (Some(host.parse().unwrap()), Some(2222));
        owner.under = Net::within(&net.out).map(str::to_owned).to_vec();
        sessions.push(Ssh::with(&node, owner).await);
    }
    let log = node.log();
    let opened = log
        .lines()
        .filter(|l| l.contains("port opened"))
        .filter_map(|l| l.split_once("port=")?.1.trim().parse::<u16>().ok());
    let raw_port = opened.min().unwrap_or_else(|| panic!("no port was opened:\n{log}"));

    std::fs::copy(node.ca(), page.path().join("ca.pem")).unwrap();
    for host in [NODE_V4, &format!("[{NODE_V6}]")] {
        for name in ["four", "six"] {
            let ca = page.path().join("ca.pem");
            let line = format!(
                "curl -sS --max-time 10 --noproxy * --cacert {} --connect-to ::{host}: https://{name}.edge.localhost:8443/",
                ca.display()
            );
            assert_eq!(net.run(&net.out, &line), (true, "from the other side\n".to_owned()), "{name} by {host}");
            let line = format!("curl -sS --max-time 10 --noproxy * http://{host}:{raw_port}/");
            assert_eq!(net.run(&net.out, &line), (true, "from the other side\n".to_owned()), "raw by {host}");
        }
    }

    let python = |namespace: &str, to: &[&str]| {
        Program::start("python3", Net::command(namespace, &[&["/usr/bin/python3", "-c", STAY], to].concat()))
    };
    let each = |hosts: [&str; 2]| -> Vec<String> {
        let ports = [8080, 8443, raw_port];
        hosts.iter().flat_map(|h| ports.iter().map(move |p| format!("{h}/{p}"))).collect()
    };
    let from_outside = each([NODE_V4, NODE_V6]);
    let outside = python(&net.out, &from_outside.iter().map(String::as_str).collect::<Vec<_>>());
    outside.wait_for("connected", 1, DEADLINE).await;
    for port in [8080, 8443, raw_port, 2222] {
        eventually(&format!("two connections on {port}, both with bbr"), async || {
            let seen = net.congestion(port);
            assert!(seen.iter().all(|c| c == "bbr"), "port {port}: {seen:?}");
            (seen.len() >= 2).then_some(())
        })
        .await;
    }
    eprintln!("bbr on 4 ports for visitors and owners over IPv4 and IPv6, while the system's own is reno");
    drop(outside);
    for port in [8080, 8443, raw_port] {
        eventually("they are gone", async || net.congestion(port).is_empty().then_some(())).await;
    }
    let from_inside = each(["127.0.0.1", "::1"]);
    let inside = python(&net.node, &from_inside.iter().map(String::as_str).collect::<Vec<_>>());
    inside.wait_for("connected", 1, DEADLINE).await;
    for port in [8080, 8443, raw_port] {
        eventually(&format!("two connections on {port}, both with reno"), async || {
            let seen = net.congestion(port);
            (seen == ["reno", "reno"]).then_some(())
        })
        .await;
    }
    assert!(sessions.iter_mut().all(|s| s.program.runs()));
}
