//! TLS towards visitors: which certificate answers to which name, and the
//! handshake. Where certificates come from (the feed, files, made up in `dev`)
//! is up to whoever puts them here; TLS towards origins is elsewhere.

mod client_auth;
pub mod dev;
mod failure;
mod names;
pub mod ocsp;
#[cfg(test)]
mod tests;
mod tickets;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use ::aws_lc_rs::digest;
use parking_lot::RwLock;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{Acceptor, ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{HandshakeKind, ServerConfig, SignatureAlgorithm, SupportedProtocolVersion};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::LazyConfigAcceptor;

pub use self::client_auth::{Client, ClientAuth};
use self::failure::Failure;
use self::tickets::{Bound, Ring};
use crate::error::Error;
use crate::fields::Fields;
use crate::model::{Certificate, CertificateId, HostName, HostPattern, TicketKeys};
use crate::stream::Stream;
use crate::text_field;

/// `[tls]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Chain of the default certificate (PEM file).
    pub default_certificate: Option<PathBuf>,
    /// Its key (PEM file).
    pub default_key: Option<PathBuf>,
    /// Whether to make up a CA and the default certificate.
    pub make_certificate: bool,
    /// What meets a visitor who names a host without a certificate.
    pub unknown_sni: BadSni,
    /// What meets a visitor who names no host.
    pub missing_sni: BadSni,
    /// From the first byte of a handshake to its end.
    pub handshake_deadline: Duration,
    /// The oldest version served.
    pub min_version: Version,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            default_certificate: None,
            default_key: None,
            make_certificate: false,
            unknown_sni: BadSni::Default,
            missing_sni: BadSni::Default,
            handshake_deadline: Duration::from_secs(10),
            min_version: Version::Tls12,
        }
    }
}

impl Settings {
    /// Reads the section; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let usual = Self::default();
        let settings = Self {
            default_certificate: f.optional("default_certificate"),
            default_key: f.optional("default_key"),
            make_certificate: f.take("make_certificate", usual.make_certificate),
            unknown_sni: f.take("unknown_sni", usual.unknown_sni),
            missing_sni: f.take("missing_sni", usual.missing_sni),
            handshake_deadline: f.take("handshake_deadline", usual.handshake_deadline),
            min_version: f.take("min_version", usual.min_version),
        };
        match (&settings.default_certificate, &settings.default_key) {
            (Some(_), None) => f.mistake("default_key", "is missing".into(), "name the certificate's key".into()),
            (None, Some(_)) => {
                f.mistake("default_certificate", "is missing".into(), "name the key's certificate".into());
            }
            (Some(_), Some(_)) if settings.make_certificate => {
                let problem = "would replace default_certificate".to_owned();
                f.mistake("make_certificate", problem, "leave out the one or the other".into());
            }
            _ => {}
        }
        if settings.handshake_deadline.is_zero() {
            f.mistake("handshake_deadline", "leaves no time".into(), "write at least \"1s\"".into());
        }
        settings
    }
}

/// What meets a visitor who names no host, or one without a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadSni {
    /// The default certificate.
    Default,
    /// An alert.
    Refuse,
}

impl FromStr for BadSni {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "default" => Ok(Self::Default),
            "refuse" => Ok(Self::Refuse),
            _ => Err("is not known"),
        }
    }
}
text_field!(BadSni, "\"default\" or \"refuse\"");

/// A TLS version that can be the oldest served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// TLS 1.2.
    Tls12,
    /// TLS 1.3.
    Tls13,
}

impl FromStr for Version {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "1.2" => Ok(Self::Tls12),
            "1.3" => Ok(Self::Tls13),
            _ => Err("is not a version served here"),
        }
    }
}
text_field!(Version, "\"1.2\" or \"1.3\"");

/// What a handshake is for.
#[derive(Debug, Clone, Copy)]
pub enum Purpose<'a> {
    /// HTTP on the shared port: h2 or http/1.1 by ALPN.
    Http,
    /// A `tls` socket: no ALPN, and no name but its own. Browsers send cookies to every
    /// port of a host, so that a socket which could show another's name would be sent
    /// the other's.
    Raw {
        /// The socket's host names.
        own: &'a [HostPattern],
    },
    /// One that asks for visitors' certificates.
    Asking {
        /// The socket's host names.
        own: &'a [HostPattern],
        /// What it asks for.
        of: &'a Arc<ClientAuth>,
    },
}

