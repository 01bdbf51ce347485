//! Packets on the wire (RFC 4253 §6): sealed at the end of a buffer, opened
//! where they lie. AES-GCM (RFC 5647 as OpenSSH does it), chacha20-poly1305
//! (OpenSSH's PROTOCOL.chacha20poly1305), AES-CTR with HMAC for old clients.

use std::ops::Range;

use aws_lc_rs::aead::chacha20_poly1305_openssh as chacha;
use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::cipher::{AES_128, AES_192, AES_256, EncryptionContext, StreamingEncryptingKey, UnboundCipherKey};
use aws_lc_rs::{constant_time, hmac};

use super::Fatal;
use super::wire::Put;

/// The longest packet taken: RFC 4253 §6.1 asks for 35000 bytes, and what our
/// channels offer (32 KiB of data) stays below.
pub(super) const MAX_PACKET: usize = 35_000;

/// The longest packet taken before the login, when a connection may be anybody's
/// and its unfinished packet is what it can make us keep: five times the longest
/// KEXINIT seen (OpenSSH 9.9: 1.6 KiB), and a user certificate of RSA keys with a
/// hundred principals.
pub(super) const EARLY_PACKET: usize = 8 << 10;

const TAG: usize = 16;
/// AES's block, and GCM's multiple.
const AES_BLOCK: usize = 16;

/// How packets of one direction are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cipher {
    Aes128Gcm,
    Aes256Gcm,
    ChaCha20Poly1305,
    Aes128Ctr,
    Aes192Ctr,
    Aes256Ctr,
}

impl Cipher {
    /// In the order of our own preference; the client's decides.
    pub(super) const ALL: &[Cipher] = &[
        Cipher::Aes128Gcm,
        Cipher::Aes256Gcm,
        Cipher::ChaCha20Poly1305,
        Cipher::Aes256Ctr,
        Cipher::Aes192Ctr,
        Cipher::Aes128Ctr,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "aes128-gcm@openssh.com",
            Self::Aes256Gcm => "aes256-gcm@openssh.com",
            Self::ChaCha20Poly1305 => "chacha20-poly1305@openssh.com",
            Self::Aes128Ctr => "aes128-ctr",
            Self::Aes192Ctr => "aes192-ctr",
            Self::Aes256Ctr => "aes256-ctr",
        }
    }

    pub(super) fn is_gcm(self) -> bool {
        matches!(self, Self::Aes128Gcm | Self::Aes256Gcm)
    }

    /// Whether it brings its own integrity, so that no MAC is negotiated.
    pub(super) fn is_aead(self) -> bool {
        self.is_gcm() || self == Self::ChaCha20Poly1305
    }

    pub(super) fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm | Self::Aes128Ctr => 16,
            Self::Aes192Ctr => 24,
            Self::Aes256Gcm | Self::Aes256Ctr => 32,
            Self::ChaCha20Poly1305 => chacha::KEY_LEN,
        }
    }

    pub(super) fn iv_len(self) -> usize {
        match self {
            Self::Aes128Gcm | Self::Aes256Gcm => 12,
            Self::ChaCha20Poly1305 => 0,
            Self::Aes128Ctr | Self::Aes192Ctr | Self::Aes256Ctr => AES_BLOCK,
        }
    }
}

/// The integrity of packets whose cipher has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac {
    hash: MacHash,
    /// Over the ciphertext (`-etm@openssh.com`), rather than the plaintext.
    pub(super) etm: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MacHash {
    Sha256,
    Sha512,
}

impl Mac {
    pub(super) const ALL: &[Mac] = &[
        Mac { hash: MacHash::Sha256, etm: true },
        Mac { hash: MacHash::Sha512, etm: true },
        Mac { hash: MacHash::Sha256, etm: false },
        Mac { hash: MacHash::Sha512, etm: false },
    ];

    pub(super) fn name(self) -> &'static str {
        match (self.hash, self.etm) {
            (MacHash::Sha256, true) => "hmac-sha2-256-etm@openssh.com",
            (MacHash::Sha512, true) => "hmac-sha2-512-etm@openssh.com",
            (MacHash::Sha256, false) => "hmac-sha2-256",
            (MacHash::Sha512, false) => "hmac-sha2-512",
        }
    }

    /// Of its key, and of what it puts behind each packet.
    pub(super) fn len(self) -> usize {
        match self.hash {
            MacHash::Sha256 => 32,
            MacHash::Sha512 => 64,
        }
    }

    fn key(self, bytes: &[u8]) -> hmac::Key {
        let algorithm = match self.hash {
            MacHash::Sha256 => hmac::HMAC_SHA256,
            MacHash::Sha512 => hmac::HMAC_SHA512,
        };
        hmac::Key::new(algorithm, bytes)
    }
}

