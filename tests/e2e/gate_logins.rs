//! Logins of visitors: at real providers, on any node, and against those who cheat.
//! Each test says what a visitor notices.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;

use crate::harness::*;
use crate::idp::*;

const AUTH: &str = "auth.edge.localhost:8443";
const WEB: &str = "https://web.edge.localhost:8443";
const CALLBACK: &str = "https://auth.edge.localhost:8443/.adit/cb/corp";
const ALICE: &str = "alice@example.com";

/// A node with the auth host.
pub async fn node() -> Node {
    node_with(NodeOpts::default()).await
}

pub async fn node_with(opts: NodeOpts) -> Node {
    Node::with(opts.set("gate", "host = \"auth.edge.localhost\"")).await
}

/// Who may come by `corp`.
pub fn allowing(emails: &[&str]) -> Value {
    json!({"oidc": {"providers": ["corp"], "allow_emails": emails}})
}

/// Publishes an origin as `NAME.edge.localhost` behind a gate.
pub async fn publish(node: &Node, name: &str, origin: &Origin, gate: Value) -> Ssh {
    gated(node, name, gate).await;
    node.put(&format!("tunnels/{name}-1"), json!({"socket": name, "keys": [node.key.line()]})).await;
    Ssh::start(node, &[&format!("{name}:80:{}", origin.target())]).await
}

/// Sets a socket's gate.
pub async fn gated(node: &Node, name: &str, gate: Value) {
    let hosts = [format!("{name}.edge.localhost")];
    node.put(&format!("sockets/{name}"), json!({"type": "http", "hostnames": hosts, "gate": gate})).await;
}

/// Tells the node of a provider.
async fn knows(node: &Node, id: &str, issuer: &str, client: (&str, &str), change: Value) {
    let mut record = json!({"kind": "oidc", "title": "Corp", "issuer": issuer, "client_id": client.0,
        "client_secret": client.1});
    for (key, value) in change.as_object().unwrap() {
        record[key] = value.clone();
    }
    node.put(&format!("providers/{id}"), record).await;
}

/// A node, an origin behind a gate, and the provider that says who comes.
struct Scene {
    node: Node,
    op: OidcProvider,
    _origin: Origin,
    _ssh: Ssh,
}

impl Scene {
    async fn new(gate: Value) -> Self {
        Self::with(NodeOpts::default(), OidcOpts::default(), gate).await
    }

    async fn with(opts: NodeOpts, op: OidcOpts, gate: Value) -> Self {
        let (node, op) = tokio::join!(node_with(opts), OidcProvider::start(&[CALLBACK], op));
        knows(&node, "corp", &op.issuer, (&op.client_id, &op.client_secret), json!({})).await;
        let origin = Origin::http().await;
        let ssh = publish(&node, "web", &origin, gate).await;
        Self { node, op, _origin: origin, _ssh: ssh }
    }

    fn browser(&self) -> Browser {
        Browser::at(&self.node)
    }
}

/// Goes to a URL, logs in at oidc-provider, and answers the hops from the callback
/// on; agrees to show its address if asked.
async fn log_in(browser: &mut Browser, url: &str, login: &str) -> Vec<Answer> {
    let left = browser.login_at_op(url, login).await;
    come_back(browser, left).await
}

async fn come_back(browser: &mut Browser, left: Answer) -> Vec<Answer> {
    let mut hops = browser.follow_on(left, 8).await;
    if hops.last().unwrap().text().contains("/.adit/continue") {
        let page = hops.pop().unwrap();
        let next = browser.submit(&page, &page.form()).await;
        hops.push(page);
        hops.extend(browser.follow_on(next, 8).await);
    }
    hops
}

fn last(hops: &[Answer]) -> &Answer {
    hops.last().unwrap()
}

