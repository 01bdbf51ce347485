//! The fleet's own CA, for those who have none: what `adit ca` does. Its key is kept by
//! the operator and never comes to a node.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use time::{Duration, OffsetDateTime};

use crate::model::{HostName, NodeId};
use crate::secret_file;

/// How long the CA lasts.
const CA_DAYS: i64 = 3650;

/// Makes the certificate of a node, and before it the CA in `dir`, where there is none.
/// Answers the node's files: certificate and key. Those of before are replaced.
///
/// # Errors
/// What cannot be read, made or written, for people.
pub fn make(dir: &Path, node: &NodeId, days: u32) -> Result<[PathBuf; 2], String> {
    if node.as_str().parse::<HostName>().is_err() || node.as_str() == "ca" {
        return Err(format!("\"{node}\" is no name for a node's certificate: letters, digits, - and . alone"));
    }
    if days == 0 {
        return Err("--days 0 would end at once: write a whole number from 1".to_owned());
    }
    let failed = |what: &Path, error: &dyn std::fmt::Display| format!("{}: {error}", what.display());
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(|error| failed(dir, &error))?;
    let (pem, key) = (dir.join("ca.pem"), dir.join("ca.key"));
    let ca = match (pem.exists(), key.exists()) {
        (true, true) => load(&pem, &key).map_err(|error| failed(&pem, &error))?,
        (false, false) => make_ca(&pem, &key).map_err(|error| failed(&pem, &error))?,
        // The other half is somewhere, and a new CA would be another one.
        (true, false) => return Err(failed(&key, &"is missing beside ca.pem: put it back, or name another folder")),
        (false, true) => return Err(failed(&pem, &"is missing beside ca.key: put it back, or name another folder")),
    };
    let files = ["pem", "key"].map(|kind| dir.join(format!("{node}.{kind}")));
    let [certificate, private] = make_node(&ca, node, days).map_err(|error| failed(dir, &error))?;
    for (file, text) in files.iter().zip([certificate, private]) {
        secret_file::write(file, text.as_bytes()).map_err(|error| failed(file, &error))?;
    }
    Ok(files)
}

fn load(pem: &Path, key: &Path) -> io::Result<Issuer<'static, KeyPair>> {
    let pair = KeyPair::from_pem(&fs::read_to_string(key)?).map_err(io::Error::other)?;
    Issuer::from_ca_cert_pem(&fs::read_to_string(pem)?, pair).map_err(io::Error::other)
}

fn make_ca(pem: &Path, key: &Path) -> io::Result<Issuer<'static, KeyPair>> {
    let pair = KeyPair::generate().map_err(io::Error::other)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = named("adit fleet CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    (params.not_before, params.not_after) = for_days(CA_DAYS);
    let made = params.self_signed(&pair).map_err(io::Error::other)?;
    secret_file::write(key, pair.serialize_pem().as_bytes())?;
    secret_file::write(pem, made.pem().as_bytes())?;
    Ok(Issuer::new(params, pair))
}

fn make_node(ca: &Issuer<'static, KeyPair>, node: &NodeId, days: u32) -> Result<[String; 2], rcgen::Error> {
    let pair = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![node.to_string()])?;
    params.distinguished_name = named(node.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    // Each asks and each answers.
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    (params.not_before, params.not_after) = for_days(i64::from(days));
    let made = params.signed_by(&pair, ca)?;
    Ok([made.pem(), pair.serialize_pem()])
}

/// From yesterday on, for clocks that are behind.
fn for_days(days: i64) -> (OffsetDateTime, OffsetDateTime) {
    let now = OffsetDateTime::now_utc();
    (now - Duration::days(1), now + Duration::days(days))
}

fn named(name: &str) -> DistinguishedName {
    let mut named = DistinguishedName::new();
    named.push(DnType::CommonName, name);
    named
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::identity::{Identity, is};
    use crate::fleet::settings::FleetSettings;

    fn settings(dir: &Path, [certificate, key]: &[PathBuf; 2]) -> FleetSettings {
        let (ca, certificate, key) = (Some(dir.join("ca.pem")), Some(certificate.clone()), Some(key.clone()));
        FleetSettings { ca, certificate, key, ..FleetSettings::default() }
    }

    #[tokio::test]
    async fn nodes_of_one_ca_know_each_other_and_nobody_else() {
        let (ours, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let node = |text: &str| text.parse::<NodeId>().unwrap();
        let identity =
            |dir: &Path, name: &str| Identity::new(&settings(dir, &make(dir, &node(name), 30).unwrap())).unwrap();
        let (a, b, stranger) = (identity(ours.path(), "a"), identity(ours.path(), "b"), identity(others.path(), "a"));
        let meet = async |one: &Identity, other: &Identity, to: &str| {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let tcp = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let to = node(to);
            let (asks, answers) = tokio::join!(one.connect(tcp, &to), other.accept(accepted));
            asks.ok()?;
            Some(["a", "b"].map(|name| is(answers.as_ref().unwrap(), &node(name))))
        };
        assert_eq!(meet(&a, &b, "b").await, Some([true, false]));
        assert_eq!(meet(&b, &a, "a").await, Some([false, true]));
        assert_eq!(meet(&a, &b, "c").await, None, "it is not who was asked for");
        assert_eq!(meet(&a, &stranger, "a").await, None);
        assert_eq!(meet(&stranger, &a, "a").await, None);
        // A certificate made anew replaces the one before, while both run.
        a.reload(&settings(ours.path(), &make(ours.path(), &node("a"), 30).unwrap())).unwrap();
        assert_eq!(meet(&a, &b, "b").await, Some([true, false]));
        // Two CAs for a while: then either's nodes are known.
        let both = [ours.path(), others.path()].map(|dir| fs::read_to_string(dir.join("ca.pem")).unwrap()).concat();
        fs::write(ours.path().join("ca.pem.both"), both).unwrap();
        let files = ["pem", "key"].map(|kind| ours.path().join(format!("b.{kind}")));
        let more = FleetSettings { ca: Some(ours.path().join("ca.pem.both")), ..settings(ours.path(), &files) };
        b.reload(&more).unwrap();
        assert_eq!(meet(&a, &b, "b").await, Some([true, false]));
    }

    #[test]
    fn what_cannot_be_made_is_told() {
        let dir = tempfile::tempdir().unwrap();
        for (name, days, says) in [("under_score:1", 1, "is no name"), ("ca", 1, "is no name"), ("a", 0, "--days 0")] {
            let told = make(dir.path(), &name.parse().unwrap(), days).unwrap_err();
            assert!(told.contains(says), "{told}");
        }
        make(dir.path(), &"a".parse().unwrap(), 1).unwrap();
        fs::remove_file(dir.path().join("ca.key")).unwrap();
        assert!(make(dir.path(), &"b".parse().unwrap(), 1).unwrap_err().contains("ca.key: is missing"));
    }
}
