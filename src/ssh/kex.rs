//! Key exchanges, the server's side (RFC 4253 §7 and 8, RFC 8731, RFC 5656,
//! draft-ietf-sshm-mlkem-hybrid-kex), and what keys are made of them.

use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey};
use aws_lc_rs::{digest, kem};

use super::Fatal;
use super::cipher::{Cipher, Keys, Mac};
use super::hostkey::HostKey;
use super::wire::Put;

/// A key exchange method. All of them hash by SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kex {
    MlKem768X25519,
    Curve25519,
    /// The name before RFC 8731.
    Curve25519LibSsh,
    EcdhP256,
}

/// An ML-KEM-768 encapsulation key (FIPS 203).
const MLKEM_KEY: usize = 1184;

impl Kex {
    /// Which of these are offered is set; finite-field groups cost a second of
    /// CPU a handshake, and are not here.
    pub(super) const ALL: &[Kex] = &[Self::MlKem768X25519, Self::Curve25519, Self::Curve25519LibSsh, Self::EcdhP256];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::MlKem768X25519 => "mlkem768x25519-sha256",
            Self::Curve25519 => "curve25519-sha256",
            Self::Curve25519LibSsh => "curve25519-sha256@libssh.org",
            Self::EcdhP256 => "ecdh-sha2-nistp256",
        }
    }

    /// Answers the client's public value: our own, and the shared secret as the
    /// exchange hash and the keys take it.
    fn agree(self, client: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Fatal> {
        let mut secret = Vec::with_capacity(40);
        match self {
            Self::Curve25519 | Self::Curve25519LibSsh => {
                let (public, shared) = ecdh(&agreement::X25519, client)?;
                secret.put_magnitude(&shared);
                Ok((public, secret))
            }
            Self::EcdhP256 => {
                let (public, shared) = ecdh(&agreement::ECDH_P256, client)?;
                secret.put_magnitude(&shared);
                Ok((public, secret))
            }
            Self::MlKem768X25519 => {
                let (key, client) = client.split_at_checked(MLKEM_KEY).ok_or(Fatal::KEX)?;
                let key = kem::EncapsulationKey::new(&kem::ML_KEM_768, key).map_err(|_| Fatal::KEX)?;
                let (sealed, quantum) = key.encapsulate().map_err(|_| Fatal::KEX)?;
                let (public, classical) = ecdh(&agreement::X25519, client)?;
                let mut hash = digest::Context::new(&digest::SHA256);
                hash.update(quantum.as_ref());
                hash.update(&classical);
                secret.put_string(hash.finish().as_ref());
                Ok(([sealed.as_ref(), &public].concat(), secret))
            }
        }
    }
}

fn ecdh(algorithm: &'static agreement::Algorithm, client: &[u8]) -> Result<(Vec<u8>, Vec<u8>), Fatal> {
    let mine = PrivateKey::generate(algorithm).map_err(|_| Fatal::CRYPTO)?;
    let public = mine.compute_public_key().map_err(|_| Fatal::CRYPTO)?;
    // Points off the curve, and those that leave no secret, are errors.
    let theirs = UnparsedPublicKey::new(algorithm, client);
    let shared = agreement::agree(&mine, theirs, Fatal::KEX, |shared| Ok(shared.to_vec()))?;
    Ok((public.as_ref().to_vec(), shared))
}

/// What both sides said before (RFC 4253 §8).
pub(super) struct Said<'a> {
    pub(super) client_version: &'a [u8],
    pub(super) server_version: &'a [u8],
    pub(super) client_kexinit: &'a [u8],
    pub(super) server_kexinit: &'a [u8],
}

/// A finished exchange: the source of keys.
#[derive(Debug)]
pub(super) struct Exchange {
    secret: Vec<u8>,
    pub(super) hash: Vec<u8>,
}

/// The answer to the client's public value.
pub(super) struct Answer {
    /// `SSH_MSG_KEX_ECDH_REPLY` without its number.
    pub(super) reply: Vec<u8>,
    pub(super) exchange: Exchange,
}

/// Does the exchange as the server.
pub(super) fn answer(kex: Kex, client: &[u8], said: &Said<'_>, host_key: &HostKey) -> Result<Answer, Fatal> {
    let (public, secret) = kex.agree(client)?;
    let mut hashed = Vec::with_capacity(4096);
    for part in [said.client_version, said.server_version, said.client_kexinit, said.server_kexinit] {
        hashed.put_string(part);
    }
    hashed.put_string(host_key.blob());
    hashed.put_string(client);
    hashed.put_string(&public);
    hashed.put_bytes(&secret);
    let hash = digest::digest(&digest::SHA256, &hashed).as_ref().to_vec();
    let mut reply = Vec::with_capacity(public.len() + 256);
    reply.put_string(host_key.blob());
    reply.put_string(&public);
    reply.put_string(&host_key.sign(&hash)?);
    Ok(Answer { reply, exchange: Exchange { secret, hash } })
}

/// Whose packets a key is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    Client,
    Server,
}

impl Exchange {
    /// RFC 4253 §7.2.
    fn derive(&self, letter: u8, session_id: &[u8], len: usize) -> Vec<u8> {
        let mut key = Vec::with_capacity(len + 32);
        while key.len() < len {
            let mut hash = digest::Context::new(&digest::SHA256);
            hash.update(&self.secret);
            hash.update(&self.hash);
            if key.is_empty() {
                hash.update(&[letter]);
                hash.update(session_id);
            } else {
                hash.update(&key);
            }
            key.extend_from_slice(hash.finish().as_ref());
        }
        key.truncate(len);
        key
    }

    /// Makes one direction's keys and hands them to `take`.
    pub(super) fn keys<T>(
        &self,
        from: From,
        session_id: &[u8],
        cipher: Cipher,
        mac: Option<Mac>,
        take: impl FnOnce(&Keys<'_>) -> T,
    ) -> T {
        let [iv, key, mac_key] = if from == From::Client { *b"ACE" } else { *b"BDF" };
        let iv = self.derive(iv, session_id, cipher.iv_len());
        let key = self.derive(key, session_id, cipher.key_len());
        let mac_key = self.derive(mac_key, session_id, mac.map_or(0, Mac::len));
        take(&Keys { cipher, mac, iv: &iv, key: &key, mac_key: &mac_key })
    }
}
