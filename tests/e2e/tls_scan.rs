//! TLS as other people's tools see it: scanners, and OpenSSL as a visitor.

use std::path::{Path, PathBuf};
use std::process::Command;

use rcgen::{CertificateParams, Issuer, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_RSA_SHA256, SerialNumber};
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;

use crate::harness::*;

/// A CA of the test's own, in files.
pub struct Ca {
    dir: tempfile::TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign, rcgen::KeyUsagePurpose::DigitalSignature];
        params.distinguished_name.push(rcgen::DnType::CommonName, "test CA");
        std::fs::write(dir.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        std::fs::write(dir.path().join("ca.key"), key.serialize_pem()).unwrap();
        Self { dir, issuer: Issuer::new(params, key) }
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A certificate record for `name`, good for 90 days.
    pub fn certify(&self, name: &str, serial: u64, algorithm: &'static rcgen::SignatureAlgorithm) -> Value {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.serial_number = Some(SerialNumber::from(serial));
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = time::OffsetDateTime::now_utc() - time::Duration::days(1);
        params.not_after = params.not_before + time::Duration::days(90);
        let made = params.signed_by(&key, &self.issuer).unwrap();
        json!({"chain_pem": made.pem(), "key_pem": key.serialize_pem()})
    }

    /// What the CA's OCSP responder says of a certificate that is good.
    async fn ocsp(&self, record: &Value, serial: u64) -> Vec<u8> {
        std::fs::write(self.file("leaf.pem"), record["chain_pem"].as_str().unwrap()).unwrap();
        std::fs::write(self.file("index"), format!("V\t400101000000Z\t\t{serial:X}\tunknown\t/CN=leaf\n")).unwrap();
        let mut command = Command::new("openssl");
        command.current_dir(self.dir.path()).args(["ocsp", "-noverify", "-index", "index", "-ndays", "1"]);
        command.args(["-CA", "ca.pem", "-rsigner", "ca.pem", "-rkey", "ca.key"]);
        command.args(["-issuer", "ca.pem", "-cert", "leaf.pem", "-respout", "response"]);
        let (good, output) = run("openssl ocsp", command).await;
        assert!(good, "{output}");
        std::fs::read(self.file("response")).unwrap()
    }
}

/// Runs a program to its end: whether it is content, and what it said.
async fn run(name: &str, command: Command) -> (bool, String) {
    let (ended, output) = Program::start(name, command).finished(DEADLINE * 8).await;
    (ended.success(), output)
}