/// A visitor's TLS connection, made.
#[derive(Debug)]
pub struct Accepted {
    /// What the visitor says inside TLS.
    pub stream: Stream,
    /// The name that the visitor asked for.
    pub sni: Option<HostName>,
    /// Whether HTTP/2 was agreed on.
    pub h2: bool,
    /// The certificate that was presented.
    pub certificate: Arc<Presentable>,
    /// The version that was agreed on, as OpenSSL calls it.
    pub version: Option<&'static str>,
    /// The cipher suite, likewise.
    pub cipher: Option<&'static str>,
    /// Who showed a certificate that may come, where one was asked for.
    pub client: Option<Client>,
}

/// A certificate with its key, ready for handshakes.
#[derive(Debug)]
pub struct Presentable {
    shown: Arc<Shown>,
    /// SHA-256 of the leaf.
    fingerprint: [u8; 32],
    names: Vec<HostPattern>,
    valid: (i64, i64),
    /// One per purpose, made when first needed and shared by all connections.
    configs: [OnceLock<Arc<ServerConfig>>; 2],
}

impl Presentable {
    /// The leaf's subjectAltNames.
    pub fn names(&self) -> &[HostPattern] {
        &self.names
    }

    /// Whether it was issued for `host` (lower case, no port): what decides 421.
    pub fn covers(&self, host: &str) -> bool {
        self.match_of(host).is_some()
    }

    /// How it covers the host: by its very name, or by a wildcard.
    fn match_of(&self, host: &str) -> Option<Match> {
        let rest = host.split_once('.').map(|(_, rest)| rest);
        let matches = self.names.iter().filter_map(|name| match name.as_str().strip_prefix("*.") {
            Some(suffix) => (rest == Some(suffix)).then_some(Match::Wildcard),
            None => (name.as_str() == host).then_some(Match::Exact),
        });
        matches.max()
    }

    /// Whether it is valid at `now` (seconds since 1970).
    fn valid_at(&self, now: i64) -> bool {
        (self.valid.0..=self.valid.1).contains(&now)
    }
}

/// Chain and key as handshakes present them: with the OCSP response while it is
/// fresh. An old one would have browsers refuse what they take without any.
#[derive(Debug)]
struct Shown {
    bare: Arc<CertifiedKey>,
    /// With when it may be shown (seconds since 1970).
    stapled: Option<(Arc<CertifiedKey>, (i64, i64))>,
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let now = now();
        let stapled = self.stapled.iter().find(|(_, (from, until))| (*from..*until).contains(&now));
        Some(Arc::clone(stapled.map_or(&self.bare, |(key, _)| key)))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Match {
    Wildcard,
    Exact,
}

/// The certificates of this node by name, and the handshake that presents them.
///
/// One writer (the feed's follower, and whoever sets the default); a change acts
/// on the next handshake and never on a connection that is already made.
pub struct Certificates {
    table: RwLock<Table>,
    provider: Arc<CryptoProvider>,
    versions: &'static [&'static SupportedProtocolVersion],
    /// The settings common to all connections, per purpose; the key is added.
    base: [ServerConfig; 2],
    tickets: Arc<Ring>,
    unknown_sni: BadSni,
    missing_sni: BadSni,
    handshake_deadline: Duration,
}

#[derive(Default)]
struct Table {
    by_id: HashMap<CertificateId, Arc<Presentable>>,
    by_name: HashMap<Box<str>, Vec<(CertificateId, Arc<Presentable>)>>,
    default: Option<Arc<Presentable>>,
}

