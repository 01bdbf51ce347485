//! The nouns of adit as plain validated values: sockets, tunnels, certificates,
//! gates and who passes them, their ids and names, and who is visiting. No I/O. A value of these types is
//! valid by construction; records that are not are refused with every mistake.

mod certificate;
mod check;
pub mod client_certificate;
pub mod gate;
pub mod identity;
mod socket;
mod tunnel;

use std::borrow::{Borrow, Cow};
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;

use serde_json::{Map, Value};

pub use self::certificate::{Certificate, TicketKeys, TicketKeysId};
pub use self::check::Check;
pub use self::gate::Gate;
pub use self::identity::{Account, Keyring, KeyringId, Provider, Revocation};
pub use self::socket::{Balance, Socket, SocketType, Upstream, UpstreamTls};
pub use self::tunnel::{AuthorizedKey, Revoked, Tunnel};

use crate::fields::{Field, Fields};
use crate::text_field;

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The text of the id.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl FromStr for $name {
            type Err = &'static str;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let good = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':' | b'@');
                let first = text.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
                if text.len() > 128 || !first || !text.bytes().all(good) {
                    return Err("is not an id: 1 to 128 letters, digits and . _ - : @, a letter or digit first");
                }
                Ok(Self(text.into()))
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        text_field!($name, "an id: letters, digits and . _ - : @");
    };
}

id_type!(
    /// A socket's id. A socket made on demand has id = its name.
    SocketId
);
id_type!(
    /// A tunnel's id.
    TunnelId
);
id_type!(
    /// A node's name in its fleet.
    NodeId
);
id_type!(
    /// A certificate's id.
    CertificateId
);
id_type!(
    /// A login provider's id.
    ProviderId
);
id_type!(
    /// An account's id.
    AccountId
);
id_type!(
    /// The name of a sealing key.
    KeyId
);
id_type!(
    /// A revocation's id.
    RevocationId
);

/// A host name as visitors may send it: lower case, ASCII, no trailing dot, no port.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HostName(Arc<str>);

impl HostName {
    /// The name's text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `*.rest` for `label.rest`: the one wildcard that covers this name
    /// (a wildcard is one label deep, RFC 6125 §6.4.3).
    pub fn wildcard(&self) -> Option<String> {
        self.0.split_once('.').map(|(_, rest)| format!("*.{rest}"))
    }
}

impl FromStr for HostName {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(Self(checked_name(text)?.as_ref().into()))
    }
}

impl Borrow<str> for HostName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Lower-cases and checks one DNS name (RFC 1123 labels, `_` allowed).
/// Allocates only where the name is not in its normal form already.
fn checked_name(text: &str) -> Result<Cow<'_, str>, &'static str> {
    let name = text.strip_suffix('.').unwrap_or(text);
    let label_good = |l: &str| {
        (1..=63).contains(&l.len())
            && !l.starts_with('-')
            && !l.ends_with('-')
            && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if name.len() > 253 || !name.split('.').all(label_good) {
        return Err("is not a host name");
    }
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        return Ok(Cow::Owned(name.to_ascii_lowercase()));
    }
    Ok(Cow::Borrowed(name))
}

/// The authority of a request (`Host`, `:authority`) without its port, checked
/// and lower-cased. IPv6 literals lose their brackets.
///
/// # Errors
/// Anything but `host[:port]`: user information, bad labels, a bad port
/// (RFC 9110 §7.2, §4.2.4).
pub fn authority_host(authority: &str) -> Result<Cow<'_, str>, &'static str> {
    let bad = "is not host[:port]";
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (ip, after) = rest.split_once(']').ok_or(bad)?;
        ip.parse::<std::net::Ipv6Addr>().map_err(|_| bad)?;
        (ip, after.strip_prefix(':').or(after.is_empty().then_some("")).ok_or(bad)?)
    } else {
        authority.split_once(':').unwrap_or((authority, ""))
    };
    if !port.is_empty() && (!port.bytes().all(|b| b.is_ascii_digit()) || port.parse::<u16>().is_err()) {
        return Err(bad);
    }
    if host.contains(':') {
        let upper = host.bytes().any(|b| b.is_ascii_uppercase());
        return Ok(if upper { Cow::Owned(host.to_ascii_lowercase()) } else { Cow::Borrowed(host) });
    }
    checked_name(host).map_err(|_| bad)
}

