//! A person at Debian's headless Chromium, before a gate.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::gate_logins::{allowing, gated, node, publish};
use crate::harness::*;
use crate::idp::*;

const WEB: &str = "https://web.edge.localhost:8443";
const OPS: &str = "https://ops.edge.localhost:8443";
const CALLBACK: &str = "https://auth.edge.localhost:8443/.adit/cb/corp";

/// Where pictures of the pages go: `ADIT_SCREENSHOTS`, or the build's own folder.
fn pictures() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = std::env::var("ADIT_SCREENSHOTS").map_or(root.join("target/screenshots"), |at| root.join(at));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn gate_a_person_logs_in_opens_a_websocket_is_refused_elsewhere_and_logs_out() {
    if !node_is_new_enough() {
        return;
    }
    let back = "https://auth.edge.localhost:8443/.adit/out".to_owned();
    let opts = OidcOpts { post_logout_redirect_uris: vec![back], ..OidcOpts::default() };
    let (node, op) = tokio::join!(node(), OidcProvider::start(&[CALLBACK], opts));
    let record = json!({"kind": "oidc", "title": "Example Corp", "issuer": op.issuer, "client_id": op.client_id,
        "client_secret": op.client_secret});
    node.put("providers/corp", record).await;
    node.put("providers/here", json!({"kind": "local", "title": "An account of this edge"})).await;
    let origin = Origin::http().await;
    let gate = json!({"oidc": {"providers": ["corp", "here"], "allow_emails": ["alice@example.com"]}});
    let _web = publish(&node, "web", &origin, gate).await;
    let _ops = publish(&node, "ops", &origin, allowing(&["bob@example.com"])).await;
    let folder = pictures();
    let picture = |name: &str| folder.join(format!("gate-{name}.png")).to_str().unwrap().to_owned();
    let steps = json!([
        {"goto": format!("{WEB}/headers?from=chromium")},
        {"screenshot": picture("choose")},
        {"click": "a[href*='p=here']"},
        {"waitFor": "input[name=password]"},
        {"fill": ["input[name=email]", "alice@example.com"]},
        {"fill": ["input[name=password]", "wrong"]},
        {"click": "button"},
        {"waitFor": ".wrong"},
        {"screenshot": picture("password")},
        {"goto": format!("{WEB}/headers?from=chromium")},
        {"click": "a[href*='p=corp']"},
        {"waitFor": "input[name=login]"},
        {"fill": ["input[name=login]", "alice@example.com"]},
        {"fill": ["input[name=password]", "any"]},
        {"click": "button"},
        {"waitFor": "form[action*='confirm'], button"},
        {"click": "button"},
        {"waitForURL": "auth\\.edge\\.localhost"},
        {"screenshot": picture("continue")},
        {"click": "button"},
        {"waitForURL": "/headers\\?from=chromium$"},
        {"text": "body"},
        {"evaluate": "fetch('/.adit/identity').then(answer => answer.json())"},
        {"websocket": {"url": "wss://web.edge.localhost:8443/ws", "send": ["hello"]}},
        {"goto": format!("{OPS}/")},
        {"screenshot": picture("denied")},
        {"text": "h1"},
        {"websocket": {"url": "wss://ops.edge.localhost:8443/ws", "send": ["hello"], "ms": 3000}},
        {"goto": format!("{WEB}/.adit/logout")},
        {"screenshot": picture("logout")},
        {"click": "button[value=here]"},
        {"waitForURL": "/.adit/out$"},
        {"screenshot": picture("out")},
        {"goto": format!("{WEB}/")},
        {"text": "h1"},
    ]);
    let results = Chromium::at(&node).run(&steps).await;
    let of = |name: &str, nth: usize| {
        let at = |(at, step): (usize, &serde_json::Value)| step.get(name).map(|_| at);
        let at = steps.as_array().unwrap().iter().enumerate().filter_map(at).nth(nth).unwrap();
        results[at].clone()
    };
    assert!(of("text", 0).as_str().unwrap().contains("x-adit-user-email: alice@example.com"), "{results:?}");
    assert_eq!(of("evaluate", 0)["email"], "alice@example.com");
    assert_eq!(of("websocket", 0)["messages"], json!(["hello"]));
    assert_eq!(of("goto", 2)["status"], 403);
    assert_eq!(of("text", 1), "You may not visit ops.edge.localhost");
    assert_eq!(of("websocket", 1)["opened"], false);
    assert_eq!(of("text", 2), "Log in to web.edge.localhost");
    // Cookies that do not come back, a provider that is down, a step that is none.
    node.put(
        "providers/gone",
        json!({"kind": "oidc", "title": "Gone Inc.", "issuer": "http://127.0.0.1:1", "client_id": "adit"}),
    )
    .await;
    let gate = json!({"oidc": {"providers": ["gone", "here"], "allow_emails": ["alice@example.com"]}});
    gated(&node, "web", gate).await;
    let steps = json!([
        {"goto": format!("{WEB}/")},
        {"click": "a[href*='p=here']"},
        {"waitFor": "input[name=password]"},
        {"clearCookies": 0},
        {"fill": ["input[name=email]", "alice@example.com"]},
        {"fill": ["input[name=password]", "any"]},
        {"click": "button"},
        {"waitForURL": "/.adit/local$"},
        {"screenshot": picture("cookies")},
        {"text": "h1"},
        {"goto": format!("{WEB}/")},
        {"click": "a[href*='p=gone']"},
        {"waitForURL": "p=gone$"},
        {"screenshot": picture("down")},
        {"text": "h1"},
        {"goto": format!("{WEB}/.adit/finish?h=none")},
        {"screenshot": picture("again")},
    ]);
    let results = Chromium::at(&node).run(&steps).await;
    assert_eq!((&results[9], &results[14]), (&json!("Cookies are blocked"), &json!("Gone Inc. does not answer")));
}
