//! OpenID Connect: authorization, the ID token and everything about it that must
//! hold, addresses, where logins end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use openidconnect::core::{
    CoreGenderClaim, CoreJsonWebKey, CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm,
};
use openidconnect::url::Url;
use openidconnect::{
    AdditionalClaims, ClaimsVerificationError, ClientId, IdTokenClaims, IdTokenVerifier, Nonce,
    SignatureVerificationError,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::fetch::What;
use super::metadata::{Known, Metadatas};
use super::{Ask, Failed, Inner, SKEW, made_now, now, oauth};
use crate::gate::identity::Identity;
use crate::model::Provider;
use crate::model::identity::Email;

/// The signatures that count, whatever a provider lists: by its published keys, and
/// never by the secret that we share with it.
pub(super) const ALGORITHMS: [CoreJwsSigningAlgorithm; 5] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
    CoreJwsSigningAlgorithm::EcdsaP384Sha384,
    CoreJwsSigningAlgorithm::EdDsa,
];

/// What of an ID token the crate does not know. Any value is read, so that an odd one
/// is refused by its name.
#[derive(Debug, Default, Serialize, Deserialize)]
struct More {
    #[serde(default)]
    hd: Option<Value>,
    #[serde(default)]
    sid: Option<Value>,
    #[serde(default)]
    nbf: Option<Value>,
}

impl AdditionalClaims for More {}

type IdToken =
    openidconnect::IdToken<More, CoreGenderClaim, CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm>;
type Claims = IdTokenClaims<More, CoreGenderClaim>;

pub(super) async fn authorize(inner: &Arc<Inner>, provider: &Arc<Provider>, ask: Ask<'_>) -> Result<String, Failed> {
    let known = Metadatas::known(inner, provider).await?;
    let mut scopes = vec!["openid"];
    scopes.extend(provider.scopes.iter().map(String::as_str).filter(|scope| *scope != "openid"));
    let mut more = vec![("nonce", ask.nonce)];
    if ask.choose_account {
        more.push(("prompt", "select_account"));
    }
    let at = known.metadata.authorization_endpoint().url().clone();
    Ok(oauth::authorize_url(at, provider, &scopes.join(" "), ask, &more))
}

pub(super) async fn callback_issuer(inner: &Arc<Inner>, provider: &Arc<Provider>) -> Result<Option<String>, Failed> {
    let known = Metadatas::known(inner, provider).await?;
    let says = known.metadata.additional_metadata().authorization_response_iss_parameter_supported;
    Ok(says.unwrap_or(false).then(|| known.metadata.issuer().as_str().to_owned()))
}

pub(super) async fn end_session(inner: &Arc<Inner>, provider: &Arc<Provider>, back: &str) -> Option<String> {
    let known = Metadatas::known(inner, provider).await.ok()?;
    // That it is https was seen to when the metadata came.
    let mut at = Url::parse(known.metadata.additional_metadata().end_session_endpoint.as_deref()?).ok()?;
    at.set_fragment(None);
    at.query_pairs_mut().append_pair("client_id", &provider.client_id).append_pair("post_logout_redirect_uri", back);
    Some(at.into())
}

pub(super) async fn redeem(
    inner: &Arc<Inner>,
    provider: &Arc<Provider>,
    ask: Ask<'_>,
    code: &str,
) -> Result<Identity, Failed> {
    let known = Metadatas::known(inner, provider).await?;
    let endpoint = known.metadata.token_endpoint();
    let endpoint = endpoint.ok_or_else(|| Failed::Refused("its metadata names no token endpoint".into()))?;
    let secret = oauth::secret(provider, inner.fetch.settings().secrets.as_deref()).await?;
    let secret = secret.as_deref();
    let tokens =
        oauth::redeem(&inner.fetch, provider, endpoint.as_str(), secret, provider.client_auth, ask, code).await?;
    let text = tokens.id_token.as_deref().ok_or_else(|| Failed::Refused("it gave no ID token".into()))?;
    // Its error would quote the token.
    let token: IdToken = text.parse().map_err(|_| Failed::Refused("its ID token is unreadable".into()))?;

    let nonce = Nonce::new(ask.nonce.to_owned());
    let claims = match verify(&known, provider, &token, &nonce) {
        Err(error) if wants_newer_keys(&error, text) => {
            let newer = Metadatas::newer_keys(inner, provider, &known).await?;
            verify(&newer, provider, &token, &nonce)
        }
        done => done,
    };
    let claims = claims.map_err(|error| Failed::Refused(unbelieved(&error)))?;
    check(claims, provider)?;

    let subject = oauth::bounded("subject", claims.subject().as_str())?;
    let more = claims.additional_claims();
    let provider_session = match &more.sid {
        None => None,
        Some(sid) => Some(oauth::bounded("session", sid.as_str().unwrap_or_default())?),
    };
    let mut address = claims.email().map(|email| email.as_str().to_owned());
    let mut verified = claims.email_verified().unwrap_or(false);
    let mut hd = more.hd.as_ref().and_then(Value::as_str).map(str::to_owned);
    if address.is_none()
        && let Some(at) = known.metadata.userinfo_endpoint()
    {
        let access = tokens.access()?;
        let info = user_info(inner, provider, at.as_str(), access, &subject).await?;
        (address, verified) = (info.email, info.email_verified.is_some_and(|told| is_true(&told)));
        hd = hd.or(info.hd);
    }
    let email = oauth::email(provider, address.as_deref(), verified);
    let domain_vouched = email.as_ref().is_some_and(|email| !provider.require_hd || vouches(hd.as_deref(), email));
    Ok(Identity {
        provider: provider.id.clone(),
        issuer: known.metadata.issuer().as_str().to_owned(),
        subject,
        email,
        domain_vouched,
        provider_session,
        // Some say 0 where they do not know; none can know the future.
        auth_time: claims
            .auth_time()
            .and_then(|at| u64::try_from(at.timestamp()).ok())
            .filter(|at| *at > 0)
            .map(|at| at.min(now() as u64)),
    })
}

