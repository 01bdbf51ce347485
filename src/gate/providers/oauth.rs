//! What OAuth 2.0 asks of all kinds of providers: the URL of an authorization with
//! PKCE, the one token request, the client's secret, requests with a token.

use std::path::Path;

use aws_lc_rs::digest;
use data_encoding::{BASE64, BASE64URL_NOPAD};
use hyper::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderValue};
use hyper::{Request, Response, StatusCode};
use openidconnect::url::{Url, form_urlencoded};
use serde::Deserialize;
use serde_json::Value;

use super::fetch::{Fetch, What};
use super::{Ask, Failed};
use crate::model::Provider;
use crate::model::identity::{ClientAuth, Email};

/// Longest code and token that we pass on, in bytes: real ones stay below 4 KiB.
const TOKEN_MAX: usize = 16 << 10;

/// Longest subject, in bytes (OpenID Connect Core 1.0 §2), and name of a session.
const SUBJECT_MAX: usize = 255;

/// Largest file of a secret, in bytes.
const SECRET_MAX: u64 = 4096;

/// The errors that we repeat to our log: codes of RFC 6749 §4.1.2.1 and §5.2 and of
/// GitHub. Anything else could be anything.
const KNOWN_ERRORS: &[&str] = &[
    "invalid_request",
    "invalid_client",
    "invalid_grant",
    "unauthorized_client",
    "unsupported_grant_type",
    "unsupported_response_type",
    "invalid_scope",
    "access_denied",
    "server_error",
    "temporarily_unavailable",
    "incorrect_client_credentials",
    "redirect_uri_mismatch",
    "bad_verification_code",
    "unverified_user_email",
    "application_suspended",
];

/// The URL that begins an authorization (RFC 6749 §4.1.1, RFC 7636 §4.3).
pub(super) fn authorize_url(
    mut at: Url,
    provider: &Provider,
    scopes: &str,
    ask: Ask<'_>,
    more: &[(&str, &str)],
) -> String {
    at.set_fragment(None);
    {
        let mut query = at.query_pairs_mut();
        query
            .append_pair("response_type", "code")
            .append_pair("client_id", &provider.client_id)
            .append_pair("redirect_uri", ask.redirect_uri)
            .append_pair("scope", scopes)
            .append_pair("state", ask.state)
            .append_pair("code_challenge", &challenge(ask.verifier))
            .append_pair("code_challenge_method", "S256");
        for (name, value) in more {
            query.append_pair(name, value);
        }
    }
    at.into()
}

/// PKCE's challenge by S256 (RFC 7636 §4.2).
fn challenge(verifier: &str) -> String {
    BASE64URL_NOPAD.encode(digest::digest(&digest::SHA256, verifier.as_bytes()).as_ref())
}

/// What a token endpoint gave.
#[derive(Deserialize)]
pub(super) struct Tokens {
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    pub(super) id_token: Option<String>,
    #[serde(default)]
    error: Option<Value>,
}

impl Tokens {
    /// The access token.
    ///
    /// # Errors
    /// There is none that can be sent.
    pub(super) fn access(&self) -> Result<&str, Failed> {
        let sound =
            |token: &&str| !token.is_empty() && token.len() <= TOKEN_MAX && token.bytes().all(|b| b.is_ascii_graphic());
        self.access_token
            .as_deref()
            .filter(sound)
            .ok_or_else(|| Failed::Refused("it gave no usable access token".into()))
    }
}

/// Sends a code to the token endpoint (RFC 6749 §4.1.3), exactly once: whether a
/// lost answer redeemed it cannot be known, and a code that comes twice may revoke
/// what it gave.
///
/// # Errors
/// It is down, or refuses the code or us.
pub(super) async fn redeem(
    fetch: &Fetch,
    provider: &Provider,
    at: &str,
    secret: Option<&str>,
    auth: ClientAuth,
    ask: Ask<'_>,
    code: &str,
) -> Result<Tokens, Failed> {
    if code.is_empty() || code.len() > TOKEN_MAX {
        return Err(Failed::Refused("the code is empty or too long".into()));
    }
    let form = {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("grant_type", "authorization_code")
            .append_pair("code", code)
            .append_pair("redirect_uri", ask.redirect_uri)
            .append_pair("code_verifier", ask.verifier);
        match (auth, secret) {
            (ClientAuth::Basic, Some(_)) => {}
            (ClientAuth::Post, Some(secret)) => {
                form.append_pair("client_id", &provider.client_id).append_pair("client_secret", secret);
            }
            (_, None) => {
                form.append_pair("client_id", &provider.client_id);
            }
        }
        form.finish()
    };
    let mut request = Request::post(at)
        .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
        .header(ACCEPT, "application/json")
        .body(form.into_bytes())
        .map_err(|_| Failed::Down("its token endpoint is no URL".into()))?;
    if let (ClientAuth::Basic, Some(secret)) = (auth, secret) {
        // RFC 6749 §2.3.1: both as in a form, and then as for Basic.
        let encoded = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
        let both = format!("{}:{}", encoded(&provider.client_id), encoded(secret));
        let mut value = HeaderValue::try_from(format!("Basic {}", BASE64.encode(both.as_bytes())))
            .map_err(|_| Failed::Down("the client's secret cannot be sent".into()))?;
        value.set_sensitive(true);
        request.headers_mut().insert(AUTHORIZATION, value);
    }
    let answer = fetch.send(provider, What::Token, request).await.map_err(|error| Failed::Down(error.to_string()))?;
    let status = answer.status();
    let tokens = serde_json::from_slice::<Tokens>(answer.body());
    // GitHub sends errors with the status of a success.
    let error = tokens.as_ref().ok().and_then(|tokens| tokens.error.as_ref());
    if status == StatusCode::OK && error.is_none() {
        return tokens.map_err(|_| Failed::Refused("its token answer is unreadable".into()));
    }
    let known = error.and_then(|error| KNOWN_ERRORS.iter().find(|known| error.as_str() == Some(known)));
    let text =
        format!("its token endpoint answered {}: {}", status.as_u16(), known.unwrap_or(&"no error that is known"));
    let down = matches!(known, Some(&"server_error" | &"temporarily_unavailable")) || is_down(status);
    Err(if down { Failed::Down(text) } else { Failed::Refused(text) })
}

