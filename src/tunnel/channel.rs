//! One visitor's channel inside an SSH session, as a byte stream, and the pump
//! that moves its bytes.
//!
//! The SSH library refills a channel's window on receipt, not on consumption,
//! and stops the whole session while one channel's queue is full. So the pump
//! takes packets out of the library at once and holds them in a queue of its
//! own, bounded in bytes; where a visitor stops reading, the session is held up
//! until `stall_deadline` and then the visitor is reset, never the session.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use russh::server::Msg;
use russh::{Channel, ChannelMsg, ChannelReadHalf, ChannelWriteHalf};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

use crate::error::Error;
use crate::limits::Permit;
use crate::stream::Duplex;

/// What a visitor may hold back, and for how long.
#[derive(Debug, Clone)]
pub(super) struct ChannelSettings {
    /// Bytes from the origin that wait for one visitor at most.
    pub(super) channel_buffer: usize,
    /// Bytes from the origin that wait for all visitors of one session at most.
    pub(super) tunnel_buffer: usize,
    /// How long a visitor who does not read may hold up its session.
    pub(super) stall_deadline: Duration,
    /// Bytes a visitor must take in each `stall_deadline` while it holds up its
    /// session, not to count as one who does not read.
    pub(super) stall_floor: usize,
    /// Channels of one session that we may close before the client does; the
    /// library keeps 2.8 KiB of each.
    pub(super) broken_off_per_session: usize,
}

/// Bytes towards the origin that may wait in one channel; more makes the
/// visitor wait. Two reads of the largest kind.
const OUTBOX_BYTES: usize = 128 * 1024;

/// What a queued piece costs besides its bytes: its handle and what the
/// allocator keeps for it. Counted, or pieces of one byte would hold many times
/// what the bounds say.
const PIECE_BYTES: usize = 128;

/// The largest piece of one write that is copied into the outbox.
const WRITE_BYTES: usize = 64 * 1024;

/// How long bytes of a visitor who has left wait for an origin that does not
/// read: a minute, in which slow ones come back; they count as a connection.
const LINGER: Duration = Duration::from_secs(60);

/// How long the client may take to close a channel of which both sides are
/// done: a round trip, and the origin's own close.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// What the channels of one session share.
#[derive(Debug, Default)]
pub(super) struct Shared {
    /// Bytes that wait for visitors now, with what keeping them costs.
    queued: AtomicUsize,
    /// Channels whose visitor holds the session up now.
    held: AtomicUsize,
    /// Channels that we had to close before the client.
    broken_off: AtomicUsize,
    /// When it began that visitors hold the session up, one after another, and
    /// when the last of them ended.
    streak: Mutex<Option<(Instant, Instant)>>,
    /// Bytes that have come from the peer, and visitors who held the session up.
    heard: AtomicU64,
    /// Bytes that have gone to the peer.
    said: AtomicU64,
}

impl Shared {
    /// Whether some visitor holds the session up, so that a late answer of the
    /// peer says nothing about the peer.
    pub(super) fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire) > 0
    }

    /// Grows with every sign of the peer's life, and where the session was held
    /// up so that none could be seen.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Acquire)
    }

    /// Bytes that have gone to the peer.
    pub(super) fn said(&self) -> u64 {
        self.said.load(Ordering::Relaxed)
    }

    /// Bytes that wait for visitors now.
    pub(super) fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }
}

/// The connection under a session; tells `Shared` what it carries.
pub(super) struct Wire<S> {
    pub(super) stream: S,
    pub(super) shared: Arc<Shared>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        let heard = buf.filled().len() - before;
        self.shared.heard.fetch_add(u64::try_from(heard).unwrap_or(u64::MAX), Ordering::Relaxed);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, buf);
        if let Poll::Ready(Ok(n)) = &written {
            self.shared.said.fetch_add(u64::try_from(*n).unwrap_or(u64::MAX), Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// How the origin's side of the channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// CHANNEL_EOF or CHANNEL_CLOSE: all bytes have been delivered.
    Clean,
    /// The session died: bytes may be missing.
    SessionLost,
    /// The visitor was too slow and was given up.
    Stalled,
}

/// How the visitor's side of the channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ours {
    Open,
    /// No more bytes towards the origin; the answer is still wanted.
    Finished,
    /// The stream was dropped; what is queued towards the origin is delivered.
    Dropped,
    /// Given up: nothing more is delivered.
    Reset,
}

