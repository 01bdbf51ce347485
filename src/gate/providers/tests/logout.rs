//! Logout tokens: the one that counts, and what anybody might send instead.

use super::fake::{hs256, unsigned};
use super::*;

const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";

fn head() -> Value {
    json!({"alg": "EdDSA", "kid": "k1", "typ": "logout+jwt"})
}

fn claims(stage: &Stage) -> Value {
    let now = unix();
    json!({
        "iss": stage.fake.url, "aud": [CLIENT, "other"], "iat": now, "exp": now + 120, "jti": "j-1",
        "events": {EVENT: {}}, "sub": SUBJECT, "sid": "sess-1",
    })
}

async fn read(stage: &Stage, token: &str) -> Result<LoggedOut, Failed> {
    stage.providers.logout_token(&stage.provider, token).await
}

#[tokio::test]
async fn a_good_logout_token_says_whose_logins_end() {
    let stage = Stage::new().await;
    let token = |head: &Value, patch: Value| stage.key.token(head, &with(claims(&stage), &patch));
    let whole = LoggedOut {
        issuer: stage.fake.url.clone(),
        subject: Some(SUBJECT.into()),
        provider_session: Some("sess-1".into()),
        jti: "j-1".into(),
    };
    assert_eq!(read(&stage, &token(&head(), json!({}))).await, Ok(whole.clone()));
    for typ in [Value::Null, json!("JWT"), json!("application/logout+jwt"), json!("LOGOUT+JWT")] {
        let head = with(head(), &json!({"typ": typ}));
        assert_eq!(read(&stage, &token(&head, json!({"exp": null, "aud": CLIENT}))).await, Ok(whole.clone()));
    }
    let no_kid = with(head(), &json!({"kid": null}));
    assert_eq!(read(&stage, &token(&no_kid, json!({}))).await, Ok(whole.clone()));
    let of_all = read(&stage, &token(&head(), json!({"sid": null}))).await.unwrap();
    assert_eq!((of_all.subject.as_deref(), of_all.provider_session), (Some(SUBJECT), None));
    let of_one = read(&stage, &token(&head(), json!({"sub": null}))).await.unwrap();
    assert_eq!((of_one.subject, of_one.provider_session.as_deref()), (None, Some("sess-1")));
}

#[tokio::test]
async fn logout_tokens_that_do_not_hold_are_refused_by_name() {
    let stage = Stage::new().await;
    let now = unix();
    for (name, patch, why) in [
        ("wrong iss", json!({"iss": "https://evil.test"}), "another issuer"),
        ("no iss", json!({"iss": null}), "another issuer"),
        ("wrong aud", json!({"aud": "other"}), "(aud)"),
        ("no aud", json!({"aud": null}), "(aud)"),
        ("iat ahead", json!({"iat": now + 70}), "in the future"),
        ("iat old", json!({"iat": now - 610}), " s ago"),
        ("no iat", json!({"iat": null}), "when it was issued"),
        ("iat no time", json!({"iat": "now"}), "when it was issued"),
        ("expired", json!({"exp": now - 70}), "expired"),
        ("exp no time", json!({"exp": "never"}), "expired"),
        ("nbf ahead", json!({"nbf": now + 70}), "(nbf)"),
        ("no events", json!({"events": null}), "(events)"),
        ("another event", json!({"events": {"x": {}}}), "(events)"),
        ("events no object", json!({"events": EVENT}), "(events)"),
        ("event no object", json!({"events": {EVENT: true}}), "(events)"),
        ("a nonce", json!({"nonce": NONCE}), "nonce"),
        ("neither sub nor sid", json!({"sub": null, "sid": null}), "neither whose"),
        ("sub long", json!({"sub": "x".repeat(256)}), "usable sub"),
        ("sid no text", json!({"sid": 5}), "usable sid"),
        ("no jti", json!({"jti": null}), "no jti"),
        ("jti long", json!({"jti": "x".repeat(256)}), "usable jti"),
        ("jti empty", json!({"jti": ""}), "usable jti"),
    ] {
        let told = refused(read(&stage, &stage.key.token(&head(), &with(claims(&stage), &patch))).await);
        assert!(told.contains(why), "{name}: {told}");
    }
    // A nonce of nothing is one.
    let mut nothing = claims(&stage);
    nothing["nonce"] = Value::Null;
    assert!(refused(read(&stage, &stage.key.token(&head(), &nothing)).await).contains("nonce"));

    let good = claims(&stage);
    for (name, head, why) in [
        ("typ at+jwt", json!({"typ": "at+jwt"}), "by its head"),
        ("typ secevent", json!({"typ": "secevent+jwt"}), "by its head"),
        ("crit", json!({"crit": ["x"]}), "must be understood"),
        ("alg RS512", json!({"alg": "RS512"}), "algorithm that is not allowed"),
        ("another alg than the key's", json!({"alg": "RS256"}), "does not publish"),
    ] {
        let told = refused(read(&stage, &stage.key.token(&with(super::logout::head(), &head), &good)).await);
        assert!(told.contains(why), "{name}: {told}");
    }
    let hs = hs256(SECRET, &json!({"alg": "HS256"}), &good);
    assert!(refused(read(&stage, &hs).await).contains("algorithm that is not allowed"));
    assert!(refused(read(&stage, &unsigned(&good)).await).contains("algorithm that is not allowed"));
    assert!(refused(read(&stage, &Key::ed25519().token(&head(), &good)).await).contains("bad signature"));
    // The ID token itself.
    assert!(refused(read(&stage, &stage.key.token(&stage.head(), &stage.claims())).await).contains("(events)"));
    for garbage in ["", "a", "a.b", "a.b.c", "....", "eyJ.eyJ.eyJ", &"x".repeat(20_000)] {
        refused(read(&stage, garbage).await);
    }
}

#[tokio::test]
async fn only_what_looks_like_one_of_ours_has_keys_fetched() {
    let stage = Stage::new().await;
    let (new, other) = (Key::ed25519(), with(head(), &json!({"kid": "k2"})));
    read(&stage, &stage.key.token(&head(), &claims(&stage))).await.unwrap();
    // Not for us: no reason to ask.
    refused(read(&stage, &new.token(&other, &with(claims(&stage), &json!({"aud": "x"})))).await);
    assert_eq!(stage.fake.count("/keys"), 1);
    for _ in 0..3 {
        assert!(refused(read(&stage, &new.token(&other, &claims(&stage))).await).contains("does not publish"));
    }
    assert_eq!(stage.fake.count("/keys"), 2);
    stage.fake.json("/keys", json!({"keys": [new.public("k2")]}));
    later(Duration::from_secs(31)).await;
    read(&stage, &new.token(&other, &claims(&stage))).await.unwrap();
    assert_eq!(stage.fake.count("/keys"), 3);
}