impl Certificates {
    /// A table without certificates.
    ///
    /// # Errors
    /// The machine gives no random bytes for ticket keys.
    pub fn new(settings: &Settings) -> Result<Self, String> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let versions: &'static [&'static SupportedProtocolVersion] = match settings.min_version {
            Version::Tls12 => &VERSIONS,
            Version::Tls13 => &VERSIONS[..1],
        };
        let base = |alpn: &[&[u8]]| -> Result<ServerConfig, String> {
            let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(versions)
                .map_err(|e| format!("no TLS: {e}"))?
                .with_no_client_auth()
                .with_cert_resolver(Arc::new(rustls::server::ResolvesServerCertUsingSni::new()));
            config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
            // Stateless resumption alone: nothing kept per visitor.
            config.session_storage = Arc::new(NoServerSessionStorage {});
            Ok(config)
        };
        let base = [base(&[b"h2", b"http/1.1"])?, base(&[])?];
        let Settings { unknown_sni, missing_sni, handshake_deadline, .. } = *settings;
        let tickets = Arc::new(Ring::new()?);
        let table = RwLock::default();
        Ok(Self { table, provider, versions, base, tickets, unknown_sni, missing_sni, handshake_deadline })
    }

    /// Adds a certificate, or replaces the one of the same id.
    ///
    /// # Errors
    /// What is wrong with it; the one before it stays.
    pub fn put(&self, certificate: &Certificate) -> Result<(), String> {
        let new = Arc::new(presentable(certificate, &self.provider)?);
        let id = &certificate.id;
        let mut table = self.table.write();
        table.forget(id);
        for name in &new.names {
            table.by_name.entry(name.as_str().into()).or_default().push((id.clone(), Arc::clone(&new)));
        }
        table.by_id.insert(id.clone(), new);
        Ok(())
    }

    /// Removes a certificate; connections that were made with it go on.
    pub fn remove(&self, id: &CertificateId) {
        self.table.write().forget(id);
    }

    /// The ids of all certificates but the default.
    pub fn ids(&self) -> Vec<CertificateId> {
        self.table.read().by_id.keys().cloned().collect()
    }

    /// Takes the keys of session tickets that all nodes share, or (`None`) makes
    /// some of its own, as it does at the start.
    ///
    /// # Errors
    /// They cannot be used; the ones before them stay.
    pub fn set_ticket_keys(&self, keys: Option<&TicketKeys>) -> Result<(), String> {
        self.tickets.set(keys)
    }

    /// Sets the certificate for visitors who name no host, or an unknown one.
    ///
    /// # Errors
    /// What is wrong with it; the one before it stays.
    pub fn put_default(&self, chain_pem: &str, key_pem: &str) -> Result<(), String> {
        let new = presentable_pair(chain_pem, key_pem, None, &self.provider)?;
        self.table.write().default = Some(Arc::new(new));
        Ok(())
    }

    /// Reads the default certificate from its files again, where there are any.
    ///
    /// # Errors
    /// Which file or what in it is wrong; the one before it stays.
    pub fn reload(&self, settings: &Settings) -> Result<(), String> {
        let (Some(chain), Some(key)) = (&settings.default_certificate, &settings.default_key) else { return Ok(()) };
        let read =
            |path: &Path| std::fs::read_to_string(path).map_err(|e| format!("{} cannot be read: {e}", path.display()));
        self.put_default(&read(chain)?, &read(key)?).map_err(|e| format!("{}: {e}", chain.display()))
    }

    /// The certificate that a visitor asking for `sni` is shown, or none.
    pub fn choose(&self, sni: Option<&HostName>, purpose: Purpose<'_>) -> Option<Arc<Presentable>> {
        self.choose_for(sni, sni.is_some(), purpose, &|_| true)
    }

    /// `named`: the visitor named something, even where `sni` is none because no
    /// host can have that name.
    fn choose_for(
        &self,
        sni: Option<&HostName>,
        named: bool,
        purpose: Purpose<'_>,
        usable: &dyn Fn(&Presentable) -> bool,
    ) -> Option<Arc<Presentable>> {
        let now = now();
        let table = self.table.read();
        let own = match purpose {
            Purpose::Http => None,
            Purpose::Raw { own } | Purpose::Asking { own, .. } => Some(own),
        };
        if let Some(own) = own.filter(|_| named) {
            let sni = sni.filter(|sni| own.iter().any(|name| name.covers(sni)))?;
            let found = table.best(sni.as_str(), sni.wildcard().as_deref(), usable, now);
            return found.or_else(|| table.default.clone().filter(|_| self.unknown_sni == BadSni::Default));
        }
        if let Some(sni) = sni
            && let Some(found) = table.best(sni.as_str(), sni.wildcard().as_deref(), usable, now)
        {
            return Some(found);
        }
        if named && self.unknown_sni == BadSni::Refuse {
            return None;
        }
        if let Some(found) = own.unwrap_or_default().iter().find_map(|name| table.best_for_pattern(name, usable, now)) {
            return Some(found);
        }
        let default = named || self.missing_sni == BadSni::Default;
        table.default.clone().filter(|_| default)
    }

    /// Makes a visitor's TLS connection, within the handshake deadline.
    ///
    /// # Errors
    /// `ClientCertificate`: the visitor showed none that may come. `TlsHandshake`:
    /// they spoke wrongly or too slowly, or there is no certificate to show them.
    ///
    /// # Cancel safety
    /// Dropping it closes the connection.
    pub async fn accept(&self, stream: Stream, purpose: Purpose<'_>) -> Result<Accepted, Error> {
        let start = Instant::now();
        // Boxed: it is some kilobytes, which the connection would keep for as long as it lasts.
        let handshake = Box::pin(self.handshake(stream, purpose));
        let made = tokio::time::timeout(self.handshake_deadline, handshake).await;
        match made.unwrap_or(Err((Failure::Timeout, None))) {
            Ok((accepted, resumed)) => {
                let resumed = if resumed { "yes" } else { "no" };
                metrics::histogram!("adit_tls_handshake_seconds", "resumed" => resumed)
                    .record(start.elapsed().as_secs_f64());
                Ok(accepted)
            }
            Err((failure, left)) => {
                metrics::counter!("adit_tls_handshake_failures_total", "reason" => failure.label()).increment(1);
                if failure != Failure::ClientCertificate {
                    return Err(Error::TlsHandshake);
                }
                if let Some(stream) = left {
                    let _ = tokio::time::timeout(FAREWELL, hear_out(stream)).await;
                }
                Err(Error::ClientCertificate)
            }
        }
    }

    /// The connection, and whether it goes on with an earlier session; or why not,
    /// and what is left where a failure was told in an alert.
    async fn handshake(
        &self,
        stream: Stream,
        purpose: Purpose<'_>,
    ) -> Result<(Accepted, bool), (Failure, Option<Stream>)> {
        let start = LazyConfigAcceptor::new(Acceptor::default(), stream).await.map_err(|e| (Failure::of(e), None))?;
        let hello = start.client_hello();
        let named = hello.server_name().is_some();
        let sni: Option<HostName> = hello.server_name().and_then(|name| name.parse().ok());
        let Some(certificate) = self.choose_for(sni.as_ref(), named, purpose, &|c| usable(c, &hello)) else {
            refuse(start.io, if named { UNRECOGNIZED_NAME } else { MISSING_EXTENSION }).await;
            return Err((Failure::NoCertificate, None));
        };
        let config = self.config(&certificate, purpose).map_err(|e| (Failure::of(std::io::Error::other(e)), None))?;
        let made = start.into_stream(config).into_fallible().await;
        let tls = made.map_err(|(error, stream)| (Failure::of(error), Some(stream)))?;
        let (_, session) = tls.get_ref();
        let client = match purpose {
            Purpose::Http | Purpose::Raw { .. } => None,
            Purpose::Asking { of, .. } => {
                let client = of.client(session.peer_certificates());
                Some(client.ok_or((Failure::ClientCertificate, None))?)
            }
        };
        let h2 = session.alpn_protocol() == Some(b"h2");
        let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
        let version = session.protocol_version().and_then(names::version);
        let cipher = session.negotiated_cipher_suite().and_then(|suite| names::cipher(suite.suite()));
        Ok((Accepted { stream: Stream::other(tls), sni, h2, certificate, version, cipher, client }, resumed))
    }

    fn config(&self, certificate: &Presentable, purpose: Purpose<'_>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let ([http, raw], [http_base, raw_base]) = (&certificate.configs, &self.base);
        let (cell, base, word) = match purpose {
            Purpose::Http => (http, http_base, &b"http"[..]),
            Purpose::Raw { .. } => (raw, raw_base, &b"raw"[..]),
            Purpose::Asking { of, .. } => return self.asking(certificate, of),
        };
        let made = cell.get_or_init(|| {
            let mut config = base.clone();
            config.cert_resolver = Arc::clone(&certificate.shown) as _;
            let context = [&certificate.fingerprint[..], word].concat();
            config.ticketer = Arc::new(Bound { ring: Arc::clone(&self.tickets), context });
            Arc::new(config)
        });
        Ok(Arc::clone(made))
    }

    /// Every handshake asks for the visitor's certificate: a session that was
    /// resumed would not, so none is kept here, none goes on, and no ticket is
    /// given or taken.
    fn asking(&self, certificate: &Presentable, of: &Arc<ClientAuth>) -> Result<Arc<ServerConfig>, rustls::Error> {
        let mut last = of.last.lock();
        if let Some((shown, config)) = &*last
            && Arc::ptr_eq(shown, &certificate.shown)
        {
            return Ok(Arc::clone(config));
        }
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_protocol_versions(self.versions)?
            .with_client_cert_verifier(Arc::clone(&of.verifier) as _)
            .with_cert_resolver(Arc::clone(&certificate.shown) as _);
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        let config = Arc::new(config);
        *last = Some((Arc::clone(&certificate.shown), Arc::clone(&config)));
        Ok(config)
    }
}

