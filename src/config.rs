//! The settings file: TOML in, `Config` out, with every mistake at once.
//! Composes each module's own settings; what a setting means is up to its module.
//! `config/adit.toml` documents every key, and a test here holds it to the code.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Map, Value};
use tracing_subscriber::filter::{LevelFilter, Targets};

use crate::control::{ControlSettings, MysocketSettings};
use crate::dial::DialSettings;
use crate::drain::DrainSettings;
use crate::feed::settings::EtcdSettings;
use crate::feed::store::StoreSettings;
use crate::fields::{Fields, Mistake};
use crate::fleet::FleetSettings;
use crate::gate::GateSettings;
use crate::http::HttpSettings;
use crate::ingress::IngressSettings;
use crate::ingress::hello::HelloSettings;
use crate::model::HostName;
use crate::relay::RelaySettings;
use crate::tcp::TcpSettings;
use crate::visit_log::access_log::AccessLogSettings;
use crate::{text_field, tls, tunnel};

/// The node's settings, immutable after start.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// `[node]`: who and where this node is.
    pub node: NodeSettings,
    /// `[log]`: what is logged and how.
    pub log: LogSettings,
    /// `[access_log]`: a line for each visit.
    pub access_log: AccessLogSettings,
    /// `[ingress]`: where visitors arrive.
    pub ingress: IngressSettings,
    /// `[hello]`: what may come before a connection says what it speaks.
    pub hello: HelloSettings,
    /// `[tcp]`: every accepted and dialled TCP connection.
    pub tcp: TcpSettings,
    /// `[http]`: requests and answers.
    pub http: HttpSettings,
    /// `[gate]`: what visitors must pass.
    pub gate: GateSettings,
    /// `[relay]`: raw bytes both ways.
    pub relay: RelaySettings,
    /// `[tls]`: certificates and handshakes.
    pub tls: tls::Settings,
    /// `[ssh]`: where tunnel clients arrive.
    pub ssh: tunnel::SshSettings,
    /// `[store]`: the embedded store.
    pub store: StoreSettings,
    /// `[etcd]`: the feed of a fleet.
    pub etcd: EtcdSettings,
    /// `[fleet]`: how its nodes reach each other.
    pub fleet: FleetSettings,
    /// `[dial]`: the way to an origin.
    pub dial: DialSettings,
    /// `[drain]`: the stepwise shutdown.
    pub drain: DrainSettings,
    /// `[control]`: where the operator arrives.
    pub control: ControlSettings,
    /// `[mysocket]`: where owners' mysocketctl arrives.
    pub mysocket: MysocketSettings,
}

impl Config {
    /// Each section and who reads it. Several may read one section:
    /// `section(f, "ssh", |f| (SshSettings::read(f), other::Settings::read(f)))`.
    fn read(f: &mut Fields) -> Self {
        Self {
            node: section(f, "node", NodeSettings::read),
            log: section(f, "log", LogSettings::read),
            access_log: section(f, "access_log", AccessLogSettings::read),
            ingress: section(f, "ingress", IngressSettings::read),
            hello: section(f, "hello", HelloSettings::read),
            tcp: section(f, "tcp", TcpSettings::read),
            http: section(f, "http", HttpSettings::read),
            gate: section(f, "gate", GateSettings::read),
            relay: section(f, "relay", RelaySettings::read),
            tls: section(f, "tls", tls::Settings::read),
            ssh: section(f, "ssh", tunnel::SshSettings::read),
            store: section(f, "store", StoreSettings::read),
            etcd: section(f, "etcd", EtcdSettings::read),
            fleet: section(f, "fleet", FleetSettings::read),
            dial: section(f, "dial", DialSettings::read),
            drain: section(f, "drain", DrainSettings::read),
            control: section(f, "control", ControlSettings::read),
            mysocket: section(f, "mysocket", MysocketSettings::read),
        }
    }

    /// What no section can see alone.
    fn check_together(&self, f: &Fields) {
        let mut seen: Vec<(&str, SocketAddr)> = Vec::new();
        for (key, addr) in self.listeners() {
            if let Some((other, _)) = seen.iter().find(|(_, a)| *a == addr && addr.port() != 0) {
                f.mistake(key, format!("{addr} is {other} already"), "give each listener its own address".into());
            }
            let on_raw = self.ingress.raw.iter().any(|ip| overlap(*ip, addr.ip()));
            if on_raw && self.ingress.ports.contains(addr.port()) {
                f.mistake(
                    "ingress.ports",
                    format!("{} holds port {} of {key}", self.ingress.ports, addr.port()),
                    "choose a range without the node's own ports".into(),
                );
            }
            seen.push((key, addr));
        }
        if !self.fleet.listen.is_empty() && self.etcd.endpoints.is_empty() {
            f.mistake("fleet.listen", "there is no fleet".into(), "write etcd.endpoints, or leave it out".into());
        }
        let mysocket = &self.mysocket;
        if !mysocket.hosts.is_empty() && self.node.domain.is_none() {
            f.mistake("mysocket.hosts", "there is no domain for sockets' names".into(), "write node.domain".into());
        }
        if self.gate.host.as_ref().is_some_and(|auth| mysocket.hosts.contains(auth)) {
            f.mistake("mysocket.hosts", "has gate.host in it".into(), "give each its own name".into());
        }
        if !mysocket.providers.is_empty() && self.gate.host.is_none() {
            f.mistake("mysocket.providers", "need a host to log in at".into(), "write gate.host".into());
        }
        if self.tls.make_certificate && self.node.domain.is_none() {
            f.mistake("tls.make_certificate", "has no name to make one for".into(), "write node.domain".into());
        }
    }

