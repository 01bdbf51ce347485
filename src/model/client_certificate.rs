//! What a visitor's certificate says of them, and whether a socket's rules allow
//! it. That it is genuine (chain, dates, whose key) is decided before, in `tls`.

use std::fmt::{self, Write};

use x509_parser::asn1_rs::ToDer;
use x509_parser::extensions::GeneralName;
use x509_parser::x509::{AttributeTypeAndValue, X509Name};

use super::gate::{ClientCertificates, Serial};
use super::identity::Email;

/// What is read from a visitor's certificate.
#[derive(Clone, PartialEq, Eq)]
pub struct ClientCertificate {
    /// The subject as RFC 4514 writes it; none where a value is no text.
    subject: Option<String>,
    /// The common name; none where there are several, because then nobody could
    /// say which of them is meant.
    common_name: Option<String>,
    /// The e-mail addresses of the subjectAltName.
    emails: Vec<Email>,
    serial: Serial,
}

/// Logs are no place for names and addresses.
impl fmt::Debug for ClientCertificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientCertificate").field("serial", &self.serial).finish_non_exhaustive()
    }
}

impl ClientCertificate {
    /// Reads a certificate (DER). `None`: it cannot be read, or not in one way only.
    pub fn read(der: &[u8]) -> Option<Self> {
        let (rest, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let names = certificate.subject_alternative_name().ok()?;
        let emails = names.iter().flat_map(|names| &names.value.general_names).filter_map(|name| match name {
            GeneralName::RFC822Name(email) => email.parse().ok(),
            _ => None,
        });
        let subject = certificate.subject();
        let mut common_names = subject.iter_common_name();
        let common_name = common_names.next().filter(|_| common_names.next().is_none());
        rest.is_empty().then(|| Self {
            subject: rfc4514(subject),
            common_name: common_name.and_then(|name| name.as_str().ok()).map(str::to_owned),
            emails: emails.collect(),
            serial: Serial::of(certificate.raw_serial()),
        })
    }

    /// The common name, where there is exactly one and it is text.
    pub fn common_name(&self) -> Option<&str> {
        self.common_name.as_deref()
    }
}

impl ClientCertificates {
    /// Whether a certificate of these CAs is one that may come. With nobody in
    /// both lists nobody may.
    pub fn allows(&self, certificate: &ClientCertificate) -> bool {
        let named = |rule: &String| match rule.as_str() {
            "*" => true,
            // A common name may look like a subject: `=` tells which is meant.
            rule if rule.contains('=') => certificate.subject.as_deref() == Some(rule),
            rule => certificate.common_name.as_deref() == Some(rule),
        };
        !self.revoked_serials.contains(&certificate.serial)
            && (self.allow_subjects.iter().any(named)
                || certificate.emails.iter().any(|email| self.allow_emails.contains(email)))
    }
}

/// A name as RFC 4514 writes it, the most specific part first: no two names are
/// written alike. `None`: a value of a type that is text is something else.
fn rfc4514(name: &X509Name<'_>) -> Option<String> {
    let mut text = String::new();
    let parts: Vec<_> = name.iter_rdn().collect();
    for (i, part) in parts.into_iter().rev().enumerate() {
        let attributes: Vec<_> = part.iter().collect();
        for (j, attribute) in attributes.into_iter().rev().enumerate() {
            text.push_str(match (i, j) {
                (0, 0) => "",
                (_, 0) => ",",
                _ => "+",
            });
            write_attribute(attribute, &mut text)?;
        }
    }
    Some(text)
}

/// RFC 4514 §3, and what certificates have beside it under the name that OpenSSL
/// prints.
const TYPES: &[(&str, &str)] = &[
    ("2.5.4.3", "CN"),
    ("2.5.4.7", "L"),
    ("2.5.4.8", "ST"),
    ("2.5.4.10", "O"),
    ("2.5.4.11", "OU"),
    ("2.5.4.6", "C"),
    ("2.5.4.4", "SN"),
    ("2.5.4.42", "GN"),
    ("2.5.4.12", "title"),
    ("2.5.4.5", "serialNumber"),
    ("0.9.2342.19200300.100.1.25", "DC"),
    ("0.9.2342.19200300.100.1.1", "UID"),
    ("1.2.840.113549.1.9.1", "emailAddress"),
];

fn write_attribute(attribute: &AttributeTypeAndValue<'_>, text: &mut String) -> Option<()> {
    let oid = attribute.attr_type().to_id_string();
    let Some((_, word)) = TYPES.iter().find(|(known, _)| *known == oid) else {
        // §2.4: of a type without a word, the bytes as they are.
        let der = attribute.attr_value().to_der_vec().ok()?;
        write!(text, "{oid}=#{}", data_encoding::HEXUPPER.encode(&der)).ok()?;
        return Some(());
    };
    let value = attribute.as_str().ok()?;
    text.push_str(word);
    text.push('=');
    let last = value.chars().count().saturating_sub(1);
    for (i, c) in value.chars().enumerate() {
        match c {
            ',' | '+' | '"' | '\\' | '<' | '>' | ';' => write!(text, "\\{c}").ok()?,
            '#' if i == 0 => text.push_str("\\#"),
            ' ' if i == 0 || i == last => text.push_str("\\ "),
            '\0'..='\x1f' | '\x7f' => write!(text, "\\{:02X}", u32::from(c)).ok()?,
            c => text.push(c),
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, DnValue, KeyPair, SanType, SerialNumber};

    use super::*;

    fn certificate(names: &[(DnType, DnValue)], emails: &[&str], serial: u64) -> rcgen::Certificate {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for (kind, value) in names {
            params.distinguished_name.push(kind.clone(), value.clone());
        }
        params.subject_alt_names =
            emails.iter().map(|email| SanType::Rfc822Name((*email).to_owned().try_into().unwrap())).collect();
        params.serial_number = Some(SerialNumber::from(serial));
        params.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    fn utf8(text: &str) -> DnValue {
        DnValue::Utf8String(text.to_owned())
    }

    fn rules(subjects: &[&str], emails: &[&str], revoked: &[&str]) -> ClientCertificates {
        ClientCertificates {
            ca_pem: String::new(),
            allow_subjects: subjects.iter().map(|s| (*s).to_owned()).collect(),
            allow_emails: emails.iter().map(|e| e.parse().unwrap()).collect(),
            revoked_serials: revoked.iter().map(|s| s.parse().unwrap()).collect(),
        }
    }

    fn read(names: &[(DnType, DnValue)], emails: &[&str], serial: u64) -> ClientCertificate {
        ClientCertificate::read(certificate(names, emails, serial).der()).unwrap()
    }

    /// OpenSSL writes the same subject the same way.
    #[test]
    fn subjects_are_written_as_openssl_writes_them() {
        for value in [
            "ann",
            "a,b+c\"d\\e<f>g;h=i",
            "#ann",
            " ann ",
            " ",
            "",
            "a\u{1}b\n",
            "Zoë Ångström",
            "CN=ann,O=Acme",
            "a#b c",
        ] {
            let made = certificate(
                &[
                    (DnType::CountryName, DnValue::PrintableString("DE".try_into().unwrap())),
                    (DnType::OrganizationName, utf8("Acme, Inc.")),
                    (
                        DnType::CustomDnType(vec![1, 2, 840, 113549, 1, 9, 1]),
                        DnValue::Ia5String("a@b.test".try_into().unwrap()),
                    ),
                    (DnType::CustomDnType(vec![2, 5, 4, 4]), utf8("Doe")),
                    (DnType::CustomDnType(vec![2, 5, 4, 5]), utf8("7")),
                    (
                        DnType::CustomDnType(vec![0, 9, 2342, 19200300, 100, 1, 25]),
                        DnValue::Ia5String("test".try_into().unwrap()),
                    ),
                    (DnType::CustomDnType(vec![1, 2, 3, 4]), utf8("odd")),
                    (DnType::CommonName, utf8(value)),
                ],
                &[],
                1,
            );
            let dir = tempfile::tempdir().unwrap();
            let file = dir.path().join("c.pem");
            std::fs::write(&file, made.pem()).unwrap();
            assert_eq!(ClientCertificate::read(made.der()).unwrap().subject.as_deref(), Some(theirs(&file).as_str()));
        }
    }

    /// What is read of one that OpenSSL made, and how OpenSSL writes its subject.
    #[test]
    fn a_part_of_several_attributes_is_written_as_openssl_writes_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.pem");
        let mut command = std::process::Command::new("openssl");
        command.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout"]);
        command.arg("/dev/null").args(["-multivalue-rdn", "-subj", "/O=Acme/CN=ann+UID=7+OU=x", "-out"]).arg(&file);
        assert!(command.output().unwrap().status.success());
        let pem = std::fs::read(&file).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
        let ann = ClientCertificate::read(&pem.contents).unwrap();
        assert_eq!(ann.subject.as_deref(), Some(theirs(&file).as_str()));
        assert_eq!(ann.common_name(), Some("ann"));
    }

    fn theirs(file: &std::path::Path) -> String {
        let mut command = std::process::Command::new("openssl");
        command.args(["x509", "-noout", "-subject", "-nameopt", "RFC2253,-esc_msb", "-in"]).arg(file);
        let said = String::from_utf8(command.output().unwrap().stdout).unwrap();
        said.strip_prefix("subject=").unwrap().strip_suffix('\n').unwrap().to_owned()
    }

    #[test]
    fn a_name_is_the_whole_common_name_or_the_whole_subject_letter_by_letter() {
        let acme =
            |name: &str| read(&[(DnType::OrganizationName, utf8("Acme")), (DnType::CommonName, utf8(name))], &[], 1);
        let ann = acme("ann");
        for (rule, allowed) in [
            ("ann", true),
            ("CN=ann,O=Acme", true),
            ("*", true),
            ("Ann", false),
            ("an", false),
            ("ann ", false),
            ("*nn", false),
            ("CN=ann", false),
            ("O=Acme,CN=ann", false),
            ("", false),
        ] {
            assert_eq!(rules(&[rule], &[], &[]).allows(&ann), allowed, "{rule:?}");
        }
        assert!(!rules(&[], &[], &[]).allows(&ann));
        for lookalike in
            ["ANN", "ann\0", "ann\0.evil.test", "ann,O=Acme", "ann.evil.test", "CN=ann,O=Acme", " ann", "аnn"]
        {
            assert!(!rules(&["ann", "CN=ann,O=Acme"], &[], &[]).allows(&acme(lookalike)), "{lookalike:?}");
        }
        // Two common names, and one that is no text: neither is anybody's.
        let two =
            read(&[(DnType::CommonName, utf8("bob")), (DnType::CustomDnType(vec![2, 5, 4, 3]), utf8("ann"))], &[], 1);
        assert!(!rules(&["ann", "bob"], &[], &[]).allows(&two) && rules(&["*"], &[], &[]).allows(&two));
        let bmp = read(&[(DnType::CommonName, DnValue::BmpString("ann".try_into().unwrap()))], &[], 1);
        assert!(!rules(&["ann", "CN=ann"], &[], &[]).allows(&bmp));
    }

    #[test]
    fn addresses_are_compared_as_mailboxes_and_a_revoked_serial_beats_all() {
        let ann = read(&[(DnType::CommonName, utf8("bob@acme.test"))], &["Ann@ACME.test", "x@y.test"], 0xAB01);
        assert!(rules(&[], &["ann@acme.test"], &[]).allows(&ann));
        for email in ["ann@acme.test.evil.test", "bob@acme.test", "nn@acme.test", "ann@cme.test"] {
            assert!(!rules(&[], &[email], &[]).allows(&ann), "{email}");
        }
        for serial in ["ab01", "AB:01", "0xAB01", "00ab01"] {
            assert!(!rules(&["*"], &["ann@acme.test"], &[serial]).allows(&ann), "{serial}");
        }
        assert!(rules(&["*"], &[], &["ab"]).allows(&ann));
        let bytes = certificate(&[], &[], 1).der().to_vec();
        assert!(ClientCertificate::read(&[&bytes[..], b"x"].concat()).is_none());
        assert!(ClientCertificate::read(&bytes[..40]).is_none());
    }

    proptest! {
        #[test]
        fn no_certificate_makes_it_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)) {
            static GOOD: std::sync::LazyLock<Vec<u8>> = std::sync::LazyLock::new(|| {
                certificate(&[(DnType::CommonName, utf8("ann"))], &["ann@acme.test"], 1).der().to_vec()
            });
            let mut bytes = GOOD.clone();
            for (at, byte) in changes {
                *at.get_mut(&mut bytes) = byte;
            }
            let _ = ClientCertificate::read(&bytes);
        }
    }
}
