//! `[etcd]`: the feed of a fleet.

use std::path::PathBuf;
use std::time::Duration;

use crate::fields::Fields;

/// How etcd is reached. Without endpoints the feed is this node's own store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdSettings {
    /// `https://host:2379`, of every member.
    pub endpoints: Vec<String>,
    /// What all keys begin with; two fleets in one cluster need two. Default /adit/1/.
    pub prefix: String,
    /// The CA of the members' certificates (PEM file). None: those of the web.
    pub ca: Option<PathBuf>,
    /// This node's certificate (PEM file): its common name is who it is to etcd.
    pub certificate: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
    /// A second certificate, of one who may write all records (PEM file). None: who
    /// asks this node's API for that is told that it may not.
    pub control_certificate: Option<PathBuf>,
    /// Its key.
    pub control_key: Option<PathBuf>,
    /// How long one call may take. Default 5 s: a member that leaves takes the others
    /// 2.3 s.
    pub deadline: Duration,
}

impl EtcdSettings {
    /// Reads the section `etcd` of the settings.
    pub fn read(f: &mut Fields) -> Self {
        let settings = Self {
            endpoints: f.take("endpoints", Vec::new()),
            prefix: f.take("prefix", "/adit/1/".to_owned()),
            ca: f.optional("ca"),
            certificate: f.optional("certificate"),
            key: f.optional("key"),
            control_certificate: f.optional("control_certificate"),
            control_key: f.optional("control_key"),
            deadline: f.take("deadline", Duration::from_secs(5)),
        };
        for endpoint in &settings.endpoints {
            if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
                let fix = "write https://host:2379".to_owned();
                f.mistake("endpoints", format!("\"{}\" is no endpoint", endpoint.escape_debug()), fix);
            }
        }
        for (name, one, other) in [
            ("certificate", &settings.certificate, &settings.key),
            ("control_certificate", &settings.control_certificate, &settings.control_key),
        ] {
            if one.is_some() != other.is_some() {
                f.mistake(name, "comes with its key, or not at all".into(), "write both".into());
            }
        }
        if !settings.prefix.ends_with('/') {
            f.mistake("prefix", "has no / at its end".into(), format!("write \"{}/\"", settings.prefix));
        }
        if settings.deadline.is_zero() {
            f.mistake("deadline", "is 0".into(), "write \"5s\"".into());
        }
        #[cfg(not(feature = "etcd"))]
        if !settings.endpoints.is_empty() {
            let fix = "build it with `cargo build --release --features etcd`".to_owned();
            f.mistake("endpoints", "this adit was built without etcd".into(), fix);
        }
        settings
    }
}
