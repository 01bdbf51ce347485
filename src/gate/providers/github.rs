//! GitHub's OAuth: no ID token, so its API says who came. PKCE is all that ties the
//! code to the login (GitHub checks it since July 2025), beside the state.

use openidconnect::url::Url;
use serde::Deserialize;

use super::fetch::{Fetch, What};
use super::{Ask, Failed, oauth};
use crate::gate::identity::Identity;
use crate::model::Provider;
use crate::model::identity::ClientAuth;

const ISSUER: &str = "https://github.com";
const AUTHORIZE: &str = "https://github.com/login/oauth/authorize";
const TOKEN: &str = "https://github.com/login/oauth/access_token";
const API: &str = "https://api.github.com";

/// What its API wants to be asked for (docs.github.com/rest).
const ACCEPT: &str = "application/vnd.github+json";

/// Scopes that open the list of addresses.
const EMAIL_SCOPES: [&str; 2] = ["user:email", "user"];

#[derive(Deserialize)]
struct User {
    id: u64,
}

#[derive(Deserialize)]
struct Address {
    email: String,
    #[serde(default)]
    primary: bool,
    #[serde(default)]
    verified: bool,
}

pub(super) fn authorize(provider: &Provider, ask: Ask<'_>) -> Result<String, Failed> {
    let at = provider.authorize_url.as_ref().map_or(AUTHORIZE, |url| url.as_str());
    let at = Url::parse(at).map_err(|_| Failed::Down("authorize_url is no URL".into()))?;
    let more: &[_] = if ask.choose_account { &[("prompt", "select_account")] } else { &[] };
    Ok(oauth::authorize_url(at, provider, &provider.scopes.join(" "), ask, more))
}

pub(super) async fn redeem(fetch: &Fetch, provider: &Provider, ask: Ask<'_>, code: &str) -> Result<Identity, Failed> {
    let secret = oauth::secret(provider, fetch.settings().secrets.as_deref()).await?;
    let at = provider.token_url.as_ref().map_or(TOKEN, |url| url.as_str());
    // It knows secrets in the form alone.
    let tokens = oauth::redeem(fetch, provider, at, secret.as_deref(), ClientAuth::Post, ask, code).await?;
    let access = tokens.access()?;
    let api = oauth::base(provider.api_url.as_ref(), API);
    let user: User = oauth::get_json(fetch, provider, What::Api, &format!("{api}/user"), ACCEPT, access).await?;
    let mut address = None;
    if provider.scopes.iter().any(|scope| EMAIL_SCOPES.contains(&scope.as_str())) {
        let at = format!("{api}/user/emails?per_page=100");
        let all: Vec<Address> = oauth::get_json(fetch, provider, What::Api, &at, ACCEPT, access).await?;
        address = all.into_iter().find(|address| address.primary && address.verified);
    }
    let email = oauth::email(provider, address.as_ref().map(|address| address.email.as_str()), address.is_some());
    Ok(Identity {
        provider: provider.id.clone(),
        issuer: oauth::issuer(ISSUER, provider),
        subject: user.id.to_string(),
        // Nothing like `hd` comes from here.
        domain_vouched: email.is_some() && !provider.require_hd,
        email,
        provider_session: None,
        auth_time: None,
    })
}
