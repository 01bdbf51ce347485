//! Counts that end: how many connections an address, a socket, a tunnel or the
//! node has now (a permit counts while it lives), and how often something may be
//! tried.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dashmap::DashMap;
use parking_lot::Mutex;

/// One counted thing; dropping it gives its place back.
#[derive(Debug)]
pub struct Permit(Arc<AtomicUsize>);

impl Permit {
    /// One more of `count`, unless it has `max` already.
    pub fn take(count: &Arc<AtomicUsize>, max: usize) -> Option<Self> {
        let taken = count.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| (n < max).then(|| n + 1));
        taken.is_ok().then(|| Self(Arc::clone(count)))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// At most `max` at once from one address (IPv6: from one /64, which is what
/// one visitor is given).
#[derive(Debug)]
pub struct PerAddress {
    counts: Arc<DashMap<IpAddr, usize>>,
    max: usize,
    exempt_loopback: bool,
}

/// One counted connection of an address.
#[derive(Debug)]
pub struct AddressPermit {
    counts: Arc<DashMap<IpAddr, usize>>,
    /// `None`: exempt, nothing was counted.
    key: Option<IpAddr>,
}

impl PerAddress {
    /// A limit of `max` connections for each address; none for loopback
    /// addresses if `exempt_loopback`.
    pub fn new(max: usize, exempt_loopback: bool) -> Self {
        Self { counts: Arc::default(), max, exempt_loopback }
    }

    /// One more connection from `ip`, unless it has its share already.
    pub fn admit(&self, ip: IpAddr) -> Option<AddressPermit> {
        let ip = ip.to_canonical();
        if self.exempt_loopback && ip.is_loopback() {
            return Some(AddressPermit { counts: Arc::clone(&self.counts), key: None });
        }
        let key = share_of(ip);
        let mut count = self.counts.entry(key).or_insert(0);
        if *count >= self.max {
            return None;
        }
        *count += 1;
        Some(AddressPermit { counts: Arc::clone(&self.counts), key: Some(key) })
    }
}

impl Drop for AddressPermit {
    fn drop(&mut self) {
        let Some(key) = self.key else { return };
        if let Some(mut count) = self.counts.get_mut(&key) {
            *count = count.saturating_sub(1);
        }
        self.counts.remove_if(&key, |_, count| *count == 0);
    }
}

/// So much per time for each key: buckets that fill again. Keys are forgotten once
/// their bucket is full; beyond `KEYS_MAX` new ones have to wait.
#[derive(Debug)]
pub struct Rates<K: Eq + std::hash::Hash> {
    buckets: DashMap<K, (f64, Instant)>,
    per_second: f64,
    burst: f64,
    swept: Mutex<Instant>,
}

/// Most keys of one table of rates: 100,000 addresses are some 10 MB.
const KEYS_MAX: usize = 100_000;

impl<K: Eq + std::hash::Hash + Clone> Rates<K> {
    /// `per_second` each, of which `burst` may come at once.
    pub fn new(per_second: f64, burst: f64) -> Self {
        Self { buckets: DashMap::new(), per_second, burst, swept: Mutex::new(Instant::now()) }
    }

    /// Takes one of `key`'s share.
    ///
    /// # Errors
    /// It has none left; how long until it has.
    pub fn take(&self, key: K, now: Instant) -> Result<(), Duration> {
        self.sweep(now);
        if self.buckets.len() >= KEYS_MAX && !self.buckets.contains_key(&key) {
            return Err(Duration::from_secs(1));
        }
        let mut bucket = self.buckets.entry(key).or_insert((self.burst, now));
        let (left, at) = *bucket;
        let left = (left + now.saturating_duration_since(at).as_secs_f64() * self.per_second).min(self.burst);
        if left < 1.0 {
            *bucket = (left, now);
            return Err(Duration::from_secs_f64((1.0 - left) / self.per_second));
        }
        *bucket = (left - 1.0, now);
        Ok(())
    }

    /// Drops full buckets, at most once a second.
    fn sweep(&self, now: Instant) {
        if let Some(mut swept) = self.swept.try_lock()
            && now.saturating_duration_since(*swept) > Duration::from_secs(1)
        {
            *swept = now;
            let (rate, burst) = (self.per_second, self.burst);
            self.buckets
                .retain(|_, (left, at)| *left + now.saturating_duration_since(*at).as_secs_f64() * rate < burst);
        }
    }
}

/// What one visitor's address is counted by: IPv6 by its /64.
pub fn share_of(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => ip,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_gets_its_share_back_when_a_connection_ends() {
        let limit = PerAddress::new(2, true);
        let ip: IpAddr = "192.0.2.1".parse().unwrap();
        let (first, _second) = (limit.admit(ip).unwrap(), limit.admit(ip).unwrap());
        assert!(limit.admit(ip).is_none());
        assert!(limit.admit("192.0.2.2".parse().unwrap()).is_some());
        drop(first);
        assert!(limit.admit(ip).is_some());
        assert_eq!(limit.counts.len(), 1);
    }

    #[test]
    fn a_share_of_tries_fills_again_and_is_each_ones_own() {
        let rates = Rates::new(0.5, 3.0);
        let start = Instant::now();
        assert!((0..3).all(|_| rates.take("a", start).is_ok()));
        let wait = rates.take("a", start).unwrap_err();
        assert!((1.9..=2.1).contains(&wait.as_secs_f64()), "{wait:?}");
        assert!(rates.take("b", start).is_ok());
        assert!(rates.take("a", start + Duration::from_secs(2)).is_ok());
        assert!(rates.take("a", start + Duration::from_secs(3)).is_err());
        assert!(rates.take("c", start + Duration::from_secs(60)).is_ok());
        assert_eq!(rates.buckets.len(), 1, "what is full again is forgotten");
    }

    #[test]
    fn one_slash_64_is_one_visitor_and_loopback_may_be_exempt() {
        let limit = PerAddress::new(1, true);
        let _held = limit.admit("2001:db8::1".parse().unwrap()).unwrap();
        assert!(limit.admit("2001:db8::2".parse().unwrap()).is_none());
        assert!(limit.admit("2001:db8:0:1::2".parse().unwrap()).is_some());
        let held: Vec<_> = (0..5).map(|_| limit.admit("::ffff:127.0.0.1".parse().unwrap())).collect();
        assert!(held.iter().all(Option::is_some));
    }
}