    /// Hosts that are the node's own, and no socket's.
    pub fn own_hosts(&self) -> Vec<HostName> {
        self.gate.host.iter().chain(&self.mysocket.hosts).cloned().collect()
    }

    /// Every fixed listener with the key that names it.
    pub fn listeners(&self) -> impl Iterator<Item = (&'static str, SocketAddr)> {
        [
            ("ingress.http", &self.ingress.http),
            ("ingress.https", &self.ingress.https),
            ("ssh.listen", &self.ssh.listen),
            ("control.listen", &self.control.listen),
            ("fleet.listen", &self.fleet.listen),
        ]
        .into_iter()
        .flat_map(|(key, addrs)| addrs.iter().map(move |addr| (key, *addr)))
    }

    /// How the outside reaches this node: what printed URLs and redirects name.
    pub fn public(&self) -> Public {
        let port = |given: Option<u16>, listen: &[SocketAddr], usual: u16| {
            given.or_else(|| listen.first().map(SocketAddr::port)).unwrap_or(usual)
        };
        let host = self.node.public_host.as_ref().or(self.node.domain.as_ref());
        Public {
            host: host.map_or_else(|| self.node.name(), ToString::to_string),
            http_port: port(self.node.public_http_port, &self.ingress.http, 80),
            https_port: port(self.node.public_https_port, &self.ingress.https, 443),
            ssh_port: port(self.node.public_ssh_port, &self.ssh.listen, 22),
        }
    }

    /// The node of a bare `adit`: `config/dev.toml`, built in.
    ///
    /// # Errors
    /// None that a test has not seen.
    pub fn dev() -> Result<Self, Vec<Mistake>> {
        Self::from_toml(include_str!("../config/dev.toml"))
    }

    /// Reads the settings file at `path`.
    ///
    /// # Errors
    /// Every mistake of the file; that it cannot be read is one.
    pub fn load(path: &Path) -> Result<Self, Vec<Mistake>> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let fix = "name a readable file by --config".to_owned();
            vec![Mistake { at: path.display().to_string(), problem: format!("cannot be read: {error}"), fix }]
        })?;
        Self::from_toml(&text)
    }

    /// Reads settings from TOML.
    ///
    /// # Errors
    /// Every mistake at once; only of a syntax error just the first.
    pub fn from_toml(text: &str) -> Result<Self, Vec<Mistake>> {
        Self::from_fields(Fields::new(table(text).map_err(|m| vec![m])?))
    }

    fn from_fields(mut f: Fields) -> Result<Self, Vec<Mistake>> {
        let config = Self::read(&mut f);
        if f.mistakes().is_empty() {
            config.check_together(&f);
        }
        f.refuse_rest();
        let mistakes = f.mistakes();
        if mistakes.is_empty() { Ok(config) } else { Err(mistakes) }
    }
}

/// Production defaults: what an empty settings file means.
impl Default for Config {
    fn default() -> Self {
        Self::read(&mut Fields::new(Map::new()))
    }
}

/// `[node]`.
#[derive(Debug, Clone, PartialEq)]
pub struct NodeSettings {
    /// The folder for all that is kept between runs.
    pub state: PathBuf,
    /// Threads that serve visitors, each whole sessions with theirs; 0 = one per core.
    pub workers: usize,
    /// This node's name, if it is not the host's.
    pub name: Option<HostName>,
    /// The domain under which names are made on demand.
    pub domain: Option<HostName>,
    /// The host that URLs of own ports name.
    pub public_host: Option<HostName>,
    /// The port that URLs and redirects name for HTTP.
    pub public_http_port: Option<u16>,
    /// The port that URLs and redirects name for HTTPS.
    pub public_https_port: Option<u16>,
    /// The port that printed ssh lines name.
    pub public_ssh_port: Option<u16>,
    /// Limits per address do not apply to loopback.
    pub exempt_loopback: bool,
}

