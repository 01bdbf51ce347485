//! Session tickets (RFC 5077, RFC 8446 §4.6.1): what a visitor brings back to
//! resume without a full handshake. The keys come from the feed, so that every
//! node takes every node's tickets, or are made here.
//!
//! A ticket is `name[16] salt[16] nonce[12] sealed`: the name picks the key, and
//! each ticket is sealed under an AEAD key of its own (HKDF over the salt), so
//! that no fleet makes too many tickets for random nonces under one key
//! (NIST SP 800-38D §8.3). Sealed with the session is when it was made.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce};
use aws_lc_rs::error::Unspecified;
use aws_lc_rs::{hkdf, rand};
use parking_lot::RwLock;
use rustls::server::ProducesTickets;

use super::now;
use crate::model::TicketKeys;

/// How long a ticket is taken. Who gets hold of a key can read the TLS 1.2
/// sessions whose tickets it sealed, so it should be for a part of a day; a
/// visitor of yesterday can well afford a full handshake.
const LIFETIME: Duration = Duration::from_secs(12 * 3600);
/// How far a peer's clock may be ahead.
const CLOCK_SKEW: Duration = Duration::from_secs(300);
const NAME_LEN: usize = 16;
const SALT_LEN: usize = 16;
const ISSUED_LEN: usize = 8;

/// The keys of all tickets of this node. One writer: the feed's follower.
pub(super) struct Ring(RwLock<Keys>);

struct Keys {
    /// The first seals, all open.
    keys: Vec<Key>,
    /// Since when the first is in use; none for keys of the feed, which are
    /// replaced by who wrote them.
    made_here: Option<Instant>,
}

impl Ring {
    /// A ring with a key of its own.
    ///
    /// # Errors
    /// The machine gives no random bytes.
    pub(super) fn new() -> Result<Self, String> {
        Ok(Self(RwLock::new(Keys::made_here()?)))
    }

    /// Takes the feed's keys from now on, or none but its own.
    ///
    /// # Errors
    /// They cannot be used, or the machine gives no random bytes; the former
    /// ones stay.
    pub(super) fn set(&self, record: Option<&TicketKeys>) -> Result<(), String> {
        let new = match record {
            None => Keys::made_here()?,
            Some(record) => {
                let keys = record.keys.iter().map(|key| Key::new(&key.0)).collect::<Result<Vec<_>, _>>();
                let keys = keys.map_err(|Unspecified| "no ticket key can be derived")?;
                Keys { keys, made_here: None }
            }
        };
        *self.0.write() = new;
        Ok(())
    }

    fn seal(&self, session: &[u8], context: &[u8], now: i64) -> Option<Vec<u8>> {
        if self.0.read().made_here.is_some_and(|since| since.elapsed() >= LIFETIME / 2) {
            self.0.write().renew();
        }
        self.0.read().keys.first()?.seal(session, context, now).ok()
    }

    fn open(&self, ticket: &[u8], context: &[u8], now: i64) -> Option<Vec<u8>> {
        let (name, rest) = ticket.split_first_chunk::<NAME_LEN>()?;
        let mut opened = self.0.read().keys.iter().find(|key| key.name == *name)?.open(rest, context).ok()?;
        let (issued, _) = opened.split_first_chunk::<ISSUED_LEN>()?;
        let age = now.checked_sub(i64::from_be_bytes(*issued))?;
        let fresh = -seconds(CLOCK_SKEW) <= age && age < seconds(LIFETIME);
        fresh.then(|| opened.split_off(ISSUED_LEN))
    }
}

impl Keys {
    fn made_here() -> Result<Self, String> {
        let key = Key::random().map_err(|Unspecified| "the machine gives no random bytes for TLS tickets")?;
        Ok(Self { keys: vec![key], made_here: Some(Instant::now()) })
    }

    /// A new first key; of the former ones the last stays, whose tickets may
    /// still be fresh.
    fn renew(&mut self) {
        let due = self.made_here.is_some_and(|since| since.elapsed() >= LIFETIME / 2);
        let Some(key) = due.then(Key::random).and_then(Result::ok) else { return };
        self.keys.insert(0, key);
        // Each is in use for half a lifetime, and read for a whole one after.
        self.keys.truncate(3);
        self.made_here = Some(Instant::now());
    }
}

/// What is derived from one secret.
struct Key {
    name: [u8; NAME_LEN],
    secret: hkdf::Prk,
}

impl Key {
    fn new(secret: &[u8]) -> Result<Self, Unspecified> {
        let secret = hkdf::Salt::new(hkdf::HKDF_SHA256, b"adit TLS ticket 1").extract(secret);
        let mut name = [0; NAME_LEN];
        secret.expand(&[b"name"], Length(NAME_LEN))?.fill(&mut name)?;
        Ok(Self { name, secret })
    }

    fn random() -> Result<Self, Unspecified> {
        let mut secret = [0; 32];
        rand::fill(&mut secret)?;
        Self::new(&secret)
    }

    fn of_ticket(&self, salt: &[u8; SALT_LEN]) -> Result<LessSafeKey, Unspecified> {
        let info: [&[u8]; 2] = [b"key", salt];
        Ok(LessSafeKey::new(self.secret.expand(&info, &AES_256_GCM)?.into()))
    }

