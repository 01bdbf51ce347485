//! TLS to origins that speak HTTPS, through the tunnel: which name is asked
//! for, what it is verified against, and how long it may take.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{ClientConfig, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::sync::OnceCell;
use tokio_rustls::TlsConnector;

use crate::error::Error;
use crate::model::{Socket, authority_host};
use crate::stream::Stream;

/// RFC 9113 §3.2.
const H2: &[u8] = b"h2";

/// Makes TLS connections to origins.
pub(super) struct OriginTls {
    deadline: Duration,
    ca_file: Option<PathBuf>,
    provider: Arc<CryptoProvider>,
    /// Verified or not, and for each without and with HTTP/2.
    verified: [OnceCell<TlsConnector>; 2],
    unverified: [OnceCell<TlsConnector>; 2],
}

impl OriginTls {
    pub(super) fn new(deadline: Duration, ca_file: Option<PathBuf>) -> Self {
        Self {
            deadline,
            ca_file,
            provider: Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
            verified: Default::default(),
            unverified: Default::default(),
        }
    }

    /// Speaks TLS over `stream` to the origin of `socket`, which is asked for by
    /// this name (`server_name`). Tells whether HTTP/2 was agreed on.
    ///
    /// # Errors
    /// `OriginTls` where the handshake fails or takes too long.
    pub(super) async fn connect(
        &self,
        stream: Stream,
        socket: &Socket,
        name: ServerName<'static>,
        http2: bool,
    ) -> Result<(Stream, bool), Error> {
        let connector = self.connector(socket.upstream.tls.verify, http2).await?;
        match tokio::time::timeout(self.deadline, connector.connect(name, stream)).await {
            Ok(Ok(tls)) => {
                let http2 = tls.get_ref().1.alpn_protocol() == Some(H2);
                Ok((Stream::other(tls), http2))
            }
            Ok(Err(error)) => {
                tracing::debug!(socket = %socket.id, %error, "TLS to the origin failed");
                Err(Error::OriginTls)
            }
            Err(_) => Err(Error::OriginTls),
        }
    }

    async fn connector(&self, verify: bool, http2: bool) -> Result<&TlsConnector, Error> {
        let [one, two] = if verify { &self.verified } else { &self.unverified };
        let cell = if http2 { two } else { one };
        if verify {
            cell.get_or_try_init(|| async {
                let ca_file = self.ca_file.clone();
                // Reads some hundred files on some systems: once, and not on a runtime thread.
                let roots = tokio::task::spawn_blocking(move || roots(ca_file)).await.map_err(|_| Error::Internal)?;
                let config = self.builder()?.with_root_certificates(roots).with_no_client_auth();
                Ok(connector(config, http2))
            })
            .await
        } else {
            cell.get_or_try_init(|| async {
                let verifier = Arc::new(AnyCertificate(Arc::clone(&self.provider)));
                let config =
                    self.builder()?.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
                Ok(connector(config, http2))
            })
            .await
        }
    }

    fn builder(&self) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::WantsVerifier>, Error> {
        ClientConfig::builder_with_provider(Arc::clone(&self.provider))
            .with_safe_default_protocol_versions()
            .map_err(|_| Error::Internal)
    }
}

fn connector(mut config: ClientConfig, http2: bool) -> TlsConnector {
    let protocols: &[&[u8]] = if http2 { &[H2, b"http/1.1"] } else { &[b"http/1.1"] };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    // Tickets are kept by name, and two tenants' origins may have the same one.
    config.resumption = Resumption::disabled();
    TlsConnector::from(Arc::new(config))
}

/// The name for SNI and verification: the one set for TLS, else the one set as
/// `Host`, else the visitor's.
///
/// # Errors
/// `OriginTls` where that is no name.
pub(super) fn server_name(socket: &Socket, host: &str) -> Result<ServerName<'static>, Error> {
    let upstream = &socket.upstream;
    let name = match (&upstream.tls.server_name, &upstream.host) {
        (Some(name), _) => name.as_str().to_owned(),
        (None, Some(host)) => authority_host(host).map_err(|_| Error::OriginTls)?.into_owned(),
        (None, None) => host.to_owned(),
    };
    ServerName::try_from(name).map_err(|_| Error::OriginTls)
}

/// The system's roots and those of the settings. What cannot be read is told
/// and left out: an origin that needs it will fail to verify, and no other.
fn roots(ca_file: Option<PathBuf>) -> RootCertStore {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        tracing::warn!(%error, "a system root certificate is unreadable");
    }
    roots.add_parsable_certificates(system.certs);
    if let Some(path) = ca_file {
        let read = CertificateDer::pem_file_iter(&path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match read {
            Ok(certs) => {
                roots.add_parsable_certificates(certs);
            }
            Err(error) => tracing::warn!(path = %path.display(), %error, "http.origin_ca_file is unreadable"),
        }
    }
    if roots.is_empty() {
        tracing::warn!("no root certificate is known: https origins with verify = true will be refused");
    }
    roots
}

/// Accepts any certificate, but only from who holds its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SocketType;

    #[test]
    fn the_server_name_is_the_most_explicit_one() {
        let mut socket = Socket::new("web".parse().unwrap(), SocketType::Https);
        let name = |socket: &Socket| server_name(socket, "visitor.test").unwrap().to_str().into_owned();
        assert_eq!(name(&socket), "visitor.test");
        socket.upstream.host = Some("Host.test:8443".into());
        assert_eq!(name(&socket), "host.test");
        socket.upstream.tls.server_name = Some("tls.test".parse().unwrap());
        assert_eq!(name(&socket), "tls.test");
        assert_eq!(server_name(&Socket::new("w".parse().unwrap(), SocketType::Https), "::1").unwrap().to_str(), "::1");
    }
}
