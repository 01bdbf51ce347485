//! One SSH connection of an owner: its login, its forwards, its console, and
//! whether its peer is still there.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use russh::server::{Handle, Msg};
use russh::{Channel, ChannelMsg, Error as SshError};
use tokio::sync::Notify;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::channel::{Shared, SshStream};
use super::console::Console;
use super::keys::Login;
use super::{Attached, Tunnels};
use crate::error::Error;
use crate::feed::Lease;
use crate::limits::Permit;
use crate::model::{TunnelId, Visitor};
use crate::ssh::{Link, OpenError, To};
use crate::stream::Stream;

/// Bytes towards the peer that show a link at work while it is not heard.
const SAID: u64 = 64 * 1024;

/// How a forward was asked for, and so how its channels are opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bind {
    /// `tcpip-forward`: the exact address asked for, and the port of the reply.
    Tcp(String, u32),
    /// `streamlocal-forward@openssh.com`: the exact path asked for.
    Path(String),
}

/// What speaks SSH.
pub(super) enum Engine {
    Library(Handle),
    Own(Arc<Link>),
}

/// One live SSH connection.
pub struct Session {
    /// Its number on this node.
    pub id: u64,
    /// Where the owner comes from.
    pub peer: SocketAddr,
    /// When it connected.
    pub since: SystemTime,
    /// The owner's log.
    pub console: Arc<Console>,
    /// Cancelled when the connection has ended.
    pub ended: CancellationToken,
    pub(super) user: OnceLock<String>,
    pub(super) login: OnceLock<Login>,
    pub(super) engine: OnceLock<Engine>,
    /// Later logins have higher ones.
    pub(super) order: OnceLock<u64>,
    pub(super) forwards: Mutex<Vec<Attached>>,
    /// What a login without a key made, and what keeps it until the end.
    pub(super) made: Mutex<Vec<TunnelId>>,
    pub(super) lease: Mutex<Option<Lease>>,
    pub(super) channels: Arc<AtomicUsize>,
    pub(super) authenticated: Notify,
    pub(super) shared: Arc<Shared>,
    /// Clients that drop the answer after our CHANNEL_EOF.
    hold_eof: AtomicBool,
    /// Terminals that show the console now.
    pub(super) terminals: Arc<AtomicUsize>,
    rtt_us: AtomicU64,
    suspect: Notify,
    wire: Mutex<Option<socket2::Socket>>,
}

impl Session {
    pub(super) fn new(id: u64, peer: SocketAddr, wire: Option<socket2::Socket>) -> Self {
        Self {
            id,
            peer,
            since: SystemTime::now(),
            console: Arc::default(),
            ended: CancellationToken::new(),
            user: OnceLock::new(),
            login: OnceLock::new(),
            engine: OnceLock::new(),
            order: OnceLock::new(),
            forwards: Mutex::default(),
            made: Mutex::default(),
            lease: Mutex::new(None),
            channels: Arc::default(),
            authenticated: Notify::new(),
            shared: Arc::default(),
            hold_eof: AtomicBool::new(false),
            terminals: Arc::default(),
            rtt_us: AtomicU64::new(0),
            suspect: Notify::new(),
            wire: Mutex::new(wire),
        }
    }

    /// Learns what the client calls itself (RFC 4253 §4.2).
    pub(super) fn meet(&self, client: &[u8]) {
        // Measured: Go's client closes the channel on our EOF, answer or not.
        let drops_answers = ["SSH-2.0-Go", "SSH-2.0-Mysocketctl", "SSH-2.0-mysocketctl"]
            .iter()
            .any(|p| client.starts_with(p.as_bytes()));
        self.hold_eof.store(drops_answers, Ordering::Relaxed);
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
        if let Some(Engine::Own(link)) = self.engine.get() {
            return link.rtt();
        }
        match self.rtt_us.load(Ordering::Relaxed) {
            0 => None,
            us => Some(Duration::from_micros(us)),
        }
    }

    /// Visitors' channels open now.
    pub fn channels(&self) -> usize {
        self.channels.load(Ordering::Relaxed)
    }

