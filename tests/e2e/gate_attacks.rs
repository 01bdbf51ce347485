//! What those try who have no business behind a gate, and what goes wrong for those
//! who have. By accounts of the edge's own, so that each takes a moment. Each test
//! says what a visitor notices.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use crate::gate_logins::{node, node_with, publish, title};
use crate::harness::*;

const AUTH: &str = "https://auth.edge.localhost:8443";
const HOST: &str = "web.edge.localhost";
const WEB: &str = "https://web.edge.localhost:8443";
const ANN: &str = "ann@example.com";
const PASSWORD: &str = "correct horse";
const SESSION: &str = "__Host-adit_s";

/// Who may come by an account of the edge's own.
fn allowing(emails: &[&str]) -> Value {
    json!({"oidc": {"providers": ["here"], "allow_emails": emails}})
}

async fn records(node: &Node) {
    node.put("providers/here", json!({"kind": "local", "title": "This edge"})).await;
    node.put("accounts/ann", json!({"email": ANN, "password": PASSWORD})).await;
}

/// A node, and an origin behind a gate.
struct Place {
    node: Node,
    origin: Origin,
    _ssh: Ssh,
}

impl Place {
    async fn new() -> Self {
        Self::behind(allowing(&[ANN])).await
    }

    async fn behind(gate: Value) -> Self {
        Self::at(node().await, gate).await
    }

    async fn at(node: Node, gate: Value) -> Self {
        records(&node).await;
        let origin = Origin::http().await;
        let ssh = publish(&node, "web", &origin, gate).await;
        Self { node, origin, _ssh: ssh }
    }

    fn browser(&self) -> Browser {
        Browser::at(&self.node)
    }

    fn program(&self) -> Browser {
        let mut program = self.browser();
        program.manner = Manner::Bare;
        program
    }

    async fn gated(&self, gate: Value) {
        crate::gate_logins::gated(&self.node, "web", gate).await;
    }

    async fn logged_in(&self) -> Browser {
        let mut browser = self.browser();
        log_in(&mut browser).await;
        browser
    }

    /// A program that has the cookie of somebody who logged in.
    async fn with_cookie(&self) -> (Browser, String) {
        let cookie = cookie_of(&self.logged_in().await);
        (self.program(), cookie)
    }

    /// Bytes as they are, on a connection of TLS for `sni`; the answer, to its end.
    async fn says(&self, sni: &str, bytes: &str) -> (u16, String) {
        let ca = std::fs::read(self.node.ca()).unwrap();
        let mut io = tls_connect(self.node.addr("https"), sni, trusting(&ca, &["http/1.1"])).await.unwrap();
        io.write_all(bytes.as_bytes()).await.unwrap();
        io.flush().await.unwrap();
        let (status, head) = within(Duration::from_secs(10), "an answer", read_answer(&mut io)).await;
        let mut body = Vec::new();
        let _ = within(Duration::from_secs(10), "its end", io.read_to_end(&mut body)).await;
        (status, format!("{head}{}", String::from_utf8_lossy(&body)))
    }
}

/// Goes to the page that asks for the password.
async fn asked_for_password(browser: &mut Browser) -> Answer {
    let page = browser.follow(&format!("{WEB}/"), 4).await.pop().unwrap();
    assert_eq!((page.status, title(&page)), (200, format!("Log in to {HOST}")), "{}", page.text());
    page
}

async fn enters(browser: &mut Browser, page: &Answer) -> Answer {
    browser.submit(page, &page.form().with("email", ANN).with("password", PASSWORD)).await
}

/// The URL that takes a login back to the socket's host.
async fn handed_over(browser: &mut Browser) -> String {
    let page = asked_for_password(browser).await;
    let sent = enters(browser, &page).await;
    assert_eq!(sent.status, 303, "{}", sent.text());
    sent.location().unwrap().to_string()
}

async fn log_in(browser: &mut Browser) {
    let finish = handed_over(browser).await;
    let done = browser.get(&finish).await;
    assert_eq!(done.status, 303, "{}", done.text());
}

fn cookie_of(browser: &Browser) -> String {
    browser.cookie(HOST, SESSION).expect("a login").value.clone()
}

fn is_out(browser: &Browser) -> bool {
    browser.cookie(HOST, SESSION).is_none()
}

/// Changed in its middle.
fn flip(text: &str) -> String {
    let at = text.len() / 2;
    let other = if &text[at..=at] == "A" { "B" } else { "A" };
    format!("{}{other}{}", &text[..at], &text[at + 1..])
}

async fn status(browser: &mut Browser, url: &str, headers: &[(&str, &str)]) -> u16 {
    browser.request("GET", url, headers, b"").await.status
}

async fn with_cookies(program: &mut Browser, cookies: &str) -> u16 {
    status(program, &format!("{WEB}/"), &[("cookie", cookies)]).await
}

