//! Passwords that visitors send: checked in constant time, within a budget of the
//! node, of the socket and of the address, and remembered for a while by a keyed
//! hash, because a check costs tens of milliseconds and a page has many requests.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use dashmap::DashMap;
use tokio::sync::{Mutex, Semaphore};

use super::settings::GateSettings;
use crate::limits::Rates;
use crate::model::identity::PasswordHash;
use crate::password;

/// Most passwords that are remembered; beyond, all are forgotten at once.
const REMEMBERED_MAX: usize = 100_000;
/// Most that wait for their turn: at the costliest hash they wait some seconds.
const WAITING_MAX: usize = 16;

/// Checks passwords.
pub(super) struct Passwords {
    key: hmac::Key,
    known: DashMap<[u8; 32], Instant>,
    memory: Duration,
    node: Rates<()>,
    per_place: Rates<String>,
    per_address: Rates<IpAddr>,
    exempt_loopback: bool,
    /// What names that do not exist are held against, so that they take as long.
    nobody: Option<PasswordHash>,
    /// One at a time, whoever left meanwhile.
    turn: Arc<Mutex<()>>,
    waiting: Arc<Semaphore>,
}

/// What a check came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// It is the password; whether it had to be computed.
    Right {
        /// It was not known from before.
        anew: bool,
    },
    /// It is not.
    Wrong,
    /// It was not looked at: too many came; when to try again.
    Busy(Duration),
}

impl Passwords {
    /// A checker with these budgets; loopback's addresses have none if
    /// `exempt_loopback`.
    ///
    /// # Errors
    /// The system has no random bytes.
    pub(super) fn new(settings: &GateSettings, exempt_loopback: bool) -> Result<Self, String> {
        let key = hmac::Key::generate(hmac::HMAC_SHA256, &aws_lc_rs::rand::SystemRandom::new());
        let rate = |per_second: u32| f64::from(per_second);
        let address = f64::from(settings.passwords_per_address);
        Ok(Self {
            key: key.map_err(|_| "the system has no random bytes".to_owned())?,
            known: DashMap::new(),
            memory: settings.password_memory,
            node: Rates::new(rate(settings.passwords_per_second), rate(settings.passwords_per_second) * 20.0),
            per_place: Rates::new(rate(settings.passwords_per_socket), rate(settings.passwords_per_socket) * 10.0),
            per_address: Rates::new(address / 60.0, address),
            exempt_loopback,
            nobody: password::hash("nobody has this password").ok(),
            turn: Arc::default(),
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
        })
    }

    /// Whether `password` is the one of `hash`; of nobody, where there is no such
    /// name, though it takes as long as one `like` this. `place` is the socket or
    /// account, `name` who they say they are.
    pub(super) async fn check(
        &self,
        place: &str,
        ip: IpAddr,
        name: &str,
        password: &str,
        hash: Result<&PasswordHash, Option<&PasswordHash>>,
    ) -> Checked {
        let now = Instant::now();
        let remembered = self.remembered(place, name, password, hash.ok());
        if let Some(until) = self.known.get(&remembered).map(|until| *until).filter(|until| now < *until) {
            // Who is in stays in while they come, whatever else floods us.
            if until - now < self.memory / 2 {
                self.known.insert(remembered, now + self.memory);
            }
            return Checked::Right { anew: false };
        }
        let exempt = self.exempt_loopback && ip.to_canonical().is_loopback();
        let taken = if exempt { Ok(()) } else { self.per_address.take(subscriber_of(ip.to_canonical()), now) };
        let taken =
            taken.and_then(|()| self.per_place.take(place.to_owned(), now)).and_then(|()| self.node.take((), now));
        if let Err(wait) = taken {
            return Checked::Busy(wait);
        }
        let Ok(_place) = Arc::clone(&self.waiting).try_acquire_owned() else {
            return Checked::Busy(Duration::from_secs(1));
        };
        let (given, there) = (password.to_owned(), hash.is_ok());
        let held = hash.or_else(|like| like.or(self.nobody.as_ref()).ok_or(())).cloned();
        let Ok(held) = held else { return Checked::Wrong };
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let computed = tokio::task::spawn_blocking(move || {
            let right = password::verify(&held, &given);
            drop(turn);
            right
        });
        let right = computed.await.unwrap_or(false);
        if !(right && there) {
            return Checked::Wrong;
        }
        if self.known.len() >= REMEMBERED_MAX {
            self.known.clear();
        }
        self.known.insert(remembered, Instant::now() + self.memory);
        Checked::Right { anew: true }
    }

