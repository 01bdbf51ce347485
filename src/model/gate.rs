//! What a visitor must pass, as a socket's record has it. Who decides by it is
//! the gate; here it is read, checked and written back.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::time::Duration;

use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use serde_json::{Value, json};

use super::ProviderId;
use super::identity::{Email, EmailDomain, Moment, PasswordHash};
use crate::fields::{Fields, Network};
use crate::text_field;

/// Most items of one list of a gate: each is looked at by every request.
const ITEMS_MAX: usize = 1000;
/// Most path rules.
const RULES_MAX: usize = 100;
/// Longest name of a user or token, path of a rule, or subject.
const TEXT_MAX: usize = 256;

/// What a visitor must pass. The rules of `ip` and `client_certificates` must all
/// hold; of `basic`, `oidc` and `service_tokens` one that holds is enough. A part
/// that is there and allows nobody denies everybody.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gate {
    /// Which addresses may come.
    pub ip: Option<IpRules>,
    /// Names and passwords (RFC 7617).
    pub basic: Option<Basic>,
    /// Logins at identity providers.
    pub oidc: Option<Oidc>,
    /// Tokens of programs.
    pub service_tokens: Option<Vec<ServiceToken>>,
    /// Certificates that visitors show (type tls).
    pub client_certificates: Option<ClientCertificates>,
    /// What is different below a path.
    pub rules: Vec<PathRule>,
}

/// Which addresses may come: none that `deny` has, and only those of `allow`
/// where it has any.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct IpRules {
    /// The only ones, if there are any.
    pub allow: Vec<Network>,
    /// Never these.
    pub deny: Vec<Network>,
}

/// Names and passwords.
#[derive(Debug, Clone, PartialEq)]
pub struct Basic {
    /// Who may come.
    pub users: Vec<BasicUser>,
    /// What browsers show beside the question.
    pub realm: String,
    /// Whether `Authorization` goes on to the origin.
    pub pass_authorization: bool,
}

/// One name and its password.
#[derive(Debug, Clone, PartialEq)]
pub struct BasicUser {
    /// The name, without a colon.
    pub name: String,
    /// The hash of the password.
    pub password: PasswordHash,
}

/// Logins at identity providers.
#[derive(Debug, Clone, PartialEq)]
pub struct Oidc {
    /// Where visitors may log in; several give a choice.
    pub providers: Vec<ProviderId>,
    /// Who may come.
    pub allow: EmailRules,
    /// How long a login lasts at most.
    pub absolute: Duration,
    /// How long it lasts without a visit.
    pub idle: Duration,
    /// Logins from before this do not count: "log everyone out".
    pub issued_after: Option<Moment>,
    /// Whether `OPTIONS` of CORS, which carries no cookies, goes on to the origin.
    pub allow_cors_preflight: bool,
    /// Origins, beside the socket's own, whose pages may open WebSockets here.
    pub allow_origins: Vec<Origin>,
}

/// Who may come, by e-mail address.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EmailRules {
    /// These addresses.
    pub emails: Vec<Email>,
    /// All addresses of these domains.
    pub domains: Vec<EmailDomain>,
}

impl IpRules {
    /// Whether a visitor from there may come.
    pub fn allows(&self, ip: IpAddr) -> bool {
        let has = |list: &[Network]| list.iter().any(|network| network.contains(ip));
        !has(&self.deny) && (self.allow.is_empty() || has(&self.allow))
    }
}

impl EmailRules {
    /// Whether nobody is allowed.
    pub fn is_empty(&self) -> bool {
        self.emails.is_empty() && self.domains.is_empty()
    }

    /// Whether this very address is allowed.
    pub fn names(&self, email: &Email) -> bool {
        self.emails.contains(email)
    }

    /// Whether its domain is.
    pub fn has_domain_of(&self, email: &Email) -> bool {
        self.domains.iter().any(|domain| domain.covers(email))
    }
}

/// A program's token: 32 random bytes or more, so that its plain SHA-256 keeps it.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceToken {
    /// What logs call it.
    pub name: String,
    /// Its hash.
    pub hash: TokenHash,
    /// When it ends.
    pub expires: Option<Moment>,
}

/// The SHA-256 of a token.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenHash(pub [u8; 32]);

