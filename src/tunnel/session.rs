//! One SSH connection of an owner: its login, its forwards, its console, and
//! whether its peer is still there.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::console::Console;
use super::keys::Login;
use super::{Attached, Tunnels};
use crate::cores::Core;
use crate::error::Error;
use crate::feed::Lease;
use crate::limits::Permit;
use crate::model::{TunnelId, Visitor};
use crate::ssh::{Link, OpenError, To};
use crate::stream::Stream;

/// How a forward was asked for, and so how its channels are opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// `tcpip-forward`: the exact address asked for, and the port of the reply.
    Tcp(String, u32),
    /// `streamlocal-forward@openssh.com`: the exact path asked for.
    Path(String),
}

/// One live SSH connection.
pub struct Session {
    /// Its number on this node.
    pub id: u64,
    /// Where the owner comes from.
    pub peer: SocketAddr,
    /// Where it is served.
    pub core: Option<Core>,
    /// When it connected.
    pub since: SystemTime,
    /// The owner's log.
    pub console: Arc<Console>,
    /// Cancelled when the connection has ended.
    pub ended: CancellationToken,
    pub(super) user: OnceLock<String>,
    pub(super) login: OnceLock<Login>,
    pub(super) link: Arc<Link>,
    /// Later logins have higher ones.
    pub(super) order: OnceLock<u64>,
    pub(super) forwards: Mutex<Vec<Attached>>,
    /// What a login without a key made, and what keeps it until the end.
    pub(super) made: Mutex<Vec<TunnelId>>,
    pub(super) lease: Mutex<Option<Lease>>,
    pub(super) channels: Arc<AtomicUsize>,
    /// Terminals that show the console now.
    pub(super) terminals: Arc<AtomicUsize>,
}

impl Session {
    pub(super) fn new(id: u64, peer: SocketAddr, link: Arc<Link>) -> Self {
        Self {
            id,
            peer,
            core: Core::here(),
            since: SystemTime::now(),
            console: Arc::default(),
            ended: CancellationToken::new(),
            user: OnceLock::new(),
            login: OnceLock::new(),
            link,
            order: OnceLock::new(),
            forwards: Mutex::default(),
            made: Mutex::default(),
            lease: Mutex::new(None),
            channels: Arc::default(),
            terminals: Arc::default(),
        }
    }

    /// The SSH user name; empty before login.
    pub fn user(&self) -> &str {
        self.user.get().map_or("", String::as_str)
    }

    /// Its place among all logins of this node.
    pub fn login_order(&self) -> u64 {
        self.order.get().copied().unwrap_or(0)
    }

    /// The tunnel's round-trip time, once measured.
    pub fn rtt(&self) -> Option<Duration> {
        self.link.rtt()
    }

    /// Visitors' channels open now.
    pub fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }

    /// Bytes that wait for visitors now.
    pub fn queued_bytes(&self) -> usize {
        self.link.queued()
    }

    /// A login that is not taken, for the operator.
    pub(super) fn log_refusal(&self, user: &str, why: &str) {
        metrics::counter!("adit_ssh_rejected_total").increment(1);
        tracing::info!(peer = %self.peer, user = user.escape_debug().to_string(), why, "login rejected");
    }

    /// A forward that is not granted, for operator and owner.
    pub(super) fn refuse_forward(&self, what: &str, why: &str) {
        let what = what.escape_debug();
        tracing::info!(session = self.id, peer = %self.peer, %what, why, "forward refused");
        self.console.say(format!("-R {what} refused: {why}"));
    }

    /// Gives up the forwards of these binds: whether there was one.
    pub(super) fn cancel_forwards(&self, is: impl Fn(&Bind) -> bool) -> bool {
        let mut forwards = self.forwards.lock();
        let all = std::mem::take(&mut *forwards);
        let (cancelled, kept): (Vec<_>, Vec<_>) = all.into_iter().partition(|a| is(&a.attachment.bind));
        *forwards = kept;
        drop(forwards);
        !cancelled.is_empty()
    }

    /// Asks the owner's client for a way to the origin.
    ///
    /// # Errors
    /// `OriginRefused` (the client could not reach the origin), `TunnelLimit`,
    /// `TunnelSilent` (no answer within `open_deadline`), `TunnelLost`.
    ///
    /// # Cancel safety
    /// Cancel safe: a channel that opens after the caller has left is closed.
    pub(super) async fn open(
        self: &Arc<Self>,
        tunnels: &Tunnels,
        bind: &Bind,
        visitor: &Visitor,
    ) -> Result<Stream, Error> {
        let settings = &tunnels.settings;
        let permit = Permit::take(&self.channels, settings.connections_per_tunnel).ok_or(Error::TunnelLimit)?;
        let to = match bind {
            Bind::Tcp(address, port) => To::Tcp(address, *port, visitor.addr),
            Bind::Path(path) => To::Path(path),
        };
        match timeout(settings.open_deadline, self.link.open(to, Some(permit))).await {
            Ok(Ok(stream)) => Ok(Stream::other(stream)),
            Ok(Err(OpenError::Refused)) => Err(Error::OriginRefused),
            Ok(Err(OpenError::Full)) => Err(Error::TunnelLimit),
            Ok(Err(OpenError::Lost)) => Err(Error::TunnelLost),
            Err(_) => Err(Error::TunnelSilent),
        }
    }

    /// An open was slow: find out now whether the peer is still there.
    pub(super) fn suspect(&self) {
        self.link.suspect();
    }

    /// Ends the connection at once.
    pub fn kill(&self) {
        self.link.kill();
    }

    /// Asks the client to leave, with a reason that it shows.
    pub fn disconnect(&self, why: &str) {
        self.link.disconnect(why);
    }

    /// The connection has ended: what it held is given back.
    pub(super) fn finish(&self) {
        self.ended.cancel();
        self.forwards.lock().clear();
        *self.lease.lock() = None;
    }
}
