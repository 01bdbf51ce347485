//! The knobs of the gate; their keys are the fields' names under `[gate]`.

use std::path::PathBuf;
use std::time::Duration;

use super::providers::ProviderSettings;
use crate::fields::Fields;
use crate::model::HostName;

/// Settings of the gate, section `[gate]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GateSettings {
    /// The host where visitors log in, the same on every node, and best on another
    /// registrable domain than the sockets'. None by default: then sockets that ask
    /// for logins answer 503.
    pub host: Option<HostName>,
    /// Whether a visitor is asked, once per account and owner of sockets, before
    /// their address is told. True by default: every owner shares one client of the
    /// providers, which would tell any of them any visitor's address unasked.
    pub ask_consent: bool,
    /// How often running WebSockets, uploads and downloads are held against the
    /// rules again, beside every time that a record changes. 30 s.
    pub recheck: Duration,
    /// How long a password that was right is remembered, in memory by a keyed hash.
    /// 5 min: a hash costs some 20 ms, and a page has a hundred requests.
    pub password_memory: Duration,
    /// Passwords that are checked per second: at 20 ms each, a quarter of a core.
    /// 12; twenty times as many may come at once.
    pub passwords_per_second: u32,
    /// The same for one socket (or account). 3.
    pub passwords_per_socket: u32,
    /// The same for one address, per minute. 20.
    pub passwords_per_address: u32,
    /// Logins that one address may begin per minute. 60: an office behind one
    /// address in the morning.
    pub logins_per_address: u32,
    /// The same at one socket. 600.
    pub logins_per_socket: u32,
    /// How login providers are asked.
    pub providers: ProviderSettings,
    /// Whether a node whose feed has no keyring makes one. True by default; false
    /// where a control plane brings it.
    pub make_keyring: bool,
    /// The folder with templates in place of the built-in pages. None by default.
    pub pages: Option<PathBuf>,
}

impl Default for GateSettings {
    fn default() -> Self {
        Self {
            host: None,
            ask_consent: true,
            recheck: Duration::from_secs(30),
            password_memory: Duration::from_secs(300),
            passwords_per_second: 12,
            passwords_per_socket: 3,
            passwords_per_address: 20,
            logins_per_address: 60,
            logins_per_socket: 600,
            providers: ProviderSettings::default(),
            make_keyring: true,
            pages: None,
        }
    }
}

impl GateSettings {
    /// Reads the section; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let read = Self {
            host: f.optional("host"),
            ask_consent: f.take("ask_consent", d.ask_consent),
            recheck: f.take("recheck", d.recheck),
            password_memory: f.take("password_memory", d.password_memory),
            passwords_per_second: f.take("passwords_per_second", d.passwords_per_second),
            passwords_per_socket: f.take("passwords_per_socket", d.passwords_per_socket),
            passwords_per_address: f.take("passwords_per_address", d.passwords_per_address),
            logins_per_address: f.take("logins_per_address", d.logins_per_address),
            logins_per_socket: f.take("logins_per_socket", d.logins_per_socket),
            providers: ProviderSettings::read(f),
            make_keyring: f.take("make_keyring", d.make_keyring),
            pages: f.optional("pages"),
        };
        if read.recheck < Duration::from_secs(1) {
            f.mistake("recheck", format!("{:?} is too often", read.recheck), "write 1s or more".into());
        }
        for (key, rate) in [
            ("passwords_per_second", read.passwords_per_second),
            ("passwords_per_socket", read.passwords_per_socket),
            ("passwords_per_address", read.passwords_per_address),
            ("logins_per_address", read.logins_per_address),
            ("logins_per_socket", read.logins_per_socket),
        ] {
            if rate == 0 {
                f.mistake(key, "0 would let nobody in".into(), "write 1 or more".into());
            }
        }
        read
    }
}
