//! GitHub, Facebook, and providers over TLS by other names than the resolver knows.

use std::collections::HashMap;

use openidconnect::url::{Url, form_urlencoded};

use super::fake::Answer;
use super::*;

fn query(of: &str) -> HashMap<String, String> {
    form_urlencoded::parse(of.as_bytes()).into_owned().collect()
}

fn error(status: u16, body: &Value) -> Answer {
    Answer::Raw(status, ("content-type", "application/json".into()), body.to_string().into())
}

/// A fake of one of the two, and its record.
async fn stage(kind: &str, fields: Value) -> (Fake, Arc<Provider>) {
    let fake = Fake::new().await;
    let url = &fake.url;
    let places = json!({
        "kind": kind, "authorize_url": format!("{url}/authorize"), "token_url": format!("{url}/token"),
        "api_url": format!("{url}/api/"),
    });
    let provider = record(with(places, &fields));
    fake.json("/token", json!({"access_token": ACCESS, "token_type": "bearer", "scope": "user:email"}));
    (fake, provider)
}

async fn login(provider: &Arc<Provider>) -> Result<Identity, Failed> {
    Providers::default().redeem(provider, ask(), CODE).await
}

fn addresses() -> Value {
    json!([
        {"email": "old@example.com", "primary": false, "verified": true, "visibility": null},
        {"email": ADDRESS, "primary": true, "verified": true, "visibility": "private"},
    ])
}

#[tokio::test]
async fn github_says_who_came_by_its_api() {
    let (fake, provider) = stage("github", json!({})).await;
    let providers = Providers::default();
    let url = providers.authorize(&provider, Ask { choose_account: true, ..ask() }).await.unwrap();
    let url = Url::parse(&url).unwrap();
    assert_eq!(url.path(), "/authorize");
    let sent = query(url.query().unwrap());
    for (name, value) in [
        ("client_id", CLIENT),
        ("redirect_uri", REDIRECT),
        ("scope", "user:email"),
        ("state", STATE),
        ("code_challenge", "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM"),
        ("code_challenge_method", "S256"),
        ("prompt", "select_account"),
    ] {
        assert_eq!(sent[name], value);
    }

    fake.json("/api/user", json!({"id": 583_231, "login": "octocat", "email": "shown@evil.test"}));
    fake.json("/api/user/emails", addresses());
    let who = login(&provider).await.unwrap();
    assert_eq!((who.subject.as_str(), who.issuer.as_str()), ("583231", fake.url.as_str()));
    assert_eq!(who.email.as_ref().unwrap().as_str(), "ann@example.com");
    assert!(who.domain_vouched && who.provider_session.is_none() && who.auth_time.is_none());
    let asked = fake.seen("/token");
    let form = query(&asked[0].body);
    assert_eq!((asked.len(), asked[0].headers["accept"].to_str().unwrap()), (1, "application/json"));
    assert_eq!((form["client_secret"].as_str(), form["code_verifier"].as_str()), (SECRET, VERIFIER));
    assert!(!asked[0].headers.contains_key("authorization"));
    for path in ["/api/user", "/api/user/emails"] {
        let asked = &fake.seen(path)[0];
        assert_eq!(asked.headers["authorization"], format!("Bearer {ACCESS}"));
        assert_eq!(asked.headers["user-agent"], "adit");
    }
    assert_eq!(fake.seen("/api/user/emails")[0].query, "per_page=100");
    assert_eq!(providers.callback_issuer(&provider).await, Ok(None));
    assert_eq!(providers.end_session(&provider, "https://a.test/").await, None);
    refused(providers.logout_token(&provider, "a.b.c").await);

    // Where it is at its usual place, it is itself.
    let usual = record(json!({"kind": "github"}));
    let url = providers.authorize(&usual, ask()).await.unwrap();
    assert!(url.starts_with("https://github.com/login/oauth/authorize?response_type=code&"), "{url}");
    assert_eq!(oauth::issuer("https://github.com", &usual), "https://github.com");
}

