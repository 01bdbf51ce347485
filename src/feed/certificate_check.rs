//! Whether a certificate record can be served: chain and key parse, belong
//! together, and name the hosts they are for; and whether its OCSP response can
//! be stapled. Never repeats a byte of the key.

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use crate::fields::Mistake;
use crate::model::{Certificate, HostPattern};
use crate::tls::ocsp;

/// The names that a record's certificate is for, if all of it can be served.
///
/// # Errors
/// What cannot be served, by field.
pub fn check_certificate(certificate: &Certificate) -> Result<Vec<HostPattern>, Mistake> {
    let names = certificate_names(&certificate.chain_pem, &certificate.key_pem)?;
    if let Some(der) = &certificate.ocsp {
        let leaf = CertificateDer::from_pem_slice(certificate.chain_pem.as_bytes()).ok();
        let leaf = leaf.as_ref().and_then(|leaf| X509Certificate::from_der(leaf).ok());
        let serial = leaf.map(|(_, leaf)| leaf.raw_serial().to_vec()).unwrap_or_default();
        ocsp::good_for(&der.0, &serial).map_err(|problem| Mistake {
            at: "ocsp".to_owned(),
            problem,
            fix: "write the response of the CA's OCSP responder for the leaf, DER in base64, or leave it out"
                .to_owned(),
        })?;
    }
    Ok(names)
}

/// The names that a chain's leaf is for (its subjectAltNames; the common name
/// no longer counts, RFC 9525 §6.3), if the key is the leaf's.
///
/// Validity in time is not judged: a record that was good must be accepted back
/// as it is after it has run out.
///
/// # Errors
/// What cannot be served, by field.
fn certificate_names(chain_pem: &str, key_pem: &str) -> Result<Vec<HostPattern>, Mistake> {
    let mistake = |at: &str, problem: String, fix: &str| Mistake { at: at.to_owned(), problem, fix: fix.to_owned() };
    let chain = CertificateDer::pem_slice_iter(chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| mistake("chain_pem", "is not PEM".into(), "write CERTIFICATE blocks, leaf first"))?;
    let leaf = chain
        .first()
        .ok_or_else(|| mistake("chain_pem", "holds no certificate".into(), "write CERTIFICATE blocks, leaf first"))?;
    let names = names_of(leaf).map_err(|why| mistake("chain_pem", why, "write the leaf for these names first"))?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(|_| {
        mistake("key_pem", "holds no private key".into(), "write an unencrypted PKCS#8, PKCS#1 or SEC1 key in PEM")
    })?;
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    CertifiedKey::from_der(chain, key, &provider).map_err(|error| match error {
        rustls::Error::InconsistentKeys(_) => mistake(
            "key_pem",
            "is not the key of the first certificate".into(),
            "write the leaf's key, and the leaf first",
        ),
        _ => mistake(
            "key_pem",
            "cannot be used to sign".into(),
            "write an RSA (2048 bits or more), ECDSA or Ed25519 key",
        ),
    })?;
    Ok(names)
}

fn names_of(leaf: &CertificateDer<'_>) -> Result<Vec<HostPattern>, String> {
    let (_, leaf) =
        X509Certificate::from_der(leaf.as_ref()).map_err(|_| "the first certificate cannot be read".to_owned())?;
    let alternatives = leaf
        .subject_alternative_name()
        .map_err(|_| "the leaf's subjectAltNames cannot be read".to_owned())?
        .map(|extension| extension.value.general_names.as_slice())
        .unwrap_or_default();
    let mut names: Vec<HostPattern> = alternatives
        .iter()
        .filter_map(|name| match name {
            GeneralName::DNSName(text) => text.parse().ok(),
            _ => None,
        })
        .collect();
    names.sort();
    names.dedup();
    if names.is_empty() { Err("the leaf has no host name among its subjectAltNames".into()) } else { Ok(names) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_good_pair_tells_its_names_and_a_bad_one_the_field() {
        let made = rcgen::generate_simple_self_signed(vec!["b.test".into(), "*.a.test".into()]).unwrap();
        let other = rcgen::generate_simple_self_signed(vec!["c.test".into()]).unwrap();
        let (chain, key) = (made.cert.pem(), made.signing_key.serialize_pem());
        let names = certificate_names(&chain, &key).unwrap();
        assert_eq!(names.iter().map(HostPattern::as_str).collect::<Vec<_>>(), ["*.a.test", "b.test"]);
        let wrong = other.signing_key.serialize_pem();
        for (chain, key, at) in [
            (chain.as_str(), wrong.as_str(), "key_pem"),
            (chain.as_str(), "", "key_pem"),
            (chain.as_str(), chain.as_str(), "key_pem"),
            ("", key.as_str(), "chain_pem"),
            ("junk", key.as_str(), "chain_pem"),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", key.as_str(), "chain_pem"),
        ] {
            assert_eq!(certificate_names(chain, key).unwrap_err().at, at);
        }
    }

    #[test]
    fn an_ocsp_response_that_visitors_would_refuse_is_named() {
        let made = rcgen::generate_simple_self_signed(vec!["a.test".into()]).unwrap();
        let mut certificate = Certificate {
            id: "a".parse().unwrap(),
            chain_pem: made.cert.pem(),
            key_pem: made.signing_key.serialize_pem(),
            ocsp: None,
            extra: Default::default(),
        };
        assert!(check_certificate(&certificate).is_ok());
        certificate.ocsp = Some(crate::fields::Base64(b"junk".to_vec()));
        assert_eq!(check_certificate(&certificate).unwrap_err().at, "ocsp");
    }

    #[test]
    fn a_leaf_without_names_is_refused() {
        let made = rcgen::generate_simple_self_signed(Vec::<String>::new()).unwrap();
        let refused = certificate_names(&made.cert.pem(), &made.signing_key.serialize_pem()).unwrap_err();
        assert_eq!(refused.at, "chain_pem");
    }
}
