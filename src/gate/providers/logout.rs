//! Logout tokens (OpenID Connect Back-Channel Logout 1.0): anybody can send one, so
//! nothing of it counts before all of it was checked, the cheap things first.

use std::sync::Arc;

use data_encoding::BASE64URL_NOPAD;
use openidconnect::core::{CoreJsonWebKey, CoreJwsSigningAlgorithm};
use openidconnect::{JsonWebKey, SignatureVerificationError};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::metadata::{Known, Metadatas};
use super::{Failed, Inner, LoggedOut, SKEW, made_now, now, oauth, oidc};
use crate::model::Provider;

/// Longest token, in bytes: real ones stay below 2 KiB.
const TOKEN_MAX: usize = 16 << 10;

/// How many keys are tried on a token that names none.
const KEYS_MAX: usize = 8;

/// The member of `events` that makes it a logout token (§2.4).
const EVENT: &str = "http://schemas.openid.net/event/backchannel-logout";

/// The head of a signed token (RFC 7515 §4.1), as far as it matters here.
#[derive(Deserialize)]
pub(super) struct Header {
    alg: String,
    #[serde(default)]
    pub(super) kid: Option<String>,
    #[serde(default)]
    typ: Option<String>,
    #[serde(default)]
    crit: Option<Value>,
}

impl Header {
    /// The head of a token, not verified.
    pub(super) fn of(token: &str) -> Option<Self> {
        let (head, _) = token.split_once('.')?;
        serde_json::from_slice(&BASE64URL_NOPAD.decode(head.as_bytes()).ok()?).ok()
    }

    fn algorithm(&self) -> Option<CoreJwsSigningAlgorithm> {
        let found: CoreJwsSigningAlgorithm = serde_json::from_value(Value::String(self.alg.clone())).ok()?;
        oidc::ALGORITHMS.contains(&found).then_some(found)
    }

    /// RFC 7515 §4.1.9: with or without `application/`, in any case.
    fn is_logout(&self) -> bool {
        let Some(typ) = &self.typ else { return true };
        let typ = typ.to_ascii_lowercase();
        matches!(typ.strip_prefix("application/").unwrap_or(&typ), "logout+jwt" | "jwt")
    }
}

/// A token in its parts.
struct Token<'a> {
    header: Header,
    claims: Map<String, Value>,
    signed: &'a str,
    signature: Vec<u8>,
}

impl<'a> Token<'a> {
    fn of(text: &'a str) -> Option<Self> {
        let (signed, signature) = text.rsplit_once('.')?;
        let (_, claims) = signed.split_once('.')?;
        Some(Self {
            header: Header::of(text)?,
            claims: serde_json::from_slice(&BASE64URL_NOPAD.decode(claims.as_bytes()).ok()?).ok()?,
            signed,
            signature: BASE64URL_NOPAD.decode(signature.as_bytes()).ok()?,
        })
    }

    fn text(&self, claim: &str) -> Option<&str> {
        self.claims.get(claim)?.as_str()
    }
}

pub(super) async fn read(inner: &Arc<Inner>, provider: &Arc<Provider>, token: &str) -> Result<LoggedOut, Failed> {
    let refuse = |why: &str| Failed::Refused(format!("a logout token {why}"));
    let known = Metadatas::known(inner, provider).await?;
    if token.len() > TOKEN_MAX {
        return Err(refuse("is too long"));
    }
    let token = Token::of(token).ok_or_else(|| refuse("is unreadable"))?;
    let issuer = known.metadata.issuer().as_str();
    let logged_out = check(&token, provider, issuer).map_err(|why| refuse(&why))?;
    let algorithm = token.header.algorithm().ok_or_else(|| refuse("is signed by an algorithm that is not allowed"))?;
    let verdict = match verify(&token, &algorithm, &known) {
        Err(Unsigned::NoKey) => {
            let newer = Metadatas::newer_keys(inner, provider, &known).await?;
            verify(&token, &algorithm, &newer)
        }
        done => done,
    };
    match verdict {
        Ok(()) => Ok(logged_out),
        Err(Unsigned::NoKey) => Err(refuse("is signed by a key that the provider does not publish")),
        Err(Unsigned::Bad) => Err(refuse("has a bad signature")),
    }
}

/// Everything but the signature (§2.6).
fn check(token: &Token<'_>, provider: &Provider, issuer: &str) -> Result<LoggedOut, String> {
    let is = |good: bool, why: &str| if good { Ok(()) } else { Err(why.to_owned()) };
    is(token.header.is_logout(), "is something else by its head")?;
    is(token.header.crit.is_none(), "has a head that must be understood and is not")?;
    is(token.text("iss") == Some(issuer), "is of another issuer")?;
    let ours = |aud: &Value| aud.as_str() == Some(&provider.client_id);
    let aud = token.claims.get("aud");
    let for_us = aud.is_some_and(|aud| ours(aud) || aud.as_array().is_some_and(|all| all.iter().any(ours)));
    is(for_us, "is for another client (aud)")?;
    let number = |claim: &str| token.claims.get(claim).map(|value| value.as_f64().unwrap_or(f64::NAN));
    let issued = number("iat").filter(|at| at.is_finite()).ok_or("does not say when it was issued")?;
    made_now(issued).map_err(|why| format!("is not of now: {why}"))?;
    // Not a number is no later than anything.
    is(number("exp").is_none_or(|exp| exp > now() - SKEW as f64), "has expired")?;
    is(number("nbf").is_none_or(|nbf| nbf <= now() + SKEW as f64), "does not count yet (nbf)")?;
    let event = token.claims.get("events").and_then(|events| events.get(EVENT));
    is(event.is_some_and(Value::is_object), "is of no logout (events)")?;
    // So that no ID token passes for one.
    is(!token.claims.contains_key("nonce"), "has a nonce")?;
    let name = |claim: &str| match token.claims.get(claim) {
        None => Ok(None),
        Some(value) => oauth::bounded(claim, value.as_str().unwrap_or_default()).map(Some),
    };
    let name = |claim: &str| name(claim).map_err(|_| format!("has no usable {claim}"));
    let (subject, provider_session) = (name("sub")?, name("sid")?);
    is(subject.is_some() || provider_session.is_some(), "says neither whose (sub) nor which (sid) login ends")?;
    let jti = name("jti")?.ok_or("has no jti")?;
    Ok(LoggedOut { issuer: issuer.to_owned(), subject, provider_session, jti })
}

enum Unsigned {
    NoKey,
    Bad,
}

fn verify(token: &Token<'_>, algorithm: &CoreJwsSigningAlgorithm, known: &Known) -> Result<(), Unsigned> {
    let kid = token.header.kid.as_deref();
    let named = |key: &&CoreJsonWebKey| kid.is_none() || key.key_id().map(|id| id.as_str()) == kid;
    let mut verdict = Err(Unsigned::NoKey);
    for key in known.metadata.jwks().keys().iter().filter(named).take(KEYS_MAX) {
        // It refuses keys of another type, use or algorithm by itself.
        match key.verify_signature(algorithm, token.signed.as_bytes(), &token.signature) {
            Ok(()) => return Ok(()),
            Err(SignatureVerificationError::CryptoError(_)) => verdict = Err(Unsigned::Bad),
            Err(_) => {}
        }
    }
    verdict
}
