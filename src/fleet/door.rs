//! Where other nodes arrive: their links, and their visitors, each taken to a tunnel
//! that is logged in here. One hop: what is not here is refused, never passed on.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::wire::{Frame, Open};
use super::{Fleet, identity};
use crate::cores::Cores;
use crate::drain::Stages;
use crate::error::Error;
use crate::limits::{PerAddress, Permit};
use crate::metrics::Present;
use crate::model::NodeId;
use crate::relay::{RelaySettings, Relayed, relay};
use crate::stream::{Duplex, Stream};
use crate::tcp;

/// From the connection to a whole `Hello`, TLS included.
const HELLO: Duration = Duration::from_secs(5);
/// How long a connection may wait to be asked for something.
const WAIT: Duration = Duration::from_secs(150);
/// How long a link may be silent, whose node asks every 0.3 s.
const SILENT: Duration = Duration::from_secs(10);
/// How many pings until it is told how far others are.
const TRIPS: u64 = 20;
/// Connections of one address that have not proved yet whose they are.
const UNKNOWN: usize = 64;

/// Takes other nodes in.
pub struct Door {
    fleet: Arc<Fleet>,
    relay: RelaySettings,
    stages: Stages,
    cores: Cores,
    streams: Arc<AtomicUsize>,
    /// All that are open, those that wait too.
    connections: Arc<AtomicUsize>,
    unknown: PerAddress,
}

impl Door {
    /// A door that nobody has opened yet.
    pub fn new(fleet: Arc<Fleet>, relay: RelaySettings, stages: Stages, cores: Cores) -> Arc<Self> {
        let unknown = PerAddress::new(UNKNOWN, false);
        Arc::new(Self { fleet, relay, stages, cores, streams: Arc::default(), connections: Arc::default(), unknown })
    }

    /// Takes nodes from a listener until `closed`: also while this node drains, since
    /// its tunnels are reached nowhere else until their owners have left.
    pub async fn open(self: Arc<Self>, listener: TcpListener, closed: CancellationToken) {
        let settings = self.fleet.means.tcp.clone();
        let done = closed.clone();
        tcp::accept_loop(listener, closed, |tcp, addr| {
            tcp::prepare_accepted(&tcp, &settings);
            let (door, done) = (Arc::clone(&self), done.child_token());
            tokio::spawn(async move {
                let serve = door.serve(tcp, addr, &done);
                tokio::select! {
                    ended = serve => if let Err(error) = ended {
                        tracing::debug!(peer = %addr, %error, "a node's connection ended");
                    },
                    () = done.cancelled() => {}
                }
            });
        })
        .await;
    }

    async fn serve(self: &Arc<Self>, tcp: TcpStream, addr: SocketAddr, done: &CancellationToken) -> io::Result<()> {
        // As many may wait as may be open.
        let most = self.fleet.means.settings.streams.saturating_mul(2);
        let _place =
            Permit::take(&self.connections, most).ok_or_else(|| io::Error::other("fleet.streams is used up"))?;
        let unknown = self.unknown.admit(addr.ip()).ok_or_else(|| io::Error::other("too many at once"))?;
        let (stream, from, link) = timeout(HELLO, self.hello(tcp, addr)).await??;
        drop(unknown);
        if link { self.link(stream).await } else { self.streams(stream, &from, done).await }
    }

