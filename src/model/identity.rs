//! Who a visitor is: e-mail addresses and how they are compared, the providers
//! that vouch for them, accounts of our own, the keys that logins are sealed
//! with, and logins that no longer count.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use data_encoding::HEXLOWER;
use serde_json::{Map, Value, json};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use unicode_normalization::UnicodeNormalization;

use super::{AccountId, AuthorizedKey, KeyId, ProviderId, RevocationId, head, record};
use crate::fields::{Base64, Field, Fields, Mistake};
use crate::text_field;

/// An e-mail address in the one form in which two of the same mailbox are equal:
/// domain in A-labels, ASCII of the local part in lower case, the rest of it in
/// NFC and otherwise as it is, because case folding of Unicode makes different
/// mailboxes one (U+212A becomes k).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Email {
    text: String,
    at: usize,
}

impl Email {
    /// The address.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// What is behind the @.
    pub fn domain(&self) -> &str {
        self.text.get(self.at + 1..).unwrap_or_default()
    }
}

impl FromStr for Email {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not an e-mail address";
        let (local, domain) = text.rsplit_once('@').ok_or(bad)?;
        // Quoted local parts (RFC 5321 §4.1.2) may hold another @; nobody has one.
        let odd = |c: char| c.is_control() || c.is_whitespace() || "\"@(),:;<>[\\]".contains(c);
        if local.is_empty() || local.len() > 64 || local.contains(odd) || unseen(local) {
            return Err(bad);
        }
        if local.starts_with('.') || local.ends_with('.') || local.contains("..") {
            return Err(bad);
        }
        // NFC alone makes some of other letters ASCII (U+212A a K, U+037E a semicolon).
        let becomes_ascii = |c: char| !c.is_ascii() && std::iter::once(c).nfc().all(|made| made.is_ascii());
        if local.contains(becomes_ascii) {
            return Err(bad);
        }
        let domain = email_domain(domain).ok_or(bad)?;
        let mut local: String = local.nfc().collect();
        local.make_ascii_lowercase();
        Ok(Self { at: local.len(), text: format!("{local}@{domain}") })
    }
}

impl fmt::Display for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Logs are no place for addresses.
impl fmt::Debug for Email {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "…@{}", self.domain())
    }
}
text_field!(Email, "an e-mail address like \"ann@example.com\"");

/// Characters that have no width: two addresses would look the same.
fn unseen(text: &str) -> bool {
    text.chars().any(|c| matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'))
}

fn email_domain(text: &str) -> Option<String> {
    let domain = idna::domain_to_ascii_strict(text).ok()?;
    let name: super::HostName = domain.parse().ok()?;
    (name.as_str() == domain && !text.ends_with('.') && !domain.contains('_')).then_some(domain)
}

/// A domain of e-mail addresses: exactly it, or with `*.` all that are below it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmailDomain(String);

impl EmailDomain {
    /// Whether an address is of this domain.
    pub fn covers(&self, email: &Email) -> bool {
        match self.0.strip_prefix('*') {
            Some(below) => email.domain().len() > below.len() && email.domain().ends_with(below),
            None => email.domain() == self.0,
        }
    }
}

impl FromStr for EmailDomain {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not a domain of e-mail addresses";
        match text.strip_prefix("*.") {
            Some(below) => Ok(Self(format!("*.{}", email_domain(below).ok_or(bad)?))),
            None => email_domain(text).map(Self).ok_or(bad),
        }
    }
}

impl fmt::Display for EmailDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_field!(EmailDomain, "a domain like \"example.com\", or \"*.example.com\" for all below it");

/// A point in time, to the second: `2026-12-01T00:00:00Z` (RFC 3339).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(pub u64);

impl Moment {
    /// Now.
    pub fn now() -> Self {
        Self::of(SystemTime::now())
    }

    /// A time of the system's clock.
    pub fn of(at: SystemTime) -> Self {
        Self(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs())
    }

    /// So much later.
    #[must_use]
    pub fn after(self, later: Duration) -> Self {
        Self(self.0.saturating_add(later.as_secs()))
    }
}

impl FromStr for Moment {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let at = OffsetDateTime::parse(text, &Rfc3339).map_err(|_| "is not a time")?;
        u64::try_from(at.unix_timestamp()).map(Self).map_err(|_| "is before 1970")
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = i64::try_from(self.0).ok().and_then(|at| OffsetDateTime::from_unix_timestamp(at).ok());
        f.write_str(&at.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default())
    }
}
text_field!(Moment, "a time like \"2026-12-01T00:00:00Z\"");

