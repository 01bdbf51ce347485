//! What may be used once, for as long as it counts. Only this node's memory of it:
//! what is used again at another node meets the browser's own cookie, which is gone.

use std::collections::HashMap;

use aws_lc_rs::digest;
use parking_lot::Mutex;

use crate::model::identity::Moment;

/// Most that are remembered; beyond, those that end first would have to be found:
/// all are forgotten.
const SEEN_MAX: usize = 100_000;

/// Ids that were used.
#[derive(Debug, Default)]
pub(super) struct Seen(Mutex<HashMap<[u8; 16], Moment>>);

impl Seen {
    /// Whether this is the first use of `id`, which counts until `until`.
    pub(super) fn first(&self, id: &str, until: Moment, now: Moment) -> bool {
        let hash = digest::digest(&digest::SHA256, id.as_bytes());
        let Some(hash) = hash.as_ref().first_chunk::<16>() else { return false };
        let mut seen = self.0.lock();
        if seen.len() >= SEEN_MAX {
            seen.retain(|_, until| *until >= now);
            if seen.len() >= SEEN_MAX {
                seen.clear();
            }
        }
        seen.insert(*hash, until).is_none_or(|until| until < now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_taken_once() {
        let seen = Seen::default();
        assert!(seen.first("a", Moment(10), Moment(1)) && seen.first("b", Moment(10), Moment(1)));
        assert!(!seen.first("a", Moment(10), Moment(10)));
        for i in 0..SEEN_MAX + 10 {
            assert!(seen.first(&i.to_string(), Moment(10), Moment(5)), "{i}");
        }
        assert!(seen.0.lock().len() <= SEEN_MAX);
    }
}
