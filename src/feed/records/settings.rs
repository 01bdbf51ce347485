//! The knobs of records; their keys are `[ingress] ports` and `[node] domain`.

use crate::fields::PortRange;
use crate::model::HostName;

/// The knobs of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordSettings {
    /// Ports that sockets of type tcp and tls get or may ask for. Default
    /// 20000-20999: below the range that Linux gives to outgoing connections.
    pub ports: PortRange,
    /// A socket without names is published as `<id>.<domain>`. Default: none,
    /// so that names are always written out.
    pub domain: Option<HostName>,
    /// Hosts of the node's own, which no socket may have. Default: none.
    pub reserved: Vec<HostName>,
}

impl Default for RecordSettings {
    fn default() -> Self {
        Self { ports: PortRange { first: 20_000, last: 20_999 }, domain: None, reserved: Vec::new() }
    }
}
