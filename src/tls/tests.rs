//! Real handshakes over memory, and what each kind of visitor is shown.

use parking_lot::Mutex;
use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256};
use rustls::client::ClientSessionMemoryCache;
use rustls::crypto::aws_lc_rs::cipher_suite;
use rustls::{SignatureScheme, SupportedProtocolVersion, version};
use tokio::io::AsyncReadExt;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::*;
use crate::fields::Base64;
use crate::model::TicketKeysId;

const HTTP: Purpose<'_> = Purpose::Http;

fn made_with(id: &str, names: &[&str], days: i64, pair: &KeyPair) -> Certificate {
    let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(400);
    params.not_after = time::OffsetDateTime::now_utc() + time::Duration::days(days);
    let chain_pem = params.self_signed(pair).unwrap().pem();
    let key_pem = pair.serialize_pem();
    Certificate { id: id.parse().unwrap(), chain_pem, key_pem, ocsp: None, extra: Default::default() }
}

fn made(id: &str, names: &[&str], days: i64) -> Certificate {
    made_with(id, names, days, &KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap())
}

fn certificates() -> Certificates {
    Certificates::new(&Settings::default()).unwrap()
}

fn name(text: &str) -> HostName {
    text.parse().unwrap()
}

/// The first name of what `sni` is shown.
fn shown(certificates: &Certificates, sni: Option<&str>, purpose: Purpose<'_>) -> Option<String> {
    certificates.choose(sni.map(name).as_ref(), purpose).map(|c| c.names()[0].to_string())
}

#[test]
fn exact_names_beat_wildcards_one_label_deep_and_the_default_takes_the_rest() {
    let all = certificates();
    assert_eq!(shown(&all, None, HTTP), None);
    let default = made("default", &["edge.test", "*.edge.test"], 10);
    all.put_default(&default.chain_pem, &default.key_pem).unwrap();
    all.put(&made("any", &["*.a.test"], 10)).unwrap();
    all.put(&made("one", &["one.a.test"], 5)).unwrap();
    assert_eq!(shown(&all, Some("one.a.test"), HTTP).as_deref(), Some("one.a.test"));
    assert_eq!(shown(&all, Some("two.a.test"), HTTP).as_deref(), Some("*.a.test"));
    for sni in [Some("x.two.a.test"), Some("a.test"), Some("web.edge.test"), None] {
        assert_eq!(shown(&all, sni, HTTP).as_deref(), Some("edge.test"), "{sni:?}");
    }
    all.remove(&"one".parse().unwrap());
    assert_eq!(shown(&all, Some("one.a.test"), HTTP).as_deref(), Some("*.a.test"));
    let shown = all.choose(Some(&name("one.a.test")), HTTP).unwrap();
    assert!(shown.covers("b.a.test") && !shown.covers("a.test") && !shown.covers("c.b.a.test"));
}

#[test]
fn a_raw_socket_shows_its_own_certificate_where_the_visitor_names_none() {
    let all = certificates();
    let default = made("default", &["edge.test"], 10);
    all.put_default(&default.chain_pem, &default.key_pem).unwrap();
    all.put(&made("own", &["db.own.test"], 10)).unwrap();
    all.put(&made("any", &["*.wild.test"], 10)).unwrap();
    let own = ["missing.test".parse().unwrap(), "db.own.test".parse().unwrap()];
    assert_eq!(shown(&all, None, Purpose::Raw { own: &own }).as_deref(), Some("db.own.test"));
    assert_eq!(shown(&all, Some("missing.test"), Purpose::Raw { own: &own }).as_deref(), Some("edge.test"));
    let wild = ["a.wild.test".parse().unwrap()];
    assert_eq!(shown(&all, None, Purpose::Raw { own: &wild }).as_deref(), Some("*.wild.test"));
    assert_eq!(shown(&all, None, Purpose::Raw { own: &[] }).as_deref(), Some("edge.test"));
}

