//! Logins by OpenID Connect: what is sent, who comes, and all that is refused.

use std::collections::HashMap;

use data_encoding::BASE64;
use openidconnect::url::{Url, form_urlencoded};

use super::fake::{Answer, hs256, unsigned};
use super::*;

fn query(of: &str) -> HashMap<String, String> {
    form_urlencoded::parse(of.as_bytes()).into_owned().collect()
}

#[tokio::test]
async fn a_login_goes_the_whole_way() {
    let stage = Stage::new().await;
    let url = stage.providers.authorize(&stage.provider, ask()).await.unwrap();
    let url = Url::parse(&url).unwrap();
    assert_eq!(url.path(), "/auth");
    let sent = query(url.query().unwrap());
    let wanted = [
        ("policy", "1"),
        ("response_type", "code"),
        ("client_id", CLIENT),
        ("redirect_uri", REDIRECT),
        ("scope", "openid email"),
        ("state", STATE),
        ("nonce", NONCE),
        // RFC 7636 appendix B.
        ("code_challenge", "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"),
        ("code_challenge_method", "S256"),
    ];
    let wanted: HashMap<String, String> = wanted.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    assert_eq!(sent, wanted);
    let again = stage.providers.authorize(&stage.provider, Ask { choose_account: true, ..ask() }).await.unwrap();
    assert!(again.ends_with("&prompt=select_account"), "{again}");

    let who = stage.came(json!({"sid": "sess-1", "auth_time": unix() - 30, "azp": CLIENT, "nbf": unix()})).await;
    assert_eq!(who.provider, stage.provider.id);
    assert_eq!(who.issuer, stage.fake.url);
    assert_eq!(who.subject, SUBJECT);
    assert_eq!(who.email.as_ref().unwrap().as_str(), "ann@example.com");
    assert!(who.domain_vouched);
    assert_eq!(who.provider_session.as_deref(), Some("sess-1"));
    assert!(who.auth_time.is_some_and(|at| at.abs_diff(u64::try_from(unix()).unwrap() - 30) < 5));

    let asked = stage.fake.seen("/token");
    assert_eq!((asked.len(), asked[0].method.as_str()), (1, "POST"));
    assert_eq!(asked[0].headers["content-type"], "application/x-www-form-urlencoded");
    assert_eq!(asked[0].headers["accept"], "application/json");
    assert_eq!(asked[0].headers["host"], stage.fake.address.to_string());
    // RFC 6749 §2.3.1: encoded as in a form before Basic.
    let basic = format!("Basic {}", BASE64.encode(b"cl%3Aient%2B1:s3cr3t%3A%25%2BZz"));
    assert_eq!(asked[0].headers["authorization"], basic);
    let form = query(&asked[0].body);
    let wanted =
        [("grant_type", "authorization_code"), ("code", CODE), ("redirect_uri", REDIRECT), ("code_verifier", VERIFIER)];
    let wanted: HashMap<String, String> = wanted.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect();
    assert_eq!(form, wanted);
    // The address was in the ID token, and metadata and keys are kept.
    assert_eq!(stage.fake.count("/me"), 0);
    assert_eq!((stage.fake.count(DISCOVERY), stage.fake.count("/keys")), (1, 1));
}

#[tokio::test]
async fn the_secret_goes_where_the_record_says() {
    let stage = Stage::with(Key::ed25519(), json!({"client_auth": "post"})).await;
    stage.login().await.unwrap();
    let asked = stage.fake.seen("/token");
    let form = query(&asked[0].body);
    assert_eq!((form["client_id"].as_str(), form["client_secret"].as_str()), (CLIENT, SECRET));
    assert!(!asked[0].headers.contains_key("authorization"));

    let public = Stage::with(Key::ed25519(), json!({"client_secret": null})).await;
    public.login().await.unwrap();
    let asked = public.fake.seen("/token");
    assert_eq!(query(&asked[0].body)["client_id"], CLIENT);
    assert!(!asked[0].body.contains("client_secret") && !asked[0].headers.contains_key("authorization"));
}

