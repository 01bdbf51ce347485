//! What the node needs to know to ask login providers: files, names, deadlines.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::fields::Fields;
use crate::text_field;

/// How login providers are asked: keys of the section `[gate]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderSettings {
    /// PEM file of further CAs that providers are verified against, beside the
    /// system's. None by default.
    pub ca_file: Option<PathBuf>,
    /// The folder of the files that `client_secret_file` of a provider names; a
    /// record reaches no other file. None by default.
    pub secrets: Option<PathBuf>,
    /// Where a provider's host is, instead of what the system's resolver says:
    /// names below `localhost`, which glibc does not know, or a provider that is
    /// reached by another way than visitors reach it. None by default.
    pub resolve: Vec<Resolve>,
    /// A request to a provider, from its name to the last byte of its answer. 5 s:
    /// somebody waits before a blank page; providers answer within one.
    pub timeout: Duration,
    /// Of it, how long finding and connecting to one may take. 2 s: one lost SYN
    /// is sent again after one.
    pub connect_timeout: Duration,
    /// Largest body of an answer, in bytes: no key of its own. 64 KiB: key sets
    /// and metadata of the big providers stay below 10.
    pub body_max: usize,
}

impl Default for ProviderSettings {
    fn default() -> Self {
        Self {
            ca_file: None,
            secrets: None,
            resolve: Vec::new(),
            timeout: Duration::from_secs(5),
            connect_timeout: Duration::from_secs(2),
            body_max: 64 << 10,
        }
    }
}

impl ProviderSettings {
    /// Reads its keys; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let read = Self {
            ca_file: f.optional("ca_file"),
            secrets: f.optional("secrets"),
            resolve: f.take("resolve", d.resolve),
            timeout: f.take("timeout", d.timeout),
            connect_timeout: f.take("connect_timeout", d.connect_timeout),
            body_max: d.body_max,
        };
        for (key, wait) in [("timeout", read.timeout), ("connect_timeout", read.connect_timeout)] {
            if wait.is_zero() {
                f.mistake(key, "0 would end everything at once".into(), "write a longer duration".into());
            }
        }
        for (i, one) in read.resolve.iter().enumerate() {
            if read.resolve.iter().take(i).any(|other| other.host == one.host) {
                f.mistake("resolve", format!("\"{}\" is there twice", one.host), "write one address for it".into());
            }
        }
        read
    }
}

/// One name and where it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolve {
    /// The host of a URL, in lower case.
    pub host: String,
    /// Where to connect to, whatever port the URL has.
    pub at: SocketAddr,
}

impl FromStr for Resolve {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = "is not host=address:port";
        let (host, at) = text.split_once('=').ok_or(bad)?;
        if host.is_empty() || host.contains(':') {
            return Err(bad);
        }
        let host = crate::model::authority_host(host).map_err(|_| bad)?.into_owned();
        Ok(Self { host, at: at.parse().map_err(|_| bad)? })
    }
}
text_field!(Resolve, "a host and where it is, like \"id.localhost=127.0.0.1:8443\"");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_section_reads_as_the_defaults_and_mistakes_are_named() {
        let mut f = Fields::new(serde_json::Map::new());
        assert_eq!(ProviderSettings::read(&mut f), ProviderSettings::default());
        assert!(f.mistakes().is_empty());

        let read = |json: serde_json::Value| {
            let mut f = Fields::new(json.as_object().cloned().unwrap());
            let read = ProviderSettings::read(&mut f);
            (read, f.mistakes().into_iter().map(|m| m.at).collect::<Vec<_>>())
        };
        let (settings, mistakes) = read(serde_json::json!({
            "ca_file": "/etc/ca.pem", "secrets": "/run/secrets", "timeout": "3s", "connect_timeout": "1s",
            "resolve": ["ID.localhost=127.0.0.1:8443", "idp.test=[::1]:443"],
        }));
        assert!(mistakes.is_empty(), "{mistakes:?}");
        assert_eq!(settings.resolve[0].host, "id.localhost");
        assert_eq!(settings.resolve[1].at.port(), 443);

        let (_, mistakes) = read(serde_json::json!({
            "timeout": "0s", "connect_timeout": "0s", "resolve": ["a.test=127.0.0.1:1", "a.test=127.0.0.1:2"],
        }));
        assert_eq!(mistakes, ["timeout", "connect_timeout", "resolve"]);
        for bad in ["", "a.test", "a.test=127.0.0.1", "=127.0.0.1:1", "a.test:1=127.0.0.1:1", "a b=127.0.0.1:1"] {
            let (_, mistakes) = read(serde_json::json!({"resolve": [bad]}));
            assert_eq!(mistakes, ["resolve"], "{bad}");
        }
    }
}
