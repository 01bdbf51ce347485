//! Another node, as this one reaches it: a link that tells whether it is there and how
//! far away, connections that wait ready, and streams to the tunnels that are logged in
//! there. A connection carries one visitor: nobody waits behind another one's bytes.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::AsyncWriteExt;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::identity::Identity;
use super::settings::FleetSettings;
use super::wire::{Frame, Open};
use crate::error::Error;
use crate::model::{NodeId, TunnelId};
use crate::stream::Stream;
use crate::tcp::{self, TcpSettings};

/// How often a link asks whether the other node is there.
const PING: Duration = Duration::from_millis(250);
/// A node that has not answered for so long is taken for dead, whatever the feed says:
/// three answers that did not come, and within 1.5 s also where they are 0.4 s away.
const DEAD: Duration = Duration::from_millis(1000);
/// Time to connect to a node, TLS included.
const CONNECT: Duration = Duration::from_secs(3);
/// A connection that waited longer is not used: the other side keeps it for
/// `door::WAIT`.
const WAITED: Duration = Duration::from_secs(120);
/// Frames that a link may be behind; more lines are dropped.
const BEHIND: usize = 1024;
/// Pauses before a link is made again: doubled each time.
const AGAIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(3));

/// How this node reaches others.
pub(super) struct Means {
    pub(super) me: NodeId,
    pub(super) settings: FleetSettings,
    pub(super) tcp: TcpSettings,
    pub(super) identity: Identity,
}

/// Another node.
pub struct Peer {
    /// Its name.
    pub id: NodeId,
    means: Arc<Means>,
    /// Where it is reached, as it told last.
    addresses: Mutex<Vec<SocketAddr>>,
    /// Whether its link is up.
    up: watch::Sender<bool>,
    draining: AtomicBool,
    /// The share of visitors, in percent, that it would be spared.
    spare: AtomicU8,
    distance: Mutex<Distance>,
    /// How far others are from it, as it says.
    trips: Mutex<Vec<(NodeId, Duration)>>,
    warm: Mutex<VecDeque<(Stream, Instant)>>,
    /// Streams that were asked for since the last tick.
    asked: AtomicUsize,
    /// What goes to it by the link.
    link: Mutex<Option<mpsc::Sender<Frame>>>,
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Peer({}, up: {})", self.id, self.is_up())
    }
}

/// How far away a node is.
#[derive(Debug, Default, Clone, Copy)]
struct Distance {
    /// The least of a minute, and since when.
    least: Option<(Duration, Instant)>,
    smooth: Option<Duration>,
    /// Share of pings that were not answered in time.
    loss: f64,
}

/// Why a node opened no stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refused {
    /// The tunnel is not there.
    NotHere(Option<NodeId>),
    /// It is, and cannot be opened.
    Failed(Error),
    /// The node cannot be reached.
    Unreachable,
}

impl Peer {
    pub(super) fn new(id: NodeId, means: Arc<Means>) -> Arc<Self> {
        Arc::new(Self {
            id,
            means,
            addresses: Mutex::default(),
            up: watch::Sender::new(false),
            draining: AtomicBool::new(false),
            spare: AtomicU8::new(0),
            distance: Mutex::default(),
            trips: Mutex::default(),
            warm: Mutex::default(),
            asked: AtomicUsize::new(0),
            link: Mutex::default(),
        })
    }

    /// Takes in where it is reached, and whether it is about to leave.
    pub(super) fn told(&self, addresses: &[SocketAddr], draining: bool) {
        *self.addresses.lock() = addresses.to_vec();
        self.draining.store(draining, Ordering::Relaxed);
    }

    /// Whether it answers.
    pub fn is_up(&self) -> bool {
        *self.up.borrow()
    }

    /// Whether it is about to leave.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Whether one visitor had better go elsewhere, by a throw of 0 to 1: it has more to
    /// do than it can.
    pub fn is_spared(&self, dice: impl FnOnce() -> f64) -> bool {
        let spare = self.spare();
        spare > 0 && dice() * 100.0 < f64::from(spare)
    }

    /// The share of visitors, in percent, that it would be spared.
    pub(super) fn spare(&self) -> u8 {
        self.spare.load(Ordering::Relaxed)
    }

    /// Connections that wait ready.
    pub(super) fn ready(&self) -> usize {
        self.warm.lock().len()
    }

    /// Waits until it no longer answers.
    pub async fn lost(&self) {
        let mut up = self.up.subscribe();
        // The sender is ours.
        let _ = up.wait_for(|up| !up).await;
    }

    /// The round trip to it, as measured: between the least of late and the smoothed
    /// one, more where pings are lost.
    pub fn round_trip(&self) -> Option<Duration> {
        let distance = *self.distance.lock();
        let (least, _) = distance.least?;
        let smooth = distance.smooth.unwrap_or(least).max(least);
        Some(((least + smooth) / 2).mul_f64(1.0 + 4.0 * distance.loss))
    }

    /// The round trips from it to others, as it told last.
    pub(super) fn trips(&self) -> Vec<(NodeId, Duration)> {
        self.trips.lock().clone()
    }

