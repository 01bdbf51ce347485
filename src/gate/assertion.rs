//! What the origin is told of who asks: headers, and a short-lived signed token
//! that it can check against `https://AUTH/.adit/jwks.json`. Whatever the visitor
//! sent that could pass for it goes first.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use dashmap::DashMap;
use data_encoding::BASE64URL_NOPAD;
use hyper::header::{AUTHORIZATION, COOKIE, HeaderMap, HeaderName, HeaderValue};
use serde_json::json;

use super::who::Who;
use crate::logins::seal::Seals;
use crate::model::KeyId;
use crate::model::identity::{Email, Moment};

const USER: HeaderName = HeaderName::from_static("x-adit-user");
const KIND: HeaderName = HeaderName::from_static("x-adit-user-kind");
const EMAIL: HeaderName = HeaderName::from_static("x-adit-user-email");
const SUBJECT: HeaderName = HeaderName::from_static("x-adit-user-sub");
const PROVIDER: HeaderName = HeaderName::from_static("x-adit-user-idp");
const JWT: HeaderName = HeaderName::from_static("x-adit-jwt");

/// How long a token counts, in seconds.
const LIFE: u64 = 300;
/// How long one is used again, in seconds.
const REUSE: u64 = 60;
/// Most tokens that are kept; beyond, all are forgotten at once.
const KEPT_MAX: usize = 100_000;

/// What programs take for what we say.
const SPOOFS_OF_OURS: &[&str] = &["x-adit-", "adit-"];
/// The same, and what origins commonly take for who somebody is, in lower case with
/// `-` for `_`: names, or beginnings of them.
const SPOOFS: [&str; 22] = [
    "x-adit-",
    "adit-",
    "x-forwarded-user",
    "x-forwarded-email",
    "x-forwarded-groups",
    "x-forwarded-preferred-username",
    "x-forwarded-access-token",
    "x-auth-request-",
    "remote-",
    "x-remote-",
    "x-webauth-",
    "x-authenticated-",
    "x-goog-authenticated-user-",
    "x-goog-iap-",
    "x-amzn-oidc-",
    "x-authentik-",
    "x-ms-client-principal",
    "x-pomerium-",
    "cf-access-",
    "tailscale-user-",
    // Not who, but where: some origins serve what these name instead of the path.
    "x-original-url",
    "x-rewrite-url",
];

/// Takes out what is somebody's, or makes an origin take a request for another one.
pub(super) fn strip_person(headers: &mut HeaderMap) {
    headers.remove(COOKIE);
    headers.remove(AUTHORIZATION);
    for name in ["x-http-method-override", "x-http-method", "x-method-override"] {
        headers.remove(name);
    }
}

/// Takes out what could pass for what we say: all that begins with `x-adit-` and,
/// where the gate tells who somebody is, what origins commonly believe. Case and
/// `_` for `-` make no difference, as they make none to origins.
pub fn strip(headers: &mut HeaderMap, gated: bool) {
    let fakes = if gated { SPOOFS.as_slice() } else { SPOOFS_OF_OURS };
    let fake = |name: &&HeaderName| is_fake(name.as_str().as_bytes(), fakes);
    if headers.keys().any(|name| fake(&name)) {
        let fakes: Vec<HeaderName> = headers.keys().filter(fake).cloned().collect();
        for name in fakes {
            headers.remove(name);
        }
    }
}

/// Whether a name begins like one of these. Most names end at the first letter or,
/// of those with `x-`, at the third.
fn is_fake(name: &[u8], fakes: &[&str]) -> bool {
    let same = |a: u8, b: u8| a == b || (a == b'_' && b == b'-');
    let (Some(first @ (b'x' | b'a' | b'r' | b'c' | b't')), Some(third)) = (name.first(), name.get(2)) else {
        return false;
    };
    fakes.iter().map(|fake| fake.as_bytes()).any(|fake| {
        fake.first() == Some(first)
            && fake.get(2).is_some_and(|b| same(*third, *b))
            && name.get(..fake.len()).is_some_and(|start| start.iter().zip(fake).all(|(a, b)| same(*a, *b)))
    })
}

/// What one visitor's requests tell one origin.
#[derive(Debug, Clone)]
pub(super) struct Told {
    at: Moment,
    /// The key that signed.
    kid: Option<KeyId>,
    fields: Arc<[(HeaderName, HeaderValue)]>,
}

impl Told {
    fn new(who: &Who, host: &str, issuer: &str, seals: Option<&Seals>, now: Moment) -> Self {
        let token = seals.and_then(|seals| token(who, host, issuer, seals, now));
        let fields = fields(who).into_iter().chain(token.map(|token| (JWT, token))).collect();
        Self { at: now, kid: seals.and_then(|seals| seals.signing_kid(now)).cloned(), fields }
    }

    /// Whether it is told again: for a minute, and not past its key.
    fn lasts(&self, seals: Option<&Seals>, now: Moment) -> bool {
        now.0 < self.at.0 + REUSE
            && now >= self.at
            && self.kid.as_ref() == seals.and_then(|seals| seals.signing_kid(now))
    }
}

/// Signs, and keeps what was signed for a minute: of a login in its session, which is
/// one host's; of all others here.
#[derive(Debug, Default)]
pub(super) struct Assertions {
    hasher: RandomState,
    kept: DashMap<u64, Kept>,
}

#[derive(Debug)]
struct Kept {
    kind: &'static str,
    name: String,
    host: String,
    told: Told,
}

