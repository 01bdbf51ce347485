//! Who may connect to a service that is not HTTP: by the certificate they show, and
//! by their address. Each test says what a visitor notices.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rcgen::{CertificateParams, DnType, DnValue, ExtendedKeyUsagePurpose, Issuer, KeyPair, SanType, SerialNumber};
use rustls::client::{ClientSessionMemoryCache, ResolvesClientCert, Resumption};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, HandshakeKind, SignatureScheme, SupportedProtocolVersion, version};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use crate::harness::*;

/// The name that a node's made-up certificate is for.
const NAME: &str = "db.edge.localhost";
const VERSIONS: [&SupportedProtocolVersion; 2] = [&version::TLS12, &version::TLS13];
/// Within which a changed rule ends what it no longer allows.
const PROMPT: Duration = Duration::from_secs(1);

/// A CA of visitors' certificates.
struct Ca {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
    /// Its own certificate, where it is an intermediate one.
    chain: String,
}

impl Ca {
    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params
    }

    fn new(name: &str) -> Self {
        let (key, params) = (KeyPair::generate().unwrap(), Self::params(name));
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem, chain: String::new() }
    }

    fn intermediate(&self, name: &str) -> Self {
        let (key, params) = (KeyPair::generate().unwrap(), Self::params(name));
        let pem = params.signed_by(&key, &self.issuer).unwrap().pem();
        Self { issuer: Issuer::new(params, key), chain: pem.clone() + &self.chain, pem }
    }

    fn issue(&self, common_name: &str, change: impl FnOnce(&mut CertificateParams)) -> Leaf {
        let (key, params) = Leaf::params(common_name, change);
        let made = params.signed_by(&key, &self.issuer).unwrap();
        Leaf { chain: made.pem() + &self.chain, key: key.serialize_pem() }
    }

    fn plain(&self, common_name: &str) -> Leaf {
        self.issue(common_name, |_| {})
    }
}

/// A visitor's certificate and its key.
#[derive(Clone)]
struct Leaf {
    chain: String,
    key: String,
}

impl Leaf {
    fn params(common_name: &str, change: impl FnOnce(&mut CertificateParams)) -> (KeyPair, CertificateParams) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, DnValue::Utf8String(common_name.to_owned()));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = OffsetDateTime::now_utc() - time::Duration::days(1);
        params.not_after = OffsetDateTime::now_utc() + time::Duration::days(30);
        change(&mut params);
        (KeyPair::generate().unwrap(), params)
    }

    fn self_signed(common_name: &str) -> Self {
        let (key, params) = Self::params(common_name, |_| {});
        Self { chain: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
    }

    fn certified(&self) -> CertifiedKey {
        let chain = CertificateDer::pem_slice_iter(self.chain.as_bytes()).map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        // Unchecked: who shows another's certificate has not its key.
        CertifiedKey::new(chain, rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap())
    }
}

/// Shows its certificate whatever the server would like.
#[derive(Debug)]
struct Shows(Arc<CertifiedKey>);

impl ResolvesClientCert for Shows {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
    fn has_certs(&self) -> bool {
        true
    }
}

/// A service behind a node.
struct Scene {
    node: Node,
    origin: Origin,
    ssh: Ssh,
    record: Value,
    addr: SocketAddr,
}

impl Scene {
    async fn new(record: Value) -> Self {
        Self::on(Node::start().await, record).await
    }

    async fn on(node: Node, record: Value) -> Self {
        let passthrough = record["type"] == "passthrough";
        let origin = if passthrough { Origin::raw_tls(NAME).await } else { Origin::raw().await };
        node.put("sockets/db", record.clone()).await;
        node.put("tunnels/db", json!({"socket": "db", "keys": [node.key.line()]})).await;
        let ssh = Ssh::start(&node, &[&format!("db:80:{}", origin.target())]).await;
        let addr = match passthrough {
            true => node.addr("https"),
            false => SocketAddr::new(node.ip, node.port_of("db").await),
        };
        Self { node, origin, ssh, record, addr }
    }

    /// A tls socket that asks for certificates.
    async fn asking(asked: Value) -> Self {
        Self::new(json!({"type": "tls", "gate": {"client_certificates": asked}})).await
    }

    /// Puts another gate in its record.
    async fn gate(&self, gate: Value) {
        let mut record = self.record.clone();
        record["gate"] = gate;
        self.node.put("sockets/db", record).await;
    }

    async fn asks(&self, asked: Value) {
        self.gate(json!({"client_certificates": asked})).await;
    }

    fn accepted(&self) -> usize {
        self.origin.accepted.load(Ordering::Relaxed)
    }

