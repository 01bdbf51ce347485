//! The API over real connections, and its document against it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

use super::*;
use crate::feed::follower::tests::Remembered;
use crate::feed::follower::{Follower, prefixes};
use crate::feed::records::RecordSettings;
use crate::feed::store::{Store, StoreSettings};
use crate::feed::{Feed, Op, Txn};
use crate::fields::Bytes as Size;
use crate::model::{Certificate, Socket, SocketType, TicketKeys, TicketKeysId, Tunnel};
use crate::routes::Routes;

const TOKEN: &str = "a-token-for-these-tests-only";

struct Node {
    addr: SocketAddr,
    store: Arc<Store>,
    routes: Arc<Routes>,
    ready: Arc<AtomicBool>,
    drained: Arc<AtomicBool>,
    cancel: CancellationToken,
    served: tokio::task::JoinHandle<()>,
    token: bool,
    _dir: tempfile::TempDir,
}

async fn node(change: impl FnOnce(&mut ControlSettings)) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let token_file = dir.path().join("token");
    std::fs::write(&token_file, format!("# first\nanother-token-of-the-operator\n{TOKEN}\n")).unwrap();
    let mut settings =
        ControlSettings { token_file: Some(token_file), body_limit: Size(16 << 10), ..Default::default() };
    change(&mut settings);
    let token = settings.token_file.is_some();
    let store = Store::in_memory(StoreSettings::default()).unwrap();
    let ports = RecordSettings {
        ports: crate::fields::PortRange { first: 20000, last: 20009 },
        domain: Some("edge.test".parse().unwrap()),
        ..RecordSettings::default()
    };
    let records = Arc::new(Records::new(store.clone(), ports));
    let routes = Arc::new(Routes::default());
    let (follower, following) = Follower::new(
        store.subscribe(&prefixes(), None),
        routes.clone(),
        Arc::new(Remembered::default()),
        Arc::default(),
    );
    let cancel = CancellationToken::new();
    tokio::spawn(follower.run(cancel.clone()));
    assert!(following.wait_live().await);
    let (ready, drained) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
    let (is_ready, drain) = (ready.clone(), drained.clone());
    let hooks = NodeHooks {
        writers: Box::new(Vec::new),
        status: Box::new(|| [("listeners".to_owned(), Value::from(3))].into_iter().collect()),
        metrics: Box::new(|| "adit_up 1\n".to_owned()),
        ready: Box::new(move || if is_ready.load(Ordering::Relaxed) { Ok(()) } else { Err("it leaves".into()) }),
        drain: Box::new(move || drain.store(true, Ordering::Relaxed)),
    };
    let state =
        ControlState::new(settings, records, store.clone(), following.clone(), following.revisions(), hooks).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let served = tokio::spawn(serve(listener, state, cancel.clone()));
    Node { addr, store, routes, ready, drained, cancel, served, token, _dir: dir }
}

struct Reply {
    status: u16,
    headers: BTreeMap<String, String>,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
    fn fields(&self) -> Vec<String> {
        let problem = self.json();
        assert_eq!(self.headers["content-type"], "application/problem+json");
        problem["errors"].as_array().unwrap().iter().map(|e| e["field"].as_str().unwrap().to_owned()).collect()
    }
}

impl Node {
    /// Sends the bytes of a request and reads the whole answer.
    async fn raw(&self, request: &str) -> Reply {
        let mut stream = TcpStream::connect(self.addr).await.unwrap();
        // A refused body may be cut while it is sent.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut bytes = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut bytes)).await.unwrap();
        let text = String::from_utf8(bytes).unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {text:?}"));
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let pair = |l: &str| l.split_once(": ").map(|(n, v)| (n.to_lowercase(), v.to_owned())).unwrap();
        Reply { status, headers: lines.map(pair).collect(), body: body.to_owned() }
    }

    async fn send(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Reply {
        let mut request =
            format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
        let has = |name: &str| headers.iter().any(|h| h.to_lowercase().starts_with(name));
        if !has("host:") {
            request.push_str("Host: localhost\r\n");
        }
        if !has("authorization:") && self.token {
            request.push_str(&format!("Authorization: Bearer {TOKEN}\r\n"));
        }
        if !has("content-type:") && !body.is_empty() {
            request.push_str("Content-Type: application/json\r\n");
        }
        for header in headers {
            request.push_str(header);
            request.push_str("\r\n");
        }
        self.raw(&format!("{request}\r\n{body}")).await
    }

    async fn put(&self, path: &str, body: &str) -> Reply {
        self.send("PUT", path, &[], body).await
    }

    async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], "").await
    }
}

