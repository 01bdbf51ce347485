//! The prefixes of a subscription.

use super::Change;

/// Prefixes, sorted, none of which covers another.
#[derive(Debug, Clone)]
pub(super) struct Prefixes(Vec<String>);

impl Prefixes {
    pub(super) fn new(prefixes: &[&str]) -> Self {
        let mut sorted: Vec<String> = prefixes.iter().map(|p| (*p).to_owned()).collect();
        sorted.sort();
        let mut kept: Vec<String> = Vec::new();
        for prefix in sorted {
            if !kept.last().is_some_and(|k| prefix.starts_with(k.as_str())) {
                kept.push(prefix);
            }
        }
        Self(kept)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// Whether a change is of a key under one of them.
    pub(super) fn cover(&self, change: &Change) -> bool {
        let key = match change {
            Change::Put(entry) => &entry.key,
            Change::Delete { key, .. } => key,
        };
        self.iter().any(|p| key.starts_with(p))
    }

    /// What all of them begin with.
    #[cfg(feature = "etcd")]
    pub(super) fn common(&self) -> &str {
        let (Some(first), Some(last)) = (self.0.first(), self.0.last()) else { return "" };
        // They are sorted: what the first and the last share, all share.
        let same = first.bytes().zip(last.bytes()).take_while(|(a, b)| a == b).count();
        (0..=same).rev().find_map(|end| first.get(..end)).unwrap_or_default()
    }
}