    fn config(&self, who: Option<&Leaf>, versions: &[&'static SupportedProtocolVersion]) -> ClientConfig {
        let mut roots = rustls::RootCertStore::empty();
        let ca = match &self.origin.certificate {
            Some(pem) => pem.clone().into_bytes(),
            None => std::fs::read(self.node.ca()).unwrap(),
        };
        for ca in CertificateDer::pem_slice_iter(&ca) {
            roots.add(ca.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(versions).unwrap();
        let builder = builder.with_root_certificates(roots);
        match who {
            None => builder.with_no_client_auth(),
            Some(leaf) => builder.with_client_cert_resolver(Arc::new(Shows(Arc::new(leaf.certified())))),
        }
    }

    /// Who was let in has an echo of the origin; else what they were told.
    async fn visit(&self, who: Option<&Leaf>, version: &'static SupportedProtocolVersion) -> Result<Io, String> {
        let config = Arc::new(self.config(who, &[version]));
        let visit = async {
            let io = tls_connect(self.addr, NAME, config).await.map_err(|e| e.to_string())?;
            echoed(io).await
        };
        within(DEADLINE, "an end of the visit", visit).await
    }

    /// In both versions.
    async fn lets_in(&self, who: &Leaf) {
        for version in VERSIONS {
            self.visit(Some(who), version).await.map_err(|e| format!("{:?}: {e}", version.version)).unwrap();
        }
    }

    /// In both versions, without a connection to the origin.
    async fn refuses(&self, who: Option<&Leaf>, alert: &str) {
        let before = self.accepted();
        for version in VERSIONS {
            let told = self.visit(who, version).await.err();
            let told = told.unwrap_or_else(|| panic!("let in where {alert} was due, {:?}", version.version));
            assert_eq!(told, format!("received fatal alert: {alert}"), "{:?}", version.version);
        }
        assert_eq!(self.accepted(), before, "a refused visitor reached the origin");
    }

    /// So many visits ended with this error, one way or another told of at their end.
    async fn counts(&self, error: &str, visits: f64) {
        let kind = self.record["type"].as_str().unwrap();
        let labels = format!("type=\"{kind}\",class=\"none\",error=\"{error}\",fault=\"visitor\"");
        let (metric, word) = (format!("adit_visits_total{{{labels}}}"), format!("error=\"{error}\""));
        eventually(&format!("{visits} of {error}"), async || {
            let told = self.node.log().matches(&word).count() as f64 >= visits;
            (told && self.node.metric(&metric).await == visits).then_some(())
        })
        .await;
    }
}

async fn echoed(mut io: Io) -> Result<Io, String> {
    let said = async {
        io.write_all(b"ECHO\nx").await?;
        io.flush().await?;
        io.read_u8().await
    };
    match said.await {
        Ok(byte) => assert_eq!(byte, b'x'),
        Err(error) => return Err(error.to_string()),
    }
    Ok(io)
}

/// Whoever is inside and no longer allowed is cut off, and soon.
async fn is_cut(io: &mut Io) {
    let begun = Instant::now();
    let end = within(DEADLINE, "an end", io.read_u8()).await;
    assert!(end.is_err() && begun.elapsed() < PROMPT, "{end:?} after {:?}", begun.elapsed());
}

async fn still_echoes(io: &mut Io) {
    let echo = async {
        io.write_all(b"y").await?;
        io.flush().await?;
        io.read_u8().await
    };
    assert_eq!(within(DEADLINE, "an echo", echo).await.unwrap(), b'y');
}

fn email(address: &str) -> SanType {
    SanType::Rfc822Name(address.to_owned().try_into().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_the_rules_name_is_let_in() {
    let ca = Ca::new("visitors");
    let scene = Scene::asking(json!({"ca_pem": ca.pem, "allow_subjects": ["ann"]})).await;
    scene.lets_in(&ca.plain("ann")).await;
    let in_acme = |p: &mut CertificateParams| p.distinguished_name.push(DnType::OrganizationName, "Acme, Inc.");
    scene.lets_in(&ca.issue("ann", in_acme)).await;
    scene.refuses(Some(&ca.plain("bob")), "AccessDenied").await;

    scene.asks(json!({"ca_pem": ca.pem, "allow_subjects": ["O=Acme\\, Inc.,CN=ann"]})).await;
    scene.lets_in(&ca.issue("ann", in_acme)).await;
    scene.refuses(Some(&ca.plain("ann")), "AccessDenied").await;

    scene.asks(json!({"ca_pem": ca.pem, "allow_emails": ["ann@Bücher.example"]})).await;
    let addressed =
        |address: &'static str| ca.issue("x", |p| p.subject_alt_names = vec![email("z@y.test"), email(address)]);
    scene.lets_in(&addressed("Ann@xn--bcher-kva.example")).await;
    scene.refuses(Some(&addressed("ann@xn--bcher-kva.example.evil.test")), "AccessDenied").await;
    let address_as_name = ca.issue("ann@xn--bcher-kva.example", |p| {
        let kind = DnType::CustomDnType(vec![1, 2, 840, 113549, 1, 9, 1]);
        let address = DnValue::Ia5String("ann@xn--bcher-kva.example".try_into().unwrap());
        p.distinguished_name.push(kind, address);
    });
    scene.refuses(Some(&address_as_name), "AccessDenied").await;

    scene.asks(json!({"ca_pem": ca.pem, "allow_subjects": ["*"]})).await;
    scene.lets_in(&ca.plain("whoever")).await;
    scene.lets_in(&ca.issue("", |p| p.extended_key_usages = Vec::new())).await;

    // Nobody in both lists: nobody.
    scene.asks(json!({"ca_pem": ca.pem})).await;
    scene.refuses(Some(&ca.plain("ann")), "AccessDenied").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_intermediate_ca_vouches_where_its_certificate_comes_along() {
    let ca = Ca::new("visitors");
    let middle = ca.intermediate("middle").intermediate("lower");
    let scene = Scene::asking(json!({"ca_pem": ca.pem, "allow_subjects": ["ann"]})).await;
    let ann = middle.plain("ann");
    scene.lets_in(&ann).await;
    let bare =
        Leaf { chain: ann.chain.split_inclusive("-----END CERTIFICATE-----\n").next().unwrap().to_owned(), ..ann };
    scene.refuses(Some(&bare), "UnknownCA").await;
    // The issuer's name is not the visitor's.
    let named = ca.intermediate("ann");
    scene.refuses(Some(&named.plain("bob")), "AccessDenied").await;
    // A visitor is no CA, and a CA no visitor.
    let (key, params) = Leaf::params("ann", |_| {});
    let leaf = params.signed_by(&key, &ca.issuer).unwrap().pem();
    let made_up = Ca { issuer: Issuer::new(params, key), pem: leaf.clone(), chain: leaf };
    assert!(scene.visit(Some(&made_up.plain("ann")), &version::TLS13).await.is_err());
    let a_ca = ca.issue("ann", |p| p.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained));
    assert!(scene.visit(Some(&a_ca), &version::TLS13).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_shows_no_good_certificate_is_told_why_by_an_alert() {
    let (ca, other) = (Ca::new("visitors"), Ca::new("visitors"));
    let scene = Scene::asking(json!({"ca_pem": ca.pem, "allow_subjects": ["*", "ann"]})).await;
    let now = OffsetDateTime::now_utc();
    scene.refuses(None, "CertificateRequired").await;
    // By name the same CA, by key another.
    let forged = scene.visit(Some(&other.plain("ann")), &version::TLS13).await.err().unwrap();
    assert!(["UnknownCA", "DecryptError"].iter().any(|alert| forged.ends_with(alert)), "{forged}");
    scene.refuses(Some(&Ca::new("others").plain("ann")), "UnknownCA").await;
    scene.refuses(Some(&Leaf::self_signed("ann")), "UnknownCA").await;
    let expired = ca.issue("ann", |p| p.not_after = now - time::Duration::minutes(1));
    scene.refuses(Some(&expired), "CertificateExpired").await;
    let early = ca.issue("ann", |p| p.not_before = now + time::Duration::minutes(1));
    scene.refuses(Some(&early), "CertificateExpired").await;
    let servers = ca.issue("ann", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]);
    scene.refuses(Some(&servers), "UnsupportedCertificate").await;
    // Whoever talks on without listening finds the reason yet.
    let config = Arc::new(scene.config(None, &[&version::TLS13]));
    let mut eager = tls_connect(scene.addr, NAME, config).await.unwrap();
    let talk = async {
        eager.write_all(&vec![0; 4 << 20]).await?;
        eager.flush().await
    };
    within(DEADLINE, "all to be said", talk).await.unwrap();
    let told = within(DEADLINE, "an alert", eager.read_u8()).await.unwrap_err().to_string();
    assert_eq!(told, "received fatal alert: CertificateRequired");
    // A copy without its key: nothing is said of what the rules say of it.
    scene.asks(json!({"ca_pem": ca.pem, "allow_subjects": ["ann"]})).await;
    for name in ["ann", "bob"] {
        let copy = Leaf { key: KeyPair::generate().unwrap().serialize_pem(), ..ca.plain(name) };
        scene.refuses(Some(&copy), "DecryptError").await;
    }
    assert_eq!(scene.accepted(), 0);
    scene.lets_in(&ca.plain("ann")).await;
    scene.counts("client_certificate", 18.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_only_looks_like_an_allowed_one_is_turned_away() {
    let ca = Ca::new("visitors");
    let rules = ["ann", "O=Acme,CN=eve"];
    let scene =
        Scene::asking(json!({"ca_pem": ca.pem, "allow_subjects": rules, "allow_emails": ["ann@acme.test"]})).await;
    for name in [
        "Ann",
        "ann ",
        " ann",
        "ann\0",
        "ann\0.evil.test",
        "ann,O=x",
        "ann.evil.test",
        "an",
        "O=Acme,CN=eve",
        "*",
        "аnn",
    ] {
        scene.refuses(Some(&ca.plain(name)), "AccessDenied").await;
    }
    // Of two common names it is not clear which one is theirs.
    for (first, second) in [("ann", "bob"), ("bob", "ann")] {
        let two = ca.issue(first, |p| {
            p.distinguished_name.push(DnType::CustomDnType(vec![2, 5, 4, 3]), DnValue::Utf8String(second.into()));
        });
        scene.refuses(Some(&two), "AccessDenied").await;
    }
    // As a host's name it is nobody's address.
    let as_host = ca.issue("x", |p| p.subject_alt_names = vec![SanType::DnsName("ann".to_owned().try_into().unwrap())]);
    scene.refuses(Some(&as_host), "AccessDenied").await;
    scene.lets_in(&ca.plain("ann")).await;
    assert_eq!(scene.accepted(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_certificate_is_turned_away_and_its_successor_let_in() {
    let ca = Ca::new("visitors");
    let serial = |n: u64| ca.issue("ann", |p| p.serial_number = Some(SerialNumber::from(n)));
    let rules = json!({"ca_pem": ca.pem, "allow_subjects": ["*"], "revoked_serials": ["0A:bc"]});
    let scene = Scene::asking(rules).await;
    scene.refuses(Some(&serial(0xABC)), "AccessDenied").await;
    scene.lets_in(&serial(0xABD)).await;
}

/// A visitor's handshake, with what it may resume.
async fn handshake(addr: SocketAddr, config: &Arc<ClientConfig>) -> Result<HandshakeKind, String> {
    let tcp = TcpStream::connect(addr).await.unwrap();
    let name = ServerName::try_from(NAME).unwrap();
    let made = async {
        let mut tls = tokio_rustls::TlsConnector::from(Arc::clone(config)).connect(name, tcp).await?;
        tls.write_all(b"ECHO\nx").await?;
        // Tickets come before the origin's first byte.
        tls.read_u8().await?;
        Ok::<_, std::io::Error>(tls.get_ref().1.handshake_kind().unwrap())
    };
    within(DEADLINE, "a handshake", made).await.map_err(|e| e.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_earlier_session_stands_in_for_a_certificate() {
    let ca = Ca::new("visitors");
    let asked = json!({"ca_pem": ca.pem, "allow_subjects": ["ann"]});
    for version in VERSIONS {
        let scene = Scene::new(json!({"type": "tls"})).await;
        // A neighbour with the same certificate, which asks for none.
        let beside = json!({"type": "tls", "hostnames": ["*.edge.localhost"]});
        scene.node.put("sockets/open", beside).await;
        scene.node.put("tunnels/open", json!({"socket": "open", "keys": [scene.node.key.line()]})).await;
        let _ssh = Ssh::start(&scene.node, &[&format!("open:80:{}", scene.origin.target())]).await;
        let open = SocketAddr::new(scene.node.ip, scene.node.port_of("open").await);

        let remembering = |who: Option<&Leaf>| {
            let mut config = scene.config(who, &[version]);
            config.resumption = Resumption::store(Arc::new(ClientSessionMemoryCache::new(64)));
            Arc::new(config)
        };
        // From before there was a rule, and from next door: both resume where they may.
        let (before, next_door) = (remembering(None), remembering(None));
        for (config, addr) in [(&before, scene.addr), (&next_door, open)] {
            assert_eq!(handshake(addr, config).await, Ok(HandshakeKind::Full));
            assert_eq!(handshake(addr, config).await, Ok(HandshakeKind::Resumed));
        }
        scene.asks(asked.clone()).await;
        for config in [&before, &next_door] {
            let told = handshake(scene.addr, config).await;
            assert_eq!(told, Err("received fatal alert: CertificateRequired".into()), "{version:?}");
        }
        // An allowed visitor resumes nothing either, and is given nothing to resume.
        let ann = remembering(Some(&ca.plain("ann")));
        for _ in 0..3 {
            assert_eq!(handshake(scene.addr, &ann).await, Ok(HandshakeKind::Full), "{version:?}");
        }
        // What is kept from next door is nothing to resume here, even by who is allowed.
        assert_eq!(handshake(open, &ann).await, Ok(HandshakeKind::Full));
        assert_eq!(handshake(open, &ann).await, Ok(HandshakeKind::Resumed));
        assert_eq!(handshake(scene.addr, &ann).await, Ok(HandshakeKind::Full));
        scene.asks(json!({"ca_pem": ca.pem, "allow_subjects": ["bob"]})).await;
        let told = handshake(scene.addr, &ann).await;
        assert_eq!(told, Err("received fatal alert: AccessDenied".into()), "{version:?}");
    }
}

/// One visit by OpenSSL's client, and what it says of it.
async fn s_client(scene: &Scene, dir: &std::path::Path, who: Option<&Leaf>, arguments: &[&str]) -> (bool, String) {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &scene.addr.to_string(), "-servername", NAME, "-ign_eof", "-CAfile"]);
    command.arg(scene.node.ca()).args(["-verify_return_error"]).args(arguments);
    if let Some(leaf) = who {
        std::fs::write(dir.join("chain.pem"), &leaf.chain).unwrap();
        std::fs::write(dir.join("key.pem"), &leaf.key).unwrap();
        command.arg("-cert").arg(dir.join("chain.pem")).arg("-cert_chain").arg(dir.join("chain.pem"));
        command.arg("-key").arg(dir.join("key.pem"));
    }
    let mut client = Program::start("openssl s_client", command);
    client.tell("DOWN 0");
    let (ended, output) = client.finished(DEADLINE).await;
    (ended.success(), output)
}

#[tokio::test(flavor = "multi_thread")]
async fn openssl_is_let_in_with_a_certificate_and_given_no_session_to_keep() {
    let (ca, dir) = (Ca::new("visitors"), tempfile::tempdir().unwrap());
    let scene = Scene::asking(json!({"ca_pem": ca.pem, "allow_subjects": ["ann"]})).await;
    let (ann, bob) = (ca.intermediate("middle").plain("ann"), ca.plain("bob"));
    let session = dir.path().join("session");
    let session = session.to_str().unwrap();
    for (version, required) in [("-tls1_2", "alert number 116"), ("-tls1_3", "alert certificate required")] {
        let (good, said) = s_client(&scene, dir.path(), Some(&ann), &[version, "-sess_out", session]).await;
        assert!(good && said.contains("New, TLSv1."), "{said}");
        // The CAs that are asked for are named.
        assert!(said.contains("Acceptable client certificate CA names") && said.contains("CN = visitors"), "{said}");
        assert!(!said.contains("session ticket:") && !said.contains("New Session Ticket arrived"), "{said}");
        assert!(!said.contains("Session-ID: ") || said.contains("Session-ID: \n"), "{said}");
        if std::path::Path::new(session).exists() {
            let (good, said) = s_client(&scene, dir.path(), Some(&ann), &[version, "-sess_in", session]).await;
            assert!(good && !said.contains("Reused, "), "{said}");
            let (_, said) = s_client(&scene, dir.path(), None, &[version, "-sess_in", session]).await;
            assert!(said.contains(required), "{said}");
            std::fs::remove_file(session).unwrap();
        }
        let (_, said) = s_client(&scene, dir.path(), None, &[version]).await;
        assert!(said.contains(required), "{said}");
        let (_, said) = s_client(&scene, dir.path(), Some(&bob), &[version]).await;
        assert!(said.contains("alert access denied"), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_rule_ends_what_it_no_longer_allows_and_nothing_else() {
    let (ca, new) = (Ca::new("visitors"), Ca::new("visitors of tomorrow"));
    let scene = Scene::asking(json!({"ca_pem": ca.pem, "allow_subjects": ["ann", "bob", "eve"]})).await;
    let eve = ca.issue("eve", |p| p.serial_number = Some(SerialNumber::from(0x77)));
    let inside = async |who: &Leaf| scene.visit(Some(who), &version::TLS13).await.unwrap();
    let (mut ann, mut bob, mut eve) =
        (inside(&ca.plain("ann")).await, inside(&ca.plain("bob")).await, inside(&eve).await);

    scene.asks(json!({"ca_pem": ca.pem, "allow_subjects": ["ann", "eve"]})).await;
    is_cut(&mut bob).await;
    scene.refuses(Some(&ca.plain("bob")), "AccessDenied").await;
    let rules = json!({"ca_pem": ca.pem, "allow_subjects": ["ann", "eve"], "revoked_serials": ["77"]});
    scene.asks(rules).await;
    is_cut(&mut eve).await;
    still_echoes(&mut ann).await;

    // A CA more, as when the old one is to be left behind.
    scene.asks(json!({"ca_pem": ca.pem.clone() + &new.pem, "allow_subjects": ["ann"]})).await;
    still_echoes(&mut ann).await;
    let mut successor = inside(&new.plain("ann")).await;
    scene.asks(json!({"ca_pem": new.pem, "allow_subjects": ["ann"]})).await;
    is_cut(&mut ann).await;
    still_echoes(&mut successor).await;
    scene.refuses(Some(&ca.plain("ann")), "UnknownCA").await;

    // Other changes of the record, and no rules at all.
    scene.node.put("tunnels/db", json!({"socket": "db", "keys": [scene.node.key.line()], "note": 1})).await;
    scene.gate(Value::Null).await;
    still_echoes(&mut successor).await;
    let mut anybody = scene.visit(None, &version::TLS12).await.unwrap();
    scene.asks(json!({"ca_pem": new.pem, "allow_subjects": ["ann"]})).await;
    is_cut(&mut anybody).await;
    still_echoes(&mut successor).await;
    scene.gate(json!({"ip": {"deny": ["127.0.0.0/8"]}})).await;
    is_cut(&mut successor).await;
    // Four cut, and two told at the door twice.
    scene.counts("client_certificate", 8.0).await;
    scene.counts("forbidden", 1.0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_still_waits_for_the_origin_is_cut_by_a_changed_rule_too() {
    let scene = Scene::new(json!({"type": "tcp"})).await;
    // Its client does not answer: a visit waits up to dial.deadline, 15 s.
    scene.ssh.program.signal("STOP");
    let mut waiting: Io = Box::new(TcpStream::connect(scene.addr).await.unwrap());
    let raw = "adit_raw_connections{type=\"tcp\"}";
    eventually("a visit", async || (scene.node.metric(raw).await == 1.0).then_some(())).await;
    scene.gate(json!({"ip": {"deny": ["127.0.0.0/8"]}})).await;
    is_cut(&mut waiting).await;
    scene.counts("forbidden", 1.0).await;
}

/// Raw bytes from this address, or TLS inside where the type has it.
async fn from(scene: &Scene, source: IpAddr, to: SocketAddr) -> Result<Io, String> {
    let socket = if source.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }.unwrap();
    socket.bind(SocketAddr::new(source, 0)).unwrap();
    let config = Arc::new(scene.config(None, &VERSIONS));
    let made = async {
        let tcp = socket.connect(to).await.map_err(|e| e.to_string())?;
        if scene.record["type"] == "tcp" {
            return echoed(Box::new(tcp)).await;
        }
        let tls = tokio_rustls::TlsConnector::from(config).connect(ServerName::try_from(NAME).unwrap(), tcp).await;
        echoed(Box::new(tls.map_err(|e| e.to_string())?)).await
    };
    within(DEADLINE, "an end of the visit", made).await
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

async fn addresses_decide(kind: &str) {
    let hostnames = if kind == "passthrough" { json!([NAME]) } else { json!([]) };
    let rules = json!({"ip": {"allow": ["127.1.0.0/16", "127.2.0.1"], "deny": ["127.1.1.0/24"]}});
    let scene = Scene::new(json!({"type": kind, "hostnames": hostnames, "gate": rules})).await;
    for (source, allowed) in
        [("127.1.2.1", true), ("127.2.0.1", true), ("127.2.0.2", false), ("127.1.1.1", false), ("127.3.0.1", false)]
    {
        let before = scene.accepted();
        let told = from(&scene, ip(source), scene.addr).await;
        assert_eq!(told.is_ok(), allowed, "{source}: {:?}", told.err());
        if let Err(told) = told {
            assert!(told.contains("reset"), "{told}");
            assert_eq!(scene.accepted(), before);
        }
    }
    assert_eq!(scene.accepted(), 2, "only who may come reached the origin");
    if kind != "passthrough" {
        // Not even what they would say is waited for, let alone a handshake made.
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(ip("127.3.0.1"), 0)).unwrap();
        // The reset may overtake the news that there is a connection.
        if let Ok(tcp) = socket.connect(scene.addr).await {
            is_cut(&mut (Box::new(tcp) as Io)).await;
        }
    }
    scene.counts("forbidden", if kind == "passthrough" { 3.0 } else { 4.0 }).await;

    // Deny beats allow, and a change ends what it no longer allows.
    let (mut one, mut other) = (
        from(&scene, ip("127.1.2.1"), scene.addr).await.unwrap(),
        from(&scene, ip("127.2.0.1"), scene.addr).await.unwrap(),
    );
    scene.gate(json!({"ip": {"allow": ["127.0.0.0/8"], "deny": ["127.1.2.1"]}})).await;
    is_cut(&mut one).await;
    still_echoes(&mut other).await;
    assert!(from(&scene, ip("127.1.2.1"), scene.addr).await.is_err());
    assert!(from(&scene, ip("127.3.0.1"), scene.addr).await.is_ok());
    // Nothing said of addresses: everybody.
    scene.gate(json!({"ip": {}})).await;
    assert!(from(&scene, ip("127.1.2.1"), scene.addr).await.is_ok());
    still_echoes(&mut other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_decide_who_comes_to_a_tcp_service() {
    addresses_decide("tcp").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_decide_who_comes_to_a_tls_service_before_any_handshake() {
    addresses_decide("tls").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn addresses_decide_who_comes_to_a_service_that_is_passed_through() {
    addresses_decide("passthrough").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ipv6_visitors_have_rules_too() {
    if !has_ipv6() {
        return;
    }
    let node = Node::with(NodeOpts::default().ipv6()).await;
    let scene = Scene::on(node, json!({"type": "tcp", "gate": {"ip": {"allow": ["::1"]}}})).await;
    let six = IpAddr::V6(Ipv6Addr::LOCALHOST);
    let to = SocketAddr::new(six, scene.addr.port());
    assert!(from(&scene, six, to).await.is_ok());
    assert!(from(&scene, ip("127.1.1.1"), scene.addr).await.is_err());
    scene.gate(json!({"ip": {"deny": ["::/64"]}})).await;
    assert!(from(&scene, six, to).await.is_err());
    assert!(from(&scene, ip("127.1.1.1"), scene.addr).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ipv4_visitor_of_a_port_for_both_families_is_one_of_ipv4() {
    if !has_ipv6() {
        return;
    }
    let first = 11000 + (std::process::id() % 800) * 10;
    let ports = format!("ports = \"{first}-{}\"", first + 9);
    let node = Node::with(NodeOpts::default().set("ingress", "raw = [\"::\"]").set("ingress", &ports)).await;
    let scene = Scene::on(node, json!({"type": "tcp", "gate": {"ip": {"deny": ["127.1.1.0/24"]}}})).await;
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), scene.addr.port());
    let six = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), scene.addr.port());
    assert!(from(&scene, ip("127.1.1.1"), to).await.is_err());
    assert!(from(&scene, ip("127.1.2.1"), to).await.is_ok());
    // However it is written.
    scene.gate(json!({"ip": {"allow": ["::ffff:127.1.0.0/112"]}})).await;
    assert!(from(&scene, ip("127.1.1.1"), to).await.is_ok());
    assert!(from(&scene, ip("127.2.1.1"), to).await.is_err());
    assert!(from(&scene, six.ip(), six).await.is_err());
    // All of IPv6 is nothing of IPv4.
    scene.gate(json!({"ip": {"allow": ["::/0"]}})).await;
    assert!(from(&scene, ip("127.1.1.1"), to).await.is_err());
    assert!(from(&scene, six.ip(), six).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn behind_a_proxy_the_visitors_own_address_decides() {
    let opts = NodeOpts::default().set("ingress", "proxy_protocol_from = [\"127.8.8.8\"]");
    let gate = json!({"ip": {"allow": ["203.0.113.0/24", "127.9.9.9"], "deny": ["203.0.113.66"]}});
    let scene = Scene::on(Node::with(opts).await, json!({"type": "tcp", "gate": gate})).await;
    let told = async |source: &str, proxy: &str| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::new(ip(proxy), 0)).unwrap();
        // Refused before it has said so much: that is an answer too.
        let mut tcp = socket.connect(scene.addr).await.map_err(|e| e.to_string())?;
        let header = format!("PROXY TCP4 {source} 192.0.2.1 1000 2000\r\n");
        tcp.write_all(header.as_bytes()).await.map_err(|e| e.to_string())?;
        within(DEADLINE, "an end of the visit", echoed(Box::new(tcp))).await
    };
    assert!(told("203.0.113.7", "127.8.8.8").await.is_ok());
    assert!(told("203.0.113.66", "127.8.8.8").await.is_err());
    assert!(told("198.51.100.7", "127.8.8.8").await.is_err());
    // Who is no proxy says it in vain.
    assert!(told("203.0.113.7", "127.7.7.7").await.is_err());
}

/// What a PROXY v2 header says, read as proxy-protocol.txt has it: TLVs by type.
async fn header_of(listener: &TcpListener) -> (Vec<u8>, Vec<(u8, Vec<u8>)>) {
    let (mut tcp, _) = within(DEADLINE, "a connection", listener.accept()).await.unwrap();
    let mut header = vec![0; 16];
    tcp.read_exact(&mut header).await.unwrap();
    let len = usize::from(u16::from_be_bytes([header[14], header[15]]));
    header.resize(16 + len, 0);
    tcp.read_exact(&mut header[16..]).await.unwrap();
    let tlvs = tlvs(&header[28..]);
    (header, tlvs)
}

fn tlvs(mut bytes: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let len = usize::from(u16::from_be_bytes([bytes[1], bytes[2]]));
        found.push((bytes[0], bytes[3..3 + len].to_vec()));
        bytes = &bytes[3 + len..];
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn the_origin_is_told_whose_certificate_it_was() {
    let ca = Ca::new("visitors");
    let asked = json!({"client_certificates": {"ca_pem": ca.pem, "allow_subjects": ["*"]}});
    let record = json!({"type": "tls", "proxy_protocol": "v2", "gate": asked});
    let scene = Scene::new(record).await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    scene.node.put("sockets/told", scene.record.clone()).await;
    scene.node.put("tunnels/told", json!({"socket": "told", "keys": [scene.node.key.line()]})).await;
    let _ssh = Ssh::start(&scene.node, &[&format!("told:80:{}", listener.local_addr().unwrap())]).await;
    let to = SocketAddr::new(scene.node.ip, scene.node.port_of("told").await);
    let told = async |who: Option<&Leaf>, version: &'static SupportedProtocolVersion| {
        let io = tls_connect(to, "told.edge.localhost", Arc::new(scene.config(who, &[version]))).await.unwrap();
        let told = header_of(&listener).await;
        drop(io);
        told
    };
    for (version, word, cipher) in [
        (&version::TLS12, "TLSv1.2", "ECDHE-ECDSA-AES256-GCM-SHA384"),
        (&version::TLS13, "TLSv1.3", "TLS_AES_256_GCM_SHA384"),
    ] {
        let (header, found) = told(Some(&ca.plain("Zoë")), version).await;
        assert_eq!(&header[..14], b"\r\n\r\n\0\r\nQUIT\n\x21\x11");
        assert_eq!(found.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [0x02, 0x05, 0x20, 0x03]);
        assert_eq!(found[0].1, b"told.edge.localhost");
        let ssl = &found[2].1;
        // SSL, CERT_CONN and CERT_SESS; verified.
        assert_eq!(ssl[..5], [7, 0, 0, 0, 0]);
        let parts: Vec<(u8, String)> =
            tlvs(&ssl[5..]).into_iter().map(|(kind, value)| (kind, String::from_utf8(value).unwrap())).collect();
        let wanted = [(0x21, word), (0x22, "Zoë"), (0x23, cipher)].map(|(kind, value)| (kind, value.to_owned()));
        assert_eq!(parts, wanted);
        // The checksum, over the header with zeros in its place.
        let (body, sum) = header.split_at(header.len() - 4);
        let whole = [body, &[0; 4]].concat();
        let mut crc = !0u32;
        for byte in whole {
            crc ^= u32::from(byte);
            for _ in 0..8 {
                crc = if crc & 1 == 1 { (crc >> 1) ^ 0x82F6_3B78 } else { crc >> 1 };
            }
        }
        assert_eq!(sum, (!crc).to_be_bytes());
    }
    // No text for an origin to misread; that there was a certificate is said.
    let (_, found) = told(Some(&ca.plain("ann\0.evil")), &version::TLS13).await;
    let ssl = &found[2].1;
    assert!(ssl[0] == 7 && tlvs(&ssl[5..]).iter().all(|(kind, _)| *kind != 0x22));

    // TLS alone, and none at all.
    let mut record = scene.record.clone();
    record["gate"] = Value::Null;
    scene.node.put("sockets/told", record).await;
    let (_, found) = told(None, &version::TLS13).await;
    assert_eq!(found[2].1[..5], [1, 0, 0, 0, 1]);
}