impl Table {
    fn forget(&mut self, id: &CertificateId) {
        let Some(old) = self.by_id.remove(id) else { return };
        for name in &old.names {
            if let Some(entries) = self.by_name.get_mut(name.as_str()) {
                entries.retain(|(of, _)| of != id);
                if entries.is_empty() {
                    self.by_name.remove(name.as_str());
                }
            }
        }
    }

    /// Among all that cover the host: a valid one, the exact name, an elliptic
    /// key (cheaper for both sides than RSA), the latest to expire.
    fn best(
        &self,
        host: &str,
        wildcard: Option<&str>,
        usable: &dyn Fn(&Presentable) -> bool,
        now: i64,
    ) -> Option<Arc<Presentable>> {
        let named = |name: Option<&str>| name.and_then(|n| self.by_name.get(n)).into_iter().flatten().map(|(_, c)| c);
        let rank = |c: &Arc<Presentable>| {
            let elliptic = c.shown.bare.key.algorithm() != SignatureAlgorithm::RSA;
            (usable(c), c.valid_at(now), c.match_of(host), elliptic, c.valid.1)
        };
        let default = self.default.iter().filter(|c| c.covers(host));
        named(Some(host)).chain(named(wildcard)).chain(default).max_by_key(|c| rank(c)).cloned()
    }

