//! A made-up CA and the certificate of a node that is being tried out, kept
//! between runs so that a CA once trusted stays trusted.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use time::{Duration, OffsetDateTime};

use crate::model::HostName;

/// Long: whoever trusts the CA should have to do it once.
const CA_LIFETIME: Duration = Duration::days(3650);
/// Browsers take 397 days of a CA that somebody chose to trust; scanners complain
/// of more than a year.
const LEAF_LIFETIME: Duration = Duration::days(365);
/// What runs out sooner than this is made anew at the start.
const RENEW_BEFORE: Duration = Duration::days(30);

/// The made-up certificate of `domain`, `*.domain` and the node's own hosts.
#[derive(Debug, Clone)]
pub struct DevTls {
    /// The CA's certificate: what visitors are told to trust.
    pub ca_path: PathBuf,
    /// PEM, leaf first.
    pub chain_pem: String,
    /// PEM.
    pub key_pem: String,
}

impl DevTls {
    /// Takes CA and certificate from `dir` (`ca.pem`, `ca.key`, `edge.pem`,
    /// `edge.key`), and makes what is missing, soon to expire or for another
    /// domain. A good CA is kept whatever happens to the certificate.
    ///
    /// # Errors
    /// The folder cannot be written, or nothing can be made.
    pub fn load_or_make(dir: &Path, domain: &HostName, others: &[HostName]) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let at = |name: &str| dir.join(name);
        let (ca, ca_is_new) = match load_ca(&at("ca.pem"), &at("ca.key")) {
            Some(ca) => (ca, false),
            None => (make_ca(&at("ca.pem"), &at("ca.key"))?, true),
        };
        let mut names = vec![domain.to_string(), format!("*.{domain}")];
        let covered = |host: &str| host.split_once('.').is_some_and(|(_, parent)| parent == domain.as_str());
        let others = others.iter().map(HostName::to_string);
        names.extend(others.filter(|other| other != domain.as_str() && !covered(other)));
        let kept = (!ca_is_new).then(|| load_leaf(&at("edge.pem"), &at("edge.key"), &names)).flatten();
        let (chain_pem, key_pem) = match kept {
            Some(kept) => kept,
            None => {
                let made = make_leaf(&ca, &names).map_err(io::Error::other)?;
                // The key first: a certificate without its key is made anew.
                write_private(&at("edge.key"), &made.1)?;
                write_private(&at("edge.pem"), &made.0)?;
                made
            }
        };
        Ok(Self { ca_path: at("ca.pem"), chain_pem, key_pem })
    }
}

fn load_ca(pem: &Path, key: &Path) -> Option<Issuer<'static, KeyPair>> {
    let pem = fs::read_to_string(pem).ok()?;
    let key = KeyPair::from_pem(&fs::read_to_string(key).ok()?).ok()?;
    let (_, lasts, public) = facts(&pem)?;
    (lasts && public == key.public_key_raw()).then(|| Issuer::from_ca_cert_pem(&pem, key).ok()).flatten()
}

fn make_ca(pem: &Path, key: &Path) -> io::Result<Issuer<'static, KeyPair>> {
    let pair = KeyPair::generate().map_err(io::Error::other)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named("adit made-up CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = from_yesterday(CA_LIFETIME);
    let made = params.self_signed(&pair).map_err(io::Error::other)?;
    write_private(key, &pair.serialize_pem())?;
    write_private(pem, &made.pem())?;
    Ok(Issuer::new(params, pair))
}

fn load_leaf(pem: &Path, key: &Path, names: &[String]) -> Option<(String, String)> {
    let pem = fs::read_to_string(pem).ok()?;
    let key = fs::read_to_string(key).ok()?;
    let (has, lasts, public) = facts(&pem)?;
    let good = has == names && lasts && KeyPair::from_pem(&key).ok()?.public_key_raw() == public;
    good.then_some((pem, key))
}

fn make_leaf(ca: &Issuer<'static, KeyPair>, names: &[String]) -> Result<(String, String), rcgen::Error> {
    let pair = KeyPair::generate()?;
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = named("adit made-up certificate");
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = from_yesterday(LEAF_LIFETIME);
    let made = params.signed_by(&pair, ca)?;
    Ok((made.pem(), pair.serialize_pem()))
}

/// Names, whether it lasts a while longer, and the public key of a certificate.
fn facts(pem: &str) -> Option<(Vec<String>, bool, Vec<u8>)> {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, cert) = x509_parser::parse_x509_certificate(&der).ok()?;
    let names = cert.subject_alternative_name().ok()?.map_or(Vec::new(), |san| {
        let dns = |name: &x509_parser::extensions::GeneralName<'_>| match name {
            x509_parser::extensions::GeneralName::DNSName(name) => Some((*name).to_owned()),
            _ => None,
        };
        san.value.general_names.iter().filter_map(dns).collect()
    });
    let lasts = cert.validity().not_after.to_datetime() > OffsetDateTime::now_utc() + RENEW_BEFORE;
    Some((names, lasts, cert.public_key().subject_public_key.data.to_vec()))
}

/// Clocks differ: valid from yesterday on.
fn from_yesterday(lifetime: Duration) -> (OffsetDateTime, OffsetDateTime) {
    let from = OffsetDateTime::now_utc() - Duration::days(1);
    (from, from + lifetime)
}

fn named(name: &str) -> DistinguishedName {
    let mut all = DistinguishedName::new();
    all.push(DnType::CommonName, name);
    all
}

/// Writes a file that only its owner can read, whole or not at all.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn ca_and_certificate_are_kept_and_a_new_domain_keeps_the_ca() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("tls");
        let first = DevTls::load_or_make(&dir, &"edge.localhost".parse().unwrap(), &[]).unwrap();
        let again = DevTls::load_or_make(&dir, &"edge.localhost".parse().unwrap(), &[]).unwrap();
        assert_eq!((&first.chain_pem, &first.key_pem), (&again.chain_pem, &again.key_pem));
        let ca = fs::read_to_string(&first.ca_path).unwrap();
        let auth = ["auth.localhost".parse().unwrap()];
        let with = DevTls::load_or_make(&dir, &"edge.localhost".parse().unwrap(), &auth).unwrap();
        assert_eq!(facts(&with.chain_pem).unwrap().0, ["edge.localhost", "*.edge.localhost", "auth.localhost"]);
        let other = DevTls::load_or_make(&dir, &"b.test".parse().unwrap(), &[]).unwrap();
        assert_ne!(other.chain_pem, first.chain_pem);
        assert_eq!(fs::read_to_string(&other.ca_path).unwrap(), ca);
        for file in ["ca.key", "edge.key"] {
            assert_eq!(fs::metadata(dir.join(file)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_broken_file_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let domain = "edge.localhost".parse().unwrap();
        let first = DevTls::load_or_make(dir.path(), &domain, &[]).unwrap();
        fs::write(dir.path().join("edge.key"), "garbage").unwrap();
        let second = DevTls::load_or_make(dir.path(), &domain, &[]).unwrap();
        assert_ne!(first.key_pem, second.key_pem);
        fs::remove_file(dir.path().join("ca.key")).unwrap();
        let third = DevTls::load_or_make(dir.path(), &domain, &[]).unwrap();
        assert_ne!(second.chain_pem, third.chain_pem);
    }
}
