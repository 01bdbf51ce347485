//! The CA of owners' SSH keys: signs a posted key for some tunnels, for minutes, with
//! the user as principal. It comes from the keyring, so that every node of a fleet is
//! the same CA; tunnels' records trust it, and no node has to.

use std::time::Duration;

use ssh_key::certificate::{Builder, CertType};
use ssh_key::private::Ed25519Keypair;
use ssh_key::public::KeyData;
use ssh_key::{EcdsaCurve, PrivateKey, PublicKey};

use super::Refusal;
use crate::logins::seal::Seals;
use crate::model::identity::Moment;
use crate::model::{AuthorizedKey, SocketId, TunnelId};

/// What the comments of this CA's lines in records begin with, the key's name behind it.
const COMMENT: &str = "adit-mysocket:";
/// Longest key that is read, in bytes of its line: RSA of 16384 bits has 2.8 KB.
const LINE_MAX: usize = 8 << 10;
/// Fewest bits of an RSA key (NIST SP 800-57: 112 bits of strength).
const RSA_MIN: u32 = 2048;
/// Clocks may differ: a certificate begins this much earlier.
const SKEW: Duration = Duration::from_secs(60);

/// The CA as it signs now.
pub(super) struct Authority {
    key: PrivateKey,
    /// Its public key, as records hold it.
    pub(super) line: AuthorizedKey,
}

impl Authority {
    /// The CA of a keyring; none where that has no key yet.
    pub(super) fn now(seals: &Seals, now: Moment) -> Option<Self> {
        let (kid, seed) = seals.authority(now)?;
        let key = PrivateKey::from(Ed25519Keypair::from_seed(seed));
        let public = PublicKey::new(key.public_key().key_data().clone(), format!("{COMMENT}{kid}"));
        let line = public.to_openssh().ok()?.parse().ok()?;
        Some(Self { key, line })
    }

    /// Signs a key for `user`, for the tunnels that have one of `principals`: one line of
    /// an `authorized_keys` file.
    ///
    /// # Errors
    /// What is wrong with the key.
    pub(super) fn sign(
        &self,
        line: &str,
        user: &str,
        principals: &[String],
        (now, life): (Moment, Duration),
    ) -> Result<String, Refusal> {
        let key = signable(line)?;
        let failed = |error: ssh_key::Error| {
            tracing::error!(%error, "a key was not signed");
            Refusal::down("The key could not be signed.")
        };
        let mut random = [0u8; 40];
        aws_lc_rs::rand::fill(&mut random).map_err(|_| Refusal::down("The node has no random bytes."))?;
        let (nonce, serial) = random.split_first_chunk::<32>().unwrap_or((&[0; 32], &[]));
        let serial = serial.first_chunk::<8>().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let from = now.0.saturating_sub(SKEW.as_secs());
        let sign = || {
            let mut builder = Builder::new(*nonce, key, from, now.after(life).0)?;
            builder.serial(serial)?.cert_type(CertType::User)?.key_id(format!("mysocket {user}"))?;
            builder.valid_principal(user)?;
            for principal in principals {
                builder.valid_principal(principal)?;
            }
            builder.extension("permit-port-forwarding", "")?.extension("permit-pty", "")?;
            builder.comment(user)?;
            builder.sign(&self.key)?.to_openssh()
        };
        sign().map_err(failed)
    }
}

/// What a tunnel's certificates name beside the user: itself, or its socket.
pub(super) fn principals(tunnel: &TunnelId, socket: &SocketId) -> [String; 2] {
    [of_tunnel(tunnel), of_socket(socket)]
}

/// The principal that lets a certificate serve one tunnel.
pub(super) fn of_tunnel(tunnel: &TunnelId) -> String {
    format!("tunnel:{tunnel}")
}

/// The principal that lets a certificate serve all tunnels of a socket.
pub(super) fn of_socket(socket: &SocketId) -> String {
    format!("socket:{socket}")
}

/// Whether a line of a record is one of this CA's, of this keyring or a former one.
pub(super) fn is_ours(line: &AuthorizedKey) -> bool {
    line.line.split(' ').nth(2).is_some_and(|comment| comment.starts_with(COMMENT))
}

fn signable(line: &str) -> Result<KeyData, Refusal> {
    let refused = |problem: &str| {
        let fix = "send one line like \"ecdsa-sha2-nistp256 AAAA…\"; ed25519, ECDSA P-256 and P-384 and RSA are signed";
        Refusal::invalid("ssh_public_key", problem, fix)
    };
    if line.len() > LINE_MAX {
        return Err(refused("is too long"));
    }
    let key = PublicKey::from_openssh(line.trim()).map_err(|_| refused("is not a public key"))?;
    match key.key_data() {
        KeyData::Ed25519(_) => {}
        KeyData::Ecdsa(key) if matches!(key.curve(), EcdsaCurve::NistP256 | EcdsaCurve::NistP384) => {}
        KeyData::Rsa(key) if key.key_size() >= RSA_MIN => {}
        KeyData::Rsa(_) => return Err(refused("is an RSA key of fewer than 2048 bits")),
        _ => return Err(refused("is of a type that is not signed here")),
    }
    Ok(key.key_data().clone())
}
