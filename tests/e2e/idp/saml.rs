//! A SAML identity provider (pysaml2) behind a broker (SATOSA) that speaks OpenID.
//! Its ID tokens have `aud` as a list, an opaque `sub`, and no `email_verified`; its
//! callback has no `iss`, and its discovery tells of no PKCE.

use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::START;
use crate::harness::*;

/// The only user is logged in unasked.
pub struct SamlBroker {
    pub issuer: String,
    pub client_id: String,
    pub client_secret: String,
    pub email: String,
    _program: Program,
    _dir: tempfile::TempDir,
}

impl SamlBroker {
    /// One that knows a client with these redirect URIs.
    pub async fn start(redirect_uris: &[&str]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let (dir, host) = (tempfile::tempdir().unwrap(), own_address());
        let (client_id, client_secret, email) = ("adit", "brokers-secret-of-tests", "alice@example.com");
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_RSA_SHA256).unwrap();
        let certificate = rcgen::CertificateParams::new(["saml.test".to_owned()]).unwrap().self_signed(&pair).unwrap();
        std::fs::write(dir.path().join("key.pem"), pair.serialize_pem()).unwrap();
        std::fs::write(dir.path().join("cert.pem"), certificate.pem()).unwrap();
        let settings = json!({"host": host, "folder": dir.path(), "email": email, "client_id": client_id,
            "client_secret": client_secret, "redirect_uris": redirect_uris});
        let mut command = Command::new(root.join("target/venv-saml/bin/python"));
        command.arg(root.join("tests/e2e/clients/saml_broker.py")).arg(settings.to_string());
        let mut program = Program::start("the broker", command);
        let port: u16 = eventually_within(START, "the broker's port", async || {
            assert!(program.runs(), "{}", program.output());
            program.output().lines().find_map(|line| line.strip_prefix("port ")?.parse().ok())
        })
        .await;
        Self {
            issuer: format!("http://{host}:{port}"),
            client_id: client_id.into(),
            client_secret: client_secret.into(),
            email: email.into(),
            _program: program,
            _dir: dir,
        }
    }
}
