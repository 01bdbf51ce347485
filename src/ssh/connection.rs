//! The connection protocol (RFC 4254): forwards, consoles, and a channel for
//! each visitor, with windows that are granted when bytes are consumed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::core::{Core, Ended};
use super::inbox::Inbox;
use super::wire::{Put, Reader};
use super::{Config, Fatal, Owner, msg};
use crate::limits::Permit;

/// The most data that one packet carries, in either direction.
const DATA_BYTES: usize = 32 << 10;

/// Sealed bytes that may wait for the socket; then channels wait in a queue, one
/// packet each in turn.
pub(super) const OUT_BYTES: usize = 128 << 10;

/// A piece so small does not wait for its turn, while no more than this is ahead.
const SMALL: usize = 1 << 10;
const OUT_BYTES_SMALL: usize = OUT_BYTES + (64 << 10);

/// The smallest window: who has it still moves two packets a round trip.
const WINDOW_MIN: usize = 64 << 10;

/// Global requests that wait for an answer.
const REQUESTS: usize = 256;

/// Channels of a session that wait for the peer's close, or for its answer,
/// though nobody here uses them any more: OpenSSH closes only when its origin has
/// read all. Each costs a third of a KiB; with more, no visitor is let in.
const UNCLOSED: usize = 16_384;

/// Session channels of one connection.
const SESSIONS: usize = 4;

/// Keys that a client may ask us to prove at once.
const PROOFS: usize = 16;

/// Which forward is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// `tcpip-forward`: the address as it was written, and the port.
    Tcp(String, u32),
    /// `streamlocal-forward@openssh.com`: the path as it was written.
    Path(String),
}

/// Where a visitor's channel goes.
#[derive(Debug, Clone, Copy)]
pub enum To<'a> {
    /// A forwarded address and port, and who visits.
    Tcp(&'a str, u32, std::net::SocketAddr),
    /// A forwarded path.
    Path(&'a str),
}

/// A request of the peer that is to be answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId(u64);

/// Why a channel did not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// The peer could not, or would not.
    Refused,
    /// The session has ended.
    Lost,
    /// The session has all the channels it may have.
    Full,
}

/// An answer that waits for those before it (RFC 4254 §4: in order).
struct Reply {
    id: u64,
    wanted: bool,
    answer: Option<Option<Vec<u8>>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Visitor,
    Console { pty: bool, shown: bool },
}

/// One channel.
struct Channel {
    kind: Kind,
    /// The peer's number, once it is open.
    peer: Option<u32>,
    refused: bool,
    /// Bytes that the peer takes, in packets of at most so much.
    room: usize,
    packet: usize,
    eof_said: bool,
    eof_wanted: bool,
    close_said: bool,
    eof_heard: bool,
    close_heard: bool,
    /// Nobody uses it any more on this side.
    left: bool,
    /// Bytes that the peer may still send.
    window: usize,
    /// What the window is kept at.
    target: usize,
    /// Bytes consumed since the last grant.
    consumed: usize,
    /// Bytes consumed since then, for the pace of the reader.
    pace: (Instant, usize),
    inbox: Inbox,
    reader: Option<Waker>,
    writer: Option<Waker>,
    queued: bool,
    /// May write one packet although others wait.
    granted: bool,
    /// Until nobody here uses it.
    permit: Option<Permit>,
}

impl Channel {
    fn new(kind: Kind, window: usize, now: Instant, permit: Option<Permit>) -> Self {
        Self {
            kind,
            peer: None,
            refused: false,
            room: 0,
            packet: 0,
            eof_said: false,
            eof_wanted: false,
            close_said: false,
            eof_heard: false,
            close_heard: false,
            left: false,
            window,
            target: window,
            consumed: 0,
            pace: (now, 0),
            inbox: Inbox::default(),
            reader: None,
            writer: None,
            queued: false,
            granted: false,
            permit,
        }
    }

    fn outstanding(&self) -> usize {
        self.window + self.inbox.len()
    }

