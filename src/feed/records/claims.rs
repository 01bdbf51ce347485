//! Claims as keys: `cfg/host/<name>`, `cfg/port/<port>`,
//! `cfg/relay/<user>/<port>`, `cfg/email/<address>`, each with who holds it; and the index
//! `cfg/of/<socket>/<tunnel>` of the tunnels that name a socket, and the index
//! `cfg/own/<owner>/<socket>` of an owner's sockets. Pure.

use aws_lc_rs::digest;
use serde_json::{Map, Value};

use super::error::mistake;
use crate::feed::Entry;
use crate::fields::Mistake;
use crate::model::{Account, AccountId, Socket, SocketId, Tunnel, TunnelId};

/// Where claims of ports are kept.
pub(super) const PORTS: &str = "cfg/port/";

/// A name or a port that one record may have, and the field that asks for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) key: String,
    field: String,
    what: String,
}

impl Claim {
    fn host(i: usize, name: &str) -> Self {
        Self { key: format!("cfg/host/{name}"), field: format!("hostnames[{i}]"), what: format!("\"{name}\"") }
    }

    fn port(i: usize, port: u16) -> Self {
        Self { key: format!("{PORTS}{port}"), field: format!("ports[{i}]"), what: format!("port {port}") }
    }

    fn relay(user: &str, port: u16) -> Self {
        let key = format!("cfg/relay/{}/{port}", escaped(user));
        Self { key, field: "relay_port".into(), what: format!("relay port {port} of user \"{}\"", user.escape_debug()) }
    }

    fn email(email: &str) -> Self {
        let key = format!("cfg/email/{}", escaped(email));
        Self { key, field: "email".into(), what: "this address".into() }
    }

    fn owned(owner: &str, socket: &str) -> Self {
        let key = format!("{}{socket}", owner_prefix(owner));
        Self { key, field: "owner".into(), what: format!("socket \"{socket}\"") }
    }

    fn index(socket: &str, tunnel: &str) -> Self {
        let key = format!("{}{tunnel}", index_prefix(socket));
        Self { key, field: "socket".into(), what: format!("tunnel \"{tunnel}\"") }
    }

    /// The mistake of asking for what `entry` gives to another.
    pub(super) fn taken(&self, entry: &Entry) -> Mistake {
        let value: Value = serde_json::from_str(&entry.value).unwrap_or_default();
        let text = |key: &str| value.get(key).and_then(Value::as_str);
        let by = match (text("sock"), text("tun"), text("acct")) {
            (Some(id), _, _) => format!(" by socket \"{id}\""),
            (None, Some(id), _) => format!(" by tunnel \"{id}\""),
            (None, None, Some(id)) => format!(" by account \"{id}\""),
            (None, None, None) => String::new(),
        };
        mistake(
            self.field.as_str(),
            format!("{} is taken{by}", self.what),
            "choose another, or delete the one that has it",
        )
    }
}