/// sslyze's findings at the node's HTTPS port, which must be to the liking of
/// Mozilla's intermediate profile. Nothing is tolerated: the CA is made known.
async fn sslyze(node: &Node, name: &str, ca: &Path) -> Value {
    let dir = tempfile::tempdir().unwrap();
    let (json, root) = (dir.path().join("found.json"), Path::new(env!("CARGO_MANIFEST_DIR")));
    let mut command = Command::new(root.join("target/venv-scanner/bin/sslyze"));
    // What is asked for beside the profile is not a part of it.
    command.args(["--mozilla_config=intermediate", "--early_data", "--sni", name, "--certinfo_ca_file"]).arg(ca);
    command.arg("--json_out").arg(&json).arg(node.addr("https").to_string());
    let (good, output) = run("sslyze", command).await;
    assert!(good && output.contains("OK - Compliant"), "{output}");
    // An RSA modulus is written as a number, which no f64 holds.
    let text = std::fs::read_to_string(json).unwrap();
    let parts = text.split_inclusive(|c: char| !c.is_ascii_digit());
    let text: String = parts.map(|part| if part.len() > 300 { &part[part.len() - 2..] } else { part }).collect();
    let found: Value = serde_json::from_str(&text).unwrap();
    found["server_scan_results"][0]["scan_result"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn mozillas_intermediate_profile_is_kept_and_no_known_attack_works() {
    let node = Node::start().await;
    let ca = Ca::new();
    let name = "shop.example.test";
    node.put("certificates/ecdsa", ca.certify(name, 1, &PKCS_ECDSA_P256_SHA256)).await;
    let mut rsa = ca.certify(name, 2, &PKCS_RSA_SHA256);
    rsa["ocsp"] = data_encoding::BASE64.encode(&ca.ocsp(&rsa, 2).await).into();
    node.put("certificates/rsa", rsa).await;
    for (name, ca, chains) in [("web.edge.localhost", node.ca(), 1), (name, ca.file("ca.pem"), 2)] {
        let found = sslyze(&node, name, &ca).await;
        let result = |of: &str| {
            assert_eq!(found[of]["status"], "COMPLETED", "{of}: {}", found[of]);
            &found[of]["result"]
        };
        for (version, served) in [("ssl_2_0", false), ("ssl_3_0", false), ("tls_1_0", false), ("tls_1_1", false)]
            .into_iter()
            .chain([("tls_1_2", true), ("tls_1_3", true)])
        {
            assert_eq!(result(&format!("{version}_cipher_suites"))["is_tls_version_supported"], served, "{version}");
        }
        assert_eq!(result("certificate_info")["certificate_deployments"].as_array().unwrap().len(), chains);
        assert_eq!(result("tls_1_3_early_data")["supports_early_data"], false);
        assert_eq!(result("session_renegotiation")["supports_secure_renegotiation"], true);
        assert_eq!(result("session_renegotiation")["is_vulnerable_to_client_renegotiation_dos"], false);
        assert_eq!(result("tls_compression")["supports_compression"], false);
        assert_eq!(result("heartbleed")["is_vulnerable_to_heartbleed"], false);
        assert_eq!(result("openssl_ccs_injection")["is_vulnerable_to_ccs_injection"], false);
        assert_eq!(result("robot")["robot_result"], "NOT_VULNERABLE_RSA_NOT_SUPPORTED");
        assert_eq!(result("tls_fallback_scsv")["supports_fallback_scsv"], true);
        assert_eq!(result("tls_extended_master_secret")["supports_ems_extension"], true);
    }
    for reason in ["protocol_version", "no_shared_cipher"] {
        let name = format!("adit_tls_handshake_failures_total{{reason=\"{reason}\"}}");
        assert!(node.metric(&name).await > 0.0, "{reason}");
    }
}

/// What testssl.sh says of medium weight or more, and why it is no fault.
const TOLERATED: &[(&str, &str)] = &[
    ("cipher_order", "visitors choose among suites that are all good: a phone without AES in hardware takes ChaCha20"),
    ("cert_chain_of_trust", "the CA is the test's own"),
    ("cert_trust", "the scanner is given an address, and no certificate is for one"),
    ("cert_revocation", "the test's CA has neither a list nor a responder"),
];

#[tokio::test(flavor = "multi_thread")]
async fn testssl_finds_nothing_of_weight() {
    if !long() {
        return; // 40 s, for little that sslyze does not find in one
    }
    let node = Node::start().await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("found.json");
    let mut command = Command::new("testssl");
    command.args(["--quiet", "--color", "0", "--warnings", "off", "--openssl-timeout", "5", "--severity", "MEDIUM"]);
    command.arg("--jsonfile").arg(&file).arg(node.addr("https").to_string());
    // Its exit code counts what it would have liked.
    let (_, output) = run("testssl", command).await;
    let mut found: Vec<Value> = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    found.retain(|finding| {
        let weight = matches!(finding["severity"].as_str(), Some("MEDIUM" | "HIGH" | "CRITICAL" | "FATAL"));
        weight && !TOLERATED.iter().any(|(id, _)| finding["id"] == *id)
    });
    assert!(output.contains("Done ") && found.is_empty(), "{found:#?}\n{output}");
}

/// One request by OpenSSL's client: what it says of the connection.
pub async fn s_client(node: &Node, name: &str, ca: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &node.addr("https").to_string(), "-servername", name, "-ign_eof"]);
    command.args(["-verify_return_error", "-CAfile"]).arg(ca).args(arguments);
    let mut client = Program::start("openssl s_client", command);
    client.tell(&format!("GET / HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r"));
    let (ended, output) = client.finished(DEADLINE).await;
    assert!(ended.success() && output.contains("HTTP/1.1 404"), "{output}");
    output
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_begun_at_one_node_resumes_at_another_and_outlives_a_rotation() {
    let (one, other, ca) = (Node::start().await, Node::start().await, Ca::new());
    let name = "shop.example.test";
    let certificate = ca.certify(name, 1, &PKCS_ECDSA_P256_SHA256);
    let key = |byte: u8| data_encoding::BASE64.encode(&[byte; 32]);
    for node in [&one, &other] {
        node.put("certificates/shop", certificate.clone()).await;
        node.put("ticket-keys/default", json!({"keys": [key(1)]})).await;
    }
    let (ca, session) = (ca.file("ca.pem"), ca.file("session"));
    let session = session.to_str().unwrap();
    for version in ["-tls1_3", "-tls1_2"] {
        let begin = async |node: &Node| {
            let said = s_client(node, name, &ca, &[version, "-sess_out", session]).await;
            assert!(said.contains("New, TLSv1."), "{said}");
        };
        let resumes = async |node: &Node| {
            let said = s_client(node, name, &ca, &[version, "-sess_in", session]).await;
            assert_ne!(said.contains("New, TLSv1."), said.contains("Reused, TLSv1."), "{said}");
            said.contains("Reused, TLSv1.")
        };
        begin(&one).await;
        assert!(resumes(&one).await && resumes(&other).await, "{version}");
        other.put("ticket-keys/default", json!({"keys": [key(2), key(1)]})).await;
        assert!(resumes(&other).await, "{version}: the old key is still there");
        other.put("ticket-keys/default", json!({"keys": [key(2)]})).await;
        assert!(!resumes(&other).await, "{version}: the old key is gone");
        begin(&other).await;
        assert!(resumes(&other).await && !resumes(&one).await);
        other.put("ticket-keys/default", json!({"keys": [key(1)]})).await;
    }
    assert!(one.metric("adit_tls_handshake_seconds_count{resumed=\"yes\"}").await >= 2.0);
    for node in [one, other] {
        assert!(!node.log().contains(&key(1)) && !node.log().contains(&key(2)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ocsp_response_reaches_a_visitor_who_asks_for_it() {
    let (node, ca) = (Node::start().await, Ca::new());
    let name = "shop.example.test";
    let mut record = ca.certify(name, 0xABCD, &PKCS_ECDSA_P256_SHA256);
    let response = ca.ocsp(&record, 0xABCD).await;
    record["ocsp"] = data_encoding::BASE64.encode(&response).into();
    node.put("certificates/shop", record.clone()).await;
    assert_eq!(node.api("GET", "/v1/certificates/shop", None).await.1["ocsp"], record["ocsp"]);
    for version in ["-tls1_3", "-tls1_2"] {
        let said = s_client(&node, name, &ca.file("ca.pem"), &[version, "-status"]).await;
        assert!(said.contains("OCSP Response Status: successful") && said.contains("Cert Status: good"), "{said}");
    }
    let other = ca.certify(name, 0xABCE, &PKCS_ECDSA_P256_SHA256);
    record["ocsp"] = data_encoding::BASE64.encode(&ca.ocsp(&other, 0xABCE).await).into();
    let (status, problem) = node.api("PUT", "/v1/certificates/shop", Some(&record)).await;
    assert!(status == 400 && problem.to_string().contains("is for another certificate"), "{status} {problem}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_outlives_the_change_of_its_certificate() {
    let (node, origin) = (Node::start().await, Origin::http().await);
    let name = "shop.example.test";
    node.put("sockets/shop", json!({"type": "http", "hostnames": [name]})).await;
    node.put("tunnels/shop", json!({"socket": "shop", "keys": [node.key.line()]})).await;
    let _ssh = Ssh::start(&node, &[&format!("shop:80:{}", origin.target())]).await;
    let (old, new) = (Ca::new(), Ca::new());
    let trust = |ca: &Ca| trusting(&std::fs::read(ca.file("ca.pem")).unwrap(), &[]);
    node.put("certificates/shop", old.certify(name, 1, &PKCS_ECDSA_P256_SHA256)).await;
    let mut tls = tls_connect(node.addr("https"), name, trust(&old)).await.unwrap();
    // More than all buffers on the way take: it waits for us in between.
    let n: u64 = 64 << 20;
    let head = format!("GET /bytes/{n} HTTP/1.1\r\nhost: {name}\r\n\r\n");
    tokio::io::AsyncWriteExt::write_all(&mut tls, head.as_bytes()).await.unwrap();
    assert_eq!(read_answer(&mut tls).await.0, 200);
    let (mut pattern, mut buffer) = (Pattern::default(), vec![0; 64 << 10]);
    let mut read_to = async |end: u64| {
        while pattern.len() < end {
            let max = usize::try_from(end - pattern.len()).unwrap().min(buffer.len());
            let got = within(DEADLINE, "bytes", tls.read(&mut buffer[..max])).await.unwrap();
            assert!(got > 0, "ended after {} bytes", pattern.len());
            pattern.check(&buffer[..got]).unwrap();
        }
    };
    read_to(n / 4).await;
    node.put("certificates/shop", new.certify(name, 1, &PKCS_RSA_SHA256)).await;
    assert!(tls_connect(node.addr("https"), name, trust(&new)).await.is_ok(), "the next handshake shows the new one");
    assert!(tls_connect(node.addr("https"), name, trust(&old)).await.is_err());
    read_to(n / 2).await;
    assert!(matches!(node.api("DELETE", "/v1/certificates/shop", None).await.0, 200 | 204));
    assert!(tls_connect(node.addr("https"), name, trust(&new)).await.is_err());
    read_to(n).await;
}
