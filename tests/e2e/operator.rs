//! The operator's API against the real binary: records act at once, disturb
//! nobody, survive kill -9, and a bad one takes nothing down.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::*;

async fn get(node: &Node, name: &str) -> u16 {
    curl(node, &[&format!("https://{name}:8443/")]).await.0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_is_created_replaced_answered_as_it_was_and_deleted() {
    let node = Node::start().await;
    let record = json!({"type": "http", "hostnames": ["a.edge.localhost"], "x-team": {"name": "blue"}});
    assert_eq!(node.api("PUT", "/v1/sockets/a", Some(&record)).await.0, 201);
    let (status, stored) = node.api("GET", "/v1/sockets/a", None).await;
    assert_eq!((status, &stored["x-team"]["name"]), (200, &json!("blue")));
    assert_eq!((&stored["redirect_https"], &stored["tunnels"]), (&json!(false), &json!([])));
    // As it was answered it is taken back, and nothing changes.
    assert_eq!(node.api("PUT", "/v1/sockets/a", Some(&stored)).await.0, 200);
    assert_eq!(node.api("GET", "/v1/sockets/a", None).await, (200, stored));
    let (status, listed) = node.api("GET", "/v1/sockets", None).await;
    assert!(status == 200 && listed.to_string().contains("a.edge.localhost"), "{listed}");
    assert!(matches!(node.api("DELETE", "/v1/sockets/a", None).await.0, 200 | 204));
    let (status, problem) = node.api("GET", "/v1/sockets/a", None).await;
    assert_eq!((status, &problem["status"]), (404, &json!(404)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_record_is_refused_whole_naming_each_field_and_the_last_good_one_serves() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    node.put("sockets/web", json!({"type": "http", "hostnames": ["web.edge.localhost"]})).await;
    node.put("tunnels/web", json!({"socket": "web", "keys": [node.key.line()]})).await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    assert_eq!(get(&node, "web.edge.localhost").await, 200);
    let bad = json!({"type": "htp", "hostnames": ["b c"], "ports": [99999], "redirect_https": "yes"});
    let (status, problem) = node.api("PUT", "/v1/sockets/web", Some(&bad)).await;
    assert!(matches!(status, 400 | 422), "{status}");
    let text = problem.to_string();
    for field in ["type", "hostnames", "ports", "redirect_https"] {
        assert!(text.contains(field), "{field} is not named in {text}");
    }
    let taken = json!({"type": "http", "hostnames": ["web.edge.localhost"]});
    let (status, problem) = node.api("PUT", "/v1/sockets/other", Some(&taken)).await;
    assert_eq!(status, 409);
    assert!(problem.to_string().contains("web.edge.localhost"), "{problem}");
    assert_eq!(get(&node, "web.edge.localhost").await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_acts_on_the_next_visitor_and_leaves_those_inside_alone() {
    let node = Node::start().await;
    let (web, raw) = (Origin::http().await, Origin::raw().await);
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", web.target()), &format!("db:5000:{}", raw.target())]).await;
    let port = node.port_of("db").await;
    let mut inside = TcpStream::connect(SocketAddr::new(node.ip, port)).await.unwrap();
    inside.write_all(b"ECHO\nping").await.unwrap();
    inside.read_exact(&mut [0; 4]).await.unwrap();

    let (_, mut record) = node.api("GET", "/v1/sockets/web", None).await;
    record["hostnames"] = json!(["www.edge.localhost"]);
    node.put("sockets/web", record).await;
    // The write was answered when it had acted.
    assert_eq!(get(&node, "www.edge.localhost").await, 200);
    assert_eq!(get(&node, "web.edge.localhost").await, 404);

    assert!(matches!(node.api("DELETE", "/v1/tunnels/db", None).await.0, 200 | 204));
    assert!(matches!(node.api("DELETE", "/v1/sockets/db", None).await.0, 200 | 204));
    eventually("the port closes", async || TcpStream::connect(SocketAddr::new(node.ip, port)).await.err().map(|_| ()))
        .await;
    inside.write_all(b"pong").await.unwrap();
    let mut echo = [0; 4];
    within(DEADLINE, "an echo", inside.read_exact(&mut echo)).await.unwrap();
    assert_eq!(&echo, b"pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_port_is_told_by_the_sockets_name_and_opens_when_it_is_free() {
    let node = Node::start().await;
    let origin = Origin::greeting().await;
    let addr = SocketAddr::new(node.ip, 20500);
    let thief = std::net::TcpListener::bind(addr).unwrap();
    node.put("sockets/mail", json!({"type": "tcp", "ports": [20500]})).await;
    node.put("tunnels/mail", json!({"socket": "mail", "keys": [node.key.line()]})).await;
    eventually("the log names the socket", async || {
        node.log()
            .lines()
            .find(|l| l.contains("20500") && l.contains("mail") && l.contains("cannot be opened"))
            .map(|_| ())
    })
    .await;
    let (_, status) = node.api("GET", "/v1/status", None).await;
    assert!(status.to_string().contains("cannot be opened"), "{status}");
    drop(thief);
    let _ssh = Ssh::start(&node, &[&format!("mail:25:{}", origin.target())]).await;
    let greeting = eventually("the port opens", async || {
        let mut tcp = TcpStream::connect(addr).await.ok()?;
        let mut greeting = [0; 4];
        tcp.read_exact(&mut greeting).await.ok().map(|_| greeting)
    })
    .await;
    assert_eq!(&greeting, b"220 ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_of_the_feed_is_presented_for_its_names() {
    let node = Node::start().await;
    let origin = Origin::http().await;
    node.put("sockets/shop", json!({"type": "http", "hostnames": ["shop.example.test"]})).await;
    node.put("tunnels/shop", json!({"socket": "shop", "keys": [node.key.line()]})).await;
    let _ssh = Ssh::start(&node, &[&format!("shop:80:{}", origin.target())]).await;
    let made = rcgen::generate_simple_self_signed(["shop.example.test".to_owned()]).unwrap();
    let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
    node.put("certificates/shop", json!({"chain_pem": chain, "key_pem": key})).await;
    let config = trusting(chain.as_bytes(), &[]);
    let mut tls = tls_connect(node.addr("https"), "shop.example.test", config).await.unwrap();
    let (status, _, body) = request(&mut tls, "GET / HTTP/1.1\r\n", "shop.example.test", b"").await;
    assert_eq!((status, body.as_slice()), (200, b"hello from the origin\n".as_slice()));
    let other = rcgen::generate_simple_self_signed(["other.test".to_owned()]).unwrap().signing_key.serialize_pem();
    let (status, problem) =
        node.api("PUT", "/v1/certificates/shop", Some(&json!({"chain_pem": chain, "key_pem": other}))).await;
    assert!(matches!(status, 400 | 422) && problem.to_string().contains("key_pem"), "{status} {problem}");
    assert!(!node.log().contains("PRIVATE KEY") && !problem.to_string().contains("PRIVATE KEY"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_tells_every_change_from_a_revision_on() {
    let node = Node::start().await;
    let record = |n: u32| json!({"type": "http", "hostnames": [format!("w{n}.edge.localhost")]});
    node.put("sockets/w0", record(0)).await;
    let mut watch = TcpStream::connect(node.addr("control")).await.unwrap();
    let head = format!("GET /v1/watch HTTP/1.1\r\nhost: {}\r\naccept: text/event-stream\r\n\r\n", node.addr("control"));
    watch.write_all(head.as_bytes()).await.unwrap();
    for n in 1..=3 {
        node.put(&format!("sockets/w{n}"), record(n)).await;
    }
    let mut seen = String::new();
    let mut chunk = [0; 4096];
    while !seen.contains("w3.edge.localhost") {
        let n = within(DEADLINE, "an event", watch.read(&mut chunk)).await.unwrap();
        assert!(n > 0, "the watch ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&chunk[..n]));
    }
    let places: Vec<_> = (0..=3).map(|n| seen.find(&format!("w{n}.edge.localhost"))).collect();
    assert!(places.iter().all(Option::is_some) && places.is_sorted(), "{places:?}: {seen}");
    // Resumed at the last id, it tells only what came later.
    let id = seen.lines().filter_map(|l| l.strip_prefix("id:")).next_back().unwrap().trim().to_owned();
    node.put("sockets/w4", record(4)).await;
    let mut again = TcpStream::connect(node.addr("control")).await.unwrap();
    let head = format!(
        "GET /v1/watch HTTP/1.1\r\nhost: {}\r\naccept: text/event-stream\r\nlast-event-id: {id}\r\n\r\n",
        node.addr("control")
    );
    again.write_all(head.as_bytes()).await.unwrap();
    let mut seen = String::new();
    while !seen.contains("w4.edge.localhost") {
        let n = within(DEADLINE, "an event", again.read(&mut chunk)).await.unwrap();
        assert!(n > 0, "the watch ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&chunk[..n]));
    }
    assert!(!seen.contains("w3.edge.localhost"), "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_readiness_and_metrics_are_told() {
    let mut node = Node::with(NodeOpts::default().set("drain", "notice = \"3s\"")).await;
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    assert_eq!(get(&node, "web.edge.localhost").await, 200);
    assert_eq!(node.api("GET", "/healthz", None).await.0, 200);
    assert_eq!(node.api("GET", "/readyz", None).await.0, 200);
    let url = format!("http://{}/metrics", node.addr("control"));
    let (status, metrics) = curl(&node, &[&url]).await;
    assert_eq!(status, 200);
    for name in [
        "adit_visits_total",
        "adit_tunnels_attached 1",
        "adit_visit_seconds_bucket",
        "process_open_fds",
        "adit_ready 1",
    ] {
        assert!(metrics.contains(name), "{name} is not in {metrics}");
    }
    node.drain();
    eventually("readiness says no", async || (node.api("GET", "/readyz", None).await.0 == 503).then_some(())).await;
    // Not ready yet still serving: the routes are only being withdrawn.
    assert_eq!(get(&node, "web.edge.localhost").await, 200);
    assert!(node.program().ended(DEADLINE).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn each_visit_is_a_line_of_the_access_log_and_pages_have_the_operators_look() {
    let dir = tempfile::tempdir().unwrap();
    let (log, page) = (dir.path().join("access.log"), dir.path().join("page.html"));
    std::fs::write(&page, "<p>Ours: {{status}} {{text}} {{id}}</p>").unwrap();
    let opts =
        NodeOpts::default().set("access_log", &format!("to = {log:?}")).set("http", &format!("error_page = {page:?}"));
    let mut node = Node::with(opts).await;
    let (origin, raw) = (Origin::http().await, Origin::raw().await);
    let forwards = [format!("web:80:{}", origin.target()), format!("tcp/raw:{}", raw.target())];
    let _ssh = Ssh::start(&node, &forwards.each_ref().map(String::as_str)).await;
    let web = format!("https://web.edge.localhost:{}", node.addr("https").port());
    assert_eq!(curl(&node, &["-H", "X-Request-Id: mine-1", &format!("{web}/bytes/1000")]).await.0, 200);
    let nobody = format!("https://nobody.edge.localhost:{}/", node.addr("https").port());
    let (status, text) = curl(&node, &["-H", "X-Request-Id: mine-2", &nobody]).await;
    assert_eq!((status, text.as_str()), (404, "<p>Ours: 404 Nothing is published here. mine-2</p>"));
    let mut tcp = tokio::net::TcpStream::connect((node.ip, node.port_of("raw").await)).await.unwrap();
    tokio::io::AsyncWriteExt::write_all(&mut tcp, b"DOWN 500\n").await.unwrap();
    assert_eq!(Pattern::read(None, &mut tcp).await, Ok(500));
    drop(tcp);

    let lines = eventually("three lines", async || {
        let text = std::fs::read_to_string(&log).ok()?;
        let lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        (lines.len() >= 3).then_some(lines)
    })
    .await;
    let of = |kind: &str| lines.iter().find(|line| line["type"] == kind).unwrap();
    let (request, none, tcp) = (of("http"), of("none"), of("tcp"));
    assert_eq!((&request["id"], &request["status"], &request["down"]), (&json!("mine-1"), &json!(200), &json!(1000)));
    assert_eq!((&request["path"], &request["tunnel"]), (&json!("/bytes/1000"), &json!("web")));
    let legs = ["tls_ms", "route_ms", "dial_ms", "first_byte_ms", "total_ms"].map(|leg| request[leg].as_f64().unwrap());
    assert!(legs[0] > 0.0 && legs[1] + legs[2] <= legs[3] && legs[3] <= legs[4], "{request}");
    assert_eq!((&none["error"], &none["fault"]), (&json!("no_socket"), &json!("visitor")));
    assert_eq!((&tcp["down"], &tcp["socket"], &tcp["protocol"]), (&json!(500), &json!("raw"), &json!("tcp")));
    let ok = r#"adit_visits_total{type="http",class="2xx",error="none",fault="none"}"#;
    assert_eq!(node.metric(ok).await, 1.0);

    // Moved away, as log rotation does.
    std::fs::rename(&log, dir.path().join("old")).unwrap();
    node.program().signal("HUP");
    eventually("a new file", async || log.exists().then_some(())).await;
    curl(&node, &[&web]).await;
    node.drain();
    assert!(node.program().ended(DEADLINE).await.success());
    assert_eq!(std::fs::read_to_string(&log).unwrap().lines().count(), 1, "written before the end");
}

/// What was acknowledged of writes to one node that is killed again and again.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_by_kill_9() {
    const WRITES: u32 = 1000;
    let mut node = Node::start().await;
    let seed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos();
    eprintln!("seed {seed}");
    let (mut random, mut acknowledged, mut kills) = (seed | 1, Vec::new(), 0);
    let mut n = 0;
    while n < WRITES {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // Somewhere inside a later write than this one.
        let last = n + 20 + (random >> 16) % 80;
        let addr = node.addr("control");
        let (progress, mut written) = tokio::sync::watch::channel(n);
        let writer = tokio::spawn(async move {
            let mut done = Vec::new();
            for n in n..WRITES {
                if put(addr, n).await != Some(true) {
                    break;
                }
                done.push(n);
                progress.send_replace(n);
            }
            done
        });
        let _ = within(DEADLINE, "some writes", written.wait_for(|n| *n >= last.min(WRITES - 1))).await;
        tokio::time::sleep(Duration::from_micros(u64::from(random >> 20) % 3000)).await;
        node.kill9();
        kills += 1;
        let done = within(DEADLINE, "the writer", writer).await.unwrap();
        n = done.last().map_or(n, |last| last + 1);
        acknowledged.extend(done);
        node.restart().await;
        // The write in flight may have happened or not; it is tried again.
    }
    eprintln!("{} writes, {kills} kills", acknowledged.len());
    assert!(acknowledged.len() >= WRITES as usize && kills >= 8);
    for n in (0..WRITES).step_by(7).chain([WRITES - 1]) {
        let (status, record) = node.api("GET", &format!("/v1/sockets/s{n}"), None).await;
        assert_eq!((status, &record["x-n"]), (200, &json!(n)));
    }
    let (_, status) = node.api("GET", "/v1/status", None).await;
    assert_eq!(status["sockets"], json!(WRITES), "{status}");
    // And it serves.
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    assert_eq!(get(&node, "web.edge.localhost").await, 200);
}

/// One write; `None` where no answer came.
async fn put(addr: SocketAddr, n: u32) -> Option<bool> {
    let record: Value = json!({"type": "http", "hostnames": [format!("s{n}.edge.localhost")], "x-n": n});
    let body = record.to_string();
    let head = format!(
        "PUT /v1/sockets/s{n} HTTP/1.1\r\nhost: {addr}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         connection: close\r\n\r\n{body}",
        body.len()
    );
    let exchange = async {
        let mut tcp = TcpStream::connect(addr).await.ok()?;
        tcp.write_all(head.as_bytes()).await.ok()?;
        let mut answer = [0; 12];
        tcp.read_exact(&mut answer).await.ok()?;
        Some(matches!(&answer, b"HTTP/1.1 200" | b"HTTP/1.1 201"))
    };
    tokio::time::timeout(Duration::from_secs(10), exchange).await.ok().flatten()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_finishes_what_moves_and_a_second_signal_hurries() {
    let mut node =
        Node::with(NodeOpts::default().set("drain", "notice = \"0s\"").set("drain", "deadline = \"60s\"")).await;
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    let addr = node.addr("http");
    let slow = tokio::spawn(async move {
        let mut tcp = TcpStream::connect(addr).await.unwrap();
        request(&mut tcp, "GET /slow/2000 HTTP/1.1\r\n", "web.edge.localhost", b"").await.0
    });
    let mut held = TcpStream::connect(addr).await.unwrap();
    held.write_all(b"GET /slow/600000 HTTP/1.1\r\nhost: web.edge.localhost\r\n\r\n").await.unwrap();
    eventually("both requests are at the origin", async || {
        (origin.accepted.load(std::sync::atomic::Ordering::Relaxed) >= 2).then_some(())
    })
    .await;
    node.drain();
    assert_eq!(within(DEADLINE, "the slow answer", slow).await.unwrap(), 200);
    assert!(node.program().runs());
    let start = Instant::now();
    node.drain();
    assert!(node.program().ended(DEADLINE).await.success());
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
    assert_eq!(within(DEADLINE, "an end", held.read(&mut [0; 1])).await.unwrap_or(0), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_default_certificate_again_and_a_bad_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (chain, key) = (dir.path().join("edge.pem"), dir.path().join("edge.key"));
    let make = || {
        let made = rcgen::generate_simple_self_signed(["web.edge.localhost".to_owned()]).unwrap();
        std::fs::write(&chain, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        made.cert.pem()
    };
    let first = make();
    let opts = NodeOpts::default()
        .set("tls", "make_certificate = false")
        .set("tls", &format!("default_certificate = \"{}\"", chain.display()))
        .set("tls", &format!("default_key = \"{}\"", key.display()));
    let mut node = Node::with(opts).await;
    let presents = async |node: &Node, ca: &str| {
        tls_connect(node.addr("https"), "web.edge.localhost", trusting(ca.as_bytes(), &[])).await.is_ok()
    };
    assert!(presents(&node, &first).await);
    let second = make();
    node.program().signal("HUP");
    eventually("the new certificate is presented", async || presents(&node, &second).await.then_some(())).await;
    std::fs::write(&chain, "not a certificate").unwrap();
    node.program().signal("HUP");
    eventually("the log tells of the bad file", async || {
        node.log().contains("certificates not read again").then_some(())
    })
    .await;
    assert!(presents(&node, &second).await && !presents(&node, &first).await);
}