    /// Says something to whoever owns a tunnel there; dropped where the link is down or
    /// behind.
    pub fn tell_owner(&self, tunnel: &TunnelId, text: String) {
        let line = Frame::Line { tunnel: tunnel.clone(), text };
        let sent = self.link.lock().as_ref().is_some_and(|link| link.try_send(line).is_ok());
        if !sent {
            metrics::counter!("adit_fleet_lines_dropped_total").increment(1);
        }
    }

    /// Opens a stream to a tunnel that is logged in there; how long its origin took.
    ///
    /// # Cancel safety
    /// Cancel safe: what opens after the caller has left is closed.
    pub(super) async fn open(&self, open: Open) -> Result<(Stream, Duration), Refused> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        let frame = Frame::Open(open).to_bytes();
        loop {
            let kept = self.take_warm();
            let was_kept = kept.is_some();
            let mut stream = match kept {
                Some(stream) => stream,
                None => self.connect(false).await.map_err(|error| {
                    tracing::debug!(node = %self.id, %error, "cannot be reached");
                    Refused::Unreachable
                })?,
            };
            let how = if was_kept { "kept" } else { "new" };
            metrics::counter!("adit_fleet_opens_total", "connection" => how).increment(1);
            let refused = match ask(&mut stream, &frame).await {
                Ok(Frame::Opened { took }) => return Ok((stream, took)),
                Ok(Frame::NotHere { hint }) => Refused::NotHere(hint),
                Ok(Frame::Failed(error)) => Refused::Failed(error),
                // It ended while it waited, as connections do: nothing was asked for.
                Err(_) if was_kept => continue,
                Ok(_) | Err(_) => return Err(Refused::Unreachable),
            };
            self.keep_warm(stream);
            return Err(refused);
        }
    }

    fn take_warm(&self) -> Option<Stream> {
        let mut warm = self.warm.lock();
        // The youngest: the others end if nobody needs them.
        let (stream, since) = warm.pop_back()?;
        (since.elapsed() < WAITED).then_some(stream)
    }

    fn keep_warm(&self, stream: Stream) {
        let mut warm = self.warm.lock();
        if warm.len() < self.means.settings.warm {
            warm.push_back((stream, Instant::now()));
        }
    }

    /// A connection of this kind, that proved to be this node's.
    async fn connect(&self, link: bool) -> io::Result<Stream> {
        let addresses = self.addresses.lock().clone();
        let mut failure = io::Error::other("it has told no address");
        for addr in addresses {
            match timeout(CONNECT, self.connect_to(addr, link)).await {
                Ok(Ok(stream)) => return Ok(stream),
                Ok(Err(error)) => failure = error,
                Err(_) => failure = io::ErrorKind::TimedOut.into(),
            }
        }
        Err(failure)
    }

    async fn connect_to(&self, addr: SocketAddr, link: bool) -> io::Result<Stream> {
        let means = &self.means;
        let tcp = tcp::dial(addr, &means.tcp, Instant::now() + CONNECT).await?;
        let mut stream = match means.settings.is_private(addr.ip()) {
            true => Stream::tcp(tcp),
            false => Stream::other(means.identity.connect(tcp, &self.id).await?),
        };
        let hello = Frame::Hello { from: means.me.clone(), link };
        stream.write_all(&hello.to_bytes()).await?;
        stream.flush().await?;
        Ok(stream)
    }

    /// Keeps the link up, and connections ready, until `stop`.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let linked = async {
            let mut pause = AGAIN.0;
            loop {
                let made = Instant::now();
                match self.connect(true).await {
                    Ok(stream) => {
                        let why = self.hold(stream).await;
                        tracing::warn!(node = %self.id, %why, "the link to a node is lost");
                    }
                    Err(error) => tracing::debug!(node = %self.id, %error, "no link to a node"),
                }
                self.is_down();
                pause = if made.elapsed() > AGAIN.1 { AGAIN.0 } else { (pause * 2).min(AGAIN.1) };
                // Not all nodes at once.
                tokio::time::sleep(pause.mul_f64(0.5 + jitter() / 2.0)).await;
            }
        };
        tokio::select! {
            () = linked => {}
            () = stop.cancelled() => {}
        }
        self.is_down();
    }

    fn is_down(&self) {
        *self.link.lock() = None;
        self.up.send_replace(false);
        self.warm.lock().clear();
    }

    /// Holds a link until it breaks or is not answered; why.
    async fn hold(self: &Arc<Self>, stream: Stream) -> io::Error {
        let (mut read, mut write) = tokio::io::split(stream);
        let (say, mut said) = mpsc::channel::<Frame>(BEHIND);
        let (answers, mut answered) = mpsc::channel::<Frame>(16);
        let reading = async {
            loop {
                match Frame::read(&mut read).await {
                    Ok(frame) => {
                        if answers.send(frame).await.is_err() {
                            return io::ErrorKind::BrokenPipe.into();
                        }
                    }
                    Err(error) => return error,
                }
            }
        };
        let writing = async {
            while let Some(frame) = said.recv().await {
                let mut bytes = frame.to_bytes();
                while let Ok(more) = said.try_recv() {
                    bytes.extend_from_slice(&more.to_bytes());
                }
                if let Err(error) = write.write_all(&bytes).await {
                    return error;
                }
                if let Err(error) = write.flush().await {
                    return error;
                }
            }
            io::ErrorKind::BrokenPipe.into()
        };
        let watching = async {
            let mut sent: VecDeque<(u64, Instant)> = VecDeque::new();
            let (mut next, mut heard, mut peak) = (0u64, Instant::now(), 0.0f64);
            let mut tick = tokio::time::interval(PING);
            tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    biased;
                    Some(frame) = answered.recv() => {
                        let (of, draining, spare) = match frame {
                            Frame::Pong { of, draining, spare } => (of, draining, spare),
                            Frame::Trips(trips) => {
                                *self.trips.lock() = trips;
                                continue;
                            }
                            _ => continue,
                        };
                        heard = Instant::now();
                        self.draining.store(draining, Ordering::Relaxed);
                        self.spare.store(spare, Ordering::Relaxed);
                        while sent.front().is_some_and(|(ping, _)| *ping < of) {
                            sent.pop_front();
                            self.distance.lock().missed();
                        }
                        if let Some((_, at)) = sent.front().copied().filter(|(ping, _)| *ping == of) {
                            sent.pop_front();
                            self.distance.lock().measured(heard - at, heard);
                        }
                        if !self.is_up() {
                            *self.link.lock() = Some(say.clone());
                            self.up.send_replace(true);
                            tracing::info!(node = %self.id, "a node is linked");
                        }
                    }
                    () = tokio::time::sleep_until(heard + DEAD) => {
                        return io::Error::new(io::ErrorKind::TimedOut, "it does not answer");
                    }
                    _ = tick.tick() => {
                        if say.try_send(Frame::Ping(next)).is_ok() {
                            sent.push_back((next, Instant::now()));
                        }
                        next += 1;
                        // As many as were needed at once of late, and one more.
                        peak = (self.asked.swap(0, Ordering::Relaxed) as f64).max(peak * 0.97);
                        if self.is_up() {
                            self.warm_up(1 + peak.round() as usize);
                        }
                    }
                }
            }
        };
        tokio::select! {
            why = reading => why,
            why = writing => why,
            why = watching => why,
        }
    }

    /// Makes connections ready, up to so many, and lets old ones go.
    fn warm_up(self: &Arc<Self>, wanted: usize) {
        /// Handshakes at once.
        const TOGETHER: usize = 8;
        let wanted = wanted.min(self.means.settings.warm);
        let missing = {
            let mut warm = self.warm.lock();
            while warm.front().is_some_and(|(_, since)| since.elapsed() >= WAITED) {
                warm.pop_front();
            }
            wanted.saturating_sub(warm.len())
        };
        for _ in 0..missing.min(TOGETHER) {
            let peer = Arc::clone(self);
            tokio::spawn(async move {
                let mut up = peer.up.subscribe();
                tokio::select! {
                    made = peer.connect(false) => if let Ok(stream) = made && peer.is_up() {
                        peer.keep_warm(stream);
                    },
                    _ = up.wait_for(|up| !up) => {}
                }
            });
        }
    }
}