struct State {
    inbox: VecDeque<Bytes>,
    inbox_bytes: usize,
    /// Since when bytes have waited of which the visitor took less than
    /// `stall_floor`, and how many it has taken since.
    waits_since: Instant,
    taken: usize,
    end: Option<End>,
    outbox: VecDeque<Bytes>,
    outbox_bytes: usize,
    ours: Ours,
    pump_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

struct Pipe {
    state: Mutex<State>,
    /// The visitor took bytes, or is gone: the downward pump may go on.
    room: Notify,
    /// The visitor brought bytes, or is done: the upward pump may go on.
    work: Notify,
    /// Bytes came for a stream that is gone.
    unwanted: Notify,
    shared: Arc<Shared>,
    settings: Arc<ChannelSettings>,
    /// Hold the visitor's FIN back until the answer has ended.
    hold_eof: bool,
    /// Whether our CHANNEL_EOF has been sent.
    eof_said: AtomicBool,
    /// Held until stream and pump are both gone.
    _permits: Vec<Permit>,
}

/// A visitor's channel as a byte stream.
pub(super) struct SshStream {
    pipe: Arc<Pipe>,
}

impl SshStream {
    /// The stream of an open channel, and the pump to run for it.
    pub(super) fn new(
        channel: Channel<Msg>,
        shared: Arc<Shared>,
        settings: Arc<ChannelSettings>,
        hold_eof: bool,
        permits: Vec<Permit>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let pipe = Arc::new(Pipe::new(shared, settings, hold_eof, permits));
        let (read, write) = channel.split();
        let pump = pump(Arc::clone(&pipe), read, write);
        (Self { pipe }, pump)
    }
}

/// Moves the channel's bytes until both sides are done, then closes it.
async fn pump(pipe: Arc<Pipe>, mut read: ChannelReadHalf, write: ChannelWriteHalf<Msg>) {
    let _gone = PumpGone(&pipe);
    let end = {
        // Whatever ends the downward side ends the upward one too: the library
        // never wakes a writer that waits for window on a closed channel.
        let mut down = std::pin::pin!(down(&pipe, &mut read));
        tokio::select! {
            end = &mut down => end,
            left = up(&pipe, &write) => match left {
                Left::Broken => None,
                // The stream is gone; nobody reads any more. The library keeps
                // what it has of a channel (3 KiB) until the session's end unless
                // the client closes it first, so it is asked to by our EOF.
                Left::Delivered => tokio::select! {
                    end = &mut down => end,
                    () = pipe.unwanted.notified() => None,
                    () = ask_to_close(&pipe, &write) => None,
                },
            },
        }
    };
    if let Some(end) = end {
        pipe.finish(end);
    }
    if matches!(end, Some(End::Clean | End::SessionLost)) {
        // The client has closed, or is gone: ours costs nothing.
        let _ = timeout(CLOSE_PATIENCE, write.close()).await;
        return;
    }
    let broken_off = pipe.shared.broken_off.fetch_add(1, Ordering::Relaxed);
    if broken_off < pipe.settings.broken_off_per_session {
        // Nobody reads: released at once, where the session is held up.
        drop(read);
        // Bounded: where the session is held up, its visitor's deadline ends that.
        let _ = timeout(pipe.settings.stall_deadline * 2, write.close()).await;
        return;
    }
    // A close of ours would cost memory until the session's end, and there have
    // been many: what still comes is let pass until the client closes. The visit
    // keeps its place meanwhile, so that these are bounded too.
    // Both at once: a session that is held up takes our EOF only when it is released.
    let rest = async { while !matches!(read.wait().await, Some(ChannelMsg::Close) | None) {} };
    let _ = tokio::join!(timeout(CLOSE_PATIENCE, say_eof(&pipe, &write)), rest);
}

/// Origin to visitor. Ends when the channel has; `None` if the stream is gone.
async fn down(pipe: &Pipe, read: &mut ChannelReadHalf) -> Option<End> {
    loop {
        match read.wait().await {
            Some(ChannelMsg::Data { data }) => {
                if !pipe.offer(&data) && !pipe.hold(&data).await {
                    // Dropping `read` releases the session at once.
                    return Some(End::Stalled);
                }
            }
            Some(ChannelMsg::Eof) => pipe.finish(End::Clean),
            Some(ChannelMsg::Close) => return Some(End::Clean),
            None => return Some(End::SessionLost),
            Some(_) => {}
        }
    }
}

/// Ends when the client has had its time to close.
async fn ask_to_close(pipe: &Pipe, write: &ChannelWriteHalf<Msg>) {
    let asked = async {
        say_eof(pipe, write).await;
        std::future::pending::<()>().await;
    };
    let _ = timeout(CLOSE_PATIENCE, asked).await;
}

/// Says the end of our bytes, once.
async fn say_eof(pipe: &Pipe, write: &ChannelWriteHalf<Msg>) {
    if !pipe.eof_said.swap(true, Ordering::AcqRel) {
        let _ = write.eof().await;
    }
}

/// How the upward direction ended.
enum Left {
    /// All bytes are on their way.
    Delivered,
    /// They are not wanted, or cannot be delivered.
    Broken,
}

/// Visitor to origin. Ends when the stream is gone and its bytes are delivered.
async fn up(pipe: &Pipe, write: &ChannelWriteHalf<Msg>) -> Left {
    loop {
        let work = pipe.work.notified();
        let (chunk, ours) = pipe.next_up();
        match (chunk, ours) {
            (_, Ours::Reset) => return Left::Broken,
            (Some(chunk), _) => {
                let mut sending = std::pin::pin!(write.data_bytes(chunk));
                let sent = tokio::select! {
                    sent = &mut sending => sent.is_ok(),
                    ours = pipe.given_up() => {
                        // Who left in good order is still delivered.
                        ours == Ours::Dropped && matches!(timeout(LINGER, sending).await, Ok(Ok(())))
                    }
                };
                if !sent {
                    return Left::Broken;
                }
            }
            (None, Ours::Open) => work.await,
            (None, Ours::Finished) => {
                if !pipe.hold_eof {
                    say_eof(pipe, write).await;
                }
                work.await;
            }
            (None, Ours::Dropped) => return Left::Delivered,
        }
    }
}

impl Pipe {
    fn new(shared: Arc<Shared>, settings: Arc<ChannelSettings>, hold_eof: bool, permits: Vec<Permit>) -> Self {
        Self {
            state: Mutex::new(State {
                inbox: VecDeque::new(),
                inbox_bytes: 0,
                waits_since: Instant::now(),
                taken: 0,
                end: None,
                outbox: VecDeque::new(),
                outbox_bytes: 0,
                ours: Ours::Open,
                pump_gone: false,
                reader: None,
                writer: None,
            }),
            room: Notify::new(),
            work: Notify::new(),
            unwanted: Notify::new(),
            shared,
            settings,
            hold_eof,
            eof_said: AtomicBool::new(false),
            _permits: permits,
        }
    }

