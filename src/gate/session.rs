//! A login as its cookie has it, and whether it passes a gate: pure, `now` is an
//! argument. The cookie proves who somebody is; whether they may come is asked of
//! the rules at every request.

use std::sync::OnceLock;
use std::time::Duration;

use aws_lc_rs::digest;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::assertion::Told;
use super::identity::Identity;
use crate::logins::Logins;
use crate::model::gate::{Asks, Gate, Oidc, PathRule};
use crate::model::identity::{Email, Moment, ProviderKind, Whose};
use crate::model::{Provider, ProviderId};

/// A login. The names in the cookie are short, because every request carries it.
#[derive(Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Session {
    /// Its id.
    #[serde(rename = "n")]
    pub(super) name: String,
    /// The provider's record.
    #[serde(rename = "p", with = "text")]
    pub(super) provider: ProviderId,
    /// The issuer.
    #[serde(rename = "i")]
    pub(super) issuer: String,
    /// The subject there.
    #[serde(rename = "s")]
    pub(super) subject: String,
    /// The address, in its one form.
    #[serde(rename = "e", skip_serializing_if = "Option::is_none", default, with = "text::option")]
    pub(super) email: Option<Email>,
    /// Whether domain rules may go by it.
    #[serde(rename = "d", default)]
    pub(super) domain_vouched: bool,
    /// The provider's own session, hashed; of an account, what its password was.
    #[serde(rename = "q", skip_serializing_if = "Option::is_none", default)]
    pub(super) provider_session: Option<String>,
    /// When they logged in here.
    #[serde(rename = "t")]
    pub(super) issued: u64,
    /// When they proved to the provider who they are.
    #[serde(rename = "a", skip_serializing_if = "Option::is_none", default)]
    pub(super) auth_time: Option<u64>,
    /// When this was last sealed.
    #[serde(rename = "l")]
    pub(super) seen: u64,
    /// What a revocation may name it by; made when first asked for.
    #[serde(skip)]
    pub(super) named: OnceLock<Vec<Whose>>,
    /// What origins were told of it last.
    #[serde(skip)]
    pub(super) told: LastTold,
}

/// What origins were told of a login last: no part of what it is.
#[derive(Default)]
pub(super) struct LastTold(pub(super) Mutex<Option<Told>>);

impl Clone for LastTold {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl PartialEq for LastTold {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for LastTold {}

/// Fields that are text in the cookie.
mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(value: &impl Display, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(value)
    }

    pub(super) fn deserialize<'de, T: FromStr, D: Deserializer<'de>>(from: D) -> Result<T, D::Error> {
        String::deserialize(from)?.parse().map_err(|_| D::Error::custom("cannot be read"))
    }

    /// The same where there may be none.
    pub(super) mod option {
        use super::*;

        pub(in super::super) fn serialize<S: Serializer>(
            value: &Option<impl Display>,
            to: S,
        ) -> Result<S::Ok, S::Error> {
            match value {
                Some(value) => to.collect_str(value),
                None => to.serialize_none(),
            }
        }

        pub(in super::super) fn deserialize<'de, T: FromStr, D: Deserializer<'de>>(
            from: D,
        ) -> Result<Option<T>, D::Error> {
            super::deserialize(from).map(Some)
        }
    }
}

/// Logs are no place for addresses and subjects.
impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({})", self.name)
    }
}

/// Why somebody may not come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Denied {
    /// The login has ended: too old, or too long unused.
    Expired,
    /// It was revoked.
    Revoked,
    /// Its provider is no longer one of this socket's.
    Provider,
    /// The provider vouches for no address.
    NoEmail,
    /// No rule allows the address.
    NotAllowed,
    /// The path asks for more.
    Path,
}

