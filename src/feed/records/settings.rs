//! The knobs of records, and the range of ports.

use std::fmt;
use std::ops::RangeInclusive;
use std::str::FromStr;

use crate::fields::Fields;
use crate::model::HostName;
use crate::text_field;

/// The ports that sockets of type tcp and tls may have: `"20000-20999"`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortRange(pub RangeInclusive<u16>);

impl FromStr for PortRange {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not a range of ports";
        let (low, high) = text.split_once('-').ok_or(bad)?;
        let (low, high): (u16, u16) = (low.trim().parse().map_err(|_| bad)?, high.trim().parse().map_err(|_| bad)?);
        if low == 0 || low > high { Err(bad) } else { Ok(Self(low..=high)) }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.start(), self.0.end())
    }
}
text_field!(PortRange, "a range of ports like \"20000-20999\"");

/// The knobs of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSettings {
    /// Ports that sockets of type tcp and tls get or may ask for. Default
    /// 20000-20999: below the range that Linux gives to outgoing connections.
    pub ports: PortRange,
    /// A socket without names is published as `<id>.<domain>`. Default: none,
    /// so that names are always written out.
    pub domain: Option<HostName>,
}

impl Default for RecordSettings {
    fn default() -> Self {
        Self { ports: PortRange(20_000..=20_999), domain: None }
    }
}

impl RecordSettings {
    /// Reads the section `records` of the settings.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        Self { ports: f.take("ports", d.ports), domain: f.optional("domain") }
    }
}