/// What a key exchange gives one direction.
pub(super) struct Keys<'a> {
    pub(super) cipher: Cipher,
    /// `None` where the cipher brings its own.
    pub(super) mac: Option<Mac>,
    pub(super) iv: &'a [u8],
    pub(super) key: &'a [u8],
    pub(super) mac_key: &'a [u8],
}

/// AES-GCM's nonce: four fixed bytes and a counter of packets (RFC 5647 §7.1).
struct Invocations {
    fixed: [u8; 4],
    counter: u64,
}

impl Invocations {
    fn new(iv: &[u8]) -> Result<Self, Fatal> {
        let (fixed, counter) = iv.split_first_chunk::<4>().ok_or(Fatal::CRYPTO)?;
        let counter = u64::from_be_bytes(counter.try_into().map_err(|_| Fatal::CRYPTO)?);
        Ok(Self { fixed: *fixed, counter })
    }

    /// The next one. The counter starts anywhere and wraps; keys change long
    /// before it could come round.
    fn next(&mut self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.fixed);
        nonce[4..].copy_from_slice(&self.counter.to_be_bytes());
        self.counter = self.counter.wrapping_add(1);
        Nonce::assume_unique_for_key(nonce)
    }
}

/// CTR and HMAC of one direction.
struct CtrMac {
    ctr: StreamingEncryptingKey,
    mac: Mac,
    key: hmac::Key,
    /// The cipher does not work in place.
    scratch: Vec<u8>,
}

impl CtrMac {
    fn new(keys: &Keys<'_>) -> Result<Self, Fatal> {
        let mac = keys.mac.ok_or(Fatal::CRYPTO)?;
        let algorithm = match keys.cipher {
            Cipher::Aes128Ctr => &AES_128,
            Cipher::Aes192Ctr => &AES_192,
            _ => &AES_256,
        };
        let iv: [u8; AES_BLOCK] = keys.iv.try_into().map_err(|_| Fatal::CRYPTO)?;
        let key = UnboundCipherKey::new(algorithm, keys.key).map_err(|_| Fatal::CRYPTO)?;
        let ctr = StreamingEncryptingKey::less_safe_ctr(key, EncryptionContext::Iv128(iv.into()));
        Ok(Self { ctr: ctr.map_err(|_| Fatal::CRYPTO)?, mac, key: mac.key(keys.mac_key), scratch: Vec::new() })
    }

    /// Encrypts or decrypts the next bytes of the stream.
    fn apply(&mut self, bytes: &mut [u8]) -> Result<(), Fatal> {
        self.scratch.resize(bytes.len() + AES_BLOCK, 0);
        let done = self.ctr.update(bytes, &mut self.scratch).map_err(|_| Fatal::CRYPTO)?;
        bytes.copy_from_slice(done.written());
        Ok(())
    }

    fn tag(&self, seq: u32, bytes: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&seq.to_be_bytes());
        context.update(bytes);
        context.sign()
    }
}

#[expect(clippy::large_enum_variant, reason = "one a session and direction")]
enum Seal {
    /// Before the first key exchange.
    Plain,
    Gcm(LessSafeKey, Invocations),
    ChaCha(chacha::SealingKey),
    CtrMac(CtrMac),
}

/// Puts packets of one direction on the wire.
pub(super) struct Sealer {
    seal: Seal,
    seq: u32,
    /// Under these keys.
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

/// Length, and the length of the padding.
const HEAD: usize = 5;

impl Sealer {
    pub(super) fn plain() -> Self {
        Self { seal: Seal::Plain, seq: 0, packets: 0, bytes: 0 }
    }

    /// Takes new keys; with strict key exchange the numbers begin anew.
    pub(super) fn change(&mut self, keys: &Keys<'_>, strict: bool) -> Result<(), Fatal> {
        self.seal = match keys.cipher {
            Cipher::Aes128Gcm | Cipher::Aes256Gcm => Seal::Gcm(gcm_key(keys)?, Invocations::new(keys.iv)?),
            Cipher::ChaCha20Poly1305 => {
                Seal::ChaCha(chacha::SealingKey::new(keys.key.try_into().map_err(|_| Fatal::CRYPTO)?))
            }
            _ => Seal::CtrMac(CtrMac::new(keys)?),
        };
        (self.packets, self.bytes) = (0, 0);
        if strict {
            self.seq = 0;
        }
        Ok(())
    }