    /// Who comes, and what for.
    async fn hello(&self, tcp: TcpStream, addr: SocketAddr) -> io::Result<(Stream, NodeId, bool)> {
        let mut first = [0];
        if tcp.peek(&mut first).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let denied = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why.to_owned()));
        let means = &self.fleet.means;
        if Frame::begins_with(first[0]) {
            if !means.settings.is_private(addr.ip()) {
                return denied("plain, and not of fleet.private");
            }
            let mut stream = Stream::tcp(tcp);
            return match Frame::read(&mut stream).await? {
                Frame::Hello { from, link } => Ok((stream, from, link)),
                _ => denied("it did not say who it is"),
            };
        }
        let mut tls = means.identity.accept(tcp).await?;
        match Frame::read(&mut tls).await? {
            Frame::Hello { from, link } if identity::is(&tls, &from) => Ok((Stream::other(tls), from, link)),
            Frame::Hello { from, .. } => denied(&format!("its certificate is not that of {from}")),
            _ => denied("it did not say who it is"),
        }
    }

    async fn link(&self, mut stream: Stream) -> io::Result<()> {
        loop {
            match timeout(SILENT, Frame::read(&mut stream)).await?? {
                Frame::Ping(of) => {
                    let (draining, spare) = (self.fleet.is_draining(), self.fleet.load.spare());
                    let mut said = Frame::Pong { of, draining, spare }.to_bytes();
                    if of % TRIPS == 0 {
                        said.extend(Frame::Trips(self.fleet.trips()).to_bytes());
                    }
                    timeout(SILENT, stream.write_all(&said)).await??;
                    timeout(SILENT, stream.flush()).await??;
                }
                Frame::Line { tunnel, text } => {
                    if let Some(serving) = self.fleet.tunnels.serving(&tunnel) {
                        serving.session.console.visit_elsewhere(&text);
                    }
                }
                _ => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
    }

    /// Serves what is asked for on a connection: refusals, then at most one visitor.
    async fn streams(self: &Arc<Self>, mut stream: Stream, from: &NodeId, done: &CancellationToken) -> io::Result<()> {
        loop {
            let Frame::Open(open) = timeout(WAIT, Frame::read(&mut stream)).await?? else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let begun = Instant::now();
            let refusal = match self.open_origin(&open).await {
                Ok((origin, place)) => {
                    let answer = Frame::Opened { took: begun.elapsed() };
                    stream.write_all(&answer.to_bytes()).await?;
                    stream.flush().await?;
                    let _place = place;
                    let _present = Present::new(metrics::gauge!("adit_fleet_streams", "side" => "owner"));
                    // With the owner's session.
                    let core = self.fleet.tunnels.core(&open.tunnel);
                    let (door, done) = (Arc::clone(self), done.clone());
                    let relayed = self.cores.run(core, async move {
                        stream.rehome();
                        door.relay(stream, origin, &done).await
                    });
                    let relayed = relayed.await?;
                    metrics::counter!("adit_fleet_bytes_total", "direction" => "up").increment(relayed.up);
                    metrics::counter!("adit_fleet_bytes_total", "direction" => "down").increment(relayed.down);
                    tracing::debug!(
                        from = %from, tunnel = %open.tunnel, socket = %open.socket, id = open.id,
                        up = relayed.up, down = relayed.down, end = ?relayed.end, "a visitor of another node has left"
                    );
                    return Ok(());
                }
                Err(refusal) => refusal,
            };
            stream.write_all(&refusal.to_bytes()).await?;
            stream.flush().await?;
        }
    }

    /// A drain waits for who came before it, until its deadline.
    async fn relay(&self, stream: Stream, origin: Stream, done: &CancellationToken) -> Relayed {
        let Stages { close, cut, visitors } = &self.stages;
        let mut relayed = std::pin::pin!(relay(stream, origin, &self.relay, done));
        if close.is_cancelled() {
            return relayed.await;
        }
        let waited_for = visitors.token();
        tokio::select! {
            relayed = &mut relayed => return relayed,
            () = cut.cancelled() => {}
        }
        drop(waited_for);
        // It ends with its owner's session, or with this node.
        relayed.await
    }

    async fn open_origin(&self, open: &Open) -> Result<(Stream, Permit), Frame> {
        let fleet = &self.fleet;
        let most = fleet.means.settings.streams;
        let place = Permit::take(&self.streams, most).ok_or(Frame::Failed(Error::NodeLimit))?;
        let mut failure = None;
        for attachment in fleet.tunnels.candidates(&open.tunnel) {
            match fleet.tunnels.open(&attachment, &open.visitor).await {
                Ok(origin) => return Ok((origin, place)),
                Err(error) => failure = Some(error),
            }
        }
        Err(match failure {
            Some(error) => Frame::Failed(error),
            None => Frame::NotHere { hint: fleet.elsewhere(&open.tunnel) },
        })
    }
}