/// The hash of a password: argon2id in PHC's form, or bcrypt. What it costs to
/// check is bounded here, because whoever knocks makes us pay it.
#[derive(Clone, PartialEq, Eq)]
pub struct PasswordHash {
    text: String,
    digest: String,
}

impl PasswordHash {
    /// The hash.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// A name for it that tells nothing of it (hex): what a login by the password is
    /// bound to.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Whether it is bcrypt's.
    pub fn is_bcrypt(&self) -> bool {
        self.text.starts_with("$2")
    }
}

impl FromStr for PasswordHash {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut parts = text.split('$').skip(1);
        let digest = digest(&SHA256, format!("adit password v1 {text}").as_bytes());
        let digest = HEXLOWER.encode(digest.as_ref().get(..16).unwrap_or_default());
        let whole = Self { text: text.to_owned(), digest };
        let bad = Err("is no hash of a password that is known here");
        if !text.starts_with('$') || text.len() > 256 || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return bad;
        }
        match parts.next() {
            Some("argon2id") => {
                if parts.next() != Some("v=19") {
                    return bad;
                }
                let costs = parts.next().unwrap_or_default();
                let cost = |name: &str| {
                    let mut found = costs.split(',').filter_map(|c| c.strip_prefix(name)?.parse::<u32>().ok());
                    found.next().unwrap_or(0)
                };
                let (memory, passes, lanes) = (cost("m="), cost("t="), cost("p="));
                if memory > 64 << 10 || passes > 10 || lanes > 4 || u64::from(memory) * u64::from(passes) > 192 << 10 {
                    return Err("costs too much to check: at most m=65536, t=10, p=4 and m*t=196608");
                }
                let rest: Vec<&str> = parts.collect();
                let sound = memory >= 8 && passes >= 1 && lanes >= 1;
                if sound && rest.len() == 2 && rest.iter().all(|part| !part.is_empty()) { Ok(whole) } else { bad }
            }
            Some("2a" | "2b" | "2x" | "2y") => {
                let cost = parts.next().and_then(|cost| cost.parse::<u32>().ok()).unwrap_or(0);
                let rest = parts.next().unwrap_or_default();
                if cost > 12 {
                    return Err("costs too much to check: at most 12");
                }
                if cost >= 4 && rest.len() == 53 && parts.next().is_none() { Ok(whole) } else { bad }
            }
            _ => bad,
        }
    }
}

impl fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

impl Field for PasswordHash {
    const EXPECTED: &'static str = "a hash of argon2id or bcrypt, or the password itself as `password`";
    fn from_value(value: &Value) -> Result<Self, String> {
        // Unlike other texts it is not repeated.
        let text = value.as_str().ok_or_else(|| "is not a string".to_owned())?;
        text.parse().map_err(|why: &str| why.to_owned())
    }
}

/// How a provider is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProviderKind {
    /// OpenID Connect.
    Oidc,
    /// GitHub's OAuth.
    Github,
    /// Facebook's OAuth.
    Facebook,
    /// The accounts of the store.
    Local,
}

impl ProviderKind {
    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Oidc => "oidc",
            Self::Github => "github",
            Self::Facebook => "facebook",
            Self::Local => "local",
        }
    }
}

impl FromStr for ProviderKind {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let all = [Self::Oidc, Self::Github, Self::Facebook, Self::Local];
        all.into_iter().find(|kind| kind.as_str() == text).ok_or("is not a kind of provider")
    }
}
text_field!(ProviderKind, "\"oidc\", \"github\", \"facebook\" or \"local\"");

/// A URL that the node asks: https, or http on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url(String);

impl Url {
    /// The URL as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Url {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri: hyper::Uri = text.parse().map_err(|_| "is not a URL")?;
        let authority = uri.authority().ok_or("is not a URL")?;
        let host = super::authority_host(authority.as_str()).map_err(|_| "is not a URL")?;
        let here = host == "localhost"
            || host.ends_with(".localhost")
            || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback());
        match uri.scheme_str() {
            Some("https") => {}
            Some("http") if here => {}
            _ => return Err("is neither https nor http on this machine"),
        }
        if uri.query().is_some() || text.contains('#') {
            return Err("has a query or a fragment");
        }
        Ok(Self(text.to_owned()))
    }
}
text_field!(Url, "a URL like \"https://accounts.example.com\"");

/// How the client's secret is told to the token endpoint (RFC 6749 §2.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// In `Authorization`.
    Basic,
    /// In the form.
    Post,
}