    /// Queues bytes for the visitor, if there is room.
    fn offer(&self, data: &Bytes) -> bool {
        if data.is_empty() {
            return true; // a read of nothing would look like the end
        }
        let mut state = self.state.lock();
        if state.ours == Ours::Dropped || state.ours == Ours::Reset {
            self.unwanted.notify_one();
            return true; // nobody reads: let it pass
        }
        let cost = data.len() + PIECE_BYTES;
        if state.inbox_bytes > 0 {
            // Each channel's share shrinks as the session's budget fills, so
            // that a reading visitor always gets a packet through.
            let used = self.shared.queued();
            let share = self.settings.tunnel_buffer.saturating_sub(used) / 2;
            if state.inbox_bytes + cost > self.settings.channel_buffer.min(share) {
                return false;
            }
        } else {
            (state.waits_since, state.taken) = (Instant::now(), 0);
        }
        state.inbox_bytes += cost;
        self.shared.queued.fetch_add(cost, Ordering::Relaxed);
        state.inbox.push_back(data.clone());
        if let Some(reader) = state.reader.take() {
            reader.wake();
        }
        true
    }

    /// Waits for room: the session is held up meanwhile. `false`: the visitor
    /// took less than `stall_floor` within `stall_deadline`.
    ///
    /// That time runs from when this visitor stopped, though not from before
    /// anybody held the session up: of many who stopped together the first is
    /// waited for, and the others have had their time by then.
    async fn hold(&self, data: &Bytes) -> bool {
        let held = Held::new(&self.shared, self.settings.stall_deadline);
        loop {
            let deadline = self.state.lock().waits_since.max(held.streak) + self.settings.stall_deadline;
            loop {
                let room = self.room.notified();
                if self.offer(data) {
                    return true;
                }
                if tokio::time::timeout_at(deadline, room).await.is_err() {
                    break;
                }
            }
            if self.offer(data) {
                return true;
            }
            if self.state.lock().waits_since + self.settings.stall_deadline <= Instant::now() {
                metrics::counter!("adit_visitors_stalled_total").increment(1);
                return false;
            }
        }
    }