#[tokio::test]
async fn github_vouches_for_the_primary_verified_address_alone() {
    let (fake, provider) = stage("github", json!({})).await;
    fake.json("/api/user", json!({"id": 1}));
    for (primary, verified) in [(true, false), (false, true)] {
        fake.json("/api/user/emails", json!([{"email": ADDRESS, "primary": primary, "verified": verified}]));
        let who = login(&provider).await.unwrap();
        assert!(who.email.is_none() && !who.domain_vouched);
    }
    fake.json("/api/user/emails", json!([]));
    assert!(login(&provider).await.unwrap().email.is_none());
    fake.answer("/api/user/emails", error(404, &json!({"message": ADDRESS})));
    assert!(refused(login(&provider).await).contains("404"));

    // Who does not ask for addresses is not refused for them.
    let (fake, provider) = stage("github", json!({"scopes": []})).await;
    fake.json("/api/user", json!({"id": 1}));
    assert!(login(&provider).await.unwrap().email.is_none());
    assert_eq!(fake.count("/api/user/emails"), 0);
}

#[tokio::test]
async fn github_refuses_with_the_status_of_a_success() {
    let (fake, provider) = stage("github", json!({})).await;
    fake.json("/api/user", json!({"id": 1}));
    fake.json("/api/user/emails", addresses());
    fake.json("/token", json!({"error": "bad_verification_code", "error_description": CODE}));
    assert!(refused(login(&provider).await).contains("bad_verification_code"));
    fake.json("/token", json!({"error": ACCESS, "access_token": ACCESS}));
    assert!(refused(login(&provider).await).contains("no error that is known"));
    fake.json("/token", json!({"access_token": ""}));
    assert!(refused(login(&provider).await).contains("access token"));
    fake.answer("/token", Answer::Raw(200, ("x", "y".into()), format!("access_token={ACCESS}").into()));
    assert!(refused(login(&provider).await).contains("unreadable"));
    assert_eq!(fake.count("/api/user"), 0);

    fake.json("/token", json!({"access_token": ACCESS}));
    for (answer, is_down) in [
        (error(200, &json!({"id": "583231"})), false),
        (error(200, &json!({"id": -1})), false),
        (error(401, &json!({"message": ACCESS})), false),
        (error(502, &json!({})), true),
        (Answer::Raw(301, ("location", fake.url.clone()), Vec::new()), true),
        (Answer::Lost, true),
    ] {
        fake.answer("/api/user", answer);
        let done = login(&provider).await;
        if is_down {
            down(done)
        } else {
            refused(done)
        };
    }
}

#[tokio::test]
async fn facebook_says_who_came_and_its_address_needs_trust() {
    for (trust, vouched) in [(false, false), (true, true)] {
        let (fake, provider) = stage("facebook", json!({"trust_email": trust})).await;
        let url = Providers::default().authorize(&provider, Ask { choose_account: true, ..ask() }).await.unwrap();
        let sent = query(Url::parse(&url).unwrap().query().unwrap());
        assert_eq!((sent["scope"].as_str(), sent["auth_type"].as_str()), ("email", "reauthenticate"));
        assert_eq!((sent["state"].as_str(), sent["code_challenge_method"].as_str()), (STATE, "S256"));

        fake.json("/api/me", json!({"id": "10158", "email": ADDRESS}));
        let who = login(&provider).await.unwrap();
        assert_eq!((who.subject.as_str(), who.domain_vouched), ("10158", vouched));
        assert_eq!(who.email.map(|email| email.as_str().to_owned()), trust.then(|| "ann@example.com".to_owned()));
        let asked = &fake.seen("/api/me")[0];
        assert_eq!(asked.headers["authorization"], format!("Bearer {ACCESS}"));
        let sent = query(&asked.query);
        assert_eq!(sent["fields"], "id,email");
        // printf acc3ss-T0ken | openssl dgst -sha256 -hmac 's3cr3t:%+Zz'
        assert_eq!(sent["appsecret_proof"], PROOF);
        assert_eq!(query(&fake.seen("/token")[0].body)["client_secret"], SECRET);

        fake.json("/api/me", json!({"id": "10158"}));
        let who = login(&provider).await.unwrap();
        assert!(who.email.is_none() && !who.domain_vouched);
    }
    let usual = Providers::default().authorize(&record(json!({"kind": "facebook"})), ask()).await.unwrap();
    assert!(usual.starts_with("https://www.facebook.com/v23.0/dialog/oauth?"), "{usual}");
}

const PROOF: &str = "d7cd389860ad7d1a0b91a3d91c852a6f7e29bff9ec78df22d2eb4efd4fef7c82";