// --- cookies ---

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_cookie_in_another_alphabet_hides_no_login() {
    let place = Place::new().await;
    let cookie = cookie_of(&place.logged_in().await);
    for line in [format!("n=\u{e9}; {SESSION}={cookie}"), format!("{SESSION}={cookie}; \u{f1}=1")] {
        let asked = format!("GET / HTTP/1.1\r\nhost: {HOST}:8443\r\nconnection: close\r\ncookie: {line}\r\n\r\n");
        assert_eq!(place.says(HOST, &asked).await.0, 200, "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_is_worth_nothing_at_another_socket() {
    let place = Place::new().await;
    let _other = publish(&place.node, "other", &place.origin, allowing(&[ANN])).await;
    let mut browser = place.browser();
    browser.jar.put("other.edge.localhost", SESSION, &cookie_of(&place.logged_in().await));
    assert_eq!(browser.get("https://other.edge.localhost:8443/").await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_does_not_outlive_its_socket() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    assert_eq!(place.node.api("DELETE", "/v1/sockets/web?cascade=true", None).await.0, 204);
    let again = json!({"type": "http", "hostnames": [HOST], "gate": allowing(&[ANN])});
    place.node.put("sockets/again", again).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302, "the name is another socket's by now");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_changed_cookie_is_no_login() {
    let place = Place::new().await;
    let (mut program, cookie) = place.with_cookie().await;
    assert_eq!(with_cookies(&mut program, &format!("{SESSION}={cookie}")).await, 200);
    for changed in [flip(&cookie), cookie[..cookie.len() - 4].to_owned(), format!("{cookie}A"), cookie.to_uppercase()] {
        assert_eq!(with_cookies(&mut program, &format!("{SESSION}={changed}")).await, 401, "{changed}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_cookie_sealed_for_something_else_is_no_login() {
    let place = Place::new().await;
    let mut browser = place.browser();
    asked_for_password(&mut browser).await;
    let mut program = place.program();
    let sealed: Vec<String> = browser.jar.all().map(|cookie| cookie.value.clone()).collect();
    assert!(sealed.len() >= 2, "one at each host");
    for value in sealed {
        assert_eq!(with_cookies(&mut program, &format!("{SESSION}={value}")).await, 401);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_cookies_in_front_of_the_right_one_lock_nobody_out() {
    let place = Place::new().await;
    let (mut program, cookie) = place.with_cookie().await;
    let line = |n: usize| format!("{}{SESSION}={cookie}", format!("{SESSION}=v1.k.x; ").repeat(n));
    assert_eq!(with_cookies(&mut program, &line(3)).await, 200);
    // A hundred are not worth the work.
    assert_eq!(with_cookies(&mut program, &line(100)).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_huge_cookie_is_no_login_and_no_trouble() {
    let place = Place::new().await;
    let (mut program, cookie) = place.with_cookie().await;
    let huge = format!("{SESSION}=v1.{}", "x".repeat(12_000));
    assert_eq!(with_cookies(&mut program, &huge).await, 401);
    assert_eq!(with_cookies(&mut program, &format!("{huge}; {SESSION}={cookie}")).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_origin_cannot_set_or_see_a_login() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut tcp, _)) = listener.accept().await {
            let (_, head) = (read_head(&mut tcp).await, ());
            let _ = (head, tell.send(()));
            let answer = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\
                set-cookie: __Host-adit_s=v1.k.x; Path=/; Secure\r\nset-cookie: own=1\r\n\
                set-cookie: __HOST-ADIT_f_0=x; Path=/; Secure\r\nset-cookie: =__Host-adit_s=x\r\n\
                set-cookie: __Host-adit_s\r\n\r\n";
            let _ = tcp.write_all(answer.as_bytes()).await;
        }
    });
    let node = node().await;
    records(&node).await;
    crate::gate_logins::gated(&node, "web", allowing(&[ANN])).await;
    node.put("tunnels/web-1", json!({"socket": "web", "keys": [node.key.line()]})).await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{addr}")]).await;
    let mut browser = Browser::at(&node);
    log_in(&mut browser).await;
    let cookie = cookie_of(&browser);
    let answer = browser.get(&format!("{WEB}/")).await;
    assert_eq!((answer.status, answer.set_cookies()), (200, vec!["own=1".to_owned()]));
    assert!(told.recv().await.is_some());
    assert_eq!(cookie_of(&browser), cookie);
}

async fn read_head(tcp: &mut tokio::net::TcpStream) -> Vec<u8> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match tcp.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => break,
        }
    }
    head
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_is_not_told_to_an_origin_that_lost_its_gate() {
    let place = Place::new().await;
    let (mut program, cookie) = place.with_cookie().await;
    place.node.put("sockets/web", json!({"type": "http", "hostnames": [HOST]})).await;
    let line = format!("a=1; {SESSION}={cookie}");
    let answer = program.request("GET", &format!("{WEB}/headers"), &[("cookie", &line)], b"").await;
    assert!(answer.status == 200 && answer.text().contains("cookie: a=1\n"), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_browser_keeps_few_logins_that_were_begun() {
    let place = Place::new().await;
    let mut browser = place.browser();
    for _ in 0..12 {
        asked_for_password(&mut browser).await;
    }
    for prefix in ["__Host-adit_f_", "__Host-adit_l_"] {
        let kept = browser.jar.all().filter(|cookie| cookie.name.starts_with(prefix)).count();
        assert!((1..=4).contains(&kept), "{prefix}: {kept}");
    }
    log_in(&mut browser).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_jar_full_of_strange_cookies_is_answered_in_one_head() {
    let place = Place::new().await;
    let mut program = place.program();
    let many: Vec<String> = (0..150).map(|n| format!("__Host-adit_f_{n:016}=x")).collect();
    let headers = [("cookie", many.join("; ")), ("accept", "text/html".to_owned())];
    let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let answer = program.request("GET", &format!("{WEB}/"), &headers, b"").await;
    assert_eq!(answer.status, 302);
    assert!(answer.set_cookies().len() <= 33, "{}", answer.set_cookies().len());
}

// --- steps of a login ---

#[tokio::test(flavor = "multi_thread")]
async fn gate_the_password_form_is_worth_nothing_in_another_browser() {
    let place = Place::new().await;
    let page = asked_for_password(&mut place.browser()).await;
    let mut thief = place.browser();
    let answer = enters(&mut thief, &page).await;
    assert_eq!((answer.status, title(&answer)), (400, "Cookies are blocked".into()), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_the_password_form_of_another_page_is_not_taken() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let page = asked_for_password(&mut browser).await;
    let token = page.form().field("t").unwrap().to_owned();
    browser.from = Some(Url::parse("https://evil.edge.localhost:8443/"));
    let form = [("t", token.as_str()), ("email", ANN), ("password", PASSWORD)];
    assert_eq!(browser.post_form(&format!("{AUTH}/.adit/local"), &form).await.status, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_changed_password_form_is_not_taken() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let page = asked_for_password(&mut browser).await;
    let token = flip(page.form().field("t").unwrap());
    let answer = browser.submit(&page, &page.form().with("t", &token).with("email", ANN)).await;
    assert_eq!((answer.status, title(&answer)), (400, "This login cannot go on".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_hand_over_is_worth_nothing_in_another_browser() {
    let place = Place::new().await;
    let finish = handed_over(&mut place.browser()).await;
    let mut thief = place.browser();
    let answer = thief.get(&finish).await;
    assert_eq!((answer.status, title(&answer)), (400, "Cookies are blocked".into()));
    assert!(is_out(&thief));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_who_follows_a_strangers_hand_over_is_not_logged_in_as_the_stranger() {
    let place = Place::new().await;
    let finish = handed_over(&mut place.browser()).await;
    let mut victim = place.browser();
    asked_for_password(&mut victim).await;
    assert_eq!(victim.get(&finish).await.status, 400);
    assert!(is_out(&victim));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_hand_over_is_taken_once() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let finish = handed_over(&mut browser).await;
    let mut copy = browser.clone();
    assert_eq!(browser.get(&finish).await.status, 303);
    assert_eq!(copy.get(&finish).await.status, 400);
    assert!(is_out(&copy));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_hand_over_of_one_host_is_not_taken_at_another() {
    let place = Place::new().await;
    let _other = publish(&place.node, "other", &place.origin, allowing(&[ANN])).await;
    let mut browser = place.browser();
    let finish = handed_over(&mut browser).await.replace("web.edge", "other.edge");
    let answer = browser.get(&finish).await;
    assert_eq!((answer.status, title(&answer)), (400, "This login cannot go on".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_that_was_begun_before_an_edit_is_held_against_the_new_rules() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let finish = handed_over(&mut browser).await;
    place.gated(allowing(&["bob@example.com"])).await;
    let answer = browser.get(&finish).await;
    assert_eq!(answer.status, 403, "{}", answer.text());
    assert!(is_out(&browser));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_for_a_socket_that_lost_its_gate_ends_with_a_word() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let page = asked_for_password(&mut browser).await;
    place.node.put("sockets/web", json!({"type": "http", "hostnames": [HOST]})).await;
    let answer = enters(&mut browser, &page).await;
    assert_eq!((answer.status, title(&answer)), (404, "No login is needed".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_reloading_the_end_of_a_login_goes_to_the_page() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let finish = handed_over(&mut browser).await;
    for _ in 0..2 {
        let answer = browser.get(&finish).await;
        assert_eq!((answer.status, answer.location().unwrap().to_string()), (303, format!("{WEB}/")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_steps_of_a_login_are_neither_kept_nor_told_to_others() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let begun = browser.get(&format!("{WEB}/")).await;
    let page = asked_for_password(&mut browser).await;
    let sent = enters(&mut browser, &page).await;
    let finish = browser.get(&sent.location().unwrap().to_string()).await;
    // A form of a page without any referrer would not say whose it is.
    for (answer, referrer) in
        [(&begun, "no-referrer"), (&page, "same-origin"), (&sent, "no-referrer"), (&finish, "no-referrer")]
    {
        assert_eq!(answer.header("cache-control"), "no-store", "{}", answer.url);
        assert_eq!(answer.header("referrer-policy"), referrer, "{}", answer.url);
    }
    let policy = page.header("content-security-policy");
    assert!(policy.contains("frame-ancestors 'none'") && policy.contains("default-src 'none'"), "{policy}");
    // Nor to who reads the access log, or the log.
    for secret in [begun.location().unwrap().field("t").unwrap(), finish.url.field("h").unwrap(), PASSWORD.into()] {
        assert!(!place.node.log().contains(&secret), "{secret}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_page_that_was_asked_for_with_line_breaks_makes_no_header() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let page = browser.follow(&format!("{WEB}/a%0d%0aset-cookie:%20x=1"), 4).await.pop().unwrap();
    let sent = enters(&mut browser, &page).await;
    let done = browser.get(&sent.location().unwrap().to_string()).await;
    assert_eq!(done.location().unwrap().to_string(), format!("{WEB}/a%0d%0aset-cookie:%20x=1"));
    assert!(done.set_cookies().iter().all(|line| line.starts_with("__Host-adit_")), "{:?}", done.set_cookies());
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_page_with_a_very_long_name_can_still_be_logged_in_to() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let page = browser.follow(&format!("{WEB}/?q={}", "x".repeat(6000)), 4).await.pop().unwrap();
    let sent = enters(&mut browser, &page).await;
    let done = browser.get(&sent.location().unwrap().to_string()).await;
    assert_eq!((done.status, done.location().unwrap().to_string()), (303, format!("{WEB}/")));
    assert!(!is_out(&browser));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_burst_of_logins_at_one_socket_is_slowed() {
    let place = Place::at(node_with(NodeOpts::default().set("gate", "logins_per_socket = 5")).await, allowing(&[ANN]));
    let place = place.await;
    let mut slowed = None;
    for _ in 0..7 {
        let page = place.browser().follow(&format!("{WEB}/"), 4).await.pop().unwrap();
        if page.status == 429 {
            slowed = Some((title(&page), page.header("retry-after").to_owned()));
        }
    }
    let (said, wait) = slowed.expect("the sixth waits");
    assert_eq!(said, "Too many logins");
    assert!((1..=60).contains(&wait.parse::<u64>().unwrap()), "{wait}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_made_up_accounts_share_one_budget_of_guesses() {
    let opts = NodeOpts::default().set("gate", "passwords_per_socket = 1");
    let place = Place::at(node_with(opts).await, allowing(&[ANN])).await;
    let mut browser = place.browser();
    let mut page = asked_for_password(&mut browser).await;
    let mut busy = 0;
    for n in 0..16 {
        let email = format!("nobody{n}@example.com");
        page = browser.submit(&page, &page.form().with("email", &email).with("password", "x")).await;
        assert!(matches!(page.status, 401 | 429), "{}", page.text());
        busy += u32::from(page.status == 429);
    }
    assert!(busy >= 1, "each name had a budget of its own");
    assert_eq!(enters(&mut browser, &page).await.status, 303, "and who has an account has theirs");
}

// --- time, and several nodes ---

/// Two nodes of the same records, each with its own clock: the second's is `behind`
/// seconds behind.
struct TwoClocks {
    now: Place,
    behind: Place,
    browser: Browser,
    at: Arc<AtomicUsize>,
}

impl TwoClocks {
    async fn new(behind: u32, gate: Value) -> Self {
        let opts = || NodeOpts::default().set("gate", "make_keyring = false");
        let clock = [
            "env".to_owned(),
            format!("LD_PRELOAD={}", libfaketime()),
            format!("FAKETIME=-{behind}s"),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".into(),
        ];
        let clock: Vec<&str> = clock.iter().map(String::as_str).collect();
        let (now, late) = tokio::join!(node_with(opts()), node_with(opts().under(&clock)));
        let secret = data_encoding::BASE64.encode(&[7; 32]);
        for node in [&now, &late] {
            node.put("keyrings/default", json!({"keys": [{"kid": "k1", "secret": secret}]})).await;
        }
        let (now, behind) = (Place::at(now, gate.clone()).await, Place::at(late, gate).await);
        // The same hash: a login is bound to it.
        let (_, account) = now.node.api("GET", "/v1/accounts/ann", None).await;
        let account = json!({"email": ANN, "password_hash": account["password_hash"]});
        behind.node.put("accounts/ann", account).await;
        let at = Arc::<AtomicUsize>::default();
        let cas = [&now, &behind].map(|place| std::fs::read(place.node.ca()).unwrap()).concat();
        let (ips, asked) = ([now.node.ip, behind.node.ip], Arc::clone(&at));
        let browser = Browser::new(&cas, move |host, port, _| {
            SocketAddr::new(host.parse().unwrap_or(ips[asked.load(Ordering::Relaxed)]), port)
        });
        Self { now, behind, browser, at }
    }

    /// What comes next goes to the node that is behind.
    fn at_the_late_one(&mut self) -> &mut Browser {
        self.at.store(1, Ordering::Relaxed);
        &mut self.browser
    }

    fn at_the_right_one(&mut self) -> &mut Browser {
        self.at.store(0, Ordering::Relaxed);
        &mut self.browser
    }
}

/// Debian's libfaketime.
fn libfaketime() -> String {
    let triplet = format!("{}-linux-gnu", std::env::consts::ARCH);
    let path = format!("/usr/lib/{triplet}/faketime/libfaketime.so.1");
    assert!(std::path::Path::new(&path).exists(), "{path}: install Debian's faketime");
    path
}

fn lasting(absolute: &str, idle: &str) -> Value {
    let mut gate = allowing(&[ANN]);
    gate["oidc"]["session"] = json!({"absolute": absolute, "idle": idle});
    gate
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_ends_when_its_time_is_over() {
    let mut nodes = TwoClocks::new(3700, lasting("1h", "1h")).await;
    log_in(nodes.at_the_late_one()).await;
    assert_eq!(nodes.browser.get(&format!("{WEB}/")).await.status, 200);
    assert_eq!(nodes.at_the_right_one().get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_that_is_not_used_ends_earlier() {
    let mut nodes = TwoClocks::new(700, lasting("12h", "10m")).await;
    log_in(nodes.at_the_late_one()).await;
    assert_eq!(nodes.at_the_right_one().get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_that_is_used_is_made_longer() {
    let mut nodes = TwoClocks::new(400, lasting("12h", "10m")).await;
    log_in(nodes.at_the_late_one()).await;
    let before = cookie_of(&nodes.browser);
    assert_eq!(nodes.at_the_right_one().get(&format!("{WEB}/")).await.status, 200);
    assert_ne!(cookie_of(&nodes.browser), before);
    // What other sites' pages ask for makes nothing longer.
    let mut nodes = TwoClocks::new(400, lasting("12h", "10m")).await;
    log_in(nodes.at_the_late_one()).await;
    nodes.at_the_right_one();
    let cookie = format!("{SESSION}={}", cookie_of(&nodes.browser));
    let mut program = nodes.now.program();
    for (site, longer) in [("cross-site", false), ("same-site", false), ("same-origin", true)] {
        let headers = [("cookie", cookie.as_str()), ("sec-fetch-site", site), ("sec-fetch-mode", "cors")];
        let answer = program.request("GET", &format!("{WEB}/"), &headers, b"").await;
        assert_eq!((answer.status, !answer.set_cookies().is_empty()), (200, longer), "{site}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_clock_that_is_a_little_late_keeps_nobody_out() {
    let mut nodes = TwoClocks::new(40, allowing(&[ANN])).await;
    log_in(nodes.at_the_right_one()).await;
    assert_eq!(nodes.at_the_late_one().get(&format!("{WEB}/")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_login_from_the_future_is_none() {
    let mut nodes = TwoClocks::new(300, allowing(&[ANN])).await;
    log_in(nodes.at_the_right_one()).await;
    assert_eq!(nodes.at_the_late_one().get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_logout_at_a_node_whose_clock_is_late_ends_the_login() {
    let mut nodes = TwoClocks::new(40, allowing(&[ANN])).await;
    log_in(nodes.at_the_right_one()).await;
    let kept = cookie_of(&nodes.browser);
    let browser = nodes.at_the_late_one();
    let page = browser.get(&format!("{WEB}/.adit/logout")).await;
    let out = browser.submit(&page, &page.form().with("where", "everywhere")).await;
    assert_eq!(out.status, 303, "{}", out.text());
    browser.jar.put(HOST, SESSION, &kept);
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302, "whoever kept the cookie is out");
    // The feed brings the other node the same records.
    let (_, revoked) = nodes.behind.node.api("GET", "/v1/revocations", None).await;
    for record in revoked["items"].as_array().unwrap() {
        let id = record["id"].as_str().unwrap();
        let mut record = record.clone();
        record.as_object_mut().unwrap().remove("id");
        nodes.now.node.put(&format!("revocations/{id}"), record).await;
    }
    nodes.at_the_right_one();
    assert_eq!(nodes.browser.get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_form_that_lay_too_long_says_so() {
    let mut nodes = TwoClocks::new(720, allowing(&[ANN])).await;
    let page = asked_for_password(nodes.at_the_late_one()).await;
    let answer = enters(nodes.at_the_right_one(), &page).await;
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("It took too long."), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_hand_over_that_lay_too_long_is_not_taken() {
    let mut nodes = TwoClocks::new(150, allowing(&[ANN])).await;
    let finish = handed_over(nodes.at_the_late_one()).await;
    let answer = nodes.at_the_right_one().get(&finish).await;
    assert_eq!(answer.status, 400);
    assert!(answer.text().contains("It took too long."), "{}", answer.text());
    assert!(is_out(&nodes.browser));
}

// --- who is allowed ---

#[tokio::test(flavor = "multi_thread")]
async fn gate_case_makes_no_difference_to_an_address() {
    let place = Place::behind(allowing(&["Ann@EXAMPLE.com"])).await;
    let mut browser = place.logged_in().await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 200);
}

async fn is_denied_by(rules: Value) {
    let place = Place::behind(rules.clone()).await;
    let mut browser = place.browser();
    let page = asked_for_password(&mut browser).await;
    let answer = enters(&mut browser, &page).await;
    assert_eq!((answer.status, title(&answer)), (403, format!("You may not visit {HOST}")), "{rules}");
    assert!(answer.text().contains(ANN) && is_out(&browser));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_address_in_letters_that_look_alike_is_another() {
    is_denied_by(allowing(&["\u{430}nn@example.com"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_domain_in_letters_that_look_alike_is_another() {
    is_denied_by(allowing(&["ann@ex\u{430}mple.com"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_address_with_a_tag_is_another() {
    is_denied_by(allowing(&["ann+work@example.com", "a.nn@example.com"])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_subdomain_and_a_longer_name_are_not_the_domain() {
    let mut rules = allowing(&[]);
    rules["oidc"]["allow_email_domains"] = json!(["com", "sub.example.com", "*.example.com", "xample.com"]);
    is_denied_by(rules).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_empty_list_of_addresses_lets_nobody_in() {
    is_denied_by(allowing(&[])).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_account_that_is_deleted_is_out() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    assert_eq!(place.node.api("DELETE", "/v1/accounts/ann", None).await.0, 204);
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_address_that_goes_to_another_account_takes_no_login_along() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    let again = json!({"email": ANN, "password": "another"});
    // Two accounts cannot have one address: which of them logs in would be chance.
    let (status, answer) = place.node.api("PUT", "/v1/accounts/bob", Some(&again)).await;
    assert_eq!((status, &answer["errors"][0]["field"]), (409, &json!("email")), "{answer}");
    assert_eq!(place.node.api("DELETE", "/v1/accounts/ann", None).await.0, 204);
    place.node.put("accounts/bob", again).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302, "it is somebody else's by now");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_provider_that_a_socket_no_longer_names_is_no_way_in() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    place.node.put("providers/there", json!({"kind": "local"})).await;
    place.gated(json!({"oidc": {"providers": ["there"], "allow_emails": [ANN]}})).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_logins_from_before_a_moment_end_at_once() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    let mut gate = allowing(&[ANN]);
    gate["oidc"]["session"] = json!({"issued_after": "2100-01-01T00:00:00Z"});
    place.gated(gate).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_operator_ends_all_logins_of_an_address() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    let record = json!({"email": "ANN@example.com", "issued_before": "2100-01-01T00:00:00Z",
        "until": "2100-01-01T00:00:00Z"});
    place.node.put("revocations/ann-left", record).await;
    assert_eq!(browser.get(&format!("{WEB}/")).await.status, 302);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_cookie_that_was_logged_out_writes_no_more_records() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    let kept = cookie_of(&browser);
    let out = format!("{WEB}/.adit/logout");
    let page = browser.get(&out).await;
    for _ in 0..5 {
        browser.jar.put(HOST, SESSION, &kept);
        let answer = browser.submit(&page, &page.form().with("where", "everywhere")).await;
        assert_eq!(answer.status, 303, "{}", answer.text());
    }
    let (_, revoked) = place.node.api("GET", "/v1/revocations", None).await;
    assert_eq!(revoked["items"].as_array().unwrap().len(), 2, "the login and the person: {revoked}");
}

// --- gates that are half open ---

#[tokio::test(flavor = "multi_thread")]
async fn gate_an_empty_list_of_tokens_lets_nobody_in() {
    let place = Place::behind(json!({"service_tokens": []})).await;
    let mut program = place.program();
    assert_eq!(status(&mut program, &format!("{WEB}/"), &[]).await, 401);
    assert_eq!(status(&mut program, &format!("{WEB}/"), &[("adit-service-token", "")]).await, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_rules_without_a_login_are_not_taken_for_a_gate() {
    let node = node().await;
    let gate = json!({"rules": [{"path": "/admin", "users": ["ann"]}]});
    let socket = json!({"type": "http", "hostnames": [HOST], "gate": gate});
    let (status, answer) = node.api("PUT", "/v1/sockets/web", Some(&socket)).await;
    assert_eq!((status, &answer["errors"][0]["field"]), (400, &json!("gate.rules")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_preflight_brings_nothing_of_its_sender() {
    let mut gate = allowing(&[ANN]);
    gate["oidc"]["allow_cors_preflight"] = json!(true);
    let place = Place::behind(gate).await;
    let mut program = place.program();
    let asks = [("origin", "https://app.test"), ("access-control-request-method", "PUT")];
    let url = format!("{WEB}/headers");
    let with = |more: &[(&'static str, &'static str)]| [&asks[..], more].concat();
    let own = with(&[("cookie", "a=1"), ("authorization", "Bearer x"), ("x-http-method-override", "DELETE")]);
    let answer = program.request("OPTIONS", &url, &own, b"").await;
    let told = answer.text().to_lowercase();
    assert!(answer.status == 200 && told.contains("origin: https://app.test"), "{told}");
    for gone in ["cookie:", "authorization:", "x-http-method-override"] {
        assert!(!told.contains(gone), "{gone} in {told}");
    }
    assert_eq!(program.request("OPTIONS", &url, &asks, b"a body").await.status, 401);
    let upgrade = with(&[("connection", "upgrade"), ("upgrade", "websocket")]);
    assert_eq!(program.request("OPTIONS", &url, &upgrade, b"").await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_public_path_is_not_another_by_a_header() {
    let mut gate = allowing(&[ANN]);
    gate["rules"] = json!([{"path": "/headers", "public": true}]);
    let place = Place::behind(gate).await;
    let mut program = place.program();
    for name in ["x-original-url", "x-rewrite-url", "X_Original_Url"] {
        let answer = program.request("GET", &format!("{WEB}/headers"), &[(name, "/admin")], b"").await;
        assert!(answer.status == 200 && !answer.text().contains("/admin"), "{name}: {}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_its_password_stays_here_on_public_paths_too() {
    let gate = json!({"basic": {"users": [{"name": "ann", "password": "right"}]},
        "service_tokens": [{"name": "ci", "token": "a-long-and-random-token-of-one-program"}],
        "rules": [{"path": "/headers", "public": true}]});
    let place = Place::behind(gate).await;
    let mut program = place.program();
    let line = format!("Basic {}", data_encoding::BASE64.encode(b"ann:right"));
    let token = ("adit-service-token", "a-long-and-random-token-of-one-program");
    for more in [vec![], vec![token]] {
        let headers = [&[("authorization", line.as_str())], &more[..]].concat();
        let answer = program.request("GET", &format!("{WEB}/headers"), &headers, b"").await;
        assert!(answer.status == 200 && !answer.text().contains(&line), "{}", answer.text());
    }
    let own = program.request("GET", &format!("{WEB}/headers"), &[("authorization", "Bearer x")], b"").await;
    assert!(own.text().contains("Bearer x"), "what is the origin's own goes on");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_that_comes_later_cuts_what_runs() {
    let node = node().await;
    let origin = Origin::http().await;
    let _ssh = Ssh::start(&node, &[&format!("web:80:{}", origin.target())]).await;
    let io = Box::new(tokio::net::TcpStream::connect(node.addr("http")).await.unwrap());
    let mut socket = WebSocket::connect(io, HOST, "/ws").await;
    socket.write(1, b"there?").await;
    assert_eq!(socket.read().await, Some((1, b"there?".to_vec())));
    records(&node).await;
    // An edit that asks for nothing cuts nothing.
    let open = json!({"type": "http", "hostnames": [HOST], "gate": {"ip": {"deny": ["192.0.2.0/24"]}}});
    node.put("sockets/web", open).await;
    socket.write(1, b"still?").await;
    assert_eq!(socket.read().await, Some((1, b"still?".to_vec())));
    crate::gate_logins::gated(&node, "web", allowing(&[ANN])).await;
    let closed = within(Duration::from_secs(3), "the cut", socket.read()).await.expect("a close");
    assert_eq!((closed.0, u16::from_be_bytes([closed.1[0], closed.1[1]])), (8, 1008));
}

// --- hosts, ports and connections ---

#[tokio::test(flavor = "multi_thread")]
async fn gate_the_owner_of_a_tls_socket_is_not_sent_the_logins_of_others() {
    let place = Place::new().await;
    let raw = Origin::raw().await;
    let _ssh = Ssh::start(&place.node, &[&format!("tls/db:0:{}", raw.target())]).await;
    let port = place.node.port_of("db").await;
    let (ca, addr) = (std::fs::read(place.node.ca()).unwrap(), place.node.addr("https"));
    let shown = async |name: &str| {
        let addr = SocketAddr::new(addr.ip(), port);
        tls_connect(addr, name, trusting(&ca, &[])).await.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(shown("db.edge.localhost").await, Ok(()));
    for name in [HOST, "auth.edge.localhost", "unknown.edge.localhost"] {
        let refused = shown(name).await.expect_err(name);
        assert!(refused.contains("UnrecognisedName"), "{name}: {refused}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_name_with_logins_is_not_given_to_a_tls_socket() {
    let place = Place::new().await;
    let mut ssh = Ssh::launch(&place.node, SshOpts::new(&["tls/web:0:127.0.0.1:1"]));
    assert!(!ssh.program.ended(DEADLINE).await.success(), "{}", ssh.program.output());
    let socket = json!({"type": "tls", "hostnames": [HOST]});
    let (status, answer) = place.node.api("PUT", "/v1/sockets/thief", Some(&socket)).await;
    assert_eq!((status, &answer["errors"][0]["field"]), (409, &json!("hostnames[0]")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_nobody_stands_in_for_the_host_where_visitors_log_in() {
    let place = Place::new().await;
    for forward in ["passthrough/auth:443:127.0.0.1:1", "auth:80:127.0.0.1:1", "tls/auth:0:127.0.0.1:1"] {
        let mut ssh = Ssh::launch(&place.node, SshOpts::new(&[forward]));
        assert!(!ssh.program.ended(DEADLINE).await.success(), "{forward}: {}", ssh.program.output());
    }
    let socket = json!({"type": "passthrough", "hostnames": ["auth.edge.localhost"]});
    let (status, answer) = place.node.api("PUT", "/v1/sockets/thief", Some(&socket)).await;
    assert_eq!((status, &answer["errors"][0]["field"]), (400, &json!("hostnames[0]")), "{answer}");
    // A wildcard is allowed, and does not reach it.
    let below = json!({"type": "passthrough", "hostnames": ["*.edge.localhost"]});
    place.node.put("sockets/below", below).await;
    assert_eq!(place.logged_in().await.get(&format!("{WEB}/")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_the_host_where_visitors_log_in_is_not_served_in_the_clear() {
    let place = Place::new().await;
    let mut browser = place.browser();
    let answer = browser.get("http://auth.edge.localhost:8080/.adit/start?t=x").await;
    assert_eq!((answer.status, answer.location().unwrap().to_string()), (308, format!("{AUTH}/.adit/start?t=x")));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_target_with_another_host_than_the_header_is_no_way_around() {
    let place = Place::new().await;
    let _open = publish(&place.node, "open", &place.origin, json!({})).await;
    let ask = |target: &str, host: &str| format!("GET {target} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
    let open = "https://open.edge.localhost:8443/";
    // The target counts (RFC 9112 §3.2.2), for the gate as for the route.
    assert_eq!(place.says("open.edge.localhost", &ask(&format!("{WEB}/"), "open.edge.localhost")).await.0, 401);
    let (status, text) = place.says("open.edge.localhost", &ask(&format!("{open}headers"), HOST)).await;
    assert!(status == 200 && text.contains("host: open.edge.localhost"), "{text}");
    let two = format!("GET / HTTP/1.1\r\nhost: open.edge.localhost\r\nhost: {HOST}\r\nconnection: close\r\n\r\n");
    assert_eq!(place.says("open.edge.localhost", &two).await.0, 400);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_host_with_a_dot_behind_it_ends_at_the_usual_one() {
    let place = Place::new().await;
    let ask = |more: &str| format!("GET /a HTTP/1.1\r\nhost: {HOST}.:8443\r\nconnection: close\r\n{more}\r\n");
    let (status, head) = place.says(HOST, &ask("accept: text/html\r\n")).await;
    assert_eq!(status, 307, "{head}");
    assert!(head.contains(&format!("location: {WEB}/a\r\n")), "{head}");
    assert_eq!(place.says(HOST, &ask("")).await.0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_trailers_do_not_speak_for_the_edge() {
    let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut seen = read_head(&mut tcp).await;
        while !seen.ends_with(b"0\r\n\r\n") && !seen.windows(5).any(|w| w == b"eve\r\n") {
            match tcp.read_u8().await {
                Ok(byte) => seen.push(byte),
                Err(_) => break,
            }
        }
        tell.send(String::from_utf8_lossy(&seen).to_lowercase()).unwrap();
        let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    });
    let node = node().await;
    let gate = json!({"basic": {"users": [{"name": "ann", "password": "right"}]}});
    crate::gate_logins::gated(&node, "web", gate).await;
    node.put("tunnels/web-1", json!({"socket": "web", "keys": [node.key.line()]})).await;
    let ssh = Ssh::start(&node, &[&format!("web:80:{addr}")]).await;
    let place = Place { node, origin: Origin::http().await, _ssh: ssh };
    let line = data_encoding::BASE64.encode(b"ann:right");
    let asked = format!(
        "POST / HTTP/1.1\r\nhost: {HOST}\r\nauthorization: Basic {line}\r\nconnection: close, te\r\nte: trailers\r\n\
         transfer-encoding: chunked\r\ntrailer: x-adit-user, remote-user\r\n\r\n\
         2\r\nhi\r\n0\r\nx-adit-user: eve\r\nremote-user: eve\r\n\r\n"
    );
    assert_eq!(place.says(HOST, &asked).await.0, 200);
    let seen = told.recv().await.unwrap();
    assert!(seen.contains("x-adit-user: ann") && !seen.contains("eve"), "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_another_sites_page_opens_no_websocket_with_a_login() {
    let place = Place::new().await;
    let cookie = cookie_of(&place.logged_in().await);
    let ask = |origin: &str| {
        format!(
            "GET /ws HTTP/1.1\r\nhost: {HOST}:8443\r\nupgrade: websocket\r\nconnection: upgrade\r\n{origin}\
             sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             cookie: {SESSION}={cookie}\r\n\r\n"
        )
    };
    for origin in [
        "origin: https://evil.test\r\n",
        "origin: null\r\n",
        "origin: https://evil.edge.localhost:8443\r\n",
        "origin: http://web.edge.localhost:8443\r\n",
        "origin: https://web.edge.localhost\r\n",
        "sec-fetch-site: cross-site\r\n",
    ] {
        assert_eq!(place.says(HOST, &ask(origin)).await.0, 403, "{origin}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_two_passwords_or_two_tokens_are_none() {
    let gate = json!({"basic": {"users": [{"name": "ann", "password": "right"}]}});
    let place = Place::behind(gate).await;
    let line = data_encoding::BASE64.encode(b"ann:right");
    let ask = |lines: &str| format!("GET / HTTP/1.1\r\nhost: {HOST}\r\nconnection: close\r\n{lines}\r\n");
    let one = format!("authorization: Basic {line}\r\n");
    assert_eq!(place.says(HOST, &ask(&one)).await.0, 200);
    assert_eq!(place.says(HOST, &ask(&format!("{one}authorization: Basic eDp5\r\n"))).await.0, 401);
    assert_eq!(place.says(HOST, &ask(&format!("authorization: Basic {line}, Basic {line}\r\n"))).await.0, 401);
}

// --- what the origin is told ---

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_token_for_one_origin_is_short_and_names_no_other() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    let told = browser.get(&format!("{WEB}/headers")).await.text();
    let jwt = told.lines().find_map(|line| line.strip_prefix("x-adit-jwt: ")).expect("a token").to_owned();
    let (_, claims) = crate::idp::claims_of(&json!(jwt));
    assert_eq!((&claims["aud"], &claims["iss"]), (&json!(HOST), &json!(AUTH)));
    let life = claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap();
    assert_eq!((life, &claims["kind"], &claims["email"]), (300, &json!("login"), &json!(ANN)));
    // The next request has the same: it costs no signature.
    assert!(browser.get(&format!("{WEB}/headers")).await.text().contains(&jwt));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_pages_scripts_learn_who_is_logged_in_and_others_do_not() {
    let place = Place::new().await;
    let mut browser = place.logged_in().await;
    let url = format!("{WEB}/.adit/identity");
    let own = browser.get(&url).await;
    assert_eq!((own.status, &own.json()["email"]), (200, &json!(ANN)));
    assert!(own.header("access-control-allow-origin").is_empty());
    assert_eq!(place.browser().get(&url).await.status, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_every_login_has_a_name_of_its_own() {
    let place = Place::new().await;
    let mut names = HashSet::new();
    for _ in 0..3 {
        let mut browser = place.logged_in().await;
        let told = browser.get(&format!("{WEB}/headers")).await.text();
        let jwt = told.lines().find_map(|line| line.strip_prefix("x-adit-jwt: ")).unwrap().to_owned();
        names.insert(crate::idp::claims_of(&json!(jwt)).1["sid"].as_str().unwrap().to_owned());
    }
    assert_eq!(names.len(), 3);
}