#[test]
fn a_raw_socket_never_shows_a_name_that_is_not_its_own() {
    let all = certificates();
    let default = made("default", &["*.edge.test"], 10);
    all.put_default(&default.chain_pem, &default.key_pem).unwrap();
    all.put(&made("wiki", &["wiki.edge.test"], 10)).unwrap();
    let own = ["db.edge.test".parse().unwrap(), "*.db.edge.test".parse().unwrap()];
    for (sni, seen) in [
        ("db.edge.test", Some("*.edge.test")),
        ("a.db.edge.test", Some("*.edge.test")),
        ("wiki.edge.test", None),
        ("other.edge.test", None),
        ("unknown.test", None),
        ("a.a.db.edge.test", None),
    ] {
        assert_eq!(shown(&all, Some(sni), Purpose::Raw { own: &own }).as_deref(), seen, "{sni}");
    }
    assert_eq!(shown(&all, Some("wiki.edge.test"), Purpose::Raw { own: &[] }), None);
}

#[test]
fn of_several_for_a_name_the_latest_to_expire_is_shown_and_an_expired_one_only_alone() {
    let all = certificates();
    let put = |id: &str, days: i64| all.put(&made(id, &["a.test", &format!("{id}.test")], days)).unwrap();
    let second = || all.choose(Some(&name("a.test")), HTTP).unwrap().names()[1].to_string();
    put("expired", -1);
    assert_eq!(second(), "expired.test");
    put("late", 20);
    put("soon", 5);
    assert_eq!(second(), "late.test");
    all.put(&made("wild", &["*.test"], 50)).unwrap();
    assert_eq!(second(), "late.test");
    all.remove(&"late".parse().unwrap());
    all.remove(&"soon".parse().unwrap());
    assert_eq!(shown(&all, Some("a.test"), HTTP).as_deref(), Some("*.test"));
}

#[test]
fn what_does_not_belong_together_is_refused_and_the_old_one_stays() {
    let all = certificates();
    let good = made("a", &["a.test"], 10);
    all.put(&good).unwrap();
    let other = made("a", &["a.test"], 10);
    let refused = |chain: &str, key: &str| {
        let bad = Certificate { chain_pem: chain.into(), key_pem: key.into(), ..good.clone() };
        assert_eq!(check(&bad), all.put(&bad));
        all.put(&bad).unwrap_err()
    };
    assert!(refused(&good.chain_pem, &other.key_pem).contains("is not the key"));
    assert!(refused("", &good.key_pem).contains("no certificate"));
    assert!(refused(&good.chain_pem, "x").contains("no private key"));
    assert!(refused(&good.chain_pem.replace("MII", "AAA"), &good.key_pem).contains("bad"));
    assert_eq!(shown(&all, Some("a.test"), HTTP).as_deref(), Some("a.test"));
    assert_eq!(all.ids(), [good.id]);
}

/// Trusts everybody, and remembers the OCSP response.
#[derive(Debug)]
struct Trusting {
    schemes: Vec<SignatureScheme>,
    stapled: Mutex<Vec<u8>>,
}

