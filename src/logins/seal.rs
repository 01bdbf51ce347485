//! Sealed values: what a browser carries from step to step of a login, and from
//! node to node. `v1.<kid>.<base64url(nonce | ciphertext | tag)>` by
//! AES-256-GCM-SIV (RFC 8452), whose nonces may be random on any number of nodes.
//! Each purpose has a key of its own (HKDF), and host and socket are authenticated
//! with the value: one made for one thing opens as nothing else.

use std::fmt;

use aws_lc_rs::aead::{AES_256_GCM_SIV, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use data_encoding::BASE64URL_NOPAD;

use crate::model::identity::{Moment, SealingKey};
use crate::model::{KeyId, Keyring};

/// Longest sealed value that is looked at, in bytes.
const SEALED_MAX: usize = 4096;

/// What a sealed value is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The browser that began a login, on the socket's host.
    Flow,
    /// From the socket's host to the auth host.
    Start,
    /// OAuth's `state`.
    State,
    /// The browser that is logging in, on the auth host.
    Login,
    /// A form of the auth host.
    Form,
    /// Back from the auth host to the socket's.
    Handover,
    /// A login.
    Session,
    /// To whom an address may be told.
    Consent,
    /// From the socket's host to the auth host, to log out.
    Logout,
}

const PURPOSES: [(Purpose, &str); 9] = [
    (Purpose::Flow, "flow"),
    (Purpose::Start, "start"),
    (Purpose::State, "state"),
    (Purpose::Login, "login"),
    (Purpose::Form, "form"),
    (Purpose::Handover, "handover"),
    (Purpose::Session, "session"),
    (Purpose::Consent, "consent"),
    (Purpose::Logout, "logout"),
];

/// Where a value holds: nowhere else does it open.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// The host, lower-case.
    pub host: &'a str,
    /// The socket's id, or "".
    pub socket: &'a str,
}

/// Why a value was not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Closed {
    /// It names a key that is not here: too old, or of a keyring that is not here yet.
    UnknownKey,
    /// It is not one of ours, or for something else.
    Bad,
}

/// The keys of all purposes.
pub struct Seals(Vec<Key>);

struct Key {
    kid: KeyId,
    seal_from: Moment,
    open_until: Option<Moment>,
    by_purpose: Vec<LessSafeKey>,
    /// Signs what origins are told.
    signing: Ed25519KeyPair,
    /// Names sessions after the logins that made them.
    naming: aws_lc_rs::hmac::Key,
    /// Signs tokens of owners.
    tokens: aws_lc_rs::hmac::Key,
    /// The seed of the CA of owners' SSH certificates.
    authority: [u8; 32],
}

impl fmt::Debug for Seals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.kid)).finish()
    }
}

/// 32 bytes of HKDF's output.
struct Bytes32;
impl KeyType for Bytes32 {
    fn len(&self) -> usize {
        32
    }
}

impl Key {
    fn new(key: &SealingKey) -> Result<Self, String> {
        let failed = |_| format!("key \"{}\" cannot be used", key.kid);
        let root = Salt::new(HKDF_SHA256, b"adit logins v1").extract(&key.secret.0);
        let derived = |purpose: &str| {
            let mut bytes = [0u8; 32];
            let info = [purpose.as_bytes()];
            root.expand(&info, Bytes32).and_then(|okm| okm.fill(&mut bytes)).map(|()| bytes)
        };
        let mut by_purpose = Vec::with_capacity(PURPOSES.len());
        for (_, name) in PURPOSES {
            let bytes = derived(name).map_err(failed)?;
            by_purpose.push(LessSafeKey::new(UnboundKey::new(&AES_256_GCM_SIV, &bytes).map_err(failed)?));
        }
        let seed = derived("identity jwt").map_err(failed)?;
        let signing = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|e| format!("key \"{}\": {e}", key.kid))?;
        let naming = derived("session names").map_err(failed)?;
        let naming = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &naming);
        let tokens = derived("owners' tokens").map_err(failed)?;
        let tokens = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, &tokens);
        let authority = derived("owners' ssh authority").map_err(failed)?;
        let (kid, seal_from, open_until) = (key.kid.clone(), key.seal_from, key.open_until);
        Ok(Self { kid, seal_from, open_until, by_purpose, signing, naming, tokens, authority })
    }

    fn of(&self, purpose: Purpose) -> Option<&LessSafeKey> {
        let at = PURPOSES.iter().position(|(p, _)| *p == purpose)?;
        self.by_purpose.get(at)
    }
}

impl Seals {
    /// The keys of a keyring.
    ///
    /// # Errors
    /// One cannot be used.
    pub fn new(keyring: &Keyring) -> Result<Self, String> {
        keyring.keys.iter().map(Key::new).collect::<Result<_, _>>().map(Self)
    }

