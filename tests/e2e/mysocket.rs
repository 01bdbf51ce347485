//! The calls of mysocketctl as any program may make them: what an account makes, sees and
//! removes; what it is refused; and what nobody else comes by. The real client and an
//! emulator of the later one are in `mysocket_clients`.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::*;

/// Where the calls are answered.
pub const API: &str = "api.edge.localhost";
pub const PASSWORD: &str = "correct horse";

/// A node that answers mysocketctl, with closed tunnels.
pub fn opts() -> NodeOpts {
    NodeOpts::default()
        .set("mysocket", "hosts = [\"api.edge.localhost\"]")
        .set("mysocket", "sign_up = true")
        .set("ssh", "mode = \"closed\"")
}

/// One who calls: a node, and a token where there is one.
#[derive(Clone)]
pub struct Caller {
    addr: SocketAddr,
    ca: Vec<u8>,
    host: String,
    pub token: Option<String>,
    pub user: String,
}

impl Caller {
    /// Nobody in particular.
    pub fn stranger(node: &Node) -> Self {
        let ca = std::fs::read(node.ca()).unwrap();
        Self { addr: node.addr("https"), ca, host: API.to_owned(), token: None, user: String::new() }
    }

    /// Who has an account: signs up, and logs in.
    pub async fn signed_up(node: &Node, name: &str, ssh_key: Option<&Key>) -> Self {
        let mut caller = Self::stranger(node);
        let email = format!("{name}@example.com");
        let account = json!({"name": name, "email": email, "password": PASSWORD, "sshkey": ssh_key.map(Key::line)});
        let made = caller.ok("POST", "/user", &account).await;
        caller.user = made["user_id"].as_str().unwrap().to_owned();
        caller.log_in(&email).await;
        caller
    }

    pub async fn log_in(&mut self, email: &str) {
        let token = self.ok("POST", "/login", &json!({"email": email, "password": PASSWORD})).await;
        self.token = Some(token["token"].as_str().unwrap().to_owned());
    }

    /// The same at another node.
    pub fn at(&self, node: &Node) -> Self {
        Self { token: self.token.clone(), user: self.user.clone(), ..Self::stranger(node) }
    }

    /// The same with other words for a token.
    pub fn with_token(&self, token: &str) -> Self {
        Self { token: Some(token.to_owned()), ..self.clone() }
    }

    /// One call with this body, as it is: status, head and body.
    pub async fn raw(&self, method: &str, path: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        let mut io = tls_connect(self.addr, &self.host, trusting(&self.ca, &[])).await.unwrap();
        let token = self.token.as_ref().map(|token| format!("x-access-token: {token}\r\n")).unwrap_or_default();
        let head = format!("{method} {path} HTTP/1.1\r\naccept: application/json\r\n{token}");
        within(DEADLINE, "a call", request(&mut io, &head, &self.host, body)).await
    }

    /// One call: status and JSON.
    pub async fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let (status, _, body) = self.raw(method, path, body.as_bytes()).await;
        (status, serde_json::from_slice(&body).unwrap_or(Value::Null))
    }

    /// A call that must be taken: its JSON. Clients take no other status.
    pub async fn ok(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.call(method, path, body).await;
        assert!(matches!(status, 200 | 204), "{method} {path} {body}: {status} {answer}");
        answer
    }

    pub async fn status(&self, method: &str, path: &str, body: &Value) -> u16 {
        self.call(method, path, body).await.0
    }
}

pub fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_else(|| panic!("{field} of {value}"))
}

/// Logs in as OpenSSH does for mysocketctl: by relay port, as this user.
pub fn ssh_of(user: &str, tunnel: &Value, target: &str, key: &Key) -> SshOpts {
    let mut opts = SshOpts::new(&[&format!("{}:{target}", tunnel["local_port"])]).key(key);
    opts.user = user.to_owned();
    opts
}