impl rustls::client::danger::ServerCertVerifier for Trusting {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &rustls::pki_types::ServerName<'_>,
        stapled: &[u8],
        _: rustls::pki_types::UnixTime,
    ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
        *self.stapled.lock() = stapled.to_vec();
        Ok(rustls::client::danger::ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &rustls::DigitallySignedStruct,
    ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
        Ok(rustls::client::danger::HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}

const ANY: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::RSA_PSS_SHA256];

fn client(schemes: &[SignatureScheme], alpn: &[&[u8]]) -> rustls::ClientConfig {
    client_of(&[&version::TLS13, &version::TLS12], schemes, alpn).0
}

/// A client, and the verifier that it shows its certificate to.
fn client_of(
    versions: &[&'static SupportedProtocolVersion],
    schemes: &[SignatureScheme],
    alpn: &[&[u8]],
) -> (rustls::ClientConfig, Arc<Trusting>) {
    client_with(aws_lc_rs::default_provider(), versions, schemes, alpn)
}

fn client_with(
    provider: CryptoProvider,
    versions: &[&'static SupportedProtocolVersion],
    schemes: &[SignatureScheme],
    alpn: &[&[u8]],
) -> (rustls::ClientConfig, Arc<Trusting>) {
    let verifier = Arc::new(Trusting { schemes: schemes.to_vec(), stapled: Mutex::default() });
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&verifier) as _)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
    (config, verifier)
}

type Client = std::io::Result<TlsStream<tokio::io::DuplexStream>>;

async fn meet(
    all: &Certificates,
    purpose: Purpose<'_>,
    config: Arc<rustls::ClientConfig>,
    sni: &'static str,
) -> (Result<Accepted, Error>, Client) {
    let (near, far) = tokio::io::duplex(1 << 16);
    let visitor = async {
        let mut tls = TlsConnector::from(config).connect(sni.try_into().unwrap(), far).await?;
        // Tickets arrive after the handshake.
        let mut greeting = [0; 5];
        tls.read_exact(&mut greeting).await?;
        Ok(tls)
    };
    let edge = async {
        let mut accepted = all.accept(Stream::other(near), purpose).await?;
        accepted.stream.write_all(b"hello").await.unwrap();
        accepted.stream.flush().await.unwrap();
        Ok(accepted)
    };
    tokio::join!(edge, visitor)
}

#[tokio::test]
async fn of_two_keys_for_one_name_a_visitor_is_shown_the_one_that_it_can_verify() {
    let all = certificates();
    all.put(&made("ecdsa", &["a.test", "ecdsa.test"], 10)).unwrap();
    let rsa = KeyPair::generate_for(&PKCS_RSA_SHA256).unwrap();
    all.put(&made_with("rsa", &["a.test", "rsa.test"], 20, &rsa)).unwrap();
    let suites = |suites: &[rustls::SupportedCipherSuite]| CryptoProvider {
        cipher_suites: suites.to_vec(),
        ..aws_lc_rs::default_provider()
    };
    let usual = aws_lc_rs::default_provider;
    let rsa_alone = || suites(&[cipher_suite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256]);
    let ecdsa_alone = || suites(&[cipher_suite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256]);
    for (provider, version, schemes, expected) in [
        (usual(), &version::TLS13, ANY, "ecdsa.test"),
        (usual(), &version::TLS13, &ANY[1..], "rsa.test"),
        (usual(), &version::TLS13, &ANY[..1], "ecdsa.test"),
        (usual(), &version::TLS12, ANY, "ecdsa.test"),
        (usual(), &version::TLS12, &ANY[1..], "rsa.test"),
        (rsa_alone(), &version::TLS12, ANY, "rsa.test"),
        (ecdsa_alone(), &version::TLS12, ANY, "ecdsa.test"),
    ] {
        let config = client_with(provider, &[version], schemes, &[]).0;
        let (edge, visitor) = meet(&all, HTTP, Arc::new(config), "a.test").await;
        visitor.unwrap();
        assert_eq!(edge.unwrap().certificate.names()[1].as_str(), expected, "{version:?} {schemes:?}");
    }
}

#[tokio::test]
async fn http_agrees_on_h2_and_a_raw_socket_on_nothing() {
    let all = certificates();
    let own = ["a.test".parse().unwrap()];
    all.put(&made("a", &["a.test"], 10)).unwrap();
    for (purpose, alpn, h2, agreed) in [
        (HTTP, vec![&b"http/1.1"[..], b"h2"], true, Some(&b"h2"[..])),
        (HTTP, vec![b"http/1.1"], false, Some(b"http/1.1")),
        (HTTP, vec![], false, None),
        (Purpose::Raw { own: &own }, vec![b"h2", b"postgresql"], false, None),
    ] {
        let (edge, visitor) = meet(&all, purpose, Arc::new(client(ANY, &alpn)), "a.test").await;
        let (edge, visitor) = (edge.unwrap(), visitor.unwrap());
        assert_eq!((edge.h2, visitor.get_ref().1.alpn_protocol()), (h2, agreed));
        assert_eq!(edge.sni, Some(name("a.test")));
    }
}

#[tokio::test]
async fn a_visitor_resumes_with_a_ticket_and_the_hybrid_key_exchange() {
    let all = certificates();
    all.put(&made("a", &["a.test"], 10)).unwrap();
    let config = Arc::new(client(ANY, &[]));
    let (_, first) = meet(&all, HTTP, Arc::clone(&config), "a.test").await;
    let group = first.unwrap().get_ref().1.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, rustls::NamedGroup::X25519MLKEM768);
    let (_, second) = meet(&all, HTTP, config, "a.test").await;
    assert_eq!(second.unwrap().get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Resumed));
}

