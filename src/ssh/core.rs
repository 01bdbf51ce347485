//! One session as a state machine: packets and `now` in; bytes and deadlines
//! out. Here is the transport (RFC 4253): versions, key exchanges, keepalives;
//! `auth` and `connection` hold what comes above.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::auth::Login;
use super::cipher::{Opener, Sealer};
use super::connection::Channels;
use super::kex::{self, Exchange, From, Said};
use super::negotiate::{Chosen, Listed, Offer};
use super::wire::{Put, Reader};
use super::{Config, Fatal, Owner, msg};

/// The longest version line (RFC 4253 §4.2).
const VERSION_BYTES: usize = 255;

/// A client that has said nothing by then gets our KEXINIT first.
const KEXINIT_PATIENCE: Duration = Duration::from_millis(200);

/// What a client may send before it has logged in: a login with a certificate
/// and a dozen keys takes some 20 KiB in 60 packets.
const PREAUTH_PACKETS: u64 = 400;
const PREAUTH_BYTES: u64 = 512 << 10;

/// What may wait for a key exchange to end, besides channels' bytes.
const HELD_BYTES: usize = 1 << 20;

/// How long a new key exchange may make no progress while nothing is heard.
const REKEY_DEADLINE: Duration = Duration::from_secs(60);

/// Key exchanges in a row that the peer may begin with neither so many bytes nor so
/// much time since the last: each costs us 0.3 ms of CPU.
const EARLY_REKEYS: u32 = 20;
const EARLY: (u64, Duration) = (1 << 20, Duration::from_secs(1));

/// Packets under one key: chacha20's nonce has 32 bits (RFC 4344 §3.1 asks for
/// new keys after 2^31).
const REKEY_PACKETS: u64 = 1 << 31;

enum KexState {
    /// None under way.
    Idle,
    /// Our KEXINIT is out.
    Asked { ours: Vec<u8>, offer: Offer },
    /// Both are; the client's public value comes next.
    Agreed { ours: Vec<u8>, theirs: Vec<u8>, chosen: Chosen },
    /// Our NEWKEYS is out; the client's comes next.
    NewKeys { chosen: Chosen, exchange: Exchange },
}

/// What a packet asks the caller to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Handled {
    Done,
    /// The opener takes new keys now (`Core::change`).
    NewKeys,
}

/// One session.
pub(super) struct Core {
    pub(super) config: Arc<Config>,
    pub(super) now: Instant,
    client_version: Vec<u8>,
    pub(super) out: Vec<u8>,
    sealer: Sealer,
    kex: KexState,
    listed: Listed,
    pub(super) session_id: Vec<u8>,
    rekeyed_at: Instant,
    early_rekeys: u32,
    /// Bytes that have come under the peer's keys.
    pub(super) received: u64,
    kex_since: Instant,
    held: Vec<Vec<u8>>,
    held_bytes: usize,
    kexinit_at: Option<Instant>,
    login_by: Option<Instant>,
    pub(super) login: Login,
    pub(super) channels: Channels,
    last_heard: Instant,
    ping: Ping,
    preauth: (u64, u64),
    /// Why the session ends; what is in `out` may still be sent.
    pub(super) ended: Option<Ended>,
}

/// How a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The peer said so, or closed the connection.
    Peer,
    /// We did.
    Us,
    /// Something was wrong.
    Fault(Fatal),
}

/// Keepalives, which are the meter of the round trip too.
struct Ping {
    next: Instant,
    asked: Option<Instant>,
    /// An open is slow: the answer is urgent.
    urgent: bool,
    rtt: Option<Duration>,
}

impl Core {
    /// A new connection: our version line is the first output.
    pub(super) fn new(config: Arc<Config>, now: Instant) -> Self {
        let mut out = Vec::with_capacity(1024);
        out.put_bytes(config.version.as_bytes());
        out.put_bytes(b"\r\n");
        Self {
            now,
            client_version: Vec::new(),
            out,
            sealer: Sealer::plain(),
            kex: KexState::Idle,
            listed: Listed::default(),
            session_id: Vec::new(),
            rekeyed_at: now,
            early_rekeys: 0,
            received: 0,
            kex_since: now,
            held: Vec::new(),
            held_bytes: 0,
            kexinit_at: Some(now + KEXINIT_PATIENCE),
            login_by: Some(now + config.login_deadline),
            login: Login::default(),
            channels: Channels::new(Arc::clone(&config)),
            last_heard: now,
            ping: Ping { next: now, asked: None, urgent: false, rtt: None },
            preauth: (0, 0),
            ended: None,
            config,
        }
    }