/// A name that a socket or certificate answers to: exact, or `*.` and a name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct HostPattern(Arc<str>);

impl HostPattern {
    /// The pattern's text, `*.` included.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a name is this one, or one label below `*.name`.
    pub fn covers(&self, name: &HostName) -> bool {
        *self.0 == *name.0 || (self.is_wildcard() && name.wildcard().as_deref() == Some(&*self.0))
    }

    /// Whether this is `*.name`.
    pub fn is_wildcard(&self) -> bool {
        self.0.starts_with("*.")
    }
}

impl FromStr for HostPattern {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.strip_prefix("*.") {
            Some(rest) => Ok(Self(format!("*.{}", checked_name(rest)?).into())),
            None => Ok(Self(checked_name(text)?.as_ref().into())),
        }
    }
}

impl From<HostName> for HostPattern {
    fn from(name: HostName) -> Self {
        Self(name.0)
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
text_field!(HostPattern, "a host name like \"web.example.com\" or \"*.example.com\"");
text_field!(HostName, "a host name like \"web.example.com\"");

/// Reads what every record starts with: its version and its id.
fn head<I: Field + PartialEq + fmt::Display>(f: &mut Fields, id: &I) {
    if let Some(v) = f.optional::<u64>("v")
        && v != 1
    {
        f.mistake("v", format!("version {v} is not known here"), "write 1".into());
    }
    if let Some(own) = f.optional::<I>("id")
        && own != *id
    {
        f.mistake(
            "id",
            format!("\"{own}\" is not the id it is stored under"),
            format!("write \"{id}\" or leave it out"),
        );
    }
}

/// The known fields over the unknown ones that were kept.
fn record(extra: &Map<String, Value>, known: Value) -> Map<String, Value> {
    let mut out = extra.clone();
    if let Value::Object(known) = known {
        out.extend(known);
    }
    out
}

/// Who visits: the far and near address of an accepted connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Visitor {
    /// The visitor's address, as the origin should see it.
    pub addr: SocketAddr,
    /// The address and port of ours that they reached.
    pub local: SocketAddr,
}

impl Visitor {
    /// A visitor; IPv4-mapped IPv6 addresses (dual-stack listeners) become IPv4.
    pub fn new(addr: SocketAddr, local: SocketAddr) -> Self {
        Self { addr: canonical(addr), local: canonical(local) }
    }

    /// The visitor's IP address.
    pub fn ip(&self) -> IpAddr {
        self.addr.ip()
    }
}

fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::fields::Base64;

    #[test]
    fn checks_come_back_as_they_were_and_bad_ones_say_what_is_wrong() {
        let read = |kind: &str, check: Value| {
            let record = object(json!({"type": kind, "check": check}));
            Socket::from_record(&"s".parse().unwrap(), record)
        };
        let check = json!({"path": "/up?deep=1", "every": "1500ms", "fail_after": 3});
        let socket = read("https", check).unwrap();
        let again = Socket::from_record(&socket.id, socket.to_record()).unwrap();
        assert_eq!(again, socket);
        let check = again.check.unwrap();
        assert_eq!((check.path.as_deref(), check.every.as_millis(), check.pass_after), (Some("/up?deep=1"), 1500, 2));
        assert_eq!(read("tcp", json!(null)).unwrap().check, None);
        for (kind, bad, at) in [
            ("tcp", json!({"path": "/"}), "check.path"),
            ("http", json!({"path": "up"}), "check.path"),
            ("http", json!({"path": "/\r\nx: y"}), "check.path"),
            ("http", json!({"every": "10ms", "timeout": "1ms"}), "check.every"),
            ("http", json!({"timeout": "11s"}), "check.timeout"),
            ("http", json!({"fail_after": 0}), "check.fail_after"),
            ("http", json!({"paht": "/"}), "check.paht"),
        ] {
            let mistakes = read(kind, bad.clone()).unwrap_err();
            assert_eq!(mistakes.iter().map(|mistake| mistake.at.as_str()).collect::<Vec<_>>(), [at], "{bad}");
        }
    }

