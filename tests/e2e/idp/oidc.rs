//! npm oidc-provider: a certified OpenID provider.

use std::net::IpAddr;

use serde_json::{Value, json};

use super::NodeServer;
use crate::harness::*;

/// What differs from the usual client.
#[derive(Debug, Clone, Default)]
pub struct OidcOpts {
    pub post_logout_redirect_uris: Vec<String>,
    /// Where it tells that a session has ended, with a `sid`.
    pub backchannel_logout_uri: Option<String>,
    /// The address that the name in it stands for (the port is its own).
    pub backchannel_via: Option<IpAddr>,
    /// The CA (PEM) of that place.
    pub backchannel_ca: Option<String>,
    /// How ID tokens are signed: RS256, PS256, ES256, EdDSA.
    pub alg: Option<String>,
    /// How the client shows its secret: `client_secret_basic`, `client_secret_post`.
    pub auth_method: Option<String>,
}

/// The provider. Logins are e-mail addresses, verified ones, and their own subjects;
/// `unverified:a@b.c` says so of its address, `absent:` does not say, `string:` says
/// "true", `noemail:` has none. It insists on PKCE.
pub struct OidcProvider {
    pub issuer: String,
    pub client_id: String,
    pub client_secret: String,
    server: NodeServer,
}

impl OidcProvider {
    /// One that knows a client with these redirect URIs.
    pub async fn start(redirect_uris: &[&str], opts: OidcOpts) -> Self {
        let (client_id, client_secret) = ("adit", "a secret: of tests, with 100% of + and /");
        let settings = json!({
            "client_id": client_id,
            "client_secret": client_secret,
            "redirect_uris": redirect_uris,
            "post_logout_redirect_uris": opts.post_logout_redirect_uris,
            "backchannel_logout_uri": opts.backchannel_logout_uri,
            "backchannel_via": opts.backchannel_via,
            "backchannel_ca": opts.backchannel_ca,
            "alg": opts.alg.as_deref().unwrap_or("RS256"),
            "auth_method": opts.auth_method.as_deref().unwrap_or("client_secret_basic"),
        });
        let server = NodeServer::start("oidc_provider.mjs", settings).await;
        Self { issuer: server.issuer(), client_id: client_id.into(), client_secret: client_secret.into(), server }
    }

    /// Signs with new keys from now on; the old ones are no longer told.
    pub async fn rotate_keys(&mut self) {
        self.server.order("rotate", json!({})).await;
    }

    /// Goes down: refuses connections, and cuts those that stand.
    pub async fn down(&mut self) {
        self.server.order("down", json!({})).await;
    }

    /// Comes up again where it was, with all that it knew.
    pub async fn up(&mut self) {
        self.server.order("up", json!({})).await;
    }

    /// Stops in its tracks: connections are taken, and nothing is answered.
    pub fn hang(&self) {
        self.server.program.signal("STOP");
    }

    /// Goes on after that.
    pub fn go_on(&self) {
        self.server.program.signal("CONT");
    }

    /// The logouts that it has told by the back channel: `url`, `body`, and `status` or `error`.
    pub async fn told(&mut self) -> Vec<Value> {
        self.server.order("told", json!({})).await.as_array().unwrap().clone()
    }

    /// How often this path of it was asked for: `/token`, `/jwks`.
    pub async fn asked(&mut self, path: &str) -> u64 {
        self.server.order("asked", json!({})).await[path].as_u64().unwrap_or(0)
    }

    /// Ends the browser's session at the provider, as its user would on its own page.
    pub async fn logout(&self, browser: &mut Browser) -> Answer {
        let page = browser.get(&format!("{}/session/end", self.issuer)).await;
        let form = page.form().with("logout", "yes");
        browser.submit(&page, &form).await
    }
}