impl NodeSettings {
    fn read(f: &mut Fields) -> Self {
        Self {
            state: f.take("state", "/var/lib/adit".into()),
            workers: f.take("workers", 0),
            name: f.optional("name"),
            domain: f.optional("domain"),
            public_host: f.optional("public_host"),
            public_http_port: f.optional("public_http_port"),
            public_https_port: f.optional("public_https_port"),
            public_ssh_port: f.optional("public_ssh_port"),
            exempt_loopback: f.take("exempt_loopback", false),
        }
    }

    /// The node's name: as set, else the host's.
    pub fn name(&self) -> String {
        let host = || std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
        let known = self.name.as_ref().map(ToString::to_string);
        known.or_else(|| host().map(|h| h.trim().to_owned())).filter(|n| !n.is_empty()).unwrap_or("adit".into())
    }
}

/// How the outside reaches a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Public {
    /// The host that URLs of own ports name.
    pub host: String,
    /// The port for HTTP.
    pub http_port: u16,
    /// The port for HTTPS.
    pub https_port: u16,
    /// The port for SSH.
    pub ssh_port: u16,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LogSettings {
    /// Which events are logged.
    pub level: LogFilter,
    /// How a line looks.
    pub format: LogFormat,
}

impl LogSettings {
    fn read(f: &mut Fields) -> Self {
        let level = LogFilter(Targets::new().with_default(LevelFilter::INFO));
        Self { level: f.take("level", level), format: f.take("format", LogFormat::Text) }
    }
}

/// A level and exceptions by module: `info,adit::visit=debug`.
#[derive(Debug, Clone, PartialEq)]
pub struct LogFilter(pub Targets);

impl FromStr for LogFilter {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        // `Targets` takes a lone word that is no level for a module at level
        // trace: a misspelt level would flood the log.
        for part in text.split(',') {
            let level = part.split_once('=').map_or(part, |(_, level)| level).trim();
            if level.parse::<LevelFilter>().is_err() || level.parse::<u8>().is_ok() {
                return Err(format!("names no level in \"{}\"", part.escape_debug()));
            }
        }
        text.parse().map(Self).map_err(|e| format!("is not a log level: {e}"))
    }
}
text_field!(LogFilter, "a level like \"info\" or \"info,adit::visit=debug\" (error, warn, info, debug, trace, off)");

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One object per line.
    Json,
}

impl FromStr for LogFormat {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("is not a log format"),
        }
    }
}
text_field!(LogFormat, "\"text\" or \"json\"");

/// Whether a listener on one of these takes (some of) the other's connections.
fn overlap(a: IpAddr, b: IpAddr) -> bool {
    let everything = IpAddr::from([0u16; 8]);
    let same_family = a.is_ipv4() == b.is_ipv4();
    a == b || a == everything || b == everything || (same_family && (a.is_unspecified() || b.is_unspecified()))
}

/// Reads one section with `read`; what nobody took is a mistake.
fn section<T>(f: &mut Fields, key: &str, read: impl FnOnce(&mut Fields) -> T) -> T {
    let mut fields = f.section(key);
    let settings = read(&mut fields);
    fields.refuse_rest();
    settings
}

/// TOML as the tree that `Fields` reads.
fn table(text: &str) -> Result<Map<String, Value>, Mistake> {
    let table: toml::Table = toml::from_str(text).map_err(|error| {
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        Mistake {
            at: format!("line {}", before.matches('\n').count() + 1),
            problem: error.message().replace('\n', ", "),
            fix: "write valid TOML".into(),
        }
    })?;
    Ok(table.into_iter().map(|(key, value)| (key, json(value))).collect())
}

