//! The path of a visitor, top to bottom: which door, what do the first bytes
//! speak, which socket, then HTTP, a raw relay, or SSH. READ THIS FIRST.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::net::TcpStream;

use super::hello::{self, Hello};
use super::{Door, Ingress};
use crate::cores::Core;
use crate::dial::{Dial, Errand, Way};
use crate::drain::Stages;
use crate::error::Error;
use crate::http::{Protocol, Tls, Via};
use crate::limits::{AddressPermit, Permit};
use crate::metrics::Present;
use crate::model::{HostName, SocketType, Visitor};
use crate::proxy_protocol::{self, Extras, Ssl};
use crate::relay::{End, relay};
use crate::routes::Route;
use crate::stream::Stream;
use crate::tls::{Client, Purpose};
use crate::visit_log::{self, Legs, Sink, Visit, What};

/// What a raw connection came in.
#[derive(Default)]
struct Outer {
    /// How long the TLS handshake took, where it ended here.
    tls: Option<Duration>,
    /// The name asked for in it, or in the one that is passed through.
    sni: Option<HostName>,
    /// Its version and cipher suite.
    spoken: (Option<&'static str>, Option<&'static str>),
    /// Whose certificate the visitor showed in it.
    client: Option<Client>,
}

/// What counts a visitor in until it is gone.
type Counted = ((Permit, AddressPermit), Present);

impl Ingress {
    /// One visitor, from the first byte to the last.
    pub(super) async fn visit(self: Arc<Self>, door: Door, mut tcp: TcpStream, mut visitor: Visitor) {
        let admitted = match self.admit(door, &mut tcp, &mut visitor).await {
            Ok(admitted) => admitted,
            Err(error) => return self.turned_away(door, &visitor, error),
        };
        let counted = (admitted, Present::new(metrics::gauge!("adit_visitors", "door" => door.as_str())));
        let failed = match door {
            Door::Raw => self.by_port(tcp, &visitor).await,
            Door::Http | Door::Https => self.by_first_bytes(door, tcp, visitor, counted).await,
        };
        if let Err(error) = failed {
            self.turned_away(door, &visitor, error);
        }
    }

    /// The limits at the door; and who it is, where a proxy brings them.
    async fn admit(
        &self,
        door: Door,
        tcp: &mut TcpStream,
        visitor: &mut Visitor,
    ) -> Result<(Permit, AddressPermit), Error> {
        let node = Permit::take(&self.count, self.settings.connections).ok_or(Error::NodeLimit)?;
        if self.speaks_first(visitor.ip())
            && let Some(told) = self.told_by_proxy(tcp).await?
        {
            // A socket's own port is the one that was reached here.
            let local = if door == Door::Raw { visitor.local } else { told.destination };
            *visitor = Visitor::new(told.source, local);
        }
        let share = self.per_address.admit(visitor.ip()).ok_or(Error::VisitorLimit)?;
        Ok((node, share))
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
        if route.socket.kind != SocketType::Tls {
            Box::pin(self.raw(&route, visitor, stream, Outer::default())).await;
            return Ok(());
        }
        let begun = (SystemTime::now(), Instant::now());
        // Whom the rules keep out costs no handshake.
        let made = match route.admits_address(visitor.ip()).and_then(|()| route.client_auth()) {
            Ok(asked) => {
                let own = &route.socket.hostnames;
                let purpose = asked.map_or(Purpose::Raw { own }, |of| Purpose::Asking { own, of });
                self.parts.tls.accept(stream, purpose).await
            }
            Err(error) => {
                stream.reset();
                Err(error)
            }
        };
        match made {
            Ok(tls) => {
                let (sni, spoken) = (tls.sni, (tls.version, tls.cipher));
                let outer = Outer { tls: Some(begun.1.elapsed()), sni, spoken, client: tls.client };
                Box::pin(self.raw(&route, visitor, tls.stream, outer)).await;
            }
            // No visit: it is not known what they wanted.
            Err(Error::TlsHandshake) => return Err(Error::TlsHandshake),
            Err(error) => {
                let mut visit = raw_visit(&route, visitor, begun);
                (visit.protocol, visit.error) = ("tls", Some(error));
                visit.total = begun.1.elapsed();
                visit_log::record(visit, None);
            }
        }
        Ok(())
    }

    /// The shared ports: what do they speak?
    async fn by_first_bytes(
        self: &Arc<Self>,
        door: Door,
        mut tcp: TcpStream,
        visitor: Visitor,
        counted: Counted,
    ) -> Result<(), Error> {
        let (hello, head) = hello::peek(&mut tcp, &self.parts.hello).await?;
        let name = match (door, &hello) {
            (Door::Https, Hello::Tls(client)) => client.sni.name().cloned(),
            (Door::Http, Hello::Http1) => hello::host(&head),
            (Door::Http, Hello::Http2) => None,
            (Door::Https, Hello::Ssh) => {
                self.owner(tcp, head, visitor.addr);
                return Ok(());
            }
            _ => return Err(Error::HelloUnknown),
        };
        // Now it is known with whose session they had best be served.
        let route = name.as_ref().and_then(|name| self.parts.routes.by_host(name.as_str()));
        let core = self.core(route.as_deref(), visitor.addr);
        let ingress = Arc::clone(self);
        let go_on = move |tcp| async move {
            let stream = Stream::tcp(tcp).with_head(head);
            let served = match hello {
                Hello::Tls(_) => ingress.by_name(stream, name, route, visitor).await,
                _ => {
                    let protocol = if hello == Hello::Http2 { Protocol::Http2 } else { Protocol::Http1 };
                    ingress.http(stream, visitor, Via { protocol, tls: None }).await;
                    Ok(())
                }
            };
            if let Err(error) = served {
                ingress.turned_away(door, &visitor, error);
            }
            drop(counted);
        };
        if Core::here() == Some(core) {
            go_on(tcp).await;
        } else {
            self.parts.cores.serve(core, &self.parts.stages.visitors, tcp, go_on);
        }
        Ok(())
    }

