//! The other side of a provider, apart from the one that is tested: a login by
//! code and PKCE, step by step.

use aws_lc_rs::{digest, rand};
use data_encoding::{BASE64, BASE64URL_NOPAD};
use serde_json::Value;

use crate::harness::*;

/// The secrets of one login.
#[derive(Debug, Clone)]
pub struct Login {
    pub state: String,
    pub nonce: String,
    pub verifier: String,
}

impl Login {
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let secret = || {
            let mut bytes = [0; 32];
            rand::fill(&mut bytes).unwrap();
            BASE64URL_NOPAD.encode(&bytes)
        };
        Self { state: secret(), nonce: secret(), verifier: secret() }
    }

    /// Where the browser is sent to.
    pub fn url(&self, endpoint: &str, client_id: &str, redirect_uri: &str, scope: &str) -> String {
        let challenge = BASE64URL_NOPAD.encode(digest::digest(&digest::SHA256, self.verifier.as_bytes()).as_ref());
        let fields = [
            ("client_id", client_id),
            ("response_type", "code"),
            ("redirect_uri", redirect_uri),
            ("scope", scope),
            ("state", &self.state),
            ("nonce", &self.nonce),
            ("code_challenge", &challenge),
            ("code_challenge_method", "S256"),
        ];
        format!("{endpoint}?{}", url::form(&fields))
    }

    /// The code that a provider's redirect brings; it goes to the right place with the right state.
    pub fn code(&self, answer: &Answer, redirect_uri: &str) -> String {
        let to = answer.location().unwrap_or_else(|| panic!("{}: {} {}", answer.url, answer.status, answer.text()));
        assert_eq!(format!("{}{}", to.origin(), to.path()), redirect_uri, "{to}");
        assert_eq!(to.field("state").as_ref(), Some(&self.state), "{to}");
        to.field("code").unwrap_or_else(|| panic!("no code: {to}"))
    }

    /// Redeems a code, with the secret in the Authorization header: status and answer.
    pub async fn redeem(&self, endpoint: &str, client: (&str, &str), code: &str, redirect_uri: &str) -> (u16, Value) {
        let mut program = Browser::of_addresses();
        program.manner = Manner::Bare;
        let (id, secret) = (url::encode(client.0), url::encode(client.1));
        let basic = format!("Basic {}", BASE64.encode(format!("{id}:{secret}").as_bytes()));
        let fields = [
            ("grant_type", "authorization_code"),
            ("code", code),
            ("redirect_uri", redirect_uri),
            ("code_verifier", &self.verifier),
        ];
        let headers = [
            ("content-type", "application/x-www-form-urlencoded"),
            ("authorization", &basic),
            ("accept", "application/json"),
        ];
        let done = program.request("POST", endpoint, &headers, url::form(&fields).as_bytes()).await;
        (done.status, done.json())
    }
}

/// Header and claims of a JWT, unchecked.
pub fn claims_of(token: &Value) -> (Value, Value) {
    let token = token.as_str().unwrap_or_else(|| panic!("no token: {token}"));
    let mut parts = token.split('.').map(|part| BASE64URL_NOPAD.decode(part.as_bytes()).unwrap());
    let mut next = || serde_json::from_slice(&parts.next().unwrap()).unwrap();
    (next(), next())
}