const VERSIONS: [&SupportedProtocolVersion; 2] = [&version::TLS13, &version::TLS12];

fn ring(keys: &[u8]) -> TicketKeys {
    let keys = keys.iter().map(|byte| Base64(vec![*byte; 32])).collect();
    TicketKeys { id: TicketKeysId, keys, extra: Default::default() }
}

/// A node with these certificates and ticket keys.
fn node(certificates: &[&Certificate], keys: &[u8]) -> Certificates {
    let node = Certificates::new(&Settings::default()).unwrap();
    certificates.iter().for_each(|certificate| node.put(certificate).unwrap());
    node.set_ticket_keys(Some(&ring(keys))).unwrap();
    node
}

/// Whether the visitor's connection went on with an earlier session; both sides
/// say the same, and both can use it.
async fn resumed(
    node: &Certificates,
    purpose: Purpose<'_>,
    config: &Arc<rustls::ClientConfig>,
    sni: &'static str,
) -> bool {
    let (edge, visitor) = meet(node, purpose, Arc::clone(config), sni).await;
    edge.unwrap();
    match visitor.unwrap().get_ref().1.handshake_kind().unwrap() {
        HandshakeKind::Resumed => true,
        HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest => false,
    }
}

#[tokio::test]
async fn a_ticket_of_one_node_resumes_on_every_node_that_has_its_key() {
    let certificate = made("a", &["a.test"], 10);
    for version in VERSIONS {
        let config = Arc::new(client_of(&[version], ANY, &[]).0);
        let first = node(&[&certificate], &[1]);
        assert!(!resumed(&first, HTTP, &config, "a.test").await);
        let second = node(&[&certificate], &[1]);
        assert!(resumed(&second, HTTP, &config, "a.test").await, "{version:?}");
        // The new key makes tickets, the old one is still read.
        second.set_ticket_keys(Some(&ring(&[2, 1]))).unwrap();
        assert!(resumed(&second, HTTP, &config, "a.test").await);
        assert!(resumed(&node(&[&certificate], &[2]), HTTP, &config, "a.test").await);
        // Where the key is gone, a full handshake, and tickets of its own.
        let third = node(&[&certificate], &[3]);
        assert!(!resumed(&third, HTTP, &config, "a.test").await);
        assert!(resumed(&third, HTTP, &config, "a.test").await);
        third.set_ticket_keys(None).unwrap();
        assert!(!resumed(&third, HTTP, &config, "a.test").await);
        assert!(resumed(&third, HTTP, &config, "a.test").await);
    }
}

/// A client's memory that takes every name for the same.
#[derive(Debug)]
struct OneName(ClientSessionMemoryCache);

fn one_name() -> rustls::pki_types::ServerName<'static> {
    "one.test".try_into().unwrap()
}