    /// The key that seals now: of those that have begun, the latest.
    fn current(&self, now: Moment) -> Option<&Key> {
        let begun = |key: &&Key| key.seal_from <= now && key.open_until.is_none_or(|until| now < until);
        self.0.iter().filter(begun).max_by_key(|key| key.seal_from)
    }

    /// Seals a value; none where no key seals now.
    pub fn seal(&self, purpose: Purpose, place: Place<'_>, value: &[u8], now: Moment) -> Option<String> {
        let key = self.current(now)?;
        let mut nonce = [0u8; NONCE_LEN];
        aws_lc_rs::rand::fill(&mut nonce).ok()?;
        let mut sealed = Vec::with_capacity(NONCE_LEN + value.len() + 16);
        sealed.extend_from_slice(&nonce);
        let mut body = value.to_vec();
        let aad = Aad::from(aad(place));
        key.of(purpose)?.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut body).ok()?;
        sealed.extend_from_slice(&body);
        Some(format!("v1.{}.{}", key.kid, BASE64URL_NOPAD.encode(&sealed)))
    }

    /// Opens a value.
    ///
    /// # Errors
    /// It is not one of ours, for this.
    pub fn open(&self, purpose: Purpose, place: Place<'_>, sealed: &str, now: Moment) -> Result<Vec<u8>, Closed> {
        let (key, text) = self.key_of(sealed, now)?;
        let mut bytes = BASE64URL_NOPAD.decode(text.as_bytes()).map_err(|_| Closed::Bad)?;
        let (nonce, body) = bytes.split_at_mut_checked(NONCE_LEN).ok_or(Closed::Bad)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).map_err(|_| Closed::Bad)?;
        let opened = key.of(purpose).ok_or(Closed::Bad)?.open_in_place(nonce, Aad::from(aad(place)), body);
        let len = opened.map_err(|_| Closed::Bad)?.len();
        Ok(bytes.get(NONCE_LEN..NONCE_LEN + len).unwrap_or_default().to_vec())
    }

    /// Whether the key of a value that was opened before still opens.
    pub fn opens(&self, sealed: &str, now: Moment) -> bool {
        self.key_of(sealed, now).is_ok()
    }

    /// The key that a value names, and what it sealed.
    fn key_of<'s>(&self, sealed: &'s str, now: Moment) -> Result<(&Key, &'s str), Closed> {
        let rest = sealed.strip_prefix("v1.").filter(|_| sealed.len() <= SEALED_MAX).ok_or(Closed::Bad)?;
        let (kid, text) = rest.split_once('.').ok_or(Closed::Bad)?;
        let key = self.0.iter().find(|key| key.kid.as_str() == kid).ok_or(Closed::UnknownKey)?;
        match key.open_until.is_some_and(|until| now >= until) {
            true => Err(Closed::UnknownKey),
            false => Ok((key, text)),
        }
    }

    /// Signs for origins (EdDSA): the key's name and the signature.
    pub fn sign(&self, now: Moment, message: impl FnOnce(&KeyId) -> String) -> Option<(String, Vec<u8>)> {
        let key = self.current(now)?;
        let message = message(&key.kid);
        let signature = key.signing.sign(message.as_bytes()).as_ref().to_vec();
        Some((message, signature))
    }

    /// The name of the key that signs now.
    pub fn signing_kid(&self, now: Moment) -> Option<&KeyId> {
        self.current(now).map(|key| &key.kid)
    }

    /// The public halves of all keys that origins may meet, those that have not
    /// begun yet among them.
    pub fn public_keys(&self, now: Moment) -> impl Iterator<Item = (&KeyId, &[u8])> {
        let lives = move |key: &&Key| key.open_until.is_none_or(|until| now < until);
        self.0.iter().filter(lives).map(|key| (&key.kid, key.signing.public_key().as_ref()))
    }

    /// Signs a token of an owner (HMAC-SHA-256): what `message` makes of the key's
    /// name, and the tag.
    pub fn sign_token(&self, now: Moment, message: impl FnOnce(&KeyId) -> String) -> Option<(String, Vec<u8>)> {
        let key = self.current(now)?;
        let message = message(&key.kid);
        let tag = aws_lc_rs::hmac::sign(&key.tokens, message.as_bytes()).as_ref().to_vec();
        Some((message, tag))
    }

    /// Whether the key of this name signed a token; in constant time.
    pub fn is_token(&self, kid: &str, message: &[u8], tag: &[u8], now: Moment) -> bool {
        let lives = |key: &&Key| key.kid.as_str() == kid && key.open_until.is_none_or(|until| now < until);
        self.0.iter().find(lives).is_some_and(|key| aws_lc_rs::hmac::verify(&key.tokens, message, tag).is_ok())
    }

    /// The seed of the CA that signs owners' SSH keys now, and the key's name.
    pub fn authority(&self, now: Moment) -> Option<(&KeyId, &[u8; 32])> {
        self.current(now).map(|key| (&key.kid, &key.authority))
    }

    /// The name of the session that a login makes, the same on every node: a
    /// hand-over that is replayed makes the very same session again. By the key
    /// that sealed `sealed`.
    pub fn session_name(&self, sealed: &str, login: &[u8]) -> Option<[u8; 16]> {
        let kid = sealed.strip_prefix("v1.")?.split_once('.')?.0;
        let key = self.0.iter().find(|key| key.kid.as_str() == kid)?;
        let tag = aws_lc_rs::hmac::sign(&key.naming, login);
        tag.as_ref().get(..16)?.try_into().ok()
    }
}

