//! Certificates that visitors show: asked for and verified in the handshake, and
//! held against what the socket's record allows.

use std::fmt;
use std::sync::Arc;

use parking_lot::Mutex;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error, ServerConfig, SignatureScheme};

use super::Shown;
use crate::model::client_certificate::ClientCertificate;
use crate::model::gate::{ClientCertificates, Gate};

/// The CAs' names go into every handshake, to help visitors choose a certificate.
/// More than this is left out: it would be slow for all, and above 64 KiB is nothing
/// that the protocol can say.
const HINTS_MAX: usize = 16 << 10;

/// What one version of a socket's record asks of visitors' certificates, ready
/// for handshakes.
pub struct ClientAuth {
    pub(super) verifier: Arc<Verifier>,
    /// The configuration of the last handshake, with whose certificate it was made.
    pub(super) last: Mutex<Option<(Arc<Shown>, Arc<ServerConfig>)>>,
}

/// A visitor's certificate that was verified in their handshake.
pub struct Client {
    /// What it says.
    pub certificate: ClientCertificate,
    chain: Vec<CertificateDer<'static>>,
    verified_by: Arc<Verifier>,
}

impl ClientAuth {
    /// What this gate asks for; none where it asks for no certificate.
    ///
    /// # Errors
    /// Its CAs cannot be used.
    pub fn new(gate: &Arc<Gate>) -> Result<Option<Arc<Self>>, String> {
        let Some(asked) = &gate.client_certificates else { return Ok(None) };
        let provider = Arc::new(aws_lc_rs::default_provider());
        let roots = asked.roots()?;
        let names: usize = roots.subjects().iter().map(|name| name.as_ref().len()).sum();
        let mut chains = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
        if names > HINTS_MAX {
            chains = chains.clear_root_hint_subjects();
        }
        let chains = chains.build().map_err(|e| format!("ca_pem cannot be used: {e}"))?;
        let verifier = Arc::new(Verifier { gate: Arc::clone(gate), chains });
        Ok(Some(Arc::new(Self { verifier, last: Mutex::default() })))
    }

    /// Whether a visitor may (still) come who was verified by an earlier version of
    /// the record, or by this one.
    pub fn admits(&self, client: &Client) -> bool {
        let (now, then) = (&self.verifier, &client.verified_by);
        let same = Arc::ptr_eq(now, then) || now.asked().map(|a| &a.ca_pem) == then.asked().map(|a| &a.ca_pem);
        now.allows(&client.certificate) && (same || now.verifies(&client.chain))
    }

    /// The visitor of a handshake in which this verified them; none where the rules
    /// do not let them in.
    pub(super) fn client(&self, chain: Option<&[CertificateDer<'_>]>) -> Option<Client> {
        let chain: Vec<CertificateDer<'static>> = chain?.iter().map(|c| c.clone().into_owned()).collect();
        let certificate = ClientCertificate::read(chain.first()?)?;
        let allowed = self.verifier.allows(&certificate);
        allowed.then(|| Client { certificate, chain, verified_by: Arc::clone(&self.verifier) })
    }
}

/// Verifies what visitors show.
pub(super) struct Verifier {
    gate: Arc<Gate>,
    /// Chains, dates and key usage, by the socket's CAs.
    chains: Arc<dyn ClientCertVerifier>,
}

impl Verifier {
    /// The record; never none, as `ClientAuth::new` sees to.
    fn asked(&self) -> Option<&ClientCertificates> {
        self.gate.client_certificates.as_ref()
    }

    fn allows(&self, certificate: &ClientCertificate) -> bool {
        self.asked().is_some_and(|asked| asked.allows(certificate))
    }

    fn verifies(&self, chain: &[CertificateDer<'_>]) -> bool {
        let leaf = chain.split_first();
        leaf.is_some_and(|(leaf, rest)| self.chains.verify_client_cert(leaf, rest, UnixTime::now()).is_ok())
    }

    /// Who has proved to hold the key is held against the rules while an alert can
    /// still tell them (access_denied); before, anybody could ask with a copy of
    /// somebody's certificate.
    fn allowed(&self, proved: HandshakeSignatureValid, leaf: &[u8]) -> Result<HandshakeSignatureValid, Error> {
        match ClientCertificate::read(leaf) {
            Some(certificate) if self.allows(&certificate) => Ok(proved),
            _ => Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chains.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.chains.verify_client_cert(leaf, rest, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.allowed(self.chains.verify_tls12_signature(message, leaf, signed)?, leaf)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.allowed(self.chains.verify_tls13_signature(message, leaf, signed)?, leaf)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chains.supported_verify_schemes()
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

impl fmt::Debug for ClientAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientAuth").finish_non_exhaustive()
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("certificate", &self.certificate).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_cas_are_named_to_visitors_and_very_many_are_not() {
        let key = rcgen::KeyPair::generate().unwrap();
        let bundle = |count: usize| -> String {
            let made = (0..count).map(|n| {
                let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
                params.distinguished_name.push(rcgen::DnType::CommonName, format!("{n} {}", "x".repeat(200)));
                params.self_signed(&key).unwrap().pem()
            });
            made.collect()
        };
        for (count, hints) in [(1, 1), (50, 50), (100, 0)] {
            let asked = ClientCertificates {
                ca_pem: bundle(count),
                allow_subjects: Vec::new(),
                allow_emails: Vec::new(),
                revoked_serials: Vec::new(),
            };
            let gate = Arc::new(Gate { client_certificates: Some(asked), ..Gate::default() });
            let auth = ClientAuth::new(&gate).unwrap().unwrap();
            assert_eq!(auth.verifier.root_hint_subjects().len(), hints);
        }
        assert!(ClientAuth::new(&Arc::default()).unwrap().is_none());
    }
}