impl rustls::client::ClientSessionStore for OneName {
    fn set_kx_hint(&self, _: rustls::pki_types::ServerName<'static>, group: rustls::NamedGroup) {
        self.0.set_kx_hint(one_name(), group);
    }
    fn kx_hint(&self, _: &rustls::pki_types::ServerName<'_>) -> Option<rustls::NamedGroup> {
        self.0.kx_hint(&one_name())
    }
    fn set_tls12_session(
        &self,
        _: rustls::pki_types::ServerName<'static>,
        value: rustls::client::Tls12ClientSessionValue,
    ) {
        self.0.set_tls12_session(one_name(), value);
    }
    fn tls12_session(&self, _: &rustls::pki_types::ServerName<'_>) -> Option<rustls::client::Tls12ClientSessionValue> {
        self.0.tls12_session(&one_name())
    }
    fn remove_tls12_session(&self, _: &rustls::pki_types::ServerName<'static>) {
        self.0.remove_tls12_session(&one_name());
    }
    fn insert_tls13_ticket(
        &self,
        _: rustls::pki_types::ServerName<'static>,
        value: rustls::client::Tls13ClientSessionValue,
    ) {
        self.0.insert_tls13_ticket(one_name(), value);
    }
    fn take_tls13_ticket(
        &self,
        _: &rustls::pki_types::ServerName<'static>,
    ) -> Option<rustls::client::Tls13ClientSessionValue> {
        self.0.take_tls13_ticket(&one_name())
    }
}

#[tokio::test]
async fn a_ticket_is_good_for_its_name_certificate_and_purpose_alone() {
    let (both, other) = (made("both", &["a.test", "b.test"], 10), made("other", &["c.test"], 10));
    let renewed = made("both", &["a.test", "b.test"], 20);
    let node = node(&[&both, &other], &[1]);
    let fallback = made("fallback", &["fallback.test"], 10);
    node.put_default(&fallback.chain_pem, &fallback.key_pem).unwrap();
    let [a, b, c] = ["a.test", "b.test", "c.test"].map(|name| [name.parse().unwrap()]);
    let [raw_a, raw_b, raw_c] = [&a, &b, &c].map(|own| Purpose::Raw { own });
    for version in VERSIONS {
        let (mut config, _) = client_of(&[version], ANY, &[b"h2"]);
        config.resumption = rustls::client::Resumption::store(Arc::new(OneName(ClientSessionMemoryCache::new(8))));
        let config = Arc::new(config);
        let mut unnamed = (*config).clone();
        unnamed.enable_sni = false;
        let unnamed = Arc::new(unnamed);
        // Each begins with the tickets of the one before.
        for (n, (purpose, config, sni, resumes)) in [
            (HTTP, &config, "a.test", false),
            (HTTP, &config, "a.test", true),
            (HTTP, &config, "b.test", false),
            (HTTP, &config, "c.test", false),
            (HTTP, &config, "b.test", false),
            (raw_b, &config, "b.test", false),
            (raw_b, &config, "b.test", true),
            (HTTP, &config, "b.test", false),
            (HTTP, &config, "b.test", true),
            (HTTP, &unnamed, "b.test", false),
            // No name either time; what tells them apart is the certificate.
            (raw_a, &unnamed, "a.test", false),
            (raw_a, &unnamed, "a.test", true),
            (raw_c, &unnamed, "a.test", false),
            (raw_c, &unnamed, "a.test", true),
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(resumed(&node, purpose, config, sni).await, resumes, "{version:?}, visit {n}");
        }
        assert!(!resumed(&node, HTTP, &config, "a.test").await);
        node.put(&renewed).unwrap();
        assert!(!resumed(&node, HTTP, &config, "a.test").await, "who resumes was shown this certificate");
        node.put(&both).unwrap();
    }
}