    /// Bytes that wait for visitors now.
    pub fn queued_bytes(&self) -> usize {
        match self.engine.get() {
            Some(Engine::Own(link)) => link.queued(),
            _ => self.shared.queued(),
        }
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
        mut permits: Vec<Permit>,
    ) -> Result<Stream, Error> {
        let settings = &tunnels.settings;
        permits.push(Permit::take(&self.channels, settings.connections_per_tunnel).ok_or(Error::TunnelLimit)?);
        let handle = match self.engine.get() {
            Some(Engine::Own(link)) => {
                let to = match bind {
                    Bind::Tcp(address, port) => To::Tcp(address, *port, visitor.addr),
                    Bind::Path(path) => To::Path(path),
                };
                return match timeout(settings.open_deadline, link.open(to, permits)).await {
                    Ok(Ok(stream)) => Ok(Stream::other(stream)),
                    Ok(Err(OpenError::Refused)) => Err(Error::OriginRefused),
                    Ok(Err(OpenError::Full)) => Err(Error::TunnelLimit),
                    Ok(Err(OpenError::Lost)) => Err(Error::TunnelLost),
                    Err(_) => Err(Error::TunnelSilent),
                };
            }
            Some(Engine::Library(handle)) => handle.clone(),
            None => return Err(Error::TunnelLost),
        };
        let (answer, opened) = tokio::sync::oneshot::channel::<SshStream>();
        let (bind, visitor, deadline) = (bind.clone(), *visitor, settings.open_deadline);
        let (session, tasks) = (Arc::clone(self), tunnels.tasks.clone());
        let channel_settings = Arc::clone(&tunnels.channel_settings);
        let (failed, failure) = tokio::sync::oneshot::channel();
        // In a task of its own: the library ends the whole session if the
        // answer to an open finds its asker gone.
        tunnels.tasks.spawn(async move {
            let open = async {
                match &bind {
                    Bind::Tcp(address, port) => {
                        let originator = visitor.addr.ip().to_string();
                        let port_of_visitor = u32::from(visitor.addr.port().max(1));
                        handle.channel_open_forwarded_tcpip(address.as_str(), *port, originator, port_of_visitor).await
                    }
                    Bind::Path(path) => handle.channel_open_forwarded_streamlocal(path.as_str()).await,
                }
            };
            tokio::select! {
                result = open => match result {
                    Ok(channel) => {
                        // A stream at once: wherever it is dropped, also on its
                        // way to a caller who has left, its channel is closed.
                        let shared = Arc::clone(&session.shared);
                        let hold_eof = session.hold_eof.load(Ordering::Relaxed);
                        let (stream, pump) = SshStream::new(channel, shared, channel_settings, hold_eof, permits);
                        tasks.spawn(pump);
                        let _ = answer.send(stream);
                    }
                    Err(SshError::ChannelOpenFailure(_)) => { let _ = failed.send(Error::OriginRefused); }
                    Err(_) => { let _ = failed.send(Error::TunnelLost); }
                },
                () = session.ended.cancelled() => { let _ = failed.send(Error::TunnelLost); }
            }
        });
        match timeout(deadline, opened).await {
            Ok(Ok(stream)) => Ok(Stream::other(stream)),
            Ok(Err(_)) => Err(failure.await.unwrap_or(Error::TunnelLost)),
            Err(_) => Err(Error::TunnelSilent),
        }
    }

    /// An open was slow: find out now whether the peer is still there.
    pub(super) fn suspect(&self) {
        if let Some(Engine::Own(link)) = self.engine.get() {
            link.suspect();
        }
        self.suspect.notify_one();
    }

    /// Ends the connection whatever its state: the library reads no request to
    /// disconnect while it is held up.
    pub fn kill(&self) {
        if let Some(Engine::Own(link)) = self.engine.get() {
            link.kill();
        }
        if let Some(wire) = self.wire.lock().take() {
            let _ = wire.shutdown(std::net::Shutdown::Both);
        }
    }

    /// Asks the client to leave, with a reason that it shows.
    pub async fn disconnect(&self, why: &str) {
        match self.engine.get() {
            Some(Engine::Own(link)) => link.disconnect(why),
            Some(Engine::Library(handle)) => {
                let bye = handle.disconnect(russh::Disconnect::ByApplication, why.to_owned(), String::new());
                let _ = timeout(Duration::from_secs(1), bye).await;
            }
            None => {}
        }
    }