impl Denied {
    /// The word for it in logs and metrics.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::Provider => "provider",
            Self::NoEmail => "no_email",
            Self::NotAllowed => "not_allowed",
            Self::Path => "path",
        }
    }

    /// Whether another login of the same person could help: what has ended is begun
    /// again, what is not allowed is told.
    pub(super) fn ended(self) -> bool {
        matches!(self, Self::Expired | Self::Revoked | Self::Provider)
    }
}

/// A name for (issuer, subject) that tells nothing of them: in revocations and logs.
pub(super) fn identity_digest(issuer: &str, kind: &str, subject: &str) -> String {
    let mut context = digest::Context::new(&digest::SHA256);
    for part in ["adit identity v1", issuer, kind, subject] {
        context.update(&(part.len() as u64).to_be_bytes());
        context.update(part.as_bytes());
    }
    data_encoding::HEXLOWER.encode(context.finish().as_ref().get(..16).unwrap_or_default())
}

impl Session {
    /// The session that a login makes, without the name that it gets last.
    pub(super) fn begin(identity: &Identity, now: Moment) -> Self {
        Self {
            name: String::new(),
            provider: identity.provider.clone(),
            issuer: identity.issuer.clone(),
            subject: identity.subject.clone(),
            email: identity.email.clone(),
            domain_vouched: identity.domain_vouched,
            provider_session: identity
                .provider_session
                .as_ref()
                .map(|session| identity_digest(&identity.issuer, "session", session)),
            issued: now.0,
            auth_time: identity.auth_time,
            seen: now.0,
            named: OnceLock::new(),
            told: LastTold::default(),
        }
    }

    /// Whom it is of, as revocations and logs name them.
    pub(super) fn whose(&self) -> String {
        identity_digest(&self.issuer, "subject", &self.subject)
    }

    fn is_revoked(&self, logins: &Logins) -> bool {
        if !logins.any_revoked() {
            return false;
        }
        let whose = self.named.get_or_init(|| {
            let mut whose = vec![Whose::Session(self.name.clone()), Whose::Identity(self.whose())];
            whose.extend(self.provider_session.clone().map(Whose::Identity));
            whose.extend(self.email.clone().map(Whose::Email));
            whose
        });
        logins.is_revoked(whose, Moment(self.issued))
    }

    /// Whether it passes, at a path that asks for `rules` beside the gate's own.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn passes(&self, oidc: &Oidc, rules: &[&PathRule], logins: &Logins, now: Moment) -> Result<(), Denied> {
        let expired = |since: u64, life: Duration| now.0 >= since.saturating_add(life.as_secs());
        // A clock that is ahead elsewhere is no reason to refuse; a minute is.
        if expired(self.issued, oidc.absolute) || expired(self.seen, oidc.idle) || self.issued > now.0 + SKEW {
            return Err(Denied::Expired);
        }
        if oidc.issued_after.is_some_and(|after| self.issued < after.0) || self.is_revoked(logins) {
            return Err(Denied::Revoked);
        }
        if !oidc.providers.contains(&self.provider) {
            return Err(Denied::Provider);
        }
        let provider = logins.provider(&self.provider).ok_or(Denied::Provider)?;
        if provider_issuer(&provider).is_some_and(|issuer| issuer != self.issuer) {
            return Err(Denied::Provider);
        }
        if provider.kind == ProviderKind::Local {
            // An account that is gone, disabled or someone else's by now is out, and so is
            // who logged in by another password.
            let account = logins.account_by_id(&self.subject).filter(|one| !one.disabled && !one.signed_up);
            let same = |account: &std::sync::Arc<crate::model::Account>| {
                Some(&account.email) == self.email.as_ref()
                    && Some(account.password.digest()) == self.provider_session.as_deref()
            };
            account.filter(same).ok_or(Denied::Revoked)?;
        }
        let email = self.email.as_ref().ok_or(Denied::NoEmail)?;
        let allowed = |allow: &crate::model::gate::EmailRules| {
            allow.names(email) || (self.domain_vouched && allow.has_domain_of(email))
        };
        if !allowed(&oidc.allow) {
            return Err(Denied::NotAllowed);
        }
        let by_rule = |rule: &&&PathRule| match &rule.asks {
            Asks::Nothing => true,
            Asks::OneOf { allow, providers, .. } => {
                let here = providers.is_empty() || providers.contains(&self.provider);
                here && if allow.is_empty() { !providers.is_empty() } else { allowed(allow) }
            }
        };
        if rules.iter().all(|rule| by_rule(&rule)) { Ok(()) } else { Err(Denied::Path) }
    }

    /// Whether it is to be sealed anew, so that it does not end while it is used.
    pub(super) fn wants_reseal(&self, oidc: &Oidc, now: Moment) -> bool {
        now.0.saturating_sub(self.seen) > oidc.idle.as_secs() / 2
    }
}

