//! Why handshakes with visitors fail, in a few words: a rise of one tells an
//! operator where to look.

use std::io;

use rustls::PeerIncompatible::{
    self, EcPointsExtensionRequired, KeyShareExtensionRequired, NamedGroupsExtensionRequired, NoCipherSuitesInCommon,
    NoEcPointFormatsInCommon, NoKxGroupsInCommon, NoSignatureSchemesInCommon, ServerDoesNotSupportTls12Or13,
    ServerTlsVersionIsDisabledByOurConfig, SignatureAlgorithmsExtensionRequired, SupportedVersionsExtensionRequired,
    Tls12NotOffered, Tls12NotOfferedOrEnabled, UncompressedEcPointsRequired,
};

/// Why a handshake failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// It was not done by the deadline.
    Timeout,
    /// There is none to show.
    NoCertificate,
    /// The visitor speaks none that is served.
    ProtocolVersion,
    /// No cipher suite, group or signature scheme in common.
    NoSharedCipher,
    /// The visitor showed no certificate that may come.
    ClientCertificate,
    /// The visitor ended it and said why: mostly an untrusted certificate.
    Alert,
    /// The visitor closed or reset the connection.
    Gone,
    /// It broke the protocol.
    Other,
}

impl Failure {
    pub(super) fn of(error: io::Error) -> Self {
        tracing::debug!(%error, "a TLS handshake failed");
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::AlertReceived(_)) => Self::Alert,
            Some(rustls::Error::NoCertificatesPresented | rustls::Error::InvalidCertificate(_)) => {
                Self::ClientCertificate
            }
            Some(rustls::Error::PeerIncompatible(why)) => Self::incompatible(why),
            Some(_) => Self::Other,
            None => Self::Gone,
        }
    }

    fn incompatible(why: &PeerIncompatible) -> Self {
        match why {
            ServerDoesNotSupportTls12Or13
            | ServerTlsVersionIsDisabledByOurConfig
            // Asked for first; what lacks it is older than TLS 1.2 (RFC 5246 §7.4.1.4.1).
            | SignatureAlgorithmsExtensionRequired
            | SupportedVersionsExtensionRequired
            | Tls12NotOffered
            | Tls12NotOfferedOrEnabled => Self::ProtocolVersion,
            EcPointsExtensionRequired
            | KeyShareExtensionRequired
            | NamedGroupsExtensionRequired
            | NoCipherSuitesInCommon
            | NoEcPointFormatsInCommon
            | NoKxGroupsInCommon
            | NoSignatureSchemesInCommon
            | UncompressedEcPointsRequired => Self::NoSharedCipher,
            _ => Self::Other,
        }
    }

    /// The metric's label.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::NoCertificate => "no_certificate",
            Self::ProtocolVersion => "protocol_version",
            Self::NoSharedCipher => "no_shared_cipher",
            Self::ClientCertificate => "client_certificate",
            Self::Alert => "alert",
            Self::Gone => "gone",
            Self::Other => "other",
        }
    }
}
