//! Which algorithms a connection uses (RFC 4253 §7.1). We answer the client's
//! KEXINIT, so that what we offer can depend on it.

use super::Fatal;
use super::cipher::{Cipher, Mac};
use super::kex::Kex;
use super::wire::{Put, Reader};

const STRICT_CLIENT: &str = "kex-strict-c-v00@openssh.com";
const STRICT_SERVER: &str = "kex-strict-s-v00@openssh.com";
const EXT_INFO_CLIENT: &str = "ext-info-c";

/// What the client listed, and what of it we can do, in its order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Listed {
    kex: Vec<Kex>,
    host_keys: Vec<String>,
    ciphers: [Ciphers; 2],
    macs: [Vec<Mac>; 2],
    compression: [bool; 2],
    pub(super) strict: bool,
    pub(super) ext_info: bool,
    /// A guessed key exchange packet follows (RFC 4253 §7): its method and host key.
    guess: Option<(String, String)>,
}

/// One direction's ciphers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Ciphers {
    known: Vec<Cipher>,
    /// How many the client listed.
    listed: usize,
    /// Whether GCM came first.
    gcm_first: bool,
}

/// What was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    pub(super) kex: Kex,
    pub(super) host_key: String,
    /// From the client, and from us.
    pub(super) cipher: [Cipher; 2],
    pub(super) mac: [Option<Mac>; 2],
    /// The client's guessed packet is to be passed over.
    pub(super) skip_guess: bool,
}

impl Listed {
    /// Reads KEXINIT's payload, its number included.
    pub(super) fn read(payload: &[u8]) -> Result<Self, Fatal> {
        let mut read = Reader::new(payload);
        read.u8()?;
        read.array::<16>()?;
        let kex = read.names()?;
        let host_keys = read.names()?;
        let mut listed = Self {
            kex: kex.iter().filter_map(|n| Kex::ALL.iter().copied().find(|k| k.name() == n)).collect(),
            host_keys: host_keys.iter().map(str::to_owned).collect(),
            strict: kex.has(STRICT_CLIENT),
            ext_info: kex.has(EXT_INFO_CLIENT),
            ..Self::default()
        };
        for ciphers in &mut listed.ciphers {
            let names = read.names()?;
            let of = |n| Cipher::ALL.iter().copied().find(|c| c.name() == n);
            *ciphers = Ciphers {
                known: names.iter().filter_map(of).collect(),
                listed: names.iter().count(),
                gcm_first: names.iter().next().and_then(of).is_some_and(Cipher::is_gcm),
            };
        }
        for macs in &mut listed.macs {
            let names = read.names()?;
            *macs = names.iter().filter_map(|n| Mac::ALL.iter().copied().find(|m| m.name() == n)).collect();
        }
        for none in &mut listed.compression {
            *none = read.names()?.has("none");
        }
        read.names()?;
        read.names()?;
        let first = |names: super::wire::Names<'_>| names.iter().next().unwrap_or_default().to_owned();
        if read.bool()? {
            listed.guess = Some((first(kex), first(host_keys)));
        }
        read.u32()?;
        Ok(listed)
    }
}

/// What we list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Offer {
    kex: Vec<Kex>,
    host_keys: Vec<&'static str>,
    ciphers: [Vec<Cipher>; 2],
    macs: [Vec<Mac>; 2],
}

impl Offer {
    /// To a client that listed this; to one that has not spoken yet, everything.
    pub(super) fn to(client: Option<&Listed>, nist: bool, host_keys: Vec<&'static str>) -> Self {
        let mut kex: Vec<Kex> = Kex::ALL.iter().copied().filter(|k| nist || *k != Kex::EcdhP256).collect();
        let (mut ciphers, mut macs) = ([Cipher::ALL.to_vec(), Cipher::ALL.to_vec()], [vec![], vec![]]);
        for (way, macs) in macs.iter_mut().enumerate() {
            // Plain MACs only for those who list nothing better (libssh2 before 1.11).
            let etm = client.is_none_or(|c| c.macs.get(way).is_some_and(|m| m.iter().any(|m| m.etm)));
            macs.extend(Mac::ALL.iter().filter(|m| m.etm || !etm));
        }
        if let Some(client) = client {
            for (ours, theirs) in ciphers.iter_mut().zip(&client.ciphers) {
                // OpenSSH's own order prefers ciphers that cost twice as much. Who
                // lists one alone means it.
                if theirs.known.iter().any(|c| c.is_gcm()) && !theirs.gcm_first && theirs.listed > 1 {
                    ours.retain(|c| c.is_gcm());
                }
            }
            // What will be chosen comes first: then a client's guess of it is right.
            if let Some(chosen) = client.kex.iter().find(|k| kex.contains(k)).copied() {
                kex.sort_by_key(|k| *k != chosen);
            }
        }
        Self { kex, host_keys, ciphers, macs }
    }