impl FromStr for TokenHash {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not the SHA-256 of a token";
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        let bytes = data_encoding::HEXLOWER_PERMISSIVE.decode(hex.as_bytes()).map_err(|_| bad)?;
        bytes.try_into().map(Self).map_err(|_| bad)
    }
}

impl fmt::Display for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", data_encoding::HEXLOWER.encode(&self.0))
    }
}

impl fmt::Debug for TokenHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:…")
    }
}
text_field!(TokenHash, "\"sha256:\" and 64 hex digits, or write the token itself as `token`");

/// An origin of the web: `https://app.example.com`, with a port where it is not the
/// usual one (RFC 6454 §6.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin(pub String);

impl FromStr for Origin {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
        match host.map(super::authority_host) {
            Some(Ok(_)) => Ok(Self(text.to_ascii_lowercase())),
            _ => Err("is not the origin of a page"),
        }
    }
}
text_field!(Origin, "an origin like \"https://app.example.com\"");

/// Certificates that visitors of a tls socket must show.
#[derive(Debug, Clone, PartialEq)]
pub struct ClientCertificates {
    /// PEM of the CAs that they must come from.
    pub ca_pem: String,
    /// Who may come: common names, or whole subjects as RFC 4514 writes them; `*`
    /// is everybody whom the CA knows.
    pub allow_subjects: Vec<String>,
    /// Who may come: e-mail addresses of the subjectAltName.
    pub allow_emails: Vec<Email>,
    /// Serial numbers that no longer count, in lower-case hex without leading zeros.
    pub revoked_serials: Vec<Serial>,
}

/// A certificate's serial number (RFC 5280 §4.1.2.2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Serial(pub String);

impl Serial {
    /// The number that these bytes are.
    pub fn of(bytes: &[u8]) -> Self {
        let hex = data_encoding::HEXLOWER.encode(bytes);
        let short = hex.trim_start_matches('0');
        Self(if short.is_empty() { "0".to_owned() } else { short.to_owned() })
    }
}

impl FromStr for Serial {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits: String = text.chars().filter(|c| *c != ':').collect();
        let hex = digits.strip_prefix("0x").unwrap_or(&digits);
        if hex.is_empty() || hex.len() > 42 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err("is not a serial number in hex");
        }
        let short = hex.trim_start_matches('0').to_ascii_lowercase();
        Ok(Self(if short.is_empty() { "0".to_owned() } else { short }))
    }
}
text_field!(Serial, "a serial number in hex like \"0a:1f\", as `openssl x509 -serial` prints it");

/// What is different below a path. The longest path that matches decides.
#[derive(Debug, Clone, PartialEq)]
pub struct PathRule {
    /// Begins with `/`; itself, and all that is below it.
    pub path: String,
    /// What it asks for.
    pub asks: Asks,
}

/// What a path asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Asks {
    /// Nothing beyond `ip`.
    Nothing,
    /// What the gate asks for, and to be one of these.
    OneOf {
        /// By e-mail address; together with `providers`.
        allow: EmailRules,
        /// By where they logged in; none: wherever.
        providers: Vec<ProviderId>,
        /// By name (basic).
        users: Vec<String>,
        /// By the token's name.
        service_tokens: Vec<String>,
    },
}