    /// Watches the peer until the connection ends: a request that any client
    /// must answer, on a timer and at once after a slow open. A peer that does
    /// not answer and says nothing else is dead, unless a visitor holds the
    /// session up just now.
    pub(super) async fn watch(&self, interval: Duration, deadline: Duration) {
        let Some(Engine::Library(handle)) = self.engine.get() else { return };
        // At once after the login: the first visitor's order may depend on it.
        let mut pause = Duration::ZERO;
        loop {
            let asked = tokio::select! {
                () = sleep(pause) => false,
                () = self.suspect.notified() => true,
            };
            pause = interval;
            let start = Instant::now();
            let step = if asked { deadline / 3 } else { deadline };
            let mut patience = step;
            let (mut heard, mut said, mut last_heard) = (self.shared.heard(), self.shared.said(), start);
            // Answered with REQUEST_FAILURE: nobody has such a forward.
            let probe = handle.cancel_forward_tcpip("rtt@adit".to_owned(), 0);
            tokio::pin!(probe);
            loop {
                tokio::select! {
                    _ = &mut probe => {
                        let us = start.elapsed().as_micros().clamp(1, u128::from(u64::MAX));
                        self.rtt_us.store(u64::try_from(us).unwrap_or(u64::MAX), Ordering::Relaxed);
                        metrics::histogram!("adit_tunnel_rtt_seconds").record(start.elapsed().as_secs_f64());
                        break;
                    }
                    // The question is asked already; the answer is more urgent now.
                    () = self.suspect.notified() => patience = patience.min(start.elapsed() + deadline / 3),
                    () = sleep(patience.saturating_sub(start.elapsed())) => {
                        if self.shared.is_held() {
                            patience = start.elapsed() + step;
                            continue;
                        }
                        // The answer may wait behind megabytes on a slow link: a
                        // peer that says anything at all is there.
                        if self.shared.heard() != heard {
                            (heard, last_heard) = (self.shared.heard(), Instant::now());
                            patience = start.elapsed() + step;
                            continue;
                        }
                        // The library hears nothing while it writes. That says less:
                        // the kernel takes bytes for a dead peer too, for a while.
                        if self.shared.said() - said >= SAID && last_heard.elapsed() < deadline * 2 {
                            said = self.shared.said();
                            patience = start.elapsed() + step;
                            continue;
                        }
                        tracing::info!(session = self.id, peer = %self.peer, asked, "the peer does not answer; session ended");
                        metrics::counter!("adit_sessions_dead_total").increment(1);
                        self.kill();
                        return;
                    }
                }
            }
        }
    }

    /// Serves the owner's terminal until it closes or asks to leave.
    pub(super) async fn serve_console(self: Arc<Self>, channel: Channel<Msg>, pty: bool, _place: Permit) {
        let (mut read, write) = channel.split();
        let line_end = if pty { "\r\n" } else { "\n" };
        self.console.attach();
        let show = async {
            loop {
                let text = self.console.next(line_end).await;
                if write.data_bytes(text.into_bytes()).await.is_err() {
                    return;
                }
            }
        };
        let listen = async {
            while let Some(message) = read.wait().await {
                match message {
                    // Ctrl-C and Ctrl-D come as bytes: the client's terminal is raw.
                    ChannelMsg::Data { data } if pty && data.iter().any(|b| matches!(b, 3 | 4)) => return true,
                    ChannelMsg::Signal { .. } => return true,
                    ChannelMsg::Close => return false,
                    _ => {}
                }
            }
            false
        };
        let leave = tokio::select! {
            () = show => false,
            leave = listen => leave,
            () = self.ended.cancelled() => false,
        };
        let goodbye = async {
            let _ = write.exit_status(0).await;
            let _ = write.close().await;
        };
        let _ = timeout(Duration::from_secs(1), goodbye).await;
        if leave {
            // The client leaves by itself when its shell has closed; be sure of it.
            let _ = timeout(Duration::from_secs(1), self.ended.cancelled()).await;
            self.disconnect("bye").await;
        }
    }

    /// The connection has ended: what it held is given back.
    pub(super) fn finish(&self) {
        self.ended.cancel();
        self.forwards.lock().clear();
        *self.lease.lock() = None;
        *self.wire.lock() = None;
    }
}