    fn is_gone(&self) -> bool {
        self.left && (self.refused || (self.close_said && self.close_heard))
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// All channels of a session.
pub(super) struct Channels {
    config: Arc<Config>,
    all: Vec<Option<Box<Channel>>>,
    free: Vec<u32>,
    sessions: usize,
    no_more_sessions: bool,
    /// Who waits to write.
    waiting: VecDeque<u32>,
    granted: usize,
    replies: VecDeque<Reply>,
    next_reply: u64,
    outstanding: usize,
    /// Hold the end of a visitor's bytes back until the answer has ended.
    pub(super) hold_eof: bool,
}

impl Channels {
    pub(super) fn new(config: Arc<Config>) -> Self {
        Self {
            config,
            all: Vec::new(),
            free: Vec::new(),
            sessions: 0,
            no_more_sessions: false,
            waiting: VecDeque::new(),
            granted: 0,
            replies: VecDeque::new(),
            next_reply: 0,
            outstanding: 0,
            hold_eof: false,
        }
    }

    fn get(&mut self, id: u32) -> Option<&mut Channel> {
        self.all.get_mut(id as usize)?.as_deref_mut()
    }

    /// The channel that a message is about.
    fn named(&mut self, id: u32) -> Result<&mut Channel, Fatal> {
        self.get(id).filter(|c| !c.close_heard).ok_or(Fatal::CHANNEL)
    }

    fn insert(&mut self, channel: Channel) -> u32 {
        self.promise(channel.window);
        let channel = Some(Box::new(channel));
        match self.free.pop() {
            Some(id) => {
                if let Some(place) = self.all.get_mut(id as usize) {
                    *place = channel;
                }
                id
            }
            None => {
                self.all.push(channel);
                u32::try_from(self.all.len() - 1).unwrap_or(u32::MAX)
            }
        }
    }

    fn remove_gone(&mut self, id: u32) {
        let Some(place) = self.all.get_mut(id as usize) else { return };
        let Some(channel) = place.take_if(|c| c.is_gone()) else { return };
        self.granted -= usize::from(channel.granted);
        self.sessions -= usize::from(channel.kind != Kind::Visitor);
        self.free.push(id);
        self.redeem(channel.outstanding());
    }

    fn promise(&mut self, bytes: usize) {
        self.outstanding += bytes;
        self.config.outstanding.fetch_add(bytes, Ordering::Relaxed);
    }

    fn redeem(&mut self, bytes: usize) {
        self.outstanding -= bytes;
        self.config.outstanding.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What may still be promised.
    fn budget(&self) -> usize {
        let node = self.config.node_buffer.saturating_sub(self.config.outstanding.load(Ordering::Relaxed));
        self.config.session_buffer.saturating_sub(self.outstanding).min(node)
    }

    /// The window of a new channel: less as the budget fills.
    fn first_window(&self) -> usize {
        self.config.window.min((self.budget() / 16).max(WINDOW_MIN))
    }

    /// Bytes that wait for visitors.
    pub(super) fn queued(&self) -> usize {
        self.all.iter().flatten().map(|c| c.inbox.len()).sum()
    }

    fn wait(&mut self, id: u32) {
        if let Some(channel) = self.get(id)
            && !std::mem::replace(&mut channel.queued, true)
        {
            self.waiting.push_back(id);
        }
    }
}

impl Drop for Channels {
    fn drop(&mut self) {
        self.redeem(self.outstanding);
    }
}

/// What the peer says.
impl Core {
    pub(super) fn connection(&mut self, number: u8, mut read: Reader<'_>, owner: &mut dyn Owner) -> Result<(), Fatal> {
        match number {
            msg::GLOBAL_REQUEST => return self.global_request(read, owner),
            msg::REQUEST_SUCCESS | msg::REQUEST_FAILURE => self.pong(),
            msg::CHANNEL_OPEN => return self.channel_open(read),
            msg::CHANNEL_OPEN_CONFIRMATION => {
                let (id, peer) = (read.u32()?, read.u32()?);
                let (room, packet) = (read.u32()? as usize, read.u32()? as usize);
                let channel = self.channels.named(id)?;
                if channel.peer.is_some() || channel.refused || packet == 0 {
                    return Err(Fatal::PROTOCOL);
                }
                (channel.peer, channel.room, channel.packet) = (Some(peer), room, packet.min(DATA_BYTES));
                channel.wake();
                if channel.left {
                    self.say_close(id);
                }
            }
            msg::CHANNEL_OPEN_FAILURE => {
                let id = read.u32()?;
                let channel = self.channels.named(id)?;
                if channel.peer.is_some() || channel.refused {
                    return Err(Fatal::PROTOCOL);
                }
                channel.refused = true;
                channel.wake();
                self.channels.remove_gone(id);
            }
            msg::CHANNEL_WINDOW_ADJUST => {
                let (id, more) = (read.u32()?, read.u32()? as usize);
                let channel = self.channels.named(id)?;
                channel.room += more;
                if channel.room > u32::MAX as usize {
                    return Err(Fatal::WINDOW); // RFC 4254 §5.2
                }
                if let Some(writer) = channel.writer.take() {
                    writer.wake();
                }
            }
            msg::CHANNEL_DATA => {
                let (id, data) = (read.u32()?, read.string()?);
                self.small_data(id, data)?;
            }
            msg::CHANNEL_EXTENDED_DATA => {
                // A client has no standard error to send; it is let pass.
                let (id, _, data) = (read.u32()?, read.u32()?, read.string()?);
                self.receive(id, data.len())?;
                self.consumed(id, data.len());
            }
            msg::CHANNEL_EOF => {
                let id = read.u32()?;
                let channel = self.channels.named(id)?;
                channel.eof_heard = true;
                if let Some(reader) = channel.reader.take() {
                    reader.wake();
                }
                if channel.eof_wanted {
                    self.say_eof(id);
                }
            }
            msg::CHANNEL_CLOSE => {
                let id = read.u32()?;
                let channel = self.channels.named(id)?;
                channel.close_heard = true;
                if channel.peer.is_none() {
                    return Err(Fatal::PROTOCOL);
                }
                channel.wake();
                self.say_close(id);
                self.channels.remove_gone(id);
            }
            msg::CHANNEL_REQUEST => return self.channel_request(read, owner),
            // Answers to requests of ours on channels: none wants one.
            _ => {
                self.channels.named(read.u32()?)?;
            }
        }
        Ok(())
    }

    /// Counts bytes of the peer against its window.
    fn receive(&mut self, id: u32, len: usize) -> Result<&mut Channel, Fatal> {
        let channel = self.channels.named(id)?;
        if channel.peer.is_none() || channel.eof_heard {
            return Err(Fatal::PROTOCOL);
        }
        channel.window = channel.window.checked_sub(len).ok_or(Fatal::WINDOW)?;
        Ok(channel)
    }

    /// Bytes for a channel's reader, in a block where they are `alone` or not.
    pub(super) fn data(&mut self, id: u32, data: Bytes, alone: bool) -> Result<(), Fatal> {
        self.deliver(id, data.len(), |inbox| inbox.push(data, alone))
    }

    /// The same, to be copied.
    pub(super) fn small_data(&mut self, id: u32, data: &[u8]) -> Result<(), Fatal> {
        self.deliver(id, data.len(), |inbox| inbox.push_copied(data))
    }

    fn deliver(&mut self, id: u32, len: usize, push: impl FnOnce(&mut Inbox)) -> Result<(), Fatal> {
        let channel = self.receive(id, len)?;
        if channel.left || channel.close_said {
            self.channels.redeem(len);
            return Ok(());
        }
        push(&mut channel.inbox);
        if let Some(reader) = channel.reader.take() {
            reader.wake();
        }
        Ok(())
    }

    fn global_request(&mut self, mut read: Reader<'_>, owner: &mut dyn Owner) -> Result<(), Fatal> {
        let (name, wanted) = (read.string()?, read.bool()?);
        if self.channels.replies.len() >= REQUESTS {
            return Err(Fatal::FLOOD);
        }
        let id = self.channels.next_reply;
        self.channels.next_reply += 1;
        let answer = match name {
            b"tcpip-forward" | b"cancel-tcpip-forward" => Some(Asked::Tcp(read.text()?.to_owned(), read.u32()?)),
            b"streamlocal-forward@openssh.com" | b"cancel-streamlocal-forward@openssh.com" => {
                Some(Asked::Path(read.text()?.to_owned()))
            }
            _ => None,
        };
        let answer = match answer {
            Some(asked) if name.starts_with(b"cancel") => Some(owner.cancel(&asked).then(Vec::new)),
            Some(asked) => {
                owner.forward(RequestId(id), asked);
                None
            }
            None => match name {
                b"no-more-sessions@openssh.com" => {
                    self.channels.no_more_sessions = true;
                    Some(Some(Vec::new()))
                }
                b"hostkeys-prove-00@openssh.com" => Some(self.prove_host_keys(read)?),
                // Keepalives among them: any answer counts.
                _ => Some(None),
            },
        };
        self.channels.replies.push_back(Reply { id, wanted, answer });
        self.send_replies();
        Ok(())
    }

    fn send_replies(&mut self) {
        while self.channels.replies.front().is_some_and(|r| r.answer.is_some()) {
            let Some(reply) = self.channels.replies.pop_front() else { return };
            match reply.answer.flatten() {
                _ if !reply.wanted => {}
                Some(body) => self.send(|out| {
                    out.put_u8(msg::REQUEST_SUCCESS);
                    out.put_bytes(&body);
                }),
                None => self.send(|out| out.put_u8(msg::REQUEST_FAILURE)),
            }
        }
    }

    /// Answers a forward: `Some(port)` grants it, with the port where port 0 was
    /// asked for.
    pub(super) fn reply(&mut self, id: RequestId, granted: Option<Option<u32>>) {
        let body = granted.map(|port| port.map(|p| p.to_be_bytes().to_vec()).unwrap_or_default());
        if let Some(reply) = self.channels.replies.iter_mut().find(|r| r.id == id.0) {
            reply.answer.get_or_insert(body);
        }
        self.send_replies();
    }

    /// OpenSSH's PROTOCOL §2.5: clients that want to learn all our keys.
    pub(super) fn announce_host_keys(&mut self) {
        let config = Arc::clone(&self.config);
        self.send(|out| {
            out.put_u8(msg::GLOBAL_REQUEST);
            out.put_string(b"hostkeys-00@openssh.com");
            out.put_bool(false);
            config.host_keys.iter().for_each(|key| out.put_string(key.blob()));
        });
    }

    fn prove_host_keys(&mut self, mut read: Reader<'_>) -> Result<Option<Vec<u8>>, Fatal> {
        let mut proofs = Vec::new();
        for n in 0.. {
            if read.rest().is_empty() {
                break;
            }
            let blob = read.string()?;
            let Some(key) = self.config.host_keys.iter().find(|k| k.blob() == blob) else { return Ok(None) };
            if n >= PROOFS {
                return Ok(None);
            }
            let mut message = Vec::new();
            message.put_string(b"hostkeys-prove-00@openssh.com");
            message.put_string(&self.session_id);
            message.put_string(blob);
            proofs.put_string(&key.sign(&message)?);
        }
        Ok((!proofs.is_empty()).then_some(proofs))
    }

    fn channel_open(&mut self, mut read: Reader<'_>) -> Result<(), Fatal> {
        let (kind, peer) = (read.string()?, read.u32()?);
        let (room, packet) = (read.u32()? as usize, read.u32()? as usize);
        if packet == 0 {
            return Err(Fatal::PROTOCOL);
        }
        // RFC 4254 §5.1.
        let refusal = match kind {
            b"session" if self.channels.no_more_sessions => Some((1, "no more sessions, as you asked")),
            b"session" if self.channels.sessions >= SESSIONS => Some((4, "too many sessions")),
            b"session" => None,
            b"direct-tcpip" | b"direct-streamlocal@openssh.com" => {
                Some((1, "this server opens no connections for you; publish a service with -R"))
            }
            _ => Some((3, "unknown channel type")),
        };
        if let Some((code, text)) = refusal {
            self.send(|out| {
                out.put_u8(msg::CHANNEL_OPEN_FAILURE);
                out.put_u32(peer);
                out.put_u32(code);
                out.put_string(text.as_bytes());
                out.put_string(b"");
            });
            return Ok(());
        }
        let kind = Kind::Console { pty: false, shown: false };
        let mut channel = Channel::new(kind, WINDOW_MIN, self.now, None);
        // Nobody uses it before a shell is asked for.
        (channel.peer, channel.room, channel.packet, channel.left) = (Some(peer), room, packet.min(DATA_BYTES), true);
        self.channels.sessions += 1;
        let id = self.channels.insert(channel);
        self.send(|out| {
            out.put_u8(msg::CHANNEL_OPEN_CONFIRMATION);
            out.put_u32(peer);
            out.put_u32(id);
            out.put_u32(WINDOW_MIN as u32);
            out.put_u32(DATA_BYTES as u32);
        });
        Ok(())
    }

    fn channel_request(&mut self, mut read: Reader<'_>, owner: &mut dyn Owner) -> Result<(), Fatal> {
        let id = read.u32()?;
        let (name, wanted) = (read.string()?, read.bool()?);
        let channel = self.channels.named(id)?;
        let peer = channel.peer.ok_or(Fatal::PROTOCOL)?;
        let granted = match (&mut channel.kind, name) {
            (Kind::Console { pty, shown: false }, b"pty-req") => {
                *pty = true;
                true
            }
            // There is no command to run; the log is what any command shows.
            (Kind::Console { pty, shown: shown @ false }, b"shell" | b"exec") => {
                let pty = *pty;
                *shown = true;
                channel.left = false;
                let granted = owner.console(id, pty);
                if !granted && let Some(channel) = self.channels.get(id) {
                    channel.left = true;
                }
                granted
            }
            (Kind::Console { shown: true, .. }, b"signal") => {
                owner.signal(id);
                true
            }
            (Kind::Console { .. }, b"window-change") => true,
            _ => false,
        };
        if wanted {
            self.send(|out| {
                out.put_u8(if granted { msg::CHANNEL_SUCCESS } else { msg::CHANNEL_FAILURE });
                out.put_u32(peer);
            });
        }
        if !granted && matches!(name, b"shell" | b"exec") {
            self.say_close(id);
        }
        Ok(())
    }
}

/// What this side does with channels.
impl Core {
    /// Asks the peer for a channel; the end of its `poll_opened` says what came.
    pub(super) fn open(&mut self, to: To<'_>, permit: Option<Permit>) -> Result<u32, OpenError> {
        if self.ended.is_some() {
            return Err(OpenError::Lost);
        }
        if self.channels.all.len() - self.channels.free.len() >= self.config.channels + UNCLOSED {
            return Err(OpenError::Full);
        }
        let window = self.channels.first_window();
        let id = self.channels.insert(Channel::new(Kind::Visitor, window, self.now, permit));
        self.send(|out| {
            out.put_u8(msg::CHANNEL_OPEN);
            out.put_string(match to {
                To::Tcp(..) => b"forwarded-tcpip",
                To::Path(_) => b"forwarded-streamlocal@openssh.com",
            });
            out.put_u32(id);
            out.put_u32(u32::try_from(window).unwrap_or(u32::MAX));
            out.put_u32(DATA_BYTES as u32);
            match to {
                To::Tcp(address, port, visitor) => {
                    out.put_string(address.as_bytes());
                    out.put_u32(port);
                    out.put_string(visitor.ip().to_canonical().to_string().as_bytes());
                    // Go's client wants a port.
                    out.put_u32(u32::from(visitor.port().max(1)));
                }
                To::Path(path) => {
                    out.put_string(path.as_bytes());
                    out.put_string(b"");
                }
            }
        });
        Ok(id)
    }

    pub(super) fn poll_opened(&mut self, id: u32, cx: &mut Context<'_>) -> Poll<Result<(), OpenError>> {
        let ended = self.ended.is_some();
        match self.channels.get(id) {
            Some(channel) if channel.peer.is_some() => Poll::Ready(Ok(())),
            Some(channel) if channel.refused => Poll::Ready(Err(OpenError::Refused)),
            Some(channel) if !ended => {
                channel.reader = Some(cx.waker().clone());
                Poll::Pending
            }
            _ => Poll::Ready(Err(OpenError::Lost)),
        }
    }

    /// Bytes from the peer, at most `max`; none at its end; an error where the
    /// session was lost before.
    pub(super) fn poll_read(&mut self, id: u32, cx: &mut Context<'_>, max: usize) -> Poll<Result<Bytes, OpenError>> {
        let ended = self.ended.is_some();
        let Some(channel) = self.channels.get(id) else { return Poll::Ready(Err(OpenError::Lost)) };
        let piece = channel.inbox.pop(max);
        if !piece.is_empty() {
            self.consumed(id, piece.len());
            return Poll::Ready(Ok(piece));
        }
        if channel.eof_heard || channel.close_heard {
            return Poll::Ready(Ok(piece));
        }
        if ended {
            return Poll::Ready(Err(OpenError::Lost));
        }
        match &mut channel.reader {
            Some(waker) => waker.clone_from(cx.waker()),
            none => *none = Some(cx.waker().clone()),
        }
        Poll::Pending
    }

    /// The reader has taken bytes: the peer may send as many more, or more than
    /// that where the reader is faster than the window lets the peer be.
    fn consumed(&mut self, id: u32, len: usize) {
        self.channels.redeem(len);
        let (now, budget, rtt) = (self.now, self.channels.budget(), self.rtt().unwrap_or(Duration::from_millis(20)));
        let most = self.config.window_max;
        let Some(channel) = self.channels.get(id) else { return };
        channel.consumed += len;
        channel.pace.1 += len;
        if channel.eof_heard || channel.close_heard || channel.close_said {
            return;
        }
        let passed = now.saturating_duration_since(channel.pace.0);
        if passed >= rtt {
            // More than half a window in a round trip: the window is what limits.
            let per_rtt = (channel.pace.1 as f64 * rtt.as_secs_f64() / passed.as_secs_f64()) as usize;
            channel.pace = (now, 0);
            if per_rtt > channel.target / 2 {
                channel.target = (channel.target * 2).min(most);
            }
        }
        let target = channel.target.min((channel.outstanding() + budget / 4).max(WINDOW_MIN));
        let more = target.saturating_sub(channel.outstanding());
        if more < (target / 4).min(256 << 10) {
            return;
        }
        let Some(peer) = channel.peer else { return };
        channel.window += more;
        channel.consumed = 0;
        self.channels.promise(more);
        self.send(|out| {
            out.put_u8(msg::CHANNEL_WINDOW_ADJUST);
            out.put_u32(peer);
            out.put_u32(u32::try_from(more).unwrap_or(u32::MAX));
        });
    }

    /// Seals bytes for the peer: how many were taken.
    pub(super) fn poll_write(&mut self, id: u32, cx: &mut Context<'_>, data: &[u8]) -> Poll<Result<usize, OpenError>> {
        let had_turn = self.channels.get(id).is_some_and(|c| std::mem::take(&mut c.granted));
        self.channels.granted -= usize::from(had_turn);
        let written = self.write(id, cx, data, had_turn);
        if had_turn && !matches!(written, Poll::Ready(Ok(_))) {
            self.wake_writers(); // the turn is another's
        }
        written
    }

    fn write(&mut self, id: u32, cx: &mut Context<'_>, data: &[u8], turn: bool) -> Poll<Result<usize, OpenError>> {
        let (ended, exchanging, ahead) = (self.ended.is_some(), self.exchanging(), self.out.len());
        let others = self.channels.granted > 0 || !self.channels.waiting.is_empty();
        let Some(channel) = self.channels.get(id) else { return Poll::Ready(Err(OpenError::Lost)) };
        let Some(peer) = channel.peer.filter(|_| !ended) else { return Poll::Ready(Err(OpenError::Lost)) };
        if channel.close_heard || channel.close_said || channel.eof_said || channel.eof_wanted {
            return Poll::Ready(Err(OpenError::Refused));
        }
        if data.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let n = data.len().min(channel.room).min(channel.packet);
        let turn = turn || (!others && ahead < OUT_BYTES) || (n <= SMALL && ahead < OUT_BYTES_SMALL);
        if n == 0 || exchanging || !turn {
            match &mut channel.writer {
                Some(waker) => waker.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            if n > 0 {
                self.channels.wait(id);
            }
            return Poll::Pending;
        }
        channel.room -= n;
        let data = data.get(..n).unwrap_or_default();
        self.send(|out| {
            out.put_u8(msg::CHANNEL_DATA);
            out.put_u32(peer);
            out.put_string(data);
        });
        Poll::Ready(Ok(n))
    }

    /// What was sealed is on its way: as many who wait may write as there is room.
    pub(super) fn wake_writers(&mut self) {
        if self.exchanging() {
            return;
        }
        while self.out.len() + self.channels.granted * DATA_BYTES < OUT_BYTES {
            let Some(id) = self.channels.waiting.pop_front() else { return };
            let Some(channel) = self.channels.get(id) else { continue };
            if !std::mem::take(&mut channel.queued) {
                continue; // another channel of the same number
            }
            let Some(writer) = channel.writer.take() else { continue };
            channel.granted = true;
            writer.wake();
            self.channels.granted += 1;
        }
    }

    /// No more bytes for the peer.
    pub(super) fn shutdown(&mut self, id: u32) {
        let hold = self.channels.hold_eof;
        let Some(channel) = self.channels.get(id) else { return };
        channel.eof_wanted = true;
        if !hold || channel.eof_heard {
            self.say_eof(id);
        }
    }

    fn say_eof(&mut self, id: u32) {
        let Some(channel) = self.channels.get(id) else { return };
        let Some(peer) = channel.peer else { return };
        if !channel.eof_said && !channel.close_said {
            channel.eof_said = true;
            self.send(|out| {
                out.put_u8(msg::CHANNEL_EOF);
                out.put_u32(peer);
            });
        }
    }

    fn say_close(&mut self, id: u32) {
        let Some(channel) = self.channels.get(id) else { return };
        let Some(peer) = channel.peer else { return };
        if !channel.close_said {
            channel.close_said = true;
            self.send(|out| {
                out.put_u8(msg::CHANNEL_CLOSE);
                out.put_u32(peer);
            });
        }
    }

    /// Ends a console: RFC 4254 §6.10, then no more bytes.
    pub(super) fn exit(&mut self, id: u32, status: u32) {
        let Some(channel) = self.channels.get(id) else { return };
        let Some(peer) = channel.peer.filter(|_| !channel.close_said) else { return };
        self.send(|out| {
            out.put_u8(msg::CHANNEL_REQUEST);
            out.put_u32(peer);
            out.put_string(b"exit-status");
            out.put_bool(false);
            out.put_u32(status);
        });
        self.say_eof(id);
    }

    /// Nobody uses the channel any more; what was written is still delivered.
    pub(super) fn leave(&mut self, id: u32) {
        let Some(channel) = self.channels.get(id) else { return };
        channel.left = true;
        channel.permit = None;
        channel.queued = false;
        (channel.reader, channel.writer) = (None, None);
        let waiting = channel.inbox.len();
        channel.inbox.clear();
        self.channels.redeem(waiting);
        if let Some(channel) = self.channels.get(id)
            && std::mem::take(&mut channel.granted)
        {
            self.channels.granted -= 1;
            self.wake_writers();
        }
        self.say_close(id);
        self.channels.remove_gone(id);
    }

    /// The session has ended: everybody who waits learns it.
    pub(super) fn wake_all(&mut self) {
        self.ended.get_or_insert(Ended::Peer);
        self.channels.all.iter_mut().flatten().for_each(|c| c.wake());
    }
}