    fn seal(&self, session: &[u8], context: &[u8], now: i64) -> Result<Vec<u8>, Unspecified> {
        let (mut salt, mut nonce) = ([0; SALT_LEN], [0; NONCE_LEN]);
        rand::fill(&mut salt)?;
        rand::fill(&mut nonce)?;
        let mut sealed = [&now.to_be_bytes(), session].concat();
        let key = self.of_ticket(&salt)?;
        key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(context), &mut sealed)?;
        Ok([&self.name[..], &salt, &nonce, &sealed].concat())
    }

    /// What is after the name, opened.
    fn open(&self, rest: &[u8], context: &[u8]) -> Result<Vec<u8>, Unspecified> {
        let (salt, rest) = rest.split_first_chunk().ok_or(Unspecified)?;
        let (nonce, sealed) = rest.split_first_chunk().ok_or(Unspecified)?;
        let mut opened = sealed.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let len = self.of_ticket(salt)?.open_in_place(nonce, Aad::from(context), &mut opened)?.len();
        opened.truncate(len);
        Ok(opened)
    }
}

/// Bytes to derive.
struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

/// The tickets of one certificate and one purpose. A ticket of another is not
/// read: who resumes is not shown the certificate again, so it has to be the
/// one that was shown before. (The name is compared by rustls.)
pub(super) struct Bound {
    pub(super) ring: Arc<Ring>,
    pub(super) context: Vec<u8>,
}

impl fmt::Debug for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bound").finish_non_exhaustive()
    }
}

impl ProducesTickets for Bound {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        u32::try_from(LIFETIME.as_secs()).unwrap_or(u32::MAX)
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        self.ring.seal(plain, &self.context, now())
    }

    fn decrypt(&self, cipher: &[u8]) -> Option<Vec<u8>> {
        self.ring.open(cipher, &self.context, now())
    }
}

fn seconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fields::Base64;
    use crate::model::TicketKeysId;

    fn record(keys: &[u8]) -> TicketKeys {
        let keys = keys.iter().map(|byte| Base64(vec![*byte; 32])).collect();
        TicketKeys { id: TicketKeysId, keys, extra: Default::default() }
    }

    fn ring(keys: &[u8]) -> Ring {
        let ring = Ring::new().unwrap();
        ring.set(Some(&record(keys))).unwrap();
        ring
    }

    const NOW: i64 = 1_800_000_000;

    #[test]
    fn a_ticket_is_read_wherever_its_key_is_and_nowhere_else() {
        let ticket = ring(&[1]).seal(b"session", b"a", NOW).unwrap();
        for (keys, read) in [(&[1][..], true), (&[2, 1], true), (&[2, 3, 1], true), (&[2], false), (&[2, 3], false)] {
            let opened = ring(keys).open(&ticket, b"a", NOW);
            assert_eq!(opened.as_deref(), read.then_some(&b"session"[..]), "{keys:?}");
        }
        assert_eq!(ring(&[1]).open(&ticket, b"b", NOW), None, "another certificate");
        let own = Ring::new().unwrap();
        assert_eq!(own.open(&ticket, b"a", NOW), None);
        let theirs = own.seal(b"session", b"a", NOW).unwrap();
        assert_eq!(Ring::new().unwrap().open(&theirs, b"a", NOW), None);
        assert!(own.open(&theirs, b"a", NOW).is_some());
    }

    #[test]
    fn a_ticket_lasts_its_lifetime_and_no_two_are_alike() {
        let ring = ring(&[1]);
        let ticket = ring.seal(b"session", b"", NOW).unwrap();
        for (later, read) in
            [(-301, false), (-300, true), (0, true), (43_199, true), (43_200, false), (i64::MAX, false)]
        {
            assert_eq!(ring.open(&ticket, b"", NOW.saturating_add(later)).is_some(), read, "{later}");
        }
        let other = ring.seal(b"session", b"", NOW).unwrap();
        assert_eq!((ticket.len(), &ticket[..NAME_LEN]), (other.len(), &other[..NAME_LEN]));
        assert_ne!(ticket[NAME_LEN..], other[NAME_LEN..]);
    }

    #[test]
    fn keys_made_here_are_replaced_and_read_on_for_a_lifetime() {
        let ring = Ring::new().unwrap();
        let mut tickets = vec![ring.seal(b"s", b"", NOW).unwrap()];
        for _ in 0..3 {
            // Half a lifetime ago, on a machine that runs for as long.
            let Some(past) = Instant::now().checked_sub(LIFETIME / 2) else { return };
            ring.0.write().made_here = Some(past);
            tickets.push(ring.seal(b"s", b"", NOW).unwrap());
        }
        let read: Vec<bool> = tickets.iter().map(|ticket| ring.open(ticket, b"", NOW).is_some()).collect();
        assert_eq!(read, [false, true, true, true]);
        assert_ne!(tickets[2][..NAME_LEN], tickets[3][..NAME_LEN]);
    }

    proptest! {
        #[test]
        fn what_was_changed_or_is_no_ticket_is_not_read(
            at in any::<prop::sample::Index>(), bit in 0..8u32, cut in any::<prop::sample::Index>(),
            junk in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let ring = ring(&[1]);
            let ticket = ring.seal(b"session", b"a", NOW).unwrap();
            let mut bad = ticket.clone();
            bad[at.index(ticket.len())] ^= 1 << bit;
            prop_assert_eq!(ring.open(&bad, b"a", NOW), None);
            prop_assert_eq!(ring.open(&ticket[..cut.index(ticket.len())], b"a", NOW), None);
            prop_assert_eq!(ring.open(&junk, b"a", NOW), None);
            let named = [&ticket[..NAME_LEN], &junk].concat();
            prop_assert_eq!(ring.open(&named, b"a", NOW), None);
        }
    }
}
