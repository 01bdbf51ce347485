//! What a browser carries from step to step of a login, sealed, so that each step
//! can come to another node: nothing of a login is kept anywhere else. Pure.

use aws_lc_rs::digest;
use data_encoding::BASE64URL_NOPAD;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::session::{SKEW, Session};
use crate::logins::seal::{Closed, Place, Purpose, Seals};
use crate::model::identity::Moment;

/// How long a login may take, from its beginning to the provider's answer, in
/// seconds: with a forgotten password and a second factor.
pub(super) const LOGIN_LIFE: u64 = 600;
/// How long the redirect back to the socket's host counts, in seconds.
pub(super) const HANDOVER_LIFE: u64 = 60;
/// How long somebody is not asked again whether an owner may see their address.
pub(super) const CONSENT_LIFE: u64 = 365 * 86_400;
/// Most owners of whom that is remembered.
pub(super) const CONSENTS_MAX: usize = 64;

/// A sealed step.
pub(super) trait Step: Serialize + DeserializeOwned {
    /// What it is sealed for: it opens for nothing else.
    const PURPOSE: Purpose;
    /// When it ends, in seconds of Unix time.
    fn ends(&self) -> u64;
}

macro_rules! step {
    ($($type:ident),*) => {$(
        impl Step for $type {
            const PURPOSE: Purpose = Purpose::$type;
            fn ends(&self) -> u64 {
                self.x
            }
        }
    )*};
}
step!(Flow, Start, State, Login, Form, Handover, Consent, Logout);

/// The browser that began, as a cookie of the socket's host.
#[derive(Serialize, Deserialize)]
pub(super) struct Flow {
    /// A secret of this browser's.
    pub(super) b: String,
    /// Path and query to return to.
    pub(super) r: String,
    /// Its end.
    pub(super) x: u64,
}

/// From the socket's host to the auth host, in a URL.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct Start {
    /// The host to return to.
    pub(super) h: String,
    /// The socket.
    pub(super) s: String,
    /// The id of the flow.
    pub(super) f: String,
    /// The hash of its secret.
    pub(super) hb: String,
    /// Whether another account is wanted.
    #[serde(default)]
    pub(super) c: bool,
    /// Its end.
    pub(super) x: u64,
}

/// OAuth's `state`, through the provider and back.
#[derive(Serialize, Deserialize)]
pub(super) struct State {
    /// The login.
    pub(super) start: Start,
    /// The provider that it was sent to: an answer of another is not taken.
    pub(super) p: String,
    /// Its end.
    pub(super) x: u64,
}

/// The browser that is logging in, as a cookie of the auth host.
#[derive(Serialize, Deserialize)]
pub(super) struct Login {
    /// PKCE's verifier: never in `state`, or who holds the callback's URL could
    /// redeem the code.
    pub(super) v: String,
    /// The nonce; what forms are bound to.
    pub(super) n: String,
    /// The hash of the state that it was sent with; none where a form comes next.
    pub(super) h: String,
    /// Its end.
    pub(super) x: u64,
}

/// A form of the auth host.
#[derive(Serialize, Deserialize)]
pub(super) struct Form {
    /// The login.
    pub(super) start: Start,
    /// The provider.
    pub(super) p: String,
    /// The hash of the nonce of the browser that it was shown to.
    pub(super) hn: String,
    /// Who logged in; none where the form asks for it.
    pub(super) who: Option<Session>,
    /// Its end.
    pub(super) x: u64,
}

/// Back to the socket's host, in a URL.
#[derive(Serialize, Deserialize)]
pub(super) struct Handover {
    /// Its id: taken once.
    pub(super) j: String,
    /// The flow.
    pub(super) f: String,
    /// The hash of the secret of the browser that began it.
    pub(super) hb: String,
    /// Who logged in.
    pub(super) who: Session,
    /// Its end.
    pub(super) x: u64,
}

/// Whom somebody let see their address, as a cookie of the auth host.
#[derive(Serialize, Deserialize)]
pub(super) struct Consent {
    /// Hashes of account and owner, the latest first.
    pub(super) to: Vec<String>,
    /// Its end.
    pub(super) x: u64,
}

/// From the socket's host to the auth host, to end the provider's session too.
#[derive(Serialize, Deserialize)]
pub(super) struct Logout {
    /// The provider.
    pub(super) p: String,
    /// Its end.
    pub(super) x: u64,
}

/// Why a step cannot be taken from where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Broken {
    /// Sealed by a key that is not here: perhaps not yet.
    UnknownKey,
    /// Not one of ours, or for something else.
    Bad,
    /// It has ended.
    Old,
}