    /// Appends one packet whose payload `write` appends.
    pub(super) fn seal(&mut self, out: &mut Vec<u8>, write: impl FnOnce(&mut Vec<u8>)) -> Result<(), Fatal> {
        let start = out.len();
        out.put_bytes(&[0; HEAD]);
        write(out);
        let inside = out.len() - start - 4; // with the padding's length
        // RFC 4253 §6: at least 4 bytes of padding, to a multiple of the block,
        // without the length where that is not encrypted with the rest.
        let (block, counted) = match &self.seal {
            Seal::Plain => (8, inside + 4),
            Seal::ChaCha(_) => (8, inside),
            Seal::Gcm(..) => (AES_BLOCK, inside),
            Seal::CtrMac(c) => (AES_BLOCK, if c.mac.etm { inside } else { inside + 4 }),
        };
        // Zeros: every cipher here hides them, and none needs them random.
        let mut padding = block - counted % block;
        if padding < 4 {
            padding += block;
        }
        out.resize(out.len() + padding, 0);
        let len = u32::try_from(inside + padding).map_err(|_| Fatal::CRYPTO)?;
        let packet = out.get_mut(start..).ok_or(Fatal::CRYPTO)?;
        let (head, _) = packet.split_first_chunk_mut::<HEAD>().ok_or(Fatal::CRYPTO)?;
        head[..4].copy_from_slice(&len.to_be_bytes());
        head[4] = u8::try_from(padding).map_err(|_| Fatal::CRYPTO)?;
        match &mut self.seal {
            Seal::Plain => {}
            Seal::Gcm(key, nonces) => {
                let body = packet.get_mut(4..).ok_or(Fatal::CRYPTO)?;
                let tag = key.seal_in_place_separate_tag(nonces.next(), Aad::from(len.to_be_bytes()), body);
                out.put_bytes(tag.map_err(|_| Fatal::CRYPTO)?.as_ref());
            }
            Seal::ChaCha(key) => {
                let mut tag = [0; TAG];
                key.seal_in_place(self.seq, packet, &mut tag);
                out.put_bytes(&tag);
            }
            Seal::CtrMac(c) if c.mac.etm => {
                c.apply(packet.get_mut(4..).ok_or(Fatal::CRYPTO)?)?;
                let tag = c.tag(self.seq, packet);
                out.put_bytes(tag.as_ref());
            }
            Seal::CtrMac(c) => {
                let tag = c.tag(self.seq, packet);
                c.apply(packet)?;
                out.put_bytes(tag.as_ref());
            }
        }
        self.seq = self.seq.wrapping_add(1);
        self.packets += 1;
        self.bytes += (out.len() - start) as u64;
        Ok(())
    }
}

fn gcm_key(keys: &Keys<'_>) -> Result<LessSafeKey, Fatal> {
    let algorithm = if keys.cipher == Cipher::Aes128Gcm { &AES_128_GCM } else { &AES_256_GCM };
    Ok(LessSafeKey::new(UnboundKey::new(algorithm, keys.key).map_err(|_| Fatal::CRYPTO)?))
}

#[expect(clippy::large_enum_variant, reason = "one a session and direction")]
enum Open {
    Plain,
    Gcm(LessSafeKey, Invocations),
    ChaCha(chacha::OpeningKey),
    /// Whether the packet's first block has been decrypted already, to see its length.
    CtrMac(CtrMac, bool),
}

/// Takes packets of one direction from the wire.
pub(super) struct Opener {
    open: Open,
    seq: u32,
    /// The longest packet that is taken now.
    pub(super) longest: usize,
    pub(super) packets: u64,
    pub(super) bytes: u64,
}

/// What the front of a buffer holds.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Front {
    /// Less than a packet; so many bytes are needed before asking again is of use.
    Part(usize),
    /// A packet of so many bytes, its payload decrypted in place.
    Packet { payload: Range<usize>, len: usize },
}

impl Opener {
    pub(super) fn plain() -> Self {
        Self { open: Open::Plain, seq: 0, longest: EARLY_PACKET, packets: 0, bytes: 0 }
    }

    /// The number of the packet that comes next.
    pub(super) fn seq(&self) -> u32 {
        self.seq
    }

