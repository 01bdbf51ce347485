//! Providers against one of ours that lies, dies and says nothing.

mod elsewhere;
mod fake;
mod login;
mod logout;
mod outages;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::*;
use crate::model::ProviderId;
use fake::{Fake, Key};

const DISCOVERY: &str = "/.well-known/openid-configuration";
const CLIENT: &str = "cl:ient+1";
const SECRET: &str = "s3cr3t:%+Zz";
const CODE: &str = "C0DE-4/xyz";
const ACCESS: &str = "acc3ss-T0ken";
const ADDRESS: &str = "Ann@Example.com";
const SUBJECT: &str = "auth0|5f7";
const STATE: &str = "v1.k.st4te";
const NONCE: &str = "n0nce-1234";
const VERIFIER: &str = "dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk";
const REDIRECT: &str = "https://auth.test/.adit/cb/idp";

fn ask() -> Ask<'static> {
    Ask { redirect_uri: REDIRECT, state: STATE, nonce: NONCE, verifier: VERIFIER, choose_account: false }
}

fn record(fields: Value) -> Arc<Provider> {
    let id: ProviderId = "idp".parse().unwrap();
    let mut map =
        json!({"v": 1, "id": "idp", "client_id": CLIENT, "client_secret": SECRET}).as_object().cloned().unwrap();
    map.extend(fields.as_object().cloned().unwrap());
    map.retain(|_, value| !value.is_null());
    Arc::new(Provider::from_record(&id, map).unwrap())
}

fn unix() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap()
}

fn with(mut base: Value, patch: &Value) -> Value {
    for (name, value) in patch.as_object().unwrap() {
        match value {
            // A patch of null takes the member away.
            Value::Null => drop(base.as_object_mut().unwrap().remove(name)),
            value => base[name.as_str()] = value.clone(),
        }
    }
    base
}

/// Lets time pass without waiting for it. Only around this is the clock paused:
/// where it is and a socket is awaited, it would run to the next deadline.
async fn later(by: Duration) {
    tokio::time::pause();
    tokio::time::advance(by).await;
    tokio::time::resume();
}

/// What went wrong, after a look that nothing secret or personal is in it.
#[track_caller]
fn told(failed: &Failed) -> &str {
    let text = failed.text();
    let lower = text.to_lowercase();
    for secret in [SECRET, CODE, ACCESS, STATE, NONCE, VERIFIER, "ann@", "example.com", SUBJECT, "eyj", "s3cr3t"] {
        assert!(!lower.contains(&secret.to_lowercase()), "{secret} in {text}");
    }
    text
}

/// An OpenID provider, and us.
struct Stage {
    fake: Fake,
    key: Key,
    providers: Providers,
    provider: Arc<Provider>,
}

impl Stage {
    async fn new() -> Self {
        Self::with(Key::ed25519(), json!({})).await
    }

    async fn with(key: Key, fields: Value) -> Self {
        let fake = Fake::new().await;
        let mut all = json!({"kind": "oidc", "issuer": fake.url}).as_object().cloned().unwrap();
        all.extend(fields.as_object().cloned().unwrap());
        let provider = record(Value::Object(all));
        let stage = Self { fake, key, providers: Providers::default(), provider };
        stage.fake.json(DISCOVERY, stage.metadata());
        stage.fake.json("/keys", json!({"keys": [stage.key.public("k1")]}));
        stage.give(&json!({}));
        stage
    }

    fn metadata(&self) -> Value {
        let url = &self.fake.url;
        json!({
            "issuer": url,
            "authorization_endpoint": format!("{url}/auth?policy=1"),
            "token_endpoint": format!("{url}/token"),
            "userinfo_endpoint": format!("{url}/me"),
            "end_session_endpoint": format!("{url}/bye"),
            "jwks_uri": format!("{url}/keys"),
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            // What a provider lists is of no consequence.
            "id_token_signing_alg_values_supported": ["HS256", "none", "RS512", "RS256"],
        })
    }

    fn head(&self) -> Value {
        json!({"alg": self.key.algorithm(), "kid": "k1", "typ": "JWT"})
    }

    fn claims(&self) -> Value {
        let now = unix();
        json!({
            "iss": self.fake.url, "aud": CLIENT, "sub": SUBJECT, "nonce": NONCE, "iat": now - 1, "exp": now + 300,
            "email": ADDRESS, "email_verified": true,
        })
    }

    /// The next ID token: the good one with these claims changed.
    fn give(&self, patch: &Value) {
        self.give_token(self.key.token(&self.head(), &with(self.claims(), patch)));
    }

    fn give_token(&self, token: String) {
        let answer = json!({"access_token": ACCESS, "token_type": "Bearer", "expires_in": 60, "id_token": token});
        self.fake.json("/token", answer);
    }

    async fn login(&self) -> Result<Identity, Failed> {
        self.providers.redeem(&self.provider, ask(), CODE).await
    }

    /// Who came with the good ID token and these claims changed.
    async fn came(&self, patch: Value) -> Identity {
        self.give(&patch);
        self.login().await.unwrap_or_else(|failed| panic!("{patch}: {failed:?}"))
    }

    /// Why nobody came with the good ID token and these claims changed.
    async fn refusal(&self, patch: Value) -> String {
        self.give(&patch);
        refused(self.login().await)
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(done: Result<T, Failed>) -> String {
    let failed = done.unwrap_err();
    assert!(matches!(failed, Failed::Refused(_)), "{failed:?}");
    told(&failed).to_owned()
}

#[track_caller]
fn down<T: std::fmt::Debug>(done: Result<T, Failed>) -> String {
    let failed = done.unwrap_err();
    assert!(matches!(failed, Failed::Down(_)), "{failed:?}");
    told(&failed).to_owned()
}

#[test]
fn questions_can_be_asked_from_any_task() {
    fn is_send<T: Send>(_: &T) {}
    let (providers, provider) = (Providers::default(), record(json!({"kind": "local", "client_secret": null})));
    is_send(&providers.authorize(&provider, ask()));
    is_send(&providers.redeem(&provider, ask(), CODE));
    is_send(&providers.callback_issuer(&provider));
    is_send(&providers.end_session(&provider, ""));
    is_send(&providers.logout_token(&provider, ""));
}

#[tokio::test]
async fn accounts_of_our_own_are_not_asked_here() {
    let (providers, provider) = (Providers::default(), record(json!({"kind": "local", "client_secret": null})));
    refused(providers.authorize(&provider, ask()).await);
    refused(providers.redeem(&provider, ask(), CODE).await);
    refused(providers.logout_token(&provider, "a.b.c").await);
    assert_eq!(providers.callback_issuer(&provider).await, Ok(None));
    assert_eq!(providers.end_session(&provider, "https://a.test/").await, None);
}