/// Seals a step; none where no key seals now.
pub(super) fn seal<T: Step>(seals: &Seals, place: Place<'_>, step: &T, now: Moment) -> Option<String> {
    seals.seal(T::PURPOSE, place, &serde_json::to_vec(step).ok()?, now)
}

/// Opens a step. Clocks of two nodes may differ by `SKEW`.
///
/// # Errors
/// Why it does not count.
pub(super) fn open<T: Step>(seals: &Seals, place: Place<'_>, sealed: &str, now: Moment) -> Result<T, Broken> {
    let opened = seals.open(T::PURPOSE, place, sealed, now).map_err(|closed| match closed {
        Closed::UnknownKey => Broken::UnknownKey,
        Closed::Bad => Broken::Bad,
    })?;
    let step: T = serde_json::from_slice(&opened).map_err(|_| Broken::Bad)?;
    if now.0 > step.ends().saturating_add(SKEW) { Err(Broken::Old) } else { Ok(step) }
}

/// The hash of a text, as text.
pub(super) fn hash(text: &str) -> String {
    BASE64URL_NOPAD.encode(digest::digest(&digest::SHA256, text.as_bytes()).as_ref())
}

/// The same text, compared in constant time.
pub(super) fn same(a: &str, b: &str) -> bool {
    !a.is_empty() && aws_lc_rs::constant_time::verify_slices_are_equal(a.as_bytes(), b.as_bytes()).is_ok()
}

/// 32 random bytes as text: as PKCE's verifiers are recommended (RFC 7636 §4.1).
pub(super) fn random() -> Option<String> {
    let mut bytes = [0u8; 32];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(BASE64URL_NOPAD.encode(&bytes))
}

/// The name of a flow: 16 hex digits.
pub(super) fn flow_id() -> Option<String> {
    let mut bytes = [0u8; 8];
    aws_lc_rs::rand::fill(&mut bytes).ok()?;
    Some(data_encoding::HEXLOWER.encode(&bytes))
}

/// Where a login may return to: a path of the same host, as it was asked for, and
/// "/" instead of what a browser could read as another host's, or what would only
/// lead to a login again.
pub(super) fn return_to(target: &str) -> &str {
    let mut bytes = target.bytes();
    let own = bytes.next() == Some(b'/') && !matches!(bytes.next(), Some(b'/' | b'\\'));
    let plain = target.bytes().all(|b| b.is_ascii_graphic());
    if own && plain && target.len() <= 2048 && !target.starts_with(super::OURS) { target } else { "/" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_login_returns_to_its_own_host_alone() {
        for good in ["/", "/a?b=c", "/a//b", "/a%0d%0aSet-Cookie:%20x", "/?next=https://evil.test", "/.aditx"] {
            assert_eq!(return_to(good), good);
        }
        for bad in [
            "",
            "//evil.test",
            "/\\evil.test",
            "https://evil.test/",
            "/\t/evil.test",
            "/a\r\nb",
            "/.adit/login",
            "evil",
            "/\u{e4}",
            "?x",
            "*",
        ] {
            assert_eq!(return_to(bad), "/", "{bad:?}");
        }
        assert_eq!(return_to(&format!("/{}", "a".repeat(2048))), "/");
    }

    #[test]
    fn a_step_ends_a_minute_late_and_not_later() {
        let logins = crate::logins::Logins::default();
        let keyring = crate::model::Keyring {
            id: crate::model::KeyringId,
            keys: vec![crate::model::identity::SealingKey {
                kid: "k1".parse().unwrap(),
                secret: crate::fields::Base64(vec![1; 32]),
                seal_from: Moment(0),
                open_until: None,
            }],
            extra: serde_json::Map::new(),
        };
        logins.set_keyring(Some(&keyring)).unwrap();
        let (seals, place) = (logins.seals().unwrap(), Place { host: "auth.test", socket: "" });
        let sealed = seal(&seals, place, &Logout { p: "corp".into(), x: 1000 }, Moment(900)).unwrap();
        let at = |now| open::<Logout>(&seals, place, &sealed, Moment(now)).map(|step| step.p);
        assert_eq!(at(1000 + SKEW), Ok("corp".into()));
        assert_eq!(at(1001 + SKEW), Err(Broken::Old));
        assert_eq!(open::<State>(&seals, place, &sealed, Moment(900)).err(), Some(Broken::Bad));
    }

    #[test]
    fn nothing_equals_an_empty_text() {
        assert!(same("a", "a") && !same("a", "b") && !same("", "") && !same("a", "ab"));
    }
}