    pub(super) fn change(&mut self, keys: &Keys<'_>, strict: bool) -> Result<(), Fatal> {
        self.open = match keys.cipher {
            Cipher::Aes128Gcm | Cipher::Aes256Gcm => Open::Gcm(gcm_key(keys)?, Invocations::new(keys.iv)?),
            Cipher::ChaCha20Poly1305 => {
                Open::ChaCha(chacha::OpeningKey::new(keys.key.try_into().map_err(|_| Fatal::CRYPTO)?))
            }
            _ => Open::CtrMac(CtrMac::new(keys)?, false),
        };
        (self.packets, self.bytes) = (0, 0);
        if strict {
            self.seq = 0;
        }
        Ok(())
    }

    /// Opens the packet at the front of `buf`, if it is all there.
    pub(super) fn open(&mut self, buf: &mut [u8]) -> Result<Front, Fatal> {
        let seq = self.seq;
        let Some(first) = buf.first_chunk::<4>().copied() else { return Ok(Front::Part(4)) };
        let longest = self.longest;
        let (len, tag) = match &mut self.open {
            Open::Plain => (checked(first, longest, 8, 4)?, 0),
            Open::Gcm(..) => (checked(first, longest, AES_BLOCK, 0)?, TAG),
            Open::ChaCha(key) => (checked(key.decrypt_packet_length(seq, first), longest, 8, 0)?, TAG),
            Open::CtrMac(c, _) if c.mac.etm => (checked(first, longest, AES_BLOCK, 0)?, c.mac.len()),
            Open::CtrMac(c, seen) => {
                let Some(block) = buf.first_chunk_mut::<AES_BLOCK>() else { return Ok(Front::Part(AES_BLOCK)) };
                if !*seen {
                    c.apply(block)?;
                    *seen = true;
                }
                let [a, b, c4, d, ..] = *block;
                (checked([a, b, c4, d], longest, AES_BLOCK, 4)?, c.mac.len())
            }
        };
        let total = 4 + len + tag;
        let Some(packet) = buf.get_mut(..total) else { return Ok(Front::Part(total)) };
        let (sealed, tag) = packet.split_at_mut_checked(4 + len).ok_or(Fatal::MALFORMED)?;
        match &mut self.open {
            Open::Plain => {}
            Open::Gcm(key, nonces) => {
                let body = packet.get_mut(4..).ok_or(Fatal::MALFORMED)?;
                key.open_in_place(nonces.next(), Aad::from(first), body).map_err(|_| Fatal::MAC)?;
            }
            Open::ChaCha(key) => {
                let tag = tag.first_chunk::<TAG>().ok_or(Fatal::MALFORMED)?;
                key.open_in_place(seq, sealed, tag).map_err(|_| Fatal::MAC)?;
            }
            Open::CtrMac(c, _) if c.mac.etm => {
                same(c.tag(seq, sealed).as_ref(), tag)?;
                c.apply(sealed.get_mut(4..).ok_or(Fatal::MALFORMED)?)?;
            }
            Open::CtrMac(c, seen) => {
                c.apply(sealed.get_mut(AES_BLOCK..).ok_or(Fatal::MALFORMED)?)?;
                same(c.tag(seq, sealed).as_ref(), tag)?;
                *seen = false;
            }
        }
        let padding = usize::from(buf.get(4).copied().unwrap_or_default());
        let end = (4 + len).checked_sub(padding).filter(|end| *end > HEAD && padding >= 4);
        self.seq = seq.wrapping_add(1);
        self.packets += 1;
        self.bytes += total as u64;
        Ok(Front::Packet { payload: HEAD..end.ok_or(Fatal::MALFORMED)?, len: total })
    }
}

fn same(mine: &[u8], theirs: &[u8]) -> Result<(), Fatal> {
    constant_time::verify_slices_are_equal(mine, theirs).map_err(|_| Fatal::MAC)
}

