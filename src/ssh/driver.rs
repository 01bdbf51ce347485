//! The engine on a socket: one task a session, and streams that visitors use
//! from tasks of their own. All decisions are the core's.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::block::{BLOCK, Block};
use super::cipher::{Front, MAX_PACKET, Opener};
use super::connection::{OpenError, RequestId, To};
use super::core::{Core, Ended, Handled};
use super::inbox::WHOLE;
use super::{Config, Fatal, Owner, msg};
use crate::error::Error;
use crate::limits::Permit;
use crate::stream::Duplex;

/// The least and the most that one read takes; it grows while reads are full.
const READ_BYTES: (usize, usize) = (4 << 10, BLOCK);

/// Reads and writes after which other tasks have their turn.
const ROUNDS: usize = 16;

/// How long our last words may take.
const GOODBYE: Duration = Duration::from_secs(1);

/// Buffers larger than this are given back when there is nothing to send.
const KEPT_BYTES: usize = 4 << 10;

struct State {
    core: Core,
    /// Of the driver, while it sleeps.
    driver: Option<Waker>,
}

/// A session as its users hold it.
pub struct Link {
    state: Mutex<State>,
}

impl Link {
    /// A session that a `Driver` is to run.
    pub fn new(config: Arc<Config>) -> Arc<Self> {
        let core = Core::new(config, now());
        Arc::new(Self { state: Mutex::new(State { core, driver: None }) })
    }

    fn with<T>(&self, use_it: impl FnOnce(&mut Core) -> T) -> T {
        let mut state = self.state.lock();
        let done = use_it(&mut state.core);
        let busy = !state.core.out.is_empty() || state.core.ended.is_some();
        let driver = if busy { state.driver.take() } else { None };
        drop(state);
        if let Some(driver) = driver {
            driver.wake();
        }
        done
    }

    /// Asks the peer for a channel to `to`. The permit is held until the
    /// channel's end on both sides.
    ///
    /// # Errors
    /// `Refused` by the peer; `Lost` with the session.
    ///
    /// # Cancel safety
    /// A channel that opens after the caller has left is closed.
    pub async fn open(self: &Arc<Self>, to: To<'_>, permit: Option<Permit>) -> Result<ChannelStream, OpenError> {
        let stream = self.with(|core| {
            core.now = now();
            Ok(ChannelStream { link: Arc::clone(self), id: core.open(to, permit)? })
        })?;
        std::future::poll_fn(|cx| self.with(|core| core.poll_opened(stream.id, cx))).await?;
        Ok(stream)
    }

    /// The stream of a console that the owner has granted; once a channel.
    pub fn console(self: &Arc<Self>, channel: u32) -> ChannelStream {
        ChannelStream { link: Arc::clone(self), id: channel }
    }

    /// Answers a forward: `Some(port)` grants it, with the port where 0 was asked for.
    pub fn reply(&self, request: RequestId, granted: Option<Option<u32>>) {
        self.with(|core| core.reply(request, granted));
    }

    /// Ends the session with a reason that the peer shows
    /// (`SSH_DISCONNECT_BY_APPLICATION`).
    pub fn disconnect(&self, why: &str) {
        self.with(|core| core.disconnect(11, why));
    }

    /// Ends the session at once, without a word.
    pub fn kill(&self) {
        self.with(Core::wake_all);
    }