    /// TLS on the shared port: the socket of the name that is asked for, or what it is
    /// asked in HTTP.
    async fn by_name(
        &self,
        stream: Stream,
        name: Option<HostName>,
        route: Option<Arc<Route>>,
        visitor: Visitor,
    ) -> Result<(), Error> {
        // Nobody passes through in place of a host of the node's own.
        let is_own = name.as_ref().is_some_and(|name| self.parts.http.is_own_host(name.as_str()));
        if let Some(route) = route.filter(|route| route.socket.kind == SocketType::Passthrough && !is_own) {
            let outer = Outer { sni: name, ..Outer::default() };
            Box::pin(self.raw(&route, &visitor, stream, outer)).await;
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
        Ok(())
    }

    /// Requests, each routed by its own name.
    async fn http(&self, stream: Stream, visitor: Visitor, via: Via) {
        let Stages { close, cut, .. } = &self.parts.stages;
        self.parts.http.serve(stream, visitor, via, close, cut).await;
    }

    /// Bytes as they are, between a visitor and the nearest live tunnel. To be boxed: a
    /// visit's task is as large as the largest of its ways.
    async fn raw(&self, route: &Arc<Route>, visitor: &Visitor, stream: Stream, outer: Outer) {
        let (at, start) = (SystemTime::now(), Instant::now());
        let _present = Present::new(metrics::gauge!("adit_raw_connections", "type" => route.socket.kind.as_str()));
        let mut visit = raw_visit(route, visitor, (at, start));
        visit.protocol = if outer.tls.is_some() { "tls" } else { "tcp" };
        visit.legs.tls = outer.tls;
        let mut console: Option<Arc<dyn Sink>> = None;
        let dialer = &self.parts.dialer;
        let Outer { sni, spoken: (version, cipher), client, tls } = outer;
        let cut = self.parts.stages.cut.child_token();
        let mut routed = start.elapsed();
        let dialed = async {
            let stay = self.parts.routes.let_in(route, visitor.ip(), client, cut)?;
            let place = dialer.admit(route)?;
            routed = start.elapsed();
            let errand = Errand { socket: &route.socket.id, visitor, id: "" };
            let mut dialed = tokio::select! {
                dialed = dialer.dial(dialer.ways(route, visitor.ip()), errand) => dialed?,
                () = stay.cut().cancelled() => return Err(stay.allowed().err().unwrap_or(Error::Draining)),
            };
            stay.allowed()?;
            if let Some(proxy) = route.socket.proxy_protocol {
                let authority = sni.as_ref().map(HostName::as_str);
                let extras = Extras { authority, unique_id: &proxy_protocol::unique_id(), ..Extras::default() };
                let common_name = stay.client().and_then(|client| client.certificate.common_name());
                let ssl = tls.map(|_| Ssl { version, cipher, certified: stay.client().is_some(), common_name });
                proxy_protocol::tell_of_tls(&mut dialed.stream, proxy, visitor, extras, ssl).await?;
            }
            Ok((stay, place, dialed))
        };
        match dialed.await {
            Ok((stay, _place, dialed)) => {
                visit.tunnel = Some(dialed.way.tunnel().clone());
                (visit.node, visit.legs.tunnel) = (dialed.way.far(), dialed.took);
                console = Some(dialed.way.console());
                let before = start.elapsed();
                (visit.legs.route, visit.legs.dial) = (Some(routed), Some(before - routed));
                let relayed = relay(stream, dialed.stream, &self.parts.relay, stay.cut()).await;
                visit.bytes_up = relayed.up;
                visit.bytes_down = relayed.down;
                visit.first_byte = relayed.first_byte.map(|d| before + d);
                visit.error = match relayed.end {
                    End::Cut => stay.allowed().err().or(relayed.error()),
                    _ => relayed.error(),
                };
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

/// The record of a raw connection of which nothing is known yet but where it goes.
fn raw_visit(route: &Route, visitor: &Visitor, (at, start): (SystemTime, Instant)) -> Visit {
    Visit {
        at,
        visitor: visitor.addr,
        socket: Some(route.socket.id.clone()),
        tunnel: None,
        node: None,
        kind: route.socket.kind.as_str(),
        protocol: "tcp",
        id: None,
        what: What::Connection,
        legs: Legs::default(),
        status: None,
        bytes_up: 0,
        bytes_down: 0,
        first_byte: None,
        total: start.elapsed(),
        error: None,
    }
}