/// Sends a question and reads the answer to it.
async fn ask(stream: &mut Stream, question: &[u8]) -> io::Result<Frame> {
    stream.write_all(question).await?;
    stream.flush().await?;
    Frame::read(stream).await
}

/// 0 to 1.
fn jitter() -> f64 {
    let mut byte = [0u8];
    // Without randomness there is no jitter.
    let _ = aws_lc_rs::rand::fill(&mut byte);
    f64::from(byte[0]) / 255.0
}

impl Distance {
    fn measured(&mut self, trip: Duration, now: Instant) {
        const WINDOW: Duration = Duration::from_secs(60);
        match self.least {
            Some((least, since)) if least < trip && now - since < WINDOW => {}
            _ => self.least = Some((trip, now)),
        }
        self.smooth = Some(self.smooth.map_or(trip, |smooth| (smooth * 7 + trip) / 8));
        self.loss *= 0.95;
    }

    fn missed(&mut self) {
        self.loss = self.loss * 0.95 + 0.05;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distance_is_what_is_measured_of_late() {
        let (mut distance, start) = (Distance::default(), Instant::now());
        let ms = Duration::from_millis;
        for n in 0..20 {
            distance.measured(ms(if n == 3 { 400 } else { 40 }), start);
        }
        assert_eq!(distance.least.unwrap().0, ms(40));
        assert!(distance.smooth.unwrap() < ms(50), "{distance:?}");
        // The path has changed: the old least is forgotten.
        distance.measured(ms(90), start + Duration::from_secs(61));
        assert_eq!(distance.least.unwrap().0, ms(90));
        distance.missed();
        assert!(distance.loss > 0.0);
    }
}