    /// A session after its login, without encryption: for tests and fuzzing of what
    /// comes after.
    pub(super) fn in_the_clear(config: Arc<Config>, now: Instant) -> Self {
        let mut core = Self::new(config, now);
        core.out.clear();
        core.client_version = b"SSH-2.0-test".to_vec();
        core.session_id = vec![7; 32];
        core.login = Login::complete();
        core.opened();
        core.kexinit_at = None;
        core
    }

    /// Whether the client's version line is still to come.
    pub(super) fn awaits_version(&self) -> bool {
        self.client_version.is_empty()
    }

    /// Reads the client's version line from the front of `bytes`: how many bytes
    /// it took, or `None` where it is not all there.
    pub(super) fn version(&mut self, bytes: &[u8]) -> Result<Option<usize>, Fatal> {
        let head = bytes.get(..VERSION_BYTES).unwrap_or(bytes);
        let Some(end) = head.iter().position(|b| *b == b'\n') else {
            let possible = head.len() < VERSION_BYTES && head.iter().zip(b"SSH-").all(|(a, b)| a == b);
            return if possible { Ok(None) } else { Err(Fatal::VERSION) };
        };
        let line = head.get(..end).unwrap_or_default();
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let speaks = line.starts_with(b"SSH-2.0-") || line.starts_with(b"SSH-1.99-");
        if !speaks || line.iter().any(|b| !(b' '..=b'~').contains(b)) {
            return Err(Fatal::VERSION);
        }
        self.client_version = line.to_vec();
        // Measured: Go's client closes the channel on our EOF, answer or not.
        self.channels.hold_eof =
            [&b"SSH-2.0-Go"[..], b"SSH-2.0-Mysocketctl", b"SSH-2.0-mysocketctl"].iter().any(|p| line.starts_with(p));
        Ok(Some(end + 1))
    }

    /// What the client calls itself; printable ASCII.
    pub(super) fn client_version(&self) -> &str {
        std::str::from_utf8(&self.client_version).unwrap_or_default()
    }

    /// Bytes have come from the peer.
    pub(super) fn heard(&mut self, now: Instant) {
        (self.now, self.last_heard) = (now, now);
    }

    /// Whether input must wait: a failed login is answered late, and who does not
    /// read what we say is not listened to either.
    pub(super) fn paused(&self) -> bool {
        self.login.delayed.is_some() || self.out.len() > HELD_BYTES
    }

    /// Handles one packet that is no channel's data.
    pub(super) fn packet(&mut self, payload: &[u8], seq: u32, owner: &mut dyn Owner) -> Result<Handled, Fatal> {
        let mut read = Reader::new(payload);
        let number = read.u8()?;
        if !self.login.is_done() {
            let (packets, bytes) = &mut self.preauth;
            (*packets, *bytes) = (*packets + 1, *bytes + payload.len() as u64);
            if *packets > PREAUTH_PACKETS || *bytes > PREAUTH_BYTES {
                return Err(Fatal::FLOOD);
            }
        }
        let first = self.session_id.is_empty();
        // After its KEXINIT the client sends the exchange and nothing else, and in
        // the first one (strict, against prefix truncation) not even noise.
        let exchanging = self.exchanging_in();
        let noise = matches!(number, msg::IGNORE | msg::DEBUG | msg::UNIMPLEMENTED);
        let initial = first || (exchanging && !self.login.started());
        if (exchanging || first) && (number >= msg::USERAUTH_REQUEST || (initial && noise && self.listed.strict)) {
            return Err(Fatal::PROTOCOL);
        }
        match number {
            msg::KEXINIT => self.kexinit(payload, seq)?,
            msg::KEX_ECDH_INIT => self.exchange(read.string()?)?,
            msg::NEWKEYS if matches!(self.kex, KexState::NewKeys { .. }) => return Ok(Handled::NewKeys),
            msg::NEWKEYS => return Err(Fatal::PROTOCOL),
            msg::DISCONNECT => self.ended = Some(Ended::Peer),
            msg::IGNORE | msg::DEBUG | msg::UNIMPLEMENTED => {}
            _ if first => return Err(Fatal::PROTOCOL),
            msg::EXT_INFO => {}
            msg::SERVICE_REQUEST => self.service(read)?,
            msg::USERAUTH_REQUEST | msg::USERAUTH_INFO_RESPONSE => self.userauth(number, read, owner)?,
            msg::PING => {
                let echo = read.string()?.to_vec();
                self.send(|out| {
                    out.put_u8(msg::PONG);
                    out.put_string(&echo);
                });
            }
            _ if self.login.is_done() && (msg::GLOBAL_REQUEST..=msg::CHANNEL_FAILURE).contains(&number) => {
                self.connection(number, read, owner)?;
            }
            msg::GLOBAL_REQUEST..=msg::CHANNEL_FAILURE => return Err(Fatal::PROTOCOL),
            _ => self.send(|out| {
                out.put_u8(msg::UNIMPLEMENTED);
                out.put_u32(seq);
            }),
        }
        Ok(Handled::Done)
    }