impl FromStr for ClientAuth {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "basic" => Ok(Self::Basic),
            "post" => Ok(Self::Post),
            _ => Err("is not a way to authenticate"),
        }
    }
}
text_field!(ClientAuth, "\"basic\" or \"post\"");

/// Who vouches for visitors.
#[derive(Clone, PartialEq)]
pub struct Provider {
    /// Its id: part of its redirect URI.
    pub id: ProviderId,
    /// How it is spoken to.
    pub kind: ProviderKind,
    /// What the chooser page calls it.
    pub title: String,
    /// kind oidc: its issuer, letter by letter as it calls itself.
    pub issuer: Option<Url>,
    /// What it knows us by.
    pub client_id: String,
    /// The secret that goes with it.
    pub client_secret: Option<String>,
    /// The file under `gate.secrets` that has the secret, where the record has not.
    pub client_secret_file: Option<String>,
    /// How it is told.
    pub client_auth: ClientAuth,
    /// What is asked for, beside `openid`.
    pub scopes: Vec<String>,
    /// Whether an address counts although the provider does not say that it is
    /// verified: one company's own, where nobody chooses an address.
    pub trust_email: bool,
    /// Whether a domain's rule needs the claim `hd` to name that domain (Google).
    pub require_hd: bool,
    /// kinds github and facebook: where they are, if not at the usual place.
    pub authorize_url: Option<Url>,
    /// The same for the token endpoint.
    pub token_url: Option<Url>,
    /// The same for the API.
    pub api_url: Option<Url>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provider").field("id", &self.id).field("kind", &self.kind).finish_non_exhaustive()
    }
}

/// Google's issuer, which says in `hd` whose an address is.
const GOOGLE: &str = "https://accounts.google.com";

impl Provider {
    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &ProviderId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let kind = f.required("kind").unwrap_or(ProviderKind::Oidc);
        let issuer: Option<Url> = if kind == ProviderKind::Oidc { f.required("issuer") } else { f.optional("issuer") };
        let google = issuer.as_ref().is_some_and(|issuer| issuer.as_str() == GOOGLE);
        let usual: Vec<String> = match kind {
            ProviderKind::Oidc => vec!["email".into()],
            ProviderKind::Github => vec!["user:email".into()],
            ProviderKind::Facebook => vec!["email".into()],
            ProviderKind::Local => Vec::new(),
        };
        let provider = Self {
            id: id.clone(),
            kind,
            title: f.take("title", id.to_string()),
            issuer,
            client_id: match kind {
                ProviderKind::Local => f.take("client_id", String::new()),
                _ => f.required("client_id").unwrap_or_default(),
            },
            client_secret: f.optional("client_secret"),
            client_secret_file: f.optional("client_secret_file"),
            client_auth: f.take("client_auth", ClientAuth::Basic),
            scopes: f.take("scopes", usual),
            trust_email: f.take("trust_email", false),
            require_hd: f.take("require_hd", google),
            authorize_url: f.optional("authorize_url"),
            token_url: f.optional("token_url"),
            api_url: f.optional("api_url"),
            extra: Map::new(),
        };
        if let Some(file) = &provider.client_secret_file
            && (file.is_empty() || file.contains('/') || file.starts_with('.'))
        {
            // A record must not make the node read, and send away, any other file.
            let fix = "write the name of a file in the folder gate.secrets";
            f.mistake("client_secret_file", "is not a bare file name".into(), fix.into());
        }
        if kind != ProviderKind::Oidc && provider.issuer.is_some() {
            f.mistake("issuer", format!("kind {} has none", kind.as_str()), "leave it out".into());
        }
        if matches!(kind, ProviderKind::Github | ProviderKind::Facebook)
            && provider.client_secret.is_none()
            && provider.client_secret_file.is_none()
        {
            f.mistake("client_secret", "is missing".into(), "write it, or client_secret_file".into());
        }
        let mistakes = f.mistakes();
        let extra = f.rest();
        if mistakes.is_empty() { Ok(Self { extra, ..provider }) } else { Err(mistakes) }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        let url = |url: &Option<Url>| url.as_ref().map(|url| url.as_str().to_owned());
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                "kind": self.kind.as_str(),
                "title": self.title,
                "issuer": url(&self.issuer),
                "client_id": self.client_id,
                "client_secret": self.client_secret,
                "client_secret_file": self.client_secret_file,
                "client_auth": match self.client_auth { ClientAuth::Basic => "basic", ClientAuth::Post => "post" },
                "scopes": self.scopes,
                "trust_email": self.trust_email,
                "require_hd": self.require_hd,
                "authorize_url": url(&self.authorize_url),
                "token_url": url(&self.token_url),
                "api_url": url(&self.api_url),
            }),
        )
    }
}