fn ticket_keys() -> String {
    serde_json::json!({"keys": [format!("{}=", "a".repeat(43))]}).to_string().replace("aaa=", "aaA=")
}

const PROVIDER: &str = r#"{"kind":"oidc","issuer":"https://id.test","client_id":"adit","client_secret":"hush"}"#;
const ACCOUNT: &str = r#"{"email":"ann@example.com","password":"correct horse"}"#;
const KEYRING: &str = r#"{"keys":[{"kid":"k1","secret":"MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE="}]}"#;
const GATED: &str = r#"{"type":"http","gate":{
    "ip":{"allow":["10.0.0.0/8"],"deny":["10.9.9.9"]},
    "basic":{"users":[{"name":"ann","password":"correct horse"}],"realm":"web"},
    "oidc":{"providers":["corp"],"allow_emails":["Ann@Example.com"],"allow_email_domains":["*.example.com"],
        "session":{"absolute":"1h","idle":"10m","issued_after":"2026-01-01T00:00:00Z"},"allow_origins":["https://a.test"]},
    "service_tokens":[{"name":"ci","token":"0123456789abcdef0123456789abcdef","expires":"2030-01-01T00:00:00Z"}],
    "rules":[{"path":"/public/","public":true},{"path":"/admin","users":["ann"],"allow_emails":["ann@example.com"]}]}}"#;