    fn offer(&self, client: Option<&Listed>) -> Offer {
        let mut names: Vec<_> = Vec::new();
        for key in &self.config.host_keys {
            if !names.contains(&key.algorithm()) {
                names.push(key.algorithm());
            }
        }
        Offer::to(client, self.config.nist, names)
    }

    /// Sends our KEXINIT.
    fn ask(&mut self, client: Option<&Listed>) -> Result<(Vec<u8>, Offer), Fatal> {
        let offer = self.offer(client);
        let mut cookie = [0; 16];
        aws_lc_rs::rand::fill(&mut cookie).map_err(|_| Fatal::CRYPTO)?;
        let ours = offer.write(cookie, self.session_id.is_empty());
        self.seal(|out| out.put_bytes(&ours));
        (self.kexinit_at, self.kex_since) = (None, self.now);
        Ok((ours, offer))
    }

    fn kexinit(&mut self, payload: &[u8], seq: u32) -> Result<(), Fatal> {
        // Who has not logged in gets one exchange: it is the dearest thing to ask for.
        if !self.session_id.is_empty() && !self.login.is_done() {
            return Err(Fatal::PROTOCOL);
        }
        let listed = Listed::read(payload)?;
        let (ours, offer) = match std::mem::replace(&mut self.kex, KexState::Idle) {
            KexState::Idle => {
                self.bound_rekeys()?;
                self.ask(Some(&listed))?
            }
            KexState::Asked { ours, offer } => (ours, offer),
            _ => return Err(Fatal::PROTOCOL),
        };
        let chosen = offer.choose(&listed)?;
        if self.session_id.is_empty() {
            if listed.strict && seq != 0 {
                return Err(Fatal::PROTOCOL);
            }
            self.listed = listed;
        }
        self.kex = KexState::Agreed { ours, theirs: payload.to_vec(), chosen };
        Ok(())
    }

    /// Ends a session whose peer asks for new keys again and again.
    fn bound_rekeys(&mut self) -> Result<(), Fatal> {
        let (bytes, time) = EARLY;
        let early =
            self.sealer.bytes.max(self.received) < bytes && self.now.saturating_duration_since(self.rekeyed_at) < time;
        self.early_rekeys = if early { self.early_rekeys + 1 } else { 0 };
        if self.early_rekeys > EARLY_REKEYS { Err(Fatal::REKEYS) } else { Ok(()) }
    }