#[tokio::test]
async fn a_resumed_session_agrees_on_alpn_anew() {
    let node = node(&[&made("a", &["a.test"], 10)], &[1]);
    for version in VERSIONS {
        let (config, _) = client_of(&[version], ANY, &[b"h2"]);
        let mut http1 = config.clone();
        http1.alpn_protocols = vec![b"http/1.1".to_vec()];
        assert!(!resumed(&node, HTTP, &Arc::new(config), "a.test").await);
        let (edge, visitor) = meet(&node, HTTP, Arc::new(http1), "a.test").await;
        let visitor = visitor.unwrap();
        let visitor = visitor.get_ref().1;
        assert_eq!(visitor.handshake_kind(), Some(HandshakeKind::Resumed));
        assert_eq!((edge.unwrap().h2, visitor.alpn_protocol()), (false, Some(&b"http/1.1"[..])));
    }
}

#[tokio::test]
async fn an_ocsp_response_is_stapled_while_it_is_fresh() {
    let mut certificate = made("a", &["a.test"], 10);
    let leaf = CertificateDer::from_pem_slice(certificate.chain_pem.as_bytes()).unwrap();
    let serial = leaf_facts(&leaf).unwrap().serial;
    let (now, day) = (now(), 24 * 3600);
    let response = |from, until| ocsp::tests::response(&serial, 0, from, Some(until));
    for (from, until, fresh) in
        [(now - day, now + day, true), (now - 2 * day, now - 1, false), (now + day, now + 2 * day, false)]
    {
        let der = response(from, until);
        certificate.ocsp = Some(Base64(der.clone()));
        let node = node(&[&certificate], &[1]);
        for version in VERSIONS {
            let (config, verifier) = client_of(&[version], ANY, &[]);
            assert!(!resumed(&node, HTTP, &Arc::new(config), "a.test").await);
            assert_eq!(*verifier.stapled.lock() == der, fresh, "{version:?}");
            assert_eq!(verifier.stapled.lock().is_empty(), !fresh);
        }
    }
    certificate.ocsp = Some(Base64(ocsp::tests::response(&[1, 2], 0, now, Some(now + day))));
    assert!(check(&certificate).unwrap_err().contains("ocsp is for another certificate"));
}

#[tokio::test]
async fn a_certificate_is_replaced_under_a_connection_that_goes_on() {
    let all = certificates();
    all.put(&made("a", &["a.test", "old.test"], 10)).unwrap();
    let shown = async || {
        let (edge, visitor) = meet(&all, HTTP, Arc::new(client(ANY, &[])), "a.test").await;
        let (edge, visitor) = (edge.unwrap(), visitor.unwrap());
        (edge.certificate.names()[1].to_string(), edge, visitor)
    };
    let (name, mut edge, mut visitor) = shown().await;
    assert_eq!(name, "old.test");
    let mut echo = async |byte: u8| {
        visitor.write_all(&[byte; 1000]).await.unwrap();
        let mut there = [0; 1000];
        edge.stream.read_exact(&mut there).await.unwrap();
        edge.stream.write_all(&there).await.unwrap();
        edge.stream.flush().await.unwrap();
        let mut back = [0; 1000];
        visitor.read_exact(&mut back).await.unwrap();
        assert_eq!(back, [byte; 1000]);
    };
    echo(1).await;
    all.put(&made("a", &["a.test", "new.test"], 10)).unwrap();
    assert_eq!(shown().await.0, "new.test");
    echo(2).await;
    all.remove(&"a".parse().unwrap());
    echo(3).await;
}