/// How far the clocks of two nodes may differ, in seconds.
pub(super) const SKEW: u64 = 60;

/// The issuer that a provider's logins have, where the record says so.
pub(super) fn provider_issuer(provider: &Provider) -> Option<&str> {
    match provider.kind {
        ProviderKind::Oidc => provider.issuer.as_ref().map(crate::model::identity::Url::as_str),
        ProviderKind::Local => Some(LOCAL_ISSUER),
        ProviderKind::Github | ProviderKind::Facebook => None,
    }
}

/// The issuer of accounts of our own.
pub(super) const LOCAL_ISSUER: &str = "urn:adit:local";

/// How long a cookie of a login is kept: as long as it can pass, and no longer.
pub(super) fn cookie_seconds(session: &Session, gate: &Gate, now: Moment) -> u64 {
    let life = gate.oidc.as_ref().map_or(0, |oidc| oidc.absolute.as_secs());
    session.issued.saturating_add(life).saturating_sub(now.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn gate(value: serde_json::Value) -> Gate {
        let mut f = crate::fields::Fields::new(value.as_object().cloned().unwrap());
        let gate = Gate::read(&mut f);
        assert!(f.mistakes().is_empty(), "{:?}", f.mistakes());
        gate
    }

    fn logins() -> Logins {
        let logins = Logins::default();
        for (id, issuer) in [("corp", "https://id.test"), ("other", "https://other.test")] {
            let record = json!({"kind": "oidc", "issuer": issuer, "client_id": "adit"});
            logins.put_provider(
                Provider::from_record(&id.parse().unwrap(), record.as_object().cloned().unwrap()).unwrap(),
            );
        }
        logins
    }

    fn session(email: Option<&str>) -> Session {
        Session {
            name: "s".into(),
            provider: "corp".parse().unwrap(),
            issuer: "https://id.test".into(),
            subject: "1".into(),
            email: email.map(|e| e.parse().unwrap()),
            domain_vouched: true,
            provider_session: None,
            issued: 1000,
            auth_time: None,
            seen: 1000,
            named: OnceLock::new(),
            told: LastTold::default(),
        }
    }

    fn verdict(gate: &Gate, session: &Session, at: u64) -> Result<(), Denied> {
        session.passes(gate.oidc.as_ref().unwrap(), &gate.rules.iter().collect::<Vec<_>>(), &logins(), Moment(at))
    }

    #[test]
    fn who_is_allowed_passes_while_the_login_lasts() {
        let gate = gate(json!({"oidc": {"providers": ["corp"], "allow_emails": ["ann@example.com"],
            "allow_email_domains": ["corp.test"], "session": {"absolute": "10m", "idle": "2m"}}}));
        let ann = session(Some("Ann@Example.com"));
        assert_eq!(verdict(&gate, &ann, 1001), Ok(()));
        assert_eq!(verdict(&gate, &ann, 1119), Ok(()));
        assert_eq!(verdict(&gate, &ann, 1120), Err(Denied::Expired));
        let used = Session { seen: 1599, ..ann.clone() };
        assert_eq!(verdict(&gate, &used, 1599), Ok(()));
        assert_eq!(verdict(&gate, &used, 1600), Err(Denied::Expired));
        assert_eq!(verdict(&gate, &ann, 900), Err(Denied::Expired), "from the future");
        assert_eq!(verdict(&gate, &session(Some("bob@corp.test")), 1001), Ok(()));
        assert_eq!(verdict(&gate, &session(Some("bob@sub.corp.test")), 1001), Err(Denied::NotAllowed));
        assert_eq!(verdict(&gate, &session(Some("bob@example.com")), 1001), Err(Denied::NotAllowed));
        assert_eq!(verdict(&gate, &session(None), 1001), Err(Denied::NoEmail));
        let unvouched = Session { domain_vouched: false, ..session(Some("bob@corp.test")) };
        assert_eq!(verdict(&gate, &unvouched, 1001), Err(Denied::NotAllowed));
        let elsewhere = Session { provider: "other".parse().unwrap(), ..ann.clone() };
        assert_eq!(verdict(&gate, &elsewhere, 1001), Err(Denied::Provider));
        let moved = Session { issuer: "https://old.test".into(), ..ann };
        assert_eq!(verdict(&gate, &moved, 1001), Err(Denied::Provider));
    }

    #[test]
    fn addresses_that_look_alike_are_not_the_same() {
        let gate = gate(json!({"oidc": {"providers": ["corp"],
            "allow_emails": ["kate@example.com", "m\u{fc}ller@example.com"], "allow_email_domains": ["b\u{fc}cher.test"]}}));
        for good in ["KATE@EXAMPLE.COM", "mu\u{308}ller@example.com", "x@xn--bcher-kva.test", "x@B\u{dc}CHER.test"] {
            assert_eq!(verdict(&gate, &session(Some(good)), 1001), Ok(()), "{good}");
        }
        for bad in ["M\u{dc}LLER@example.com", "kate@ex\u{430}mple.com", "x@bucher.test", "kat\u{435}@example.com"] {
            assert_eq!(verdict(&gate, &session(Some(bad)), 1001), Err(Denied::NotAllowed), "{bad}");
        }
        for not_one in [
            "\u{212a}ate@example.com",
            "kate@example.com@evil.test",
            "\"kate@example.com\"@evil.test",
            "kate@example.com.",
            "kate@example.com\0",
            "ka te@example.com",
            "kate\u{200b}@example.com",
            "@example.com",
            "kate",
            "kate@[127.0.0.1]",
            "kate@exam_ple.com",
            "kate@example..com",
        ] {
            assert!(
                not_one.parse::<Email>().is_err()
                    || !not_one.parse::<Email>().unwrap().as_str().ends_with("@example.com"),
                "{not_one}"
            );
        }
        assert!("kate@example.com@evil.test".parse::<Email>().is_err());
    }

    #[test]
    fn an_empty_list_denies_and_a_path_can_ask_for_more() {
        let nobody = gate(json!({"oidc": {"providers": ["corp"]}}));
        assert_eq!(verdict(&nobody, &session(Some("ann@example.com")), 1001), Err(Denied::NotAllowed));
        let admin = gate(json!({"oidc": {"providers": ["corp"], "allow_email_domains": ["example.com"]},
            "rules": [{"path": "/admin", "allow_emails": ["ann@example.com", "eve@evil.test"]}]}));
        assert_eq!(verdict(&admin, &session(Some("ann@example.com")), 1001), Ok(()));
        assert_eq!(verdict(&admin, &session(Some("bob@example.com")), 1001), Err(Denied::Path));
        assert_eq!(
            verdict(&admin, &session(Some("eve@evil.test")), 1001),
            Err(Denied::NotAllowed),
            "a rule opens nothing"
        );
        let empty = gate(json!({"oidc": {"providers": ["corp"], "allow_email_domains": ["example.com"]},
            "rules": [{"path": "/admin"}]}));
        assert_eq!(verdict(&empty, &session(Some("ann@example.com")), 1001), Err(Denied::Path));
    }
}