    /// An open is slow: ask the peer now whether it is there.
    pub fn suspect(&self) {
        self.with(|core| core.suspect(now()));
        // Its deadline is nearer now.
        let driver = self.state.lock().driver.take();
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    /// The last measured round trip.
    pub fn rtt(&self) -> Option<Duration> {
        self.state.lock().core.rtt()
    }

    /// Bytes that wait for visitors now.
    pub fn queued(&self) -> usize {
        self.state.lock().core.channels.queued()
    }
}

/// Tests run on a clock of their own.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// One channel as a byte stream. Dropping it closes the channel; what was
/// written before is delivered.
pub struct ChannelStream {
    link: Arc<Link>,
    id: u32,
}

impl ChannelStream {
    /// Ends a console with this exit status.
    pub fn exit(self, status: u32) {
        self.link.with(|core| core.exit(self.id, status));
    }
}

fn lost(_: OpenError) -> io::Error {
    Error::TunnelLost.into_io(io::ErrorKind::ConnectionReset)
}

impl AsyncRead for ChannelStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let piece = ready!(self.poll_piece(cx, buf.remaining()))?;
        buf.put_slice(&piece);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for ChannelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let broken = |why| match why {
            OpenError::Refused => io::ErrorKind::BrokenPipe.into(),
            OpenError::Lost | OpenError::Full => lost(why),
        };
        self.link.with(|core| core.poll_write(self.id, cx, buf)).map_err(broken)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.link.with(|core| core.shutdown(self.id));
        Poll::Ready(Ok(()))
    }
}

impl ChannelStream {
    /// Bytes from the peer as they came, at most `max`; none at the end.
    ///
    /// # Errors
    /// `TunnelLost` where the session ended before the channel did.
    pub fn poll_piece(&self, cx: &mut Context<'_>, max: usize) -> Poll<io::Result<Bytes>> {
        self.link.with(|core| core.poll_read(self.id, cx, max)).map_err(lost)
    }
}

impl Duplex for ChannelStream {
    fn poll_piece(&mut self, cx: &mut Context<'_>, max: usize) -> Option<Poll<io::Result<Bytes>>> {
        Some(ChannelStream::poll_piece(self, cx, max))
    }

    fn reset(&mut self) {
        // SSH has no other end than a close: RFC 4254 §5.3.
    }
}

impl Drop for ChannelStream {
    fn drop(&mut self) {
        self.link.with(|core| core.leave(self.id));
    }
}

/// Runs one session: a future that ends with it.
pub struct Driver {
    link: Arc<Link>,
    tcp: TcpStream,
    owner: Box<dyn Owner>,
    opener: Opener,
    input: Block,
    /// Bytes of `input` that were read and not handed on yet.
    filled: usize,
    read_bytes: usize,
    /// The packets at the front of `input`: where their payloads are, and their numbers.
    opened: Vec<(usize, usize, u32)>,
    logged_in: bool,
    paused: bool,
    wire: Vec<u8>,
    sent: usize,
    timer: Pin<Box<Sleep>>,
    armed: Instant,
    /// Our last words are to be out by then.
    goodbye: Option<Instant>,
}

impl Driver {
    /// Runs `link` on a connection of which `head` has been read already.
    pub fn new(link: Arc<Link>, tcp: TcpStream, head: &[u8], owner: Box<dyn Owner>) -> Self {
        let armed = now();
        let mut input = Block::of(head.len());
        input.bytes().copy_from_slice(head);
        Self {
            link,
            tcp,
            owner,
            opener: Opener::plain(),
            filled: input.len(),
            input,
            read_bytes: READ_BYTES.0,
            opened: Vec::new(),
            logged_in: false,
            paused: false,
            wire: Vec::new(),
            sent: 0,
            timer: Box::pin(tokio::time::sleep_until(armed.into())),
            armed,
            goodbye: None,
        }
    }