/// Whether a status says that another time might be better.
fn is_down(status: StatusCode) -> bool {
    status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS
}

/// Asks what an access token opens, as JSON (RFC 6750 §2.1).
///
/// # Errors
/// It is down, or its answer is no JSON and no success.
pub(super) async fn get_json<T: for<'de> Deserialize<'de>>(
    fetch: &Fetch,
    provider: &Provider,
    what: What,
    at: &str,
    accept: &str,
    token: &str,
) -> Result<T, Failed> {
    let unsendable = || Failed::Down("what it is asked at is no URL".into());
    let mut bearer = HeaderValue::try_from(format!("Bearer {token}")).map_err(|_| unsendable())?;
    bearer.set_sensitive(true);
    let request = Request::get(at)
        .header(ACCEPT, accept)
        .header(AUTHORIZATION, bearer)
        .body(Vec::new())
        .map_err(|_| unsendable())?;
    let answer: Response<Vec<u8>> =
        fetch.send(provider, what, request).await.map_err(|error| Failed::Down(error.to_string()))?;
    let status = answer.status();
    if status != StatusCode::OK {
        let text = format!("answered {} to a request with its token", status.as_u16());
        return Err(if is_down(status) { Failed::Down(text) } else { Failed::Refused(text) });
    }
    // Its error would quote the answer.
    serde_json::from_slice(answer.body())
        .map_err(|_| Failed::Refused("what it says of the visitor is unreadable".into()))
}

/// A name of somebody or something as it may go into records, cookies and header
/// fields.
///
/// # Errors
/// It is empty, longer than 255 bytes, or not ASCII that can be seen.
pub(super) fn bounded(what: &str, name: &str) -> Result<String, Failed> {
    let sound = (1..=SUBJECT_MAX).contains(&name.len()) && name.bytes().all(|b| (b' '..=b'~').contains(&b));
    sound
        .then(|| name.to_owned())
        .ok_or_else(|| Failed::Refused(format!("its {what} is not 1 to 255 ASCII characters")))
}

/// The address, if it is one and counts: the provider says that it is verified, or
/// is trusted without.
pub(super) fn email(provider: &Provider, address: Option<&str>, verified: bool) -> Option<Email> {
    let email = address?.parse::<Email>().ok();
    if email.is_none() || !(verified || provider.trust_email) {
        tracing::debug!(provider = %provider.id, verified, "an address does not count");
    }
    email.filter(|_| verified || provider.trust_email)
}

/// The client's secret: the record's, else that of its file in `folder`, read now so
/// that a new one counts at once. None where the record names neither.
///
/// # Errors
/// The file is not a small regular one in the folder, or is empty.
pub(super) async fn secret(provider: &Provider, folder: Option<&Path>) -> Result<Option<String>, Failed> {
    if let Some(secret) = &provider.client_secret {
        return Ok(Some(secret.clone()));
    }
    let Some(name) = provider.client_secret_file.clone() else { return Ok(None) };
    let unusable = |why: &str| Failed::Down(format!("client_secret_file {}: {why}", name.escape_debug()));
    let Some(folder) = folder.map(Path::to_owned) else { return Err(unusable("gate.secrets names no folder")) };
    let asked = name.clone();
    let read = tokio::task::spawn_blocking(move || read_secret(&folder, &asked)).await;
    match read {
        Ok(Ok(secret)) => Ok(Some(secret)),
        Ok(Err(why)) => Err(unusable(&why)),
        Err(_) => Err(unusable("cannot be read")),
    }
}

fn read_secret(folder: &Path, name: &str) -> Result<String, String> {
    use std::io::Read;
    let said = |error: std::io::Error| error.kind().to_string();
    // The record was checked for it, but what it costs if not is any file at all.
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err("is not a bare file name".into());
    }
    // A link is fine (Kubernetes makes them) as long as it stays in the folder.
    let folder = folder.canonicalize().map_err(said)?;
    let path = folder.join(name).canonicalize().map_err(said)?;
    if !path.starts_with(&folder) || !path.is_file() {
        return Err("is not a regular file in gate.secrets".into());
    }
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(said)?;
    file.take(SECRET_MAX + 1).read_to_string(&mut text).map_err(said)?;
    let secret = text.trim();
    if secret.is_empty() || text.len() as u64 > SECRET_MAX {
        return Err(format!("is empty or larger than {SECRET_MAX} bytes"));
    }
    Ok(secret.to_owned())
}

/// Where an API is, without a slash at its end.
pub(super) fn base<'a>(of_record: Option<&'a crate::model::identity::Url>, usual: &'a str) -> &'a str {
    of_record.map_or(usual, |url| url.as_str()).trim_end_matches('/')
}

/// Who vouches, where a provider does not say itself: the usual one, or where the
/// record has it elsewhere (GitHub Enterprise), that place, because the same number
/// is somebody else there.
pub(super) fn issuer(usual: &str, provider: &Provider) -> String {
    let Some(elsewhere) = &provider.api_url else { return usual.to_owned() };
    Url::parse(elsewhere.as_str()).map_or_else(|_| usual.to_owned(), |url| url.origin().ascii_serialization())
}