/// An account of our own (providers of kind local, owners of sockets).
#[derive(Debug, Clone, PartialEq)]
pub struct Account {
    /// Its id, the subject of its logins, and the SSH user of its tunnels.
    pub id: AccountId,
    /// Its address: what it logs in by, and what rules see.
    pub email: Email,
    /// The hash of its password.
    pub password: PasswordHash,
    /// Whether it may not log in.
    pub disabled: bool,
    /// Whose it is, as people write it.
    pub name: Option<String>,
    /// Keys that may serve its tunnels.
    pub ssh_keys: Vec<AuthorizedKey>,
    /// Whether its owner made it unasked: nobody knows that the address is theirs, so
    /// it lets nobody through a gate.
    pub signed_up: bool,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

impl Account {
    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &AccountId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let (email, password) = (f.required("email"), f.required("password_hash"));
        let disabled = f.take("disabled", false);
        let (name, ssh_keys): (Option<String>, _) = (f.optional("name"), f.take("ssh_keys", Vec::new()));
        let signed_up = f.take("signed_up", false);
        if name.as_ref().is_some_and(|name| name.len() > NAME_MAX || name.chars().any(char::is_control)) {
            f.mistake("name", "is too long, or no name".into(), format!("write at most {NAME_MAX} bytes of text"));
        }
        if ssh_keys.len() > KEYS_MAX {
            f.mistake("ssh_keys", format!("has {} keys", ssh_keys.len()), format!("write at most {KEYS_MAX}"));
        }
        if f.has("password") {
            f.mistake("password", "is not stored".into(), "write it by the API, which hashes it".into());
        }
        let mistakes = f.mistakes();
        let extra = f.rest();
        match (email, password) {
            (Some(email), Some(password)) if mistakes.is_empty() => {
                Ok(Self { id: id.clone(), email, password, disabled, name, ssh_keys, signed_up, extra })
            }
            _ => Err(mistakes),
        }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                "email": self.email.as_str(),
                "password_hash": self.password.as_str(),
                "disabled": self.disabled,
                "name": self.name,
                "ssh_keys": self.ssh_keys.iter().map(|key| key.line.as_str()).collect::<Vec<_>>(),
                "signed_up": self.signed_up,
            }),
        )
    }
}

/// Longest name of an account, in bytes.
const NAME_MAX: usize = 200;
/// Most keys of an account.
const KEYS_MAX: usize = 16;

/// The id of the keyring: there is one, `default`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyringId;

impl FromStr for KeyringId {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        (text == "default").then_some(Self).ok_or("is not \"default\", the one record of its kind")
    }
}

impl fmt::Display for KeyringId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("default")
    }
}
text_field!(KeyringId, "\"default\"");

/// The keys that logins are sealed with, the same on all nodes.
#[derive(Debug, Clone, PartialEq)]
pub struct Keyring {
    /// Its id.
    pub id: KeyringId,
    /// 1 to 16 keys.
    pub keys: Vec<SealingKey>,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

/// One key: seals from `seal_from` until a later one does, and opens until
/// `open_until`.
#[derive(Clone, PartialEq)]
pub struct SealingKey {
    /// What sealed values name it by.
    pub kid: KeyId,
    /// 32 to 64 random bytes.
    pub secret: Base64,
    /// When it begins to seal: later than the slowest node hears of it.
    pub seal_from: Moment,
    /// What it sealed counts until then; none: as long as it is there.
    pub open_until: Option<Moment>,
}

impl fmt::Debug for SealingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SealingKey({})", self.kid)
    }
}