impl Assertions {
    /// Tells the origin of `host` who asks.
    pub(super) fn tell(
        &self,
        headers: &mut HeaderMap,
        who: &Who,
        host: &str,
        issuer: &str,
        seals: Option<&Seals>,
        now: Moment,
    ) {
        let anew = || Told::new(who, host, issuer, seals, now);
        let fields = match who {
            Who::Nobody => return,
            Who::Session(session) => {
                let mut told = session.told.0.lock();
                let told = match &mut *told {
                    Some(told) if told.lasts(seals, now) => told,
                    told => told.insert(anew()),
                };
                Arc::clone(&told.fields)
            }
            Who::User { .. } | Who::Token { .. } => self.kept(who, host, seals, now, anew),
        };
        for (name, value) in fields.iter() {
            headers.insert(name, value.clone());
        }
    }

    fn kept(
        &self,
        who: &Who,
        host: &str,
        seals: Option<&Seals>,
        now: Moment,
        anew: impl FnOnce() -> Told,
    ) -> Arc<[(HeaderName, HeaderValue)]> {
        let (kind, name) = (who.kind(), who.name());
        let at = self.hasher.hash_one((kind, name, host));
        if let Some(kept) = self.kept.get(&at)
            && (kept.kind, kept.name.as_str(), kept.host.as_str()) == (kind, name, host)
            && kept.told.lasts(seals, now)
        {
            return Arc::clone(&kept.told.fields);
        }
        let told = anew();
        if self.kept.len() >= KEPT_MAX {
            self.kept.clear();
        }
        let fields = Arc::clone(&told.fields);
        self.kept.insert(at, Kept { kind, name: name.to_owned(), host: host.to_owned(), told });
        fields
    }
}

fn fields(who: &Who) -> Vec<(HeaderName, HeaderValue)> {
    let mut said = vec![(KIND, who.kind())];
    match who {
        Who::Nobody => {}
        Who::User { name, .. } | Who::Token { name, .. } => said.push((USER, name)),
        Who::Session(session) => {
            if let Some(email) = &session.email {
                said.extend([(USER, email.as_str()), (EMAIL, email.as_str())]);
            }
            said.extend([(SUBJECT, session.subject.as_str()), (PROVIDER, session.provider.as_str())]);
        }
    }
    // Only what is the same to everybody: an address beyond ASCII is in the token.
    let plain = |value: &&str| value.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
    said.into_iter()
        .filter(|(_, value)| plain(value))
        .filter_map(|(name, value)| Some((name, HeaderValue::from_str(value).ok()?)))
        .collect()
}

fn token(who: &Who, host: &str, issuer: &str, seals: &Seals, now: Moment) -> Option<HeaderValue> {
    let mut claims = json!({
        "iss": issuer,
        "aud": host,
        "kind": who.kind(),
        "iat": now.0,
        "nbf": now.0.saturating_sub(LIFE / 5),
        "exp": now.0 + LIFE,
    });
    let fields = claims.as_object_mut()?;
    match who {
        Who::Session(session) => {
            fields.insert("sub".into(), session.subject.as_str().into());
            fields.insert("idp".into(), session.provider.as_str().into());
            fields.insert("idp_iss".into(), session.issuer.as_str().into());
            fields.insert("sid".into(), session.name.as_str().into());
            fields.insert("email".into(), session.email.as_ref().map(Email::as_str).into());
            fields.insert("auth_time".into(), session.auth_time.into());
        }
        Who::User { name, .. } | Who::Token { name, .. } => {
            fields.insert("sub".into(), name.as_str().into());
        }
        Who::Nobody => {}
    }
    let (message, signature) = seals.sign(now, |kid| {
        let head = json!({ "alg": "EdDSA", "typ": "JWT", "kid": kid.as_str() }).to_string();
        let part = |text: &str| BASE64URL_NOPAD.encode(text.as_bytes());
        format!("{}.{}", part(&head), part(&claims.to_string()))
    })?;
    HeaderValue::from_str(&format!("{message}.{}", BASE64URL_NOPAD.encode(&signature))).ok()
}

/// The keys that origins check tokens by (RFC 7517, RFC 8037), the next one among
/// them before it signs.
pub(super) fn jwks(seals: Option<&Seals>, now: Moment) -> serde_json::Value {
    let key = |(kid, public): (&crate::model::KeyId, &[u8])| {
        json!({
            "kty": "OKP",
            "crv": "Ed25519",
            "alg": "EdDSA",
            "use": "sig",
            "kid": kid.as_str(),
            "x": BASE64URL_NOPAD.encode(public),
        })
    };
    let keys: Vec<_> = seals.map(|seals| seals.public_keys(now).map(key).collect()).unwrap_or_default();
    json!({ "keys": keys })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_visitor_sends_passes_for_what_we_say() {
        let names = [
            "x-adit-user-email",
            "X-Adit-Jwt",
            "x_adit_jwt",
            "X_ADIT_user_email",
            "x-adit-anything",
            "Remote-User",
            "remote_user",
            "X-Forwarded-User",
            "x_forwarded_email",
            "X-Auth-Request-Email",
            "X-WEBAUTH-USER",
            "Adit-Service-Token",
        ];
        let mut headers = HeaderMap::new();
        for name in names {
            headers.append(name.parse::<HeaderName>().unwrap(), HeaderValue::from_static("eve"));
        }
        headers.append("x-other", HeaderValue::from_static("1"));
        headers.append("x-forwarded-for", HeaderValue::from_static("1"));
        let mut open = headers.clone();
        strip(&mut headers, true);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["x-forwarded-for", "x-other"]);
        // What has no gate keeps what is none of our business.
        strip(&mut open, false);
        assert!(open.contains_key("remote-user") && !open.contains_key("x_adit_jwt"));
    }
}
