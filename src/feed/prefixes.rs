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

    /// The first and the last: what lies between them covers all.
    #[cfg(feature = "etcd")]
    pub(super) fn ends(&self) -> (&str, &str) {
        (self.0.first().map_or("", String::as_str), self.0.last().map_or("", String::as_str))
    }
}