    /// Reads once: whether there may be more.
    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.paused || self.goodbye.is_some() {
            return Poll::Pending;
        }
        if self.input.len() - self.filled < self.read_bytes / 2 {
            self.refill((self.filled + self.read_bytes).min(BLOCK.max(self.filled + READ_BYTES.0)), 0);
        }
        let mut room = ReadBuf::new(self.input.bytes().get_mut(self.filled..).unwrap_or_default());
        let read = Pin::new(&mut self.tcp).poll_read(cx, &mut room);
        let n = room.filled().len();
        match read {
            Poll::Ready(Ok(())) if n > 0 => {
                self.filled += n;
                let (least, most) = READ_BYTES;
                if n >= self.read_bytes {
                    self.read_bytes = (self.read_bytes * 4).min(most);
                } else if n < self.read_bytes / 8 {
                    self.read_bytes = (self.read_bytes / 4).max(least);
                }
                Poll::Ready(())
            }
            Poll::Ready(_) => {
                self.link.state.lock().core.wake_all();
                Poll::Ready(())
            }
            Poll::Pending => {
                if self.filled == 0 {
                    self.input = Block::default();
                }
                Poll::Pending
            }
        }
    }

    /// Goes on in a block of at least `size` bytes with what stands from `from` on;
    /// gives the former one.
    fn refill(&mut self, size: usize, from: usize) -> Block {
        let former = std::mem::replace(&mut self.input, Block::of(size.max(self.filled - from)));
        if let Some(rest) = former.as_ref().get(from..self.filled)
            && let Some(front) = self.input.bytes().get_mut(..rest.len())
        {
            front.copy_from_slice(rest);
        }
        self.filled -= from;
        former
    }

    /// Drops bytes from the front of the input.
    fn pass(&mut self, len: usize) {
        self.input.bytes().copy_within(len..self.filled, 0);
        self.filled -= len;
    }

    /// Hands on all packets that are there.
    fn take_packets(&mut self) -> Result<(), Fatal> {
        let mut pos = 0;
        while !self.paused {
            if pos == 0 && self.opener.packets == 0 && self.opener.seq() == 0 {
                let state = &mut *self.link.state.lock();
                if state.core.awaits_version() {
                    match state.core.version(self.input.as_ref().get(..self.filled).unwrap_or_default())? {
                        Some(taken) => {
                            self.input.bytes().copy_within(taken..self.filled, 0);
                            self.filled -= taken;
                        }
                        None => return Ok(()),
                    }
                }
            }
            let seq = self.opener.seq();
            let front = self.opener.open(self.input.bytes().get_mut(pos..self.filled).unwrap_or_default())?;
            let Front::Packet { payload, len } = front else {
                return self.hand_on(pos);
            };
            let (start, end) = (pos + payload.start, pos + payload.end);
            self.opened.push((start, end, seq));
            pos += len;
            // What changes keys, or who listens, is handed on at once.
            let number = self.input.as_ref().get(start).copied().unwrap_or_default();
            if !self.logged_in || number < msg::USERAUTH_REQUEST {
                self.hand_on(pos)?;
                pos = 0;
            }
        }
        Ok(())
    }

    /// Hands on the opened packets, which are the first `len` bytes.
    fn hand_on(&mut self, len: usize) -> Result<(), Fatal> {
        if len == 0 {
            return Ok(());
        }
        let mut opened = std::mem::take(&mut self.opened);
        let large = opened.iter().any(|(start, end, _)| end - start > WHOLE);
        let handed = if large && self.logged_in {
            // Large pieces stay where they are; what follows them moves.
            let block = Bytes::from_owner(self.refill(self.read_bytes, len));
            // The numbers of message and channel.
            let head = |start: usize| block.get(start..start + 5);
            let first = opened.first().and_then(|(start, ..)| head(*start));
            let alone = len >= BLOCK / 4 && opened.iter().all(|(start, ..)| head(*start) == first);
            self.hand_on_each(&mut opened, &block, |core, id, from, to| core.data(id, block.slice(from..to), alone))
        } else {
            let block = std::mem::take(&mut self.input);
            let bytes = block.as_ref();
            let handed = self.hand_on_each(&mut opened, bytes, |core, id, from, to| {
                core.small_data(id, bytes.get(from..to).unwrap_or_default())
            });
            self.input = block;
            self.pass(len);
            handed
        };
        self.opened = opened;
        handed
    }

    fn hand_on_each(
        &mut self,
        opened: &mut Vec<(usize, usize, u32)>,
        block: &[u8],
        mut data: impl FnMut(&mut Core, u32, usize, usize) -> Result<(), Fatal>,
    ) -> Result<(), Fatal> {
        let core = &mut self.link.state.lock().core;
        core.received = self.opener.bytes;
        for (start, end, seq) in opened.drain(..) {
            if core.ended.is_some() {
                continue;
            }
            let payload = block.get(start..end).unwrap_or_default();
            // RFC 4254 §5.2.
            if let Some((&[msg::CHANNEL_DATA, a, b, c, d, e, f, g, h], bytes)) = payload.split_first_chunk()
                && self.logged_in
                && !core.exchanging_in()
            {
                if u32::from_be_bytes([e, f, g, h]) as usize != bytes.len() {
                    return Err(Fatal::MALFORMED);
                }
                data(core, u32::from_be_bytes([a, b, c, d]), start + 9, end)?;
            } else if core.packet(payload, seq, &mut *self.owner)? == Handled::NewKeys {
                core.change(&mut self.opener)?;
            }
        }
        core.renew(&self.opener)?;
        self.logged_in = core.login.is_done();
        if self.logged_in {
            self.opener.longest = MAX_PACKET;
        }
        self.paused = core.paused();
        Ok(())
    }

    /// Writes what is sealed. Ready when all is written.
    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            while let Some(rest) = self.wire.get(self.sent..).filter(|rest| !rest.is_empty()) {
                match ready!(Pin::new(&mut self.tcp).poll_write(cx, rest))? {
                    0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    n => self.sent += n,
                }
            }
            self.wire.clear();
            self.sent = 0;
            let core = &mut self.link.state.lock().core;
            if core.out.is_empty() {
                if core.out.capacity() > KEPT_BYTES {
                    core.out = Vec::new();
                }
                if self.wire.capacity() > KEPT_BYTES {
                    self.wire = Vec::new();
                }
                return Poll::Ready(Ok(()));
            }
            std::mem::swap(&mut self.wire, &mut core.out);
            core.wake_writers();
        }
    }

    fn poll_all(&mut self, cx: &mut Context<'_>) -> Poll<Ended> {
        for _ in 0..ROUNDS {
            let read = self.poll_input(cx).is_ready();
            if read {
                self.link.state.lock().core.heard(now());
            }
            if (read || self.filled > 0)
                && let Err(fatal) = self.take_packets()
            {
                self.link.state.lock().core.fail(fatal);
            }
            let written = self.poll_output(cx);
            if let Poll::Ready(Err(_)) = &written {
                self.link.state.lock().core.wake_all();
            }
            let fired = self.timer.as_mut().poll(cx).is_ready();
            let mut state = self.link.state.lock();
            let core = &mut state.core;
            if fired {
                let at = now();
                if let Err(fatal) = core.timeout(at).and_then(|()| core.renew(&self.opener)) {
                    core.fail(fatal);
                }
            }
            let resumed = std::mem::replace(&mut self.paused, core.paused()) && !self.paused;
            let mut deadline = core.deadline();
            if let Some(ended) = core.ended {
                core.wake_all();
                let by = *self.goodbye.get_or_insert_with(|| now() + GOODBYE);
                let said = written.is_ready() && core.out.is_empty();
                if said || matches!(ended, Ended::Peer) || matches!(written, Poll::Ready(Err(_))) || by <= now() {
                    return Poll::Ready(ended);
                }
                deadline = Some(by);
            }
            if let Some(deadline) = deadline
                && (fired || deadline < self.armed)
            {
                self.armed = deadline;
                self.timer.as_mut().reset(deadline.into());
            }
            let unsent = written.is_ready() && !core.out.is_empty();
            if !read && !fired && !unsent && !resumed {
                state.driver = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Future for Driver {
    /// What to log of the end: why, and what the client called itself.
    type Output = (Ended, String);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let ended = ready!(self.poll_all(cx));
        Poll::Ready((ended, self.link.state.lock().core.client_version().to_owned()))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.link.state.lock().core.wake_all();
    }
}
