//! Login providers as the gate asks them: where to send a browser, what a code is
//! worth, what a logout token says.
//!
//! `fetch` is the one way out; `oauth` is what all kinds share; `oidc` with
//! `metadata` and `logout`, `github` and `facebook` are the kinds.

mod facebook;
mod fetch;
mod github;
mod logout;
mod metadata;
mod oauth;
mod oidc;
mod settings;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

pub use settings::{ProviderSettings, Resolve};

use self::fetch::Fetch;
use self::metadata::Metadatas;
use super::identity::Identity;
use crate::model::Provider;
use crate::model::identity::{Moment, ProviderKind};

/// What a login asks of a provider.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// `https://AUTH/.adit/cb/<provider>`, exactly as registered.
    pub redirect_uri: &'a str,
    /// Sealed by us.
    pub state: &'a str,
    /// For the ID token.
    pub nonce: &'a str,
    /// PKCE's verifier (RFC 7636 §4.1); only its S256 challenge is sent.
    pub verifier: &'a str,
    /// Whether the visitor shall choose an account anew (`prompt=select_account`).
    pub choose_account: bool,
}

/// Why a provider was of no use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failed {
    /// It cannot be reached, fails, or is not asked for a while after it did. The
    /// text is for the log and holds no secret, code, token or address.
    Down(String),
    /// What it said, or the code, is not to be believed. The same of the text.
    Refused(String),
}

impl Failed {
    /// The text, for the log.
    pub fn text(&self) -> &str {
        match self {
            Self::Down(text) | Self::Refused(text) => text,
        }
    }
}

/// What a logout token says (OpenID Connect Back-Channel Logout 1.0 §2.4).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoggedOut {
    /// The issuer.
    pub issuer: String,
    /// Whose sessions end, ...
    pub subject: Option<String>,
    /// ... or which one of the provider's.
    pub provider_session: Option<String>,
    /// The token's own id, to take it once.
    pub jti: String,
}

/// Asks providers. Cheap to share: clones are one.
#[derive(Clone)]
pub struct Providers(Arc<Inner>);

struct Inner {
    fetch: Fetch,
    metadatas: Metadatas,
}

/// With the defaults of the settings.
impl Default for Providers {
    fn default() -> Self {
        Self(Arc::new(Inner { fetch: Fetch::default(), metadatas: Metadatas::default() }))
    }
}

impl fmt::Debug for Providers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Providers")
    }
}

impl Providers {
    /// Asks them by these settings. Nothing is sent before the first question.
    ///
    /// # Errors
    /// `ca_file` cannot be read or has no CA certificate; the text names it.
    pub fn new(settings: ProviderSettings) -> Result<Self, String> {
        Ok(Self(Arc::new(Inner { fetch: Fetch::new(settings)?, metadatas: Metadatas::default() })))
    }

    /// The URL to send the browser to.
    ///
    /// # Errors
    /// The provider's metadata cannot be had. Accounts of our own are not asked
    /// here: `Refused`.
    pub async fn authorize(&self, provider: &Arc<Provider>, ask: Ask<'_>) -> Result<String, Failed> {
        match provider.kind {
            ProviderKind::Oidc => oidc::authorize(&self.0, provider, ask).await,
            ProviderKind::Github => github::authorize(provider, ask),
            ProviderKind::Facebook => facebook::authorize(provider, ask),
            ProviderKind::Local => Err(not_here()),
        }
    }

    /// Redeems a code, once, and says who logged in.
    ///
    /// # Errors
    /// The provider is down, or nothing of it is to be believed. Never tried again:
    /// a code that is used twice may revoke what it gave (RFC 6749 §4.1.2).
    /// Accounts of our own have no codes: `Refused`.
    pub async fn redeem(&self, provider: &Arc<Provider>, ask: Ask<'_>, code: &str) -> Result<Identity, Failed> {
        match provider.kind {
            ProviderKind::Oidc => Box::pin(oidc::redeem(&self.0, provider, ask, code)).await,
            ProviderKind::Github => Box::pin(github::redeem(&self.0.fetch, provider, ask, code)).await,
            ProviderKind::Facebook => Box::pin(facebook::redeem(&self.0.fetch, provider, ask, code)).await,
            ProviderKind::Local => Err(not_here()),
        }
    }

    /// Whether its callbacks must carry `iss` (RFC 9207), and which one.
    ///
    /// # Errors
    /// The provider's metadata cannot be had.
    pub async fn callback_issuer(&self, provider: &Arc<Provider>) -> Result<Option<String>, Failed> {
        match provider.kind {
            ProviderKind::Oidc => oidc::callback_issuer(&self.0, provider).await,
            // Neither says who it is.
            ProviderKind::Github | ProviderKind::Facebook | ProviderKind::Local => Ok(None),
        }
    }

    /// Where to send the browser to end the provider's own session, if it has such
    /// a place (RP-Initiated Logout 1.0); `back` is where it shall return.
    pub async fn end_session(&self, provider: &Arc<Provider>, back: &str) -> Option<String> {
        match provider.kind {
            ProviderKind::Oidc => oidc::end_session(&self.0, provider, back).await,
            ProviderKind::Github | ProviderKind::Facebook | ProviderKind::Local => None,
        }
    }

    /// What a logout token of this provider says. That its `jti` was not seen
    /// before is up to the caller.
    ///
    /// # Errors
    /// It is not to be believed, or its keys cannot be had. Only OpenID Connect has
    /// such tokens: `Refused` for the other kinds.
    pub async fn logout_token(&self, provider: &Arc<Provider>, token: &str) -> Result<LoggedOut, Failed> {
        match provider.kind {
            ProviderKind::Oidc => Box::pin(logout::read(&self.0, provider, token)).await,
            ProviderKind::Github | ProviderKind::Facebook | ProviderKind::Local => {
                Err(Failed::Refused(format!("kind {} has no logout tokens", provider.kind.as_str())))
            }
        }
    }
}

fn not_here() -> Failed {
    Failed::Refused("accounts of our own are not asked for over the network".into())
}

/// How far a provider's clock and ours may be apart, in seconds.
const SKEW: u64 = 60;

/// How old a token may be when it comes, in seconds: it was made for this request.
const AGE_MAX: u64 = 600;

/// Whether a token was made just now.
///
/// # Errors
/// It was not; by how much.
fn made_now(at: f64) -> Result<(), String> {
    let now = now();
    if at > now + SKEW as f64 {
        return Err(format!("the token was issued {} s in the future", (at - now).round()));
    }
    if at < now - AGE_MAX as f64 {
        return Err(format!("the token was issued {} s ago", (now - at).round()));
    }
    Ok(())
}

/// In seconds of Unix time.
fn now() -> f64 {
    Moment::of(SystemTime::now()).0 as f64
}
