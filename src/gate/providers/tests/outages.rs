//! Providers that are down, slow, changing or lying about themselves: what is kept,
//! how long, and how often they are asked.

use futures_util::future::join_all;

use super::fake::Answer;
use super::*;

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// Needs metadata, and nothing else.
async fn begin(stage: &Stage) -> Result<String, Failed> {
    stage.providers.authorize(&stage.provider, ask()).await
}

fn gone() -> Answer {
    Answer::Raw(503, ("x", "y".into()), Vec::new())
}

#[tokio::test]
async fn metadata_that_does_not_hold_is_not_believed() {
    let stage = Stage::new().await;
    let but = |patch: Value| Answer::Json(with(stage.metadata(), &patch));
    let raw = |status, name, value: &str, body: &[u8]| Answer::Raw(status, (name, value.to_owned()), body.to_vec());
    let elsewhere = Fake::new().await;
    elsewhere.json("/there", stage.metadata());
    let there = format!("{}/there", elsewhere.url);
    let json = "application/json";
    for (name, answer, why) in [
        ("another issuer", but(json!({"issuer": "https://accounts.google.com"})), "another issuer"),
        ("issuer and a slash", but(json!({"issuer": format!("{}/", stage.fake.url)})), "another issuer"),
        ("a redirect", raw(302, "location", &there, b""), "redirects are not followed"),
        ("a lasting redirect", raw(301, "location", &there, b""), "redirects are not followed"),
        ("huge", raw(200, "content-type", json, &vec![b' '; 80 << 10]), "more than 65536 bytes"),
        ("a huge head", raw(200, "x", &"y".repeat(300 << 10), b""), "head that is too large"),
        ("HTML", raw(200, "content-type", "text/html", b"{}"), "not sent as JSON"),
        ("no JSON", raw(200, "content-type", json, SECRET.as_bytes()), "unreadable"),
        ("an error", raw(500, "x", "y", SECRET.as_bytes()), "answered 500"),
        ("nothing", Answer::Lost, "without an answer"),
        ("a token endpoint in plain text", but(json!({"token_endpoint": "http://id.test/token"})), "not https"),
        ("keys in plain text", but(json!({"jwks_uri": "http://id.test/keys"})), "not https"),
        ("script", but(json!({"authorization_endpoint": "javascript:alert(1)"})), "not https"),
        ("an end of no web", but(json!({"end_session_endpoint": "ftp://id.test/"})), "not https"),
    ] {
        stage.fake.answer(DISCOVERY, answer);
        let providers = Providers::default();
        let told = down(providers.authorize(&stage.provider, ask()).await);
        assert!(told.contains(why), "{name}: {told}");
    }
    assert_eq!(elsewhere.count("/there"), 0);
}

#[tokio::test]
async fn who_is_not_there_is_down() {
    let mut stage = Stage::new().await;
    // A port that nobody listens on.
    let port = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    stage.provider = record(json!({"kind": "oidc", "issuer": format!("http://127.0.0.1:{port}")}));
    assert!(down(begin(&stage).await).contains("cannot be connected to"));
    stage.provider = record(json!({"kind": "oidc", "issuer": "https://no-such-name.invalid"}));
    assert!(down(begin(&stage).await).contains("no-such-name.invalid"));
}

#[tokio::test]
async fn who_does_not_answer_is_down_at_the_deadline_and_left_alone_for_a_while() {
    let stage = Arc::new(Stage::new().await);
    for (path, asked) in [(DISCOVERY, 1), ("/keys", 1)] {
        stage.fake.answer(path, Answer::Silent);
        let before = stage.fake.count(path);
        let (asking, began) = (Arc::clone(&stage), tokio::time::Instant::now());
        let waits = tokio::spawn(async move { begin(&asking).await });
        stage.fake.asked(path, before + asked).await;
        tokio::time::pause();
        assert!(down(waits.await.unwrap()).contains("did not answer within 5s"), "{path}");
        assert!(began.elapsed() >= 5 * SECOND && began.elapsed() < 6 * SECOND, "{path}");
        // At once, and nobody is asked.
        let (at, count) = (tokio::time::Instant::now(), stage.fake.count(path));
        assert!(down(begin(&stage).await).contains("not asked again yet"));
        assert_eq!((at.elapsed(), stage.fake.count(path)), (Duration::ZERO, count));
        tokio::time::resume();
        stage.fake.json(DISCOVERY, stage.metadata());
        later(11 * SECOND).await;
    }
    stage.fake.json("/keys", json!({"keys": [stage.key.public("k1")]}));
    begin(&stage).await.unwrap();

    stage.fake.answer("/token", Answer::Silent);
    let asking = Arc::clone(&stage);
    let waits = tokio::spawn(async move { asking.login().await });
    stage.fake.asked("/token", 1).await;
    tokio::time::pause();
    assert!(down(waits.await.unwrap()).contains("token at 127.0.0.1: did not answer within 5s"));
    tokio::time::resume();
    // One login's bad luck is not the next one's.
    stage.give(&json!({}));
    stage.login().await.unwrap();
}