    fn exchange(&mut self, public: &[u8]) -> Result<(), Fatal> {
        let KexState::Agreed { ours, theirs, mut chosen } = std::mem::replace(&mut self.kex, KexState::Idle) else {
            return Err(Fatal::PROTOCOL);
        };
        if std::mem::take(&mut chosen.skip_guess) {
            self.kex = KexState::Agreed { ours, theirs, chosen };
            return Ok(());
        }
        let said = Said {
            client_version: &self.client_version,
            server_version: self.config.version.as_bytes(),
            client_kexinit: &theirs,
            server_kexinit: &ours,
        };
        let host_key = self.config.host_keys.iter().find(|k| k.algorithm() == chosen.host_key).ok_or(Fatal::CRYPTO)?;
        let kex::Answer { reply, exchange } = kex::answer(chosen.kex, public, &said, host_key)?;
        let first = self.session_id.is_empty();
        if first {
            self.session_id = exchange.hash.clone();
        }
        self.seal(|out| {
            out.put_u8(msg::KEX_ECDH_REPLY);
            out.put_bytes(&reply);
        });
        self.seal(|out| out.put_u8(msg::NEWKEYS));
        let ([_, cipher], [_, mac]) = (chosen.cipher, chosen.mac);
        let strict = self.listed.strict;
        exchange.keys(From::Server, &self.session_id, cipher, mac, |keys| self.sealer.change(keys, strict))?;
        if first && self.listed.ext_info {
            self.send_ext_info();
        }
        self.kex = KexState::NewKeys { chosen, exchange };
        self.held_bytes = 0;
        for message in std::mem::take(&mut self.held) {
            self.seal(|out| out.put_bytes(&message));
        }
        self.wake_writers();
        Ok(())
    }

    /// RFC 8308: in the first packet under the new keys.
    fn send_ext_info(&mut self) {
        let algorithms: Vec<_> = self.signature_algorithms().map(super::hostkey::SignatureAlgorithm::name).collect();
        self.seal(|out| {
            out.put_u8(msg::EXT_INFO);
            out.put_u32(2);
            out.put_string(b"server-sig-algs");
            out.put_names(algorithms);
            out.put_string(b"ping@openssh.com");
            out.put_string(b"0");
        });
    }

    /// Gives the opener the keys of the exchange that ends with this NEWKEYS.
    pub(super) fn change(&mut self, opener: &mut Opener) -> Result<(), Fatal> {
        let KexState::NewKeys { chosen, exchange } = std::mem::replace(&mut self.kex, KexState::Idle) else {
            return Err(Fatal::PROTOCOL);
        };
        let ([cipher, _], [mac, _]) = (chosen.cipher, chosen.mac);
        let strict = self.listed.strict;
        self.rekeyed_at = self.now;
        exchange.keys(From::Client, &self.session_id, cipher, mac, |keys| opener.change(keys, strict))
    }

    /// Whether only the key exchange may be sent now.
    pub(super) fn exchanging(&self) -> bool {
        self.session_id.is_empty() || matches!(self.kex, KexState::Asked { .. } | KexState::Agreed { .. })
    }

    /// Whether the client may send only the key exchange now.
    pub(super) fn exchanging_in(&self) -> bool {
        matches!(self.kex, KexState::Agreed { .. } | KexState::NewKeys { .. })
    }

    fn seal(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if let Err(fatal) = self.sealer.seal(&mut self.out, write) {
            self.ended.get_or_insert(Ended::Fault(fatal));
        }
    }

    /// Sends a message, after the key exchange if one is under way.
    pub(super) fn send(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if !self.exchanging() {
            return self.seal(write);
        }
        let mut message = Vec::new();
        write(&mut message);
        self.held_bytes += message.len() + size_of::<Vec<u8>>();
        self.held.push(message);
        if self.held_bytes > HELD_BYTES {
            self.ended.get_or_insert(Ended::Fault(Fatal::FLOOD));
        }
    }

    /// Begins a new key exchange where enough has passed under the keys.
    pub(super) fn renew(&mut self, opener: &Opener) -> Result<(), Fatal> {
        if !matches!(self.kex, KexState::Idle) || !self.login.is_done() {
            return Ok(());
        }
        let bytes = self.sealer.bytes.max(opener.bytes);
        let packets = self.sealer.packets.max(opener.packets);
        let old = self.now.saturating_duration_since(self.rekeyed_at) >= self.config.rekey_after;
        if bytes >= self.config.rekey_bytes || packets >= REKEY_PACKETS || old {
            let (ours, offer) = self.ask(Some(&self.listed.clone()))?;
            self.kex = KexState::Asked { ours, offer };
        }
        Ok(())
    }