impl Gate {
    /// Reads the table; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let gate = Self {
            ip: part(f, "ip", |f| IpRules { allow: f.take("allow", Vec::new()), deny: f.take("deny", Vec::new()) }),
            basic: part(f, "basic", Basic::read),
            oidc: part(f, "oidc", Oidc::read),
            service_tokens: present(f, "service_tokens")
                .then(|| tables(f, "service_tokens", ITEMS_MAX, ServiceToken::read)),
            client_certificates: part(f, "client_certificates", ClientCertificates::read),
            rules: tables(f, "rules", RULES_MAX, PathRule::read),
        };
        f.refuse_rest();
        if let Some(ip) = &gate.ip {
            bounded(f, "ip", ip.allow.len() + ip.deny.len());
        }
        twice(f, "service_tokens", gate.tokens().iter().map(|token| token.name.as_str()));
        twice(f, "rules", gate.rules.iter().map(|rule| rule.path.as_str()));
        if !gate.rules.is_empty() && !gate.asks_identity() {
            let fix = "add basic, oidc or service_tokens, or leave rules out";
            f.mistake("rules", "change what is asked for, and nothing is".into(), fix.into());
        }
        gate
    }

    /// As in the record.
    pub fn to_value(&self) -> Value {
        let strings = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>();
        let networks = |list: &[Network]| strings(&mut list.iter().map(|network| network.0.to_string()));
        json!({
            "ip": self.ip.as_ref().map(|ip| json!({ "allow": networks(&ip.allow), "deny": networks(&ip.deny) })),
            "basic": self.basic.as_ref().map(|basic| json!({
                "users": basic.users.iter().map(|user| json!({
                    "name": user.name,
                    "password_hash": user.password.as_str(),
                })).collect::<Vec<_>>(),
                "realm": basic.realm,
                "pass_authorization": basic.pass_authorization,
            })),
            "oidc": self.oidc.as_ref().map(Oidc::to_value),
            "service_tokens": self.service_tokens.as_ref().map(|tokens| tokens.iter().map(|token| json!({
                "name": token.name,
                "token_hash": token.hash.to_string(),
                "expires": token.expires.map(|at| at.to_string()),
            })).collect::<Vec<_>>()),
            "client_certificates": self.client_certificates.as_ref().map(|asked| json!({
                "ca_pem": asked.ca_pem,
                "allow_subjects": asked.allow_subjects,
                "allow_emails": strings(&mut asked.allow_emails.iter().map(Email::to_string)),
                "revoked_serials": strings(&mut asked.revoked_serials.iter().map(|serial| serial.0.clone())),
            })),
            "rules": self.rules.iter().map(PathRule::to_value).collect::<Vec<_>>(),
        })
    }

    /// Whether a visitor must say who they are (by HTTP).
    pub fn asks_identity(&self) -> bool {
        self.basic.is_some() || self.oidc.is_some() || self.service_tokens.is_some()
    }

    /// The tokens of programs, if there are any.
    pub fn tokens(&self) -> &[ServiceToken] {
        self.service_tokens.as_deref().unwrap_or_default()
    }
}

impl Basic {
    fn read(f: &mut Fields) -> Self {
        let basic = Self {
            users: tables(f, "users", ITEMS_MAX, |f| {
                let name: String = f.required("name").unwrap_or_default();
                if name.is_empty() || name.len() > TEXT_MAX || name.contains(':') || name.chars().any(char::is_control)
                {
                    let fix = "write a name without colon and control characters (RFC 7617 §2)";
                    f.mistake("name", format!("\"{}\" is not a user's name", name.escape_debug()), fix.into());
                }
                Some(BasicUser { name, password: f.required("password_hash")? })
            }),
            realm: f.take("realm", "adit".to_owned()),
            pass_authorization: f.take("pass_authorization", false),
        };
        let quotable = |b: u8| (b' '..=b'~').contains(&b) && b != b'"' && b != b'\\';
        if basic.realm.len() > TEXT_MAX || !basic.realm.bytes().all(quotable) {
            f.mistake("realm", "cannot stand in a header".into(), "write ASCII without quotes and backslashes".into());
        }
        twice(f, "users", basic.users.iter().map(|user| user.name.as_str()));
        basic
    }
}

impl Oidc {
    fn read(f: &mut Fields) -> Self {
        let mut session = f.section("session");
        let (absolute, idle) = (
            session.take("absolute", Duration::from_secs(12 * 3600)),
            session.take("idle", Duration::from_secs(2 * 3600)),
        );
        let issued_after = session.optional("issued_after");
        session.refuse_rest();
        for (key, life) in [("absolute", absolute), ("idle", idle)] {
            if !(Duration::from_secs(60)..=Duration::from_secs(30 * 86_400)).contains(&life) {
                session.mistake(key, format!("{life:?} is out of range"), "write 1m to 30d".into());
            }
        }
        let oidc = Self {
            providers: f.take("providers", Vec::new()),
            allow: EmailRules::read(f),
            absolute,
            idle,
            issued_after,
            allow_cors_preflight: f.take("allow_cors_preflight", false),
            allow_origins: f.take("allow_origins", Vec::new()),
        };
        if oidc.providers.is_empty() {
            f.mistake("providers", "is empty".into(), "write the id of at least one provider".into());
        }
        bounded(f, "providers", oidc.providers.len());
        bounded(f, "allow_origins", oidc.allow_origins.len());
        oidc
    }