    /// The name of what was right; another hash is another name, so that a changed
    /// password is asked for at once.
    fn remembered(&self, place: &str, name: &str, password: &str, hash: Option<&PasswordHash>) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.key);
        for part in [place, name, password, hash.map_or("", PasswordHash::as_str)] {
            context.update(&(part.len() as u64).to_be_bytes());
            context.update(part.as_bytes());
        }
        context.sign().as_ref().try_into().unwrap_or([0; 32])
    }
}

/// What one subscriber's addresses are counted by: providers give them a /56 of IPv6.
fn subscriber_of(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 72))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IP: &str = "192.0.2.1";

    fn passwords() -> Passwords {
        Passwords::new(&GateSettings { passwords_per_address: 3, ..GateSettings::default() }, false).unwrap()
    }

    #[tokio::test]
    async fn what_was_right_is_remembered_until_it_changes() {
        let passwords = passwords();
        let (ip, hash) = (IP.parse().unwrap(), password::hash("right").unwrap());
        assert_eq!(passwords.check("s", ip, "ann", "right", Ok(&hash)).await, Checked::Right { anew: true });
        for _ in 0..100 {
            assert_eq!(passwords.check("s", ip, "ann", "right", Ok(&hash)).await, Checked::Right { anew: false });
        }
        // Neither elsewhere, nor of another, nor after a change.
        let other = password::hash("changed").unwrap();
        assert_eq!(passwords.check("s", ip, "ann", "right", Ok(&other)).await, Checked::Wrong);
        assert_eq!(passwords.check("s", ip, "bob", "right", Err(None)).await, Checked::Wrong);
    }

    #[tokio::test]
    async fn who_leaves_does_not_let_the_next_one_in_before_the_work_is_done() {
        let passwords = passwords();
        let hash = password::hash("right").unwrap();
        let check = passwords.check("s", IP.parse().unwrap(), "ann", "wrong", Ok(&hash));
        // Long enough to begin, and gone at once.
        let left = tokio::select! {
            biased;
            checked = check => Some(checked),
            () = tokio::task::yield_now() => None,
        };
        assert_eq!(left, None);
        assert!(passwords.turn.try_lock().is_err(), "nobody else's turn yet");
        let next = tokio::time::timeout(Duration::from_secs(10), passwords.turn.lock()).await;
        drop(next.expect("their turn comes"));
        assert_eq!(passwords.waiting.available_permits(), WAITING_MAX);
    }

    #[tokio::test]
    async fn a_flood_of_wrong_passwords_is_not_even_looked_at() {
        let passwords = passwords();
        let (ip, hash) = (IP.parse().unwrap(), password::hash("right").unwrap());
        assert_eq!(passwords.check("s", ip, "ann", "right", Ok(&hash)).await, Checked::Right { anew: true });
        let mut wrong = 0;
        let began = Instant::now();
        for i in 0..2000 {
            match passwords.check("s", ip, "ann", &format!("wrong {i}"), Ok(&hash)).await {
                Checked::Wrong => wrong += 1,
                Checked::Busy(wait) => assert!(wait <= Duration::from_secs(20), "{wait:?}"),
                Checked::Right { .. } => panic!("{i}"),
            }
        }
        assert!(wrong <= 2 + began.elapsed().as_secs() / 10, "{wrong} were looked at");
        assert_eq!(
            passwords.check("s", ip, "ann", "right", Ok(&hash)).await,
            Checked::Right { anew: false },
            "who was in stays in"
        );
    }
}
