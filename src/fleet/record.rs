//! The records that nodes write of themselves: JSON, with fields of later versions
//! left alone.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::settings::Coordinates;

/// `up/node/<node>`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct NodeRecord {
    v: u32,
    /// This run of it.
    pub(super) boot: String,
    /// What it runs.
    #[serde(default)]
    pub(super) version: String,
    /// Whether it is about to leave.
    #[serde(default)]
    pub(super) draining: bool,
    /// Where other nodes reach it, the best one first.
    #[serde(default)]
    pub(super) addresses: Vec<SocketAddr>,
    /// Where it is: degrees north and east.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    place: Option<(f64, f64)>,
    /// Whether its API writes records.
    #[serde(default)]
    pub(super) control: bool,
}

impl NodeRecord {
    pub(super) fn new(boot: &str) -> Self {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        Self { v: 1, boot: boot.to_owned(), version, ..Self::default() }
    }

    pub(super) fn at(mut self, place: Option<Coordinates>) -> Self {
        self.place = place.map(|place| (place.latitude, place.longitude));
        self
    }

    pub(super) fn place(&self) -> Option<Coordinates> {
        self.place.map(|(latitude, longitude)| Coordinates { latitude, longitude })
    }

    pub(super) fn read(text: &str) -> Option<Self> {
        serde_json::from_str(text).ok().filter(|record: &Self| record.v == 1)
    }

    pub(super) fn to_text(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// `up/loc/<node>/<tunnel>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Location {
    /// The run of the node that told it.
    pub(super) boot: String,
    /// The revision that told of this login first, and the life of the data that it
    /// counts in; 0: this is the one.
    pub(super) login: u64,
    pub(super) epoch: String,
    /// When the owner's login registered it.
    pub(super) since: SystemTime,
    /// The round trip from the node to the owner's client, once measured.
    pub(super) round_trip: Option<Duration>,
    /// Checks of its origin fail there.
    pub(super) fails: bool,
}

fn milliseconds(at: SystemTime) -> u64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[derive(Serialize, Deserialize)]
struct Stored {
    v: u32,
    boot: String,
    #[serde(default)]
    login: u64,
    #[serde(default)]
    epoch: String,
    since_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rtt_us: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    fails: bool,
}

impl Location {
    pub(super) fn read(text: &str) -> Option<Self> {
        let Stored { v: 1, boot, login, epoch, since_ms, rtt_us, fails } = serde_json::from_str(text).ok()? else {
            return None;
        };
        let since = UNIX_EPOCH.checked_add(Duration::from_millis(since_ms))?;
        Some(Self { boot, login, epoch, since, round_trip: rtt_us.map(Duration::from_micros), fails })
    }

    /// Whether it is of a login at this time, as precisely as it is stored.
    pub(super) fn is_since(&self, login: SystemTime) -> bool {
        milliseconds(self.since) == milliseconds(login)
    }

    pub(super) fn to_text(&self) -> String {
        let since_ms = milliseconds(self.since);
        let Self { boot, login, epoch, fails, .. } = self.clone();
        let rtt_us = self.round_trip.map(|trip| u64::try_from(trip.as_micros()).unwrap_or(u64::MAX));
        serde_json::to_string(&Stored { v: 1, boot, login, epoch, since_ms, rtt_us, fails }).unwrap_or_default()
    }
}
