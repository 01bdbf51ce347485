//! The SSH server engine: what a reverse-tunnel edge needs of SSH, and no more.
//! It knows nothing of tunnels or routes.
//!
//! ```text
//! bytes ─► Opener (packets, decrypted in place) ─► Core ─► Owner (who may, what for)
//! bytes ◄─ Sealer ◄─ Core (sans-io: no socket, no clock) ◄─ ChannelStream (one a visitor)
//!          └────────── Driver: the one task of a session, socket and timer
//! ```
//! Why not the library's server (measured, `docs/ssh.md`): it refills a channel's
//! window on receipt, so one visitor who stops reading stops all of a tunnel.

mod auth;
mod block;
mod cipher;
mod connection;
mod core;
mod driver;
mod hostkey;
mod inbox;
mod kex;
mod msg;
mod negotiate;
mod wire;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

pub use self::auth::{Attempt, Method, Question, Verdict};
pub use self::connection::{Asked, OpenError, RequestId, To};
pub use self::core::Ended;
pub use self::driver::{ChannelStream, Driver, Link};
pub use self::hostkey::HostKey;

/// Why the engine ends a connection: told to the peer (RFC 4253 §11.1) and counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fatal {
    /// The reason code.
    pub code: u32,
    /// The metric label.
    pub label: &'static str,
    /// What the peer is told.
    pub text: &'static str,
}

impl Fatal {
    const fn new(code: u32, label: &'static str, text: &'static str) -> Self {
        Self { code, label, text }
    }
    const MALFORMED: Self = Self::new(2, "malformed", "malformed packet");
    const PROTOCOL: Self = Self::new(2, "protocol", "message out of place");
    const PACKET_TOO_LARGE: Self = Self::new(2, "packet_too_large", "packet too large");
    const VERSION: Self = Self::new(8, "version", "not SSH 2.0");
    const NO_COMMON_ALGORITHM: Self = Self::new(3, "no_common_algorithm", "no algorithm in common");
    const KEX: Self = Self::new(3, "kex", "key exchange failed");
    const MAC: Self = Self::new(5, "mac", "corrupted packet");
    const CRYPTO: Self = Self::new(2, "crypto", "internal error");
    const FLOOD: Self = Self::new(2, "flood", "too many requests");
    const REKEYS: Self = Self::new(2, "rekeys", "too many key exchanges");
    const WINDOW: Self = Self::new(2, "window", "window exceeded");
    const CHANNEL: Self = Self::new(2, "channel", "no such channel");
    const AUTH_ATTEMPTS: Self = Self::new(14, "auth_attempts", "too many failed logins");
    /// Nobody has logged in.
    pub const LOGIN_DEADLINE: Self = Self::new(2, "login_deadline", "no login in time");
    /// The peer does not answer.
    pub const SILENT: Self = Self::new(2, "silent", "the peer does not answer");
}

/// The knobs of the engine; one for all sessions of a node.
pub struct Config {
    /// What we call ourselves, `SSH-2.0-` included.
    pub version: &'static str,
    /// The first of each type proves who we are; all are announced.
    pub host_keys: Vec<HostKey>,
    /// Offer ecdh-sha2-nistp256.
    pub nist: bool,
    /// Take RSA signatures over SHA-1.
    pub sha1_rsa: bool,
    /// From the connection to a complete login.
    pub login_deadline: Duration,
    /// Failed attempts of one connection.
    pub auth_attempts: usize,
    /// Each failed attempt is answered after this.
    pub reject_delay: Duration,
    /// How often the peer is asked whether it is there, and its time to answer.
    pub keepalive: Duration,
    /// Time for its answer.
    pub keepalive_deadline: Duration,
    /// New keys after so many bytes in either direction, or this long.
    pub rekey_bytes: u64,
    /// The same by time.
    pub rekey_after: Duration,
    /// Visitors at once.
    pub channels: usize,
    /// A channel's window at first.
    pub window: usize,
    /// At most.
    pub window_max: usize,
    /// Bytes that all channels of one session may have outstanding: promised to
    /// the peer, or waiting for visitors; beyond, each gets the smallest window.
    pub session_buffer: usize,
    /// The same for all sessions.
    pub node_buffer: usize,
    /// What all sessions have outstanding now.
    pub outstanding: Arc<AtomicUsize>,
}

/// What decides, for one session. Called while the session is locked: must not
/// block, nor use the session's `Link`.
pub trait Owner: Send {
    /// Whether this attempt to log in succeeds.
    fn judge(&mut self, attempt: &Attempt<'_>) -> Verdict;
    /// What a rejected client may try next.
    fn methods(&self) -> &'static [&'static str];
    /// The login is complete.
    fn logged_in(&mut self, client_version: &str);
    /// A forward is asked for; answered by `Link::reply`, in any order.
    fn forward(&mut self, request: RequestId, asked: Asked);
    /// A forward is given up: whether there was one.
    fn cancel(&mut self, asked: &Asked) -> bool;
    /// A shell or command is asked for; `false` refuses it.
    fn console(&mut self, channel: u32, pty: bool) -> bool;
    /// A signal for a console.
    fn signal(&mut self, channel: u32);
}

#[doc(hidden)]
pub mod fuzzing;

#[cfg(test)]
mod against_russh;
#[cfg(test)]
mod tests;