    /// The best certificate that a socket's own name has.
    fn best_for_pattern(
        &self,
        name: &HostPattern,
        usable: &dyn Fn(&Presentable) -> bool,
        now: i64,
    ) -> Option<Arc<Presentable>> {
        if name.is_wildcard() {
            return self.best(name.as_str(), None, usable, now);
        }
        let wildcard = name.as_str().split_once('.').map(|(_, rest)| format!("*.{rest}"));
        self.best(name.as_str(), wildcard.as_deref(), usable, now)
    }
}

/// Whether this visitor can verify signatures of the certificate's key. In TLS
/// 1.2 the cipher suite must agree with the key as well (RFC 8422 §5.1).
fn usable(certificate: &Presentable, hello: &ClientHello<'_>) -> bool {
    let key = &certificate.shown.bare.key;
    if key.choose_scheme(hello.signature_schemes()).is_none() {
        return false;
    }
    let rsa = key.algorithm() == SignatureAlgorithm::RSA;
    hello.cipher_suites().iter().any(|suite| {
        let name = suite.as_str().unwrap_or_default();
        name.starts_with("TLS13_") || name.contains(if rsa { "ECDHE_RSA" } else { "ECDHE_ECDSA" })
    })
}

/// What is served, the newest first.
static VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS13, &rustls::version::TLS12];

/// RFC 6066 §3.
const UNRECOGNIZED_NAME: u8 = 112;
/// RFC 8446 §9.2: what a server says that has to be told a name.
const MISSING_EXTENSION: u8 = 109;