    fn to_value(&self) -> Value {
        let mut value = json!({
            "providers": self.providers.iter().map(ProviderId::as_str).collect::<Vec<_>>(),
            "session": {
                "absolute": format!("{}s", self.absolute.as_secs()),
                "idle": format!("{}s", self.idle.as_secs()),
                "issued_after": self.issued_after.map(|at| at.to_string()),
            },
            "allow_cors_preflight": self.allow_cors_preflight,
            "allow_origins": self.allow_origins.iter().map(|origin| origin.0.as_str()).collect::<Vec<_>>(),
        });
        self.allow.write(&mut value);
        value
    }
}

impl EmailRules {
    fn read(f: &mut Fields) -> Self {
        let rules =
            Self { emails: f.take("allow_emails", Vec::new()), domains: f.take("allow_email_domains", Vec::new()) };
        bounded(f, "allow_emails", rules.emails.len());
        bounded(f, "allow_email_domains", rules.domains.len());
        rules
    }

    fn write(&self, value: &mut Value) {
        let emails: Vec<String> = self.emails.iter().map(Email::to_string).collect();
        let domains: Vec<String> = self.domains.iter().map(EmailDomain::to_string).collect();
        if let Value::Object(fields) = value {
            fields.insert("allow_emails".into(), emails.into());
            fields.insert("allow_email_domains".into(), domains.into());
        }
    }
}

impl ServiceToken {
    fn read(f: &mut Fields) -> Option<Self> {
        let name: String = f.required("name").unwrap_or_default();
        if name.is_empty() || name.len() > TEXT_MAX || name.chars().any(char::is_control) {
            f.mistake("name", "is not a token's name".into(), "write what logs shall call it".into());
        }
        Some(Self { name, hash: f.required("token_hash")?, expires: f.optional("expires") })
    }
}

impl ClientCertificates {
    /// The CAs.
    ///
    /// # Errors
    /// What is wrong with `ca_pem`.
    pub fn roots(&self) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        for ca in CertificateDer::pem_slice_iter(self.ca_pem.as_bytes()) {
            roots.add(ca.map_err(|e| format!("is not PEM: {e}"))?).map_err(|e| format!("cannot be used: {e}"))?;
        }
        if roots.is_empty() { Err("has no certificate in it".to_owned()) } else { Ok(roots) }
    }

    fn read(f: &mut Fields) -> Self {
        let asked = Self {
            ca_pem: f.required("ca_pem").unwrap_or_default(),
            allow_subjects: f.take("allow_subjects", Vec::new()),
            allow_emails: f.take("allow_emails", Vec::new()),
            revoked_serials: f.take("revoked_serials", Vec::new()),
        };
        bounded(f, "allow_subjects", asked.allow_subjects.len());
        bounded(f, "allow_emails", asked.allow_emails.len());
        if asked.ca_pem.len() > 256 << 10 {
            f.mistake("ca_pem", "is larger than 256 KiB".into(), "leave CAs out".into());
        } else if let Err(why) = asked.roots() {
            f.mistake("ca_pem", why, "write the PEM of one or more CA certificates".into());
        }
        asked
    }
}

impl PathRule {
    fn read(f: &mut Fields) -> Option<Self> {
        let path: String = f.required("path")?;
        let plain = |b: u8| b.is_ascii_graphic() && !b"%\\?#;".contains(&b);
        let dots = path.split('/').any(|part| part == "." || part == "..");
        if !path.starts_with('/') || path.len() > TEXT_MAX || !path.bytes().all(plain) || dots || path.contains("//") {
            let problem = format!("\"{}\" is not a path for a rule", path.escape_debug());
            f.mistake("path", problem, "write it decoded, from / on, without . .. // ; ? # % and \\".into());
        }
        let public = f.take("public", false);
        let (allow, providers) = (EmailRules::read(f), f.take("providers", Vec::new()));
        let (users, service_tokens) = (f.take("users", Vec::new()), f.take("service_tokens", Vec::new()));
        let asks = Asks::OneOf { allow, providers, users, service_tokens };
        if public && asks != Asks::nobody() {
            f.mistake("public", "contradicts what else the rule asks for".into(), "leave one of them out".into());
        }
        Some(Self { path, asks: if public { Asks::Nothing } else { asks } })
    }

