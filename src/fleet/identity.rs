//! Who this node is to the others: its certificate of the fleet's CA, and theirs. The
//! files are read again when asked to; a new CA is put beside the old one for a while,
//! then certificates are changed, then the old one goes.

use std::io;
use std::path::Path;
use std::sync::Arc;

use parking_lot::RwLock;
use rustls::client::verify_server_name;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::settings::FleetSettings;
use crate::model::NodeId;

const ALPN: &[u8] = b"adit/1";

/// A node's certificate, and the CA by which it knows the others.
pub(super) struct Identity(RwLock<Option<Sides>>);

#[derive(Clone)]
struct Sides {
    asks: Arc<ClientConfig>,
    answers: Arc<ServerConfig>,
}

impl Identity {
    /// Reads the files of the settings.
    ///
    /// # Errors
    /// Which file, and what is wrong with it.
    pub(super) fn new(settings: &FleetSettings) -> Result<Self, String> {
        Ok(Self(RwLock::new(read(settings)?)))
    }

    /// Reads them again; those that run keep what they have.
    ///
    /// # Errors
    /// The same; the former ones stay.
    pub(super) fn reload(&self, settings: &FleetSettings) -> Result<(), String> {
        *self.0.write() = read(settings)?;
        Ok(())
    }

    fn sides(&self) -> io::Result<Sides> {
        let none = "fleet.certificate is not set, and this network is not one of fleet.private";
        self.0.read().clone().ok_or_else(|| io::Error::other(none))
    }

    /// TLS to node `to`, which proves that it is it.
    ///
    /// # Errors
    /// It is not, or does not know us.
    pub(super) async fn connect(&self, tcp: TcpStream, to: &NodeId) -> io::Result<client::TlsStream<TcpStream>> {
        let name = server_name(to)?;
        TlsConnector::from(self.sides()?.asks).connect(name, tcp).await
    }

    /// TLS with a node that comes.
    ///
    /// # Errors
    /// It is none of the fleet.
    pub(super) async fn accept(&self, tcp: TcpStream) -> io::Result<server::TlsStream<TcpStream>> {
        TlsAcceptor::from(self.sides()?.answers).accept(tcp).await
    }
}

/// Whether the one at the other end proved to be `from`.
pub(super) fn is(stream: &server::TlsStream<TcpStream>, from: &NodeId) -> bool {
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let parsed = certificate.and_then(|certificate| ParsedCertificate::try_from(certificate).ok());
    let name = server_name(from).ok();
    parsed.zip(name).is_some_and(|(parsed, name)| verify_server_name(&parsed, &name).is_ok())
}

/// A node's name as certificates have it.
fn server_name(node: &NodeId) -> io::Result<ServerName<'static>> {
    let fail = |_| io::Error::other(format!("the node's name \"{node}\" is none that a certificate can have"));
    ServerName::try_from(node.as_str().to_owned()).map_err(fail)
}

fn read(settings: &FleetSettings) -> Result<Option<Sides>, String> {
    let FleetSettings { ca: Some(ca), certificate: Some(certificate), key: Some(key), .. } = settings else {
        return Ok(None);
    };
    let bad = |path: &Path, why: &dyn std::fmt::Display| format!("{} cannot be used: {why}", path.display());
    let all = |path: &Path| -> Result<Vec<CertificateDer<'static>>, String> {
        let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
        match read {
            Ok(all) if all.is_empty() => Err(bad(path, &"there is no certificate in it")),
            read => read.map_err(|error| bad(path, &error)),
        }
    };
    let mut roots = RootCertStore::empty();
    for root in all(ca)? {
        roots.add(root).map_err(|error| bad(ca, &error))?;
    }
    let (roots, chain) = (Arc::new(roots), all(certificate)?);
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad(key, &error))?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let nodes = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider));
    let nodes = nodes.build().map_err(|error| bad(ca, &error))?;
    let mut answers = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| error.to_string())?
        .with_client_cert_verifier(nodes)
        .with_single_cert(chain.clone(), private.clone_key())
        .map_err(|error| bad(certificate, &error))?;
    let mut asks = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_client_auth_cert(chain, private)
        .map_err(|error| bad(certificate, &error))?;
    answers.alpn_protocols = vec![ALPN.to_vec()];
    asks.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(Sides { asks: Arc::new(asks), answers: Arc::new(answers) }))
}
