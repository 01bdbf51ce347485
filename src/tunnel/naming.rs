//! What an owner asks for with `-R`: pure reading of the forward's address and
//! port (or path) into the socket or tunnel that is meant.

use std::net::IpAddr;

use crate::model::SocketType;

/// What one remote forward asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// `[type/]name:port`: the socket of this name.
    Named {
        /// The name: a DNS label or a whole host name, lower case.
        name: String,
        /// The type that was spelt out.
        explicit: Option<SocketType>,
        /// The type that the port implies where none was spelt out.
        implied: SocketType,
        /// The public port asked for, for types with a port of their own.
        port: Option<u16>,
    },
    /// `0:` a tcp socket with a made-up name.
    AnyPort,
    /// `80:` or `443:` an http socket with a made-up name.
    AnyName,
    /// Another number: the tunnel that (user, relay port) names.
    Relay(u16),
}

/// Why a forward cannot be understood; said to the owner.
pub type Refusal = String;

/// Reads `tcpip-forward` (RFC 4254 §7.1). Addresses that only say where to
/// listen (`localhost`, `*`, '' and IP literals) are never names.
///
/// # Errors
/// The sentence that tells the owner what to write instead.
pub fn of_tcpip(address: &str, port: u32) -> Result<Wanted, Refusal> {
    let port = u16::try_from(port).map_err(|_| format!("{port} is not a port"))?;
    let listen_only = matches!(address, "" | "*" | "localhost") || address.parse::<IpAddr>().is_ok();
    if listen_only {
        return Ok(match port {
            0 => Wanted::AnyPort,
            80 | 443 => Wanted::AnyName,
            relay => Wanted::Relay(relay),
        });
    }
    named(address, port)
}

/// Reads `streamlocal-forward@openssh.com`: OpenSSH turns
/// `-R type/name:host:port` into the socket path `type/name`.
///
/// # Errors
/// The sentence that tells the owner what to write instead.
pub fn of_streamlocal(path: &str) -> Result<Wanted, Refusal> {
    // A forward of a path has no port: without a type it is an http socket.
    named(path.strip_prefix('/').unwrap_or(path), 80)
}

fn named(text: &str, port: u16) -> Result<Wanted, Refusal> {
    let (explicit, name) = match text.split_once('/') {
        Some((kind, name)) => {
            let kind = kind.parse().map_err(|_| {
                format!(
                    "\"{}\" is not a type: write http, https, tcp, tls or passthrough before the /",
                    kind.escape_debug()
                )
            })?;
            (Some(kind), name)
        }
        None => (None, text),
    };
    let name: crate::model::HostName = name.parse().map_err(|_| {
        format!("\"{}\" is not a name: letters, digits and -, like web or web.example.com", name.escape_debug())
    })?;
    let implied = if matches!(port, 80 | 443) { SocketType::Http } else { SocketType::Tcp };
    Ok(Wanted::Named {
        name: name.to_string(),
        explicit,
        implied,
        port: (port != 0 && !matches!(port, 80 | 443)).then_some(port),
    })
}

/// A name like `twilight-sky-740911823004` from 8 bytes: stable for the same bytes.
pub fn made_up_name(seed: [u8; 8]) -> String {
    // 10 bits of words and 40 of digits: no two keys of one node meet by chance.
    made_up_label(seed, 1_000_000_000_000)
}

/// The same with a number below `numbers`.
pub fn made_up_label(seed: [u8; 8], numbers: u64) -> String {
    const FIRST: [&str; 32] = [
        "amber", "autumn", "bold", "brisk", "calm", "clear", "cold", "crimson", "dawn", "deep", "dusty", "early",
        "fair", "gentle", "golden", "green", "hidden", "icy", "late", "lively", "misty", "morning", "noble",
        "polished", "quiet", "rapid", "silent", "silver", "spring", "twilight", "white", "wild",
    ];
    const SECOND: [&str; 32] = [
        "bird", "breeze", "brook", "bush", "cloud", "dew", "dream", "feather", "field", "fire", "flower", "fog",
        "forest", "frost", "glade", "grass", "haze", "hill", "lake", "leaf", "meadow", "moon", "pine", "pond", "rain",
        "river", "sea", "shadow", "sky", "snow", "star", "stone",
    ];
    let n = u64::from_be_bytes(seed);
    let word =
        |words: &[&'static str; 32], shift: u32| words.get((n >> shift) as usize % 32).copied().unwrap_or("adit");
    format!("{}-{}-{}", word(&FIRST, 59), word(&SECOND, 54), n % numbers.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, explicit: Option<SocketType>, implied: SocketType, port: Option<u16>) -> Wanted {
        Wanted::Named { name: name.into(), explicit, implied, port }
    }

    #[test]
    fn a_forward_says_what_it_means() {
        use SocketType::{Http, Tcp, Tls};
        for (address, port, wanted) in [
            ("web", 80, named("web", None, Http, None)),
            ("Web", 443, named("web", None, Http, None)),
            ("db", 5432, named("db", None, Tcp, Some(5432))),
            ("db", 0, named("db", None, Tcp, None)),
            ("tls/mail", 993, named("mail", Some(Tls), Tcp, Some(993))),
            ("web.example.com", 80, named("web.example.com", None, Http, None)),
            ("localhost", 80, Wanted::AnyName),
            ("", 443, Wanted::AnyName),
            ("*", 0, Wanted::AnyPort),
            ("127.0.0.1", 5001, Wanted::Relay(5001)),
            ("::", 5001, Wanted::Relay(5001)),
        ] {
            assert_eq!(of_tcpip(address, port).unwrap(), wanted, "{address}:{port}");
        }
        assert_eq!(of_streamlocal("tcp/db").unwrap(), named("db", Some(Tcp), Http, None));
        assert_eq!(of_streamlocal("/web").unwrap(), named("web", None, Http, None));
    }

    #[test]
    fn what_is_not_a_name_is_refused_with_what_to_write() {
        assert!(of_tcpip("we b", 80).unwrap_err().contains("not a name"));
        assert!(of_tcpip("udp/x", 80).unwrap_err().contains("http, https, tcp"));
        assert!(of_tcpip("web", 70000).unwrap_err().contains("not a port"));
        assert!(of_streamlocal("/tmp/x.sock").unwrap_err().contains("not a type"));
    }

    #[test]
    fn a_made_up_name_is_stable_and_a_dns_label() {
        let name = made_up_name([1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(name, made_up_name([1, 2, 3, 4, 5, 6, 7, 8]));
        assert!(name.parse::<crate::model::HostName>().is_ok() && !name.contains('.') && name.len() <= 63);
    }
}