#[tokio::test(flavor = "multi_thread")]
async fn sockets_of_each_type_are_made_served_and_removed() {
    let node = Node::with(opts()).await;
    let dir = tempfile::tempdir().unwrap();
    let key = Key::new(dir.path(), "ed25519");
    let ann = Caller::signed_up(&node, "ann", Some(&key)).await;
    let me = ann.ok("GET", &format!("/user/{}", ann.user), &Value::Null).await;
    assert_eq!((text(&me, "email"), text(&me, "name")), ("ann@example.com", "ann"));
    assert!(key.line().starts_with(text(&me, "sshkey")) || text(&me, "sshkey") == key.line());
    assert_eq!(ann.ok("GET", "/connect", &Value::Null).await, json!([]));

    let (http, raw) = (Origin::http().await, Origin::raw().await);
    let mut ids = Vec::new();
    for kind in ["http", "tcp", "tls"] {
        let wanted = json!({"name": format!("my {kind}"), "socket_type": kind, "protected_socket": false,
            "protected_username": "", "protected_password": "", "cloud_authentication_enabled": false,
            "cloud_authentication_email_allowed_addressses": null, "tunnels": null});
        let socket = ann.ok("POST", "/connect", &wanted).await;
        assert_eq!((text(&socket, "socket_type"), text(&socket, "name")), (kind, &*format!("my {kind}")));
        assert_eq!(text(&socket, "user_name"), ann.user);
        let tunnel = &socket["tunnels"][0];
        let target = if kind == "http" { http.target() } else { raw.target() };
        let _ssh = Ssh::with(&node, ssh_of(&ann.user, tunnel, &target, &key)).await;
        let dns = text(&socket, "dnsname");
        let ports: Vec<u64> =
            socket["socket_tcp_ports"].as_array().unwrap().iter().map(|p| p.as_u64().unwrap()).collect();
        if kind == "http" {
            assert_eq!(ports, [8080, 8443]);
            let label = dns.strip_suffix(".edge.localhost").unwrap();
            assert_eq!(label.split('-').count(), 3, "{dns}");
            let (status, body) = curl(&node, &[&format!("https://{dns}:8443/")]).await;
            assert_eq!((status, body.as_str()), (200, "hello from the origin\n"));
        } else {
            assert_eq!(ports.len(), 1);
            let addr = SocketAddr::new(node.ip, u16::try_from(ports[0]).unwrap());
            let mut io: Io = match kind {
                "tls" => tls_connect(addr, dns, trusting(&std::fs::read(node.ca()).unwrap(), &[])).await.unwrap(),
                _ => Box::new(tokio::net::TcpStream::connect(addr).await.unwrap()),
            };
            use tokio::io::AsyncWriteExt;
            io.write_all(b"DOWN 100000\n").await.unwrap();
            assert_eq!(within(DEADLINE, kind, Pattern::read(None, &mut io)).await, Ok(100_000));
        }
        ids.push(text(&socket, "socket_id").to_owned());
    }
    // An https origin has whatever certificate its owner made.
    let https = Origin::https("origin.test").await;
    let wanted = json!({"name": "shop", "socket_type": "https", "upstream_http_hostname": "origin.test"});
    let socket = ann.ok("POST", "/socket", &wanted).await;
    assert_eq!((&socket["tunnels"], text(&socket, "upstream_type")), (&json!([]), "https"));
    let path = format!("/socket/{}", text(&socket, "socket_id"));
    let tunnel = ann.ok("POST", &format!("{path}/tunnel"), &json!({})).await;
    assert_eq!(text(&tunnel, "tunnel_server"), "edge.localhost");
    let _ssh = Ssh::with(&node, ssh_of(&ann.user, &tunnel, &https.target(), &key)).await;
    let (status, body) = curl(&node, &[&format!("https://{}:8443/headers", text(&socket, "dnsname"))]).await;
    assert!(status == 200 && body.to_lowercase().contains("host: origin.test"), "{status} {body}");

    // What is listed is what was made; what is removed is gone, with its names.
    let listed = ann.ok("GET", "/connect", &Value::Null).await;
    assert_eq!(listed.as_array().unwrap().len(), 4);
    let one = ann.ok("GET", &path, &Value::Null).await;
    assert!(listed.as_array().unwrap().contains(&one));
    let tunnels = ann.ok("GET", &format!("{path}/tunnel"), &Value::Null).await;
    assert_eq!(tunnels, json!([tunnel]));
    let of_tunnel = format!("{path}/tunnel/{}", text(&tunnel, "tunnel_id"));
    assert_eq!(ann.ok("GET", &of_tunnel, &Value::Null).await, tunnel);
    assert_eq!(ann.status("DELETE", &of_tunnel, &Value::Null).await, 204);
    assert_eq!(ann.status("GET", &of_tunnel, &Value::Null).await, 404);
    assert_eq!(ann.status("DELETE", &path, &Value::Null).await, 204);
    for id in &ids {
        assert_eq!(ann.status("DELETE", &format!("/socket/{id}"), &Value::Null).await, 204);
        assert_eq!(ann.status("GET", &format!("/socket/{id}"), &Value::Null).await, 404);
    }
    assert_eq!(ann.ok("GET", "/connect", &Value::Null).await, json!([]));
    let (_, left) = node.api("GET", "/v1/sockets", None).await;
    assert_eq!(left["items"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_key_serves_its_own_tunnel_alone() {
    let node = Node::with(opts()).await;
    let dir = tempfile::tempdir().unwrap();
    let ann = Caller::signed_up(&node, "ann", None).await;
    let origin = Origin::http().await;
    let one = ann.ok("POST", "/connect", &json!({"name": "one"})).await;
    let two = ann.ok("POST", "/connect", &json!({"name": "two"})).await;
    let signkey = |socket: &Value, tunnel: bool| {
        let id = if tunnel { format!("/tunnel/{}", text(&socket["tunnels"][0], "tunnel_id")) } else { String::new() };
        format!("/socket/{}{id}/signkey", text(socket, "socket_id"))
    };
    for (number, kind) in ["ecdsa", "ed25519", "rsa"].into_iter().enumerate() {
        let key = Key::new(dir.path(), kind);
        let signed = ann.ok("POST", &signkey(&one, true), &json!({"ssh_public_key": key.line()})).await;
        let line = text(&signed, "signed_ssh_cert");
        assert!(line.contains("-cert-v01@openssh.com ") && line.lines().count() == 1, "{line}");
        certify(&key, line);
        let shown = std::process::Command::new("ssh-keygen").arg("-Lf").arg(certificate(&key)).output().unwrap();
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        assert!(shown.contains("user certificate") && shown.contains(&format!("  {}\n", ann.user)), "{shown}");
        let ssh = Ssh::with(&node, ssh_of(&ann.user, &one["tunnels"][0], &origin.target(), &key)).await;
        let (status, _) = curl(&node, &[&format!("https://{}:8443/", text(&one, "dnsname"))]).await;
        assert_eq!(status, 200, "{number}");
        drop(ssh);
        // Neither another tunnel of the same owner, nor another user.
        refused(&node, ssh_of(&ann.user, &two["tunnels"][0], &origin.target(), &key)).await;
        refused(&node, ssh_of("somebody", &one["tunnels"][0], &origin.target(), &key)).await;
    }
    // For all tunnels of a socket.
    let key = Key::new(dir.path(), "ecdsa");
    let signed = ann.ok("POST", &signkey(&two, false), &json!({"ssh_public_key": key.line()})).await;
    certify(&key, text(&signed, "signed_ssh_cert"));
    let second = ann.ok("POST", &format!("/socket/{}/tunnel", text(&two, "socket_id")), &json!({})).await;
    let _first = Ssh::with(&node, ssh_of(&ann.user, &two["tunnels"][0], &origin.target(), &key)).await;
    let _second = Ssh::with(&node, ssh_of(&ann.user, &second, &origin.target(), &key)).await;
    refused(&node, ssh_of(&ann.user, &one["tunnels"][0], &origin.target(), &key)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_in_stays_in_when_the_signed_keys_time_is_over() {
    let node = Node::with(opts().set("mysocket", "certificate_life = \"15s\"")).await;
    let dir = tempfile::tempdir().unwrap();
    let (key, origin) = (Key::new(dir.path(), "ecdsa"), Origin::http().await);
    let ann = Caller::signed_up(&node, "ann", None).await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "one"})).await;
    let path = format!("/socket/{}/signkey", text(&socket, "socket_id"));
    let signed = ann.ok("POST", &path, &json!({"ssh_public_key": key.line()})).await;
    certify(&key, text(&signed, "signed_ssh_cert"));
    let tunnel = &socket["tunnels"][0];
    let _ssh = Ssh::with(&node, ssh_of(&ann.user, tunnel, &origin.target(), &key)).await;
    eventually_within(Duration::from_secs(60), "the end of the certificate", async || {
        let mut program = Ssh::launch(&node, ssh_of(&ann.user, tunnel, &origin.target(), &key)).program;
        tokio::select! {
            (_, said) = program.finished(DEADLINE) => said.contains("Permission denied").then_some(()),
            () = tokio::time::sleep(Duration::from_secs(2)) => None,
        }
    })
    .await;
    let (status, _) = curl(&node, &[&format!("https://{}:8443/", text(&socket, "dnsname"))]).await;
    assert_eq!(status, 200);
}

fn certificate(key: &Key) -> std::path::PathBuf {
    format!("{}-cert.pub", key.path.display()).into()
}

/// Puts a signed key beside its own.
pub fn certify(key: &Key, line: &str) {
    std::fs::write(certificate(key), format!("{line}\n")).unwrap();
}

/// Expects that the client is turned away.
async fn refused(node: &Node, opts: SshOpts) {
    let mut ssh = Ssh::launch(node, opts);
    let (status, said) = ssh.program.finished(DEADLINE).await;
    assert!(!status.success() && !said.contains("remote forward success"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_comes_by_what_is_anothers() {
    let node = Node::with(opts()).await;
    let dir = tempfile::tempdir().unwrap();
    let (hers, his) = (Key::new(dir.path(), "ed25519"), Key::new(dir.path(), "ed25519"));
    let ann = Caller::signed_up(&node, "ann", Some(&hers)).await;
    let bob = Caller::signed_up(&node, "bob", Some(&his)).await;
    let origin = Origin::http().await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "hers", "custom_domains": ["www.ann.example"]})).await;
    let own = bob.ok("POST", "/connect", &json!({"name": "his"})).await;
    let (id, tunnel) = (text(&socket, "socket_id"), text(&socket["tunnels"][0], "tunnel_id"));
    let (of_socket, of_tunnel) = (format!("/socket/{id}"), format!("/socket/{id}/tunnel/{tunnel}"));
    // The tunnel of one socket below another, his own.
    let crossed = format!("/socket/{}/tunnel/{tunnel}", text(&own, "socket_id"));
    let csr = json!({"ssh_public_key": his.line()});
    let none = Value::Null;
    let asked = [
        ("GET", of_socket.clone(), &none),
        ("DELETE", of_socket.clone(), &none),
        ("GET", format!("{of_socket}/tunnel"), &none),
        ("POST", format!("{of_socket}/tunnel"), &none),
        ("GET", of_tunnel.clone(), &none),
        ("DELETE", of_tunnel.clone(), &none),
        ("POST", format!("{of_tunnel}/signkey"), &csr),
        ("POST", format!("{of_socket}/signkey"), &csr),
        ("GET", crossed.clone(), &none),
        ("DELETE", crossed.clone(), &none),
        ("POST", format!("{crossed}/signkey"), &csr),
        ("GET", format!("/user/{}", ann.user), &none),
    ];
    let stranger = Caller::stranger(&node);
    let absent = bob.call("GET", "/socket/00000000-0000-4000-8000-000000000000", &none).await;
    assert_eq!(absent.0, 404);
    for (method, path, body) in &asked {
        let (status, answer) = bob.call(method, path, body).await;
        assert_eq!(status, 404, "{method} {path}: {answer}");
        // What is somebody's reads as what is not there.
        if path.ends_with(id) {
            assert_eq!(answer, absent.1);
        }
        for caller in [&stranger, &bob.with_token(""), &bob.with_token("not.a.token")] {
            assert_eq!(caller.status(method, path, body).await, 401, "{method} {path}");
        }
    }
    // A token of hers with another's name in it, and none at all.
    let token = bob.token.clone().unwrap();
    let [header, claims, tag] = token.split('.').collect::<Vec<_>>()[..] else { panic!("{token}") };
    let decoded = data_encoding::BASE64URL_NOPAD.decode(claims.as_bytes()).unwrap();
    let forged = String::from_utf8(decoded).unwrap().replace(&bob.user, &ann.user);
    let forged = data_encoding::BASE64URL_NOPAD.encode(forged.as_bytes());
    let unsigned = data_encoding::BASE64URL_NOPAD.encode(b"{\"alg\":\"none\",\"typ\":\"JWT\"}");
    for token in [format!("{header}.{forged}.{tag}"), format!("{unsigned}.{forged}."), format!("{header}.{forged}.")] {
        for path in ["/connect", &of_socket] {
            assert_eq!(bob.with_token(&token).status("GET", path, &none).await, 401, "{token}");
        }
    }
    let listed = bob.ok("GET", "/connect", &none).await;
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
    assert!(!listed.to_string().contains(id));

    // Her tunnels are not for his keys, under his name or hers, nor for a key signed for him.
    let relay = &socket["tunnels"][0];
    refused(&node, ssh_of(&bob.user, relay, &origin.target(), &his)).await;
    refused(&node, ssh_of(&ann.user, relay, &origin.target(), &his)).await;
    let signkey = format!("/socket/{}/signkey", text(&own, "socket_id"));
    let certified = Key::new(dir.path(), "ecdsa");
    let signed = bob.ok("POST", &signkey, &json!({"ssh_public_key": certified.line()})).await;
    certify(&certified, text(&signed, "signed_ssh_cert"));
    refused(&node, ssh_of(&ann.user, relay, &origin.target(), &certified)).await;
    refused(&node, ssh_of(&bob.user, relay, &origin.target(), &certified)).await;
    let mut named = ssh_of(&bob.user, relay, &origin.target(), &his);
    named.forwards = vec![format!("{}:80:{}", text(&socket, "dnsname"), origin.target())];
    refused(&node, named).await;
    // Nor are her names.
    for name in ["www.ann.example", text(&socket, "dnsname"), "edge.localhost", API, "*.bob.example", "localhost"] {
        let (status, answer) = bob.call("POST", "/socket", &json!({"name": "x", "custom_domains": [name]})).await;
        assert!(matches!(status, 409 | 422), "{name}: {status} {answer}");
    }
    let _ssh = Ssh::with(&node, ssh_of(&ann.user, relay, &origin.target(), &hers)).await;
    let (status, _) = curl(&node, &[&format!("https://{}:8443/", text(&socket, "dnsname"))]).await;
    assert_eq!(status, 200, "after all that");
    assert!(!node.log().contains(PASSWORD) && !node.log().contains(&token), "secrets are in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_is_told_by_name_and_nothing_is_made() {
    let node =
        Node::with(opts().set("mysocket", "sockets_per_account = 3").set("mysocket", "tunnels_per_socket = 2")).await;
    let ann = Caller::signed_up(&node, "ann", None).await;
    for (body, field) in [
        (json!({"socket_type": "udp"}), "socket_type"),
        (json!({"name": "x".repeat(2000)}), "name"),
        (json!({"name": "\u{1b}[2J"}), "name"),
        (json!({"protected_socket": true, "protected_username": "u"}), "protected_password"),
        (json!({"protected_socket": true, "protected_password": "p"}), "protected_username"),
        (
            json!({"protected_socket": true, "protected_username": "a:b", "protected_password": "p"}),
            "protected_username",
        ),
        (
            json!({"socket_type": "tcp", "protected_socket": true, "protected_username": "u", "protected_password": "p"}),
            "protected_socket",
        ),
        (
            json!({"cloud_authentication_enabled": true,
            "cloud_authentication_email_allowed_domains": ["example.com"]}),
            "cloud_authentication_enabled",
        ),
        (
            json!({"cloud_authentication_enabled": true, "protected_socket": true, "protected_username": "u",
            "protected_password": "p"}),
            "protected_socket",
        ),
        (json!({"upstream_type": "ftp"}), "upstream_type"),
        (json!({"socket_type": "tcp", "upstream_type": "https"}), "upstream_type"),
        (json!({"upstream_http_hostname": "a b"}), "upstream_http_hostname"),
        (json!({"socket_type": "tcp", "custom_domains": ["www.ann.example"]}), "custom_domains"),
        (json!({"custom_domains": ["a b"]}), "custom_domains"),
        (json!({"name": 7}), "body"),
        (json!([]), "body"),
    ] {
        let (status, answer) = ann.call("POST", "/socket", &body).await;
        assert_eq!((status, answer["wrong"][0].as_str()), (422, Some(field)), "{body}: {answer}");
        assert!(text(&answer, "message").contains(field));
    }
    assert_eq!(ann.raw("POST", "/socket", &vec![b' '; 70 << 10]).await.0, 413);
    assert_eq!(ann.raw("POST", "/socket", b"{\"name\":").await.0, 422);
    assert_eq!(ann.ok("GET", "/connect", &Value::Null).await, json!([]));
    // What Go sends where it has nothing to send; and a base URL that ends in a slash.
    assert_eq!(ann.raw("GET", "//connect", b"null").await.0, 200);
    assert_eq!(ann.raw("POST", "/login/refresh", b"null").await.0, 200);
    assert_eq!(ann.status("GET", "/organization", &Value::Null).await, 200);
    let (status, allowed, _) = ann.raw("PUT", "/connect", b"").await;
    assert!(status == 405 && allowed.contains("allow: GET, POST"), "{allowed}");
    for path in
        ["/", "/v1/sockets", "/v1/accounts", "/metrics", "/healthz", "/v1/status", "/socket/x/y", "/socket//tunnel"]
    {
        assert_eq!(ann.status("GET", path, &Value::Null).await, 404, "{path}");
    }
    let socket = ann.ok("POST", "/socket", &json!({"name": "one"})).await;
    let path = format!("/socket/{}", text(&socket, "socket_id"));
    for key in ["", "ssh-rsa AAAA", "not a key", &"x".repeat(20_000)] {
        let (status, answer) = ann.call("POST", &format!("{path}/signkey"), &json!({"ssh_public_key": key})).await;
        assert_eq!((status, answer["wrong"][0].as_str()), (422, Some("ssh_public_key")), "{answer}");
    }
    for (made, status) in [(200, 200), (200, 200), (409, 409)] {
        assert_eq!(ann.status("POST", &format!("{path}/tunnel"), &Value::Null).await, made);
        assert_eq!(ann.status("POST", "/connect", &json!({"name": "more"})).await, status);
    }
    // Of an account.
    let stranger = Caller::stranger(&node);
    let good = json!({"name": "bob", "email": "bob@example.com", "password": "long enough", "sshkey": ""});
    for (field, value, status) in [
        ("email", "no address", 422),
        ("email", "ann@example.com", 409),
        ("email", "Ann@Example.com", 409),
        ("password", "short", 422),
        ("sshkey", "ssh-rsa nonsense", 422),
        ("sshkey", "command=\"sh\" ssh-ed25519 AAAA", 422),
        ("name", &"n".repeat(300), 422),
    ] {
        let mut account = good.clone();
        account[field] = value.into();
        let (answered, answer) = stranger.call("POST", "/user", &account).await;
        assert_eq!(answered, status, "{field} {value}: {answer}");
    }
    let (_, accounts) = node.api("GET", "/v1/accounts", None).await;
    assert_eq!(accounts["items"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_protected_socket_asks_for_its_password_and_is_never_open() {
    let node = Node::with(opts()).await;
    let dir = tempfile::tempdir().unwrap();
    let key = Key::new(dir.path(), "ed25519");
    let ann = Caller::signed_up(&node, "ann", Some(&key)).await;
    let wanted =
        json!({"name": "p", "protected_socket": true, "protected_username": "guest", "protected_password": "open it"});
    let socket = ann.ok("POST", "/connect", &wanted).await;
    assert_eq!((text(&socket, "protected_password"), text(&socket, "protected_username")), ("open it", "guest"));
    let again = ann.ok("GET", &format!("/socket/{}", text(&socket, "socket_id")), &Value::Null).await;
    assert_eq!((text(&again, "protected_password"), &again["protected_socket"]), ("", &json!(true)));
    let origin = Origin::http().await;
    let _ssh = Ssh::with(&node, ssh_of(&ann.user, &socket["tunnels"][0], &origin.target(), &key)).await;
    let url = format!("https://{}:8443/", text(&socket, "dnsname"));
    assert_eq!(curl(&node, &[&url]).await.0, 401);
    assert_eq!(curl(&node, &["-u", "guest:wrong", &url]).await.0, 401);
    assert_eq!(curl(&node, &["-u", "guest:open it", &url]).await.0, 200);
    assert!(!node.log().contains("open it"));
}

#[tokio::test(flavor = "multi_thread")]
async fn cloud_authentication_becomes_a_login_at_the_operators_provider() {
    let opts = opts().set("mysocket", "providers = [\"corp\"]").set("gate", "host = \"auth.localhost\"");
    let node = Node::with(opts).await;
    let dir = tempfile::tempdir().unwrap();
    let key = Key::new(dir.path(), "ed25519");
    let ann = Caller::signed_up(&node, "ann", Some(&key)).await;
    let wanted = json!({"name": "c", "cloud_authentication_enabled": true,
        "cloud_authentication_email_allowed_addressses": ["eve@example.com"],
        "cloud_authentication_email_allowed_domains": ["example.org"]});
    assert_eq!(ann.status("POST", "/connect", &wanted).await, 422, "the provider is not there yet");
    node.put("providers/corp", json!({"kind": "local"})).await;
    let nobody = json!({"name": "c", "cloud_authentication_enabled": true});
    assert_eq!(ann.status("POST", "/connect", &nobody).await, 422);
    let bad = json!({"cloud_authentication_enabled": true, "cloud_authentication_email_allowed_addressses": ["x"]});
    let (status, answer) = ann.call("POST", "/connect", &bad).await;
    let field = answer["wrong"][0].as_str();
    assert_eq!((status, field), (422, Some("cloud_authentication_email_allowed_addressses")), "{answer}");
    let socket = ann.ok("POST", "/connect", &wanted).await;
    for field in [
        "cloud_authentication_enabled",
        "cloud_authentication_email_allowed_addressses",
        "cloud_authentication_email_allowed_domains",
    ] {
        assert_eq!(socket[field], wanted[field], "{field}");
    }
    let origin = Origin::http().await;
    let _ssh = Ssh::with(&node, ssh_of(&ann.user, &socket["tunnels"][0], &origin.target(), &key)).await;
    let url = format!("https://{}:8443/", text(&socket, "dnsname"));
    assert_eq!(curl(&node, &[&url]).await.0, 401);
    let (status, _) = curl(&node, &["-H", "accept: text/html", &url]).await;
    assert_eq!(status, 302);
    assert_eq!(origin.requests.load(std::sync::atomic::Ordering::Relaxed), 0);
    // Who signed up may have written any address: it opens no gate.
    let wanted = json!({"name": "d", "cloud_authentication_enabled": true,
        "cloud_authentication_email_allowed_domains": ["example.com"]});
    let socket = ann.ok("POST", "/connect", &wanted).await;
    let _ssh = Ssh::with(&node, ssh_of(&ann.user, &socket["tunnels"][0], &origin.target(), &key)).await;
    node.put("accounts/eve", json!({"email": "eve@example.com", "password": PASSWORD})).await;
    let mut browser = Browser::at(&node);
    let mut page = browser.follow(&format!("https://{}:8443/", text(&socket, "dnsname")), 4).await.pop().unwrap();
    for (email, status) in [("ann@example.com", 401), ("eve@example.com", 303)] {
        let form = page.form().with("email", email).with("password", PASSWORD);
        page = browser.submit(&page, &form).await;
        assert_eq!(page.status, status, "{email}: {}", page.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn guessing_is_slowed_by_account_and_the_owner_elsewhere_is_not_kept_out() {
    let node = Node::with(opts().set("mysocket", "logins_per_account = 5")).await;
    let ann = Caller::signed_up(&node, "ann", None).await;
    let stranger = Caller::stranger(&node);
    let mut answered = std::collections::BTreeMap::<u16, u32>::new();
    let begun = Instant::now();
    for guess in 0..40 {
        let body = json!({"email": "ann@example.com", "password": format!("guess {guess}")});
        *answered.entry(stranger.status("POST", "/login", &body).await).or_default() += 1;
    }
    let looked_at = answered.get(&401).copied().unwrap_or(0);
    assert!(u64::from(looked_at) <= 5 + begun.elapsed().as_secs() / 12, "{answered:?}");
    assert_eq!(answered.keys().copied().collect::<Vec<_>>(), [401, 429]);
    let (status, head, _) = stranger.raw("POST", "/login", b"{\"email\":\"ann@example.com\",\"password\":\"x\"}").await;
    assert!(status == 429 && head.contains("retry-after:"), "{head}");
    // Names that nobody has are slowed alike.
    let mut nobody = Vec::new();
    for guess in 0..12 {
        let body = json!({"email": "nobody@example.com", "password": format!("guess {guess}")});
        nobody.push(stranger.status("POST", "/login", &body).await);
    }
    assert!(nobody.contains(&401) && nobody.ends_with(&[429]), "{nobody:?}");
    // A token that is there already goes on.
    assert_eq!(ann.status("GET", "/connect", &Value::Null).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_and_calls_are_counted() {
    let opts = opts().set("node", "exempt_loopback = false").set("mysocket", "sign_ups_per_address = 2");
    let node = Node::with(opts.set("mysocket", "calls_per_account = 10").set("mysocket", "accounts = 3")).await;
    let (ann, _bob) = (Caller::signed_up(&node, "ann", None).await, Caller::signed_up(&node, "bob", None).await);
    let account = |name: &str| json!({"name": name, "email": format!("{name}@example.com"), "password": PASSWORD});
    assert_eq!(Caller::stranger(&node).status("POST", "/user", &account("eve")).await, 429);
    let (begun, mut taken) = (Instant::now(), 0);
    while ann.status("GET", "/connect", &Value::Null).await == 200 {
        taken += 1;
        assert!(taken <= 10 + begun.elapsed().as_secs() / 6, "{taken} calls were taken");
    }
    assert!(taken >= 10);
    assert!(node.metric("adit_mysocket_calls_total{status=\"429\"}").await >= 2.0);
    add_user(&node, &["max@example.com"], "long enough\n", None);
    eventually("the last account", async || {
        let (status, told) = Caller::stranger(&node).call("POST", "/user", &account("eve")).await;
        (status == 403 && text(&told, "message").contains("no more accounts")).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_end_with_their_time_their_password_and_their_account() {
    let node = Node::with(opts().set("mysocket", "session = \"10s\"").set("mysocket", "session_max = \"1d\"")).await;
    let mut ann = Caller::signed_up(&node, "ann", None).await;
    let first = ann.token.clone().unwrap();
    let refreshed = ann.ok("POST", "/login/refresh", &Value::Null).await;
    ann.token = Some(text(&refreshed, "token").to_owned());
    assert_eq!(ann.status("GET", "/connect", &Value::Null).await, 200);
    eventually("the token's end", async || {
        (ann.with_token(&first).status("GET", "/connect", &Value::Null).await == 401).then_some(())
    })
    .await;
    eventually("the end of the refreshed one", async || {
        (ann.status("POST", "/login/refresh", &Value::Null).await == 401).then_some(())
    })
    .await;

    let node = Node::with(opts()).await;
    let dir = tempfile::tempdir().unwrap();
    let (key, other) = (Key::new(dir.path(), "ed25519"), Key::new(dir.path(), "ed25519"));
    let mut ann = Caller::signed_up(&node, "ann", Some(&key)).await;
    let socket = ann.ok("POST", "/connect", &json!({"name": "x"})).await;
    let origin = Origin::http().await;
    let tunnel = &socket["tunnels"][0];
    let _served = Ssh::with(&node, ssh_of(&ann.user, tunnel, &origin.target(), &key)).await;
    let url = format!("https://{}:8443/", text(&socket, "dnsname"));
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    // Another password: tokens are out, and log in again.
    let account = format!("accounts/{}", ann.user);
    node.put(&account, json!({"email": "ann@example.com", "password": "changed for good"})).await;
    assert_eq!(ann.status("GET", "/connect", &Value::Null).await, 401);
    node.put(&account, json!({"email": "ann@example.com", "password": PASSWORD, "ssh_keys": [other.line()]})).await;
    ann.log_in("ann@example.com").await;
    // The key that the operator took away serves no more, and the new one does.
    refused(&node, ssh_of(&ann.user, tunnel, &origin.target(), &key)).await;
    let _other = Ssh::with(&node, ssh_of(&ann.user, tunnel, &origin.target(), &other)).await;
    assert_eq!(curl(&node, &[&url]).await.0, 200);
    // Nor does anybody once the account is disabled.
    node.put(&account, json!({"email": "ann@example.com", "ssh_keys": [other.line()], "disabled": true})).await;
    assert_eq!(ann.status("GET", "/connect", &Value::Null).await, 401);
    let login = json!({"email": "ann@example.com", "password": PASSWORD});
    assert_eq!(ann.status("POST", "/login", &login).await, 401);
    refused(&node, ssh_of(&ann.user, tunnel, &origin.target(), &other)).await;
    eventually("no tunnel serves it", async || (curl(&node, &[&url]).await.0 >= 500).then_some(())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_adapter_answers_at_its_hosts_over_https_alone() {
    let node = Node::with(opts()).await;
    let stranger = Caller::stranger(&node);
    let (status, head, body) = stranger.raw("GET", "/latest_version.txt", b"").await;
    assert!(status == 200 && head.contains("text/plain") && body == b"v1.0\n", "{head}");
    // Not in plain text: it is sent on, and nothing is read.
    let http = node.addr("http");
    let mut tcp = tokio::net::TcpStream::connect(http).await.unwrap();
    let (status, head, _) = request(&mut tcp, "POST /login HTTP/1.1\r\n", API, b"{}").await;
    assert!(status == 308 && head.contains("https://api.edge.localhost:8443/login"), "{head}");
    // Nobody takes the name, by whichever way.
    let taken = json!({"type": "http", "hostnames": [API]});
    assert_eq!(node.api("PUT", "/v1/sockets/evil", Some(&taken)).await.0, 400);
    node.put("sockets/wild", json!({"type": "http", "hostnames": ["*.edge.localhost"]})).await;
    assert_eq!(stranger.status("GET", "/connect", &Value::Null).await, 401);
    // By HTTP/2 too.
    let mut sender = h2(&node, API).await;
    let request = hyper::Request::get(format!("https://{API}/connect")).body(pattern_body(0)).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 401);

    // Elsewhere there is none.
    let off = Node::start().await;
    let (status, _) = curl(&off, &[&format!("https://{API}:8443/latest_version.txt")]).await;
    assert_eq!(status, 404);
    let closed = Node::with(opts().set("mysocket", "sign_up = false")).await;
    let account = json!({"name": "x", "email": "x@example.com", "password": "long enough"});
    let (status, answer) = Caller::stranger(&closed).call("POST", "/user", &account).await;
    assert!(status == 403 && text(&answer, "message").contains("adit user add"), "{answer}");
    let said = add_user(&closed, &["x@example.com", "--name", "X"], "long enough\n", None);
    assert!(said.starts_with('u'), "{said}");
    let twice = add_user(&closed, &["x@example.com"], "long enough\n", None);
    assert!(twice.contains("taken"), "{twice}");
    let key = closed.key.public();
    let dashed = add_user(&closed, &["z@example.com", "--id", "z-z"], "long enough\n", None);
    assert!(dashed.contains("without"), "{dashed}");
    add_user(&closed, &["y@example.com", "--id", "yan"], "long enough\n", Some(&key));
    let mut yan = Caller::stranger(&closed);
    let login = json!({"email": "y@example.com", "password": "long enough"});
    yan.token = Some(text(&yan.ok("POST", "/login", &login).await, "token").to_owned());
    let shown = yan.ok("GET", "/user/yan", &Value::Null).await;
    assert_eq!(text(&shown, "user_name"), "yan");
    assert!(!text(&shown, "sshkey").is_empty());
}

/// What `adit user add` says at this node.
pub fn add_user(node: &Node, arguments: &[&str], password: &str, ssh_key: Option<&Path>) -> String {
    use std::io::Write;
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_adit"));
    command.args(["user", "add"]).args(arguments).arg("--state").arg(node.state()).env_remove("ADIT_STATE");
    if let Some(key) = ssh_key {
        command.arg("--ssh-key").arg(key);
    }
    let pipe = std::process::Stdio::piped;
    let mut child = command.stdin(pipe()).stdout(pipe()).stderr(pipe()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(password.as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    String::from_utf8([done.stdout, done.stderr].concat()).unwrap()
}
