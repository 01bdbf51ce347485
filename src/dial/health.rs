//! Tunnels that fail again and again are left alone for a while, and come back
//! slowly. Kept for each node by itself, from what its own visitors met.

use std::time::{Duration, Instant};

use dashmap::DashMap;

use crate::error::Error;
use crate::fields::Fields;
use crate::model::TunnelId;

/// When a tunnel that fails is left alone for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthSettings {
    /// Failures to open in a row. 5; 0: never.
    pub eject_after: usize,
    /// For how long at first; twice, three times as long when it happens again. 10 s.
    pub eject_for: Duration,
    /// The longest. 5 min.
    pub eject_at_most: Duration,
    /// From its return until it has its whole share again. 30 s.
    pub recover_over: Duration,
}

impl Default for HealthSettings {
    fn default() -> Self {
        Self {
            eject_after: 5,
            eject_for: Duration::from_secs(10),
            eject_at_most: Duration::from_secs(300),
            recover_over: Duration::from_secs(30),
        }
    }
}

impl HealthSettings {
    /// Reads its part of `[dial]`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        Self {
            eject_after: f.take("eject_after", d.eject_after),
            eject_for: f.take("eject_for", d.eject_for),
            eject_at_most: f.take("eject_at_most", d.eject_at_most),
            recover_over: f.take("recover_over", d.recover_over),
        }
    }
}

/// How tunnels did lately. Only those that failed are kept.
#[derive(Debug)]
pub(super) struct Health {
    settings: HealthSettings,
    failing: DashMap<TunnelId, Failing>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Failing {
    /// In a row.
    failures: usize,
    /// How often it was left alone, and until when the last time.
    ejected: u32,
    until: Option<Instant>,
}

impl Health {
    pub(super) fn new(settings: HealthSettings) -> Self {
        Self { settings, failing: DashMap::new() }
    }

    /// Takes in how an attempt went.
    pub(super) fn learn(&self, tunnel: &TunnelId, failure: Option<Error>) {
        self.learn_at(tunnel, failure, Instant::now());
    }

    fn learn_at(&self, tunnel: &TunnelId, failure: Option<Error>, now: Instant) {
        let s = &self.settings;
        match failure {
            None if self.failing.is_empty() => {}
            None => {
                // Forgiven once it has its whole share again.
                let whole = |failing: &Failing| failing.until.is_none_or(|until| now > until + s.recover_over);
                self.failing.remove_if(tunnel, |_, failing| whole(failing));
                if let Some(mut failing) = self.failing.get_mut(tunnel) {
                    failing.failures = 0;
                }
            }
            Some(Error::OriginRefused | Error::TunnelSilent | Error::TunnelLost) if s.eject_after > 0 => {
                let mut failing = self.failing.entry(tunnel.clone()).or_default();
                failing.failures += 1;
                // Who comes back and fails again needs no second proof.
                let recovers = failing.until.is_some_and(|until| now > until && now < until + s.recover_over);
                if failing.failures >= s.eject_after || recovers {
                    failing.ejected += 1;
                    failing.failures = 0;
                    failing.until = Some(now + (s.eject_for * failing.ejected).min(s.eject_at_most));
                    metrics::counter!("adit_tunnels_ejected_total").increment(1);
                    tracing::info!(%tunnel, times = failing.ejected, "a tunnel that fails is left alone for a while");
                }
            }
            Some(_) => {}
        }
    }

    /// Whether visitors are sent there before others: not while it is left alone, and
    /// some of them while it recovers.
    pub(super) fn is_good(&self, tunnel: &TunnelId, dice: impl FnOnce() -> f64) -> bool {
        self.is_good_at(tunnel, dice, Instant::now())
    }

    fn is_good_at(&self, tunnel: &TunnelId, dice: impl FnOnce() -> f64, now: Instant) -> bool {
        if self.failing.is_empty() {
            return true;
        }
        let Some(until) = self.failing.get(tunnel).and_then(|failing| failing.until) else { return true };
        let back = now.saturating_duration_since(until);
        now >= until && back.as_secs_f64() >= dice() * self.settings.recover_over.as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tunnel_that_fails_is_left_alone_and_comes_back_slowly() {
        let health = Health::new(HealthSettings::default());
        let (tunnel, start): (TunnelId, _) = ("t".parse().unwrap(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let fail = |now| health.learn_at(&tunnel, Some(Error::OriginRefused), now);
        let good = |dice, now| health.is_good_at(&tunnel, || dice, now);
        for _ in 0..4 {
            fail(start);
        }
        assert!(good(0.0, start));
        health.learn_at(&tunnel, None, start);
        for _ in 0..4 {
            fail(start);
        }
        assert!(good(0.0, start), "a success in between counts");
        // A limit of ours is no fault of the tunnel.
        health.learn_at(&tunnel, Some(Error::TunnelLimit), start);
        assert!(good(0.0, start));
        fail(start);
        assert!(!good(0.0, at(9)));
        assert!(good(0.4, at(25)) && !good(0.6, at(25)), "half of the visitors in the middle");
        // It fails again while it recovers: out for twice as long, at once.
        fail(at(25));
        assert!(!good(0.0, at(44)) && good(0.0, at(46)));
        health.learn_at(&tunnel, None, at(80));
        assert!(health.failing.is_empty(), "forgiven");
        assert!(good(1.0, at(80)));
    }
}