/// Says the alert, so that the visitor's program can say more than "connection
/// closed".
async fn refuse(mut stream: Stream, alert: u8) {
    let _ = stream.write_all(&[21, 3, 3, 0, 2, 2, alert]).await;
    let _ = stream.shutdown().await;
}

/// How long a visitor who was told by an alert may take to read it.
const FAREWELL: Duration = Duration::from_secs(1);

/// Ends a connection whose visitor may be sending yet: closed with bytes unread it
/// would be reset, and the reset would overtake the alert.
async fn hear_out(mut stream: Stream) {
    let mut unheard = [0; 512];
    if stream.shutdown().await.is_ok() {
        while let Ok(1..) = stream.read(&mut unheard).await {}
    }
}

/// Checks a certificate record as `Certificates::put` would.
///
/// # Errors
/// What is wrong with it; says nothing of the key's bytes.
pub fn check(certificate: &Certificate) -> Result<(), String> {
    presentable(certificate, &aws_lc_rs::default_provider()).map(|_| ())
}

fn presentable(certificate: &Certificate, provider: &CryptoProvider) -> Result<Presentable, String> {
    let ocsp = certificate.ocsp.as_ref().map(|ocsp| ocsp.0.as_slice());
    presentable_pair(&certificate.chain_pem, &certificate.key_pem, ocsp, provider)
}

/// Reads chain, key and OCSP response, and holds them against each other.
fn presentable_pair(
    chain_pem: &str,
    key_pem: &str,
    ocsp: Option<&[u8]>,
    provider: &CryptoProvider,
) -> Result<Presentable, String> {
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| format!("chain_pem is not PEM: {e}"))?;
    let leaf = chain.first().ok_or("chain_pem holds no certificate")?;
    let Leaf { names, valid, serial } = leaf_facts(leaf)?;
    for (i, link) in chain.iter().enumerate().skip(1) {
        x509_parser::parse_x509_certificate(link).map_err(|e| format!("certificate {i} of chain_pem is bad: {e}"))?;
    }
    let fingerprint = digest::digest(&digest::SHA256, leaf).as_ref().try_into().map_err(|_| "no SHA-256")?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| "key_pem holds no private key")?;
    let bare = CertifiedKey::from_der(chain, key, provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => "key_pem is not the key of chain_pem's first certificate".to_owned(),
        _ => {
            "key_pem holds a key of a kind that is not served (RSA 2048-8192, P-256, P-384, P-521, Ed25519)".to_owned()
        }
    })?;
    let stapled = ocsp.map(|der| -> Result<_, String> {
        let fresh = ocsp::good_for(der, &serial).map_err(|why| format!("ocsp {why}"))?;
        let mut key = bare.clone();
        key.ocsp = Some(der.to_vec());
        Ok((Arc::new(key), fresh))
    });
    let shown = Arc::new(Shown { stapled: stapled.transpose()?, bare: Arc::new(bare) });
    Ok(Presentable { shown, fingerprint, names, valid, configs: Default::default() })
}

/// What is read from a leaf.
struct Leaf {
    names: Vec<HostPattern>,
    /// Seconds since 1970.
    valid: (i64, i64),
    /// As DER has it.
    serial: Vec<u8>,
}

fn leaf_facts(leaf: &CertificateDer<'_>) -> Result<Leaf, String> {
    use x509_parser::extensions::GeneralName;
    let (_, leaf) =
        x509_parser::parse_x509_certificate(leaf).map_err(|e| format!("chain_pem's first certificate is bad: {e}"))?;
    let san = leaf.subject_alternative_name().map_err(|e| format!("its subjectAltName is bad: {e}"))?;
    // A name that no visitor can ask for (a bare IP address, a mail address) is
    // no reason to refuse the others.
    let names: Vec<HostPattern> = san
        .iter()
        .flat_map(|san| &san.value.general_names)
        .filter_map(|name| match name {
            GeneralName::DNSName(name) => name.parse().ok(),
            _ => None,
        })
        .collect();
    if names.is_empty() {
        return Err("chain_pem's first certificate names no host (subjectAltName DNS)".into());
    }
    let validity = leaf.validity();
    let valid = (validity.not_before.timestamp(), validity.not_after.timestamp());
    Ok(Leaf { names, valid, serial: leaf.raw_serial().to_vec() })
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