    fn finish(&self, end: End) {
        let mut state = self.state.lock();
        // After the origin's EOF its answer is complete, whatever comes later.
        state.end.get_or_insert(end);
        for waker in [state.reader.take(), state.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    fn next_up(&self) -> (Option<Bytes>, Ours) {
        let mut state = self.state.lock();
        let chunk = state.outbox.pop_front();
        if let Some(chunk) = &chunk {
            state.outbox_bytes -= chunk.len() + PIECE_BYTES;
            if let Some(writer) = state.writer.take() {
                writer.wake();
            }
        }
        (chunk, state.ours)
    }

    /// Waits until the stream is dropped or reset.
    async fn given_up(&self) -> Ours {
        loop {
            let work = self.work.notified();
            match self.state.lock().ours {
                Ours::Open | Ours::Finished => {}
                given_up => return given_up,
            }
            work.await;
        }
    }

    fn set_ours(&self, ours: Ours) {
        {
            let mut state = self.state.lock();
            if state.ours == Ours::Reset {
                return;
            }
            state.ours = ours;
            if ours == Ours::Dropped || ours == Ours::Reset {
                self.shared.queued.fetch_sub(state.inbox_bytes, Ordering::Relaxed);
                state.inbox.clear();
                state.inbox_bytes = 0;
            }
            if ours == Ours::Reset {
                state.outbox.clear();
                state.outbox_bytes = 0;
            }
        }
        // Both kinds of waiter: the pump has at most one of each.
        self.work.notify_waiters();
        self.work.notify_one();
        self.room.notify_one();
    }
}

/// However the pump ends (even by being dropped), the stream learns of it.
struct PumpGone<'a>(&'a Pipe);

impl Drop for PumpGone<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.pump_gone = true;
        state.end.get_or_insert(End::SessionLost);
        for waker in [state.reader.take(), state.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

/// Counts a held-up session while it lives.
struct Held<'a> {
    shared: &'a Shared,
    /// When it began that visitors hold the session up one after another.
    streak: Instant,
}

impl<'a> Held<'a> {
    /// Holds that follow each other within `pause` are one streak.
    fn new(shared: &'a Shared, pause: Duration) -> Self {
        let now = Instant::now();
        let mut streak = shared.streak.lock();
        let goes_on = streak.filter(|(_, last)| shared.is_held() || *last + pause > now);
        let streak = streak.insert((goes_on.map_or(now, |(began, _)| began), now)).0;
        shared.held.fetch_add(1, Ordering::AcqRel);
        Self { shared, streak }
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.shared.heard.fetch_add(1, Ordering::AcqRel);
        *self.shared.streak.lock() = Some((self.streak, Instant::now()));
        self.shared.held.fetch_sub(1, Ordering::AcqRel);
    }
}

impl AsyncRead for SshStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let pipe = &self.pipe;
        let mut state = pipe.state.lock();
        let (mut moved, mut freed) = (0, 0);
        while buf.remaining() > 0 {
            let Some(front) = state.inbox.front_mut() else { break };
            let n = front.len().min(buf.remaining());
            buf.put_slice(front.get(..n).unwrap_or_default());
            front.advance(n);
            if front.is_empty() {
                state.inbox.pop_front();
                freed += PIECE_BYTES;
            }
            moved += n;
        }
        freed += moved;
        if freed > 0 {
            state.inbox_bytes -= freed;
            state.taken += moved;
            if state.taken >= pipe.settings.stall_floor {
                (state.waits_since, state.taken) = (Instant::now(), 0);
            }
            drop(state);
            pipe.shared.queued.fetch_sub(freed, Ordering::Relaxed);
            pipe.room.notify_one();
            return Poll::Ready(Ok(()));
        }
        match state.end {
            Some(End::Clean) => Poll::Ready(Ok(())),
            Some(End::SessionLost) => Poll::Ready(Err(Error::TunnelLost.into_io(io::ErrorKind::ConnectionReset))),
            Some(End::Stalled) => Poll::Ready(Err(Error::VisitorStalled.into_io(io::ErrorKind::TimedOut))),
            None => {
                state.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for SshStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.pipe.state.lock();
        // After the origin's EOF it may still read; after its close nobody does.
        let failed = matches!(state.end, Some(End::SessionLost | End::Stalled));
        if state.ours != Ours::Open || state.pump_gone || failed {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if state.outbox_bytes >= OUTBOX_BYTES {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let n = buf.len().min(WRITE_BYTES);
        state.outbox.push_back(Bytes::copy_from_slice(buf.get(..n).unwrap_or_default()));
        state.outbox_bytes += n + PIECE_BYTES;
        drop(state);
        self.pipe.work.notify_one();
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let open = self.pipe.state.lock().ours == Ours::Open;
        if open {
            self.pipe.set_ours(Ours::Finished);
        }
        Poll::Ready(Ok(()))
    }
}

impl Duplex for SshStream {
    fn reset(&mut self) {
        self.pipe.set_ours(Ours::Reset);
    }
}

impl Drop for SshStream {
    fn drop(&mut self) {
        self.pipe.set_ours(Ours::Dropped);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    fn pipe(shared: &Arc<Shared>) -> Arc<Pipe> {
        let settings = ChannelSettings {
            channel_buffer: 100,
            tunnel_buffer: 1 << 20,
            stall_deadline: DEADLINE,
            stall_floor: 50,
            broken_off_per_session: 1,
        };
        Arc::new(Pipe::new(Arc::clone(shared), Arc::new(settings), false, Vec::new()))
    }

    async fn held_for(pipe: &Pipe, data: &Bytes) -> (bool, Duration) {
        let begun = Instant::now();
        (pipe.hold(data).await, begun.elapsed())
    }

    #[tokio::test(start_paused = true)]
    async fn many_who_stopped_together_hold_the_session_up_for_one_deadline() {
        let shared = Arc::default();
        let (first, second, fresh) = (pipe(&shared), pipe(&shared), pipe(&shared));
        let data = Bytes::from(vec![0; 80]);
        assert!(first.offer(&data) && second.offer(&data));
        // Nobody is in the way yet: however long they have waited, the time begins now.
        tokio::time::sleep(DEADLINE * 3).await;
        assert_eq!(held_for(&first, &data).await, (false, DEADLINE));
        assert_eq!(held_for(&second, &data).await, (false, Duration::ZERO));
        assert!(fresh.offer(&data));
        assert_eq!(held_for(&fresh, &data).await, (false, DEADLINE));
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_the_floor_in_each_deadline_is_never_given_up() {
        let pipe = pipe(&Arc::default());
        let data = Bytes::from(vec![0; 90]);
        assert!(pipe.offer(&data));
        let mut stream = SshStream { pipe: Arc::clone(&pipe) };
        let slow = tokio::spawn(async move {
            let mut read = 0;
            while read < 500 {
                tokio::time::sleep(DEADLINE * 9 / 10).await;
                read += tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 60]).await.unwrap();
            }
            stream
        });
        for _ in 0..5 {
            assert!(pipe.offer(&data) || pipe.hold(&data).await);
        }
        drop(slow.await.unwrap());
        assert_eq!(pipe.shared.queued(), 0);
    }

    fn stream(channel_buffer: usize) -> SshStream {
        let settings = ChannelSettings {
            channel_buffer,
            tunnel_buffer: 1 << 30,
            stall_deadline: Duration::from_secs(10),
            stall_floor: 1,
            broken_off_per_session: 1,
        };
        SshStream { pipe: Arc::new(Pipe::new(Arc::default(), Arc::new(settings), false, Vec::new())) }
    }

    #[tokio::test]
    async fn pieces_of_one_byte_are_bounded_like_large_ones() {
        let mut stream = stream(64 << 10);
        let pipe = Arc::clone(&stream.pipe);
        let pieces = (0..100_000).take_while(|_| pipe.offer(&Bytes::from_static(b"x"))).count();
        assert!(pieces <= 1024, "{pieces} pieces wait");
        let mut taken = vec![0; pieces];
        stream.read_exact(&mut taken).await.unwrap();
        assert_eq!((pipe.shared.queued(), pipe.state.lock().inbox_bytes), (0, 0));
        assert!(pipe.offer(&Bytes::new()));
        let nothing = tokio::time::timeout(Duration::from_millis(10), stream.read(&mut [0; 8])).await;
        assert!(nothing.is_err(), "an empty piece ended the stream: {nothing:?}");
        assert!(pipe.offer(&Bytes::from_static(b"xyz")));
        drop(stream);
        assert_eq!(pipe.shared.queued(), 0);
    }

    #[tokio::test]
    async fn an_answer_that_has_ended_stays_whole_when_the_session_is_lost() {
        let mut stream = stream(64 << 10);
        let pipe = Arc::clone(&stream.pipe);
        assert!(pipe.offer(&Bytes::from_static(b"whole")));
        pipe.finish(End::Clean);
        pipe.finish(End::SessionLost);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "whole");
    }
}
