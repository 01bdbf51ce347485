//! Tokens of owners: JSON Web Tokens (RFC 7519) by HMAC-SHA-256 under a key of the
//! keyring, so that every node of a fleet takes them. One ends with its time, with its
//! account, and with the password by which it was got.

use std::time::Duration;

use data_encoding::BASE64URL_NOPAD;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::logins::seal::Seals;
use crate::model::Account;
use crate::model::identity::Moment;

/// Longest token that is looked at, in bytes.
const TOKEN_MAX: usize = 2048;
/// Clocks of nodes may differ by this, in seconds.
const SKEW: u64 = 60;
/// Whose tokens these are, so that no other ones count here.
const ISSUER: &str = "adit/mysocket";

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Claims {
    iss: String,
    /// Whose it is; clients read it.
    pub(super) user_id: String,
    iat: u64,
    exp: u64,
    /// When the password was given.
    pub(super) auth_time: u64,
    /// A digest of the password's hash.
    pwd: String,
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: String,
}

/// A token for `account`, who gave the password at `auth_time`, that counts for `life`
/// and not past `until`. None where the keyring has no key yet.
pub(super) fn issue(
    seals: &Seals,
    account: &Account,
    auth_time: Moment,
    now: Moment,
    (life, until): (Duration, Moment),
) -> Option<String> {
    let claims = Claims {
        iss: ISSUER.to_owned(),
        user_id: account.id.to_string(),
        iat: now.0,
        exp: now.after(life).min(until).0,
        auth_time: auth_time.0,
        pwd: account.password.digest().to_owned(),
    };
    let claims = BASE64URL_NOPAD.encode(&serde_json::to_vec(&claims).ok()?);
    let (message, tag) = seals.sign_token(now, |kid| {
        let header = json!({ "alg": "HS256", "typ": "JWT", "kid": kid.as_str() }).to_string();
        format!("{}.{claims}", BASE64URL_NOPAD.encode(header.as_bytes()))
    })?;
    Some(format!("{message}.{}", BASE64URL_NOPAD.encode(&tag)))
}

/// What a token says, if it is one of ours and counts now.
pub(super) fn check(seals: &Seals, token: &str, now: Moment) -> Option<Claims> {
    if token.len() > TOKEN_MAX {
        return None;
    }
    let (message, tag) = token.rsplit_once('.')?;
    let (header, claims) = message.split_once('.')?;
    let read = |part: &str| BASE64URL_NOPAD.decode(part.as_bytes()).ok();
    let header: Header = serde_json::from_slice(&read(header)?).ok()?;
    // The algorithm is ours to say (RFC 8725 §3.1).
    if header.alg != "HS256" || !seals.is_token(&header.kid, message.as_bytes(), &read(tag)?, now) {
        return None;
    }
    let claims: Claims = serde_json::from_slice(&read(claims)?).ok()?;
    let counts = claims.iat <= now.0.saturating_add(SKEW) && now.0 < claims.exp;
    (claims.iss == ISSUER && counts).then_some(claims)
}

impl Claims {
    /// Whether it is of this account as it is now.
    pub(super) fn is_of(&self, account: &Account) -> bool {
        account.id.as_str() == self.user_id && account.password.digest() == self.pwd && !account.disabled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Account, Keyring, KeyringId};
    use serde_json::{Map, Value};

    fn record(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap()
    }

    fn seals(kid: &str, byte: u8) -> Seals {
        let secret = data_encoding::BASE64.encode(&[byte; 32]);
        let keyring = record(json!({ "keys": [{ "kid": kid, "secret": secret }] }));
        Seals::new(&Keyring::from_record(&KeyringId, keyring).unwrap()).unwrap()
    }

    fn account(hash: &str) -> Account {
        let hash = format!("$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ${hash}");
        let account = record(json!({ "email": "ann@example.com", "password_hash": hash }));
        Account::from_record(&"ann".parse().unwrap(), account).unwrap()
    }

    const LIFE: Duration = Duration::from_secs(300 * 60);

    #[test]
    fn a_token_counts_for_its_time_account_and_password() {
        let (seals, ann, now) = (seals("k1", 1), account("aGFzaGhhc2hoYXNoaGFzaA"), Moment(1_000_000));
        let token = issue(&seals, &ann, now, now, (LIFE, now.after(LIFE * 2))).unwrap();
        let claims = check(&seals, &token, now).unwrap();
        assert!(claims.is_of(&ann) && !claims.is_of(&account("b3RoZXJvdGhlcm90aGVybw")));
        assert!(check(&seals, &token, now.after(LIFE - Duration::from_secs(1))).is_some());
        assert!(check(&seals, &token, now.after(LIFE)).is_none(), "300 minutes are over");
        let late = issue(&seals, &ann, now, now, (LIFE, now.after(Duration::from_secs(5)))).unwrap();
        assert!(check(&seals, &late, now.after(Duration::from_secs(5))).is_none(), "refreshed past its end");
        assert!(!claims.is_of(&Account { disabled: true, ..ann }));
    }

    #[test]
    fn a_token_that_is_not_ours_is_none() {
        let (seals, ann, now) = (seals("k1", 1), account("aGFzaGhhc2hoYXNoaGFzaA"), Moment(1_000_000));
        let token = issue(&seals, &ann, now, now, (LIFE, now.after(LIFE))).unwrap();
        for at in 0..token.len() {
            let mut bad = token.clone().into_bytes();
            bad[at] = if bad[at] == b'A' { b'B' } else { b'A' };
            let bad = String::from_utf8(bad).unwrap();
            assert!(bad == token || check(&seals, &bad, now).is_none(), "{bad}");
        }
        let (_, claims_and_tag) = token.split_once('.').unwrap();
        let (claims, _) = claims_and_tag.split_once('.').unwrap();
        for header in [
            json!({ "alg": "none", "kid": "k1" }),
            json!({ "alg": "HS512", "kid": "k1" }),
            json!({ "alg": "RS256", "kid": "k1" }),
            json!({ "alg": "HS256" }),
        ] {
            let message = format!("{}.{claims}", BASE64URL_NOPAD.encode(header.to_string().as_bytes()));
            let (_, tag) = seals.sign_token(now, |_| message.clone()).unwrap();
            for tag in [BASE64URL_NOPAD.encode(&tag), String::new()] {
                assert!(check(&seals, &format!("{message}.{tag}"), now).is_none(), "{header}");
            }
        }
        for other in [self::seals("k1", 2), self::seals("k2", 1)] {
            assert!(check(&other, &token, now).is_none());
        }
        for bad in ["", ".", "..", "a.b.c", &"a.".repeat(2000)] {
            assert!(check(&seals, bad, now).is_none(), "{bad}");
        }
    }
}