    /// KEXINIT's payload, its number included.
    pub(super) fn write(&self, cookie: [u8; 16], first: bool) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        out.put_u8(super::msg::KEXINIT);
        out.put_bytes(&cookie);
        let kex = self.kex.iter().map(|k| k.name());
        // OpenSSH's PROTOCOL §1.9: in the first key exchange alone.
        out.put_names(kex.chain(first.then_some(STRICT_SERVER)));
        out.put_names(self.host_keys.iter().copied());
        self.ciphers.iter().for_each(|all| out.put_names(all.iter().map(|c| c.name())));
        self.macs.iter().for_each(|all| out.put_names(all.iter().map(|m| m.name())));
        for _ in 0..2 {
            out.put_names(["none"]);
        }
        for _ in 0..2 {
            out.put_names([]);
        }
        out.put_bool(false);
        out.put_u32(0);
        out
    }

    /// The client's first that we offer too, of each kind.
    pub(super) fn choose(&self, client: &Listed) -> Result<Chosen, Fatal> {
        let common = Fatal::NO_COMMON_ALGORITHM;
        let kex = client.kex.iter().copied().find(|k| self.kex.contains(k)).ok_or(common)?;
        let host_key = client.host_keys.iter().find(|k| self.host_keys.contains(&k.as_str())).ok_or(common)?;
        let mut cipher = [Cipher::Aes128Gcm; 2];
        let mut mac = [None; 2];
        for (way, (cipher, mac)) in cipher.iter_mut().zip(&mut mac).enumerate() {
            let offered = (self.ciphers.get(way), self.macs.get(way));
            let (Some(ciphers), Some(macs)) = offered else { return Err(common) };
            let (theirs, their_macs) = (client.ciphers.get(way), client.macs.get(way));
            *cipher = theirs.and_then(|t| t.known.iter().copied().find(|c| ciphers.contains(c))).ok_or(common)?;
            if !cipher.is_aead() {
                let found = their_macs.and_then(|t| t.iter().copied().find(|m| macs.contains(m)));
                *mac = Some(found.ok_or(common)?);
            }
        }
        if client.compression.contains(&false) {
            return Err(common);
        }
        let right = |(guessed_kex, guessed_key): &(String, String)| {
            self.kex.first().is_some_and(|k| k.name() == guessed_kex)
                && self.host_keys.first().is_some_and(|k| k == guessed_key)
        };
        let skip_guess = client.guess.as_ref().is_some_and(|guess| !right(guess));
        Ok(Chosen { kex, host_key: host_key.clone(), cipher, mac, skip_guess })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kexinit(kex: &str, ciphers: &str, macs: &str, guess: bool) -> Listed {
        let mut out = vec![super::super::msg::KEXINIT];
        out.put_bytes(&[0; 16]);
        for list in [kex, "ssh-ed25519", ciphers, ciphers, macs, macs, "none,zlib", "none", "", ""] {
            out.put_string(list.as_bytes());
        }
        out.put_bool(guess);
        out.put_u32(0);
        Listed::read(&out).unwrap()
    }

    fn chosen(kex: &str, ciphers: &str, macs: &str, guess: bool) -> Result<Chosen, Fatal> {
        let client = kexinit(kex, ciphers, macs, guess);
        Offer::to(Some(&client), false, vec!["ssh-ed25519"]).choose(&client)
    }

    #[test]
    fn the_cheap_cipher_is_taken_unless_the_client_insists_on_another() {
        const OPENSSH: &str = "chacha20-poly1305@openssh.com,aes128-ctr,aes192-ctr,aes256-ctr,aes128-gcm@openssh.com,aes256-gcm@openssh.com";
        let cipher = |list| chosen("curve25519-sha256", list, "hmac-sha2-256", false).unwrap().cipher[0];
        assert_eq!(cipher(OPENSSH), Cipher::Aes128Gcm);
        assert_eq!(cipher("aes256-gcm@openssh.com,aes128-gcm@openssh.com"), Cipher::Aes256Gcm);
        assert_eq!(cipher("chacha20-poly1305@openssh.com"), Cipher::ChaCha20Poly1305);
        assert_eq!(cipher("chacha20-poly1305@openssh.com,aes256-ctr"), Cipher::ChaCha20Poly1305);
        assert_eq!(cipher("3des-cbc,aes128-ctr"), Cipher::Aes128Ctr);
    }

    #[test]
    fn plain_macs_are_for_those_who_have_nothing_better() {
        let mac = |list| chosen("curve25519-sha256", "aes128-ctr", list, false).map(|c| c.mac[0].unwrap().name());
        assert_eq!(mac("hmac-sha2-256,hmac-sha2-512-etm@openssh.com"), Ok("hmac-sha2-512-etm@openssh.com"));
        assert_eq!(mac("hmac-sha1,hmac-sha2-256"), Ok("hmac-sha2-256"));
        assert_eq!(mac("hmac-sha1"), Err(Fatal::NO_COMMON_ALGORITHM));
    }

    #[test]
    fn a_guess_counts_where_it_is_what_is_chosen() {
        let skip = |kex| chosen(kex, "aes128-gcm@openssh.com", "", true).unwrap().skip_guess;
        assert!(!skip("curve25519-sha256@libssh.org,mlkem768x25519-sha256"));
        assert!(skip("sntrup761x25519-sha512@openssh.com,curve25519-sha256"));
        assert_eq!(
            chosen("diffie-hellman-group14-sha256,ecdh-sha2-nistp256", "aes128-ctr", "hmac-sha2-256", false),
            Err(Fatal::NO_COMMON_ALGORITHM)
        );
    }
}
