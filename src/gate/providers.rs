//! Login providers as the gate asks them: where to send a browser, what a code is
//! worth, what a logout token says.

use std::sync::Arc;

use super::identity::Identity;
use crate::model::Provider;

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

/// Asks providers. Cheap to share.
#[derive(Debug, Default)]
pub struct Providers {}

impl Providers {
    /// The URL to send the browser to.
    ///
    /// # Errors
    /// The provider's metadata cannot be had.
    pub async fn authorize(&self, provider: &Arc<Provider>, ask: Ask<'_>) -> Result<String, Failed> {
        let _ = (provider, ask);
        Err(Failed::Down("not built".into()))
    }

    /// Redeems a code, once, and says who logged in.
    ///
    /// # Errors
    /// The provider is down, or nothing of it is to be believed. Never tried again:
    /// a code that is used twice may revoke what it gave (RFC 6749 §4.1.2).
    pub async fn redeem(&self, provider: &Arc<Provider>, ask: Ask<'_>, code: &str) -> Result<Identity, Failed> {
        let _ = (provider, ask, code);
        Err(Failed::Down("not built".into()))
    }

    /// Whether its callbacks must carry `iss` (RFC 9207), and which one.
    ///
    /// # Errors
    /// The provider's metadata cannot be had.
    pub async fn callback_issuer(&self, provider: &Arc<Provider>) -> Result<Option<String>, Failed> {
        let _ = provider;
        Ok(None)
    }

    /// Where to send the browser to end the provider's own session, if it has such
    /// a place (RP-Initiated Logout 1.0); `back` is where it shall return.
    pub async fn end_session(&self, provider: &Arc<Provider>, back: &str) -> Option<String> {
        let _ = (provider, back);
        None
    }

    /// What a logout token of this provider says.
    ///
    /// # Errors
    /// It is not to be believed, or its keys cannot be had.
    pub async fn logout_token(&self, provider: &Arc<Provider>, token: &str) -> Result<LoggedOut, Failed> {
        let _ = (provider, token);
        Err(Failed::Down("not built".into()))
    }
}