/// What the crate checks, with the bounds it leaves open: signature by a published
/// key and an algorithm of ours, `typ`, `iss`, `aud`, `exp`, `iat`, `nonce`.
fn verify<'t>(
    known: &Known,
    provider: &Provider,
    token: &'t IdToken,
    nonce: &Nonce,
) -> Result<&'t Claims, ClaimsVerificationError> {
    let metadata = &known.metadata;
    // A public client's verifier never takes our secret for a key.
    let verifier: IdTokenVerifier<'_, CoreJsonWebKey> = IdTokenVerifier::new_public_client(
        ClientId::new(provider.client_id.clone()),
        metadata.issuer().clone(),
        metadata.jwks().clone(),
    )
    .set_allowed_algs(ALGORITHMS)
    .set_time_fn(|| (SystemTime::now() - Duration::from_secs(SKEW)).into())
    .set_issue_time_verifier_fn(|at| made_now(at.timestamp() as f64));
    token.claims(&verifier, nonce)
}

/// What the crate leaves out.
fn check(claims: &Claims, provider: &Provider) -> Result<(), Failed> {
    let refuse = |why: &str| Err(Failed::Refused(why.to_owned()));
    if claims.authorized_party().is_some_and(|party| party.as_str() != provider.client_id) {
        return refuse("its ID token is for another client (azp)");
    }
    match &claims.additional_claims().nbf {
        None => {}
        Some(nbf) => match nbf.as_f64() {
            Some(nbf) if nbf <= now() + SKEW as f64 => {}
            Some(_) => return refuse("its ID token does not count yet (nbf)"),
            None => return refuse("its ID token does not say when it counts (nbf)"),
        },
    }
    Ok(())
}

/// Whether newer keys may change the verdict: none matched, or the token names none
/// and the one tried may have been replaced.
fn wants_newer_keys(error: &ClaimsVerificationError, token: &str) -> bool {
    match error {
        ClaimsVerificationError::SignatureVerification(SignatureVerificationError::NoMatchingKey) => true,
        ClaimsVerificationError::SignatureVerification(SignatureVerificationError::CryptoError(_)) => {
            super::logout::Header::of(token).is_some_and(|header| header.kid.is_none())
        }
        _ => false,
    }
}

/// The crate's errors, in words of ours: theirs quote the token.
fn unbelieved(error: &ClaimsVerificationError) -> String {
    use SignatureVerificationError as S;
    let why = match error {
        ClaimsVerificationError::Expired(_) => return format!("its ID token is not of now: {}", time_of(error)),
        ClaimsVerificationError::InvalidAudience(_) => "is for another client (aud)",
        ClaimsVerificationError::InvalidIssuer(_) => "is of another issuer",
        ClaimsVerificationError::InvalidNonce(_) => "is of another login (nonce)",
        ClaimsVerificationError::SignatureVerification(error) => match error {
            S::NoMatchingKey => "is signed by a key that the provider does not publish",
            S::AmbiguousKeyId(_) => "does not tell which of the provider's keys signed it",
            S::DisallowedAlg(_) | S::UnsupportedAlg(_) => "is signed by an algorithm that is not allowed",
            S::NoSignature => "is not signed",
            S::InvalidKey(_) => "is signed by a key that cannot be used for it",
            _ => "has a bad signature",
        },
        ClaimsVerificationError::Unsupported(_) => "is no ID token by its head",
        _ => "is not to be believed",
    };
    format!("its ID token {why}")
}

/// Of an error of time only what we wrote ourselves.
fn time_of(error: &ClaimsVerificationError) -> String {
    match error {
        ClaimsVerificationError::Expired(ours) if ours.starts_with("the token was issued ") => ours.clone(),
        _ => "it has expired".into(),
    }
}

/// Of the userinfo endpoint's answer (OpenID Connect Core 1.0 §5.3.2).
#[derive(Deserialize)]
struct UserInfo {
    sub: String,
    #[serde(default)]
    email: Option<String>,
    #[serde(default)]
    email_verified: Option<Value>,
    #[serde(default)]
    hd: Option<String>,
}

async fn user_info(
    inner: &Inner,
    provider: &Provider,
    at: &str,
    access: &str,
    subject: &str,
) -> Result<UserInfo, Failed> {
    let info: UserInfo =
        oauth::get_json(&inner.fetch, provider, What::UserInfo, at, "application/json", access).await?;
    // §5.3.4: it may be of somebody else, if the token was swapped.
    if info.sub != subject {
        return Err(Failed::Refused("its userinfo is of another subject".into()));
    }
    Ok(info)
}

/// Some providers send this boolean as a string (AWS Cognito).
fn is_true(told: &Value) -> bool {
    told.as_bool().unwrap_or(false) || told.as_str() == Some("true")
}

/// Whether `hd` names the domain of the address, both in their one form.
fn vouches(hd: Option<&str>, email: &Email) -> bool {
    hd.and_then(|hd| format!("a@{hd}").parse::<Email>().ok()).is_some_and(|of| of.domain() == email.domain())
}