impl Keyring {
    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record; never a byte of a key.
    pub fn from_record(id: &KeyringId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let mut keys: Vec<SealingKey> = Vec::new();
        let list = f.tables("keys");
        if !(1..=16).contains(&list.len()) {
            f.mistake("keys", format!("holds {} keys", list.len()), "write 1 to 16".into());
        }
        for mut key in list {
            let (kid, secret) = (key.required::<KeyId>("kid"), key.required::<Base64>("secret"));
            let seal_from = key.take("seal_from", Moment(0));
            let open_until = key.optional("open_until");
            key.refuse_rest();
            let (Some(kid), Some(secret)) = (kid, secret) else { continue };
            if !(32..=64).contains(&secret.0.len()) {
                let fix = "write 32 random bytes, as `openssl rand -base64 32` makes them";
                key.mistake("secret", format!("has {} bytes", secret.0.len()), fix.into());
            }
            if kid.as_str().len() > 32 || kid.as_str().contains('.') {
                key.mistake("kid", "is not a key's name".into(), "write 1 to 32 characters without a dot".into());
            }
            if keys.iter().any(|other| other.kid == kid) {
                key.mistake("kid", format!("\"{kid}\" is there twice"), "name each key differently".into());
            }
            if keys.iter().any(|other| other.secret == secret) {
                key.mistake("secret", "is there twice".into(), "write another for each key".into());
            }
            keys.push(SealingKey { kid, secret, seal_from, open_until });
        }
        let mistakes = f.mistakes();
        let extra = f.rest();
        if mistakes.is_empty() { Ok(Self { id: *id, keys, extra }) } else { Err(mistakes) }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        let keys = self.keys.iter().map(|key| {
            json!({
                "kid": key.kid.as_str(),
                "secret": key.secret.to_string(),
                "seal_from": key.seal_from.to_string(),
                "open_until": key.open_until.map(|at| at.to_string()),
            })
        });
        record(&self.extra, json!({ "v": 1, "id": "default", "keys": keys.collect::<Vec<_>>() }))
    }
}

/// Logins that no longer count, until they would have ended anyway.
#[derive(Debug, Clone, PartialEq)]
pub struct Revocation {
    /// Its id.
    pub id: RevocationId,
    /// Whose.
    pub whose: Whose,
    /// Those from before this; later ones count.
    pub issued_before: Moment,
    /// When this record has done its work.
    pub until: Moment,
    /// Fields this version does not know, kept as they came.
    pub extra: Map<String, Value>,
}

/// Whose logins are revoked.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Whose {
    /// The one login with this id (hex).
    Session(String),
    /// All of this digest of issuer and subject (hex), or of issuer and the
    /// provider's own session.
    Identity(String),
    /// All with this address.
    Email(Email),
}

impl Revocation {
    /// Reads a record; `id` is the one it is stored under.
    ///
    /// # Errors
    /// Every mistake of the record.
    pub fn from_record(id: &RevocationId, record: Map<String, Value>) -> Result<Self, Vec<Mistake>> {
        let mut f = Fields::new(record);
        head(&mut f, id);
        let (session, identity, email) = (f.optional("session"), f.optional("identity"), f.optional("email"));
        let whose = match (session, identity, email) {
            (Some(session), None, None) => Some(Whose::Session(session)),
            (None, Some(identity), None) => Some(Whose::Identity(identity)),
            (None, None, Some(email)) => Some(Whose::Email(email)),
            _ => {
                f.mistake(
                    "email",
                    "whose logins these are is not clear".into(),
                    "write one of email, identity and session".into(),
                );
                None
            }
        };
        let now = Moment::now();
        let issued_before = f.take("issued_before", now);
        // No login lasts longer.
        let until = f.take("until", now.after(Duration::from_secs(31 * 86_400)));
        let mistakes = f.mistakes();
        let extra = f.rest();
        match whose {
            Some(whose) if mistakes.is_empty() => Ok(Self { id: id.clone(), whose, issued_before, until, extra }),
            _ => Err(mistakes),
        }
    }

    /// The record as stored; `from_record` takes it back.
    pub fn to_record(&self) -> Map<String, Value> {
        let (key, value) = match &self.whose {
            Whose::Session(session) => ("session", session.as_str()),
            Whose::Identity(identity) => ("identity", identity.as_str()),
            Whose::Email(email) => ("email", email.as_str()),
        };
        record(
            &self.extra,
            json!({
                "v": 1,
                "id": self.id.as_str(),
                key: value,
                "issued_before": self.issued_before.to_string(),
                "until": self.until.to_string(),
            }),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn letters_that_look_alike_make_no_address_another() {
        let read = |text: &str| text.parse::<Email>().map(|email| email.as_str().to_owned());
        assert_eq!(read("Kate@Example.com").as_deref(), Ok("kate@example.com"));
        // By NFC alone these are K, ; and `.
        for text in ["\u{212a}ate@example.com", "a\u{37e}b@example.com", "a\u{1fef}@example.com"] {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!(read("m\u{130}a@example.com").as_deref(), Ok("m\u{130}a@example.com"));
        // What is one letter and what is two of the same mailbox are the same.
        assert_eq!(read("jose\u{301}@example.com"), read("jos\u{e9}@example.com"));
    }
}
