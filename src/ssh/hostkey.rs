//! Keys that prove who we are, and signatures of those who log in. The formats
//! are the key library's, the arithmetic is the TLS provider's.

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::PublicKeyComponents;
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, RsaParameters, UnparsedPublicKey,
    VerificationAlgorithm,
};
use ssh_key::private::{EcdsaKeypair, KeypairData};
use ssh_key::public::{EcdsaPublicKey, KeyData};
use ssh_key::{PrivateKey, PublicKey};

use super::Fatal;
use super::wire::{Malformed, Put, Reader};

enum Signer {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
}

/// A host key.
pub struct HostKey {
    blob: Vec<u8>,
    signer: Signer,
}

impl HostKey {
    /// Takes an ed25519 or ecdsa P-256 key.
    ///
    /// # Errors
    /// What to tell the operator.
    pub fn new(key: &PrivateKey) -> Result<Self, String> {
        let unusable = |_| "the key cannot be used".to_owned();
        let signer = match key.key_data() {
            KeypairData::Ed25519(pair) => {
                let made = Ed25519KeyPair::from_seed_and_public_key(&pair.private.to_bytes(), &pair.public.0);
                Signer::Ed25519(made.map_err(unusable)?)
            }
            KeypairData::Ecdsa(EcdsaKeypair::NistP256 { public, private }) => {
                let public = public.as_bytes();
                let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
                let made = EcdsaKeyPair::from_private_key_and_public_key(algorithm, private.as_slice(), public);
                Signer::P256(made.map_err(unusable)?)
            }
            _ => return Err("host keys are of type ed25519 or ecdsa (P-256)".to_owned()),
        };
        let blob = key.public_key().to_bytes().map_err(|e| e.to_string())?;
        Ok(Self { blob, signer })
    }

    pub(super) fn algorithm(&self) -> &'static str {
        match self.signer {
            Signer::Ed25519(_) => "ssh-ed25519",
            Signer::P256(_) => "ecdsa-sha2-nistp256",
        }
    }

    pub(super) fn blob(&self) -> &[u8] {
        &self.blob
    }

    /// Signs; the signature as messages carry it.
    pub(super) fn sign(&self, message: &[u8]) -> Result<Vec<u8>, Fatal> {
        let mut out = Vec::with_capacity(128);
        out.put_string(self.algorithm().as_bytes());
        match &self.signer {
            Signer::Ed25519(pair) => out.put_string(pair.sign(message).as_ref()),
            Signer::P256(pair) => {
                let fixed = pair.sign(&SystemRandom::new(), message).map_err(|_| Fatal::CRYPTO)?;
                let (r, s) = fixed.as_ref().split_at_checked(32).ok_or(Fatal::CRYPTO)?;
                let mut pair = Vec::with_capacity(72);
                pair.put_magnitude(r);
                pair.put_magnitude(s);
                out.put_string(&pair);
            }
        }
        Ok(out)
    }
}

/// A signature's algorithm, as the client may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignatureAlgorithm {
    Ed25519,
    P256,
    P384,
    RsaSha256,
    RsaSha512,
    /// `ssh-rsa`: only where it is allowed.
    RsaSha1,
}

impl SignatureAlgorithm {
    pub(super) const ALL: &[Self] =
        &[Self::Ed25519, Self::P256, Self::P384, Self::RsaSha512, Self::RsaSha256, Self::RsaSha1];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Ed25519 => "ssh-ed25519",
            Self::P256 => "ecdsa-sha2-nistp256",
            Self::P384 => "ecdsa-sha2-nistp384",
            Self::RsaSha256 => "rsa-sha2-256",
            Self::RsaSha512 => "rsa-sha2-512",
            Self::RsaSha1 => "ssh-rsa",
        }
    }

    pub(super) fn of(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|a| a.name() == name)
    }
}

/// The smallest RSA modulus, in bits (NIST SP 800-131A).
const RSA_BITS: usize = 2048;

/// Whether `blob` is `key`'s signature of `message` by `wanted` (RFC 4253 §6.6).
pub(super) fn verify(wanted: SignatureAlgorithm, key: &KeyData, message: &[u8], blob: &[u8]) -> bool {
    checked(wanted, key, message, blob).is_some()
}