#[tokio::test]
async fn a_code_is_sent_once_even_if_the_answer_is_lost() {
    let stage = Stage::new().await;
    for answer in [Answer::Lost, gone(), Answer::Raw(200, ("content-length", "500".into()), b"{".to_vec())] {
        let before = stage.fake.count("/token");
        stage.fake.answer("/token", answer);
        down(stage.login().await);
        assert_eq!(stage.fake.count("/token"), before + 1);
    }
}

#[tokio::test]
async fn one_asks_for_all() {
    let stage = Stage::new().await;
    for done in join_all((0..10).map(|_| begin(&stage))).await {
        done.unwrap();
    }
    assert_eq!((stage.fake.count(DISCOVERY), stage.fake.count("/keys")), (1, 1));

    // Those who come while a stale one is renewed do not wait.
    later(2 * HOUR).await;
    let stage = Arc::new(stage);
    stage.fake.answer(DISCOVERY, Answer::Silent);
    let asking = Arc::clone(&stage);
    let waits = tokio::spawn(async move { begin(&asking).await });
    stage.fake.asked(DISCOVERY, 2).await;
    tokio::time::pause();
    let at = tokio::time::Instant::now();
    begin(&stage).await.unwrap();
    assert_eq!(at.elapsed(), Duration::ZERO);
    waits.await.unwrap().unwrap();
    assert_eq!(stage.fake.count(DISCOVERY), 2);
}

#[tokio::test]
async fn metadata_is_kept_as_long_as_it_allows_within_bounds() {
    for (says, kept) in [
        (None, HOUR),
        (Some("public, max-age=600"), 10 * MINUTE),
        (Some("Max-Age=\"600\""), 10 * MINUTE),
        (Some("max-age=10"), 5 * MINUTE),
        (Some("no-store"), 5 * MINUTE),
        (Some("max-age=600, no-cache"), 5 * MINUTE),
        (Some("max-age=99999999999999999999999"), 24 * HOUR),
        (Some("max-age=-1"), HOUR),
    ] {
        let stage = Stage::new().await;
        if let Some(says) = says {
            let body = stage.metadata().to_string().into_bytes();
            stage.fake.answer(DISCOVERY, Answer::Raw(200, ("cache-control", says.to_owned()), body));
        }
        begin(&stage).await.unwrap();
        later(kept - 20 * SECOND).await;
        begin(&stage).await.unwrap();
        assert_eq!(stage.fake.count(DISCOVERY), 1, "{says:?}");
        later(40 * SECOND).await;
        begin(&stage).await.unwrap();
        assert_eq!(stage.fake.count(DISCOVERY), 2, "{says:?}");
    }
}

#[tokio::test]
async fn old_metadata_serves_for_a_day_while_the_provider_is_down() {
    let stage = Stage::new().await;
    begin(&stage).await.unwrap();
    stage.fake.answer(DISCOVERY, gone());
    later(HOUR + MINUTE).await;
    for (wait, asked) in [(Duration::ZERO, 2), (5 * SECOND, 2), (6 * SECOND, 3), (22 * HOUR, 4)] {
        later(wait).await;
        begin(&stage).await.unwrap();
        assert_eq!(stage.fake.count(DISCOVERY), asked);
    }
    // A whole login needs nothing newer.
    stage.login().await.unwrap();
    later(3 * HOUR).await;
    assert!(down(begin(&stage).await).contains("answered 503"));
    assert!(down(begin(&stage).await).contains("not asked again yet"));
    assert!(down(stage.login().await).contains("not asked again yet"));
    assert_eq!(stage.fake.count(DISCOVERY), 5);
    assert_eq!(stage.providers.end_session(&stage.provider, "https://a.test/").await, None);

    stage.fake.json(DISCOVERY, stage.metadata());
    later(11 * SECOND).await;
    begin(&stage).await.unwrap();
    assert_eq!(stage.fake.count(DISCOVERY), 6);
}