fn json(value: toml::Value) -> Value {
    match value {
        toml::Value::String(text) => Value::String(text),
        toml::Value::Integer(n) => n.into(),
        toml::Value::Float(n) => n.into(),
        toml::Value::Boolean(b) => b.into(),
        toml::Value::Datetime(when) => Value::String(when.to_string()),
        toml::Value::Array(list) => list.into_iter().map(json).collect(),
        toml::Value::Table(table) => Value::Object(table.into_iter().map(|(k, v)| (k, json(v))).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DOCUMENTED: &str = include_str!("../config/adit.toml");

    /// The value at a dotted path, as it stands in the file.
    fn at<'a>(root: &'a Map<String, Value>, path: &str) -> Option<&'a Value> {
        let mut parts = path.split('.');
        let first = root.get(parts.next()?)?;
        parts.try_fold(first, |value, part| value.get(part))
    }

    /// A tree with nothing but `value` at `path`.
    fn only(path: &str, value: Value) -> Map<String, Value> {
        let tree = path.rsplit('.').fold(value, |inner, key| Value::Object(Map::from_iter([(key.to_owned(), inner)])));
        tree.as_object().unwrap().clone()
    }

    /// The keys in comments, `# key = …`, each under its section.
    fn commented(text: &str) -> Vec<String> {
        let mut section = "";
        let mut keys = Vec::new();
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('[') {
                section = name.trim_end_matches(']');
            } else if let Some((key, _)) = line.strip_prefix("# ").and_then(|l| l.split_once(" = ")) {
                keys.push(format!("{section}.{key}"));
            }
        }
        keys
    }

    #[test]
    fn the_documented_file_has_every_key_with_its_default() {
        let root = table(DOCUMENTED).unwrap();
        let mut f = Fields::remembering(Map::new());
        let defaults = Config::read(&mut f);
        let mut wrong = Vec::new();
        let commented = commented(DOCUMENTED);
        for known in f.known() {
            let here = at(&root, &known.at);
            match (&known.default, here) {
                (Some(default), None) => wrong.push(format!("{} is missing; its default is {default}", known.at)),
                (Some(default), Some(value)) => {
                    let read = Config::read(&mut Fields::new(only(&known.at, value.clone())));
                    if read != defaults {
                        wrong.push(format!("{} = {value}, but its default is {default}", known.at));
                    }
                }
                (None, Some(value)) => wrong.push(format!("{} = {value}, but it has no default", known.at)),
                (None, None) if !commented.contains(&known.at) => {
                    wrong.push(format!("{} has no default and is missing as a comment `# key = …`", known.at));
                }
                (None, None) => {}
            }
        }
        assert!(wrong.is_empty(), "config/adit.toml:\n  {}", wrong.join("\n  "));
        assert_eq!(Config::from_toml(DOCUMENTED), Ok(defaults));
    }

    #[test]
    fn the_built_in_dev_node_is_loopback_only() {
        let dev = Config::dev().unwrap();
        assert!(dev.listeners().all(|(_, addr)| addr.ip().is_loopback()));
        assert!(dev.ingress.raw.iter().all(IpAddr::is_loopback));
        assert!(dev.node.domain.is_some() && dev.tls.make_certificate);
    }

    #[test]
    fn every_mistake_is_told_at_once_with_key_and_fix() {
        let text = r#"
            [nod]
            x = 1
            [node]
            wrokers = 4
            domain = "a b"
            [log]
            level = "inof"
            format = "xml"
            [ingress]
            http = ["80"]
            ports = "30-20"
            [tls]
            handshake_deadline = 10
        "#;
        let mistakes = Config::from_toml(text).unwrap_err();
        let mut at: Vec<&str> = mistakes.iter().map(|m| m.at.as_str()).collect();
        at.sort_unstable();
        let expected =
            "ingress.http ingress.ports log.format log.level nod node.domain node.wrokers tls.handshake_deadline";
        assert_eq!(at.join(" "), expected);
        let fix = |key: &str| mistakes.iter().find(|m| m.at == key).unwrap().fix.clone();
        assert_eq!(fix("nod"), "did you mean \"node\"?");
        assert_eq!(fix("node.wrokers"), "did you mean \"workers\"?");
        assert!(mistakes.iter().all(|m| !m.problem.is_empty() && !m.fix.is_empty()));
    }

    #[test]
    fn a_syntax_error_names_its_line() {
        let mistakes = Config::from_toml("[node]\nworkers = 1\nstate = oops\n").unwrap_err();
        assert_eq!(mistakes[0].at, "line 3");
    }

    #[test]
    fn listeners_that_collide_are_told() {
        let text =
            "[ingress]\nhttp = [\"127.0.0.1:80\"]\nhttps = [\"127.0.0.1:80\"]\n[ssh]\nlisten = [\"127.0.0.1:20001\"]";
        let at: Vec<String> = Config::from_toml(text).unwrap_err().into_iter().map(|m| m.at).collect();
        assert_eq!(at, ["ingress.https", "ingress.ports"]);
    }

    #[test]
    fn the_outside_is_named_by_listeners_where_nothing_else_is_said() {
        let dev = Config::dev().unwrap().public();
        assert_eq!(
            (dev.host.as_str(), dev.http_port, dev.https_port, dev.ssh_port),
            ("edge.localhost", 8080, 8443, 2222)
        );
        let text = "[node]\npublic_https_port = 443\npublic_host = \"a.test\"\n[ingress]\nhttps = [\"[::]:8443\"]";
        let set = Config::from_toml(text).unwrap().public();
        assert_eq!((set.host.as_str(), set.https_port), ("a.test", 443));
    }

    #[test]
    fn a_zero_that_nothing_could_work_with_is_a_mistake() {
        for line in ["keepalive = \"0s\"", "rekey_after = \"0s\"", "sessions = 0"] {
            let mistakes = Config::from_toml(&format!("[ssh]\n{line}\n")).expect_err(line);
            assert!(line.starts_with(mistakes[0].at.trim_start_matches("ssh.")), "{line}: {mistakes:?}");
        }
    }
}