fn checked(wanted: SignatureAlgorithm, key: &KeyData, message: &[u8], blob: &[u8]) -> Option<()> {
    let mut read = Reader::new(blob);
    if read.text().ok()? != wanted.name() {
        return None;
    }
    let signature = read.string().ok()?;
    if !read.rest().is_empty() {
        return None;
    }
    let plain = |algorithm: &'static dyn VerificationAlgorithm, key: &[u8], signature: &[u8]| {
        UnparsedPublicKey::new(algorithm, key).verify(message, signature).ok()
    };
    match (wanted, key) {
        (SignatureAlgorithm::Ed25519, KeyData::Ed25519(key)) => plain(&signature::ED25519, &key.0, signature),
        (SignatureAlgorithm::P256, KeyData::Ecdsa(EcdsaPublicKey::NistP256(key))) => {
            plain(&signature::ECDSA_P256_SHA256_FIXED, key.as_bytes(), &fixed::<32>(signature).ok()?)
        }
        (SignatureAlgorithm::P384, KeyData::Ecdsa(EcdsaPublicKey::NistP384(key))) => {
            plain(&signature::ECDSA_P384_SHA384_FIXED, key.as_bytes(), &fixed::<48>(signature).ok()?)
        }
        (_, KeyData::Rsa(key)) => {
            let parameters: &'static RsaParameters = match wanted {
                SignatureAlgorithm::RsaSha256 => &signature::RSA_PKCS1_2048_8192_SHA256,
                SignatureAlgorithm::RsaSha512 => &signature::RSA_PKCS1_2048_8192_SHA512,
                SignatureAlgorithm::RsaSha1 => &signature::RSA_PKCS1_2048_8192_SHA1_FOR_LEGACY_USE_ONLY,
                _ => return None,
            };
            let (n, e) = (key.n().as_positive_bytes()?, key.e().as_positive_bytes()?);
            if n.len() * 8 < RSA_BITS {
                return None;
            }
            // A signature may come without its leading zeros (RFC 8332 §3).
            let padding = n.len().checked_sub(signature.len())?;
            let signature = [&vec![0; padding], signature].concat();
            PublicKeyComponents { n, e }.verify(parameters, message, &signature).ok()
        }
        _ => None,
    }
}

/// `r` and `s` (RFC 5656 §3.1.2) side by side, each in `N` bytes.
fn fixed<const N: usize>(signature: &[u8]) -> Result<Vec<u8>, Malformed> {
    let mut read = Reader::new(signature);
    let mut out = Vec::with_capacity(N * 2);
    for _ in 0..2 {
        let part = read.magnitude()?;
        let padding = N.checked_sub(part.len()).ok_or(Malformed)?;
        out.resize(out.len() + padding, 0);
        out.extend_from_slice(part);
    }
    if read.rest().is_empty() { Ok(out) } else { Err(Malformed) }
}

/// An OpenSSH certificate whose CA's signature holds (PROTOCOL.certkeys). Who
/// that CA is, and what the certificate allows, is for others to say.
pub(super) fn certificate(blob: &[u8]) -> Option<ssh_key::Certificate> {
    let certificate = ssh_key::Certificate::from_bytes(blob).ok()?;
    // The signature is the last field, over all before it.
    let mut tail = Vec::new();
    let signature = certificate.signature();
    tail.put_string(signature.algorithm().as_str().as_bytes());
    tail.put_string(signature.as_bytes());
    let signed = blob.len().checked_sub(tail.len() + 4)?;
    let (signed, field) = blob.split_at_checked(signed)?;
    if Reader::new(field).string().ok()? != tail {
        return None;
    }
    let algorithm = SignatureAlgorithm::of(signature.algorithm().as_str())?;
    let sha1 = algorithm == SignatureAlgorithm::RsaSha1;
    (!sha1 && verify(algorithm, certificate.signature_key(), signed, &tail)).then_some(certificate)
}

/// A bare public key.
pub(super) fn public_key(blob: &[u8]) -> Option<PublicKey> {
    PublicKey::from_bytes(blob).ok()
}