#[tokio::test]
async fn a_new_key_is_found_and_an_unknown_one_does_not_have_us_ask_on_and_on() {
    let stage = Stage::new().await;
    stage.login().await.unwrap();
    let publish = |keys: &[(&Key, &str)]| {
        let keys: Vec<Value> = keys.iter().map(|(key, kid)| key.public(kid)).collect();
        stage.fake.json("/keys", json!({"keys": keys}));
    };
    let sign =
        |key: &Key, kid: &str| stage.give_token(key.token(&json!({"alg": "EdDSA", "kid": kid}), &stage.claims()));
    let [k2, k3, k4] = [(); 3].map(|()| Key::ed25519());

    publish(&[(&stage.key, "k1"), (&k2, "k2")]);
    sign(&k2, "k2");
    for done in join_all((0..5).map(|_| stage.login())).await {
        done.unwrap();
    }
    assert_eq!(stage.fake.count("/keys"), 2);

    publish(&[(&k2, "k2"), (&k3, "k3")]);
    sign(&k3, "k3");
    for _ in 0..3 {
        assert!(refused(stage.login().await).contains("does not publish"));
        later(9 * SECOND).await;
    }
    assert_eq!(stage.fake.count("/keys"), 2);
    later(4 * SECOND).await;
    stage.login().await.unwrap();
    assert_eq!(stage.fake.count("/keys"), 3);

    // Keys that cannot be had, and those who need no newer ones.
    later(31 * SECOND).await;
    stage.fake.answer("/keys", gone());
    sign(&k4, "k4");
    assert!(down(stage.login().await).contains("answered 503"));
    assert!(down(stage.login().await).contains("not asked again yet"));
    assert_eq!(stage.fake.count("/keys"), 4);
    sign(&k3, "k3");
    stage.login().await.unwrap();
    later(11 * SECOND).await;
    publish(&[(&k4, "k4")]);
    sign(&k4, "k4");
    stage.login().await.unwrap();
    assert_eq!((stage.fake.count("/keys"), stage.fake.count(DISCOVERY)), (5, 1));
}

#[tokio::test]
async fn a_replaced_key_is_found_where_tokens_name_none() {
    let stage = Stage::new().await;
    stage.login().await.unwrap();
    let new = Key::ed25519();
    stage.fake.json("/keys", json!({"keys": [new.public("")]}));
    stage.give_token(new.token(&json!({"alg": "EdDSA"}), &stage.claims()));
    stage.login().await.unwrap();
    stage.give_token(Key::ed25519().token(&json!({"alg": "EdDSA"}), &stage.claims()));
    assert!(refused(stage.login().await).contains("does not publish"));
    assert_eq!(stage.fake.count("/keys"), 2);
}

#[tokio::test]
async fn another_issuer_or_client_is_another_provider() {
    let mut stage = Stage::new().await;
    begin(&stage).await.unwrap();
    stage.provider = record(json!({"kind": "oidc", "issuer": stage.fake.url, "title": "New"}));
    begin(&stage).await.unwrap();
    assert_eq!(stage.fake.count(DISCOVERY), 1);
    stage.provider = record(json!({"kind": "oidc", "issuer": stage.fake.url, "client_id": "other"}));
    begin(&stage).await.unwrap();
    assert_eq!(stage.fake.count(DISCOVERY), 2);

    let other = Stage::new().await;
    stage.provider = Arc::clone(&other.provider);
    assert!(begin(&stage).await.unwrap().starts_with(&other.fake.url));
}

#[tokio::test]
async fn who_asks_and_leaves_does_not_use_up_the_try_of_the_others() {
    let stage = Arc::new(Stage::new().await);
    stage.login().await.unwrap();
    let new = Key::ed25519();
    stage.fake.json("/keys", json!({"keys": [new.public("k2")]}));
    stage.give_token(new.token(&json!({"alg": "EdDSA", "kid": "k2"}), &stage.claims()));
    let asking = Arc::clone(&stage);
    let leaves = tokio::spawn(async move { asking.login().await });
    stage.fake.asked("/keys", 2).await;
    leaves.abort();
    assert!(leaves.await.is_err());
    stage.login().await.unwrap();
    assert_eq!(stage.fake.count("/keys"), 2);
}