/// What the page says it is.
pub fn title(answer: &Answer) -> String {
    let text = answer.text();
    text.split("<h1>").nth(1).and_then(|rest| rest.split("</h1>").next()).unwrap_or_default().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_login_brings_the_visitor_to_the_page_that_was_asked_for() {
    if !node_is_new_enough() {
        return;
    }
    let scene = Scene::new(allowing(&[ALICE])).await;
    let mut browser = scene.browser();
    let begun = browser.get(&format!("{WEB}/headers?a=%2Fb&c=1")).await;
    assert_eq!(begun.status, 302, "{}", begun.text());
    assert_eq!((begun.header("cache-control"), begun.header("referrer-policy")), ("no-store", "no-referrer"));
    let to = begun.location().unwrap();
    assert_eq!((to.authority().as_str(), to.path()), (AUTH, "/.adit/start"));
    let mut browser = scene.browser();
    let hops = log_in(&mut browser, &format!("{WEB}/headers?a=%2Fb&c=1"), ALICE).await;
    let page = last(&hops);
    assert_eq!((page.status, page.url.to_string()), (200, format!("{WEB}/headers?a=%2Fb&c=1")), "{}", page.text());
    let told = page.text();
    for line in [
        "x-adit-user-email: alice@example.com",
        "x-adit-user: alice@example.com",
        "x-adit-user-sub: alice@example.com",
        "x-adit-user-idp: corp",
        "x-adit-user-kind: login",
    ] {
        assert!(told.contains(line), "{line} is not in {told}");
    }
    assert!(!told.contains("__Host-adit"), "the origin sees our cookies: {told}");
    // The token says the same, and its key is on the auth host.
    let jwt = told.lines().find_map(|line| line.strip_prefix("x-adit-jwt: ")).expect("a token");
    let (head, claims) = claims_of(&json!(jwt));
    assert_eq!((&claims["email"], &claims["aud"]), (&json!(ALICE), &json!("web.edge.localhost")));
    assert_eq!(claims["iss"], json!(format!("https://{AUTH}")));
    let keys = browser.get(&format!("https://{AUTH}/.adit/jwks.json")).await.json();
    assert!(keys["keys"].as_array().unwrap().iter().any(|key| key["kid"] == head["kid"]), "{keys}");
    let cookie = browser.cookie("web.edge.localhost", "__Host-adit_s").unwrap();
    assert!(cookie.value.len() < 1024, "{}", cookie.value.len());
    // Nothing of the login is left, but for whom the address may be told.
    for (host, name) in [("web.edge.localhost", "__Host-adit_f_"), ("auth.edge.localhost", "__Host-adit_l_")] {
        let left: Vec<_> = browser.jar.all().filter(|c| c.name.starts_with(name)).map(|c| c.name.clone()).collect();
        assert!(left.is_empty(), "{host}: {left:?}");
    }
    // The second page asks nobody.
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 200);
    let log = scene.node.log();
    for secret in [ALICE, "code=", &scene.op.client_secret] {
        let told = log.lines().filter(|line| !line.contains("DEBUG")).find(|line| line.contains(secret));
        assert!(told.is_none(), "{told:?}");
    }
    assert!(log.contains("decision=\"granted\""), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_asks_once_per_owner_before_an_address_is_told() {
    if !node_is_new_enough() {
        return;
    }
    let scene = Scene::new(allowing(&[ALICE])).await;
    let (other, alike) = (Origin::http().await, Origin::http().await);
    let _other = publish(&scene.node, "other", &other, allowing(&[ALICE])).await;
    let _alike = publish(&scene.node, "alike", &alike, allowing(&[ALICE])).await;
    for (name, owner) in [("web", "ann"), ("alike", "ann"), ("other", "bob")] {
        let hosts = [format!("{name}.edge.localhost")];
        let record = json!({"type": "http", "hostnames": hosts, "gate": allowing(&[ALICE]), "owner": owner});
        scene.node.put(&format!("sockets/{name}"), record).await;
    }
    let mut browser = scene.browser();
    let asked = |hops: &[Answer]| hops.iter().any(|hop| hop.text().contains("/.adit/continue"));
    let first = log_in(&mut browser, &format!("{WEB}/"), ALICE).await;
    assert!(asked(&first) && last(&first).status == 200, "{}", last(&first).text());
    let page = first.iter().find(|hop| hop.text().contains("/.adit/continue")).unwrap();
    assert!(page.text().contains("web.edge.localhost") && page.text().contains(ALICE));
    assert!(page.header("content-security-policy").contains("frame-ancestors 'none'"));
    let same = log_in(&mut browser, "https://alike.edge.localhost:8443/", ALICE).await;
    assert!(!asked(&same) && last(&same).status == 200, "{}", last(&same).text());
    let foreign = log_in(&mut browser, "https://other.edge.localhost:8443/", ALICE).await;
    assert!(asked(&foreign) && last(&foreign).status == 200, "{}", last(&foreign).text());
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_who_is_not_allowed_sees_why_and_can_take_another_account() {
    if !node_is_new_enough() {
        return;
    }
    let scene = Scene::new(allowing(&[ALICE])).await;
    for (login, why) in [
        ("eve@evil.test", "eve@evil.test"),
        ("unverified:alice@example.com", "does not vouch"),
        ("absent:alice@example.com", "does not vouch"),
        ("noemail:nobody", "does not vouch"),
        ("alice@example.com.evil.test", "evil.test"),
    ] {
        let mut browser = scene.browser();
        let hops = log_in(&mut browser, &format!("{WEB}/"), login).await;
        let page = last(&hops);
        assert_eq!(page.status, 403, "{login}: {}", page.text());
        assert!(page.text().contains(why) && page.text().contains("login?switch=1"), "{login}: {}", page.text());
        assert!(browser.cookie("web.edge.localhost", "__Host-adit_s").is_none(), "{login}");
        assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302, "{login}");
    }
    assert!(scene.node.log().contains("why=\"not_allowed\""));
    // `switch` asks the provider for another account.
    let mut browser = scene.browser();
    let hops = browser.follow(&format!("{WEB}/.adit/login?switch=1"), 1).await;
    assert_eq!(last(&hops).location().unwrap().field("prompt").as_deref(), Some("select_account"));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_edit_of_the_rules_acts_on_the_next_request_and_cuts_what_runs() {
    if !node_is_new_enough() {
        return;
    }
    let scene = Scene::new(allowing(&[ALICE])).await;
    let mut browser = scene.browser();
    log_in(&mut browser, &format!("{WEB}/"), ALICE).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 200);
    let cookie = browser.cookie("web.edge.localhost", "__Host-adit_s").unwrap().value.clone();
    let connect = async |cookie: &str| {
        let ca = std::fs::read(scene.node.ca()).unwrap();
        let tls = trusting(&ca, &["http/1.1"]);
        let mut io = tls_connect(scene.node.addr("https"), "web.edge.localhost", tls).await.unwrap();
        let head = format!(
            "GET /ws HTTP/1.1\r\nhost: web.edge.localhost:8443\r\nupgrade: websocket\r\nconnection: upgrade\r\n\
             origin: {WEB}\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             cookie: __Host-adit_s={cookie}\r\n\r\n"
        );
        io.write_all(head.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let (status, _) = read_answer(&mut io).await;
        (status, io)
    };
    assert_eq!(connect("v1.none.x").await.0, 401, "a WebSocket is not redirected");
    let (status, io) = connect(&cookie).await;
    assert_eq!(status, 101);
    let mut socket = WebSocket::client(io);
    socket.write(1, b"there?").await;
    assert_eq!(socket.read().await, Some((1, b"there?".to_vec())));
    gated(&scene.node, "web", allowing(&["bob@example.com"])).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 403);
    let closed = tokio::time::timeout(Duration::from_secs(3), socket.read()).await.expect("it is cut");
    let (opcode, message) = closed.expect("a close");
    assert_eq!((opcode, u16::from_be_bytes([message[0], message[1]])), (8, 1008));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_goes_through_three_nodes_while_keys_rotate() {
    if !node_is_new_enough() {
        return;
    }
    let opts = || NodeOpts::default().set("gate", "make_keyring = false");
    let (a, b, c) = tokio::join!(node_with(opts()), node_with(opts()), node_with(opts()));
    let op = OidcProvider::start(&[CALLBACK], OidcOpts::default()).await;
    let nodes = [a, b, c];
    let origin = Origin::http().await;
    let secret = |byte: u8| data_encoding::BASE64.encode(&[byte; 32]);
    let mut tunnels = Vec::new();
    for node in &nodes {
        knows(node, "corp", &op.issuer, (&op.client_id, &op.client_secret), json!({})).await;
        node.put("keyrings/default", json!({"keys": [{"kid": "k1", "secret": secret(1)}]})).await;
        tunnels.push(publish(node, "web", &origin, allowing(&[ALICE])).await);
    }
    // Each has a CA of its own.
    let cas: Vec<u8> = nodes.iter().flat_map(|node| std::fs::read(node.ca()).unwrap()).collect();
    let ips: Vec<_> = nodes.iter().map(|node| node.ip).collect();
    let edge = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let served = std::sync::Arc::clone(&edge);
    let mut browser = Browser::new(&cas, move |host, port, _| {
        let turn = |_| ips[served.fetch_add(1, std::sync::atomic::Ordering::Relaxed) % 3];
        std::net::SocketAddr::new(host.parse().unwrap_or_else(turn), port)
    });
    // Begun at one, started at the next, ...
    let left = browser.login_at_op(&format!("{WEB}/headers"), ALICE).await;
    for node in &nodes {
        let keys = json!([{"kid": "k1", "secret": secret(1)},
            {"kid": "k2", "secret": secret(2), "seal_from": "2020-01-01T00:00:00Z"}]);
        node.put("keyrings/default", json!({"keys": keys})).await;
    }
    let hops = come_back(&mut browser, left).await;
    let page = last(&hops);
    assert_eq!(page.status, 200, "{}: {}", page.url, page.text());
    assert!(page.text().contains("x-adit-user-email: alice@example.com"));
    let before = browser.cookie("web.edge.localhost", "__Host-adit_s").unwrap().value.clone();
    assert!(before.starts_with("v1.k2."), "{before}");
    for _ in 0..6 {
        assert_eq!(browser.get(&format!("{WEB}/")).await.status, 200);
    }
    assert!(edge.load(std::sync::atomic::Ordering::Relaxed) >= 12);
    // The key is gone, and so is what it sealed.
    for node in &nodes {
        node.put("keyrings/default", json!({"keys": [{"kid": "k3", "secret": secret(3)}]})).await;
    }
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_logout_here_everywhere_and_at_the_provider() {
    if !node_is_new_enough() {
        return;
    }
    let back = format!("https://{AUTH}/.adit/out");
    let op = OidcOpts { post_logout_redirect_uris: vec![back.clone()], ..OidcOpts::default() };
    let scene = Scene::with(NodeOpts::default(), op, allowing(&[ALICE])).await;
    let (mut one, mut two) = (scene.browser(), scene.browser());
    for browser in [&mut one, &mut two] {
        assert_eq!(last(&log_in(browser, &format!("{WEB}/"), ALICE).await).status, 200);
    }
    let stolen = one.cookie("web.edge.localhost", "__Host-adit_s").unwrap().value.clone();
    // A link alone logs nobody out, and neither does another site's form.
    let page = one.get(&format!("{WEB}/.adit/logout")).await;
    assert_eq!((page.status, title(&page)), (200, "Log out of web.edge.localhost?".into()));
    let mut elsewhere = scene.browser();
    elsewhere.jar.put("web.edge.localhost", "__Host-adit_s", &stolen);
    elsewhere.from = Some(Url::parse("https://other.edge.localhost:8443/"));
    let forged = elsewhere.post_form(&format!("{WEB}/.adit/logout"), &[("where", "everywhere")]).await;
    assert_eq!(forged.status, 400, "{}", forged.text());
    assert_eq!(one.get(&format!("{WEB}/")).await.status, 200);

    let out = one.submit(&page, &page.form().with("where", "here")).await;
    let hops = one.follow_on(out, 4).await;
    assert_eq!((last(&hops).status, title(last(&hops))), (200, "You are logged out".into()));
    assert_eq!(one.get(&format!("{WEB}/")).await.status, 302);
    assert_eq!(two.get(&format!("{WEB}/")).await.status, 200, "only here");
    // Whoever kept the cookie is out too.
    one.jar.put("web.edge.localhost", "__Host-adit_s", &stolen);
    assert_eq!(one.get(&format!("{WEB}/")).await.status, 302);

    let mut three = scene.browser();
    assert_eq!(last(&log_in(&mut three, &format!("{WEB}/"), ALICE).await).status, 200);
    let page = two.get(&format!("{WEB}/.adit/logout")).await;
    let out = two.submit(&page, &page.form().with("where", "everywhere")).await;
    let hops = two.follow_on(out, 3).await;
    let asks = last(&hops);
    assert!(asks.url.to_string().starts_with(&scene.op.issuer), "{}: {}", asks.url, asks.text());
    let done = two.submit(asks, &asks.form().with("logout", "yes")).await;
    let hops = two.follow_on(done, 4).await;
    assert_eq!((last(&hops).status, title(last(&hops))), (200, "You are logged out".into()), "{}", last(&hops).url);
    assert_eq!(three.get(&format!("{WEB}/")).await.status, 302, "everywhere");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_logout_at_the_provider_ends_the_login_here() {
    if !node_is_new_enough() {
        return;
    }
    let node = node().await;
    let ca = std::fs::read_to_string(node.ca()).unwrap();
    let op = OidcOpts {
        backchannel_logout_uri: Some(format!("https://{AUTH}/.adit/backchannel/corp")),
        backchannel_via: Some(node.ip),
        backchannel_ca: Some(ca),
        ..OidcOpts::default()
    };
    let mut op = OidcProvider::start(&[CALLBACK], op).await;
    knows(&node, "corp", &op.issuer, (&op.client_id, &op.client_secret), json!({})).await;
    let origin = Origin::http().await;
    let _ssh = publish(&node, "web", &origin, allowing(&[ALICE])).await;
    let (mut browser, mut other) = (Browser::at(&node), Browser::at(&node));
    for browser in [&mut browser, &mut other] {
        assert_eq!(last(&log_in(browser, &format!("{WEB}/"), ALICE).await).status, 200);
    }
    op.logout(&mut browser).await;
    eventually("the logout", async || (browser.get(&format!("{WEB}/")).await.status == 302).then_some(())).await;
    assert_eq!(other.get(&format!("{WEB}/")).await.status, 200, "another session of the provider's");
    let told = op.told().await;
    assert_eq!(told[0]["status"], 200, "{told:?}");
    // The same again, and what is no logout token.
    let token = told[0]["body"].as_str().unwrap().split_once("logout_token=").unwrap().1.to_owned();
    let mut program = Browser::at(&node);
    program.manner = Manner::Bare;
    let url = format!("https://{AUTH}/.adit/backchannel/corp");
    for bad in [token.as_str(), "x", "", "a.b.c"] {
        let answer = program.post_form(&url, &[("logout_token", bad)]).await;
        assert_eq!(answer.status, 400, "{bad}: {}", answer.text());
    }
    let none = program.post_form(&format!("https://{AUTH}/.adit/backchannel/none"), &[("logout_token", &token)]).await;
    assert_eq!(none.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_provider_that_is_down_stops_new_logins_alone() {
    if !node_is_new_enough() {
        return;
    }
    let mut scene = Scene::new(allowing(&[ALICE])).await;
    let (mut browser, mut new, mut half) = (scene.browser(), scene.browser(), scene.browser());
    assert_eq!(last(&log_in(&mut browser, &format!("{WEB}/"), ALICE).await).status, 200);
    let left = half.login_at_op(&format!("{WEB}/"), ALICE).await;
    scene.op.down().await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 200);
    let hops = half.follow_on(left, 3).await;
    let page = last(&hops);
    assert_eq!((page.status, title(page)), (503, "Corp does not answer".into()), "{}", page.text());
    assert!(!page.header("retry-after").is_empty());
    // What it needs to send somebody there is remembered; without it, the page says why.
    let hops = new.follow(&format!("{WEB}/"), 1).await;
    assert!(matches!(last(&hops).status, 302 | 503), "{}", last(&hops).text());
    scene.op.up().await;
    eventually_within(Duration::from_secs(40), "logins again", async || {
        let mut again = scene.browser();
        let first = again.follow(&format!("{WEB}/"), 1).await.pop().unwrap();
        if first.status != 302 {
            return None;
        }
        let left = again.login_on_op(first, ALICE).await;
        (last(&come_back(&mut again, left).await).status == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_local_accounts_log_in_by_a_password_and_are_out_with_it() {
    let node = node().await;
    node.put("providers/here", json!({"kind": "local", "title": "This edge"})).await;
    node.put("accounts/ann", json!({"email": "ann@example.com", "password": "correct horse"})).await;
    let origin = Origin::http().await;
    let gate = json!({"oidc": {"providers": ["here"], "allow_email_domains": ["example.com"]}});
    let _ssh = publish(&node, "web", &origin, gate).await;
    let mut browser = Browser::at(&node);
    let page = browser.follow(&format!("{WEB}/headers"), 4).await.pop().unwrap();
    assert_eq!((page.status, title(&page)), (200, "Log in to web.edge.localhost".into()));
    let enter =
        |page: &Answer, email: &str, password: &str| page.form().with("email", email).with("password", password);
    let mut page = page;
    for (email, password) in [("ann@example.com", "wrong"), ("bob@example.com", "correct horse"), ("", ""), ("x", "y")]
    {
        page = browser.submit(&page, &enter(&page, email, password)).await;
        assert_eq!(page.status, 401, "{email}: {}", page.text());
        assert!(page.text().contains("There is no such account"), "{}", page.text());
    }
    let done = browser.submit(&page, &enter(&page, "Ann@Example.com", "correct horse")).await;
    let hops = browser.follow_on(done, 4).await;
    assert_eq!(last(&hops).status, 200, "{}", last(&hops).text());
    assert!(last(&hops).text().contains("x-adit-user-email: ann@example.com"));
    // A new password, and the login by the old one is out; so is a disabled account.
    node.put("accounts/ann", json!({"email": "ann@example.com", "password": "another"})).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302);
    node.put("accounts/ann", json!({"email": "ann@example.com", "password": "another", "disabled": true})).await;
    let page = browser.follow(&format!("{WEB}/"), 4).await.pop().unwrap();
    assert_eq!(browser.submit(&page, &enter(&page, "ann@example.com", "another")).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_several_providers_give_a_choice() {
    if !node_is_new_enough() {
        return;
    }
    let gate = json!({"oidc": {"providers": ["corp", "here"], "allow_emails": [ALICE]}});
    let scene = Scene::new(gate).await;
    scene.node.put("providers/here", json!({"kind": "local", "title": "This <edge>"})).await;
    scene.node.put("providers/other", json!({"kind": "local"})).await;
    let mut browser = scene.browser();
    let page = browser.follow(&format!("{WEB}/"), 4).await.pop().unwrap();
    assert_eq!(page.status, 200);
    let text = page.text();
    assert!(text.contains(">Corp<") && text.contains("This &lt;edge&gt;"), "{text}");
    let href = text.split("href=\"").find(|link| link.contains("p=corp")).unwrap().split('"').next().unwrap();
    let href = href.replace("&#x2f;", "/").replace("&amp;", "&");
    let first = browser.click(&page, &href).await;
    let left = browser.login_on_op(first, ALICE).await;
    assert_eq!(last(&come_back(&mut browser, left).await).status, 200);
    // A provider that is not this socket's is none.
    let other = browser.click(&page, &href.replace("p=corp", "p=other")).await;
    assert_eq!(other.status, 400, "{}", other.text());
}

/// A login that was begun and stands before the callback: the browser, and the URL
/// that the provider sends it back to.
async fn before_the_callback(scene: &Scene) -> (Browser, Url) {
    let mut browser = scene.browser();
    let left = browser.login_at_op(&format!("{WEB}/"), ALICE).await;
    let back = left.location().unwrap();
    (browser, back)
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_forged_foreign_and_used_steps_log_nobody_in() {
    if !node_is_new_enough() {
        return;
    }
    let scene = Scene::new(allowing(&[ALICE])).await;
    let (mut browser, back) = before_the_callback(&scene).await;
    let back = back.to_string();
    let field = |name: &str| Url::parse(&back).field(name).unwrap();
    let (state, code) = (field("state"), field("code"));
    let is_out = |browser: &Browser| browser.cookie("web.edge.localhost", "__Host-adit_s").is_none();
    let flip = |text: &str| {
        let mut bytes = text.as_bytes().to_vec();
        let at = bytes.len() / 2;
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
        String::from_utf8(bytes).unwrap()
    };
    // Before the right one, which they do not spoil.
    for (what, url, status) in [
        ("a changed state", back.replace(&url::encode(&state), &flip(&state)), 400),
        ("no state", format!("{CALLBACK}?code={code}"), 400),
        ("two states", format!("{back}&state=x"), 400),
        ("two codes", format!("{back}&code=x"), 400),
        ("a key that nobody has", back.replace("v1.k", "v1.x"), 503),
        ("another provider's callback", back.replace("/cb/corp", "/cb/other"), 400),
        ("no provider's callback", back.replace("/cb/corp", "/cb/%2e%2e"), 400),
        ("a state for something else", format!("https://{AUTH}/.adit/start?t={state}"), 400),
        ("a start that is none", format!("https://{AUTH}/.adit/start?t=v1.k.x"), 503),
        ("no start", format!("https://{AUTH}/.adit/start"), 400),
        ("a hand-over that is a state", format!("{WEB}/.adit/finish?h={state}"), 400),
        ("no hand-over", format!("{WEB}/.adit/finish"), 400),
        ("a logout that is a state", format!("https://{AUTH}/.adit/logout?t={state}"), 400),
    ] {
        let mut copy = scene.browser();
        copy.jar = browser.jar.clone();
        let answer = copy.get(&url).await;
        assert_eq!(answer.status, status, "{what}: {}", answer.text());
        assert!(is_out(&copy), "{what}");
    }
    // A mix-up: the answer of another provider.
    let (mut mixed, answer) = before_the_callback(&scene).await;
    let answer = mixed.get(&answer.to_string().replace("iss=", "iss=https://evil.test&x=")).await;
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(is_out(&mixed));
    // Another browser, that has the URL alone.
    let mut thief = scene.browser();
    let answer = thief.get(&back).await;
    assert_eq!((answer.status, title(&answer)), (400, "Cookies are blocked".into()));
    // A browser with a login of its own under way: login CSRF.
    let (mut victim, _) = before_the_callback(&scene).await;
    let answer = victim.get(&back).await;
    assert_eq!(answer.status, 400, "{}", answer.text());
    assert!(is_out(&victim));
    // A copy of the browser as it was, with its cookies.
    let mut copy = scene.browser();
    copy.jar = browser.jar.clone();
    let page = browser.get(&back).await;
    assert!(page.text().contains("/.adit/continue"), "{}", page.text());
    let answer = copy.get(&back).await;
    assert_eq!(answer.status, 400, "a state is taken once: {}", answer.text());
    assert_eq!(browser.get(&back).await.status, 400, "and so is reloading it");
    // The form, sent by others.
    let token = page.form().field("t").unwrap().to_owned();
    let continued = format!("https://{AUTH}/.adit/continue");
    let mut other = scene.browser();
    let answer = other.post_form(&continued, &[("t", &token)]).await;
    assert_eq!(title(&answer), "Cookies are blocked");
    let mut elsewhere = scene.browser();
    elsewhere.jar = browser.jar.clone();
    elsewhere.from = Some(Url::parse("https://evil.edge.localhost:8443/"));
    assert_eq!(elsewhere.post_form(&continued, &[("t", &token)]).await.status, 400);
    assert_eq!(browser.post_form(&continued, &[("t", &flip(&token))]).await.status, 400);
    assert_eq!(browser.post_form(&continued, &[("t", &token), ("t", &token)]).await.status, 400);
    assert_eq!(browser.post_form(&continued, &[]).await.status, 400);
    assert_eq!(browser.post_form(&format!("https://{AUTH}/.adit/local"), &[("t", &token)]).await.status, 400);
    let huge = "x".repeat(20_000);
    assert_eq!(browser.post_form(&continued, &[("t", &huge)]).await.status, 400);
    // By the one whom it was shown to.
    let sent = browser.submit(&page, &page.form()).await;
    assert_eq!(sent.status, 303, "{}", sent.text());
    let finish = sent.location().unwrap().to_string();
    // The hand-over: of another browser, on another host, then right, then used.
    let answer = thief.get(&finish).await;
    assert_eq!((answer.status, title(&answer)), (400, "Cookies are blocked".into()));
    let other = Origin::http().await;
    let _other = publish(&scene.node, "other", &other, allowing(&[ALICE])).await;
    let moved = finish.replace("web.edge", "other.edge");
    assert_eq!(browser.get(&moved).await.status, 400);
    assert_eq!(browser.get(&finish.replace("?h=", "?h=x&h=")).await.status, 400);
    let before = browser.jar.clone();
    let done = browser.get(&finish).await;
    assert_eq!((done.status, done.location().unwrap().to_string()), (303, format!("{WEB}/")), "{}", done.text());
    assert!(!is_out(&browser));
    assert_eq!(browser.get(&finish).await.status, 303, "who is in only goes home");
    let mut replayed = scene.browser();
    replayed.jar = before;
    assert_eq!(replayed.get(&finish).await.status, 400, "a hand-over is taken once");
    // The login's cookie does not hold on another host, or changed.
    let session = browser.cookie("web.edge.localhost", "__Host-adit_s").unwrap().value.clone();
    let mut moved = scene.browser();
    moved.jar.put("other.edge.localhost", "__Host-adit_s", &session);
    assert_eq!(moved.get("https://other.edge.localhost:8443/").await.status, 302);
    moved.jar.put("web.edge.localhost", "__Host-adit_s", &flip(&session));
    assert_eq!(moved.get(&format!("{WEB}/")).await.status, 302);
    // A sibling's value before it does no harm.
    let two = format!("__Host-adit_s=v1.x.y; __Host-adit_s={session}");
    let mut bare = scene.browser();
    assert_eq!(bare.request("GET", &format!("{WEB}/"), &[("cookie", &two)], b"").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_token_that_a_provider_would_not_give_logs_nobody_in() {
    if !node_is_new_enough() {
        return;
    }
    let (node, mut mock) = tokio::join!(node(), MockProvider::start());
    knows(&node, "corp", &mock.issuer, (&mock.client_id, &mock.client_secret), json!({})).await;
    let origin = Origin::http().await;
    let _ssh = publish(&node, "web", &origin, allowing(&[ALICE])).await;
    for mode in [
        "aud",
        "multiaud",
        "noaud",
        "iss",
        "noiss",
        "exp",
        "noexp",
        "future",
        "nbf",
        "old",
        "nonce",
        "nononce",
        "azp",
        "nosub",
        "kid",
        "typ",
        "crit",
        "algnone",
        "hs256secret",
        "hs256public",
        "badsig",
        "wrongkey",
        "jwk",
        "nosig",
        "notjwt",
        "noidt",
        "authziss",
        "400_token",
        "html_token",
        "garbage_token",
        "huge_token",
        "redirect_token",
    ] {
        mock.mode(mode).await;
        let mut browser = Browser::at(&node);
        let hops = browser.follow(&format!("{WEB}/"), 8).await;
        let page = last(&hops);
        assert!(matches!(page.status, 400 | 502 | 503), "{mode}: {} {}", page.status, page.text());
        assert!(browser.cookie("web.edge.localhost", "__Host-adit_s").is_none(), "{mode}");
        mock.mode("ok").await;
    }
    for (mode, status) in [("unverified", 403), ("absent", 403), ("string", 200), ("nokid", 200)] {
        mock.mode(mode).await;
        let mut browser = Browser::at(&node);
        let first = browser.get(&format!("{WEB}/")).await;
        let hops = come_back(&mut browser, first).await;
        assert_eq!(last(&hops).status, status, "{mode}: {}", last(&hops).text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_glewlwyd_github_facebook_and_saml_say_who_comes() {
    if !node_is_new_enough() {
        return;
    }
    let callback = |id: &str| format!("https://{AUTH}/.adit/cb/{id}");
    let node = node().await;
    let (glewlwyd, github) = (callback("glewlwyd"), callback("github"));
    let (facebook, saml) = (callback("facebook"), callback("saml"));
    let saml_callbacks = [saml.as_str()];
    let (glewlwyd, github, facebook, saml) = tokio::join!(
        Glewlwyd::start(&glewlwyd),
        FakeGithub::start(&github),
        FakeFacebook::start(&facebook),
        SamlBroker::start(&saml_callbacks),
    );
    let client = (glewlwyd.client_id.as_str(), glewlwyd.client_secret.as_str());
    knows(&node, "glewlwyd", &glewlwyd.issuer, client, json!({"trust_email": true, "client_auth": "post"})).await;
    let client = (saml.client_id.as_str(), saml.client_secret.as_str());
    knows(&node, "saml", &saml.issuer, client, json!({"trust_email": true})).await;
    for (id, base, client) in [
        ("github", &github.url, (&github.client_id, &github.client_secret)),
        ("facebook", &facebook.url, (&facebook.client_id, &facebook.client_secret)),
    ] {
        let at = |path: &str| format!("{base}{path}");
        let (authorize, token, api) = match id {
            "github" => (at("/login/oauth/authorize"), at("/login/oauth/access_token"), at("")),
            _ => (at("/dialog/oauth"), at("/oauth/access_token"), at("")),
        };
        let record = json!({"kind": id, "client_id": client.0, "client_secret": client.1,
            "authorize_url": authorize, "token_url": token, "api_url": api, "trust_email": id == "facebook"});
        node.put(&format!("providers/{id}"), record).await;
    }
    let origin = Origin::http().await;
    let mut tunnels = Vec::new();
    for id in ["glewlwyd", "github", "facebook", "saml"] {
        let gate = json!({"oidc": {"providers": [id], "allow_email_domains": ["*.test", "example.com", "test"],
            "allow_emails": ["octo@example.com", ALICE]}});
        tunnels.push(publish(&node, id, &origin, gate).await);
    }
    github.set_emails(&[("octo@example.com", true, true)]);
    facebook.set_user("1", Some(ALICE));
    for id in ["glewlwyd", "github", "facebook", "saml"] {
        let mut browser = Browser::at(&node);
        let url = format!("https://{id}.edge.localhost:8443/headers");
        let left = match id {
            "glewlwyd" => browser.login_at_glewlwyd(&url, glewlwyd.user.0, glewlwyd.user.1).await,
            "saml" => browser.login_at_saml(&url).await,
            _ => browser.get(&url).await,
        };
        let hops = come_back(&mut browser, left).await;
        let page = last(&hops);
        assert_eq!(page.status, 200, "{id}: {} {}", page.url, page.text());
        assert!(page.text().contains(&format!("x-adit-user-idp: {id}")), "{id}: {}", page.text());
    }
    // An address that GitHub does not vouch for, and none at all.
    github.set_emails(&[("octo@example.com", true, false)]);
    facebook.set_user("1", None);
    for id in ["github", "facebook"] {
        let mut browser = Browser::at(&node);
        let first = browser.get(&format!("https://{id}.edge.localhost:8443/")).await;
        let hops = come_back(&mut browser, first).await;
        assert_eq!(last(&hops).status, 403, "{id}: {}", last(&hops).text());
    }
}