#[tokio::test]
async fn the_secret_may_be_in_a_file_of_the_folder_and_in_no_other() {
    let (outside, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("idp", &format!("{SECRET}\n"));
    write("empty", " \n");
    write("large", &"x".repeat(5000));
    std::fs::create_dir(folder.path().join("dir")).unwrap();
    std::fs::write(outside.path().join("other"), SECRET).unwrap();
    std::os::unix::fs::symlink(outside.path().join("other"), folder.path().join("out")).unwrap();
    std::os::unix::fs::symlink("idp", folder.path().join("within")).unwrap();

    let settings = ProviderSettings { secrets: Some(folder.path().to_owned()), ..ProviderSettings::default() };
    let fields = |file: &str| json!({"client_secret": null, "client_secret_file": file});
    for file in ["idp", "within"] {
        let mut stage = Stage::with(Key::ed25519(), fields(file)).await;
        stage.providers = Providers::new(settings.clone()).unwrap();
        stage.login().await.unwrap();
        let basic = stage.fake.seen("/token")[0].headers["authorization"].to_str().unwrap().to_owned();
        let sent = BASE64.decode(basic.strip_prefix("Basic ").unwrap().as_bytes()).unwrap();
        assert_eq!(sent, b"cl%3Aient%2B1:s3cr3t%3A%25%2BZz", "{file}");
    }
    for file in ["missing", "empty", "large", "dir", "out"] {
        let mut stage = Stage::with(Key::ed25519(), fields(file)).await;
        stage.providers = Providers::new(settings.clone()).unwrap();
        assert!(down(stage.login().await).contains(file));
        assert_eq!(stage.fake.count("/token"), 0, "{file}");
    }
    let stage = Stage::with(Key::ed25519(), fields("idp")).await;
    assert!(down(stage.login().await).contains("names no folder"));
}

#[tokio::test]
async fn signatures_by_published_keys_count_and_no_others() {
    for (key, algorithm) in [
        (Key::rsa(), "RS256"),
        (Key::rsa(), "PS256"),
        (Key::p256(), "ES256"),
        (Key::p384(), "ES384"),
        (Key::ed25519(), "EdDSA"),
    ] {
        let stage = Stage::with(key, json!({})).await;
        let head = json!({"alg": algorithm, "kid": "k1"});
        stage.give_token(stage.key.token(&head, &stage.claims()));
        stage.login().await.unwrap_or_else(|failed| panic!("{algorithm}: {failed:?}"));
    }

    let stage = Stage::with(Key::rsa(), json!({})).await;
    stage.give_token(stage.key.token(&json!({"alg": "RS512", "kid": "k1"}), &stage.claims()));
    assert!(refused(stage.login().await).contains("algorithm that is not allowed"));
    stage.give_token(hs256(SECRET, &json!({"alg": "HS256"}), &stage.claims()));
    assert!(refused(stage.login().await).contains("algorithm that is not allowed"));
    stage.give_token(unsigned(&stage.claims()));
    assert!(refused(stage.login().await).contains("not signed"));
    // Another's key under the published name.
    stage.give_token(Key::rsa().token(&stage.head(), &stage.claims()));
    assert!(refused(stage.login().await).contains("bad signature"));
    // The claims of another token under a good signature.
    let (good, other) = (stage.key.token(&stage.head(), &stage.claims()), with(stage.claims(), &json!({"sub": "eve"})));
    let other = stage.key.token(&stage.head(), &other);
    let (good, other): (Vec<_>, Vec<_>) = (good.split('.').collect(), other.split('.').collect());
    stage.give_token([good[0], other[1], good[2]].join("."));
    assert!(refused(stage.login().await).contains("bad signature"));
    // None of it made us fetch keys.
    assert_eq!(stage.fake.count("/keys"), 1);

    // A key that is not for signatures.
    let stage = Stage::new().await;
    let key = with(stage.key.public("k1"), &json!({"use": "enc"}));
    stage.fake.json("/keys", json!({"keys": [key]}));
    assert!(refused(stage.login().await).contains("does not publish"));
}

#[tokio::test]
async fn id_tokens_that_do_not_hold_are_refused_by_name() {
    let stage = Stage::new().await;
    let now = unix();
    for (name, patch, why) in [
        ("wrong aud", json!({"aud": "other"}), "(aud)"),
        ("an extra aud", json!({"aud": [CLIENT, "other"]}), "(aud)"),
        ("no aud", json!({"aud": null}), "(aud)"),
        ("wrong iss", json!({"iss": "http://127.0.0.1:1"}), "another issuer"),
        ("iss with a slash", json!({"iss": format!("{}/", stage.fake.url)}), "another issuer"),
        ("expired", json!({"exp": now - 70}), "expired"),
        ("nonce wrong", json!({"nonce": "other"}), "(nonce)"),
        ("nonce missing", json!({"nonce": null}), "(nonce)"),
        ("iat a day ahead", json!({"iat": now + 86_400, "exp": now + 90_000}), "in the future"),
        ("iat past the skew", json!({"iat": now + 70}), "in the future"),
        ("iat too old", json!({"iat": now - 610}), " s ago"),
        ("nbf a day ahead", json!({"nbf": now + 86_400}), "(nbf)"),
        ("nbf of no time", json!({"nbf": "soon"}), "(nbf)"),
        ("azp of another", json!({"azp": "evil"}), "(azp)"),
        ("no sub", json!({"sub": null}), "unreadable"),
        ("sub empty", json!({"sub": ""}), "its subject"),
        ("sub long", json!({"sub": "x".repeat(256)}), "its subject"),
        ("sub not ASCII", json!({"sub": "ünn"}), "its subject"),
        ("sub with a line", json!({"sub": "a\r\nb"}), "its subject"),
        ("sid long", json!({"sid": "x".repeat(256)}), "its session"),
        ("sid no text", json!({"sid": 7}), "its session"),
        ("iat no time", json!({"iat": "now"}), "unreadable"),
    ] {
        let told = stage.refusal(patch).await;
        assert!(told.contains(why), "{name}: {told}");
    }
    for (name, head, why) in [
        ("typ at+jwt", json!({"typ": "at+jwt"}), "by its head"),
        ("typ logout+jwt", json!({"typ": "logout+jwt"}), "by its head"),
        ("crit", json!({"crit": ["b64"]}), "by its head"),
        ("cty", json!({"cty": "JWT"}), "by its head"),
    ] {
        stage.give_token(stage.key.token(&with(stage.head(), &head), &stage.claims()));
        let told = refused(stage.login().await);
        assert!(told.contains(why), "{name}: {told}");
    }
    // And what may be.
    for patch in [
        json!({"exp": now - 30}),
        json!({"iat": now + 30}),
        json!({"iat": now - 570}),
        json!({"nbf": now + 30}),
        json!({"aud": [CLIENT]}),
        json!({"sub": "x".repeat(255)}),
    ] {
        stage.came(patch).await;
    }
}

#[tokio::test]
async fn a_token_without_a_kid_needs_a_single_key() {
    let stage = Stage::new().await;
    stage.give_token(stage.key.token(&json!({"alg": "EdDSA"}), &stage.claims()));
    stage.login().await.unwrap();

    let stage = Stage::new().await;
    stage.fake.json("/keys", json!({"keys": [stage.key.public("k1"), Key::ed25519().public("k2")]}));
    stage.give_token(stage.key.token(&json!({"alg": "EdDSA"}), &stage.claims()));
    assert!(refused(stage.login().await).contains("which of the provider's keys"));
}

#[tokio::test]
async fn token_answers_that_are_none_are_told_apart() {
    let stage = Stage::new().await;
    let error =
        |status, body: Value| Answer::Raw(status, ("content-type", "application/json".into()), body.to_string().into());
    for (answer, is_down, why) in [
        (error(400, json!({"error": "invalid_grant", "error_description": CODE})), false, "400: invalid_grant"),
        (error(401, json!({"error": "invalid_client"})), false, "401: invalid_client"),
        (error(400, json!({"error": format!("{CODE} {SECRET}")})), false, "400: no error that is known"),
        (error(400, json!({"error": {"message": ACCESS}})), false, "no error that is known"),
        (error(400, json!({"error": "temporarily_unavailable"})), true, "temporarily_unavailable"),
        (error(429, json!({})), true, "429"),
        (error(503, json!(CODE)), true, "503"),
        (error(200, json!(CODE)), false, "unreadable"),
        (error(200, json!({"access_token": ACCESS, "token_type": "bearer"})), false, "no ID token"),
        (error(200, json!({"access_token": ACCESS, "id_token": "a.b.c"})), false, "ID token is unreadable"),
        (error(302, json!({})), true, "redirects are not followed"),
    ] {
        stage.fake.answer("/token", answer);
        let done = stage.login().await;
        let told = if is_down { down(done) } else { refused(done) };
        assert!(told.contains(why), "{why}: {told}");
    }
    let asked = stage.fake.count("/token");
    for code in [String::new(), "x".repeat(20_000)] {
        refused(stage.providers.redeem(&stage.provider, ask(), &code).await);
    }
    assert_eq!(stage.fake.count("/token"), asked);
}

#[tokio::test]
async fn addresses_count_only_where_they_are_verified_or_trusted() {
    let stage = Stage::new().await;
    let email = |who: Identity| who.email.map(|email| email.as_str().to_owned());
    let ann = Some("ann@example.com".to_owned());
    assert_eq!(email(stage.came(json!({"email_verified": true})).await), ann);
    assert_eq!(email(stage.came(json!({"email_verified": "true"})).await), ann);
    for not in [json!(false), json!("false"), Value::Null] {
        let who = stage.came(json!({"email_verified": not})).await;
        assert!(who.email.is_none() && !who.domain_vouched, "{not}");
    }
    for bad in [
        "no address",
        "a@b@example.com",
        "\"a@b\"@example.com",
        "a@example.com.",
        "a@exa_mple.com",
        "a\u{200b}@example.com",
    ] {
        let who = stage.came(json!({"email": bad})).await;
        assert!(who.email.is_none() && !who.domain_vouched, "{bad}");
    }
    // U+212A is no k, U+0130 no i, and a Cyrillic domain is not the Latin one.
    assert_eq!(email(stage.came(json!({"email": "\u{212a}ate@example.com"})).await), None);
    let looks = stage.came(json!({"email": "m\u{130}a@example.com"})).await;
    assert_ne!(email(looks).as_deref(), Some("mia@example.com"));
    let looks = stage.came(json!({"email": "ann@ex\u{430}mple.com"})).await;
    assert_eq!(looks.email.unwrap().domain(), "xn--exmple-4nf.com");

    let trusting = Stage::with(Key::ed25519(), json!({"trust_email": true})).await;
    assert_eq!(email(trusting.came(json!({"email_verified": null})).await), ann);
    assert_eq!(email(trusting.came(json!({"email": "no address"})).await), None);
}

#[tokio::test]
async fn a_domain_is_vouched_for_by_hd_where_it_must_be() {
    let stage = Stage::with(Key::ed25519(), json!({"require_hd": true})).await;
    for (hd, vouched) in [
        (json!("example.com"), true),
        (json!("EXAMPLE.com"), true),
        (json!("other.com"), false),
        (json!("sub.example.com"), false),
        (json!("*.com"), false),
        (json!("example.com."), false),
        (json!("ex\u{430}mple.com"), false),
        (json!("x@example.com"), false),
        (json!(true), false),
        (Value::Null, false),
    ] {
        let who = stage.came(json!({"hd": hd})).await;
        assert!(who.email.is_some());
        assert_eq!(who.domain_vouched, vouched, "{hd}");
    }
}

#[tokio::test]
async fn an_address_that_the_token_lacks_is_asked_for() {
    let stage = Stage::new().await;
    let without = json!({"email": null, "email_verified": null});
    stage.fake.json("/me", json!({"sub": SUBJECT, "email": ADDRESS, "email_verified": "true"}));
    let who = stage.came(without.clone()).await;
    assert_eq!(who.email.unwrap().as_str(), "ann@example.com");
    assert_eq!(stage.fake.seen("/me")[0].headers["authorization"], format!("Bearer {ACCESS}"));

    stage.fake.json("/me", json!({"sub": SUBJECT, "email": ADDRESS}));
    assert!(stage.came(without.clone()).await.email.is_none());
    // What the token says of an address that it has not is of no other.
    assert!(stage.came(json!({"email": null})).await.email.is_none());

    stage.fake.json("/me", json!({"sub": "eve", "email": ADDRESS, "email_verified": true}));
    assert!(stage.refusal(without.clone()).await.contains("another subject"));
    stage.fake.answer("/me", Answer::Raw(200, ("content-type", "application/jwt".into()), b"eyJ.eyJ.x".to_vec()));
    assert!(stage.refusal(without.clone()).await.contains("unreadable"));
    stage.fake.answer("/me", Answer::Raw(401, ("x", "y".into()), Vec::new()));
    assert!(stage.refusal(without.clone()).await.contains("401"));
    stage.fake.answer("/me", Answer::Raw(500, ("x", "y".into()), Vec::new()));
    stage.give(&without);
    assert!(down(stage.login().await).contains("500"));
    // An access token that is no field's value must not bring us down.
    let token = stage.key.token(&stage.head(), &with(stage.claims(), &without));
    stage.fake.json("/token", json!({"access_token": "a\r\nb", "id_token": token}));
    assert!(refused(stage.login().await).contains("access token"));

    stage.fake.json(DISCOVERY, with(stage.metadata(), &json!({"userinfo_endpoint": null})));
    let fresh = Stage { providers: Providers::default(), ..stage };
    assert!(fresh.came(without).await.email.is_none());
}

#[tokio::test]
async fn when_they_proved_it_is_told_where_it_is_known() {
    let stage = Stage::new().await;
    for unknown in [Value::Null, json!(0), json!(-5)] {
        assert_eq!(stage.came(json!({"auth_time": unknown})).await.auth_time, None);
    }
    let ahead = stage.came(json!({"auth_time": unix() + 9999})).await.auth_time.unwrap();
    assert!(ahead <= u64::try_from(unix()).unwrap());
}

#[tokio::test]
async fn metadata_says_what_callbacks_carry_and_where_sessions_end() {
    let stage = Stage::new().await;
    assert_eq!(stage.providers.callback_issuer(&stage.provider).await, Ok(None));
    let end = stage.providers.end_session(&stage.provider, "https://a.test/x?y=1").await.unwrap();
    let end = Url::parse(&end).unwrap();
    assert_eq!(end.path(), "/bye");
    let sent = query(end.query().unwrap());
    assert_eq!(sent["client_id"], CLIENT);
    assert_eq!(sent["post_logout_redirect_uri"], "https://a.test/x?y=1");

    let patch = json!({"authorization_response_iss_parameter_supported": true, "end_session_endpoint": null});
    stage.fake.json(DISCOVERY, with(stage.metadata(), &patch));
    let providers = Providers::default();
    assert_eq!(providers.callback_issuer(&stage.provider).await, Ok(Some(stage.fake.url.clone())));
    assert_eq!(providers.end_session(&stage.provider, "https://a.test/").await, None);
}
