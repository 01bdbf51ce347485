//! Who may log in, and which tunnel a login may serve: keys, user certificates
//! of trusted CAs, and (in open mode, on loopback) nobody in particular.

use std::net::IpAddr;
use std::time::SystemTime;

use ssh_key::certificate::{CertType, Certificate};
use ssh_key::{HashAlg, PublicKey};

use crate::model::{AuthorizedKey, Revoked, Tunnel};

/// Who logged in, as verified.
#[derive(Debug, Clone)]
pub enum Login {
    /// Owns the private key of this public key.
    Key(AuthorizedKey),
    /// Holds a user certificate of this CA.
    Certificate {
        /// The CA that signed it.
        authority: AuthorizedKey,
        /// Whom it names; never empty.
        principals: Vec<String>,
        /// Whether it permits forwarding.
        may_forward: bool,
        /// The fingerprint of the key that it certifies.
        key: String,
        /// Its serial number.
        serial: u64,
        /// Its key id.
        id: String,
    },
    /// Showed nothing (open mode, loopback): owns what its session makes.
    Nobody,
}

impl Login {
    /// The fingerprint of what was shown, for logs and `created_by`.
    pub fn fingerprint(&self) -> Option<&str> {
        match self {
            Self::Key(key) => Some(&key.fingerprint),
            Self::Certificate { authority, .. } => Some(&authority.fingerprint),
            Self::Nobody => None,
        }
    }

    /// Whether a list names it.
    pub fn is_revoked(&self, list: &[Revoked]) -> bool {
        list.iter().any(|revoked| match (self, revoked) {
            (Self::Key(key), Revoked::Key(named)) => key.fingerprint == *named,
            (Self::Certificate { key, authority, .. }, Revoked::Key(named)) => {
                key == named || authority.fingerprint == *named
            }
            (Self::Certificate { serial, .. }, Revoked::Serials(named)) => named.contains(serial),
            (Self::Certificate { id, .. }, Revoked::Id(named)) => id == named,
            _ => false,
        })
    }

    /// Whether this login, as SSH user `user`, may serve `tunnel` by its record.
    pub fn may_serve(&self, user: &str, tunnel: &Tunnel, node_authorities: &[AuthorizedKey]) -> bool {
        if tunnel.user.as_deref().is_some_and(|wanted| wanted != user) || self.is_revoked(&tunnel.revoked) {
            return false;
        }
        match self {
            Self::Key(key) => tunnel.keys.iter().any(|k| k.fingerprint == key.fingerprint),
            Self::Certificate { authority, principals, may_forward, .. } => {
                let names_somebody = !tunnel.principals.is_empty() || tunnel.user.is_some();
                // The node's CAs serve whom a record names. One that names only
                // keys, as those made on demand do, is for these keys alone.
                let of_node = node_authorities.iter().filter(|_| names_somebody);
                let trusted = tunnel.cert_authorities.iter().chain(of_node);
                let named = |p: &String| match (tunnel.principals.is_empty(), &tunnel.user) {
                    (false, _) => tunnel.principals.contains(p),
                    (true, Some(wanted)) => p == wanted,
                    // A record that names nobody takes whom the CA let in as this user.
                    (true, None) => p == user,
                };
                *may_forward
                    && trusted.into_iter().any(|ca| ca.fingerprint == authority.fingerprint)
                    && principals.iter().any(named)
            }
            Self::Nobody => false,
        }
    }
}

/// A public key as records hold it.
pub fn authorized(key: &PublicKey) -> Option<AuthorizedKey> {
    let line = PublicKey::new(key.key_data().clone(), "").to_openssh().ok()?;
    Some(AuthorizedKey { line, fingerprint: key.fingerprint(HashAlg::Sha256).to_string() })
}

/// Checks what the SSH library does not check of an OpenSSH user certificate
/// (PROTOCOL.certkeys): the CA is trusted, it is a user certificate, valid now,
/// names somebody, and carries no restriction that is not understood here.
///
/// # Errors
/// Why it is refused, for the log.
pub fn check_certificate(
    certificate: &Certificate,
    peer: IpAddr,
    now: SystemTime,
    is_trusted: impl Fn(&str) -> bool,
) -> Result<Login, &'static str> {
    let ca = PublicKey::from(certificate.signature_key().clone());
    let authority = authorized(&ca).ok_or("its CA key cannot be read")?;
    if !is_trusted(&authority.fingerprint) {
        return Err("its CA is not trusted here");
    }
    if certificate.cert_type() != CertType::User {
        return Err("it is not a user certificate");
    }
    let now_s = now.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    if now_s < certificate.valid_after() || now_s >= certificate.valid_before() {
        return Err("it is not valid now");
    }
    // An empty list means "any user" to OpenSSH; here it names nobody.
    let principals = certificate.valid_principals().to_vec();
    if principals.is_empty() {
        return Err("it names no principal");
    }
    for (name, value) in certificate.critical_options().iter() {
        match name.as_str() {
            "source-address" if source_matches(value, peer) => {}
            "source-address" => return Err("its source-address does not allow this address"),
            _ => return Err("it has a critical option that is not understood here"),
        }
    }
    let may_forward = certificate.extensions().iter().any(|(name, _)| name == "permit-port-forwarding");
    Ok(Login::Certificate {
        authority,
        principals,
        may_forward,
        key: certificate.public_key().fingerprint(HashAlg::Sha256).to_string(),
        serial: certificate.serial(),
        id: certificate.key_id().to_owned(),
    })
}