#[tokio::test]
async fn a_password_or_token_is_hashed_on_its_way_in_and_never_given_back() {
    let node = node(|_| ()).await;
    let gate = |reply: &Reply| reply.json()["gate"].clone();
    let put = node.put("/v1/sockets/gated", GATED).await;
    assert_eq!(put.status, 201, "{}", put.body);
    let (user, token) = (&gate(&put)["basic"]["users"][0], &gate(&put)["service_tokens"][0]);
    assert!(user["password_hash"].as_str().unwrap().starts_with("$argon2id$"), "{user}");
    // `printf %s 0123456789abcdef0123456789abcdef | sha256sum`
    assert_eq!(token["token_hash"], "sha256:3eb1bd439947eb762998e566ccc2e099c791118b2f40579cc4f7da2b5061b7f9");
    node.put("/v1/accounts/ann", ACCOUNT).await;
    let mut told = vec![put.body.clone()];
    for path in ["/v1/sockets/gated", "/v1/sockets", "/v1/accounts/ann", "/v1/accounts"] {
        told.push(node.get(path).await.body);
    }
    assert!(told.iter().all(|body| !body.contains("correct horse") && !body.contains("0123456789abcdef")), "{told:?}");
    // Lists hold no hashes either, and a write of what one told loses nothing.
    let listed = node.get("/v1/sockets").await.json()["items"][0].clone();
    assert!(!listed.to_string().contains("_hash"), "{listed}");
    let again = node.put("/v1/sockets/gated", &listed.to_string()).await;
    assert_eq!((again.status, gate(&again)), (200, gate(&put)), "{}", again.body);
    let renamed = GATED.replace(r#""name":"ann","password":"correct horse""#, r#""name":"bob""#);
    let refused = node.put("/v1/sockets/gated", &renamed).await;
    assert_eq!(refused.status, 400);
    assert!(refused.body.contains("gate.basic.users[0].password_hash"), "{}", refused.body);
}

#[tokio::test]
async fn every_mistake_of_a_gate_is_told_with_its_place() {
    let node = node(|_| ()).await;
    for (record, at) in [
        (r#"{"type":"http","gate":{"ip":{"allow":["10.0.0.0/99"]}}}"#, "gate.ip.allow"),
        (r#"{"type":"http","gate":{"ipp":{}}}"#, "gate.ipp"),
        (r#"{"type":"tcp","gate":{"basic":{"users":[]}}}"#, "gate.basic"),
        (r#"{"type":"passthrough","gate":{"oidc":{"providers":["a"]}}}"#, "gate.oidc"),
        (r#"{"type":"http","gate":{"client_certificates":{"ca_pem":""}}}"#, "gate.client_certificates.ca_pem"),
        (r#"{"type":"http","gate":{"oidc":{"providers":[]}}}"#, "gate.oidc.providers"),
        (r#"{"type":"http","gate":{"oidc":{"providers":["a"],"allow_emails":["ann"]}}}"#, "gate.oidc.allow_emails"),
        (r#"{"type":"http","gate":{"oidc":{"providers":["a"],"session":{"idle":"1s"}}}}"#, "gate.oidc.session.idle"),
        (r#"{"type":"http","gate":{"basic":{"users":[{"name":"a:b","password":"x"}]}}}"#, "gate.basic.users[0].name"),
        (r#"{"type":"http","gate":{"basic":{"users":[{"name":"a","password":""}]}}}"#, "gate.basic.users[0].password"),
        (
            r#"{"type":"http","gate":{"basic":{"users":[{"name":"a","password_hash":"plain"}]}}}"#,
            "gate.basic.users[0].password_hash",
        ),
        (r#"{"type":"http","gate":{"service_tokens":[{"name":"a","token":"short"}]}}"#, "gate.service_tokens[0].token"),
        (r#"{"type":"http","gate":{"rules":[{"path":"/a/../b"}]}}"#, "gate.rules[0].path"),
        (r#"{"type":"http","gate":{"rules":[{"path":"/a","public":true,"users":["x"]}]}}"#, "gate.rules[0].public"),
        (r#"{"type":"http","gate":{"rules":[{"path":"/a"},{"path":"/a"}]}}"#, "gate.rules[1]"),
    ] {
        let refused = node.put("/v1/sockets/web", record).await;
        let told: Vec<String> = refused.json()["errors"]
            .as_array()
            .unwrap_or(&Vec::new())
            .iter()
            .map(|e| e["field"].as_str().unwrap_or_default().to_owned())
            .collect();
        assert!(refused.status == 400 && told.iter().any(|t| t == at), "{record}: {}", refused.body);
        assert!(!refused.body.contains("plain\""), "a secret is repeated: {}", refused.body);
    }
}

fn certificate() -> String {
    let made = rcgen::generate_simple_self_signed(vec!["c.test".into()]).unwrap();
    serde_json::json!({"chain_pem": made.cert.pem(), "key_pem": made.signing_key.serialize_pem()}).to_string()
}

#[tokio::test]
async fn put_creates_replaces_and_takes_back_what_get_answers() {
    let node = node(|_| ()).await;
    let tunnel = r#"{"socket":"web","user":"me","relay_port":8080,"x-team":"blue"}"#;
    for (path, body) in [
        ("/v1/sockets/web", r#"{"type":"http","x-note":{"a":[1]}}"#.to_owned()),
        ("/v1/sockets/db", r#"{"type":"tcp"}"#.to_owned()),
        ("/v1/tunnels/t1", tunnel.to_owned()),
        ("/v1/certificates/c", certificate()),
        ("/v1/ticket-keys/default", ticket_keys()),
        ("/v1/sockets/gated", GATED.to_owned()),
        ("/v1/providers/corp", PROVIDER.to_owned()),
        ("/v1/accounts/ann", ACCOUNT.to_owned()),
        ("/v1/keyrings/default", KEYRING.to_owned()),
        ("/v1/revocations/r", r#"{"email":"Ann@Example.com"}"#.to_owned()),
    ] {
        let created = node.put(path, &body).await;
        assert_eq!((created.status, created.headers["location"].as_str()), (201, path), "{}", created.body);
        assert_eq!(created.headers["adit-applied"], "true");
        let got = node.get(path).await;
        assert_eq!((got.status, &got.headers["etag"]), (200, &created.headers["etag"]));
        let again = node.put(path, &got.body).await;
        assert_eq!((again.status, again.json()), (200, got.json()), "{}", again.body);
        assert_ne!(again.headers["etag"], got.headers["etag"]);
        assert_eq!(got.headers["cache-control"], "no-store");
    }
    let web = node.get("/v1/sockets/web").await.json();
    assert_eq!(web["tunnels"], serde_json::json!(["t1"]));
    assert_eq!((&web["created_by"], &web["x-note"]), (&Value::from("api"), &serde_json::json!({"a": [1]})));
    assert_eq!(web["hostnames"], serde_json::json!(["web.edge.test"]));
}

#[tokio::test]
async fn a_write_is_answered_once_the_node_acts_on_it() {
    let node = node(|_| ()).await;
    let mut waits = Vec::new();
    for i in 0..20 {
        let began = Instant::now();
        let body = format!(r#"{{"type":"http","hostnames":["h{i}.test"]}}"#);
        assert_eq!(node.put("/v1/sockets/web", &body).await.status / 100, 2);
        assert!(node.routes.by_host(&format!("h{i}.test")).is_some());
        waits.push(began.elapsed());
    }
    waits.sort();
    assert!(waits[10] < Duration::from_millis(100), "{waits:?}");
    assert_eq!(node.send("DELETE", "/v1/sockets/web", &[], "").await.status, 204);
    assert!(node.routes.by_host("h19.test").is_none());
}

#[tokio::test]
async fn every_mistake_is_named_by_its_field() {
    let node = node(|_| ()).await;
    let bad = node.put("/v1/sockets/a", r#"{"type":"htp","hostnames":["a b"],"upstream":{"tls":{"x":1}}}"#).await;
    assert_eq!((bad.status, bad.fields()), (400, ["type", "hostnames", "upstream.tls.x"].map(String::from).into()));
    assert_eq!(bad.json()["errors"][2]["pointer"], "/upstream/tls/x");
    node.put("/v1/sockets/a", r#"{"type":"http","hostnames":["x.test"]}"#).await;
    let taken = node.put("/v1/sockets/b", r#"{"type":"http","hostnames":["y.test","x.test"]}"#).await;
    assert_eq!((taken.status, taken.fields()), (409, vec!["hostnames[1]".to_owned()]));
    let other = node.put("/v1/sockets/b", r#"{"type":"tcp","ports":[80]}"#).await;
    assert_eq!((other.status, other.fields()), (400, vec!["ports[0]".to_owned()]));
    let key = node.put("/v1/certificates/c", r#"{"chain_pem":"x","key_pem":"secret"}"#).await;
    assert_eq!((key.status, key.fields()), (400, vec!["chain_pem".to_owned()]));
    assert!(!key.body.contains("secret"));
}

#[tokio::test]
async fn lists_come_in_pages_and_without_keys() {
    let node = node(|_| ()).await;
    for i in 0..5 {
        node.put(&format!("/v1/sockets/s{i}"), r#"{"type":"http"}"#).await;
    }
    let (mut ids, mut path) = (Vec::new(), "/v1/sockets?limit=2".to_owned());
    loop {
        let page = node.get(&path).await.json();
        ids.extend(page["items"].as_array().unwrap().iter().map(|i| i["id"].as_str().unwrap().to_owned()));
        let Some(next) = page["next"].as_str() else { break };
        path = format!("/v1/sockets?limit=2&after={next}");
    }
    assert_eq!(ids, ["s0", "s1", "s2", "s3", "s4"]);
    node.put("/v1/certificates/c", &certificate()).await;
    let list = node.get("/v1/certificates").await;
    assert!(list.body.contains("BEGIN CERTIFICATE") && !list.body.contains("PRIVATE KEY"));
    assert!(node.get("/v1/certificates/c").await.body.contains("PRIVATE KEY"));
    node.put("/v1/ticket-keys/default", &ticket_keys()).await;
    let list = node.get("/v1/ticket-keys").await;
    assert_eq!(list.json()["items"], serde_json::json!([{"v": 1, "id": "default"}]));
    assert!(!list.body.contains("aaaa"));
    let other = node.put("/v1/ticket-keys/other", &ticket_keys()).await;
    assert_eq!((other.status, other.fields()), (400, vec!["id".to_owned()]));
    let bad = node.put("/v1/ticket-keys/default", r#"{"keys":["secret!"]}"#).await;
    assert_eq!((bad.status, bad.fields(), bad.body.contains("secret!")), (400, vec!["keys".to_owned()], false));
}

#[tokio::test]
async fn head_answers_like_get_without_a_body() {
    let node = node(|_| ()).await;
    node.put("/v1/sockets/a", r#"{"type":"http"}"#).await;
    for path in ["/v1/sockets/a", "/v1/sockets", "/healthz", "/v1/watch"] {
        let head = node.send("HEAD", path, &[], "").await;
        assert_eq!((head.status, head.body.as_str()), (200, ""), "{path}");
    }
    assert_eq!(node.send("HEAD", "/v1/sockets/none", &[], "").await.status, 404);
}

#[tokio::test]
async fn only_a_known_token_opens_the_door() {
    let node = node(|_| ()).await;
    for wrong in
        ["Authorization: Bearer nothing", "Authorization: Basic YTpi", "Authorization: Bearer", "authorization: x"]
    {
        let refused = node.send("GET", "/v1/sockets", &[wrong], "").await;
        assert_eq!(refused.status, 401, "{wrong}");
        assert!(refused.headers["www-authenticate"].starts_with("Bearer"));
    }
    let second = "Authorization: bearer another-token-of-the-operator";
    assert_eq!(node.send("GET", "/v1/sockets", &[second], "").await.status, 200);
    // What needs no token needs none; what does not exist is not told to strangers.
    let none = "Authorization: none";
    assert_eq!(node.send("GET", "/healthz", &[none], "").await.status, 200);
    assert_eq!(node.send("GET", "/metrics", &[none], "").await.status, 401);
    assert_eq!(node.send("GET", "/v1/nothing", &[none], "").await.status, 401);
}

#[tokio::test]
async fn without_a_token_only_loopback_names_and_no_foreign_pages() {
    let node = node(|s| {
        s.token_file = None;
        s.allow_anonymous_loopback = true;
        s.hosts = vec!["control.test".parse().unwrap()];
        s.metrics_open = true;
    })
    .await;
    for host in ["localhost:9090", "127.0.0.1:9090", "[::1]:9090", "Control.test"] {
        assert_eq!(node.send("GET", "/v1/sockets", &[&format!("Host: {host}")], "").await.status, 200, "{host}");
    }
    for host in ["evil.test", "localhost.evil.test", "10.0.0.1", "", "a@localhost"] {
        assert_eq!(node.send("GET", "/v1/sockets", &[&format!("Host: {host}")], "").await.status, 403, "{host}");
    }
    for (origin, status) in
        [("http://localhost", 200), ("http://evil.test", 403), ("null", 403), ("http://localhost:1", 403)]
    {
        let reply = node.send("GET", "/v1/sockets", &[&format!("Origin: {origin}")], "").await;
        assert_eq!(reply.status, status, "{origin}");
    }
    assert_eq!(node.send("GET", "/metrics", &["Host: evil.test"], "").await.status, 200);
}

#[test]
fn a_listener_that_anybody_could_reach_needs_a_token() {
    let section = serde_json::json!({
        "listen": ["[::]:9090"], "allow_anonymous_loopback": true, "connections": 10, "heartbeat": "0s"
    });
    let mut f = crate::fields::Fields::new(section.as_object().unwrap().clone());
    ControlSettings::read(&mut f);
    let at: Vec<_> = f.mistakes().into_iter().map(|m| m.at).collect();
    assert_eq!(at, ["allow_anonymous_loopback", "connections", "heartbeat"]);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("t");
    assert!(read_tokens(&file).is_err());
    std::fs::write(&file, "short\n").unwrap();
    assert!(read_tokens(&file).unwrap_err().to_string().contains("16 bytes"));
}

#[tokio::test]
async fn a_body_too_large_or_too_slow_is_refused() {
    let node = node(|s| s.body_deadline = Duration::from_millis(100)).await;
    let large = format!(r#"{{"type":"http","x":"{}"}}"#, "x".repeat(20 << 10));
    assert_eq!(node.put("/v1/sockets/a", &large).await.status, 413);
    let head = format!(
        "PUT /v1/sockets/a HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    );
    assert_eq!(node.raw(&format!("{head}Content-Length: 10\r\n\r\n{{")).await.status, 408);
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n5000\r\n{}", "x".repeat(0x5000));
    assert_eq!(node.raw(&chunked).await.status, 413);
}

#[tokio::test]
async fn a_head_that_never_ends_is_cut() {
    let node = node(|s| s.head_deadline = Duration::from_millis(200)).await;
    let mut stream = TcpStream::connect(node.addr).await.unwrap();
    stream.write_all(b"GET /healthz HT").await.unwrap();
    let mut rest = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(3), stream.read_to_end(&mut rest)).await;
    assert!(read.is_ok(), "the connection must end");
}

/// One watch: the lines of its events.
struct Watch(BufReader<TcpStream>);

impl Watch {
    async fn open(node: &Node, path: &str, header: &str) -> Self {
        let mut stream = TcpStream::connect(node.addr).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {TOKEN}\r\n{header}\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        Self(BufReader::new(stream))
    }

    /// The next event with this name: its id and data. Chunk sizes and heads
    /// are no event lines.
    async fn event(&mut self, name: &str) -> Option<(Option<String>, Value)> {
        let (mut id, mut found) = (None, false);
        loop {
            let mut line = String::new();
            let read = tokio::time::timeout(Duration::from_secs(5), self.0.read_line(&mut line)).await.unwrap();
            if read.unwrap_or(0) == 0 {
                return None;
            }
            let line = line.trim_end();
            if let Some(text) = line.strip_prefix("id: ") {
                id = Some(text.to_owned());
            } else if let Some(text) = line.strip_prefix("event: ") {
                found = text == name;
            } else if let Some(data) = line.strip_prefix("data: ")
                && found
            {
                return Some((id, serde_json::from_str(data).unwrap()));
            } else if line.starts_with("data: ") {
                id = None;
            } else if line.starts_with(": ") && name == "alive" {
                return Some((None, Value::Null));
            }
        }
    }
}

#[tokio::test]
async fn a_watch_starts_follows_resumes_and_ends_with_the_node() {
    let node = node(|s| s.heartbeat = Duration::from_millis(50)).await;
    node.put("/v1/sockets/a", r#"{"type":"http"}"#).await;
    node.put("/v1/certificates/c", &certificate()).await;
    let mut watch = Watch::open(&node, "/v1/watch", "").await;
    assert_eq!(watch.event("reset").await.unwrap().1["records"], 2);
    let (id, put) = watch.event("put").await.unwrap();
    assert_eq!((id, &put["type"], put["record"].get("key_pem")), (None, &Value::from("certificate"), None));
    let (_, put) = watch.event("put").await.unwrap();
    assert_eq!((&put["type"], &put["id"]), (&Value::from("socket"), &Value::from("a")));
    assert!(watch.event("synced").await.unwrap().0.is_some());
    let (live, _) = watch.event("live").await.unwrap();
    assert!(watch.event("alive").await.is_some());
    node.put("/v1/sockets/b", r#"{"type":"http"}"#).await;
    let (at_b, change) = watch.event("change").await.unwrap();
    assert_eq!((&change["changes"][0]["op"], &change["changes"][0]["id"]), (&Value::from("put"), &Value::from("b")));
    node.put("/v1/ticket-keys/default", &ticket_keys()).await;
    let told = watch.event("change").await.unwrap().1["changes"][0].clone();
    assert_eq!(
        (&told["type"], &told["record"]),
        (&Value::from("ticket_keys"), &serde_json::json!({"v": 1, "id": "default"}))
    );
    node.send("DELETE", "/v1/sockets/a", &[], "").await;
    assert_eq!(watch.event("change").await.unwrap().1["changes"][0]["op"], "delete");

    let mut resumed = Watch::open(&node, &format!("/v1/watch?from={}", live.unwrap()), "").await;
    assert_eq!(resumed.event("change").await.unwrap().1, change);
    let mut last = Watch::open(&node, "/v1/watch?from=x:1", &format!("Last-Event-ID: {}\r\n", at_b.unwrap())).await;
    assert_eq!(last.event("change").await.unwrap().1["changes"][0]["type"], "ticket_keys");
    let mut alien = Watch::open(&node, "/v1/watch?from=another:1", "").await;
    assert!(alien.event("reset").await.is_some());

    node.cancel.cancel();
    for mut open in [watch, resumed, last, alien] {
        assert!(open.event("never").await.is_none());
    }
    tokio::time::timeout(Duration::from_secs(3), node.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn watches_are_limited() {
    let node = node(|s| s.watchers = 1).await;
    let mut first = Watch::open(&node, "/v1/watch", "").await;
    first.event("live").await.unwrap();
    let refused = node.get("/v1/watch").await;
    assert_eq!((refused.status, refused.headers["retry-after"].as_str()), (503, "1"));
    drop(first);
    let until = Instant::now() + Duration::from_secs(5);
    while node.send("HEAD", "/v1/watch", &[], "").await.status != 200 {
        assert!(Instant::now() < until, "a closed watch gives its place back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn document() -> Value {
    serde_json::from_str(OPENAPI).unwrap()
}

#[test]
fn the_document_has_every_path_and_method_and_no_other() {
    let document = document();
    let methods = |item: &Value| -> BTreeSet<String> {
        item.as_object().unwrap().keys().filter(|k| *k != "parameters").map(|k| k.to_uppercase()).collect()
    };
    let documented: BTreeMap<String, BTreeSet<String>> =
        document["paths"].as_object().unwrap().iter().map(|(path, item)| (path.clone(), methods(item))).collect();
    let routed: BTreeMap<String, BTreeSet<String>> = routing::ROUTES
        .iter()
        .map(|r| (r.path.to_owned(), r.methods.iter().map(|m| (*m).to_owned()).collect()))
        .collect();
    assert_eq!(documented, routed);
}

#[test]
fn the_documents_fields_are_the_records_fields() {
    let document = document();
    fn names(schema: &Value) -> BTreeSet<String> {
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    }
    fn keys(value: &Value) -> BTreeSet<String> {
        value.as_object().unwrap().keys().cloned().collect()
    }
    let schema = |name: &str| document["components"]["schemas"][name].clone();
    let mut socket = Value::Object(Socket::new("a".parse().unwrap(), SocketType::Http).to_record());
    socket["tunnels"] = serde_json::json!([]);
    assert_eq!(names(&schema("Socket")), keys(&socket));
    assert_eq!(names(&schema("Socket")["properties"]["upstream"]), keys(&socket["upstream"]));
    assert_eq!(
        names(&schema("Socket")["properties"]["upstream"]["properties"]["tls"]),
        keys(&socket["upstream"]["tls"])
    );
    let types = ["http", "https", "tcp", "tls", "passthrough"];
    assert_eq!(schema("Socket")["properties"]["type"]["enum"], serde_json::json!(types));
    let tunnel = Tunnel::new("a".parse().unwrap(), "s".parse().unwrap()).to_record();
    assert_eq!(names(&schema("Tunnel")), keys(&Value::Object(tunnel)));
    let id = "c".parse().unwrap();
    let pair = serde_json::json!({"chain_pem": "", "key_pem": ""}).as_object().unwrap().clone();
    let certificate = Certificate::from_record(&id, pair).unwrap().to_record();
    assert_eq!(names(&schema("Certificate")), keys(&Value::Object(certificate)));
    let keys_record: Map<String, Value> = serde_json::from_str(&ticket_keys()).unwrap();
    let keys_record = TicketKeys::from_record(&TicketKeysId, keys_record).unwrap().to_record();
    assert_eq!(names(&schema("TicketKeys")), keys(&Value::Object(keys_record)));
    // Required in the document is what a record cannot do without.
    let empty = |e: Vec<Mistake>| e.into_iter().map(|m| m.at).collect::<BTreeSet<_>>();
    let required = |name: &str| -> BTreeSet<String> {
        schema(name)["required"].as_array().unwrap().iter().map(|v| v.as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(required("Socket"), empty(Socket::from_record(&"a".parse().unwrap(), Map::new()).unwrap_err()));
    assert_eq!(required("Tunnel"), empty(Tunnel::from_record(&"a".parse().unwrap(), Map::new()).unwrap_err()));
    assert_eq!(required("Certificate"), empty(Certificate::from_record(&id, Map::new()).unwrap_err()));
    assert_eq!(required("TicketKeys"), empty(TicketKeys::from_record(&TicketKeysId, Map::new()).unwrap_err()));
}

/// Statuses that need a broken feed or a slow client; tested on their own.
const ELSEWHERE: &[&str] = &["408", "500", "503"];

#[tokio::test]
async fn the_document_tells_every_status_that_is_answered_and_no_other() {
    let node = node(|_| ()).await;
    let document = document();
    let (pem, keys) = (certificate(), ticket_keys());
    let stray = Op::Put { key: "cfg/sock/stray".into(), value: "{}".into(), lease: None };
    node.store.commit(Txn { expect: vec![], ops: vec![stray] }).await.unwrap();
    assert_eq!(node.get("/v1/sockets/stray").await.status, 500);
    let mut seen: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
    for route in routing::ROUTES {
        let one = route.path.ends_with("{id}");
        let (good, conflict) = match route.endpoint {
            Endpoint::Socket => (r#"{"type":"tcp","ports":[20001]}"#, r#"{"type":"tcp","ports":[20001]}"#),
            Endpoint::Tunnel => {
                (r#"{"socket":"s","user":"u","relay_port":1}"#, r#"{"socket":"s","user":"u","relay_port":1}"#)
            }
            Endpoint::TicketKeys => (keys.as_str(), ""),
            Endpoint::Provider => (PROVIDER, ""),
            Endpoint::Account => (ACCOUNT, ""),
            Endpoint::Keyring => (KEYRING, ""),
            Endpoint::Revocation => (r#"{"email":"ann@example.com"}"#, ""),
            _ => (pem.as_str(), ""),
        };
        let only = matches!(route.endpoint, Endpoint::TicketKeys | Endpoint::Keyring);
        let id = if only { "default" } else { "s" };
        let path = route.path.replace("{id}", id);
        for method in route.methods {
            // Each probe: extra header, path, body.
            let mut probes: Vec<(&str, String, &str)> = vec![
                ("Accept: image/png", path.clone(), ""),
                ("Authorization: Bearer wrong", path.clone(), ""),
                ("Origin: http://evil.test", path.clone(), ""),
            ];
            match *method {
                "PUT" => probes.extend([
                    ("X-A: 1", path.clone(), good),
                    ("X-A: 1", path.clone(), good),
                    ("If-None-Match: *", path.clone(), good),
                    ("If-Match: \"9999\"", path.clone(), good),
                    ("X-A: 1", path.clone(), "{"),
                    ("Content-Type: text/plain", path.clone(), good),
                    ("X-A: 1", route.path.replace("{id}", "!"), good),
                ]),
                "GET" if one => probes.extend([
                    ("X-A: 1", format!("{path}?x=1"), ""),
                    ("X-A: 1", path.clone(), ""),
                    ("X-A: 1", format!("{path}-none"), ""),
                ]),
                "DELETE" => probes.extend([
                    ("X-A: 1", format!("{path}?x=1"), ""),
                    ("If-Match: \"9999\"", path.clone(), ""),
                    ("X-A: 1", format!("{path}-none"), ""),
                ]),
                _ if route.endpoint == Endpoint::Watch => probes.push(("X-A: 1", format!("{path}?from=x"), "")),
                "GET" => probes.extend([("X-A: 1", path.clone(), ""), ("X-A: 1", format!("{path}?limit=0"), "")]),
                _ => probes.push(("X-A: 1", path.clone(), "")),
            }
            let large = format!("{{\"x\":\"{}\"}}", "x".repeat(17 << 10));
            if *method == "PUT" {
                probes.push(("X-A: 1", path.clone(), &large));
                if !conflict.is_empty() {
                    probes.push(("X-A: 1", format!("{path}2"), conflict));
                }
            }
            let answered = seen.entry((route.path.to_owned(), method.to_lowercase())).or_default();
            if route.endpoint == Endpoint::Watch {
                answered.insert(node.send("HEAD", &path, &[], "").await.status.to_string());
            }
            // A GET finds a record, a PUT creates one, a DELETE follows the PUT.
            if one && *method == "GET" {
                assert_eq!(node.put(&path, good).await.status, 201);
            }
            if one && *method == "PUT" {
                assert_eq!(node.send("DELETE", &path, &[], "").await.status, 204);
            }
            for (header, path, body) in probes {
                let reply = node.send(method, &path, &[header], body).await;
                if reply.status >= 400 {
                    assert_eq!(reply.headers["content-type"], "application/problem+json");
                    assert_eq!(reply.json()["status"], reply.status);
                }
                answered.insert(reply.status.to_string());
            }
            if *method == "DELETE" {
                if route.endpoint == Endpoint::Socket {
                    node.put("/v1/tunnels/holds", r#"{"socket":"s"}"#).await;
                    answered.insert(node.send("DELETE", &path, &[], "").await.status.to_string());
                    let cascaded = node.send("DELETE", &format!("{path}?cascade=true"), &[], "").await;
                    answered.insert(cascaded.status.to_string());
                } else {
                    answered.insert(node.send("DELETE", &path, &[], "").await.status.to_string());
                }
            }
            // No other id is one of this kind: what is missing is missed at its own.
            if only && *method != "PUT" {
                node.send("DELETE", &path, &[], "").await;
                answered.insert(node.send(method, &path, &[], "").await.status.to_string());
                node.put(&path, good).await;
            }
        }
        let other = if route.methods.contains(&"POST") { "PUT" } else { "POST" };
        let refused = node.send(other, &path, &[], "").await;
        assert_eq!(refused.status, 405, "{path}");
        assert!(route.methods.iter().all(|m| refused.headers["allow"].contains(m)));
    }
    for ((path, method), answered) in seen {
        let responses = document["paths"][&path][&method]["responses"].as_object().unwrap();
        let documented: BTreeSet<String> =
            responses.keys().filter(|s| !ELSEWHERE.contains(&s.as_str())).cloned().collect();
        let answered: BTreeSet<String> = answered.into_iter().filter(|s| !ELSEWHERE.contains(&s.as_str())).collect();
        assert_eq!(answered, documented, "{method} {path}");
    }
    assert!(node.drained.load(Ordering::Relaxed));
}

#[tokio::test]
async fn the_node_tells_how_it_is() {
    let node = node(|_| ()).await;
    let status = node.get("/v1/status").await.json();
    let schema = document()["components"]["schemas"]["Status"].clone();
    for field in schema["required"].as_array().unwrap() {
        assert!(status.get(field.as_str().unwrap()).is_some(), "{field}");
    }
    assert_eq!((&status["listeners"], &status["stale_ms"]), (&Value::from(3), &Value::Null));
    assert!(node.get("/metrics").await.body.contains("adit_up"));
    assert_eq!(node.get("/readyz").await.status, 200);
    node.ready.store(false, Ordering::Relaxed);
    let leaving = node.get("/readyz").await;
    assert_eq!((leaving.status, leaving.json()["detail"].as_str()), (503, Some("it leaves")));
    assert_eq!(node.get("/healthz").await.status, 200);
    node.store.close().await;
    let refused = node.put("/v1/sockets/a", r#"{"type":"http"}"#).await;
    assert_eq!((refused.status, refused.json()["type"].as_str()), (503, Some("urn:adit:problem:unavailable")));
    assert_eq!(node.get("/v1/openapi.json").await.json(), document());
}
