//! Gates without logins: passwords, tokens of programs, addresses and paths, and
//! what an origin is told. Each test says what a visitor notices.

use std::time::{Duration, Instant};

use data_encoding::{BASE64, HEXLOWER};
use serde_json::{Value, json};

use crate::gate_logins::{allowing, gated, node, publish};
use crate::harness::*;

const WEB: &str = "https://web.edge.localhost:8443";

fn basic(name: &str, password: &str) -> String {
    format!("Basic {}", BASE64.encode(format!("{name}:{password}").as_bytes()))
}

fn users(all: &[(&str, &str)]) -> Value {
    let all = all.iter().map(|(name, password)| json!({"name": name, "password": password}));
    json!({"realm": "Web", "users": all.collect::<Vec<_>>()})
}

/// A program: it says nothing of itself, and gets JSON.
fn program(node: &Node) -> Browser {
    let mut program = Browser::at(node);
    program.manner = Manner::Bare;
    program
}

async fn asks(browser: &mut Browser, path: &str, headers: &[(&str, &str)]) -> Answer {
    browser.request("GET", &format!("{WEB}{path}"), headers, b"").await
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_basic_lets_in_who_knows_the_password() {
    let (node, origin) = (node().await, Origin::http().await);
    let _ssh = publish(&node, "web", &origin, json!({"basic": users(&[("ann", "right: p\u{e4}ss")])})).await;
    let mut visitor = program(&node);
    let asked = asks(&mut visitor, "/headers", &[]).await;
    assert_eq!((asked.status, asked.header("www-authenticate")), (401, "Basic realm=\"Web\", charset=\"UTF-8\""));
    assert_eq!(asked.json()["error"], "unauthorized");
    let right = basic("ann", "right: p\u{e4}ss");
    let answer = asks(&mut visitor, "/headers", &[("authorization", &right)]).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let told = answer.text();
    assert!(told.contains("x-adit-user: ann") && told.contains("x-adit-user-kind: basic"), "{told}");
    assert!(!told.to_lowercase().contains("\nauthorization:"), "the password is not the origin's: {told}");
    for (what, line) in [
        ("a wrong password", basic("ann", "wrong")),
        ("a wrong name", basic("bob", "right: p\u{e4}ss")),
        ("no name", basic("", "")),
        ("the name in another case", basic("Ann", "right: p\u{e4}ss")),
        ("no base64", "Basic !!!".to_owned()),
        ("no colon", format!("Basic {}", BASE64.encode(b"ann"))),
        ("another scheme", right.replace("Basic", "Bearer")),
        ("no text", format!("Basic {}", BASE64.encode(b"ann:\xff\xfe"))),
        ("too long", basic("ann", &"x".repeat(5000))),
    ] {
        let answer = asks(&mut visitor, "/", &[("authorization", &line)]).await;
        assert_eq!(answer.status, 401, "{what}: {}", answer.text());
    }
    // curl, as somebody would type it.
    let (status, _) = curl(&node, &["-u", "ann:right: p\u{e4}ss", &format!("{WEB}/")]).await;
    assert_eq!(status, 200);
    // Neither the API nor the log has it.
    let (_, record) = node.api("GET", "/v1/sockets/web", None).await;
    assert!(!record.to_string().contains("right: p"), "{record}");
    assert!(!node.log().contains("right: p") && !node.log().contains(&right));
    // Somebody taken out is out with the next request.
    gated(&node, "web", json!({"basic": users(&[("bob", "other")])})).await;
    assert_eq!(asks(&mut visitor, "/", &[("authorization", &right)]).await.status, 401);
    assert_eq!(asks(&mut visitor, "/", &[("authorization", &basic("bob", "other"))]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_basic_is_not_asked_for_in_the_clear() {
    let (node, origin) = (node().await, Origin::http().await);
    let _ssh = publish(&node, "web", &origin, json!({"basic": users(&[("ann", "right")])})).await;
    let mut visitor = program(&node);
    let line = basic("ann", "right");
    let url = "http://web.edge.localhost:8080/a?b=c";
    let answer = visitor.request("GET", url, &[("authorization", &line)], b"").await;
    assert_eq!((answer.status, answer.location().unwrap().to_string()), (308, format!("{WEB}/a?b=c")));
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_flood_of_wrong_passwords_costs_little_and_locks_nobody_out_who_is_in() {
    let opts = NodeOpts::default().set("gate", "passwords_per_second = 4").set("gate", "passwords_per_socket = 2");
    let (node, origin) = (Node::with(opts).await, Origin::http().await);
    let _ssh = publish(&node, "web", &origin, json!({"basic": users(&[("ann", "right")])})).await;
    let right = basic("ann", "right");
    let mut visitor = program(&node);
    assert_eq!(asks(&mut visitor, "/", &[("authorization", &right)]).await.status, 200);
    let (before, began) = (node.usage().cpu, Instant::now());
    let (mut wrong, mut busy) = (0u32, 0u32);
    for i in 0..600 {
        let answer = asks(&mut visitor, "/", &[("authorization", &basic("ann", &i.to_string()))]).await;
        match answer.status {
            401 => wrong += 1,
            429 => {
                assert!(!answer.header("retry-after").is_empty());
                busy += 1;
            }
            other => panic!("{other}: {}", answer.text()),
        }
    }
    // The budget of the socket, 20 at once and 2 per second, and no more.
    let allowed = 21 + 2 * u32::try_from(began.elapsed().as_secs()).unwrap() + 2;
    assert!(wrong <= allowed && busy + wrong == 600, "{wrong} were looked at, {allowed} may be");
    let spent = node.usage().cpu - before;
    println!("600 wrong passwords: {wrong} looked at, {spent:?} of CPU in {:?}", began.elapsed());
    assert_eq!(asks(&mut visitor, "/", &[("authorization", &right)]).await.status, 200, "who was in stays in");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_tokens_let_programs_in_until_they_expire() {
    let (node, origin) = (node().await, Origin::http().await);
    let hash =
        |token: &str| HEXLOWER.encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, token.as_bytes()).as_ref());
    let gate = json!({"service_tokens": [
        {"name": "ci", "token": "a-long-and-random-token-of-one-program"},
        {"name": "hashed", "token_hash": format!("sha256:{}", hash("another token, which the record has as a hash"))},
        {"name": "old", "token": "a-token-that-is-over-since-long-ago", "expires": "2020-01-01T00:00:00Z"},
    ]});
    let _ssh = publish(&node, "web", &origin, gate).await;
    let mut visitor = program(&node);
    let token = |text: &'static str| [("adit-service-token", text)];
    let answer = asks(&mut visitor, "/headers", &token("a-long-and-random-token-of-one-program")).await;
    assert_eq!(answer.status, 200, "{}", answer.text());
    let hashed = asks(&mut visitor, "/headers", &token("another token, which the record has as a hash")).await;
    assert!(hashed.text().contains("x-adit-user: hashed"), "{}", hashed.text());
    let told = answer.text();
    assert!(told.contains("x-adit-user: ci") && !told.contains("random-token"), "{told}");
    for bad in ["a-token-that-is-over-since-long-ago", "x", ""] {
        assert_eq!(asks(&mut visitor, "/", &token(bad)).await.status, 401, "{bad}");
    }
    let (_, record) = node.api("GET", "/v1/sockets/web", None).await;
    assert!(!record.to_string().contains("random-token"), "{record}");
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_addresses_are_let_in_or_kept_out() {
    let (node, origin) = (node().await, Origin::http().await);
    let _ssh = publish(&node, "web", &origin, json!({"ip": {"deny": ["127.0.0.0/8"]}})).await;
    let mut visitor = program(&node);
    let kept_out = asks(&mut visitor, "/", &[("x-forwarded-for", "192.0.2.1")]).await;
    assert_eq!((kept_out.status, &kept_out.json()["error"]), (403, &json!("forbidden")));
    for (rules, status) in [
        (json!({"allow": ["127.0.0.0/8"]}), 200),
        (json!({"allow": ["192.0.2.0/24"]}), 403),
        (json!({"allow": ["127.0.0.0/8"], "deny": ["127.0.0.0/8"]}), 403),
        (json!({}), 200),
    ] {
        gated(&node, "web", json!({"ip": rules})).await;
        assert_eq!(asks(&mut visitor, "/", &[]).await.status, status, "{rules}");
    }
    // Of a gate with logins too, and at its own pages.
    let mut gate = allowing(&["alice@example.com"]);
    gate["ip"] = json!({"deny": ["127.0.0.0/8"]});
    gated(&node, "web", gate).await;
    for path in ["/", "/.adit/login", "/.adit/logout", "/.adit/finish"] {
        assert_eq!(asks(&mut visitor, path, &[("accept", "text/html")]).await.status, 403, "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_paths_are_public_or_stricter_however_they_are_spelled() {
    let (node, origin) = (node().await, Origin::http().await);
    let gate = json!({"basic": users(&[("ann", "a"), ("bob", "b")]), "rules": [
        {"path": "/headers", "public": true},
        {"path": "/bytes", "users": ["ann"]},
    ]});
    let _ssh = publish(&node, "web", &origin, gate).await;
    let mut visitor = program(&node);
    let open = asks(&mut visitor, "/headers", &[("x-adit-user", "eve"), ("remote-user", "eve")]).await;
    assert_eq!(open.status, 200);
    assert!(!open.text().contains("eve"), "{}", open.text());
    for path in [
        "/",
        "/headersx",
        "/headers/../sink",
        "/headers/%2e%2e/sink",
        "/headers/..%2fsink",
        "/HEADERS",
        "/headers//x",
        "/headers/%5c..%5csink",
        "/headers;x",
        "/%68eaders",
        "/headers/./x",
        "/headers/%00",
        "/bytes/1",
    ] {
        let answer = asks(&mut visitor, path, &[]).await;
        assert!(matches!(answer.status, 400 | 401), "{path}: {}", answer.status);
    }
    let (ann, bob) = (basic("ann", "a"), basic("bob", "b"));
    assert_eq!(asks(&mut visitor, "/bytes/1", &[("authorization", &ann)]).await.status, 200);
    for path in ["/bytes/1", "/BYTES/1", "/%62ytes/1", "//bytes/1", "/x/../bytes/1"] {
        let answer = asks(&mut visitor, path, &[("authorization", &bob)]).await;
        assert!(matches!(answer.status, 400 | 403), "{path}: {}", answer.status);
    }
    assert_eq!(asks(&mut visitor, "/", &[("authorization", &bob)]).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_what_a_visitor_says_of_itself_does_not_reach_the_origin() {
    let (node, origin) = (node().await, Origin::http().await);
    let _ssh = publish(&node, "web", &origin, json!({"basic": users(&[("ann", "a")])})).await;
    let mut visitor = program(&node);
    let line = basic("ann", "a");
    for name in [
        "x-adit-user-email",
        "X-ADIT-USER",
        "x_adit_user",
        "x-adit-jwt",
        "x_adit_jwt",
        "remote-user",
        "Remote_User",
        "x-forwarded-user",
        "x-forwarded-email",
        "x_forwarded_groups",
        "x-auth-request-email",
        "x-webauth-user",
        "adit-service-token-x",
        "x-authenticated-user",
    ] {
        let answer = asks(&mut visitor, "/headers", &[("authorization", &line), (name, "eve")]).await;
        assert_eq!(answer.status, 200, "{name}");
        assert!(!answer.text().contains("eve"), "{name}: {}", answer.text());
        // Nor takes ours away.
        let connection = [("authorization", line.as_str()), ("connection", name)];
        let answer = asks(&mut visitor, "/headers", &connection).await;
        assert!(answer.text().contains("x-adit-user: ann"), "{name}: {}", answer.text());
        assert!(answer.text().contains("x-adit-jwt: "), "{name}: {}", answer.text());
    }
    let cookies = "a=1; __Host-adit_s=v1.x.y; b=\"2\"; __Host-adit_f_0=z";
    let answer = asks(&mut visitor, "/headers", &[("authorization", &line), ("cookie", cookies)]).await;
    assert!(answer.text().contains("cookie: a=1; b=\"2\"\n"), "{}", answer.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_sends_people_to_a_login_and_tells_programs() {
    let (node, origin) = (node().await, Origin::http().await);
    node.put("providers/corp", json!({"kind": "local"})).await;
    let _ssh = publish(&node, "web", &origin, allowing(&["alice@example.com"])).await;
    let navigate = [("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document"), ("accept", "text/html")];
    let ask = async |method: &str, headers: &[(&str, &str)]| {
        let mut visitor = program(&node);
        visitor.request(method, &format!("{WEB}/"), headers, b"").await
    };
    assert_eq!(ask("GET", &navigate).await.status, 302);
    assert_eq!(ask("HEAD", &navigate).await.status, 302);
    assert_eq!(ask("GET", &[("accept", "text/html,*/*")]).await.status, 302);
    for (what, method, more) in [
        ("curl", "GET", vec![("accept", "*/*")]),
        ("no Accept", "GET", vec![]),
        ("fetch", "GET", vec![("sec-fetch-mode", "cors"), ("accept", "text/html")]),
        ("an image", "GET", vec![("sec-fetch-mode", "no-cors"), ("sec-fetch-dest", "image")]),
        ("a form", "POST", navigate.to_vec()),
        ("a prefetch", "GET", [&navigate[..], &[("sec-purpose", "prefetch")]].concat()),
        ("an old prefetch", "GET", [&navigate[..], &[("purpose", "prefetch")]].concat()),
        ("jQuery", "GET", vec![("accept", "text/html"), ("x-requested-with", "XMLHttpRequest")]),
        ("a preflight", "OPTIONS", vec![("origin", "https://x.test"), ("access-control-request-method", "GET")]),
    ] {
        let answer = ask(method, &more).await;
        assert_eq!(answer.status, 401, "{what}");
        assert!(answer.header("www-authenticate").contains("/.adit/login"), "{what}");
        if !more.iter().any(|(_, value)| value.contains("text/html")) {
            assert_eq!(answer.json()["error"], "unauthorized", "{what}");
        }
    }
    let framed = [("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe"), ("accept", "text/html")];
    let answer = ask("GET", &framed).await;
    assert_eq!(answer.status, 401);
    assert!(answer.text().contains("_blank"), "{}", answer.text());
    let mut gate = allowing(&["alice@example.com"]);
    gate["oidc"]["allow_cors_preflight"] = json!(true);
    gated(&node, "web", gate).await;
    let preflight = [("origin", "https://x.test"), ("access-control-request-method", "GET")];
    assert_ne!(ask("OPTIONS", &preflight).await.status, 401);
    assert_eq!(ask("OPTIONS", &[]).await.status, 401, "without it, it is a request like others");
    // Neither a host that is not there nor one connection's other host is a way around.
    for host in ["web.edge.localhost.", "WEB.edge.localhost", "web.edge.localhost:1"] {
        assert_eq!(ask("GET", &[("host", host)]).await.status, 401, "{host}");
    }
    for host in ["x@web.edge.localhost", "none.edge.localhost", "web.edge.localhost, x"] {
        assert!(matches!(ask("GET", &[("host", host)]).await.status, 400 | 404), "{host}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_h2_is_asked_per_request_and_not_per_connection() {
    let (node, origin) = (node().await, Origin::http().await);
    let gate = json!({"basic": users(&[("ann", "a")])});
    let _web = publish(&node, "web", &origin, gate).await;
    let _open = publish(&node, "open", &origin, json!({})).await;
    let mut sender = h2(&node, "open.edge.localhost").await;
    for (url, status) in [
        ("https://open.edge.localhost:8443/", 200u16),
        ("https://web.edge.localhost:8443/", 401),
        ("https://open.edge.localhost:8443/", 200),
    ] {
        let request = hyper::Request::get(url).body(http_body_util::BodyExt::boxed(http_body_util::Empty::new()));
        let answer = tokio::time::timeout(Duration::from_secs(10), sender.send_request(request.unwrap())).await;
        assert_eq!(answer.unwrap().unwrap().status(), status, "{url}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_return_paths_lead_to_no_other_host() {
    let (node, origin) = (node().await, Origin::http().await);
    node.put("providers/corp", json!({"kind": "local"})).await;
    node.put("accounts/alice", json!({"email": "alice@example.com", "password": "right"})).await;
    let _ssh = publish(&node, "web", &origin, allowing(&["alice@example.com"])).await;
    for (path, back) in [
        ("/a?b=//evil.test", "/a?b=//evil.test"),
        ("//evil.test", "/"),
        ("/\\evil.test", "/"),
        ("/.adit/login", "/"),
        ("/%09/evil.test", "/%09/evil.test"),
        ("/?next=https://evil.test", "/?next=https://evil.test"),
    ] {
        let mut browser = Browser::at(&node);
        let page = browser.follow(&format!("{WEB}{path}"), 4).await.pop().unwrap();
        let form = page.form().with("email", "alice@example.com").with("password", "right");
        let done = browser.submit(&page, &form).await;
        assert_eq!(done.status, 303, "{path}: {}", done.text());
        let finished = browser.follow_on(done, 1).await.pop().unwrap();
        assert_eq!(finished.location().unwrap().to_string(), format!("{WEB}{back}"), "{path}");
    }
}
