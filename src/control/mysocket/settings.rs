//! The knobs of the mysocket adapter; their keys are the fields' names under
//! `[mysocket]`.

use std::time::Duration;

use crate::fields::Fields;
use crate::model::{HostName, ProviderId};

/// Settings of the adapter, section `[mysocket]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MysocketSettings {
    /// Names at which mysocketctl's calls are answered, on the HTTPS port. None by
    /// default: no adapter.
    pub hosts: Vec<HostName>,
    /// Whether `POST /user` makes accounts. False by default: the operator makes them,
    /// by `adit user add`.
    pub sign_up: bool,
    /// Accounts at which sign-up ends. 10,000.
    pub accounts: usize,
    /// Sign-ups of one address per hour. 5.
    pub sign_ups_per_address: u32,
    /// How long a token counts. 300 minutes, as mysocket's did.
    pub session: Duration,
    /// How long refreshed tokens count at most, since the password was given. 30 days.
    pub session_max: Duration,
    /// Passwords for one account, from one address, per minute; six times as many from
    /// all addresses. 10: below, people who mistype wait; above, guesses are worth it.
    pub logins_per_account: u32,
    /// How long a signed SSH key counts: clients fetch one for each connection. 5 min.
    pub certificate_life: Duration,
    /// Sockets of one account. 50.
    pub sockets_per_account: usize,
    /// Tunnels of one socket. 10.
    pub tunnels_per_socket: usize,
    /// Calls of one account per minute. 600: a client that reconnects makes one a second.
    pub calls_per_account: u32,
    /// Whether owners may name `custom_domains`. True by default; whoever asks first has
    /// a name, and nobody checks whose it is.
    pub custom_domains: bool,
    /// Providers at which visitors of sockets with cloud authentication log in. None by
    /// default: such sockets are refused.
    pub providers: Vec<ProviderId>,
    /// What `/latest_version.txt` says: clients tell their users when theirs is another.
    pub latest_version: String,
}

impl Default for MysocketSettings {
    fn default() -> Self {
        Self {
            hosts: Vec::new(),
            sign_up: false,
            accounts: 10_000,
            sign_ups_per_address: 5,
            session: Duration::from_secs(300 * 60),
            session_max: Duration::from_secs(30 * 86_400),
            logins_per_account: 10,
            certificate_life: Duration::from_secs(300),
            sockets_per_account: 50,
            tunnels_per_socket: 10,
            calls_per_account: 600,
            custom_domains: true,
            providers: Vec::new(),
            latest_version: "v1.0".to_owned(),
        }
    }
}

impl MysocketSettings {
    /// Reads the section; mistakes gather in `f`.
    pub fn read(f: &mut Fields) -> Self {
        let d = Self::default();
        let read = Self {
            hosts: f.take("hosts", d.hosts),
            sign_up: f.take("sign_up", d.sign_up),
            accounts: f.take("accounts", d.accounts),
            sign_ups_per_address: f.take("sign_ups_per_address", d.sign_ups_per_address),
            session: f.take("session", d.session),
            session_max: f.take("session_max", d.session_max),
            logins_per_account: f.take("logins_per_account", d.logins_per_account),
            certificate_life: f.take("certificate_life", d.certificate_life),
            sockets_per_account: f.take("sockets_per_account", d.sockets_per_account),
            tunnels_per_socket: f.take("tunnels_per_socket", d.tunnels_per_socket),
            calls_per_account: f.take("calls_per_account", d.calls_per_account),
            custom_domains: f.take("custom_domains", d.custom_domains),
            providers: f.take("providers", d.providers),
            latest_version: f.take("latest_version", d.latest_version),
        };
        for (key, is_zero) in [
            ("sign_ups_per_address", read.sign_ups_per_address == 0),
            ("logins_per_account", read.logins_per_account == 0),
            ("calls_per_account", read.calls_per_account == 0),
            ("sockets_per_account", read.sockets_per_account == 0),
            ("tunnels_per_socket", read.tunnels_per_socket == 0),
        ] {
            if is_zero {
                f.mistake(key, "0 would let nobody do anything".into(), "write 1 or more".into());
            }
        }
        let (least, day) = (Duration::from_secs(1), Duration::from_secs(86_400));
        for (key, life, most) in [
            ("session", read.session, 30 * day),
            ("session_max", read.session_max, 366 * day),
            ("certificate_life", read.certificate_life, day),
        ] {
            if !(least..=most).contains(&life) {
                let fix = format!("write 1s to {}d", most.as_secs() / day.as_secs());
                f.mistake(key, format!("{life:?} is out of range"), fix);
            }
        }
        read
    }
}
