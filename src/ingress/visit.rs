//! The path of a visitor, top to bottom: which door, what do the first bytes
//! speak, which socket, then HTTP, a raw relay, or SSH. READ THIS FIRST.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;

use super::hello::{self, Hello};
use super::{Door, Ingress};
use crate::dial::{Dial, Way};
use crate::drain::Stages;
use crate::error::Error;
use crate::http::{Protocol, Tls, Via};
use crate::metrics::Present;
use crate::model::{SocketType, Visitor};
use crate::relay::relay;
use crate::routes::Route;
use crate::stream::Stream;
use crate::tls::Purpose;
use crate::visit_log::{self, Legs, Sink, Visit, What};

impl Ingress {
    /// One visitor, from the first byte to the last.
    pub(super) async fn visit(self: Arc<Self>, door: Door, tcp: TcpStream, visitor: Visitor) {
        let admitted = match self.admit(&visitor) {
            Ok(admitted) => admitted,
            Err(limit) => return self.turned_away(door, &visitor, limit),
        };
        let _present = Present::new(metrics::gauge!("adit_visitors", "door" => door.as_str()));
        let failed = match door {
            Door::Raw => self.by_port(tcp, &visitor).await,
            Door::Http | Door::Https => self.by_first_bytes(door, tcp, visitor).await,
        };
        if let Err(error) = failed {
            self.turned_away(door, &visitor, error);
        }
        drop(admitted);
    }

    /// A visitor who found no socket, or no place; the connection is closed.
    fn turned_away(&self, door: Door, visitor: &Visitor, error: Error) {
        tracing::debug!(visitor = %visitor.addr, door = door.as_str(), %error, "turned away");
        metrics::counter!("adit_visitors_refused_total", "error" => error.label()).increment(1);
    }

    /// A socket's own port: the origin may speak first, so never wait for bytes.
    async fn by_port(&self, tcp: TcpStream, visitor: &Visitor) -> Result<(), Error> {
        let route = self.parts.routes.by_port(visitor.local.port()).ok_or(Error::NoSocket)?;
        let stream = Stream::tcp(tcp);
        match route.socket.kind {
            SocketType::Tls => {
                let own = &route.socket.hostnames;
                let begun = Instant::now();
                let tls = self.parts.tls.accept(stream, Purpose::Raw { own }).await?;
                self.raw(&route, visitor, tls.stream, Some(begun.elapsed())).await;
            }
            _ => self.raw(&route, visitor, stream, None).await,
        }
        Ok(())
    }

    /// The shared ports: what do they speak?
    async fn by_first_bytes(self: &Arc<Self>, door: Door, mut tcp: TcpStream, visitor: Visitor) -> Result<(), Error> {
        let (hello, head) = hello::peek(&mut tcp, &self.parts.hello).await?;
        match (door, hello) {
            (Door::Https, Hello::Tls(client)) => {
                let passed = client.sni.name().and_then(|name| self.parts.routes.by_host(name.as_str()));
                let stream = Stream::tcp(tcp).with_head(head);
                if let Some(route) = passed.filter(|r| r.socket.kind == SocketType::Passthrough) {
                    self.raw(&route, &visitor, stream, None).await;
                    return Ok(());
                }
                let begun = Instant::now();
                let tls = self.parts.tls.accept(stream, Purpose::Http).await?;
                let took = begun.elapsed();
                let certificate = tls.certificate;
                let covers = Arc::new(move |host: &str| certificate.covers(host));
                let protocol = if tls.h2 { Protocol::Http2 } else { Protocol::Http1 };
                let via = Via { protocol, tls: Some(Tls { sni: tls.sni, covers, took }) };
                self.http(tls.stream, visitor, via).await;
            }
            (Door::Http, Hello::Http1) => {
                self.http(Stream::tcp(tcp).with_head(head), visitor, Via { protocol: Protocol::Http1, tls: None })
                    .await;
            }
            (Door::Http, Hello::Http2) => {
                self.http(Stream::tcp(tcp).with_head(head), visitor, Via { protocol: Protocol::Http2, tls: None })
                    .await;
            }
            (Door::Https, Hello::Ssh) => self.owner(tcp, head, visitor.addr),
            _ => return Err(Error::HelloUnknown),
        }
        Ok(())
    }

    /// Requests, each routed by its own name.
    async fn http(&self, stream: Stream, visitor: Visitor, via: Via) {
        let Stages { close, cut, .. } = &self.parts.stages;
        self.parts.http.serve(stream, visitor, via, close, cut).await;
    }

    /// Bytes as they are, between a visitor and the nearest live tunnel.
    async fn raw(&self, route: &Arc<Route>, visitor: &Visitor, stream: Stream, tls: Option<Duration>) {
        let (at, start) = (SystemTime::now(), Instant::now());
        let _present = Present::new(metrics::gauge!("adit_raw_connections", "type" => route.socket.kind.as_str()));
        let mut visit = Visit {
            at,
            visitor: visitor.addr,
            socket: Some(route.socket.id.clone()),
            tunnel: None,
            kind: route.socket.kind.as_str(),
            protocol: if tls.is_some() { "tls" } else { "tcp" },
            id: None,
            what: What::Connection,
            legs: Legs { tls, ..Legs::default() },
            status: None,
            bytes_up: 0,
            bytes_down: 0,
            first_byte: None,
            total: start.elapsed(),
            error: None,
        };
        let mut console: Option<Arc<dyn Sink>> = None;
        let dialer = &self.parts.dialer;
        let routed = start.elapsed();
        let dialed = async {
            let place = dialer.admit(route)?;
            Ok((place, dialer.dial(dialer.ways(route), visitor).await?))
        };
        match dialed.await {
            Ok((_place, dialed)) => {
                visit.tunnel = Some(dialed.way.tunnel().clone());
                console = Some(dialed.way.console());
                let before = start.elapsed();
                (visit.legs.route, visit.legs.dial) = (Some(routed), Some(before - routed));
                let relayed = relay(stream, dialed.stream, &self.parts.relay, &self.parts.stages.cut).await;
                visit.bytes_up = relayed.up;
                visit.bytes_down = relayed.down;
                visit.first_byte = relayed.first_byte.map(|d| before + d);
                visit.error = relayed.error();
            }
            Err(error) => {
                visit.error = Some(error);
                // Nothing can be said in an unknown protocol: a reset is the
                // clearest "connection refused" there is.
                stream.reset();
            }
        }
        visit.total = start.elapsed();
        visit_log::record(visit, console.as_ref());
    }
}