/// Whether a comma-separated list of addresses and CIDR blocks holds `peer`.
/// What cannot be read matches nothing.
pub(crate) fn source_matches(list: &str, peer: IpAddr) -> bool {
    let peer = peer.to_canonical();
    list.split(',').map(str::trim).any(|item| {
        let (addr, len) = match item.split_once('/') {
            Some((addr, len)) => (addr, len.parse::<u32>().ok()),
            None => (item, Some(128)),
        };
        let (Ok(addr), Some(len)) = (addr.parse::<IpAddr>(), len) else { return false };
        match (addr.to_canonical(), peer) {
            (IpAddr::V4(net), IpAddr::V4(ip)) => {
                let len = if item.contains('/') { len } else { 32 };
                len <= 32 && (u32::from(net) ^ u32::from(ip)).checked_shr(32 - len).unwrap_or(0) == 0
            }
            (IpAddr::V6(net), IpAddr::V6(ip)) => {
                len <= 128 && (u128::from(net) ^ u128::from(ip)).checked_shr(128 - len).unwrap_or(0) == 0
            }
            _ => false,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(fingerprint: &str) -> AuthorizedKey {
        AuthorizedKey { line: String::new(), fingerprint: fingerprint.to_owned() }
    }

    #[test]
    fn a_certificate_of_the_nodes_ca_serves_only_tunnels_that_name_its_principal() {
        let ca = key("ca");
        let login = Login::Certificate {
            authority: ca.clone(),
            principals: vec!["mallory".to_owned()],
            may_forward: true,
            key: "mallory's".to_owned(),
            serial: 7,
            id: "mallory@laptop".to_owned(),
        };
        let may = |tunnel: &Tunnel| login.may_serve("mallory", tunnel, std::slice::from_ref(&ca));
        let mut tunnel = Tunnel::new("web".parse().unwrap(), "web".parse().unwrap());
        tunnel.keys = vec![key("alice")];
        assert!(!may(&tunnel), "served for a key that it does not hold");
        tunnel.principals = vec!["alice".to_owned()];
        assert!(!may(&tunnel));
        tunnel.principals.push("mallory".to_owned());
        assert!(may(&tunnel));
        tunnel.principals.clear();
        tunnel.user = Some("mallory".to_owned());
        assert!(may(&tunnel));
        (tunnel.user, tunnel.cert_authorities) = (None, vec![ca.clone()]);
        assert!(may(&tunnel), "a record that trusts the CA itself takes whom it let in");
        for revoked in [Revoked::Key("ca".into()), Revoked::Key("mallory's".into()), Revoked::Serials(7..=7)] {
            tunnel.revoked = vec![revoked.clone()];
            assert!(!may(&tunnel), "{revoked}");
        }
        tunnel.revoked = ["id: mallory", "serial: 8-9", "serial: 0"].map(|r| r.parse().unwrap()).to_vec();
        assert!(may(&tunnel), "revoked by another's name or number");
        tunnel.revoked.push("id: mallory@laptop".parse().unwrap());
        assert!(!may(&tunnel));
    }

    #[test]
    fn a_source_address_list_matches_addresses_and_blocks() {
        let ip = |s: &str| s.parse::<IpAddr>().unwrap();
        assert!(source_matches("10.0.0.0/8,192.0.2.7", ip("10.1.2.3")));
        assert!(source_matches("192.0.2.7", ip("::ffff:192.0.2.7")));
        assert!(source_matches("0.0.0.0/0", ip("198.51.100.1")));
        assert!(source_matches("2001:db8::/32", ip("2001:db8:1::1")));
        assert!(!source_matches("10.0.0.0/8", ip("11.0.0.1")));
        assert!(!source_matches("192.0.2.7", ip("192.0.2.8")));
        assert!(!source_matches("0.0.0.0/0", ip("2001:db8::1")));
        assert!(!source_matches("10.0.0.0/33,x,/8,", ip("10.0.0.1")));
    }
}