#[tokio::test]
async fn a_visitor_without_a_name_is_refused_where_set_but_by_a_socket_with_its_own() {
    let settings = Settings { missing_sni: BadSni::Refuse, ..Settings::default() };
    let all = Certificates::new(&settings).unwrap();
    let default = made("default", &["edge.test"], 10);
    all.put_default(&default.chain_pem, &default.key_pem).unwrap();
    all.put(&made("own", &["db.test"], 10)).unwrap();
    let mut unnamed = client(ANY, &[]);
    unnamed.enable_sni = false;
    let unnamed = Arc::new(unnamed);
    let (edge, visitor) = meet(&all, HTTP, Arc::clone(&unnamed), "edge.test").await;
    assert_eq!(edge.unwrap_err(), Error::TlsHandshake);
    let error = visitor.unwrap_err().to_string();
    assert!(error.contains("MissingExtension"), "{error}");
    let own = ["db.test".parse().unwrap()];
    let (edge, _) = meet(&all, Purpose::Raw { own: &own }, unnamed, "edge.test").await;
    assert_eq!(edge.unwrap().certificate.names()[0].as_str(), "db.test");
    // An unknown name is no missing one.
    let (edge, _) = meet(&all, HTTP, Arc::new(client(ANY, &[])), "other.test").await;
    assert_eq!(edge.unwrap().certificate.names()[0].as_str(), "edge.test");
}

#[tokio::test]
async fn handshakes_are_counted_by_why_they_failed_and_timed_where_they_did_not() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let _recording = metrics::set_default_local_recorder(&recorder);
    let deadline = Duration::from_millis(300);
    let settings = Settings {
        unknown_sni: BadSni::Refuse,
        min_version: Version::Tls13,
        handshake_deadline: deadline,
        ..Settings::default()
    };
    let all = Certificates::new(&settings).unwrap();
    all.put(&made("a", &["a.test"], 10)).unwrap();
    let usual = Arc::new(client(ANY, &[]));
    for _ in 0..2 {
        meet(&all, HTTP, Arc::clone(&usual), "a.test").await.0.unwrap();
    }
    let failing = async |config, sni| meet(&all, HTTP, Arc::new(config), sni).await.0.unwrap_err();
    failing(client(ANY, &[]), "other.test").await;
    failing(client_of(&[&version::TLS12], ANY, &[]).0, "a.test").await;
    failing(client(&ANY[1..], &[]), "a.test").await;
    let strict = rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    failing(strict, "a.test").await;
    for (bytes, close) in [(&b"\x16\x03\x01\x00\x05"[..], true), (b"junk and more", true), (b"", false)] {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(bytes).await.unwrap();
        let held = (!close).then_some(far);
        all.accept(Stream::other(near), HTTP).await.unwrap_err();
        drop(held);
    }
    let text = recorder.handle().render();
    for reason in ["timeout", "no_certificate", "protocol_version", "no_shared_cipher", "alert", "gone", "other"] {
        let line = format!("adit_tls_handshake_failures_total{{reason=\"{reason}\"}} 1\n");
        assert!(text.contains(&line), "{reason}: {text}");
    }
    for resumed in ["yes", "no"] {
        let line = format!("adit_tls_handshake_seconds_count{{resumed=\"{resumed}\"}} 1\n");
        assert!(text.contains(&line), "{resumed}: {text}");
    }
}

#[tokio::test]
async fn an_unknown_name_is_refused_by_its_alert_where_set() {
    let settings = Settings { unknown_sni: BadSni::Refuse, ..Settings::default() };
    let all = Certificates::new(&settings).unwrap();
    let default = made("default", &["edge.test"], 10);
    all.put_default(&default.chain_pem, &default.key_pem).unwrap();
    let (edge, visitor) = meet(&all, HTTP, Arc::new(client(ANY, &[])), "other.test").await;
    assert_eq!(edge.unwrap_err(), Error::TlsHandshake);
    let error = visitor.unwrap_err().to_string();
    assert!(error.contains("UnrecognisedName"), "{error}");
}

#[tokio::test]
async fn a_silent_visitor_is_let_go_at_the_deadline() {
    let (near, _far) = tokio::io::duplex(64);
    let deadline = Duration::from_millis(30);
    let all = Certificates::new(&Settings { handshake_deadline: deadline, ..Settings::default() }).unwrap();
    let begun = tokio::time::Instant::now();
    assert_eq!(all.accept(Stream::other(near), HTTP).await.unwrap_err(), Error::TlsHandshake);
    assert!(begun.elapsed() >= deadline);
}