#[tokio::test]
async fn facebook_refuses_with_an_object() {
    let (fake, provider) = stage("facebook", json!({"trust_email": true})).await;
    fake.json("/api/me", json!({"id": "10158", "email": ADDRESS}));
    fake.answer("/token", error(400, &json!({"error": {"message": CODE, "type": "OAuthException", "code": 100}})));
    assert!(refused(login(&provider).await).contains("400: no error that is known"));
    fake.answer("/token", error(500, &json!({"error": {"message": CODE}})));
    assert!(down(login(&provider).await).contains("500"));
    assert_eq!(fake.count("/api/me"), 0);
    fake.json("/token", json!({"access_token": ACCESS}));
    for answer in [json!({"id": 10_158}), json!({"id": ""}), json!({"email": ADDRESS}), json!({"id": "x".repeat(300)})]
    {
        fake.json("/api/me", answer);
        refused(login(&provider).await);
    }
}

#[tokio::test]
async fn a_provider_may_be_where_the_resolver_does_not_know_and_by_a_ca_of_ours() {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let pem = ca.self_signed(&ca_key).unwrap().pem();
    let key = rcgen::KeyPair::generate().unwrap();
    let params = rcgen::CertificateParams::new(vec!["id.localhost".to_owned()]).unwrap();
    let leaf = params.signed_by(&key, &rcgen::Issuer::new(ca, ca_key)).unwrap();
    let made = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf.der().clone()], made)
        .unwrap();
    let fake = Fake::over(Some(tokio_rustls::TlsAcceptor::from(Arc::new(config)))).await;

    let issuer = "https://id.localhost/realm";
    let key = Key::ed25519();
    let now = unix();
    let metadata = json!({
        "issuer": issuer, "authorization_endpoint": format!("{issuer}/auth"), "token_endpoint": format!("{issuer}/token"),
        "jwks_uri": format!("{issuer}/keys"), "response_types_supported": ["code"],
        "subject_types_supported": ["public"], "id_token_signing_alg_values_supported": ["EdDSA"],
    });
    fake.json("/realm/.well-known/openid-configuration", metadata.clone());
    fake.json("/realm/keys", json!({"keys": [key.public("k1")]}));
    let claims = json!({"iss": issuer, "aud": CLIENT, "sub": SUBJECT, "nonce": NONCE, "iat": now, "exp": now + 60});
    fake.json(
        "/realm/token",
        json!({"access_token": ACCESS, "id_token": key.token(&json!({"alg": "EdDSA"}), &claims)}),
    );

    let folder = tempfile::tempdir().unwrap();
    let ca_file = folder.path().join("ca.pem");
    std::fs::write(&ca_file, pem).unwrap();
    let resolve = vec![
        Resolve { host: "id.localhost".into(), at: fake.address },
        Resolve { host: "other.localhost".into(), at: fake.address },
    ];
    let settings = ProviderSettings { ca_file: Some(ca_file.clone()), resolve, ..ProviderSettings::default() };
    let providers = Providers::new(settings.clone()).unwrap();
    let provider = record(json!({"kind": "oidc", "issuer": issuer}));
    let who = providers.redeem(&provider, ask(), CODE).await.unwrap();
    assert_eq!((who.issuer.as_str(), who.email), (issuer, None));
    assert_eq!(fake.seen("/realm/token")[0].headers["host"], "id.localhost");

    // One that TLS vouches for may not send us to what listens here.
    let local = with(metadata, &json!({"token_endpoint": "http://127.0.0.1:1/token"}));
    fake.json("/realm/.well-known/openid-configuration", local);
    let providers = Providers::new(settings.clone()).unwrap();
    assert!(down(providers.redeem(&provider, ask(), CODE).await).contains("not https"));
    // Another name than the certificate's, and nobody's CA.
    let other = record(json!({"kind": "oidc", "issuer": "https://other.localhost"}));
    assert!(down(providers.authorize(&other, ask()).await).contains("TLS failed"));
    let strangers = Providers::new(ProviderSettings { ca_file: None, ..settings.clone() }).unwrap();
    assert!(down(strangers.authorize(&provider, ask()).await).contains("TLS failed"));

    std::fs::write(&ca_file, "no certificate").unwrap();
    assert!(Providers::new(settings.clone()).unwrap_err().contains("ca.pem"));
    std::fs::remove_file(&ca_file).unwrap();
    assert!(Providers::new(settings).unwrap_err().contains("ca.pem"));
}