/// The record that a claim is for.
pub(super) enum Holder<'a> {
    Socket(&'a SocketId),
    Tunnel(&'a TunnelId),
    Account(&'a AccountId),
}

impl Holder<'_> {
    fn pair(&self) -> (&'static str, &str) {
        match self {
            Self::Socket(id) => ("sock", id.as_str()),
            Self::Tunnel(id) => ("tun", id.as_str()),
            Self::Account(id) => ("acct", id.as_str()),
        }
    }

    /// The claim's value. Whether it lives under a lease is part of it: a
    /// record that outlives the lease must write it anew.
    pub(super) fn value(&self, leased: bool) -> String {
        let (noun, id) = self.pair();
        let mut value = Map::new();
        value.insert("v".into(), 1.into());
        value.insert(noun.into(), id.into());
        if leased {
            value.insert("leased".into(), true.into());
        }
        Value::Object(value).to_string()
    }

    /// Whether a claim is this one's.
    pub(super) fn has(&self, claim: &Entry) -> bool {
        let (noun, id) = self.pair();
        let value: Value = serde_json::from_str(&claim.value).unwrap_or_default();
        value.get(noun).and_then(Value::as_str) == Some(id)
    }
}

pub(super) fn index_prefix(socket: &str) -> String {
    format!("cfg/of/{socket}/")
}

/// Where the sockets of an owner are listed.
pub(super) fn owner_prefix(owner: &str) -> String {
    format!("cfg/own/{}/", escaped(owner))
}

/// What a socket must have for itself. Names of type tls too: on another port of
/// the same name browsers would send what they keep for it to somebody else.
pub(super) fn of_socket(socket: &Socket) -> Vec<Claim> {
    let mut claims = Vec::new();
    claims.extend(socket.hostnames.iter().enumerate().map(|(i, name)| Claim::host(i, name.as_str())));
    claims.extend(socket.ports.iter().enumerate().map(|(i, port)| Claim::port(i, *port)));
    claims.extend(socket.owner.as_ref().map(|owner| Claim::owned(owner, socket.id.as_str())));
    claims
}

/// The same of a stored record, as far as it can be read: one that this version
/// refuses must still release what it has.
pub(super) fn of_socket_record(id: &SocketId, value: &str) -> Vec<Claim> {
    let record: Value = serde_json::from_str(value).unwrap_or_default();
    let mut claims = Vec::new();
    let names = list(&record, "hostnames").iter().filter_map(Value::as_str);
    claims.extend(names.enumerate().map(|(i, name)| Claim::host(i, name)));
    claims.extend(ports_of_record(value).into_iter().enumerate().map(|(i, port)| Claim::port(i, port)));
    let owner = record.get("owner").and_then(Value::as_str);
    claims.extend(owner.map(|owner| Claim::owned(owner, id.as_str())));
    claims
}

/// The ports of a stored record.
pub(super) fn ports_of_record(value: &str) -> Vec<u16> {
    let record: Value = serde_json::from_str(value).unwrap_or_default();
    list(&record, "ports").iter().filter_map(Value::as_u64).filter_map(|p| u16::try_from(p).ok()).collect()
}

/// What a tunnel must have for itself.
pub(super) fn of_tunnel(tunnel: &Tunnel) -> Vec<Claim> {
    let mut claims = vec![Claim::index(tunnel.socket.as_str(), tunnel.id.as_str())];
    if let (Some(user), Some(port)) = (&tunnel.user, tunnel.relay_port) {
        claims.push(Claim::relay(user, port));
    }
    claims
}

/// The same of a stored record, as far as it can be read.
pub(super) fn of_tunnel_record(id: &TunnelId, value: &str) -> Vec<Claim> {
    let record: Value = serde_json::from_str(value).unwrap_or_default();
    let text = |key: &str| record.get(key).and_then(Value::as_str);
    let mut claims = Vec::new();
    claims.extend(text("socket").map(|socket| Claim::index(socket, id.as_str())));
    let port = record.get("relay_port").and_then(Value::as_u64).and_then(|p| u16::try_from(p).ok());
    claims.extend(text("user").zip(port).map(|(user, port)| Claim::relay(user, port)));
    claims
}

/// What an account must have for itself: which of two logs in by one address would
/// be chance.
pub(super) fn of_account(account: &Account) -> Vec<Claim> {
    vec![Claim::email(account.email.as_str())]
}

/// The same of a stored record, as far as it can be read.
pub(super) fn of_account_record(value: &str) -> Vec<Claim> {
    let record: Value = serde_json::from_str(value).unwrap_or_default();
    record.get("email").and_then(Value::as_str).map(Claim::email).into_iter().collect()
}

fn list<'a>(record: &'a Value, key: &str) -> &'a [Value] {
    record.get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default()
}

/// A user name as one part of a key: what is not plain is percent-encoded.
fn escaped(user: &str) -> String {
    let mut out = String::with_capacity(user.len());
    for byte in user.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'@') {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The same number for the same text on every node and after every update.
pub(super) fn stable_hash(text: &str) -> u64 {
    let hash = digest::digest(&digest::SHA256, text.as_bytes());
    hash.as_ref().iter().take(8).fold(0, |n, byte| n << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::SocketType;
    use serde_json::json;

    #[test]
    fn a_user_name_cannot_reach_into_another_key() {
        assert_eq!(Claim::relay("a/8080", 80).key, "cfg/relay/a%2F8080/80");
        assert_eq!(Claim::relay("me@example.com", 80).key, "cfg/relay/me@example.com/80");
        assert_ne!(escaped("a%2F"), escaped("a/"));
    }

    #[test]
    fn a_stored_record_claims_what_its_parsed_form_claims() {
        let mut socket = Socket::new("s".parse().unwrap(), SocketType::Http);
        socket.hostnames = vec!["a.test".parse().unwrap(), "*.b.test".parse().unwrap()];
        socket.owner = Some("ann/1".into());
        let stored = Value::Object(socket.to_record()).to_string();
        assert_eq!(of_socket_record(&socket.id, &stored), of_socket(&socket));
        let mut tunnel = Tunnel::new("t".parse().unwrap(), "s".parse().unwrap());
        (tunnel.user, tunnel.relay_port) = (Some("ü/x".into()), Some(80));
        let stored = Value::Object(tunnel.to_record()).to_string();
        assert_eq!(of_tunnel_record(&tunnel.id, &stored), of_tunnel(&tunnel));
        let hash = "$argon2id$v=19$m=19456,t=2,p=1$c2FsdHNhbHQ$aGFzaGhhc2hoYXNoaGFzaA";
        let record = json!({"email": "Ann@Example.com", "password_hash": hash}).as_object().cloned().unwrap();
        let account = Account::from_record(&"a".parse().unwrap(), record).unwrap();
        let stored = Value::Object(account.to_record()).to_string();
        assert_eq!(of_account_record(&stored), of_account(&account));
        assert!(
            of_socket_record(&socket.id, "junk").is_empty()
                && of_tunnel_record(&tunnel.id, &json!([]).to_string()).is_empty()
        );
    }
}