/// Host and socket, which may hold no byte 0.
fn aad(place: Place<'_>) -> Vec<u8> {
    let mut aad = Vec::with_capacity(place.host.len() + place.socket.len() + 4);
    for part in ["v1", place.host, place.socket] {
        aad.extend_from_slice(part.as_bytes());
        aad.push(0);
    }
    aad
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fields::Base64;
    use crate::model::KeyringId;
    use serde_json::Map;

    fn key(kid: &str, byte: u8, seal_from: u64, open_until: Option<u64>) -> SealingKey {
        let secret = Base64(vec![byte; 32]);
        SealingKey {
            kid: kid.parse().unwrap(),
            secret,
            seal_from: Moment(seal_from),
            open_until: open_until.map(Moment),
        }
    }

    fn seals(keys: Vec<SealingKey>) -> Seals {
        Seals::new(&Keyring { id: KeyringId, keys, extra: Map::new() }).unwrap()
    }

    const HERE: Place<'_> = Place { host: "a.test", socket: "a" };

    #[test]
    fn a_value_opens_for_its_purpose_at_its_place_alone() {
        let seals = seals(vec![key("k1", 1, 0, None)]);
        let now = Moment(100);
        let sealed = seals.seal(Purpose::Session, HERE, b"secret", now).unwrap();
        assert_eq!(seals.open(Purpose::Session, HERE, &sealed, now).unwrap(), b"secret");
        for (purpose, _) in PURPOSES.iter().filter(|(purpose, _)| *purpose != Purpose::Session) {
            assert_eq!(seals.open(*purpose, HERE, &sealed, now), Err(Closed::Bad), "{purpose:?}");
        }
        for place in
            [Place { host: "b.test", ..HERE }, Place { socket: "b", ..HERE }, Place { host: "a.tes", socket: "ta" }]
        {
            assert_eq!(seals.open(Purpose::Session, place, &sealed, now), Err(Closed::Bad), "{place:?}");
        }
        for at in 0..sealed.len() {
            let mut bad = sealed.clone().into_bytes();
            bad[at] ^= 1;
            let bad = String::from_utf8(bad).unwrap();
            assert!(seals.open(Purpose::Session, HERE, &bad, now).is_err(), "{bad}");
        }
        for bad in ["", "v1", "v1.", "v1.k1", "v1.k1.", "v1.k1.AAAA", "v2.k1.AAAA", &"v1.k1.A".repeat(2000)] {
            assert!(seals.open(Purpose::Session, HERE, bad, now).is_err(), "{bad}");
        }
        assert_ne!(sealed, seals.seal(Purpose::Session, HERE, b"secret", now).unwrap());
    }

    #[test]
    fn keys_take_turns_and_old_ones_end() {
        let old = seals(vec![key("old", 1, 0, None)]);
        let both = seals(vec![key("old", 1, 0, Some(500)), key("new", 2, 200, None)]);
        let by_old = old.seal(Purpose::State, HERE, b"x", Moment(100)).unwrap();
        assert!(both.seal(Purpose::State, HERE, b"x", Moment(199)).unwrap().starts_with("v1.old."));
        let by_new = both.seal(Purpose::State, HERE, b"x", Moment(200)).unwrap();
        assert!(by_new.starts_with("v1.new."));
        assert!(both.open(Purpose::State, HERE, &by_old, Moment(499)).is_ok());
        assert_eq!(both.open(Purpose::State, HERE, &by_old, Moment(500)), Err(Closed::UnknownKey));
        // A node that has not heard of the new key yet says so, not "forged".
        assert_eq!(old.open(Purpose::State, HERE, &by_new, Moment(200)), Err(Closed::UnknownKey));
        assert_eq!(both.public_keys(Moment(100)).count(), 2, "the next key is published before it signs");
        assert_eq!(both.public_keys(Moment(500)).count(), 1);
        assert!(seals(vec![key("later", 1, 1000, None)]).seal(Purpose::State, HERE, b"x", Moment(1)).is_none());
    }
}