    fn to_value(&self) -> Value {
        match &self.asks {
            Asks::Nothing => json!({ "path": self.path, "public": true }),
            Asks::OneOf { allow, providers, users, service_tokens } => {
                let mut value = json!({
                    "path": self.path,
                    "public": false,
                    "providers": providers.iter().map(ProviderId::as_str).collect::<Vec<_>>(),
                    "users": users,
                    "service_tokens": service_tokens,
                });
                allow.write(&mut value);
                value
            }
        }
    }
}

impl Asks {
    fn nobody() -> Self {
        let (allow, providers) = (EmailRules::default(), Vec::new());
        Self::OneOf { allow, providers, users: Vec::new(), service_tokens: Vec::new() }
    }
}

/// Reads the table at `key` where there is one; what nobody took of it is a mistake.
fn part<T>(f: &mut Fields, key: &str, read: impl FnOnce(&mut Fields) -> T) -> Option<T> {
    if !present(f, key) {
        return None;
    }
    let mut fields = f.section(key);
    let part = read(&mut fields);
    fields.refuse_rest();
    Some(part)
}

/// Whether a key has a value; null is none, and no mistake.
fn present(f: &mut Fields, key: &str) -> bool {
    let there = f.has_value(key);
    if !there {
        let _none: Option<Value> = f.optional(key);
    }
    there
}

/// Reads a list of tables.
fn tables<T>(f: &mut Fields, key: &str, max: usize, mut read: impl FnMut(&mut Fields) -> Option<T>) -> Vec<T> {
    let mut found = Vec::new();
    let list = f.tables(key);
    if list.len() > max {
        f.mistake(key, format!("has {} items", list.len()), format!("write at most {max}"));
        return found;
    }
    for mut fields in list {
        found.extend(read(&mut fields));
        fields.refuse_rest();
    }
    found
}

fn bounded(f: &Fields, key: &str, items: usize) {
    if items > ITEMS_MAX {
        f.mistake(key, format!("has {items} items"), format!("write at most {ITEMS_MAX}"));
    }
}

fn twice<'a>(f: &Fields, key: &str, names: impl Iterator<Item = &'a str> + Clone) {
    for (i, name) in names.clone().enumerate() {
        if names.clone().take(i).any(|earlier| earlier == name) {
            f.mistake(
                &format!("{key}[{i}]"),
                format!("\"{}\" is there twice", name.escape_debug()),
                "leave one out".into(),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_allowed_by_what_it_is_and_deny_beats_allow() {
        let rules = |allow: &[&str], deny: &[&str]| {
            let value = json!({"allow": allow, "deny": deny});
            let mut f = Fields::new(json!({"ip": value}).as_object().cloned().unwrap());
            let gate = Gate::read(&mut f);
            assert!(f.mistakes().is_empty(), "{:?}", f.mistakes());
            gate.ip.unwrap()
        };
        for (allow, deny, ip, allowed) in [
            (&[][..], &[][..], "203.0.113.7", true),
            (&["203.0.113.0/24"], &[], "203.0.113.7", true),
            (&["203.0.113.0/24"], &[], "203.0.114.7", false),
            (&["203.0.113.0/24"], &[], "2001:db8::1", false),
            (&[], &["203.0.113.7"], "203.0.113.7", false),
            (&[], &["203.0.113.7"], "203.0.113.8", true),
            // Deny wins, however narrow the other is.
            (&["203.0.113.7"], &["203.0.113.0/24"], "203.0.113.7", false),
            (&["0.0.0.0/0"], &["203.0.113.7/32"], "203.0.113.7", false),
            // Mapped addresses are IPv4, on either side.
            (&["203.0.113.0/24"], &[], "::ffff:203.0.113.7", true),
            (&["::/0"], &[], "::ffff:203.0.113.7", false),
            (&["::/0"], &[], "2001:db8::1", true),
            (&[], &["::ffff:203.0.113.7"], "203.0.113.7", false),
            (&[], &["::ffff:203.0.113.0/120"], "203.0.113.7", false),
            (&["::ffff:0:0/96"], &[], "203.0.113.7", true),
            (&["::ffff:0:0/96"], &[], "2001:db8::1", false),
            (&["2001:db8::/32"], &["2001:db8:0:1::/64"], "2001:db8::1", true),
            (&["2001:db8::/32"], &["2001:db8:0:1::/64"], "2001:db8:0:1::1", false),
        ] {
            assert_eq!(rules(allow, deny).allows(ip.parse().unwrap()), allowed, "{allow:?} {deny:?} {ip}");
        }
    }
}
