//! As much of a URL as tests need: parts, a relative one resolved, forms.

use std::fmt;

/// An absolute http or https URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    pub scheme: String,
    /// Lower case; an IPv6 address in its brackets.
    pub host: String,
    pub port: u16,
    /// Path and query, from the first slash on; no fragment.
    pub path_query: String,
}

impl Url {
    /// Panics where it is none.
    pub fn parse(text: &str) -> Self {
        let (scheme, rest) = text.split_once("://").unwrap_or_else(|| panic!("no absolute URL: {text:?}"));
        let rest = rest.split('#').next().unwrap();
        let (authority, path_query) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let usual = match scheme {
            "http" | "ws" => 80,
            "https" | "wss" => 443,
            other => panic!("scheme {other:?} in {text:?}"),
        };
        let port = authority.rsplit_once(':').filter(|(_, port)| !port.ends_with(']'));
        let (host, port) = port.map_or((authority, usual), |(host, port)| (host, port.parse().unwrap()));
        let slash = if path_query.starts_with('/') { "" } else { "/" };
        let host = host.to_ascii_lowercase();
        Self { scheme: scheme.to_owned(), host, port, path_query: format!("{slash}{path_query}") }
    }

    /// What `reference` means on a page of this URL.
    pub fn join(&self, reference: &str) -> Self {
        let reference = reference.split('#').next().unwrap();
        let lower = reference.to_ascii_lowercase();
        if lower.starts_with("http://") || lower.starts_with("https://") {
            return Self::parse(reference);
        }
        if reference.starts_with("//") {
            return Self::parse(&format!("{}:{reference}", self.scheme));
        }
        let path_query = match reference.chars().next() {
            None => self.path_query.clone(),
            Some('/') => reference.to_owned(),
            Some('?') => format!("{}{reference}", self.path()),
            Some(_) => format!("{}{reference}", &self.path()[..=self.path().rfind('/').unwrap()]),
        };
        Self { path_query, ..self.clone() }
    }

    /// Scheme, host and port as browsers write them: the usual port is not told.
    pub fn origin(&self) -> String {
        format!("{}://{}", self.scheme, self.authority())
    }

    /// What the Host header says.
    pub fn authority(&self) -> String {
        match (self.scheme.as_str(), self.port) {
            ("http" | "ws", 80) | ("https" | "wss", 443) => self.host.clone(),
            (_, port) => format!("{}:{port}", self.host),
        }
    }

    pub fn is_secure(&self) -> bool {
        matches!(self.scheme.as_str(), "https" | "wss")
    }

    /// The path alone.
    pub fn path(&self) -> &str {
        self.path_query.split('?').next().unwrap()
    }

    /// All fields of the query.
    pub fn fields(&self) -> Vec<(String, String)> {
        fields(self.path_query.split_once('?').map_or("", |(_, query)| query))
    }

    /// The first field of this name.
    pub fn field(&self, name: &str) -> Option<String> {
        self.fields().into_iter().find(|(n, _)| n == name).map(|(_, value)| value)
    }
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.origin(), self.path_query)
    }
}

/// Fields of a query or of a form.
pub fn fields(text: &str) -> Vec<(String, String)> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))).map(|(n, v)| (decode(n), decode(v))).collect()
}

/// A query or form of these fields.
pub fn form<N: AsRef<str>, V: AsRef<str>>(fields: &[(N, V)]) -> String {
    let pairs = fields.iter().map(|(n, v)| format!("{}={}", encode(n.as_ref()), encode(v.as_ref())));
    pairs.collect::<Vec<_>>().join("&")
}

/// One value of a query.
pub fn encode(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(char::from(byte)),
            _ => out += &format!("%{byte:02X}"),
        }
    }
    out
}

/// The reverse; a plus is a space.
pub fn decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        let hex = (bytes[at] == b'%').then(|| text.get(at + 1..at + 3)).flatten();
        match hex.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                out.push(byte);
                at += 3;
            }
            None => {
                out.push(if bytes[at] == b'+' { b' ' } else { bytes[at] });
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}