/// A packet's length, if it can be one: padded to `block`, `counted` bytes of
/// the length itself included.
fn checked(len: [u8; 4], longest: usize, block: usize, counted: usize) -> Result<usize, Fatal> {
    let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
    if len > longest {
        return Err(Fatal::PACKET_TOO_LARGE);
    }
    // A padding's length, one byte of payload and four of padding at least.
    if len < 6 || !(len + counted).is_multiple_of(block) {
        return Err(Fatal::MALFORMED);
    }
    Ok(len)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn pairs() -> Vec<(Cipher, Option<Mac>)> {
        let macs = |c: Cipher| match c.is_aead() {
            true => vec![None],
            false => Mac::ALL.iter().copied().map(Some).collect(),
        };
        Cipher::ALL.iter().flat_map(|c| macs(*c).into_iter().map(|m| (*c, m))).collect()
    }

    fn keyed(cipher: Cipher, mac: Option<Mac>, seed: u8) -> (Sealer, Opener) {
        let bytes: Vec<u8> = (0..64).map(|n| n ^ seed).collect();
        let keys = Keys {
            cipher,
            mac,
            iv: &bytes[..cipher.iv_len()],
            key: &bytes[..cipher.key_len()],
            mac_key: &bytes[..mac.map_or(0, Mac::len)],
        };
        let (mut sealer, mut opener) = (Sealer::plain(), Opener::plain());
        sealer.change(&keys, true).unwrap();
        opener.change(&keys, true).unwrap();
        (sealer, opener)
    }

    fn all_packets(opener: &mut Opener, wire: &mut [u8], step: usize) -> Result<Vec<Vec<u8>>, Fatal> {
        let (mut packets, mut pos, mut here) = (Vec::new(), 0, 0);
        while pos < wire.len() {
            here = (here + step).min(wire.len());
            loop {
                match opener.open(&mut wire[pos..here])? {
                    Front::Part(needed) => {
                        assert!(needed > here - pos);
                        break;
                    }
                    Front::Packet { payload, len } => {
                        packets.push(wire[pos + payload.start..pos + payload.end].to_vec());
                        pos += len;
                    }
                }
            }
        }
        Ok(packets)
    }

    #[test]
    fn packets_come_back_whole_however_they_are_cut() {
        for (cipher, mac) in pairs().into_iter().map(|(c, m)| (Some(c), m)).chain([(None, None)]) {
            for step in [1, 7, 4096] {
                let (mut sealer, mut opener) = match cipher {
                    Some(cipher) => keyed(cipher, mac, 5),
                    None => (Sealer::plain(), Opener::plain()),
                };
                opener.longest = MAX_PACKET;
                let sent: Vec<Vec<u8>> = [1, 2, 11, 12, 13, 500, 32_777].iter().map(|n| vec![*n as u8; *n]).collect();
                let mut wire = Vec::new();
                for payload in &sent {
                    sealer.seal(&mut wire, |out| out.put_bytes(payload)).unwrap();
                }
                assert_eq!(all_packets(&mut opener, &mut wire, step).unwrap(), sent, "{cipher:?} {mac:?} by {step}");
            }
        }
    }

    #[test]
    fn no_changed_byte_and_no_repeated_packet_is_taken() {
        for (cipher, mac) in pairs() {
            let mut wire = Vec::new();
            keyed(cipher, mac, 5).0.seal(&mut wire, |out| out.put_bytes(b"payload")).unwrap();
            for at in 0..wire.len() {
                let mut changed = wire.clone();
                changed[at] ^= 0x10;
                let opened = keyed(cipher, mac, 5).1.open(&mut changed);
                assert!(!matches!(opened, Ok(Front::Packet { .. })), "{cipher:?} {mac:?} byte {at}");
            }
            let mut twice = [wire.clone(), wire].concat();
            assert!(all_packets(&mut keyed(cipher, mac, 5).1, &mut twice, 4096).is_err(), "{cipher:?} {mac:?}");
        }
    }

    #[test]
    fn absurd_lengths_are_refused_before_anything_is_waited_for() {
        for (len, fatal) in [
            (u32::MAX, Fatal::PACKET_TOO_LARGE),
            (EARLY_PACKET as u32 + 4, Fatal::PACKET_TOO_LARGE),
            (0, Fatal::MALFORMED),
            (5, Fatal::MALFORMED),
            (13, Fatal::MALFORMED),
        ] {
            assert_eq!(Opener::plain().open(&mut len.to_be_bytes()), Err(fatal), "{len}");
        }
        let mut logged_in = Opener::plain();
        logged_in.longest = MAX_PACKET;
        assert_eq!(logged_in.open(&mut 35_004_u32.to_be_bytes()), Err(Fatal::PACKET_TOO_LARGE));
        assert_eq!(logged_in.open(&mut 34_996_u32.to_be_bytes()), Ok(Front::Part(35_000)));
        // A padding that is longer than the packet, or shorter than it may be.
        for padding in [0, 3, 8, 255] {
            let mut wire = [0, 0, 0, 12, padding, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
            let opened = Opener::plain().open(&mut wire);
            assert_eq!(opened.is_ok(), padding == 8, "{padding}");
        }
    }
}
