//! npm oauth2-mock-server, made to lie.

use serde_json::{Value, json};

use super::NodeServer;

/// A provider whose authorization page sends everybody back at once, and whose
/// answers can be forged.
pub struct MockProvider {
    pub issuer: String,
    pub client_id: String,
    pub client_secret: String,
    server: NodeServer,
}

impl MockProvider {
    /// An honest one: `johndoe`, alice@example.com, verified.
    pub async fn start() -> Self {
        Self::redirecting_to(None).await
    }

    /// The same; the modes `redirect_*` send to this URL.
    pub async fn redirecting_to(elsewhere: Option<&str>) -> Self {
        let (client_id, client_secret) = ("adit", "the mock's secret");
        let settings = json!({"client_id": client_id, "client_secret": client_secret, "elsewhere": elsewhere});
        let server = NodeServer::start("mock_provider.mjs", settings).await;
        Self { issuer: server.issuer(), client_id: client_id.into(), client_secret: client_secret.into(), server }
    }

    /// Forges from now on:
    /// - claims of the ID token: `aud` `multiaud` `noaud` `iss` `noiss` `exp` `noexp`
    ///   `future` (iat and nbf) `nbf` `old` (iat) `nonce` `nononce` `azp` `nosub`
    ///   `unverified` `absent` `string` `noemail`, and its header: `kid` `nokid` `typ` `crit`;
    /// - its signature: `algnone` `hs256secret` `hs256public` `badsig` `wrongkey` `jwk`
    ///   `nosig` `notjwt`;
    /// - the token's answer: `noidt` `notype`; the callback's `iss`: `authziss`; the
    ///   issuer that discovery tells: `discovery`;
    /// - in place of an answer, `HOW_ENDPOINT`: `slow` (never) `500` `400` `redirect`
    ///   `huge` (1 MiB) `html` `garbage` `cut`, of `discovery` `jwks` `token` `userinfo`
    ///   `authorize`.
    ///
    /// `ok` is honest again.
    pub async fn mode(&mut self, mode: &str) {
        let known = self.server.order("mode", json!({"mode": mode})).await;
        assert_eq!(known, true, "no mode {mode:?}");
    }

    /// Claims of ID tokens from now on, over its own and the mode's; null takes one out.
    pub async fn set_claims(&mut self, claims: Value) {
        self.server.order("claims", json!({"claims": claims})).await;
    }

    /// Signs with a new key from now on, whose `kid` this is; the old ones stay
    /// told beside it with `keep`.
    pub async fn rotate_keys(&mut self, keep: bool) -> String {
        self.server.order("rotate", json!({"keep": keep})).await.as_str().unwrap().to_owned()
    }

    /// What an endpoint was asked so far: `method`, `url`, `headers`, `body`, `form`.
    pub async fn asked(&mut self, endpoint: &str) -> Vec<Value> {
        let all = self.server.order("asked", json!({})).await;
        all.as_array().unwrap().iter().filter(|asked| asked["endpoint"] == endpoint).cloned().collect()
    }
}