    fn object(value: Value) -> Map<String, Value> {
        value.as_object().cloned().unwrap_or_default()
    }

    #[test]
    fn a_record_comes_back_as_it_was_with_its_unknown_fields() {
        let id: SocketId = "web".parse().unwrap();
        let record = object(json!({"type": "https", "hostnames": ["*.Web.Example.com."], "x-note": {"a": 1},
            "upstream": {"tls": {"verify": false}}}));
        let socket = Socket::from_record(&id, record).unwrap();
        assert_eq!(socket.hostnames[0].as_str(), "*.web.example.com");
        let again = Socket::from_record(&id, socket.to_record()).unwrap();
        assert_eq!(socket, again);
        assert_eq!(again.to_record()["x-note"], json!({"a": 1}));
    }

    #[test]
    fn every_mistake_of_a_record_is_told_at_once() {
        let id: SocketId = "web".parse().unwrap();
        let record = object(json!({"id": "other", "type": "htp", "hostnames": ["a b"], "ports": [70000],
            "upstream": {"tsl": {}}, "gate": {"basci": {}}, "v": 2}));
        let at: Vec<String> = Socket::from_record(&id, record).unwrap_err().into_iter().map(|m| m.at).collect();
        assert_eq!(at, ["v", "id", "type", "hostnames", "ports", "upstream.tsl", "gate.basci"]);
    }

    #[test]
    fn an_authority_gives_one_host_or_none() {
        for (text, host) in [
            ("Web.Example.com:8443", "web.example.com"),
            ("web.example.com.", "web.example.com"),
            ("a_b.example.com", "a_b.example.com"),
            ("[::1]:80", "::1"),
            ("[2001:DB8::A]", "2001:db8::a"),
            ("127.0.0.1", "127.0.0.1"),
        ] {
            assert_eq!(authority_host(text).unwrap(), host);
        }
        for bad in ["", "a@b", "a b", "a:b", "a:1:2", "[::1", "[::1]x", "ä.example", "a..b", "a/b", "a:99999", "[x]"] {
            assert!(authority_host(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ticket_keys_are_checked_and_never_shown() {
        let read = |keys: Value| {
            let Value::Object(record) = json!({ "keys": keys }) else { unreachable!() };
            TicketKeys::from_record(&TicketKeysId, record)
        };
        let key = |byte: u8, len: usize| Base64(vec![byte; len]).to_string();
        let good = read(json!([key(1, 32), key(2, 256)])).unwrap();
        assert_eq!(TicketKeys::from_record(&TicketKeysId, good.to_record()).as_ref(), Ok(&good));
        let shown = format!("{good:?} {:?}", good.keys);
        assert!(!shown.contains(&key(1, 32)[..8]) && shown.contains("32 bytes"), "{shown}");
        let many: Vec<String> = (0..9).map(|byte| key(byte, 32)).collect();
        for (bad, at) in [
            (json!([]), "keys"),
            (json!(many), "keys"),
            (json!(null), "keys"),
            (json!("secret"), "keys"),
            (json!(["secret!"]), "keys"),
            (json!([key(1, 31)]), "keys[0]"),
            (json!([key(1, 32), key(1, 257)]), "keys[1]"),
            (json!([key(1, 32), key(2, 32), key(1, 32)]), "keys[2]"),
        ] {
            let mistakes = read(bad.clone()).unwrap_err();
            assert_eq!(mistakes.iter().map(|m| m.at.as_str()).collect::<Vec<_>>(), [at], "{bad}");
            assert!(!format!("{mistakes:?}").contains("secret"), "{mistakes:?}");
        }
        assert!("other".parse::<TicketKeysId>().is_err());
    }
}
