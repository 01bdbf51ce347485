//! Facebook's OAuth: no ID token, so its Graph API says who came. It does not say
//! whether an address is verified: it counts only where the record trusts it.

use aws_lc_rs::hmac;
use data_encoding::HEXLOWER;
use openidconnect::url::Url;
use serde::Deserialize;

use super::fetch::{Fetch, What};
use super::{Ask, Failed, oauth};
use crate::gate::identity::Identity;
use crate::model::Provider;
use crate::model::identity::ClientAuth;

const ISSUER: &str = "https://www.facebook.com";
const AUTHORIZE: &str = "https://www.facebook.com/v23.0/dialog/oauth";
const TOKEN: &str = "https://graph.facebook.com/v23.0/oauth/access_token";
const API: &str = "https://graph.facebook.com/v23.0";

#[derive(Deserialize)]
struct Me {
    id: String,
    #[serde(default)]
    email: Option<String>,
}

pub(super) fn authorize(provider: &Provider, ask: Ask<'_>) -> Result<String, Failed> {
    let at = provider.authorize_url.as_ref().map_or(AUTHORIZE, |url| url.as_str());
    let at = Url::parse(at).map_err(|_| Failed::Down("authorize_url is no URL".into()))?;
    // It has no list of accounts to choose from; asking for the password lets
    // another one come.
    let more: &[_] = if ask.choose_account { &[("auth_type", "reauthenticate")] } else { &[] };
    Ok(oauth::authorize_url(at, provider, &provider.scopes.join(" "), ask, more))
}

pub(super) async fn redeem(fetch: &Fetch, provider: &Provider, ask: Ask<'_>, code: &str) -> Result<Identity, Failed> {
    let secret = oauth::secret(provider, fetch.settings().secrets.as_deref()).await?;
    let at = provider.token_url.as_ref().map_or(TOKEN, |url| url.as_str());
    // It knows secrets in the form alone.
    let tokens = oauth::redeem(fetch, provider, at, secret.as_deref(), ClientAuth::Post, ask, code).await?;
    let access = tokens.access()?;
    let api = oauth::base(provider.api_url.as_ref(), API);
    let mut at = format!("{api}/me?fields=id,email");
    if let Some(secret) = &secret {
        // Shows that the token is used by the app it was given to.
        at.push_str("&appsecret_proof=");
        at.push_str(&proof(secret, access));
    }
    let me: Me = oauth::get_json(fetch, provider, What::Api, &at, "application/json", access).await?;
    let email = oauth::email(provider, me.email.as_deref(), false);
    Ok(Identity {
        provider: provider.id.clone(),
        issuer: oauth::issuer(ISSUER, provider),
        subject: oauth::bounded("subject", &me.id)?,
        domain_vouched: email.is_some() && provider.trust_email && !provider.require_hd,
        email,
        provider_session: None,
        auth_time: None,
    })
}

/// HMAC-SHA256 of the token by the app's secret, in hex (Graph API, "Secure Graph API
/// calls").
fn proof(secret: &str, token: &str) -> String {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes());
    HEXLOWER.encode(hmac::sign(&key, token.as_bytes()).as_ref())
}