    /// Ends the session with a word to the peer.
    pub(super) fn disconnect(&mut self, code: u32, text: &str) {
        if self.ended.is_none() {
            self.bye(code, text);
            self.ended = Some(Ended::Us);
        }
    }

    /// Ends it for a fault.
    pub(super) fn fail(&mut self, fatal: Fatal) {
        if !matches!(self.ended, Some(Ended::Peer | Ended::Us)) {
            self.bye(fatal.code, fatal.text);
        }
        self.ended.get_or_insert(Ended::Fault(fatal));
    }

    fn bye(&mut self, code: u32, text: &str) {
        self.seal(|out| {
            out.put_u8(msg::DISCONNECT);
            out.put_u32(code);
            out.put_string(text.as_bytes());
            out.put_string(b"");
        });
    }

    /// The login is complete: keepalives begin.
    pub(super) fn opened(&mut self) {
        self.login_by = None;
        self.ping.next = self.now;
    }

    /// The peer answered a keepalive.
    pub(super) fn pong(&mut self) {
        if let Some(asked) = self.ping.asked.take() {
            self.ping.rtt = Some(self.now.saturating_duration_since(asked).max(Duration::from_micros(1)));
            self.ping.urgent = false;
            metrics::histogram!("adit_tunnel_rtt_seconds").record(self.ping.rtt.unwrap_or_default().as_secs_f64());
            self.ping.next = self.now + self.config.keepalive;
        }
    }

    /// The last measured round trip.
    pub(super) fn rtt(&self) -> Option<Duration> {
        self.ping.rtt
    }

    /// An open is slow: find out now whether the peer is there.
    pub(super) fn suspect(&mut self, now: Instant) {
        if self.login.is_done() && !self.ping.urgent {
            (self.now, self.ping.urgent) = (now, true);
            if self.ping.asked.is_none() {
                self.ping.next = now;
            }
        }
    }

    /// By when an answer, or anything else, must be heard.
    fn ping_by(&self, asked: Instant) -> Instant {
        let patience = self.config.keepalive_deadline / if self.ping.urgent { 3 } else { 1 };
        // The answer may wait behind megabytes on a slow link: a peer that says
        // anything at all is there.
        asked.max(self.last_heard) + patience
    }

    /// When `timeout` is to be called next.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let rekey = (self.login.is_done() && !matches!(self.kex, KexState::Idle))
            .then(|| self.kex_since.max(self.last_heard) + REKEY_DEADLINE);
        let renewal = self.login.is_done().then(|| self.rekeyed_at + self.config.rekey_after);
        let ping = self.login.is_done().then(|| self.ping.asked.map_or(self.ping.next, |asked| self.ping_by(asked)));
        let delayed = self.login.delayed.as_ref().map(|(at, _)| *at);
        let renewal = renewal.filter(|_| matches!(self.kex, KexState::Idle));
        [self.kexinit_at, self.login_by, rekey, renewal, ping, delayed].into_iter().flatten().min()
    }

    /// Acts on deadlines that have passed.
    pub(super) fn timeout(&mut self, now: Instant) -> Result<(), Fatal> {
        self.now = now;
        let passed = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if passed(self.login_by) {
            return Err(Fatal::LOGIN_DEADLINE);
        }
        if passed(self.kexinit_at) {
            let (ours, offer) = self.ask(None)?;
            self.kex = KexState::Asked { ours, offer };
        }
        if self.login.delayed.as_ref().is_some_and(|(at, _)| *at <= now) {
            self.reject_now();
        }
        if !self.login.is_done() {
            return Ok(());
        }
        if !matches!(self.kex, KexState::Idle) && self.kex_since.max(self.last_heard) + REKEY_DEADLINE <= now {
            return Err(Fatal::SILENT);
        }
        match self.ping.asked {
            Some(asked) if self.ping_by(asked) <= now => return Err(Fatal::SILENT),
            None if self.ping.next <= now => {
                self.ping.asked = Some(now);
                self.send(|out| {
                    out.put_u8(msg::GLOBAL_REQUEST);
                    out.put_string(b"keepalive@openssh.com");
                    out.put_bool(true);
                });
            }
            _ => {}
        }
        Ok(())
    }
}
